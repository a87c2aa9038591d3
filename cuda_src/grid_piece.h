// Pieces of the types whose quants are numbers of a grid's entries: eight or four values that a table names (codebooks.h), with signs or shifts apart.
// The tables are read from global memory: 512 bytes to 4 KB, which stay in the L1.
#pragma once
#include "vec_piece.h"

namespace ggml_tp {

/// A grid's eight values, which an entry's codes of 2 bits choose among four bytes: the first four, the last four.
TP_DEVICE void grid_eight(u32 entry, u32 values, int& first, int& last) {
    u32 codes = (entry | entry << 8) & 0x00ff00ffu;
    codes = (codes | codes << 4) & 0x0f0f0f0fu;
    codes = (codes | codes << 2) & 0x33333333u;
    first = (int)tp_byte_perm(values, 0, codes), last = (int)tp_byte_perm(values, 0, codes >> 16);
}
/// Minus for the bytes whose bit of four is set; none of them is 0.
TP_DEVICE int with_signs(int bytes, u32 bits) {
    const u32 minus = tp_byte_signs((bits & 15) * 0x10204080u);  // each bit at the top of its byte
    return (int)(((u32)bytes ^ minus) + (minus & 0x01010101u));
}
/// Of 16 bytes.
TP_DEVICE TpInt4 with_signs(const TpInt4& v, u32 bits) {
    return {with_signs(v.x, bits), with_signs(v.y, bits >> 4), with_signs(v.z, bits >> 8), with_signs(v.w, bits >> 12)};
}
/// Signs of 16 from those of two groups of eight, of which seven are stored side by side: the number of minus signs is even.
TP_DEVICE u32 even_signs(u32 sevens) {
    const u32 s = (sevens & 0x7fu) | (sevens << 1 & 0x7f00u);
    u32 parity = s ^ s >> 4;
    parity ^= parity >> 2;
    parity ^= parity >> 1;
    return s | (parity & 0x0101u) << 7;
}

/// What a piece of 32 weights is in its planes, two runs of 16: load() takes words and does nothing with them, bytes() and scale() make of them what a
/// run's weights are, which is the one times the other.
template <int kType>
struct GridWords;

constexpr u32 kGrid2Values = 0x3c2b1908u;                               // 8, 25, 43 (and what 3 stands for)
constexpr u32 kGrid1Up = 0x110901f9u, kGrid1Down = 0x0f07fff7u;         // eight times -1, 0, 1, and one more or less: an eighth
constexpr u32 kGrid3XxsLow = 0x1c140c04u, kGrid3XxsHigh = 0x3e342c24u;  // 4, 12, 20, 28, 36, 44, 52, 62
constexpr u32 kGrid3SLow = 0x07050301u, kGrid3SHigh = 0x0f0d0b09u;      // 1, 3, ... 15

/// A run of two entries of eight values.
TP_DEVICE TpInt4 two_eights(u32 first, u32 second, u32 first_values, u32 second_values) {
    TpInt4 out;
    grid_eight(first, first_values, out.x, out.y), grid_eight(second, second_values, out.z, out.w);
    return out;
}
/// A run of four entries of four values, codes of 4 bits of which 3 choose among eight bytes: four numbers of eight bits, and a bit each above them.
TP_DEVICE TpInt4 four_fours(const u16* grid, u32 entries, u32 ninth, u32 low_values, u32 high_values) {
    auto four = [=](int i) { return (int)tp_byte_perm(low_values, high_values, grid[(entries >> 8 * i & 255) | (ninth >> i & 1) << 8]); };
    return {four(0), four(1), four(2), four(3)};
}

template <>
struct GridWords<kIQ2_XXS> {
    u32 entries, signs;  // 4 bits of scale above the signs
    u16 d;
    TP_MEMBER void load(const char* const* plane, i64 p) {
        entries = ((const u32*)(plane[0] + p * 8))[0], signs = ((const u32*)(plane[0] + p * 8))[1];
        d = *(const u16*)(plane[1] + p / 8 * 2);
    }
    TP_MEMBER TpInt4 bytes(int, int r) const {
        const u32 two = entries >> 16 * r;
        return with_signs(two_eights(kGridIq2Xxs[two & 255], kGridIq2Xxs[two >> 8 & 255], kGrid2Values, kGrid2Values), even_signs(signs >> 14 * r));
    }
    TP_MEMBER float scale(int, int) const { return tp_half_to_float(d) * (0.5f + (float)(signs >> 28)) * 0.25f; }
};
/// Four bits of scale of each run.
TP_DEVICE float grid_scale(u16 d, u8 scales, int r) { return tp_half_to_float(d) * (0.5f + (float)(scales >> 4 * r & 15)) * 0.25f; }
template <>
struct GridWords<kIQ2_XS> {
    u32 entries[2];  // of a run: twice a number of 9 bits and seven signs
    u16 d;
    u8 scales;
    TP_MEMBER void load(const char* const* plane, i64 p) {
        for (int r = 0; r < 2; ++r) entries[r] = ((const u32*)(plane[0] + p * 8))[r];
        scales = *(const u8*)(plane[1] + p), d = *(const u16*)(plane[2] + p / 8 * 2);
    }
    TP_MEMBER TpInt4 bytes(int, int r) const {
        const u32 two = entries[r];
        return with_signs(two_eights(kGridIq2Xs[two & 511], kGridIq2Xs[two >> 16 & 511], kGrid2Values, kGrid2Values),
                          even_signs((two >> 9 & 0x7fu) | (two >> 18 & 0x3f80u)));
    }
    TP_MEMBER float scale(int, int r) const { return grid_scale(d, scales, r); }
};
template <>
struct GridWords<kIQ2_S> {
    u32 entries, signs;
    u16 d;
    u8 high, scales;
    TP_MEMBER void load(const char* const* plane, i64 p) {
        const u32* const block = (const u32*)(plane[0] + p / 8 * 64 + p % 8 * 4);
        entries = block[0], signs = block[8];
        high = *(const u8*)(plane[1] + p), scales = *(const u8*)(plane[2] + p), d = *(const u16*)(plane[3] + p / 8 * 2);
    }
    TP_MEMBER TpInt4 bytes(int, int r) const {
        const u32 two = entries >> 16 * r, top = (u32)high >> 4 * r;
        return with_signs(two_eights(kGridIq2S[(two & 255) | (top & 3) << 8], kGridIq2S[(two >> 8 & 255) | (top >> 2 & 3) << 8], kGrid2Values, kGrid2Values),
                          signs >> 16 * r);
    }
    TP_MEMBER float scale(int, int r) const { return grid_scale(d, scales, r); }
};
template <>
struct GridWords<kIQ3_XXS> {
    u32 entries[2], signs;  // 4 bits of scale above the signs
    u16 d;
    TP_MEMBER void load(const char* const* plane, i64 p) {
        const char* const block = plane[0] + p / 8 * 96;
        for (int r = 0; r < 2; ++r) entries[r] = ((const u32*)(block + p % 8 * 8))[r];
        signs = *(const u32*)(block + 64 + p % 8 * 4);
        d = *(const u16*)(plane[1] + p / 8 * 2);
    }
    TP_MEMBER TpInt4 bytes(int, int r) const {
        return with_signs(four_fours(kGridIq3Xxs, entries[r], 0, kGrid3XxsLow, kGrid3XxsHigh), even_signs(signs >> 14 * r));
    }
    TP_MEMBER float scale(int, int) const { return tp_half_to_float(d) * (0.5f + (float)(signs >> 28)) * 0.5f; }
};
template <>
struct GridWords<kIQ3_S> {
    u32 entries[2], signs;
    u16 d;
    u8 ninth, scales;  // of two pieces
    TP_MEMBER void load(const char* const* plane, i64 p) {
        const char* const behind = plane[2] + p / 8 * 36;
        for (int r = 0; r < 2; ++r) entries[r] = ((const u32*)(plane[0] + p * 8))[r];
        ninth = *(const u8*)(plane[1] + p);
        signs = *(const u32*)(behind + p % 8 * 4), scales = *(const u8*)(behind + 32 + p % 8 / 2);
        d = *(const u16*)(plane[3] + p / 8 * 2);
    }
    TP_MEMBER TpInt4 bytes(int, int r) const {
        return with_signs(four_fours(kGridIq3S, entries[r], (u32)ninth >> 4 * r, kGrid3SLow, kGrid3SHigh), signs >> 16 * r);
    }
    TP_MEMBER float scale(int p, int) const { return tp_half_to_float(d) * (float)(1 + 2 * (scales >> p % 2 * 4 & 15)); }
};
/// Two numbers of eight bits; high: of each three bits above them, then a bit of shift.
TP_DEVICE TpInt4 shifted_eights(u32 two, u32 high) {
    return two_eights(kGridIq1[(two & 255) | (high & 7) << 8], kGridIq1[(two >> 8 & 255) | (high >> 4 & 7) << 8], high & 8 ? kGrid1Down : kGrid1Up,
                      high & 0x80 ? kGrid1Down : kGrid1Up);
}
template <>
struct GridWords<kIQ1_S> {
    u32 entries;
    u16 high, d;  // high: four times three bits of number, three of scale, the shift of all four
    TP_MEMBER void load(const char* const* plane, i64 p) {
        entries = *(const u32*)(plane[0] + p * 4), high = *(const u16*)(plane[1] + p * 2), d = *(const u16*)(plane[2] + p / 8 * 2);
    }
    TP_MEMBER TpInt4 bytes(int, int r) const {
        const u32 two = (u32)high >> 6 * r;
        return shifted_eights(entries >> 16 * r, (two & 7) | (two << 1 & 0x70) | ((u32)high >> 15) * 0x88u);
    }
    TP_MEMBER float scale(int, int) const { return tp_half_to_float(d) * (float)(2 * (high >> 12 & 7) + 1) * 0.125f; }
};
template <>
struct GridWords<kIQ1_M> {
    u32 entries, scales[2];  // 16 bits are four times 3 bits of scale, of two pieces, and four bits of d
    u16 high;
    TP_MEMBER void load(const char* const* plane, i64 p) {
        entries = *(const u32*)(plane[0] + p * 4), high = *(const u16*)(plane[1] + p * 2);
        for (int i = 0; i < 2; ++i) scales[i] = ((const u32*)(plane[2] + p / 8 * 8))[i];
    }
    TP_MEMBER TpInt4 bytes(int, int r) const { return shifted_eights(entries >> 16 * r, (u32)high >> 8 * r); }
    TP_MEMBER float scale(int p, int r) const {
        const u32 d = (scales[0] >> 12 & 15) | (scales[0] >> 24 & 0xf0) | (scales[1] >> 4 & 0xf00) | (scales[1] >> 16 & 0xf000);
        const u32 three = (p % 8 < 4 ? scales[0] : scales[1]) >> (p % 8 / 2 % 2 * 16 + p % 2 * 6 + r * 3) & 7;
        return tp_half_to_float((u16)d) * (float)(2 * three + 1) * 0.125f;
    }
};

template <int kType>
struct GridPiece : RunsPiece {
    template <class Load>
    TP_MEMBER void load(const char* const* plane, i64 p, Load) {
        GridWords<kType> words;
        words.load(plane, p);
        q0 = words.bytes((int)(p % 8), 0), q1 = words.bytes((int)(p % 8), 1);
        s0 = words.scale((int)(p % 8), 0), s1 = words.scale((int)(p % 8), 1);
    }
};
#define TP_GRID_PIECE(name, type) \
    template <>                   \
    struct Piece<type> : GridPiece<type> {};
TP_GRID_TYPES(TP_GRID_PIECE)
#undef TP_GRID_PIECE

}  // namespace ggml_tp
