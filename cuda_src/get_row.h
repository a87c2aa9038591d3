// One element of GET_ROWS: shared by rows.cu and stream.cu.
#pragma once
#include "dequantize.h"
#include "index.h"
#include "set_row.h"

namespace ggml_tp {

/// Element i of y: y[:, i10, i11, i12] = w[:, idx[i10, i11, i12], i11, i12]
TP_DEVICE void get_row_element(const GetRowsArgs& args, i64 i) {
    const Index4 at = tp_index(args.y.ne, i);
    const i64 row = row_number(args.idx, at.i[1], at.i[2], at.i[3]);
    if (row < 0 || row >= args.w.n) {
        atomicExch(args.fault, (u32)kFaultRowIndex);
        return;
    }
    const WeightRow w = tp_weight_row(args.w, row, at.i[2] % args.w.ne2, at.i[3] % args.w.ne3);
    tp_store(args.y.type, tp_at(args.y, at), tp_weight_elem(args.w.type, w, at.i[0]));
}

}  // namespace ggml_tp
