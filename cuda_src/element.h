// One element of a View, read and written as float, whatever its type; and rows of a 4-d index space spread over a grid.
// The type of a view is the same for every thread of a launch, so the branches below never diverge.
#pragma once
#include "tp.h"

namespace ggml_tp {

TP_DEVICE float load_element(const char* p, i32 type) {
    if (type == kF32) return *(const float*)p;
    if (type == kF16) return tp_half_to_float(*(const u16*)p);
    if (type == kBF16) return tp_bf16_to_float(*(const u16*)p);
    return (float)*(const i32*)p;
}

TP_DEVICE void store_element(char* p, i32 type, float v) {
    if (type == kF32) *(float*)p = v;
    else if (type == kF16) *(u16*)p = tp_float_to_half(v);
    else if (type == kBF16) *(u16*)p = tp_float_to_bf16(v);
    else *(i32*)p = (i32)v;
}

struct Index {
    i64 i0, i1, i2, i3;
};

TP_DEVICE char* element_at(const View& v, const Index& i) { return v.data + i.i0 * v.nb[0] + i.i1 * v.nb[1] + i.i2 * v.nb[2] + i.i3 * v.nb[3]; }

TP_DEVICE float load(const View& v, const Index& i) { return load_element(element_at(v, i), v.type); }
TP_DEVICE void store(const View& v, const Index& i, float f) { store_element(element_at(v, i), v.type, f); }

/// Index of a row (counted through dims 1..3 of `ne`) with i0 = 0. The launchers refuse more than 2^31 rows: 32-bit divisions.
TP_DEVICE Index row_index(u32 row, const i64 (&ne)[4]) {
    const u32 n1 = (u32)ne[1], n2 = (u32)ne[2];
    const u32 r = row / n1;
    return {0, row - r * n1, r % n2, r / n2};
}

/// i modulo n, without the division in the usual cases (not broadcast, or broadcast from one).
TP_DEVICE i64 wrap(i64 i, i64 n) { return i < n ? i : n == 1 ? 0 : (i64)((u32)i % (u32)n); }

TP_DEVICE Index wrap(const Index& i, const i64 (&ne)[4]) { return {wrap(i.i0, ne[0]), wrap(i.i1, ne[1]), wrap(i.i2, ne[2]), wrap(i.i3, ne[3])}; }

/// ALiBi's slope of a head, as ggml computes it: `head` and `n_head` are global, over all ranks.
TP_OUTLINE float alibi_slope_of(float max_bias, i32 head, i32 n_head) {
    i32 n_head_log2 = 1;
    while (n_head_log2 * 2 <= n_head) n_head_log2 *= 2;
    if (head < n_head_log2) return powf(powf(2.0f, -max_bias / (float)n_head_log2), (float)(head + 1));
    return powf(powf(2.0f, -(max_bias / 2.0f) / (float)n_head_log2), (float)(2 * (head - n_head_log2) + 1));
}
TP_DEVICE float alibi_slope(float max_bias, i32 head, i32 n_head) { return max_bias <= 0.0f ? 1.0f : alibi_slope_of(max_bias, head, n_head); }

}  // namespace ggml_tp
