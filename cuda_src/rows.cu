// GET_ROWS and SET_ROWS. One thread per element. A row number outside the tensor is reported and touches nothing.
#include "dequantize.h"
#include "index.h"

namespace ggml_tp {

TP_DEVICE i64 row_number(const View& idx, i64 i0, i64 i1, i64 i2) {
    const char* p = idx.data + i0 * idx.nb[0] + i1 * idx.nb[1] + i2 * idx.nb[2];
    return idx.type == kI64 ? *(const i64*)p : (i64) * (const i32*)p;
}

}  // namespace ggml_tp

// y[:, i10, i11, i12] = w[:, idx[i10, i11, i12], i11, i12]
TP_KERNEL(get_rows, GetRowsArgs, 256) {
    using namespace ggml_tp;
    TP_FOR_EACH(i, tp_elems(args.y)) {
        const Index4 at = tp_index(args.y.ne, i);
        const i64 row = row_number(args.idx, at.i[1], at.i[2], at.i[3]);
        if (row < 0 || row >= args.w.n) {
            atomicExch(args.fault, (u32)kFaultRowIndex);
            continue;
        }
        const WeightRow w = tp_weight_row(args.w, row, at.i[2] % args.w.ne2, at.i[3] % args.w.ne3);
        tp_store(args.y.type, tp_at(args.y, at), tp_weight_elem(args.w.type, w, at.i[0]));
    }
}
TP_KERNEL(get_rows_i32, GetRowsArgs, 256) {
    using namespace ggml_tp;
    TP_FOR_EACH(i, tp_elems(args.y)) {
        const Index4 at = tp_index(args.y.ne, i);
        const i64 row = row_number(args.idx, at.i[1], at.i[2], at.i[3]);
        if (row < 0 || row >= args.w_view.ne[1]) {
            atomicExch(args.fault, (u32)kFaultRowIndex);
            continue;
        }
        Index4 from = at;
        from.i[1] = row;
        *(i32*)tp_at(args.y, at) = *(const i32*)tp_at_repeated(args.w_view, from);
    }
}
// y[:, idx[i1, i2 % , i3 % ], i2, i3] = x[:, i1, i2, i3]
TP_KERNEL(set_rows, SetRowsArgs, 256) {
    using namespace ggml_tp;
    TP_FOR_EACH(i, tp_elems(args.x)) {
        const Index4 at = tp_index(args.x.ne, i);
        i64 row = row_number(args.idx, at.i[1], at.i[2] % args.idx.ne[1], at.i[3] % args.idx.ne[2]);
        if (row < 0 || row >= args.n_rows) {
            atomicExch(args.fault, (u32)kFaultKvCell);
            continue;
        }
        if (args.row_period) {
            const i64 in_period = row % args.row_period;
            if (in_period < args.row_begin || in_period >= args.row_end) continue;
            row = row / args.row_period * (args.row_end - args.row_begin) + in_period - args.row_begin;
        }
        Index4 to = at;
        to.i[1] = row;
        tp_store(args.y.type, tp_at(args.y, to), tp_load(args.x.type, tp_at(args.x, at)));
    }
}
