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
    const u32 minus = tp_byte_perm((bits & 15) * 0x10204080u, 0, 0xba98);  // each bit at the top of its byte, then all over it
    return (int)(((u32)bytes ^ minus) + (minus & 0x01010101u));
}
/// A byte of signs for each of four groups of eight, of which seven are stored side by side: the number of minus signs is even.
TP_DEVICE u32 even_signs(u32 sevens) {
    const u32 s = (sevens & 0x7fu) | (sevens << 1 & 0x7f00u) | (sevens << 2 & 0x7f0000u) | (sevens << 3 & 0x7f000000u);
    u32 parity = s ^ (s >> 4 & 0x0f0f0f0fu);
    parity ^= parity >> 2;
    parity ^= parity >> 1;
    return s | (parity & 0x01010101u) << 7;
}
/// 32 weights as 4 groups of eight.
struct GridPiece : RunsPiece {
    TP_MEMBER int& word(int l, int h) { return (&(l < 2 ? q0 : q1).x)[l % 2 * 2 + h]; }
    TP_MEMBER void set_eight(int l, u32 entry, u32 values) { grid_eight(entry, values, word(l, 0), word(l, 1)); }
    TP_MEMBER void set_signs(u32 signs) {
#pragma unroll
        for (int l = 0; l < 4; ++l)
#pragma unroll
            for (int h = 0; h < 2; ++h) word(l, h) = with_signs(word(l, h), signs >> (8 * l + 4 * h));
    }
    /// Entries of four values: codes of 4 bits, of which 3 choose among eight bytes.
    TP_MEMBER void set_fours(const u16* grid, const u32* entries, u32 ninth_bits, u32 low_values, u32 high_values) {
#pragma unroll
        for (int i = 0; i < 8; ++i)
            word(i / 2, i % 2) = (int)tp_byte_perm(low_values, high_values, grid[(entries[i / 4] >> i % 4 * 8 & 255) | (ninth_bits >> i & 1) << 8]);
    }
};
constexpr u32 kGrid2Values = 0x3c2b1908u;                               // 8, 25, 43 (and what 3 stands for)
constexpr u32 kGrid1Up = 0x110901f9u, kGrid1Down = 0x0f07fff7u;         // eight times -1, 0, 1, and one more or less: an eighth
constexpr u32 kGrid3XxsLow = 0x1c140c04u, kGrid3XxsHigh = 0x3e342c24u;  // 4, 12, 20, 28, 36, 44, 52, 62
constexpr u32 kGrid3SLow = 0x07050301u, kGrid3SHigh = 0x0f0d0b09u;      // 1, 3, ... 15

