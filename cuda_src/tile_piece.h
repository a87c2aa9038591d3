// What the tiles of mul_tile.cu and mul_wgmma.cu have in common: weights as strips of halves, and which columns a tile multiplies.
#pragma once
#include "grid_piece.h"

namespace ggml_tp {

constexpr u32 kOne = 0x3c003c00u;  // in each half
TP_DEVICE u32 half_pair(float a) { return tp_float_to_half(a) * 0x10001u; }
/// Eight words of halves from 16 bytes of unsigned values v < 256: (v - offset) * scale + shift.
TP_DEVICE void expand(const TpInt4& v, float offset, float scale, float shift, u32 (&out)[8]) {
    const u32 words[4] = {(u32)v.x, (u32)v.y, (u32)v.z, (u32)v.w};
    const u32 minus = half_pair(-1024.0f - offset), s = half_pair(scale), t = half_pair(shift);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        // A byte below 0x64 is the half 1024 + byte; the subtraction is exact.
        out[2 * i] = tp_half2_fma(tp_half2_fma(tp_byte_perm(words[i], 0x64646464u, 0x4140), kOne, minus), s, t);
        out[2 * i + 1] = tp_half2_fma(tp_half2_fma(tp_byte_perm(words[i], 0x64646464u, 0x4342), kOne, minus), s, t);
    }
}
/// Bytes of values v < 256 whose sign bit is turned: v - 128 as they were signed.
TP_DEVICE TpInt4 signs_turned(const TpInt4& v) {
    const int flip = (int)0x80808080u;
    return {v.x ^ flip, v.y ^ flip, v.z ^ flip, v.w ^ flip};
}

/// Half of a row's 64 weights of a step, u = 0 or 1: two runs of 16. load() takes words from the planes and does nothing with them, so that
/// they can be under way for several steps; run() gives one run as halves, place() where it belongs within the 64. Beyond the end of k (`ok`
/// false) everything is zero. kCrossed: the other half stores its second run first, as both halves' first ones would meet in the same banks.
template <int kType>
struct Strip;

TP_DEVICE TpInt4 words_or_zero(const char* p, bool ok) { return ok ? *(const TpInt4*)p : TpInt4{0, 0, 0, 0}; }

