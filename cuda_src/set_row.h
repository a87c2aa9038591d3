// Row numbers, and one element of SET_ROWS: what rows.cu and the kernels that store what they compute share.
#pragma once
#include "element.h"

namespace ggml_tp {

TP_DEVICE i64 row_number(const View& idx, i64 i0, i64 i1, i64 i2) {
    const char* p = idx.data + i0 * idx.nb[0] + i1 * idx.nb[1] + i2 * idx.nb[2];
    return idx.type == kI64 ? *(const i64*)p : (i64) * (const i32*)p;
}

/// The local row of y that row (i1, i2, i3) of x goes to; -1: another rank's, or outside of y, which is a fault.
TP_DEVICE i64 target_row(const SetRowsArgs& args, i64 i1, i64 i2, i64 i3) {
    const i64 row = row_number(args.idx, i1, wrap(i2, args.idx.ne[1]), wrap(i3, args.idx.ne[2]));
    if (row < 0 || row >= args.n_rows) {
        atomicExch(args.fault, (u32)kFaultKvCell);
        return -1;
    }
    if (!args.row_period) return row;
    const i64 in_period = row % args.row_period;
    if (in_period < args.row_begin || in_period >= args.row_end) return -1;
    return row / args.row_period * (args.row_end - args.row_begin) + in_period - args.row_begin;
}

/// Element (i0, i1, i2, i3) of x, whose value is v, goes to row idx[i1, i2, i3] of y; a row outside of y is a fault and touches nothing.
TP_DEVICE void set_row_element(const SetRowsArgs& args, i64 i0, i64 i1, i64 i2, i64 i3, float v) {
    const i64 row = target_row(args, i1, i2, i3);
    if (row >= 0) store(args.y, {i0, row, i2, i3}, v);
}

}  // namespace ggml_tp
