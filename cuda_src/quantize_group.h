// Activations to int8 by the kernel that computes them: a thread holds four neighbouring elements, eight threads a block of 32.
// The same arithmetic as quantize.cu, bit for bit. Or to panels of halves, as half_panels there.
#pragma once
#include "tp.h"

namespace ggml_tp {

TP_DEVICE void load_four(const char* p, float (&v)[4]) {
    const TpInt4 w = *(const TpInt4*)p;
    v[0] = __int_as_float(w.x), v[1] = __int_as_float(w.y), v[2] = __int_as_float(w.z), v[3] = __int_as_float(w.w);
}
TP_DEVICE void store_four(char* p, const float (&v)[4]) {
    *(TpInt4*)p = {__float_as_int(v[0]), __float_as_int(v[1]), __float_as_int(v[2]), __float_as_int(v[3])};
}

/// Elements i to i + 3 of a column of a product, whose pieces lie at multiples of 16 bytes; kept: where it is written too.
TP_DEVICE void sum_four(const Pieces& pieces, i64 column, i64 i, char* kept, float (&v)[4]) {
    const float* from = pieces.sums + column * pieces.column + i;
    for (int e = 0; e < 4; ++e) v[e] = 0.0f;
#pragma unroll 8
    for (int piece = 0; piece < pieces.n; ++piece) {
        float more[4];
        load_four((const char*)(from + piece * pieces.piece), more);
        for (int e = 0; e < 4; ++e) v[e] += more[e];
    }
    if (pieces.kept) store_four(kept, v);
}

/// How a block of 32 whose largest magnitude is `most` becomes int8: every kernel that does it rounds alike, so a token has the same bits as one
/// kernel and as many. (Exact ties are common where rows of blocks are quantised again: v / d and v * (1 / d) would part there.)
struct Int8Scale {
    float inverse, d;
    /// 127 / most, of both a 2^20th: whatever `most` is, it and its reciprocal are normal numbers then. And most / 127.
    TP_MEMBER explicit Int8Scale(float most) {
        constexpr float kLeast = 1e-30f;
        const float quotient = tp_quotient(127.0f * 0x1p-20f, fmaxf(most, kLeast) * 0x1p-20f);  // of all lanes: a branch would keep what follows apart
        inverse = most > kLeast ? quotient : 0.0f;
        constexpr float kInverse = 1.0f / 127.0f;
        const float near = most * kInverse;
        d = fmaf(fmaf(-127.0f, near, most), kInverse, near);  // as most / 127.0f is rounded, of every mantissa
    }
    /// v's int8 is the low byte: added to 1.5 * 2^23 a float is rounded to an integer. Conversions are a quarter as fast.
    TP_MEMBER u32 bits(float v) const { return (u32)__float_as_int(tp_mul_rounded(v, inverse) + 12582912.0f); }
};
TP_DEVICE int four_bytes(u32 a, u32 b, u32 c, u32 d) { return (int)tp_byte_perm(tp_byte_perm(a, b, 0x0040), tp_byte_perm(c, d, 0x0040), 0x5410); }

/// Element `at` (a multiple of 4) of a row and the three after it; all 32 lanes of a warp call it. Lanes beyond the row (`inside` false) hold
/// zeros and write nothing. xq: the row's int8, xd: its {scale, scale * sum} per 32.
TP_DEVICE void quantize_four(const float (&v)[4], i64 at, bool inside, char* xq, char* xd) {
    float most = fmaxf(fmaxf(fabsf(v[0]), fabsf(v[1])), fmaxf(fabsf(v[2]), fabsf(v[3])));
#pragma unroll
    for (int o = 1; o < 8; o *= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, o));
    const Int8Scale scale(most);
    const int word = four_bytes(scale.bits(v[0]), scale.bits(v[1]), scale.bits(v[2]), scale.bits(v[3]));
    int sum = tp_dp4a(word, 0x01010101, 0);
#pragma unroll
    for (int o = 1; o < 8; o *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, o);
    if (!inside) return;
    *(int*)(xq + at) = word;
    if (at % 32 == 0) {
        float* out = (float*)xd + at / 32 * 2;
        out[0] = scale.d;
        out[1] = scale.d * (float)sum;
    }
}

TP_DEVICE u16 activation_half(float v) { return tp_float_to_half(v * kHalved); }

/// Byte of element `at` of a row within panels [rows / 128][k / 64] of 128 rows (or other so many) x 128 bytes, whose 16-byte chunk c of row r lies at c ^ r % 8.
TP_DEVICE i64 panel_byte(u32 row, u32 at, u32 k, u32 rows = kPanelRows) {
    const u32 steps = (k + 63) / 64;
    return (i64)(row / rows * steps + at / 64) * rows * 128 + (row % rows * 128 + (at / 8 % 8 ^ row % 8) * 16 + at % 8 * 2);
}

/// What a product reads of a row: four elements as int8 or as halves, whatever its form. All 32 lanes call it, as above.
TP_DEVICE void leave_four(ActivationForm form, const float (&v)[4], i64 at, bool inside, char* xq, char* xd, u32 row, i64 k) {
    if (form == kInt8Rows) return quantize_four(v, at, inside, xq + row * k, xd + row * (k / 32) * 8);
    if (!inside) return;
    u64 word = 0;
    for (int i = 0; i < 4; ++i) word |= (u64)(form == kBf16Panels ? tp_float_to_bf16(v[i]) : activation_half(v[i])) << 16 * i;
    *(u64*)(xq + panel_byte(row, (u32)at, (u32)k)) = word;
}

}  // namespace ggml_tp