/// A block of 32 whose low nibbles are its first run.
struct BlockStrip {
    TpInt4 q;
    static constexpr bool kCrossed = false;
    static TP_MEMBER u32 block(u32 step, int u) { return step * 2 + (u32)u; }
    TP_MEMBER void load_quants(const char* plane, u32 step, int u, bool ok) { q = words_or_zero(plane + block(step, u) * 16, ok); }
    template <class T>
    static TP_MEMBER T field(const char* plane, u32 step, int u, bool ok) {
        return ok ? *(const T*)(plane + block(step, u) * sizeof(T)) : (T)0;
    }
    static TP_MEMBER int place(int u, int r) { return u * 32 + r * 16; }
    static TP_MEMBER u32 end(u32 step, int u) { return step * 64 + (u32)u * 32 + 32; }
};
template <>
struct Strip<kQ4_0> : BlockStrip {
    u16 d;
    TP_MEMBER void load(const char* const* plane, u32 step, int u, bool ok) { load_quants(plane[0], step, u, ok), d = field<u16>(plane[1], step, u, ok); }
    TP_MEMBER void run(u32, int, int r, u32 (&out)[8]) const { expand(nibbles(q, 4 * r), 8.0f, tp_half_to_float(d), 0.0f, out); }
};
template <>
struct Strip<kQ4_1> : BlockStrip {
    u32 dm;
    TP_MEMBER void load(const char* const* plane, u32 step, int u, bool ok) { load_quants(plane[0], step, u, ok), dm = field<u32>(plane[1], step, u, ok); }
    TP_MEMBER void run(u32, int, int r, u32 (&out)[8]) const {
        expand(nibbles(q, 4 * r), 0.0f, tp_half_to_float((u16)dm), tp_half_to_float((u16)(dm >> 16)), out);
    }
};
template <>
struct Strip<kQ5_0> : BlockStrip {
    u32 tops;
    u16 d;
    TP_MEMBER void load(const char* const* plane, u32 step, int u, bool ok) {
        load_quants(plane[0], step, u, ok);
        tops = field<u32>(plane[1], step, u, ok), d = field<u16>(plane[2], step, u, ok);
    }
    TP_MEMBER void run(u32, int, int r, u32 (&out)[8]) const { expand(fifth(nibbles(q, 4 * r), tops >> 16 * r), 16.0f, tp_half_to_float(d), 0.0f, out); }
};
template <>
struct Strip<kQ5_1> : BlockStrip {
    u32 tops, dm;
    TP_MEMBER void load(const char* const* plane, u32 step, int u, bool ok) {
        load_quants(plane[0], step, u, ok);
        tops = field<u32>(plane[1], step, u, ok), dm = field<u32>(plane[2], step, u, ok);
    }
    TP_MEMBER void run(u32, int, int r, u32 (&out)[8]) const {
        expand(fifth(nibbles(q, 4 * r), tops >> 16 * r), 0.0f, tp_half_to_float((u16)dm), tp_half_to_float((u16)(dm >> 16)), out);
    }
};
/// A block of 32 nibbles that stand for values: of both runs at once, of which the compiler keeps what the other one needs.
struct ValuesStrip : BlockStrip {
    TP_MEMBER void run_values(const FourBitValues& values, float scale, int r, u32 (&out)[8]) const {
        TpInt4 runs[2];
        look_up(values, q, runs[0], runs[1]);
        expand(signs_turned(runs[r]), 128.0f, scale, 0.0f, out);
    }
};
template <>
struct Strip<kIQ4_NL> : ValuesStrip {
    u16 d;
    TP_MEMBER void load(const char* const* plane, u32 step, int u, bool ok) { load_quants(plane[0], step, u, ok), d = field<u16>(plane[1], step, u, ok); }
    TP_MEMBER void run(u32, int, int r, u32 (&out)[8]) const { run_values(kIq4Words, tp_half_to_float(d), r, out); }
};
template <>
struct Strip<kIQ4_XS> : ValuesStrip {
    u32 scales[2];  // of the 256, as iq4_xs_scale has them
    TP_MEMBER void load(const char* const* plane, u32 step, int u, bool ok) {
        load_quants(plane[0], step, u, ok);
        for (int i = 0; i < 2; ++i) scales[i] = ok ? ((const u32*)(plane[1] + step / 4 * 8))[i] : 0u;
    }
    TP_MEMBER void run(u32 step, int u, int r, u32 (&out)[8]) const { run_values(kIq4Words, iq4_xs_scale(scales, (int)(step % 4) * 2 + u), r, out); }
};
template <>
struct Strip<kMXFP4> : ValuesStrip {
    u8 e;
    TP_MEMBER void load(const char* const* plane, u32 step, int u, bool ok) { load_quants(plane[0], step, u, ok), e = field<u8>(plane[1], step, u, ok); }
    TP_MEMBER void run(u32, int, int r, u32 (&out)[8]) const { run_values(kFp4Words, tp_e8m0_half(e), r, out); }
};
// Two sub-blocks of 16, each a run with its scale.
template <>
struct Strip<kNVFP4> : BlockStrip {
    u16 scales;
    TP_MEMBER void load(const char* const* plane, u32 step, int u, bool ok) { load_quants(plane[0], step, u, ok), scales = field<u16>(plane[1], step, u, ok); }
    TP_MEMBER void run(u32, int, int r, u32 (&out)[8]) const {
        expand(signs_turned(look_up_eights(q, r)), 128.0f, tp_ue4m3_half((u8)(scales >> 8 * r)), 0.0f, out);
    }
};
template <>
struct Strip<kQ8_0> {
    TpInt4 q[2];
    u16 d;
    static constexpr bool kCrossed = false;
    TP_MEMBER void load(const char* const* plane, u32 step, int u, bool ok) {
        for (int r = 0; r < 2; ++r) q[r] = words_or_zero(plane[0] + ((step * 2 + (u32)u) * 32 + (u32)r * 16), ok);
        d = BlockStrip::field<u16>(plane[1], step, u, ok);
    }
    TP_MEMBER void run(u32, int, int r, u32 (&out)[8]) const { expand(signs_turned(q[r]), 128.0f, tp_half_to_float(d), 0.0f, out); }
    static TP_MEMBER int place(int u, int r) { return BlockStrip::place(u, r); }
    static TP_MEMBER u32 end(u32 step, int u) { return BlockStrip::end(step, u); }
};
/// Of 256 weights with 6-bit scales and mins: two sub-blocks, a run of each.
struct SixBitStrip {
    TpInt4 q, header;  // d and dmin, then scales and mins as in tp_q4_k_scale
    static constexpr bool kCrossed = true;
    TP_MEMBER void load_weights(const char* const* plane, u32 step, int u, bool ok) { q = words_or_zero(plane[0] + (step * 2 + (u32)u) * 16, ok); }
    TP_MEMBER void load_header(const char* headers, u32 step, bool ok) { header = words_or_zero(headers + step / 4 * 16, ok); }
    TP_MEMBER void expand_run(const TpInt4& bytes, u32 step, int r, u32 (&out)[8]) const {
        const int j = (int)(step % 4) * 2 + r, at = j % 4 * 8;
        const u32 dm = (u32)header.x, s = (u32)header.y >> at, m = (u32)header.z >> at, high = (u32)header.w >> at;
        const u32 scale = j < 4 ? s & 63 : (high & 15) | (s >> 6 & 3) << 4, min = j < 4 ? m & 63 : (high >> 4 & 15) | (m >> 6 & 3) << 4;
        expand(bytes, 0.0f, tp_half_to_float((u16)dm) * (float)scale, -tp_half_to_float((u16)(dm >> 16)) * (float)min, out);
    }
    static TP_MEMBER int place(int u, int r) { return r * 32 + u * 16; }
    static TP_MEMBER u32 end(u32 step, int) { return step * 64 + 64; }
};
template <>
struct Strip<kQ4_K> : SixBitStrip {
    TP_MEMBER void load(const char* const* plane, u32 step, int u, bool ok) { load_weights(plane, step, u, ok), load_header(plane[1], step, ok); }
    TP_MEMBER void run(u32 step, int, int r, u32 (&out)[8]) const { expand_run(nibbles(q, 4 * r), step, r, out); }
};
template <>
struct Strip<kQ5_K> : SixBitStrip {
    TpInt4 tops;  // of byte i bit j is element i's of sub-block j of the 256
    TP_MEMBER void load(const char* const* plane, u32 step, int u, bool ok) {
        load_weights(plane, step, u, ok), load_header(plane[2], step, ok);
        tops = words_or_zero(plane[1] + (step / 4 * 32 + (u32)u * 16), ok);
    }
    TP_MEMBER void run(u32 step, int, int r, u32 (&out)[8]) const { expand_run(fifth(nibbles(q, 4 * r), tops, (int)(step % 4) * 2 + r), step, r, out); }
};
/// Of 256 weights in 2 bits: 128 share 32 bytes, a step is two of their four sub-blocks.
struct TwoBitStrip {
    TpInt4 q;
    static constexpr bool kCrossed = true;
    TP_MEMBER void load_low(const char* plane, u32 step, int u, bool ok) { q = words_or_zero(plane + (step / 2 * 32 + (u32)u * 16), ok); }
    TP_MEMBER TpInt4 twos(u32 step, int r) const { return TwoBitPiece::twos(q, (int)(step % 2) * 4 + r * 2); }
    /// Where a run's scale is among those of the four runs of 64.
    static TP_MEMBER int byte_of(int u, int r) { return (r * 2 + u) * 8; }
    static TP_MEMBER int place(int u, int r) { return r * 32 + u * 16; }
    static TP_MEMBER u32 end(u32 step, int) { return step * 64 + 64; }
};
template <>
struct Strip<kQ2_K> : TwoBitStrip {
    u32 scales, dm;
    TP_MEMBER void load(const char* const* plane, u32 step, int u, bool ok) {
        load_low(plane[0], step, u, ok);
        scales = ok ? *(const u32*)(plane[1] + step * 4) : 0u;
        dm = ok ? *(const u32*)(plane[2] + step / 4 * 4) : 0u;
    }
    TP_MEMBER void run(u32 step, int u, int r, u32 (&out)[8]) const {
        const u32 both = scales >> byte_of(u, r);
        expand(twos(step, r), 0.0f, tp_half_to_float((u16)dm) * (float)(both & 15), -tp_half_to_float((u16)(dm >> 16)) * (float)(both >> 4 & 15), out);
    }
};
template <>
struct Strip<kQ3_K> : TwoBitStrip {
    TpInt4 tops;             // as Q5_K's
    u32 low_bits, top_bits;  // of the runs' scales
    u16 d;
    TP_MEMBER void load(const char* const* plane, u32 step, int u, bool ok) {
        load_low(plane[0], step, u, ok);
        tops = words_or_zero(plane[1] + (step / 4 * 32 + (u32)u * 16), ok);
        const u32* const scales = (const u32*)(plane[2] + step / 4 * 12);
        low_bits = ok ? scales[step % 2] : 0u, top_bits = ok ? scales[2] : 0u;
        d = ok ? *(const u16*)(plane[3] + step / 4 * 2) : (u16)0;
    }
    TP_MEMBER void run(u32 step, int u, int r, u32 (&out)[8]) const {
        const int quarter = (int)(step % 4), at = byte_of(u, r);
        const u32 scale = (low_bits >> at >> quarter / 2 * 4 & 15) | (top_bits >> at >> quarter * 2 & 3) << 4;
        expand(Piece<kQ3_K>::third(twos(step, r), tops, quarter * 2 + r), 4.0f, tp_half_to_float(d) * (float)((int)scale - 32), 0.0f, out);
    }
};
template <>
struct Strip<kTQ2_0> : TwoBitStrip {
    u16 d;
    TP_MEMBER void load(const char* const* plane, u32 step, int u, bool ok) {
        load_low(plane[0], step, u, ok);
        d = ok ? *(const u16*)(plane[1] + step / 4 * 2) : (u16)0;
    }
    TP_MEMBER void run(u32 step, int, int r, u32 (&out)[8]) const { expand(twos(step, r), 1.0f, tp_half_to_float(d), 0.0f, out); }
};
// 128 weights share 64 bytes of low nibbles: an even step takes the low ones, an odd step the high ones.
template <>
struct Strip<kQ6_K> {
    TpInt4 q[2], top[2];
    u16 d, scales;  // two signed bytes
    static constexpr bool kCrossed = false;
    TP_MEMBER void load(const char* const* plane, u32 step, int u, bool ok) {
        for (int r = 0; r < 2; ++r) {
            q[r] = words_or_zero(plane[0] + (step / 2 * 64 + (u32)(u * 32 + r * 16)), ok);
            top[r] = words_or_zero(plane[1] + (step / 2 * 32 + (u32)r * 16), ok);
        }
        d = ok ? *(const u16*)(plane[3] + step / 4 * 2) : (u16)0;
        scales = ok ? *(const u16*)(plane[2] + (step * 4 + (u32)u * 2)) : (u16)0;
    }
    TP_MEMBER void run(u32 step, int u, int r, u32 (&out)[8]) const {
        const int odd = (int)(step % 2), shift = (u + 2 * odd) * 2;
        const TpInt4 l = nibbles(q[r], 4 * odd), &h = top[r];
        auto six = [&](int a, int b) { return a | (b >> shift & 0x03030303) << 4; };
        expand({six(l.x, h.x), six(l.y, h.y), six(l.z, h.z), six(l.w, h.w)}, 32.0f, tp_half_to_float(d) * (float)(s8)(scales >> 8 * r), 0.0f, out);
    }
    static TP_MEMBER int place(int u, int r) { return u * 32 + r * 16; }
    static TP_MEMBER u32 end(u32 step, int) { return step * 64 + 64; }
};
template <int kType>
struct GridStrip {
    GridWords<kType> words;
    static constexpr bool kCrossed = false;
    TP_MEMBER void load(const char* const* plane, u32 step, int u, bool ok) {
        words = {};
        if (ok) words.load(plane, BlockStrip::block(step, u));
    }
    TP_MEMBER void run(u32 step, int u, int r, u32 (&out)[8]) const {
        expand(signs_turned(words.bytes(kGridTables, r)), 128.0f, words.scale((int)(BlockStrip::block(step, u) % 8), r), 0.0f, out);
    }
    static TP_MEMBER int place(int u, int r) { return BlockStrip::place(u, r); }
    static TP_MEMBER u32 end(u32 step, int u) { return BlockStrip::end(step, u); }
};
#define TP_GRID_STRIP(name, type) \
    template <>                   \
    struct Strip<type> : GridStrip<type> {};
