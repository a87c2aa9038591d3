// MUL_MAT of few columns (a batch of sequences, a draft) from sm_80 on: bound by reading the weights once. They come through a ring in shared
// memory, 64 to 256 bytes of each of a block's rows a stage, so that memory is read in whole lines and a stage or more is on its way whatever the
// warps do; as strips of halves they are multiplied by up to kColumns columns of x, which the stages hold too. A warp has 32 rows and 128 of a
// stage's k: four lanes' strips (16 bytes of 4-bit weights, 32 of a row), in an order that x's panels are read in as well: which k a lane's
// element has does not matter to a sum, as long as both operands agree.
// grid: (row blocks of all parts, pieces of k), of experts (row blocks, tiles that there may be), block: few_shape's threads.
#include "mul_few.h"

#include "tile_piece.h"

#if TP_ARCH >= 800

namespace ggml_tp {

/// The matrix that a block of `rows` rows belongs to, and its first row there; before: rows of the matrices in front.
TP_DEVICE const MulVecPart& few_part(const MulPiecesArgs& a, u32 block, int rows, i64& row, i64& before) {
    int part = 0;
    before = 0;
    for (; part + 1 < a.wide.n_parts; ++part) {
        const u32 blocks = (u32)((a.wide.part[part].w.n + rows - 1) / rows);
        if (block < blocks) break;
        block -= blocks;
        before += a.wide.part[part].w.n;
    }
    row = (i64)block * rows;
    return a.wide.part[part];
}

/// How a row's 16-byte units are permuted in shared memory, so that a quarter warp, four lanes of each of two rows, meets no bank twice.
enum Swizzle {
    kStraight,  // rows of 64 bytes
    kByHalves,  // rows of 128, of which four lanes read 64 at a time
    kByPairs,   // rows of 128, of which four lanes read every other unit
    kByFours,   // rows of 256, every fourth
};
TP_DEVICE int swizzled(Swizzle swizzle, int row, int unit) {
    return swizzle == kByHalves ? unit ^ row % 2 * 4 : swizzle == kByPairs ? unit ^ row % 2 : swizzle == kByFours ? unit ^ (row % 2 * 2 + unit / 8 % 2) : unit;
}

/// What of a plane a stage holds: of each of kRows rows kUnits units of 16 bytes (kSwizzle), or of 4. A thread brings every kApart-th row's; what
/// there is not of rows and of k becomes zero.
template <int kThreads, int kRows, int kUnits, int kUnitBytes, Swizzle kSwizzle = kStraight>
struct FewPlane {
    static constexpr int kApart = kThreads / kUnits, kTimes = (kRows + kApart - 1) / kApart, kRowBytes = kUnits * kUnitBytes;
    static_assert(kThreads % kUnits == 0 && kApart % 2 == 0);
    const char* from;  // this thread's first unit in stage 0
    i64 stride;
    int rows;  // that there are, from this thread's first one on
    u32 at;    // where the unit lies
    TP_MEMBER FewPlane(const Matrix& w, int f, i64 matrix, i64 row0, int thread)
        : from(w.plane[f] + matrix * w.nb2 + (row0 + thread / kUnits) * w.row_stride + thread % kUnits * kUnitBytes), stride(w.row_stride) {
        const int row = thread / kUnits;
        const i64 end = w.n - row0 < kRows ? w.n - row0 : kRows;
        rows = row < kRows ? (int)end - row : 0;
        at = (u32)(row * kRowBytes + swizzled(kSwizzle, row, thread % kUnits) * kUnitBytes);
    }
    TP_MEMBER void bring(TpSharedAt to, i64 bytes, bool inside) const {
        if (kRows < kApart && rows <= 0) return;
        const char* p = from + bytes;
        const TpSharedAt place = to + at;
#pragma unroll
        for (int i = 0; i < kTimes; ++i, p += kApart * stride) {
            const bool is = inside && i * kApart < rows;
            if (kUnitBytes == 16) tp_copy_async_or_zero(place + (u32)(i * kApart * kRowBytes), p, is);
            else tp_copy_async_four(place + (u32)(i * kApart * kRowBytes), p, is ? 4 : 0);
        }
    }
    static TP_MEMBER const char* place(const char* from, int row, int unit) { return from + row * kRowBytes + swizzled(kSwizzle, row, unit) * kUnitBytes; }
};
TP_DEVICE TpInt4 four_words(const char* p) { return *(const TpInt4*)p; }

// Pairs of halves. A byte b below 0x64 is the half 1024 + b; what is subtracted from it leaves no rounding.
constexpr u32 kHalfOne = 0x3c003c00u, kHalfSixteenth = 0x2c002c00u;
TP_DEVICE u32 half2_mul(u32 a, u32 b) { return tp_half2_fma(a, b, 0x80008000u); }
/// Four weights of a word of bytes: (byte * factor + minus) * scale + shift, of which the first is exact. magic: 0x64646464.
TP_DEVICE void four_halves(u32 bytes, u32 magic, u32 factor, u32 minus, u32 scale, u32 shift, u32* out) {
    out[0] = tp_half2_fma(tp_half2_fma(tp_byte_perm(bytes, magic, 0x4140), factor, minus), scale, shift);
    out[1] = tp_half2_fma(tp_half2_fma(tp_byte_perm(bytes, magic, 0x4342), factor, minus), scale, shift);
}
/// The same of nibbles that are the low ones of their bytes, or the high ones, which are used as sixteenfold where they lie.
TP_DEVICE void four_nibbles(u32 word, u32 magic, int high, u32 low_minus, u32 high_minus, u32 scale, u32 shift, u32* out) {
    if (high) four_halves(word & 0xf0f0f0f0u, magic, kHalfSixteenth, high_minus, scale, shift, out);
    else four_halves(word & 0x0f0f0f0fu, magic, kHalfOne, low_minus, scale, shift, out);
}

/// A lane's 32 weights of a row in 128 of k, as Strip of tile_piece.h has them and with the same values: eight at a time, the i-th of run r. What the
/// blocks' scales need is done once.
template <int kType>
struct FewStrip;
template <>
struct FewStrip<kQ4_0> {
    TpInt4 q;
    u32 d;
    TP_MEMBER void run(u32 magic, int r, int i, u32 (&out)[4]) const {
        for (int j = 0; j < 2; ++j) four_nibbles((u32)(&q.x)[2 * i + j], magic, r, 0xe408e408u, 0xd480d480u, d, 0x80008000u, out + 2 * j);  // q - 8
    }
};
template <>
struct FewStrip<kQ4_1> {
    TpInt4 q;
    u32 dm;
    TP_MEMBER void run(u32 magic, int r, int i, u32 (&out)[4]) const {
        for (int j = 0; j < 2; ++j)
            four_nibbles((u32)(&q.x)[2 * i + j], magic, r, 0xe400e400u, 0xd400d400u, tp_half_twice(dm, 0), tp_half_twice(dm, 1), out + 2 * j);
    }
};
/// Nibbles with a fifth bit, less kMinus.
template <u32 kMinus>
struct FewFifthStrip {
    TpInt4 q;
    u32 tops, d, m;
    TP_MEMBER void run(u32 magic, int r, int i, u32 (&out)[4]) const {
        for (int j = 0; j < 2; ++j) {
            const u32 low = (u32)(&q.x)[2 * i + j] >> 4 * r & 0x0f0f0f0fu;
            four_halves(low | (u32)fifth_bits(tops >> (16 * r + 8 * i + 4 * j)), magic, kHalfOne, 0xe400e400u + kMinus * 0x10001u, d, m, out + 2 * j);
        }
    }
};
template <>
struct FewStrip<kQ5_0> : FewFifthStrip<16> {};
template <>
struct FewStrip<kQ5_1> : FewFifthStrip<0> {};
struct FewByteStrip {  // signed
    TpInt4 q[2];
    u32 d;
    TP_MEMBER void run(u32 magic, int r, int i, u32 (&out)[4]) const {
        for (int j = 0; j < 2; ++j)
            four_halves((u32)(&q[r].x)[2 * i + j] ^ 0x80808080u, magic, kHalfOne, 0xe480e480u, d, 0x80008000u, out + 2 * j);  // of offset 128
    }
};
template <>
struct FewStrip<kQ8_0> : FewByteStrip {};
template <>
struct FewStrip<kIQ4_NL> : FewByteStrip {};
template <>
struct FewStrip<kIQ4_XS> : FewByteStrip {};
template <>
struct FewStrip<kMXFP4> : FewByteStrip {};
template <>
struct FewStrip<kQ4_K> {
    TpInt4 q;
    u32 scales, mins;  // both runs', mins negative
    TP_MEMBER void run(u32 magic, int r, int i, u32 (&out)[4]) const {
        const u32 scale = tp_half_twice(scales, r), min = tp_half_twice(mins, r);
        for (int j = 0; j < 2; ++j) four_nibbles((u32)(&q.x)[2 * i + j], magic, r, 0xe400e400u, 0xd400d400u, scale, min, out + 2 * j);
    }
};
template <>
struct FewStrip<kQ5_K> {
    TpInt4 q, top;
    u32 scales, mins;
    int shift;  // of the first run's fifth bits; the second's are next to them
    TP_MEMBER void run(u32 magic, int r, int i, u32 (&out)[4]) const {
        const u32 scale = tp_half_twice(scales, r), min = tp_half_twice(mins, r);
        for (int j = 0; j < 2; ++j) {
            const u32 low = (u32)(&q.x)[2 * i + j] >> 4 * r & 0x0f0f0f0fu, high = (u32)(&top.x)[2 * i + j] >> (shift + r) & 0x01010101u;
            four_halves(low | high << 4, magic, kHalfOne, 0xe400e400u, scale, min, out + 2 * j);
        }
    }
};
template <>
struct FewStrip<kQ2_K> {
    TpInt4 q;
    u32 scales, mins;
    int shift;  // of the first run's two bits
    TP_MEMBER void run(u32 magic, int r, int i, u32 (&out)[4]) const {
        for (int j = 0; j < 2; ++j)
            four_halves((u32)(&q.x)[2 * i + j] >> (shift + 2 * r) & 0x03030303u, magic, kHalfOne, 0xe400e400u, tp_half_twice(scales, r), tp_half_twice(mins, r),
                        out + 2 * j);
    }
};
template <>
struct FewStrip<kQ3_K> {
    TpInt4 q, top;
    u32 scales;
    int shift, top_shift;
    TP_MEMBER void run(u32 magic, int r, int i, u32 (&out)[4]) const {
        for (int j = 0; j < 2; ++j) {
            const u32 low = (u32)(&q.x)[2 * i + j] >> (shift + 2 * r) & 0x03030303u, high = (u32)(&top.x)[2 * i + j] >> (top_shift + r) & 0x01010101u;
            four_halves(low | high << 2, magic, kHalfOne, 0xe404e404u, tp_half_twice(scales, r), 0x80008000u, out + 2 * j);  // of offset 4
        }
    }
};
template <>
struct FewStrip<kQ6_K> {
    TpInt4 q[2], top[2];
    u32 scales;  // both runs'
    int nibble, shift;
    TP_MEMBER void run(u32 magic, int r, int i, u32 (&out)[4]) const {
        const u32 scale = tp_half_twice(scales, r);
        for (int j = 0; j < 2; ++j) {
            const u32 low = (u32)(&q[r].x)[2 * i + j] >> nibble & 0x0f0f0f0fu, high = (u32)(&top[r].x)[2 * i + j] >> shift & 0x03030303u;
            four_halves(low | high << 4, magic, kHalfOne, 0xe420e420u, scale, 0x80008000u, out + 2 * j);  // of offset 32
        }
    }
};
struct FewHalfStrip {
    TpInt4 q[4];
    TP_MEMBER void run(u32, int r, int i, u32 (&out)[4]) const {
        for (int j = 0; j < 4; ++j) out[j] = (u32)(&q[2 * r + i].x)[j];
    }
};
template <>
struct FewStrip<kF16> : FewHalfStrip {};
template <>
struct FewStrip<kBF16> : FewHalfStrip {};

/// A stage's weights: kRows rows, kK of k from stage * kK on. bring() starts the copies, take() reads what has come: the strip that a lane (t of four)
/// has of a row in the stage's chunk-th 128 of k.
template <int kType, int kThreads, int kRows, int kK>
struct FewWeights;

/// What a plane has of each block of 32, a T.
template <class T, int kThreads, int kRows>
struct FewField {
    static constexpr int kUnits = sizeof(T) == 2 ? 1 : 2;
    using Plane = FewPlane<kThreads, kRows, kUnits, sizeof(T) == 1 ? 4 : 16>;
    static constexpr int kBytes = kRows * Plane::kRowBytes, kOfCopy = Plane::kRowBytes / kUnits / (int)sizeof(T);
    Plane plane;
    i64 k;
    TP_MEMBER FewField(const Matrix& w, int f, i64 matrix, i64 row0, int thread) : plane(w, f, matrix, row0, thread), k(w.k) {}
    TP_MEMBER void bring(TpSharedAt at, u32 of_256, int thread) const {
        plane.bring(at, (i64)of_256 * Plane::kRowBytes, ((i64)of_256 * 8 + thread % kUnits * kOfCopy) * 32 < k);
    }
};
/// Blocks of 32: quants, and a field of each block.
template <int kType, int kThreads, int kRows, int kK, class T = u16>
struct FewBlocks {
    static constexpr int kUnitElems = kType == kQ8_0 ? 16 : 32, kUnits = kK / kUnitElems;
    using Quants = FewPlane<kThreads, kRows, kUnits, 16, kType == kQ8_0 ? kByPairs : kUnits == 8 ? kByHalves : kStraight>;
    using Field = FewField<T, kThreads, kRows>;
    static constexpr int kFieldAt = kRows * Quants::kRowBytes, kEnd = kFieldAt + Field::kBytes;
    Quants quants;
    Field of_block;
    TP_MEMBER FewBlocks(const Matrix& w, i64 matrix, i64 row0, int thread) : quants(w, 0, matrix, row0, thread), of_block(w, 1, matrix, row0, thread) {}
    TP_MEMBER void bring(TpSharedAt at, u32 stage, int thread) const {
        quants.bring(at, (i64)stage * Quants::kRowBytes, (i64)stage * kK + thread % kUnits * kUnitElems < of_block.k);
        of_block.bring(at + (u32)kFieldAt, stage * (u32)kK / 256, thread);
    }
    /// Of a lane's block; at: where a field's values lie.
    template <class V>
    static TP_MEMBER V field(const char* at, u32 stage, int row, int chunk, int t) {
        const int of_256 = kK == 256 ? chunk : (int)(stage % 2);
        return ((const V*)at)[row * 8 + of_256 * 4 + t];
    }
    static TP_MEMBER T field(const char* from, u32 stage, int row, int chunk, int t) { return field<T>(from + kFieldAt, stage, row, chunk, t); }
};
template <int kThreads, int kRows, int kK>
struct FewWeights<kQ4_0, kThreads, kRows, kK> : FewBlocks<kQ4_0, kThreads, kRows, kK> {
    using Blocks = FewBlocks<kQ4_0, kThreads, kRows, kK>;
    using Blocks::Blocks;
    TP_MEMBER void take(FewStrip<kQ4_0>& s, const char* from, u32 stage, int row, int chunk, int t, u32) const {
        s.q = four_words(Blocks::Quants::place(from, row, chunk * 4 + t));
        s.d = Blocks::field(from, stage, row, chunk, t) * 0x10001u;
    }
};
template <int kThreads, int kRows, int kK>
struct FewWeights<kQ8_0, kThreads, kRows, kK> : FewBlocks<kQ8_0, kThreads, kRows, kK> {
    using Blocks = FewBlocks<kQ8_0, kThreads, kRows, kK>;
    using Blocks::Blocks;
    TP_MEMBER void take(FewStrip<kQ8_0>& s, const char* from, u32 stage, int row, int chunk, int t, u32) const {
        for (int r = 0; r < 2; ++r) s.q[r] = four_words(Blocks::Quants::place(from, row, chunk * 8 + t * 2 + r));
        s.d = Blocks::field(from, stage, row, chunk, t) * 0x10001u;
    }
};
template <int kThreads, int kRows, int kK>
struct FewWeights<kIQ4_NL, kThreads, kRows, kK> : FewBlocks<kIQ4_NL, kThreads, kRows, kK> {
    using Blocks = FewBlocks<kIQ4_NL, kThreads, kRows, kK>;
    using Blocks::Blocks;
    TP_MEMBER void take(FewStrip<kIQ4_NL>& s, const char* from, u32 stage, int row, int chunk, int t, u32) const {
        look_up(kIq4Words, four_words(Blocks::Quants::place(from, row, chunk * 4 + t)), s.q[0], s.q[1]);
        s.d = Blocks::field(from, stage, row, chunk, t) * 0x10001u;
    }
};
template <int kThreads, int kRows, int kK>
struct FewWeights<kMXFP4, kThreads, kRows, kK> : FewBlocks<kMXFP4, kThreads, kRows, kK, u8> {
    using Blocks = FewBlocks<kMXFP4, kThreads, kRows, kK, u8>;
    using Blocks::Blocks;
    TP_MEMBER void take(FewStrip<kMXFP4>& s, const char* from, u32 stage, int row, int chunk, int t, u32) const {
        look_up(kFp4Words, four_words(Blocks::Quants::place(from, row, chunk * 4 + t)), s.q[0], s.q[1]);
        s.d = half_pair(tp_e8m0_half(Blocks::field(from, stage, row, chunk, t)));
    }
};
template <int kThreads, int kRows, int kK>
struct FewWeights<kQ4_1, kThreads, kRows, kK> : FewBlocks<kQ4_1, kThreads, kRows, kK, u32> {
    using Blocks = FewBlocks<kQ4_1, kThreads, kRows, kK, u32>;
    using Blocks::Blocks;
    TP_MEMBER void take(FewStrip<kQ4_1>& s, const char* from, u32 stage, int row, int chunk, int t, u32) const {
        s.q = four_words(Blocks::Quants::place(from, row, chunk * 4 + t));
        s.dm = Blocks::field(from, stage, row, chunk, t);
    }
};
/// With fifth bits, and a field more: a scale, or that and a minimum.
template <int kType, class T, int kThreads, int kRows, int kK>
struct FewFifths : FewBlocks<kType, kThreads, kRows, kK, u32> {
    using Blocks = FewBlocks<kType, kThreads, kRows, kK, u32>;
    FewField<T, kThreads, kRows> scales;
    TP_MEMBER FewFifths(const Matrix& w, i64 matrix, i64 row0, int thread) : Blocks(w, matrix, row0, thread), scales(w, 2, matrix, row0, thread) {}
    TP_MEMBER void bring(TpSharedAt at, u32 stage, int thread) const {
        Blocks::bring(at, stage, thread);
        scales.bring(at + (u32)Blocks::kEnd, stage * (u32)kK / 256, thread);
    }
    TP_MEMBER void take(FewStrip<kType>& s, const char* from, u32 stage, int row, int chunk, int t, u32) const {
        s.q = four_words(Blocks::Quants::place(from, row, chunk * 4 + t));
        s.tops = Blocks::field(from, stage, row, chunk, t);
        const u32 scale = Blocks::template field<T>(from + Blocks::kEnd, stage, row, chunk, t);
        s.d = tp_half_twice(scale, 0), s.m = sizeof(T) == 4 ? tp_half_twice(scale, 1) : 0x80008000u;
    }
};
template <int kThreads, int kRows, int kK>
struct FewWeights<kQ5_0, kThreads, kRows, kK> : FewFifths<kQ5_0, u16, kThreads, kRows, kK> {
    using FewFifths<kQ5_0, u16, kThreads, kRows, kK>::FewFifths;
};
template <int kThreads, int kRows, int kK>
struct FewWeights<kQ5_1, kThreads, kRows, kK> : FewFifths<kQ5_1, u32, kThreads, kRows, kK> {
    using FewFifths<kQ5_1, u32, kThreads, kRows, kK>::FewFifths;
};
template <int kThreads, int kRows, int kK>
struct FewWeights<kIQ4_XS, kThreads, kRows, kK> {
    using Quants = FewPlane<kThreads, kRows, kK / 32, 16, kK == 256 ? kByHalves : kStraight>;
    using Words = FewPlane<kThreads, kRows, 2, 4>;  // iq4_xs_scale's
    static constexpr int kWordsAt = kRows * Quants::kRowBytes;
    Quants quants;
    Words words;
    TP_MEMBER FewWeights(const Matrix& w, i64 matrix, i64 row0, int thread) : quants(w, 0, matrix, row0, thread), words(w, 1, matrix, row0, thread) {}
    TP_MEMBER void bring(TpSharedAt at, u32 stage, int) const {
        quants.bring(at, (i64)stage * Quants::kRowBytes, true);
        words.bring(at + (u32)kWordsAt, (i64)(stage * (u32)kK / 256) * 8, true);
    }
    TP_MEMBER void take(FewStrip<kIQ4_XS>& s, const char* from, u32 stage, int row, int chunk, int t, u32) const {
        look_up(kIq4Words, four_words(Quants::place(from, row, chunk * 4 + t)), s.q[0], s.q[1]);
        s.d = half_pair(iq4_xs_scale((const u32*)(from + kWordsAt + row * 8), (kK == 256 ? chunk : (int)(stage % 2)) * 4 + t));
    }
};
/// Of 256 weights with 6-bit scales and mins: nibbles, then d and dmin and those in 12 bytes.
template <int kType, int kThreads, int kRows, int kK>
struct FewSixBits {
    using Quants = FewPlane<kThreads, kRows, kK / 32, 16, kK == 256 ? kByHalves : kStraight>;
    using Headers = FewPlane<kThreads, kRows, 1, 16>;
    static constexpr int kHeadersAt = kRows * Quants::kRowBytes;
    Quants quants;
    Headers headers;
    TP_MEMBER FewSixBits(const Matrix& w, i64 matrix, i64 row0, int thread)
        : quants(w, 0, matrix, row0, thread), headers(w, kType == kQ5_K ? 2 : 1, matrix, row0, thread) {}
    TP_MEMBER void bring(TpSharedAt at, u32 stage, int) const {
        quants.bring(at, (i64)stage * Quants::kRowBytes, true);
        headers.bring(at + (u32)kHeadersAt, (i64)(stage * (u32)kK / 256) * 16, true);
    }
    TP_MEMBER void take(FewStrip<kType>& s, const char* from, u32 stage, int row, int chunk, int t, u32 magic) const {
        s.q = four_words(Quants::place(from, row, chunk * 4 + t));
        const TpInt4 v = four_words(from + kHeadersAt + row * 16);  // as in six_bits of vec_piece.h; which half of the 256 it is, is a warp's
        const int shift = t / 2 * 16;
        const u32 low = (u32)v.y >> shift, mins = (u32)v.z >> shift, more = (u32)v.w >> shift;
        const bool second = (kK == 256 ? chunk : (int)(stage % 2)) != 0;
        const u32 scale6 = second ? (more & 0x0f0fu) | (low >> 2 & 0x3030u) : low & 0x3f3fu,
                  min6 = second ? (more >> 4 & 0x0f0fu) | (mins >> 2 & 0x3030u) : mins & 0x3f3fu;
        const u32 d = tp_half_twice((u32)v.x, 0), m = tp_half_twice((u32)v.x, 1) ^ 0x80008000u;
        s.scales = half2_mul(tp_half2_fma(tp_byte_perm(scale6, magic, 0x4140), kHalfOne, 0xe400e400u), d);
        s.mins = half2_mul(tp_half2_fma(tp_byte_perm(min6, magic, 0x4140), kHalfOne, 0xe400e400u), m);
    }
};
template <int kThreads, int kRows, int kK>
struct FewWeights<kQ4_K, kThreads, kRows, kK> : FewSixBits<kQ4_K, kThreads, kRows, kK> {
    using FewSixBits<kQ4_K, kThreads, kRows, kK>::FewSixBits;
};
template <int kThreads, int kRows, int kK>
struct FewWeights<kQ5_K, kThreads, kRows, kK> : FewSixBits<kQ5_K, kThreads, kRows, kK> {
    using SixBits = FewSixBits<kQ5_K, kThreads, kRows, kK>;
    using Tops = FewPlane<kThreads, kRows, 2, 16>;  // of byte i bit j is element i's of sub-block j of the 256
    static constexpr int kTopsAt = SixBits::kHeadersAt + kRows * 16;
    Tops tops;
    TP_MEMBER FewWeights(const Matrix& w, i64 matrix, i64 row0, int thread) : SixBits(w, matrix, row0, thread), tops(w, 1, matrix, row0, thread) {}
    TP_MEMBER void bring(TpSharedAt at, u32 stage, int thread) const {
        SixBits::bring(at, stage, thread);
        tops.bring(at + (u32)kTopsAt, (i64)(stage * (u32)kK / 256) * 32, true);
    }
    TP_MEMBER void take(FewStrip<kQ5_K>& s, const char* from, u32 stage, int row, int chunk, int t, u32 magic) const {
        SixBits::take(s, from, stage, row, chunk, t, magic);
        s.top = four_words(Tops::place(from + kTopsAt, row, t % 2));
        s.shift = (kK == 256 ? chunk : (int)(stage % 2)) * 4 + t / 2 * 2;
    }
};
/// A half of each 256 weights of a row; a thread brings one row's.
template <int kThreads, int kRows>
struct FewHalf {
    const char* first;  // row's
    u32 stride;
    int n_rows;
    TP_MEMBER FewHalf(const Matrix& w, int f, i64 matrix, i64 row0)
        : first(w.plane[f] + matrix * w.nb2 + row0 * w.row_stride), stride((u32)w.row_stride), n_rows(w.n - row0 < kRows ? (int)(w.n - row0) : kRows) {
        static_assert(kRows <= kThreads);
    }
    TP_MEMBER void bring(TpSharedAt at, u32 block, int thread) const {
        if (kRows < kThreads && thread >= kRows) return;
        // Copies are of aligned words: of that around these two bytes what lies before them comes too, nothing behind them.
        const char* p = first + (i64)thread * stride + block * 2;
        const int odd = (int)((u64)p & 2);
        tp_copy_async_four(at + (u32)(thread * 4), p - odd, thread < n_rows ? 2 + odd : 0);
    }
    TP_MEMBER u32 twice(const char* from, u32 block, int row) const {
        return *(const u16*)(from + row * 4 + (((u32)(u64)first + (u32)row * stride + block * 2) & 2)) * 0x10001u;
    }
};
template <int kThreads, int kRows, int kK>
struct FewWeights<kQ6_K, kThreads, kRows, kK> {
    using Low = FewPlane<kThreads, kRows, kK / 32, 16, kK == 256 ? kByHalves : kStraight>;
    using Top = FewPlane<kThreads, kRows, kK / 64, 16>;
    using Scales = FewPlane<kThreads, kRows, 1, 16>;
    static constexpr int kTopAt = kRows * Low::kRowBytes, kScalesAt = kTopAt + kRows * Top::kRowBytes, kDAt = kScalesAt + kRows * 16;
    Low low;
    Top top;
    Scales scales;
    FewHalf<kThreads, kRows> d;
    TP_MEMBER FewWeights(const Matrix& w, i64 matrix, i64 row0, int thread)
        : low(w, 0, matrix, row0, thread), top(w, 1, matrix, row0, thread), scales(w, 2, matrix, row0, thread), d(w, 3, matrix, row0) {}
    TP_MEMBER void bring(TpSharedAt at, u32 stage, int thread) const {
        const u32 block = stage * (u32)kK / 256;
        low.bring(at, (i64)stage * Low::kRowBytes, true);
        top.bring(at + (u32)kTopAt, (i64)stage * Top::kRowBytes, true);
        scales.bring(at + (u32)kScalesAt, (i64)block * 16, true);
        d.bring(at + (u32)kDAt, block, thread);
    }
    TP_MEMBER void take(FewStrip<kQ6_K>& s, const char* from, u32 stage, int row, int chunk, int t, u32 magic) const {
        for (int r = 0; r < 2; ++r) {
            s.q[r] = four_words(Low::place(from, row, chunk * 4 + t % 2 * 2 + r));
            s.top[r] = four_words(Top::place(from + kTopAt, row, chunk * 2 + r));
        }
        const int of_256 = (kK == 256 ? chunk : (int)(stage % 2)) * 2 + t / 2;
        const u32 two = *(const u16*)(from + kScalesAt + row * 16 + (of_256 * 2 + t % 2) * 2) ^ 0x8080u;  // signed to offset 128
        s.scales = half2_mul(tp_half2_fma(tp_byte_perm(two, magic, 0x4140), kHalfOne, 0xe480e480u), d.twice(from + kDAt, stage * (u32)kK / 256, row));
        s.nibble = t / 2 * 4, s.shift = (t % 2 + t / 2 * 2) * 2;
    }
};
/// Of 256 weights in 2 bits: 128 share 32 bytes. A lane's scales are two bytes apart.
template <int kThreads, int kRows, int kK>
struct FewWeights<kQ2_K, kThreads, kRows, kK> {
    using Low = FewPlane<kThreads, kRows, kK / 64, 16>;
    using Scales = FewPlane<kThreads, kRows, 1, 16>;
    using Dm = FewPlane<kThreads, kRows, 1, 4>;
    static constexpr int kScalesAt = kRows * Low::kRowBytes, kDmAt = kScalesAt + kRows * 16;
    Low low;
    Scales scales;
    Dm dm;
    TP_MEMBER FewWeights(const Matrix& w, i64 matrix, i64 row0, int thread)
        : low(w, 0, matrix, row0, thread), scales(w, 1, matrix, row0, thread), dm(w, 2, matrix, row0, thread) {}
    TP_MEMBER void bring(TpSharedAt at, u32 stage, int) const {
        const u32 block = stage * (u32)kK / 256;
        low.bring(at, (i64)stage * Low::kRowBytes, true);
        scales.bring(at + (u32)kScalesAt, (i64)block * 16, true);
        dm.bring(at + (u32)kDmAt, (i64)block * 4, true);
    }
    TP_MEMBER void take(FewStrip<kQ2_K>& s, const char* from, u32 stage, int row, int chunk, int t, u32 magic) const {
        s.q = four_words(Low::place(from, row, chunk * 2 + t % 2));
        const int step = (kK == 256 ? chunk : (int)(stage % 2)) * 2 + t / 2;
        const u32 two = *(const u32*)(from + kScalesAt + row * 16 + step * 4) >> t % 2 * 8, dm_ = *(const u32*)(from + kDmAt + row * 4);
        s.scales = half2_mul(tp_half2_fma(tp_byte_perm(two & 0x000f000fu, magic, 0x4240), kHalfOne, 0xe400e400u), tp_half_twice(dm_, 0));
        s.mins = half2_mul(tp_half2_fma(tp_byte_perm(two >> 4 & 0x000f000fu, magic, 0x4240), kHalfOne, 0xe400e400u), tp_half_twice(dm_, 1) ^ 0x80008000u);
        s.shift = t / 2 * 4;
    }
};
template <int kThreads, int kRows, int kK>
struct FewWeights<kQ3_K, kThreads, kRows, kK> {
    using Low = FewPlane<kThreads, kRows, kK / 64, 16>;
    using Tops = FewPlane<kThreads, kRows, 2, 16>;  // as Q5_K's
    using Words = FewPlane<kThreads, kRows, 4, 4>;  // 12 bytes of scales
    static constexpr int kTopsAt = kRows * Low::kRowBytes, kWordsAt = kTopsAt + kRows * 32, kDAt = kWordsAt + kRows * 16;
    Low low;
    Tops tops;
    Words words;
    FewHalf<kThreads, kRows> d;
    TP_MEMBER FewWeights(const Matrix& w, i64 matrix, i64 row0, int thread)
        : low(w, 0, matrix, row0, thread), tops(w, 1, matrix, row0, thread), words(w, 2, matrix, row0, thread), d(w, 3, matrix, row0) {}
    TP_MEMBER void bring(TpSharedAt at, u32 stage, int thread) const {
        const u32 block = stage * (u32)kK / 256;
        low.bring(at, (i64)stage * Low::kRowBytes, true);
        tops.bring(at + (u32)kTopsAt, (i64)block * 32, true);
        if (thread % 4 < 3) words.bring(at + (u32)kWordsAt, (i64)block * 12, true);
        d.bring(at + (u32)kDAt, block, thread);
    }
    TP_MEMBER void take(FewStrip<kQ3_K>& s, const char* from, u32 stage, int row, int chunk, int t, u32 magic) const {
        s.q = four_words(Low::place(from, row, chunk * 2 + t % 2));
        s.top = four_words(Tops::place(from + kTopsAt, row, t % 2));
        const int half = kK == 256 ? chunk : (int)(stage % 2), quarter = half * 2 + t / 2, byte = t % 2 * 8;
        const u32* const scales = (const u32*)(from + kWordsAt + row * 16);
        const u32 six = (scales[t / 2] >> byte >> half * 4 & 0x000f000fu) | (scales[2] >> byte >> quarter * 2 & 0x00030003u) << 4;
        s.scales = half2_mul(tp_half2_fma(tp_byte_perm(six, magic, 0x4240), kHalfOne, 0xe420e420u), d.twice(from + kDAt, stage * (u32)kK / 256, row));
        s.shift = t / 2 * 4, s.top_shift = quarter * 2;
    }
};
template <int kType, int kThreads, int kRows, int kK>
struct FewHalves {
    using Plane = FewPlane<kThreads, kRows, kK / 8, 16, kByFours>;
    Plane plane;
    i64 k;
    TP_MEMBER FewHalves(const Matrix& w, i64 matrix, i64 row0, int thread) : plane(w, 0, matrix, row0, thread), k(w.k) {}
    TP_MEMBER void bring(TpSharedAt at, u32 stage, int thread) const {
        plane.bring(at, (i64)stage * Plane::kRowBytes, (i64)stage * kK + thread % (kK / 8) * 8 < k);
    }
    TP_MEMBER void take(FewStrip<kType>& s, const char* from, u32, int row, int chunk, int t, u32) const {
        for (int i = 0; i < 4; ++i) s.q[i] = four_words(Plane::place(from, row, chunk * 16 + t * 4 + i));
    }
};
template <int kThreads, int kRows, int kK>
struct FewWeights<kF16, kThreads, kRows, kK> : FewHalves<kF16, kThreads, kRows, kK> {
    using FewHalves<kF16, kThreads, kRows, kK>::FewHalves;
};
template <int kThreads, int kRows, int kK>
struct FewWeights<kBF16, kThreads, kRows, kK> : FewHalves<kBF16, kThreads, kRows, kK> {
    using FewHalves<kBF16, kThreads, kRows, kK>::FewHalves;
};

/// x in the ring: 128 bytes a column and step of 64 of k; every other step's lie so that the lanes of a quarter warp meet no bank twice (strips take
/// their x 32 or 16 halves apart). Beyond k all is zero.
template <int kType, int kColumns, int kThreads, int kChunks>
struct FewX {
    static constexpr int kUnits = kColumns * 8, kApart = kColumns * 128 + (Strip<kType>::kCrossed ? 64 : 32), kChunkBytes = few_chunk_bytes(kColumns);
    static constexpr int kAll = 2 * kChunks * kUnits, kTimes = kAll < kThreads ? 1 : kAll / kThreads;
    static_assert(kUnits % kThreads == 0 || kThreads % (2 * kUnits) == 0);
    const char* from;
    int first;  // of this thread's steps in a stage
    u32 at, step_bytes;
    TP_MEMBER FewX(const char* xh, u32 step_bytes, int thread)
        : from(xh + (u32)(thread / kUnits) * step_bytes + thread % kUnits * 16),
          first(thread / kUnits),
          at((u32)(thread / kUnits / 2 * kChunkBytes + thread / kUnits % 2 * kApart + thread % kUnits * 16)),
          step_bytes(step_bytes) {}
    TP_MEMBER void bring(TpSharedAt to, u32 stage, u32 steps) const {
        if (kAll < kThreads && first >= 2 * kChunks) return;
        const char* p = from + (i64)(stage * 2 * kChunks) * step_bytes;
        const TpSharedAt place = to + at;
#pragma unroll
        for (int j = 0; j < kTimes; ++j) {
            const int step = j * kThreads / kUnits, rest = j * kThreads % kUnits * 16;
            tp_copy_async_or_zero(place + (u32)(step / 2 * kChunkBytes + step % 2 * kApart + rest), p + (u32)step * step_bytes + rest,
                                  stage * 2 * kChunks + (u32)(first + step) < steps);
        }
    }
};

/// Stages [first, end) of the rows from row0 on of a matrix, times columns that lie in panels, step_bytes between steps of 64. store(row, column, y):
/// row of the matrix, column below kColumns. kEarly: x is the work of the kernel before, the weights were not.
template <int kType, int kColumns, int kRows, bool kEarly, class Store>
TP_DEVICE void few_product(const Matrix& w, i64 matrix, i64 row0, const char* xh, u32 step_bytes, u32 first, u32 end, u32 n_stages, const Store& store) {
    constexpr FewShape kShape = few_shape(kType, kColumns, kRows);
    constexpr int kThreads = kShape.threads, kK = kShape.k, kChunks = kK / 128, kRowWarps = kRows / 32, kXAt = kRows * kShape.row_bytes;
    using X = FewX<kType, kColumns, kThreads, kChunks>;
    // Loads of a stage wait behind its copies, if those begin first; but strips of more words than these would be spilled meanwhile.
    constexpr bool kTakeFirst = sizeof(FewStrip<kType>) <= 24;
    TP_DYN_SHARED(char, ring);
    const u32 magic = tp_in_register(0x64646464u);
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4, rows = warp % kRowWarps * 32, chunk = warp / kRowWarps;
    const u32 steps = (u32)((w.k + kTileStep - 1) / kTileStep), ahead = n_stages - 1;
    const FewWeights<kType, kThreads, kRows, kK> weights(w, matrix, row0, thread);
    const X columns(xh, step_bytes, thread);
    const TpSharedAt ring_at(ring);
    for (u32 i = 0; i < ahead && first + i < end; ++i) weights.bring(ring_at + i * kShape.bytes, first + i, thread);
    if (kEarly) tp_grid_wait();
    for (u32 i = 0; i < ahead; ++i) {
        if (first + i < end) columns.bring(ring_at + (i * kShape.bytes + kXAt), first + i, steps);
        tp_copy_commit();
    }
    float acc[2][kColumns / 8][4] = {};
    u32 slot = 0, behind = ahead * kShape.bytes;  // behind: where the stage before was, which all warps have multiplied
    for (u32 stage = first; stage < end; ++stage) {
        if (ahead == 1) tp_copy_wait_but<0>();
        else if (ahead == 2) tp_copy_wait_but<1>();
        else tp_copy_wait_but<2>();
        __syncthreads();
        const char* from = ring + slot;
        const auto bring = [&] {
            if (stage + ahead < end) {
                weights.bring(ring_at + behind, stage + ahead, thread);
                columns.bring(ring_at + (behind + kXAt), stage + ahead, steps);
            }
            tp_copy_commit();
        };
        FewStrip<kType> strip[4];
        if (!kTakeFirst) bring();
#pragma unroll
        for (int r = 0; r < 4; ++r) weights.take(strip[r], from, stage, rows + r * 8 + g, chunk, t, magic);
        if (kTakeFirst) bring();
        behind = slot;
        slot = slot == ahead * kShape.bytes ? 0 : slot + kShape.bytes;
        const char* x = from + kXAt + chunk * X::kChunkBytes + t / 2 * X::kApart + g * 128;
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                u32 halves[4][4];
#pragma unroll
                for (int row = 0; row < 4; ++row) strip[row].run(magic, r, i, halves[row]);
                const int unit = (Strip<kType>::place(t % 2, r) / 8 + i) ^ g;
#pragma unroll
                for (int n = 0; n < kColumns / 8; ++n) {
                    const TpInt4 v = four_words(x + n * 1024 + unit * 16);
                    const u32 b[2][2] = {{(u32)v.x, (u32)v.y}, {(u32)v.z, (u32)v.w}};
#pragma unroll
                    for (int m = 0; m < 2; ++m)
#pragma unroll
                        for (int h = 0; h < 2; ++h) {
                            const u32 fragment[4] = {halves[2 * m][2 * h], halves[2 * m + 1][2 * h], halves[2 * m][2 * h + 1], halves[2 * m + 1][2 * h + 1]};
                            if constexpr (kType == kBF16) tp_mma_bf16(acc[m][n], fragment, b[h]);
                            else tp_mma_f16(acc[m][n], fragment, b[h]);
                        }
                }
            }
    }
    if constexpr (kChunks > 1) {  // the warps of a stage's second half leave their sums to those of the first
        static_assert(kChunks == 2);
        float* const sums = (float*)ring + rows * kColumns + lane;
        tp_copy_wait();
        __syncthreads();  // the ring is free
        if (chunk) {
#pragma unroll
            for (int i = 0; i < kColumns; ++i) sums[i * 32] = acc[i / (kColumns / 2)][i / 4 % (kColumns / 8)][i % 4];
        }
        __syncthreads();
        if (chunk) return;
#pragma unroll
        for (int i = 0; i < kColumns; ++i) acc[i / (kColumns / 2)][i / 4 % (kColumns / 8)][i % 4] += sums[i * 32];
    }
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const i64 row = row0 + rows + m * 16 + g + e / 2 * 8;
                if (row < w.n) store(row, n * 8 + 2 * t + e % 2, acc[m][n][e] * kUnhalved<kType>);
            }
}

