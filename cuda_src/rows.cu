// GET_ROWS and SET_ROWS. One thread per element. A row number outside the tensor is reported and touches nothing.
#include "get_row.h"
#include "index.h"
#include "quantize_search.h"
#include "set_row.h"

TP_KERNEL(get_rows, GetRowsArgs, 256) {
    using namespace ggml_tp;
    TP_FOR_EACH(i, tp_elems(args.y)) get_row_element(args, i);
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
        set_row_element(args, at.i[0], at.i[1], at.i[2], at.i[3], tp_load(args.x.type, tp_at(args.x, at)));
    }
}

namespace ggml_tp {

/// The same into blocks, one thread each; x.ne[0] counts blocks, x's elements lie nb[0] apart.
template <class Put>
TP_DEVICE void set_rows_blocks_by(const SetRowsArgs& args, Put put) {
    const int elems = (int)args.block_elems;
    TP_FOR_EACH(i, tp_elems(args.x)) {
        const Index4 at = tp_index(args.x.ne, i);
        const i64 row = target_row(args, at.i[1], at.i[2], at.i[3]);
        if (row < 0) continue;
        const char* from = args.x.data + at.i[0] * elems * args.x.nb[0] + at.i[1] * args.x.nb[1] + at.i[2] * args.x.nb[2] + at.i[3] * args.x.nb[3];
        auto value = [&](int e) { return tp_load(args.x.type, from + e * args.x.nb[0]); };
        put(value, args.y.data + at.i[0] * args.y.nb[0] + row * args.y.nb[1] + at.i[2] * args.y.nb[2] + at.i[3] * args.y.nb[3]);
    }
}

}  // namespace ggml_tp

TP_KERNEL(set_rows_blocks, SetRowsArgs, 256) {
    using namespace ggml_tp;
    set_rows_blocks_by(args, [&](auto x, char* out) { tp_quantize_block(args.y.type, x, out); });
}
TP_KERNEL(set_rows_search, SetRowsArgs, 256) {
    using namespace ggml_tp;
    set_rows_blocks_by(args, [&](auto x, char* out) { tp_search_block(args.y.type, x, out); });
}