TP_GRID_TYPES(TP_GRID_STRIP)
#undef TP_GRID_STRIP
/// F16 and BF16: the words as they are.
struct HalfStrip {
    TpInt4 q[4];
    static constexpr bool kCrossed = false;
    TP_MEMBER void load_halves(const char* const* plane, u32 step, int u, i64 k) {
        for (int i = 0; i < 4; ++i) {
            const u32 at = step * 64 + (u32)(u * 32 + i * 8);
            q[i] = words_or_zero(plane[0] + at * 2, at < k);
        }
    }
    TP_MEMBER void run(u32, int, int r, u32 (&out)[8]) const {
        for (int i = 0; i < 2; ++i) {
            const TpInt4& v = q[2 * r + i];
            out[4 * i] = (u32)v.x, out[4 * i + 1] = (u32)v.y, out[4 * i + 2] = (u32)v.z, out[4 * i + 3] = (u32)v.w;
        }
    }
    static TP_MEMBER int place(int u, int r) { return u * 32 + r * 16; }
};
template <>
struct Strip<kF16> : HalfStrip {};
template <>
struct Strip<kBF16> : HalfStrip {};

/// Loads whatever of a strip lies within k.
template <int kType>
TP_DEVICE void load_strip(Strip<kType>& strip, const char* const* plane, u32 step, int u, i64 k) {
    if constexpr (kType == kF16 || kType == kBF16) strip.load_halves(plane, step, u, k);
    else strip.load(plane, step, u, Strip<kType>::end(step, u) <= k);
}

