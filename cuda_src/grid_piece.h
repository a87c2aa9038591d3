// Pieces of the types whose quants are numbers of a grid's entries: eight or four values that a table names (codebooks.h), with signs or shifts apart.
// The tables lie in global memory, 1 to 8 KB, which stay in the L1; stream.cu has them in shared memory.
#pragma once
#include "vec_piece.h"

namespace ggml_tp {

/// Every grid, a word an entry.
struct alignas(16) GridTables {
    u32 iq2_xxs[256], iq2_xs[512], iq2_s[1024], iq3_xxs[256], iq3_s[512], iq1[2048];
};
/// Eight codes of 2 bits as selectors of tp_byte_perm: nibble i's, from bit `first_bit` on, is element at[i]'s.
template <int kEntries>
constexpr void fill_eights(u32 (&to)[kEntries], const u16 (&grid)[kEntries], const int (&at)[8], int first_bit) {
    for (int e = 0; e < kEntries; ++e)
        for (int i = 0; i < 8; ++i) to[e] |= (u32)(grid[e] >> 2 * at[i] & 3) << (4 * i + first_bit);
}
/// Four codes of 3 bits as the bytes that they stand for, the last one first.
template <int kEntries>
constexpr void fill_fours(u32 (&to)[kEntries], const u16 (&grid)[kEntries], const int (&values)[8]) {
    for (int e = 0; e < kEntries; ++e)
        for (int i = 0; i < 4; ++i) to[e] |= (u32)values[grid[e] >> 4 * (3 - i) & 7] << 8 * i;
}
/// In spread_signs()'s order, each code with a zero below it.
constexpr int kInOrder[8] = {0, 1, 2, 3, 4, 5, 6, 7}, kAsSpread[8] = {3, 7, 2, 6, 1, 5, 0, 4};
constexpr GridTables grid_tables() {
    const int of_iq3_xxs[8] = {4, 12, 20, 28, 36, 44, 52, 62}, of_iq3_s[8] = {1, 3, 5, 7, 9, 11, 13, 15};
    GridTables out{};
    fill_eights(out.iq2_xxs, kGridIq2Xxs, kAsSpread, 1), fill_eights(out.iq2_xs, kGridIq2Xs, kAsSpread, 1), fill_eights(out.iq2_s, kGridIq2S, kAsSpread, 1);
    fill_fours(out.iq3_xxs, kGridIq3Xxs, of_iq3_xxs), fill_fours(out.iq3_s, kGridIq3S, of_iq3_s);
    fill_eights(out.iq1, kGridIq1, kInOrder, 0);
    return out;
}
static constexpr GridTables kGridTables = grid_tables();

/// Eight signs, nothing above them, at the tops of nibbles, other bits between them: elements 3, 2, 1, 0 at those of the bytes' lower halves, 7, 6, 5, 4
/// at those of the upper ones. (Four copies nine bits apart, so that no two meet: an order in which one multiplication does it.)
TP_DEVICE u32 spread_signs(u32 eight) { return eight * 0x08040201u; }

/// Bytes of seven signs above a zero: bytes of eight, as the number of minus signs is even.
TP_DEVICE u32 even_signs(u32 sevens) {
    u32 parity = sevens ^ sevens << 4;  // at a byte's top; what comes from the byte below stays beneath it
    parity ^= parity << 2;
    parity ^= parity << 1;
    return sevens >> 1 | (parity & 0x80808080u);
}
/// Those bytes from 28 bits.
TP_DEVICE u32 sevens_of(u32 bits) {
    const u32 two = (bits & 0x3fffu) | (bits << 2 & 0x3fff0000u);
    return (two << 1 & 0x00fe00feu) | (two << 2 & 0xfe00fe00u);
}
/// One instruction, where a shift and a mask would be two, and a number times four an addition of 64 bits besides.
TP_DEVICE u32 byte_of(u32 word, int i) { return tp_byte_perm(word, 0, 0x4440u | (u32)i); }
/// Selectors without a top bit: tp_byte_perm would clear those first.
TP_DEVICE u32 chosen(u32 low, u32 high, u32 selectors) { return tp_byte_perm_sign(low, high, selectors); }
TP_DEVICE void load_two(const char* from, u32 (&to)[2]) {
    const u64 both = *(const u64*)from;
    to[0] = (u32)both, to[1] = (u32)(both >> 32);
}

/// What a piece of 32 weights is in its planes, four groups of eight: load() takes words and does nothing with them. number(i): of the i-th group's entry,
/// or of the i-th half group's; signs(): a byte for each group. The weights of run r are grid values times kScale * super() * odd(piece, r).
template <int kType>
struct GridNumbers;
enum GridFamily { kSignedEights, kSignedFours, kShiftedEights };

template <>
struct GridNumbers<kIQ2_XXS> {
    static constexpr GridFamily kFamily = kSignedEights;
    static constexpr float kScale = 0.125f;
    static constexpr auto kTable = &GridTables::iq2_xxs;
    u32 words[2];  // numbers; signs, 4 bits of scale above them
    u16 d;
    TP_MEMBER void load(const char* const* plane, i64 p) { load_two(plane[0] + p * 8, words), d = *(const u16*)(plane[1] + p / 8 * 2); }
    TP_MEMBER u32 number(int i) const { return byte_of(words[0], i); }
    TP_MEMBER u32 signs() const { return even_signs(sevens_of(words[1])); }
    TP_MEMBER float super() const { return tp_half_to_float(d); }
    TP_MEMBER int odd(int, int) const { return (int)(words[1] >> 27 | 1); }
};
template <>
struct GridNumbers<kIQ2_XS> {
    static constexpr GridFamily kFamily = kSignedEights;
    static constexpr float kScale = 0.125f;
    static constexpr auto kTable = &GridTables::iq2_xs;
    u32 words[2];  // of a run: twice a number of 9 bits and seven signs
    u16 d;
    u8 scales;
    TP_MEMBER void load(const char* const* plane, i64 p) {
        load_two(plane[0] + p * 8, words), scales = *(const u8*)(plane[1] + p), d = *(const u16*)(plane[2] + p / 8 * 2);
    }
    TP_MEMBER u32 number(int i) const { return words[i / 2] >> i % 2 * 16 & 511; }
    TP_MEMBER u32 signs() const { return even_signs(tp_byte_perm(words[0], words[1], 0x7531) & 0xfefefefeu); }
    TP_MEMBER float super() const { return tp_half_to_float(d); }
    TP_MEMBER int odd(int, int r) const { return 2 * (scales >> 4 * r & 15) + 1; }
};
template <>
struct GridNumbers<kIQ2_S> {
    static constexpr GridFamily kFamily = kSignedEights;
    static constexpr float kScale = 0.125f;
    static constexpr auto kTable = &GridTables::iq2_s;
    u32 numbers, signs_;
    u16 d;
    u8 high, scales;
    TP_MEMBER void load(const char* const* plane, i64 p) {
        const u32* const block = (const u32*)(plane[0] + p / 8 * 64 + p % 8 * 4);
        numbers = block[0], signs_ = block[8];
        high = *(const u8*)(plane[1] + p), scales = *(const u8*)(plane[2] + p), d = *(const u16*)(plane[3] + p / 8 * 2);
    }
    TP_MEMBER u32 number(int i) const { return byte_of(numbers, i) | ((u32)high << (8 - 2 * i) & 0x300u); }
    TP_MEMBER u32 signs() const { return signs_; }
    TP_MEMBER float super() const { return tp_half_to_float(d); }
    TP_MEMBER int odd(int, int r) const { return 2 * (scales >> 4 * r & 15) + 1; }
};
template <>
struct GridNumbers<kIQ3_XXS> {
    static constexpr GridFamily kFamily = kSignedFours;
    static constexpr float kScale = 0.25f;
    static constexpr auto kTable = &GridTables::iq3_xxs;
    u32 words[2], signs_;  // 4 bits of scale above the signs
    u16 d;
    TP_MEMBER void load(const char* const* plane, i64 p) {
        const char* const block = plane[0] + p / 8 * 96;
        load_two(block + p % 8 * 8, words), signs_ = *(const u32*)(block + 64 + p % 8 * 4), d = *(const u16*)(plane[1] + p / 8 * 2);
    }
    TP_MEMBER u32 number(int i) const { return byte_of(words[i / 4], i % 4); }
    TP_MEMBER u32 signs() const { return even_signs(sevens_of(signs_)); }
    TP_MEMBER float super() const { return tp_half_to_float(d); }
    TP_MEMBER int odd(int, int) const { return (int)(signs_ >> 27 | 1); }
};
template <>
struct GridNumbers<kIQ3_S> {
    static constexpr GridFamily kFamily = kSignedFours;
    static constexpr float kScale = 1.0f;
    static constexpr auto kTable = &GridTables::iq3_s;
    u32 words[2], signs_;
    u16 d;
    u8 ninth, scales;  // scales: of two pieces
    TP_MEMBER void load(const char* const* plane, i64 p) {
        const char* const behind = plane[2] + p / 8 * 36;
        load_two(plane[0] + p * 8, words);
        ninth = *(const u8*)(plane[1] + p);
        signs_ = *(const u32*)(behind + p % 8 * 4), scales = *(const u8*)(behind + 32 + p % 8 / 2);
        d = *(const u16*)(plane[3] + p / 8 * 2);
    }
    TP_MEMBER u32 number(int i) const { return byte_of(words[i / 4], i % 4) | ((u32)ninth << (8 - i) & 0x100u); }
    TP_MEMBER u32 signs() const { return signs_; }
    TP_MEMBER float super() const { return tp_half_to_float(d); }
    TP_MEMBER int odd(int p, int) const { return 2 * (scales >> p % 2 * 4 & 15) + 1; }
};
template <>
struct GridNumbers<kIQ1_S> {
    static constexpr GridFamily kFamily = kShiftedEights;
    static constexpr float kScale = 0.125f;
    static constexpr auto kTable = &GridTables::iq1;
    u32 numbers;
    u16 high, d;  // high: four times three bits of number, three of scale, the shift of all four
    TP_MEMBER void load(const char* const* plane, i64 p) {
        numbers = *(const u32*)(plane[0] + p * 4), high = *(const u16*)(plane[1] + p * 2), d = *(const u16*)(plane[2] + p / 8 * 2);
    }
    TP_MEMBER u32 number(int i) const { return byte_of(numbers, i) | ((u32)high << 8 >> 3 * i & 0x700u); }
    TP_MEMBER bool shifted_down(int) const { return high >> 15; }
    TP_MEMBER float super() const { return tp_half_to_float(d); }
    TP_MEMBER int odd(int, int) const { return 2 * (high >> 12 & 7) + 1; }
};
template <>
struct GridNumbers<kIQ1_M> {
    static constexpr GridFamily kFamily = kShiftedEights;
    static constexpr float kScale = 0.125f;
    static constexpr auto kTable = &GridTables::iq1;
    u32 numbers, scales[2];  // 16 bits are four times 3 bits of scale, of two pieces, and four bits of d
    u16 high;                // four times three bits of number and a shift
    TP_MEMBER void load(const char* const* plane, i64 p) {
        numbers = *(const u32*)(plane[0] + p * 4), high = *(const u16*)(plane[1] + p * 2);
        load_two(plane[2] + p / 8 * 8, scales);
    }
    TP_MEMBER u32 number(int i) const { return byte_of(numbers, i) | ((u32)high << 8 >> 4 * i & 0x700u); }
    TP_MEMBER bool shifted_down(int i) const { return high >> 4 * i & 8; }
    TP_MEMBER float super() const {
        return tp_half_to_float((u16)((scales[0] >> 12 & 15) | (scales[0] >> 24 & 0xf0) | (scales[1] >> 4 & 0xf00) | (scales[1] >> 16 & 0xf000)));
    }
    TP_MEMBER int odd(int p, int r) const { return (int)(2 * ((p % 8 < 4 ? scales[0] : scales[1]) >> (p % 8 / 2 % 2 * 16 + p % 2 * 6 + r * 3) & 7) + 1); }
};

// How a family's groups become values, and which activations belong to them. entry: a group's, of which it has kEntries; signs: its byte of them. add(): its
// share of a run's sum, all less minus; arrange(): eight activations in the order of its values; in_order(): its values in the order of activations.
struct GridSum {
    int all = 0, minus = 0;
};
template <int kType, GridFamily kFamily = GridNumbers<kType>::kFamily>
struct GridGroups;
/// Eight values of two bits: a code is the lower two bits of a selector, the third one its sign.
template <int kType>
struct GridGroups<kType, kSignedEights> : GridNumbers<kType> {
    static constexpr int kEntries = 1;
    static constexpr u32 kValues = 0x3c2b1908u, kNegated = negated_bytes(kValues);  // 8, 25, 43, and what 3 would be
    static TP_MEMBER void values(const u32* entry, u32 signs, u32& first, u32& last) {
        const u32 selectors = (spread_signs(signs) & 0x88888888u) | *entry, values = tp_in_register(kValues);
        first = chosen(values, kNegated, selectors >> 1), last = chosen(values, kNegated, selectors >> 17);
    }
    TP_MEMBER void add(int, const u32* entry, u32 signs, int x0, int x1, GridSum& sum) const {
        u32 first, last;
        values(entry, signs, first, last);
        sum.all = tp_dp4a((int)last, x1, tp_dp4a((int)first, x0, sum.all));
    }
    static TP_MEMBER void arrange(int& x0, int& x1) {
        const u32 first = (u32)x0, last = (u32)x1;
        x0 = (int)tp_byte_perm(first, last, 0x6273), x1 = (int)tp_byte_perm(first, last, 0x4051);
    }
    TP_MEMBER void in_order(int, const u32* entry, u32 signs, int& v0, int& v1) const {
        u32 first, last;
        values(entry, signs, first, last);
        v0 = (int)tp_byte_perm(first, last, 0x0246), v1 = (int)tp_byte_perm(first, last, 0x1357);
    }
};
/// Twice four amounts: what has a minus sign is inverted, which is one too few of the activation.
template <int kType>
struct GridGroups<kType, kSignedFours> : GridNumbers<kType> {
    static constexpr int kEntries = 2;
    static TP_MEMBER void minus_signs(u32 signs, u32& first, u32& last) {
        const u32 tops = spread_signs(signs);
        first = tp_byte_signs(tops << 4), last = tp_byte_signs(tops);
    }
    TP_MEMBER void add(int, const u32* entry, u32 signs, int x0, int x1, GridSum& sum) const {
        u32 first, last;
        minus_signs(signs, first, last);
        sum.all = tp_dp4a((int)(entry[1] ^ last), x1, tp_dp4a((int)(entry[0] ^ first), x0, sum.all));
        sum.minus = tp_dp4a((int)last, x1, tp_dp4a((int)first, x0, sum.minus));
    }
    static TP_MEMBER int reversed(u32 v) { return (int)tp_byte_perm(v, 0, 0x0123); }
    static TP_MEMBER void arrange(int& x0, int& x1) { x0 = reversed((u32)x0), x1 = reversed((u32)x1); }
    TP_MEMBER void in_order(int, const u32* entry, u32 signs, int& v0, int& v1) const {
        u32 first, last;
        minus_signs(signs, first, last);
        v0 = reversed((entry[0] ^ first) + (first & 0x01010101u)), v1 = reversed((entry[1] ^ last) + (last & 0x01010101u));
    }
};
/// Eight of -1, 0, 1, and one eighth more or less, times eight.
template <int kType>
struct GridGroups<kType, kShiftedEights> : GridNumbers<kType> {
    static constexpr int kEntries = 1;
    static TP_MEMBER u32 signs() { return 0; }
    TP_MEMBER void in_order(int g, const u32* entry, u32, int& v0, int& v1) const {
        const u32 values = this->shifted_down(g) ? 0x0f07fff7u : 0x110901f9u;
        v0 = (int)chosen(values, 0, *entry), v1 = (int)chosen(values, 0, *entry >> 16);
    }
    TP_MEMBER void add(int g, const u32* entry, u32 signs, int x0, int x1, GridSum& sum) const {
        int v0, v1;
        in_order(g, entry, signs, v0, v1);
        sum.all = tp_dp4a(v1, x1, tp_dp4a(v0, x0, sum.all));
    }
    static TP_MEMBER void arrange(int&, int&) {}
};

template <int kType>
struct GridWords : GridGroups<kType> {
    using GridGroups<kType>::kEntries;
    TP_MEMBER float scale(int p, int r) const { return this->super() * this->kScale * (float)this->odd(p, r); }
    /// Of groups [begin, begin + kGroups).
    template <int kGroups>
    TP_MEMBER void look_up(const GridTables& grids, int begin, u32 (&entries)[kGroups * kEntries]) const {
#pragma unroll
        for (int i = 0; i < kGroups * kEntries; ++i) entries[i] = (grids.*this->kTable)[this->number(begin * kEntries + i)];
    }
    TP_MEMBER TpInt4 bytes(const GridTables& grids, int r) const {
        u32 entries[2 * kEntries];
        look_up<2>(grids, 2 * r, entries);
        const u32 signs = this->signs();
        TpInt4 out;
        this->in_order(2 * r, entries, byte_of(signs, 2 * r), out.x, out.y);
        this->in_order(2 * r + 1, entries + kEntries, byte_of(signs, 2 * r + 1), out.z, out.w);
        return out;
    }
};
template <int kType>
struct GridPiece : RunsPiece {
    template <class Load>
    TP_MEMBER void load(const char* const* plane, i64 p, Load) {
        GridWords<kType> words;
        words.load(plane, p);
        q0 = words.bytes(kGridTables, 0), q1 = words.bytes(kGridTables, 1);
        s0 = words.scale((int)(p % 8), 0), s1 = words.scale((int)(p % 8), 1);
    }
};
template <int kType>
struct GridUnit : AnyUnit {
    static constexpr int kElems = 32, kWords = 2, kEntries = GridWords<kType>::kEntries;
    GridWords<kType> words;
    u32 entries[4 * kEntries];
    static TP_MEMBER int word(int unit, int w) { return unit * 32 + w * 16; }
    static TP_MEMBER void arrange(TpInt4* x) {
        for (int r = 0; r < 2; ++r) GridWords<kType>::arrange(x[r].x, x[r].y), GridWords<kType>::arrange(x[r].z, x[r].w);
    }
    template <class Load>
    TP_MEMBER void load(const char* const* plane, int unit, Load from) {
        words.load(plane, unit);
        words.template look_up<4>(from.grids(), 0, entries);
    }
    // At most 62 * 127 * 32 * 31, which a float has exactly.
    TP_MEMBER float dot_unit(int unit, const TpInt4* x, const TpFloat2* of) const {
        const u32 signs = words.signs();
        int sum = 0;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            GridSum run;
            words.add(2 * r, entries + 2 * r * kEntries, byte_of(signs, 2 * r), x[r].x, x[r].y, run);
            words.add(2 * r + 1, entries + (2 * r + 1) * kEntries, byte_of(signs, 2 * r + 1), x[r].z, x[r].w, run);
            sum += (run.all - run.minus) * words.odd(unit % 8, r);
        }
        return words.super() * (words.kScale * of[0].x) * (float)sum;
    }
};
#define TP_GRID_PIECE(name, type)            \
    template <>                              \
    struct Piece<type> : GridPiece<type> {}; \
    template <>                              \
    struct Unit<type> : GridUnit<type> {};
TP_GRID_TYPES(TP_GRID_PIECE)
#undef TP_GRID_PIECE

}  // namespace ggml_tp