template <int kType, int kColumns, int kRows>
TP_DEVICE void mul_few(const MulPiecesArgs& a) {
    constexpr FewShape kShape = few_shape(kType, kColumns, kRows);
    i64 row0, before;
    const MulVecPart& p = few_part(a, blockIdx.x, kShape.rows, row0, before);
    const u32 all = (u32)((a.wide.k + kShape.k - 1) / kShape.k), stages = (u32)(a.chunks * 128 / kShape.k), first = blockIdx.y * stages,
              end = first + stages < all ? first + stages : all;
    if (a.made) tp_grid_wait();
    few_product<kType, kColumns, kRows, true>(p.w, 0, row0, a.wide.xh, kPanelBytes, first, end, (u32)a.n_stages, [&](i64 row, i64 column, float y) {
        if (column >= a.wide.m) return;
        if (a.n_pieces > 1) a.sums[((i64)blockIdx.y * a.wide.m + column) * a.n_rows + before + row] = y;
        else *(float*)(p.y.data + row * p.y.nb[0] + column * p.y.nb[1]) = y;
    });
}

/// A tile of an expert's entries. The grid is for the worst case: blocks without a tile leave.
template <int kType, int kColumns>
TP_DEVICE void mul_few_entries(const MulTileIdArgs& a) {
    constexpr FewShape kShape = few_shape(kType, kColumns, kFewExpertRows);
    if ((i32)blockIdx.y >= *a.n_tiles) return;
    const ExpertTile& tile = a.tiles[blockIdx.y];
    const TileEntries entries{a, a.entries + tile.first, tile.count, (i64)blockIdx.y};
    const i64 steps = (a.w.k + kTileStep - 1) / kTileStep;
    const u32 step_bytes = (u32)kColumns * 128, all = (u32)((a.w.k + kShape.k - 1) / kShape.k);
    few_product<kType, kColumns, kShape.rows, false>(a.w, tile.expert, (i64)blockIdx.x * kShape.rows, a.xh + entries.panel() * steps * step_bytes, step_bytes,
                                                     0, all, (u32)a.n_stages, [&](i64 row, i64 column, float y) {
                                                         if (entries.has(column)) *(float*)entries.y(row, column) = y;
                                                     });
}

}  // namespace ggml_tp

