// What a thread of the streaming products (mul_vec.cu, mul_vec_id.cu, stream.cu) reads of a row in one step, and multiplies.
#pragma once
#include "dequantize.h"

namespace ggml_tp {

/// Sixteen int8 products.
TP_DEVICE int dot16(const TpInt4& a, const TpInt4& b, int sum) { return tp_dp4a(a.w, b.w, tp_dp4a(a.z, b.z, tp_dp4a(a.y, b.y, tp_dp4a(a.x, b.x, sum)))); }
TP_DEVICE TpInt4 nibbles(const TpInt4& v, int shift) {
    return {v.x >> shift & 0x0f0f0f0f, v.y >> shift & 0x0f0f0f0f, v.z >> shift & 0x0f0f0f0f, v.w >> shift & 0x0f0f0f0f};
}
/// Sixteen times the products of bytes' upper nibbles, which stay where they are: an instruction less for each word.
TP_DEVICE int dot16_upper(const TpInt4& q, const TpInt4& x, int sum) {
    sum = tp_dp4a_unsigned((u32)q.x & 0xf0f0f0f0u, x.x, sum), sum = tp_dp4a_unsigned((u32)q.y & 0xf0f0f0f0u, x.y, sum);
    return tp_dp4a_unsigned((u32)q.w & 0xf0f0f0f0u, x.w, tp_dp4a_unsigned((u32)q.z & 0xf0f0f0f0u, x.z, sum));
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
        const int sum = dot16(nibbles(q, 0), x0, dot16_upper(q, x1, 0) >> 4);
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
/// Bits `bit` of bytes as the fifth bits of others.
TP_DEVICE TpInt4 fifth(const TpInt4& q, const TpInt4& h, int bit) {
    return {q.x | (h.x >> bit & 0x01010101) << 4, q.y | (h.y >> bit & 0x01010101) << 4, q.z | (h.z >> bit & 0x01010101) << 4,
            q.w | (h.w >> bit & 0x01010101) << 4};
}
/// The low four bits as the fifth bits of four bytes: the product puts them at 4, 12, 20 and 28, and no two of its sums meet.
TP_DEVICE int fifth_bits(u32 bits) { return (int)((bits & 15) * 0x02040810u & 0x10101010u); }
TP_DEVICE TpInt4 fifth(const TpInt4& q, u32 bits) {
    return {q.x | fifth_bits(bits), q.y | fifth_bits(bits >> 4), q.z | fifth_bits(bits >> 8), q.w | fifth_bits(bits >> 12)};
}
/// A block of 32 whose low nibbles are its first half: all of them share a scale.
struct BlockPiece {
    TpInt4 q0, q1;
    float d;
    static TP_MEMBER i64 first(i64 p) { return p * 32; }
    static TP_MEMBER i64 second(i64 p) { return p * 32 + 16; }
    TP_MEMBER int products(const TpInt4& x0, const TpInt4& x1) const { return dot16(q1, x1, dot16(q0, x0, 0)); }
    template <class Load>
    TP_MEMBER void load_low(const char* plane, i64 p, Load load16) {
        const TpInt4 q = load16(plane + p * 16);
        q0 = nibbles(q, 0), q1 = nibbles(q, 4);
    }
    TP_MEMBER void load_fifth(const char* plane, i64 p) {
        const u32 bits = *(const u32*)(plane + p * 4);
        q0 = fifth(q0, bits), q1 = fifth(q1, bits >> 16);
    }
};
/// With a minimum beside the scale.
struct MinPiece : BlockPiece {
    float m;
    TP_MEMBER void load_scales(const char* plane, i64 p) {
        const u32 dm = *(const u32*)(plane + p * 4);
        d = tp_half_to_float((u16)dm), m = tp_half_to_float((u16)(dm >> 16));
    }
    TP_MEMBER float dot(i64, const TpInt4& x0, const TpInt4& x1, TpFloat2 d0, TpFloat2) const { return d * ((float)products(x0, x1) * d0.x) + m * d0.y; }
};
template <>
struct Piece<kQ4_1> : MinPiece {
    template <class Load>
    TP_MEMBER void load(const char* const* plane, i64 p, Load load16) {
        load_low(plane[0], p, load16);
        load_scales(plane[1], p);
    }
};
template <>
struct Piece<kQ5_1> : MinPiece {
    template <class Load>
    TP_MEMBER void load(const char* const* plane, i64 p, Load load16) {
        load_low(plane[0], p, load16);
        load_fifth(plane[1], p);
        load_scales(plane[2], p);
    }
};
template <>
struct Piece<kQ5_0> : BlockPiece {
    template <class Load>
    TP_MEMBER void load(const char* const* plane, i64 p, Load load16) {
        load_low(plane[0], p, load16);
        load_fifth(plane[1], p);
        d = tp_load_half(plane[2] + p * 2);
    }
    TP_MEMBER float dot(i64, const TpInt4& x0, const TpInt4& x1, TpFloat2 d0, TpFloat2) const { return d * ((float)products(x0, x1) * d0.x - 16.0f * d0.y); }
};
/// Sixteen values, a byte each, that nibbles stand for.
struct FourBitValues {
    u32 word[4];
};
constexpr FourBitValues kIq4Words = {{0xbfad9881u, 0xf6eaddcfu, 0x26190d01u, 0x71594535u}};  // kIq4Values
constexpr FourBitValues kFp4Words = {{0x03020100u, 0x0c080604u, 0xfdfeff00u, 0xf4f8fafcu}};  // tp_fp4_doubled
/// The values of eight nibbles: of the low ones of four bytes, of the high ones. A selector's three bits choose one of eight values, four at a time;
/// then the fourth bits choose which eight.
TP_DEVICE void look_up(const FourBitValues& values, u32 q, int& low, int& high) {
    const u32 which = q & 0x77777777u, upper = (q >> 1 & 0x44444444u) | 0x32103210u;
    const u32 a = tp_byte_perm(tp_byte_perm(values.word[0], values.word[1], which), tp_byte_perm(values.word[2], values.word[3], which), upper);
    const u32 b =
        tp_byte_perm(tp_byte_perm(values.word[0], values.word[1], which >> 16), tp_byte_perm(values.word[2], values.word[3], which >> 16), upper >> 16);
    low = (int)tp_byte_perm(a, b, 0x6420), high = (int)tp_byte_perm(a, b, 0x7531);
}
/// Of sixteen bytes.
TP_DEVICE void look_up(const FourBitValues& values, const TpInt4& q, TpInt4& low, TpInt4& high) {
    look_up(values, (u32)q.x, low.x, high.x), look_up(values, (u32)q.y, low.y, high.y);
    look_up(values, (u32)q.z, low.z, high.z), look_up(values, (u32)q.w, low.w, high.w);
}
/// NVFP4's values of the first (r = 0) or second eight bytes, whose low nibbles are the first eight.
TP_DEVICE TpInt4 look_up_eights(const TpInt4& q, int r) {
    TpInt4 out;
    look_up(kFp4Words, (u32)(r ? q.z : q.x), out.x, out.z), look_up(kFp4Words, (u32)(r ? q.w : q.y), out.y, out.w);
    return out;
}
/// A block of 32 nibbles that stand for values.
struct ValuesPiece : BlockPiece {
    template <class Load>
    TP_MEMBER void load_values(const FourBitValues& values, const char* plane, i64 p, Load load16) {
        look_up(values, load16(plane + p * 16), q0, q1);
    }
    TP_MEMBER float dot(i64, const TpInt4& x0, const TpInt4& x1, TpFloat2 d0, TpFloat2) const { return d * d0.x * (float)products(x0, x1); }
};
template <>
struct Piece<kIQ4_NL> : ValuesPiece {
    template <class Load>
    TP_MEMBER void load(const char* const* plane, i64 p, Load load16) {
        load_values(kIq4Words, plane[0], p, load16);
        d = tp_load_half(plane[1] + p * 2);
    }
};
/// Of a sub-block of 256: d and two high bits of each of eight scales, then their low nibbles.
TP_DEVICE float iq4_xs_scale(const u32* block, int sub) {
    const int scale = (int)((block[1] >> 4 * sub & 15) | (block[0] >> (16 + 2 * sub) & 3) << 4);
    return tp_half_to_float((u16)block[0]) * (float)(scale - 32);
}
template <>
struct Piece<kIQ4_XS> : ValuesPiece {
    template <class Load>
    TP_MEMBER void load(const char* const* plane, i64 p, Load load16) {
        load_values(kIq4Words, plane[0], p, load16);
        d = iq4_xs_scale((const u32*)(plane[1] + p / 8 * 8), (int)(p % 8));
    }
};
template <>
struct Piece<kMXFP4> : ValuesPiece {
    template <class Load>
    TP_MEMBER void load(const char* const* plane, i64 p, Load load16) {
        load_values(kFp4Words, plane[0], p, load16);
        d = tp_e8m0_half(*(const u8*)(plane[1] + p));
    }
};
/// Two runs side by side with a scale each.
struct RunsPiece {
    TpInt4 q0, q1;
    float s0, s1;
    static TP_MEMBER i64 first(i64 p) { return p * 32; }
    static TP_MEMBER i64 second(i64 p) { return p * 32 + 16; }
    TP_MEMBER float dot(i64, const TpInt4& x0, const TpInt4& x1, TpFloat2 d0, TpFloat2 d1) const {
        return s0 * d0.x * (float)dot16(q0, x0, 0) + s1 * d1.x * (float)dot16(q1, x1, 0);
    }
};
// Sixteen weights share a scale and eight bytes: low nibbles are the first eight.
template <>
struct Piece<kNVFP4> : RunsPiece {
    template <class Load>
    TP_MEMBER void load(const char* const* plane, i64 p, Load load16) {
        const TpInt4 q = load16(plane[0] + p * 16);
        q0 = look_up_eights(q, 0), q1 = look_up_eights(q, 1);
        const u8* scales = (const u8*)plane[1] + p * 2;
        s0 = tp_ue4m3_half(scales[0]), s1 = tp_ue4m3_half(scales[1]);
    }
};
/// Scales and mins of sub-blocks 2 * pair and 2 * pair + 1, a byte each (above them lies anything). Behind d and dmin twelve bytes of a block: scales
/// 0-3, mins 0-3, then the low halves of 4-7 with their high bits above the first eight. No branch: a warp's lanes have all four pairs.
TP_DEVICE void six_bits(const TpInt4& header, int pair, u32& scales, u32& mins) {
    const int shift = pair % 2 * 16;
    const u32 s = (u32)header.y >> shift, m = (u32)header.z >> shift, low = (u32)header.w >> shift;
    scales = pair < 2 ? s & 0x3f3f : (low & 0x0f0f) | (s >> 2 & 0x3030);
    mins = pair < 2 ? m & 0x3f3f : (low >> 4 & 0x0f0f) | (m >> 2 & 0x3030);
}
/// A piece of 256 weights in 8 sub-blocks with 6-bit scales and mins: 32 bytes hold sub-blocks 2j (low nibbles) and 2j + 1 (high); a piece is half of
/// them. The mins' share, which needs the sum over a whole sub-block, is the first half's work.
struct SixBitPiece {
    float d0_, d1_, m0_, m1_;
    static TP_MEMBER i64 first(i64 p) { return p / 8 * 256 + p % 8 / 2 * 64 + p % 2 * 16; }
    static TP_MEMBER i64 second(i64 p) { return first(p) + 32; }
    template <class Load>
    TP_MEMBER void load_scales(const char* headers, i64 p, Load load16) {
        const TpInt4 header = load16(headers + p / 8 * 16);
        const float d = tp_half_to_float((u16)header.x), m = tp_half_to_float((u16)((u32)header.x >> 16));
        u32 scales, mins;
        six_bits(header, (int)(p % 8 / 2), scales, mins);
        d0_ = d * (float)(scales & 63);
        d1_ = d * (float)(scales >> 8 & 63);
        m0_ = m * (float)(mins & 63);
        m1_ = m * (float)(mins >> 8 & 63);
    }
    TP_MEMBER float scaled(i64 p, int first_sum, int second_sum, TpFloat2 d0, TpFloat2 d1) const {
        const float sum0 = p % 2 ? 0.0f : d0.y, sum1 = p % 2 ? 0.0f : d1.y;
        return d0_ * d0.x * (float)first_sum + d1_ * d1.x * (float)second_sum - m0_ * sum0 - m1_ * sum1;
    }
};
template <>
struct Piece<kQ4_K> : SixBitPiece {
    TpInt4 q;
    template <class Load>
    TP_MEMBER void load(const char* const* plane, i64 p, Load load16) {
        q = load16(plane[0] + p * 16);
        load_scales(plane[1], p, load16);
    }
    TP_MEMBER float dot(i64 p, const TpInt4& x0, const TpInt4& x1, TpFloat2 d0, TpFloat2 d1) const {
        return scaled(p, dot16(nibbles(q, 0), x0, 0), dot16(nibbles(q, 4), x1, 0), d0, d1);
    }
};
// The fifth bits: of byte i bit s is element i's of sub-block s.
template <>
struct Piece<kQ5_K> : SixBitPiece {
    TpInt4 q0, q1;
    template <class Load>
    TP_MEMBER void load(const char* const* plane, i64 p, Load load16) {
        const TpInt4 q = load16(plane[0] + p * 16), h = load16(plane[1] + p / 8 * 32 + p % 2 * 16);
        const int bit = (int)(p % 8 / 2 * 2);
        q0 = fifth(nibbles(q, 0), h, bit), q1 = fifth(nibbles(q, 4), h, bit + 1);
        load_scales(plane[2], p, load16);
    }
    TP_MEMBER float dot(i64 p, const TpInt4& x0, const TpInt4& x1, TpFloat2 d0, TpFloat2 d1) const {
        return scaled(p, dot16(q0, x0, 0), dot16(q1, x1, 0), d0, d1);
    }
};
/// Of 256 weights in 2 bits: 16 bytes hold 16 of each of four sub-blocks of 32, a piece is those of two.
struct TwoBitPiece {
    TpInt4 q0, q1;
    static TP_MEMBER i64 first(i64 p) { return p / 4 * 128 + p % 2 * 64 + p % 4 / 2 * 16; }
    static TP_MEMBER i64 second(i64 p) { return first(p) + 32; }
    /// Numbers of the first run among the 16 runs of 256; the second's is 2 more.
    static TP_MEMBER int run_number(i64 p) { return (int)(p % 8 / 4 * 8 + p % 2 * 4 + p % 4 / 2); }
    template <class Load>
    TP_MEMBER void load_low(const char* plane, i64 p, Load load16) {
        const TpInt4 q = load16(plane + p / 2 * 16);
        q0 = twos(q, (int)(p % 2) * 4), q1 = twos(q, (int)(p % 2) * 4 + 2);
    }
    static TP_MEMBER TpInt4 twos(const TpInt4& v, int shift) {
        return {v.x >> shift & 0x03030303, v.y >> shift & 0x03030303, v.z >> shift & 0x03030303, v.w >> shift & 0x03030303};
    }
};
template <>
struct Piece<kQ2_K> : TwoBitPiece {
    float s0, s1, m0, m1;
    template <class Load>
    TP_MEMBER void load(const char* const* plane, i64 p, Load load16) {
        load_low(plane[0], p, load16);
        const u8* scales = (const u8*)plane[1] + p / 8 * 16 + run_number(p);
        const u32 dm = *(const u32*)(plane[2] + p / 8 * 4), a = scales[0], b = scales[2];
        const float d = tp_half_to_float((u16)dm), m = tp_half_to_float((u16)(dm >> 16));
        s0 = d * (float)(a & 15), s1 = d * (float)(b & 15);
        m0 = m * (float)(a >> 4), m1 = m * (float)(b >> 4);
    }
    TP_MEMBER float dot(i64, const TpInt4& x0, const TpInt4& x1, TpFloat2 d0, TpFloat2 d1) const {
        return d0.x * (s0 * (float)dot16(q0, x0, 0) - m0 * (float)sum16(x0)) + d1.x * (s1 * (float)dot16(q1, x1, 0) - m1 * (float)sum16(x1));
    }
};
template <>
struct Piece<kQ3_K> : TwoBitPiece {
    float s0, s1;
    template <class Load>
    TP_MEMBER void load(const char* const* plane, i64 p, Load load16) {
        load_low(plane[0], p, load16);
        const TpInt4 h = load16(plane[1] + p / 8 * 32 + p % 4 / 2 * 16);
        const int bit = (int)(p % 8 / 4 * 4 + p % 2 * 2), r = run_number(p);
        q0 = third(q0, h, bit), q1 = third(q1, h, bit + 1);
        const u8* scales = (const u8*)plane[2] + p / 8 * 12;
        const float d = tp_load_half(plane[3] + p / 8 * 2);
        s0 = d * (float)(six(scales, r) - 32), s1 = d * (float)(six(scales, r + 2) - 32);
    }
    static TP_MEMBER TpInt4 third(const TpInt4& q, const TpInt4& h, int bit) {
        return {q.x | (h.x >> bit & 0x01010101) << 2, q.y | (h.y >> bit & 0x01010101) << 2, q.z | (h.z >> bit & 0x01010101) << 2,
                q.w | (h.w >> bit & 0x01010101) << 2};
    }
    static TP_MEMBER int six(const u8* scales, int r) { return (scales[r % 8] >> r / 8 * 4 & 15) | (scales[8 + r % 4] >> r / 4 * 2 & 3) << 4; }
    TP_MEMBER float dot(i64, const TpInt4& x0, const TpInt4& x1, TpFloat2 d0, TpFloat2 d1) const {
        return s0 * d0.x * (float)(dot16(q0, x0, 0) - 4 * sum16(x0)) + s1 * d1.x * (float)(dot16(q1, x1, 0) - 4 * sum16(x1));
    }
};
template <>
struct Piece<kTQ2_0> : TwoBitPiece {
    float d;
    template <class Load>
    TP_MEMBER void load(const char* const* plane, i64 p, Load load16) {
        load_low(plane[0], p, load16);
        d = tp_load_half(plane[1] + p / 8 * 2);
    }
    TP_MEMBER float dot(i64, const TpInt4& x0, const TpInt4& x1, TpFloat2 d0, TpFloat2 d1) const {
        return d * (d0.x * (float)(dot16(q0, x0, 0) - sum16(x0)) + d1.x * (float)(dot16(q1, x1, 0) - sum16(x1)));
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

/// What a lane of stream.cu takes of a row in one step: kElems weights, of which word(unit, w) is where the w-th 16 activations start, as many of each of
/// kBlocks blocks. d: those blocks' {scale, scale * sum}. arrange(): activations as dot_unit() takes them.
struct AnyUnit {
    static constexpr int kBlocks = 2;
    static TP_MEMBER void arrange(TpInt4*) {}
};
template <int kType>
struct Unit : Piece<kType>, AnyUnit {
    static constexpr int kElems = 32, kWords = 2;
    static TP_MEMBER int word(int unit, int w) { return (int)(w ? Piece<kType>::second(unit) : Piece<kType>::first(unit)); }
    TP_MEMBER float dot_unit(int unit, const TpInt4* x, const TpFloat2* d) const { return this->dot(unit, x[0], x[1], d[0], d[1]); }
};
/// An integer below 2^22 as a float: added to 1.5 * 2^23's bits.
TP_DEVICE float whole_float(int v) { return __int_as_float(v + 0x4b400000) - 12582912.0f; }
/// Both halves of two sub-blocks with 6-bit scales and mins, which are unpacked once. (As two pieces with branches: 1.7 times the instructions.)
struct SixBitUnit : AnyUnit {
    static constexpr int kElems = 64, kWords = 4;
    TpInt4 q[2];
    u32 scales, mins, dm;
    // Every other four lanes begin with the second half: so 8 lanes' 16 bytes lie in different banks.
    static TP_MEMBER int half(int unit, int w) { return (unit / 4 + w) % 2; }
    static TP_MEMBER int word(int unit, int w) { return unit * 64 + w / 2 * 32 + half(unit, w) * 16; }
    template <class Load>
    TP_MEMBER void load_unit(const char* quants, const char* headers, int unit, Load load16) {
        for (int h = 0; h < 2; ++h) q[h] = load16(quants + unit * 32 + half(unit, h) * 16);
        const TpInt4 header = load16(headers + unit / 4 * 16);
        six_bits(header, unit % 4, scales, mins);
        dm = (u32)header.x;
    }
    /// first, second: the sub-blocks' sums times their scales.
    TP_MEMBER float scaled(float first, float second, TpFloat2 d0, TpFloat2 d1) const {
        const float min0 = whole_float((int)(mins & 63)), min1 = whole_float((int)(mins >> 8 & 63));
        return tp_half_to_float((u16)dm) * (first * d0.x + second * d1.x) - tp_half_to_float((u16)(dm >> 16)) * (min0 * d0.y + min1 * d1.y);
    }
};
// A scale's product with a sum of 32 (at most 3,840,480) stays an integer.
template <>
struct Unit<kQ4_K> : SixBitUnit {
    template <class Load>
    TP_MEMBER void load(const char* const* plane, int unit, Load load16) {
        load_unit(plane[0], plane[1], unit, load16);
    }
    TP_MEMBER float dot_unit(int, const TpInt4* x, const TpFloat2* of) const {
        int low = 0, high = 0;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            low = dot16(nibbles(q[h], 0), x[h], low);
            high = dot16_upper(q[h], x[2 + h], high);
        }
        return scaled(whole_float(low * (int)(scales & 63)), whole_float((high >> 4) * (int)(scales >> 8 & 63)), of[0], of[1]);
    }
};
template <>
struct Unit<kQ5_K> : SixBitUnit {
    TpInt4 tops[2];  // the first sub-block's fifth bits lowest of each byte, above them the second's
    template <class Load>
    TP_MEMBER void load(const char* const* plane, int unit, Load load16) {
        load_unit(plane[0], plane[2], unit, load16);
        const int bit = unit % 4 * 2;
        for (int h = 0; h < 2; ++h) {
            const TpInt4 v = load16(plane[1] + unit / 4 * 32 + half(unit, h) * 16);
            tops[h] = {v.x >> bit, v.y >> bit, v.z >> bit, v.w >> bit};
        }
    }
    TP_MEMBER float dot_unit(int, const TpInt4* x, const TpFloat2* of) const {
        int low = 0, high = 0;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            low = dot16(fifth(nibbles(q[h], 0), tops[h], 0), x[h], low);
            high = dot16(fifth(nibbles(q[h], 4), tops[h], 1), x[2 + h], high);
        }
        return scaled(whole_float(low) * whole_float((int)(scales & 63)), whole_float(high) * whole_float((int)(scales >> 8 & 63)), of[0], of[1]);
    }
};
// Sixteen bytes of low bits hold 16 weights of each of four sub-blocks of 32, and half of their block's high bits has theirs: scales are unpacked for four
// runs at once. (As two pieces each of two: 1.8 times the instructions.)
template <>
struct Unit<kQ3_K> : AnyUnit {
    static constexpr int kElems = 64, kWords = 4, kBlocks = 4;
    TpInt4 q, h;    // of h, bit j of a byte is the third of run j's weight
    u32 scales[2];  // of runs 0 and 1: bytes 0 and 2 of the first, of 2 and 3 of the second
    float d;
    static TP_MEMBER int word(int unit, int w) { return unit / 2 * 128 + unit % 2 * 16 + w * 32; }
    template <class Load>
    TP_MEMBER void load(const char* const* plane, int unit, Load load16) {
        const int b = unit / 4, shift = unit % 4 / 2 * 4;
        q = load16(plane[0] + unit * 16);
        const TpInt4 bits = load16(plane[1] + b * 32 + unit % 2 * 16);
        h = {bits.x >> shift, bits.y >> shift, bits.z >> shift, bits.w >> shift};
        const u32* const packed = (const u32*)(plane[2] + b * 12);
        const u32 high = packed[2] >> shift;
        for (int i = 0; i < 2; ++i) scales[i] = ((packed[i] >> shift & 0x0f0f0f0f) | (high >> 2 * i & 0x03030303) << 4) >> unit % 2 * 8;
        d = tp_load_half(plane[3] + b * 2);
    }
    static TP_MEMBER int three(int low, int high, int j) { return (low >> 2 * j & 0x03030303) | ((j < 2 ? high << (2 - j) : high >> (j - 2)) & 0x04040404); }
    TP_MEMBER float dot_unit(int, const TpInt4* x, const TpFloat2* of) const {
        float sum = 0;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const TpInt4 v = {three(q.x, h.x, j), three(q.y, h.y, j), three(q.z, h.z, j), three(q.w, h.w, j)};
            const int scale = (int)(scales[j / 2] >> j % 2 * 16 & 63) - 32;
            sum += whole_float(scale * (dot16(v, x[j], 0) - 4 * sum16(x[j]))) * of[j].x;
        }
        return d * sum;
    }
};
// A nibble is a sign, its highest bit, and one of eight amounts: what is positive and what is negative are chosen, and multiplied, apart, where zero stands
// for the others (tp_byte_perm_sign: amounts have no sign). 44 instructions instead of the 60 that choosing one of sixteen values takes. Bytes come in the
// order of nibbles: arrange() puts the activations of low and high nibbles side by side.
struct EightAmounts {
    u32 word[2];
};
/// Of four bytes, none of them zero.
constexpr u32 negated_bytes(u32 v) { return ~v + 0x01010101u; }
constexpr EightAmounts kFp4Amounts = {{kFp4Words.word[0], kFp4Words.word[1]}};  // the same with either sign
constexpr EightAmounts kIq4Negative = {{negated_bytes(kIq4Words.word[0]), negated_bytes(kIq4Words.word[1])}};
constexpr EightAmounts kIq4Positive = {{kIq4Words.word[2], kIq4Words.word[3]}};
struct SignedUnit : AnyUnit {
    static constexpr int kElems = 32, kWords = 2;
    TpInt4 q;
    float d;
    static TP_MEMBER int word(int unit, int w) { return unit * 32 + w * 16; }
    static TP_MEMBER void arrange(TpInt4* x) {
        const TpInt4 low = x[0], high = x[1];
        auto pair = [](int l, int h, int& first, int& second) {
            first = (int)tp_byte_perm((u32)l, (u32)h, 0x5140), second = (int)tp_byte_perm((u32)l, (u32)h, 0x7362);
        };
        pair(low.x, high.x, x[0].x, x[0].y), pair(low.y, high.y, x[0].z, x[0].w);
        pair(low.z, high.z, x[1].x, x[1].y), pair(low.w, high.w, x[1].z, x[1].w);
    }
    /// Products of the amounts of nibbles below 8, less those of the others.
    TP_MEMBER int products(const EightAmounts& of_lower, const EightAmounts& of_upper, const TpInt4* x) const {
        int lower = 0, upper = 0;
        auto four = [](const EightAmounts& of, u32 selector, int x, int sum) {
            return tp_dp4a((int)tp_byte_perm_sign(of.word[0], of.word[1], selector), x, sum);
        };
        auto eight = [&](int word, int first, int second) {
            const u32 nibbles = (u32)word, opposite = nibbles ^ 0x88888888u;
            lower = four(of_lower, nibbles >> 16, second, four(of_lower, nibbles, first, lower));
            upper = four(of_upper, opposite >> 16, second, four(of_upper, opposite, first, upper));
        };
        eight(q.x, x[0].x, x[0].y), eight(q.y, x[0].z, x[0].w), eight(q.z, x[1].x, x[1].y), eight(q.w, x[1].z, x[1].w);
        return lower - upper;
    }
};
template <>
struct Unit<kMXFP4> : SignedUnit {
    template <class Load>
    TP_MEMBER void load(const char* const* plane, int unit, Load load16) {
        q = load16(plane[0] + unit * 16);
        d = tp_e8m0_half(*(const u8*)(plane[1] + unit));
    }
    TP_MEMBER float dot_unit(int, const TpInt4* x, const TpFloat2* of) const { return d * of[0].x * (float)products(kFp4Amounts, kFp4Amounts, x); }
};
struct Iq4Unit : SignedUnit {
    TP_MEMBER float dot_unit(int, const TpInt4* x, const TpFloat2* of) const { return -(d * of[0].x) * (float)products(kIq4Negative, kIq4Positive, x); }
};
template <>
struct Unit<kIQ4_NL> : Iq4Unit {
    template <class Load>
    TP_MEMBER void load(const char* const* plane, int unit, Load load16) {
        q = load16(plane[0] + unit * 16);
        d = tp_load_half(plane[1] + unit * 2);
    }
};
template <>
struct Unit<kIQ4_XS> : Iq4Unit {
    template <class Load>
    TP_MEMBER void load(const char* const* plane, int unit, Load load16) {
        q = load16(plane[0] + unit * 16);
        d = iq4_xs_scale((const u32*)(plane[1] + unit / 8 * 8), unit % 8);
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

/// Sixteen bytes of weights, from global memory, where they are read once.
struct LoadStream {
    TP_MEMBER TpInt4 operator()(const char* p) const { return tp_load_stream(p); }
};

}  // namespace ggml_tp