template <>
struct Piece<kIQ2_XXS> : GridPiece {
    template <class Load>
    TP_MEMBER void load(const char* const* plane, i64 p, Load) {
        const u32* const block = (const u32*)(plane[0] + p * 8);
        const u32 entries = block[0], signs = block[1];
#pragma unroll
        for (int l = 0; l < 4; ++l) set_eight(l, kGridIq2Xxs[entries >> 8 * l & 255], kGrid2Values);
        set_signs(even_signs(signs));
        s0 = s1 = tp_load_half(plane[1] + p / 8 * 2) * (0.5f + (float)(signs >> 28)) * 0.25f;
    }
};
/// With 4 bits of scale for each run.
struct GridTwoScalesPiece : GridPiece {
    TP_MEMBER void set_scales(const char* scales, const char* d, i64 p) {
        const u8 both = *(const u8*)(scales + p);
        const float quarter = tp_load_half(d + p / 8 * 2) * 0.25f;
        s0 = quarter * (0.5f + (float)(both & 15)), s1 = quarter * (0.5f + (float)(both >> 4));
    }
};
template <>
struct Piece<kIQ2_XS> : GridTwoScalesPiece {
    template <class Load>
    TP_MEMBER void load(const char* const* plane, i64 p, Load) {
        const u32* const block = (const u32*)(plane[0] + p * 8);
        const u32 entries[2] = {block[0], block[1]};  // two of 16 bits each: a number of 9, seven signs
#pragma unroll
        for (int l = 0; l < 4; ++l) set_eight(l, kGridIq2Xs[entries[l / 2] >> l % 2 * 16 & 511], kGrid2Values);
        const u32 sevens = (entries[0] >> 9 & 0x7fu) | (entries[0] >> 18 & 0x3f80u) | (entries[1] << 5 & 0x1fc000u) | (entries[1] >> 4 & 0xfe00000u);
        set_signs(even_signs(sevens));
        set_scales(plane[1], plane[2], p);
    }
};
template <>
struct Piece<kIQ2_S> : GridTwoScalesPiece {
    template <class Load>
    TP_MEMBER void load(const char* const* plane, i64 p, Load) {
        const char* const block = plane[0] + p / 8 * 64 + p % 8 * 4;
        const u32 entries = *(const u32*)block, high = *(const u8*)(plane[1] + p);
#pragma unroll
        for (int l = 0; l < 4; ++l) set_eight(l, kGridIq2S[(entries >> 8 * l & 255) | (high >> 2 * l & 3) << 8], kGrid2Values);
        set_signs(*(const u32*)(block + 32));
        set_scales(plane[2], plane[3], p);
    }
};
template <>
struct Piece<kIQ3_XXS> : GridPiece {
    template <class Load>
    TP_MEMBER void load(const char* const* plane, i64 p, Load) {
        const char* const block = plane[0] + p / 8 * 96;
        const u32 signs = *(const u32*)(block + 64 + p % 8 * 4);
        const u32 entries[2] = {*(const u32*)(block + p % 8 * 8), *(const u32*)(block + p % 8 * 8 + 4)};
        set_fours(kGridIq3Xxs, entries, 0, kGrid3XxsLow, kGrid3XxsHigh);
        set_signs(even_signs(signs));
        s0 = s1 = tp_load_half(plane[1] + p / 8 * 2) * (0.5f + (float)(signs >> 28)) * 0.5f;
    }
};
template <>
struct Piece<kIQ3_S> : GridPiece {
    template <class Load>
    TP_MEMBER void load(const char* const* plane, i64 p, Load) {
        const u32* const block = (const u32*)(plane[0] + p * 8);
        const char* const signs = plane[2] + p / 8 * 36;  // and 4 bits of scale for each piece behind them
        const u32 entries[2] = {block[0], block[1]};
        set_fours(kGridIq3S, entries, *(const u8*)(plane[1] + p), kGrid3SLow, kGrid3SHigh);
        set_signs(*(const u32*)(signs + p % 8 * 4));
        const int scale = *(const u8*)(signs + 32 + p % 8 / 2) >> p % 2 * 4 & 15;
        s0 = s1 = tp_load_half(plane[3] + p / 8 * 2) * (float)(1 + 2 * scale);
    }
};
/// high: of each group of eight a bit of shift above three of its entry's number; step: bits from one group to the next.
struct GridShiftPiece : GridPiece {
    TP_MEMBER void set_groups(u32 entries, u32 high) {
#pragma unroll
        for (int l = 0; l < 4; ++l) set_eight(l, kGridIq1[(entries >> 8 * l & 255) | (high >> 4 * l & 7) << 8], high >> 4 * l & 8 ? kGrid1Down : kGrid1Up);
    }
};
template <>
struct Piece<kIQ1_S> : GridShiftPiece {
    template <class Load>
    TP_MEMBER void load(const char* const* plane, i64 p, Load) {
        const u32 high = *(const u16*)(plane[1] + p * 2);  // four times three bits of number, three of scale, the shift of all four
        set_groups(*(const u32*)(plane[0] + p * 4), (high & 7) | (high << 1 & 0x70) | (high << 2 & 0x700) | (high << 3 & 0x7000) | (high >> 15) * 0x8888u);
        s0 = s1 = tp_load_half(plane[2] + p / 8 * 2) * (float)(2 * (high >> 12 & 7) + 1) * 0.125f;
    }
};
template <>
struct Piece<kIQ1_M> : GridShiftPiece {
    template <class Load>
    TP_MEMBER void load(const char* const* plane, i64 p, Load) {
        set_groups(*(const u32*)(plane[0] + p * 4), *(const u16*)(plane[1] + p * 2));
        const u16* const scales = (const u16*)(plane[2] + p / 8 * 8);  // below 4 bits of d, four times 3 bits: of two pieces
        const u16 d = (u16)(scales[0] >> 12 | (scales[1] >> 8 & 0xf0) | (scales[2] >> 4 & 0xf00) | (scales[3] & 0xf000));
        const int both = scales[p % 8 / 2] >> p % 2 * 6;
        const float eighth = tp_half_to_float(d) * 0.125f;
        s0 = eighth * (float)(2 * (both & 7) + 1), s1 = eighth * (float)(2 * (both >> 3 & 7) + 1);
    }
};

}  // namespace ggml_tp