#define MUL_FEW_OF(name, type, columns, rows)                                                                         \
    TP_KERNEL_EARLY_RESIDENT(mul_few_##name, MulPiecesArgs, ggml_tp::few_shape(ggml_tp::type, columns, rows).threads, \
                             ggml_tp::few_shape(ggml_tp::type, columns, rows).blocks) {                               \
        ggml_tp::mul_few<ggml_tp::type, columns, rows>(args);                                                         \
    }
#define MUL_FEW_ID_OF(name, type, columns)                                                                                            \
    TP_KERNEL_RESIDENT(mul_few_id_##name, MulTileIdArgs, ggml_tp::few_shape(ggml_tp::type, columns, ggml_tp::kFewExpertRows).threads, \
                       ggml_tp::few_shape(ggml_tp::type, columns, ggml_tp::kFewExpertRows).blocks) {                                  \
        ggml_tp::mul_few_entries<ggml_tp::type, columns>(args);                                                                       \
    }
#define MUL_FEW(name, type)                                               \
    MUL_FEW_OF(name##_8, type, 8, ggml_tp::few_rows(ggml_tp::type, 8))    \
    MUL_FEW_OF(name##_16, type, 16, ggml_tp::few_rows(ggml_tp::type, 16)) \
    MUL_FEW_OF(name##_32, type, 32, ggml_tp::few_rows(ggml_tp::type, 32)) \
    MUL_FEW_OF(name##_64, type, 64, ggml_tp::few_rows(ggml_tp::type, 64)) \
    MUL_FEW_ID_OF(name##_8, type, 8)                                      \
    MUL_FEW_ID_OF(name##_16, type, 16)

TP_FEW_TYPES(MUL_FEW)
MUL_FEW_OF(q4_K_16_tall, kQ4_K, ggml_tp::kFewTallColumns, ggml_tp::kFewTallRows)

// The pieces of k, in their order. grid: (rows of all parts / 256, m).
TP_KERNEL(sum_pieces, MulPiecesArgs, 256) {
    using namespace ggml_tp;
    i64 row = (i64)blockIdx.x * 256 + threadIdx.x;
    const i64 column = blockIdx.y;
    if (row >= args.n_rows) return;
    float sum = 0;
#pragma unroll 4
    for (int piece = 0; piece < args.n_pieces; ++piece) sum += args.sums[((i64)piece * args.wide.m + column) * args.n_rows + row];
    int part = 0;
    while (part + 1 < args.wide.n_parts && row >= args.wide.part[part].w.n) row -= args.wide.part[part++].w.n;
    const View& y = args.wide.part[part].y;
    *(float*)(y.data + row * y.nb[0] + column * y.nb[1]) = sum;
}

#endif
