// What a thread of the streaming products (mul_vec.cu, mul_vec_id.cu, stream.cu) reads of a row in one step, and multiplies.
#pragma once
#include "dequantize.h"

namespace ggml_tp {

/// Sixteen int8 products.
TP_DEVICE int dot16(const TpInt4& a, const TpInt4& b, int sum) { return tp_dp4a(a.w, b.w, tp_dp4a(a.z, b.z, tp_dp4a(a.y, b.y, tp_dp4a(a.x, b.x, sum)))); }
TP_DEVICE TpInt4 nibbles(const TpInt4& v, int shift) {
    return {v.x >> shift & 0x0f0f0f0f, v.y >> shift & 0x0f0f0f0f, v.z >> shift & 0x0f0f0f0f, v.w >> shift & 0x0f0f0f0f};
}
TP_DEVICE int sum16(const TpInt4& x) {
    const int ones = 0x01010101;
    return tp_dp4a(ones, x.w, tp_dp4a(ones, x.z, tp_dp4a(ones, x.y, tp_dp4a(ones, x.x, 0))));
}

/// A piece: 32 weights of a row, two runs of 16 that lie in one 16-byte word of quants (or two words, for 8-bit types).
/// first, second: where the runs' activations start within the row of x. load() reads, dot() multiplies; x0, x1 are the runs' int8,
/// d0, d1 {scale, scale * sum over its 32} of their blocks.
template <int kType>
struct Piece;

template <>
struct Piece<kQ4_0> {
    TpInt4 q;
    float d;
    static TP_MEMBER i64 first(i64 p) { return p * 32; }
    static TP_MEMBER i64 second(i64 p) { return p * 32 + 16; }
    template <class Load>
    TP_MEMBER void load(const char* const* plane, i64 p, Load load16) {
        q = load16(plane[0] + p * 16);
        d = tp_load_half(plane[1] + p * 2);
    }
    TP_MEMBER float dot(i64, const TpInt4& x0, const TpInt4& x1, TpFloat2 d0, TpFloat2) const {
        const int sum = dot16(nibbles(q, 4), x1, dot16(nibbles(q, 0), x0, 0));
        return d * ((float)sum * d0.x - 8.0f * d0.y);
    }
};
template <>
struct Piece<kQ8_0> {
    TpInt4 q0, q1;
    float d;
    static TP_MEMBER i64 first(i64 p) { return p * 32; }
    static TP_MEMBER i64 second(i64 p) { return p * 32 + 16; }
    template <class Load>
    TP_MEMBER void load(const char* const* plane, i64 p, Load load16) {
        q0 = load16(plane[0] + p * 32);
        q1 = load16(plane[0] + p * 32 + 16);
        d = tp_load_half(plane[1] + p * 2);
    }
    TP_MEMBER float dot(i64, const TpInt4& x0, const TpInt4& x1, TpFloat2 d0, TpFloat2) const { return d * d0.x * (float)dot16(q1, x1, dot16(q0, x0, 0)); }
};
/// Scales and mins of sub-blocks 2 * pair and 2 * pair + 1, a byte each (above them lies anything). Twelve bytes of a block: scales 0-3, mins
/// 0-3, then the low halves of 4-7 with their high bits above the first eight. No branch: a warp's lanes have all four pairs.
TP_DEVICE void six_bits(const u32* packed, int pair, u32& scales, u32& mins) {
    const int shift = pair % 2 * 16;
    const u32 s = packed[0] >> shift, m = packed[1] >> shift, low = packed[2] >> shift;
    scales = pair < 2 ? s & 0x3f3f : (low & 0x0f0f) | (s >> 2 & 0x3030);
    mins = pair < 2 ? m & 0x3f3f : (low >> 4 & 0x0f0f) | (m >> 2 & 0x3030);
}
// 32 bytes hold sub-blocks 2j (low nibbles) and 2j + 1 (high); a piece is half of them. The mins' share, which needs the sum over a
// whole sub-block, is the first half's work.
template <>
struct Piece<kQ4_K> {
    TpInt4 q;
    float d0_, d1_, m0_, m1_;
    static TP_MEMBER i64 first(i64 p) { return p / 8 * 256 + p % 8 / 2 * 64 + p % 2 * 16; }
    static TP_MEMBER i64 second(i64 p) { return first(p) + 32; }
    template <class Load>
    TP_MEMBER void load(const char* const* plane, i64 p, Load load16) {
        q = load16(plane[0] + p * 16);
        const i64 b = p / 8;
        const int pair = (int)(p % 8 / 2);
        const u32 dm = *(const u32*)(plane[2] + b * 4);
        const float d = tp_half_to_float((u16)dm), m = tp_half_to_float((u16)(dm >> 16));
        u32 scales, mins;
        six_bits((const u32*)(plane[1] + b * 12), pair, scales, mins);
        d0_ = d * (float)(scales & 63);
        d1_ = d * (float)(scales >> 8 & 63);
        m0_ = p % 2 ? 0.0f : m * (float)(mins & 63);
        m1_ = p % 2 ? 0.0f : m * (float)(mins >> 8 & 63);
    }
    TP_MEMBER float dot(i64, const TpInt4& x0, const TpInt4& x1, TpFloat2 d0, TpFloat2 d1) const {
        return d0_ * d0.x * (float)dot16(nibbles(q, 0), x0, 0) + d1_ * d1.x * (float)dot16(nibbles(q, 4), x1, 0) - m0_ * d0.y - m1_ * d1.y;
    }
};
// 128 weights: 64 bytes of low nibbles (quarters 0 and 1, above them 2 and 3) and 32 bytes of 2-bit tops for all four.
template <>
struct Piece<kQ6_K> {
    TpInt4 q0, q1;
    float s0, s1;
    static TP_MEMBER i64 first(i64 p) { return p / 4 * 128 + p % 4 / 2 * 32 + p % 2 * 16; }
    static TP_MEMBER i64 second(i64 p) { return first(p) + 64; }
    static TP_MEMBER int six(int low, int high) { return (low & 0x0f0f0f0f) | (high & 0x03030303) << 4; }
    template <class Load>
    TP_MEMBER void load(const char* const* plane, i64 p, Load load16) {
        const TpInt4 l = load16(plane[0] + p * 16), h = load16(plane[1] + p / 4 * 32 + p % 2 * 16);
        const int shift = (int)(p % 4 / 2) * 2;
        q0 = {six(l.x, h.x >> shift), six(l.y, h.y >> shift), six(l.z, h.z >> shift), six(l.w, h.w >> shift)};
        const int above = shift + 4;
        q1 = {six(l.x >> 4, h.x >> above), six(l.y >> 4, h.y >> above), six(l.z >> 4, h.z >> above), six(l.w >> 4, h.w >> above)};
        const s8* scales = (const s8*)plane[2] + p / 4 * 8 + p % 4;
        const float d = tp_load_half(plane[3] + p / 8 * 2);
        s0 = d * (float)scales[0];
        s1 = d * (float)scales[4];
    }
    TP_MEMBER float dot(i64, const TpInt4& x0, const TpInt4& x1, TpFloat2 d0, TpFloat2 d1) const {
        return s0 * d0.x * (float)(dot16(q0, x0, 0) - 32 * sum16(x0)) + s1 * d1.x * (float)(dot16(q1, x1, 0) - 32 * sum16(x1));
    }
};

/// What a lane of stream.cu takes of a row in one step: kElems weights, of which word(unit, w) is where the w-th 16 activations start, in the
/// first block for w < kWords / 2, else in the second. d0, d1: those blocks' {scale, scale * sum}.
template <int kType>
struct Unit : Piece<kType> {
    static constexpr int kElems = 32, kWords = 2;
    static TP_MEMBER int word(int unit, int w) { return (int)(w ? Piece<kType>::second(unit) : Piece<kType>::first(unit)); }
    TP_MEMBER float dot_unit(int unit, const TpInt4* x, TpFloat2 d0, TpFloat2 d1) const { return this->dot(unit, x[0], x[1], d0, d1); }
};
// Both halves of two sub-blocks: their scales are unpacked once, and a scale's product with a sum of 32 (at most 3,840,480) stays an integer:
// added to 1.5 * 2^23's bits it is a float. (As two pieces with branches: 1.7 times the instructions.)
template <>
struct Unit<kQ4_K> {
    static constexpr int kElems = 64, kWords = 4;
    TpInt4 q[2];
    u32 scales, mins, dm;
    // Every other four lanes begin with the second half: so 8 lanes' 16 bytes lie in different banks.
    static TP_MEMBER int half(int unit, int w) { return (unit / 4 + w) % 2; }
    static TP_MEMBER int word(int unit, int w) { return unit * 64 + w / 2 * 32 + half(unit, w) * 16; }
    template <class Load>
    TP_MEMBER void load(const char* const* plane, int unit, Load load16) {
        for (int h = 0; h < 2; ++h) q[h] = load16(plane[0] + unit * 32 + half(unit, h) * 16);
        const int b = unit / 4;
        six_bits((const u32*)(plane[1] + b * 12), unit % 4, scales, mins);
        dm = *(const u32*)(plane[2] + b * 4);
    }
    TP_MEMBER float dot_unit(int, const TpInt4* x, TpFloat2 d0, TpFloat2 d1) const {
        int low = 0, high = 0;  // high: of the upper nibbles where they are, 16 times the sum
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            low = dot16(nibbles(q[h], 0), x[h], low);
            high = tp_dp4a_unsigned((u32)q[h].x & 0xf0f0f0f0u, x[2 + h].x, high), high = tp_dp4a_unsigned((u32)q[h].y & 0xf0f0f0f0u, x[2 + h].y, high);
            high = tp_dp4a_unsigned((u32)q[h].z & 0xf0f0f0f0u, x[2 + h].z, high), high = tp_dp4a_unsigned((u32)q[h].w & 0xf0f0f0f0u, x[2 + h].w, high);
        }
        constexpr float kWhole = 12582912.0f;  // 1.5 * 2^23
        const float first = __int_as_float(low * (int)(scales & 63) + 0x4b400000) - kWhole;
        const float second = __int_as_float((high >> 4) * (int)(scales >> 8 & 63) + 0x4b400000) - kWhole;
        const float min0 = __int_as_float((int)(mins & 63) + 0x4b400000) - kWhole, min1 = __int_as_float((int)(mins >> 8 & 63) + 0x4b400000) - kWhole;
        return tp_half_to_float((u16)dm) * (first * d0.x + second * d1.x) - tp_half_to_float((u16)(dm >> 16)) * (min0 * d0.y + min1 * d1.y);
    }
};

/// Weights of 4 or 2 bytes: 16 bytes of a row a thread and step.
template <int kType>
struct FloatWords {
    static constexpr int kElems = kType == kF32 ? 4 : 8;
    static TP_MEMBER float get(const TpInt4& v, int i) {
        const int word = kType == kF32 ? (&v.x)[i] : (&v.x)[i / 2];
        if (kType == kF32) return __int_as_float(word);
        const u16 half = (u16)(i % 2 ? (u32)word >> 16 : (u32)word & 0xffff);
        return kType == kF16 ? tp_half_to_float(half) : tp_bf16_to_float(half);
    }
};

/// Sixteen bytes of weights: in global memory, read once; or in shared memory.
struct LoadStream {
    TP_MEMBER TpInt4 operator()(const char* p) const { return tp_load_stream(p); }
};
struct LoadShared {
    TP_MEMBER TpInt4 operator()(const char* p) const { return *(const TpInt4*)p; }
};

}  // namespace ggml_tp