/// Of a later step of the same 256 weights: what `first` has of all of them is not loaded again. (Rows lie far apart: a warp's load of four bytes
/// from each of 16 rows takes the L1 as long as one of 32 bytes from each.)
template <int kType>
TP_DEVICE void load_next_strip(Strip<kType>& strip, const char* const* plane, u32 step, int u, i64 k) {
    if constexpr (kType == kQ4_K) strip.load_weights(plane, step, u, Strip<kType>::end(step, u) <= k);
    else load_strip<kType>(strip, plane, step, u, k);
}
/// A run of what load_next_strip loaded, or load_strip, which is its own `first`.
template <int kType>
TP_DEVICE void run_strip(const Strip<kType>& strip, const Strip<kType>& first, u32 step, int u, int r, u32 (&out)[8]) {
    if constexpr (kType == kQ4_K) {
        Strip<kType> whole = first;
        whole.q = strip.q;
        whole.run(step, u, r, out);
    } else {
        strip.run(step, u, r, out);
    }
}

/// Which columns of x a block multiplies, and where its results go.
struct TileColumns {
    const View& to;
    i64 m, column0;
    TP_MEMBER bool has(i64 column) const { return column0 + column < m; }
    /// Of `columns` columns as panels: the first one's number, and how many there are.
    TP_MEMBER i64 panel() const { return column0 / kPanelRows; }
    TP_MEMBER int panels(int columns) const { return (int)((m - column0 < columns ? m - column0 : columns) + kPanelRows - 1) / kPanelRows; }
    TP_MEMBER i64 x_row(i64 column) const { return column0 + column; }
    TP_MEMBER char* y(i64 row, i64 column) const { return to.data + row * to.nb[0] + (column0 + column) * to.nb[1]; }
};
/// Of one expert: the entries (token * n_used + slot) of one tile of its list.
struct TileEntries {
    const MulTileIdArgs& a;
    const i32* entry;
    i64 count, tile = 0;
    TP_MEMBER i64 panel() const { return tile; }
    TP_MEMBER int panels(int) const { return 1; }
    TP_MEMBER bool has(i64 column) const { return column < count; }
    TP_MEMBER i64 x_row(i64 column) const { return a.x_per_slot ? entry[column] : (u32)entry[column] / (u32)a.n_used; }
    TP_MEMBER char* y(i64 row, i64 column) const {
        const u32 token = (u32)entry[column] / (u32)a.n_used, slot = (u32)entry[column] - token * (u32)a.n_used;
        return a.y.data + row * a.y.nb[0] + slot * a.y.nb[1] + token * a.y.nb[2];
    }
};

}  // namespace ggml_tp
