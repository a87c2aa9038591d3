// GET_ROWS and SET_ROWS. One thread per element. A row number outside the tensor is reported and touches nothing.
#include "get_row.h"

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
