// Launch settings of mul_few.cu.
#pragma once
#include "mul_wgmma.h"
#include "shared_memory.h"

namespace ggml_tp {

constexpr i64 kFewColumns = 64;     // at most; mul_tile and mul_wgmma take more
constexpr i32 kFewLeastChunks = 4;  // of a piece of k: 512

/// Types that it has. X(name, type).
#define TP_FEW_TYPES(X) \
    X(q4_0, kQ4_0)      \
    X(q4_1, kQ4_1)      \
    X(q5_0, kQ5_0)      \
    X(q5_1, kQ5_1)      \
    X(q8_0, kQ8_0)      \
    X(q2_K, kQ2_K)      \
    X(q3_K, kQ3_K)      \
    X(q4_K, kQ4_K)      \
    X(q5_K, kQ5_K)      \
    X(q6_K, kQ6_K)      \
    X(iq4_nl, kIQ4_NL)  \
    X(iq4_xs, kIQ4_XS)  \
    X(mxfp4, kMXFP4)    \
    X(f16, kF16)        \
    X(bf16, kBF16)
constexpr bool few_has(i32 type) {
#define TP_TYPE(name, of) || type == of
    return false TP_FEW_TYPES(TP_TYPE);
#undef TP_TYPE
}

/// Columns that mul_vec takes where it can, and tokens of experts mul_vec_id (docs/decisions.md): what a type's pieces cost it, and what its strips.
struct FewLeast {
    i64 columns, tokens;
};
constexpr FewLeast few_least(i32 type) {
    switch (type) {
        case kIQ4_NL:
        case kIQ4_XS:
        case kMXFP4: return {4, 10};
        case kQ5_0:
        case kQ5_1: return {2, 5};
        case kQ5_K: return {3, 5};
        case kQ4_1:
        case kQ2_K:
        case kQ3_K: return {2, 4};
        case kQ8_0: return {3, 3};
        case kF16:
        case kBF16: return {4, 3};
        default: return {2, 3};
    }
}

constexpr int few_chunk_bytes(int columns) { return 2 * columns * 128 + 64; }  // of x for 128 of k

/// What a block is: `rows` of weights, and of them and of x `k` a stage of its ring, which a warp has 32 rows and 128 of. 11 to 37 KB of weights
/// a stage.
struct FewShape {
    int rows, k, threads;
    int blocks;     // of a multiprocessor, that registers leave room for: the sums of 64 columns are half of what 16 warps have
    int row_bytes;  // of a row's k, with the scales of the 256 that it is part of
    int bytes;      // of a stage
};
/// Of two to six bits a weight: what a stage has of a row is half a line of memory or more with 256 of k.
constexpr bool few_wide(i32 type) { return type != kQ8_0 && type != kF16 && type != kBF16; }
/// Bytes of k of a row's weights, and of the fields of the 256 that those are part of.
constexpr int few_row_bytes(i32 type, int k) {
    switch (type) {
        case kQ8_0: return k + 16;
        case kQ4_1: return k / 2 + 32;
        case kQ5_0: return k / 2 + 32 + 16;
        case kQ5_1: return k / 2 + 32 + 32;
        case kQ2_K: return k / 4 + 16 + 4;
        case kQ3_K: return k / 4 + 32 + 16 + 4;
        case kQ5_K: return k / 2 + 32 + 16;
        case kQ6_K: return k / 2 + k / 4 + 16 + 4;
        case kIQ4_XS:
        case kMXFP4: return k / 2 + 8;
        case kF16:
        case kBF16: return k * 2;
        default: return k / 2 + 16;
    }
}
constexpr FewShape few_shape(i32 type, int columns, int rows) {
    FewShape s{rows, few_wide(type) && columns < 64 ? 256 : 128, 0, 0, 0, 0};
    s.threads = s.rows * s.k / 128;
    s.blocks = (columns < 64 ? 512 : 256) / s.threads;
    s.row_bytes = few_row_bytes(type, s.k);
    s.bytes = s.rows * s.row_bytes + s.k / 128 * few_chunk_bytes(columns);
    return s;
}
/// Rows of a block: of 64 columns twice the rows, as every block reads all of x.
constexpr int few_rows(i32 type, int columns) { return columns == 64 && few_wide(type) ? 256 : 128; }
/// And of 16 columns of Q4_K, where so few blocks keep the device busy: 28,672 rows take 38.8 us, with 128 rows 43 (8 columns 34.2 and 33.8, 32
/// columns 55 and 52.5; ncu, one H100). Q4_0, which has fewer instructions for each of its bytes, loses: 16 sequences of 8B 4,420, 4,470 -> 4,260.
constexpr int kFewTallRows = 256, kFewTallColumns = 16;
constexpr int few_columns(i64 m) { return m <= 8 ? 8 : m <= 16 ? 16 : m <= 32 ? 32 : 64; }

/// Blocks of a multiprocessor, and stages of each one's ring: what its shared memory holds of few_shape's blocks, at most four stages.
struct FewRing {
    int blocks, stages;
};
constexpr FewRing few_ring(const FewShape& shape, Arch arch) {
    const int kb = shared_kb(arch.cc);
    FewRing ring{shape.blocks, 0};
    for (;; --ring.blocks) {
        ring.stages = (kb / ring.blocks - 1) * 1024 / shape.bytes;  // each block takes 1 KB more
        if (ring.stages >= 2 || ring.blocks == 1) break;
    }
    if (ring.stages > 4) ring.stages = 4;
    return ring;
}

constexpr bool few_fits(i32 type) {
    for (int columns = 8; columns <= kFewColumns; columns *= 2)
        if (few_ring(few_shape(type, columns, few_rows(type, columns)), {860, 1}).stages < 2) return false;
    return true;
}
constexpr bool few_has_tall(i32 type) { return type == kQ4_K; }
static_assert(few_ring(few_shape(kQ4_K, kFewTallColumns, kFewTallRows), {860, 1}).stages >= 2);
#define TP_FITS(name, type) &&few_fits(type)
static_assert(true TP_FEW_TYPES(TP_FITS), "99 KB hold two stages of each");
#undef TP_FITS

/// Whether a product is the kind that mul_few computes: mul_tile's kind, of few columns.
inline bool mul_few_can(const MulMatArgs& a, Arch arch) { return few_has(a.w.type) && a.x.ne[1] <= kFewColumns && mul_tile_can(a, arch); }

/// The most pieces of k that a product is divided in.
inline i64 few_most_pieces(const MulPiecesArgs& a) { return piece_chunks(a.wide.k) / kFewLeastChunks; }
inline bool few_tall(const MulPiecesArgs& a, Arch arch) {
    const i64 pieces = few_most_pieces(a);
    return few_columns(a.wide.m) == kFewTallColumns && few_has_tall(a.wide.part[0].w.type) &&
           row_tiles(a.wide, kFewTallRows) * (pieces > 1 ? pieces : 1) * 4 >= (i64)arch.n_sm * 3;
}
inline FewShape few_shape(const MulPiecesArgs& a, Arch arch) {
    const i32 type = a.wide.part[0].w.type;
    const int columns = few_columns(a.wide.m);
    return few_shape(type, columns, few_tall(a, arch) ? kFewTallRows : few_rows(type, columns));
}
/// Divides k where the rows alone leave multiprocessors idle. The division depends on shapes and device alone, so results repeat.
inline void few_divide(MulPiecesArgs& a, Arch arch) {
    const FewShape shape = few_shape(a, arch);
    const FewRing ring = few_ring(shape, arch);
    const i64 blocks = row_tiles(a.wide, shape.rows), most = few_most_pieces(a);
    const i64 pieces = blocks > 0 ? (i64)arch.n_sm * ring.blocks / blocks : 1;
    divide_pieces(a, pieces > most ? most : pieces, shape.k / 128);
    a.n_stages = ring.stages;
}
/// Bytes of `sums`, whatever else is joined to a product of m columns.
inline i64 few_sums_bytes(const MulPiecesArgs& a, Arch arch) {
    const i32 type = a.wide.part[0].w.type;
    const int columns = few_columns(a.wide.m), rows = few_rows(type, columns);
    i64 most = (i64)few_ring(few_shape(type, columns, rows), arch).blocks * rows;
    if (few_has_tall(type) && columns == kFewTallColumns) {  // what is joined may make it so
        const i64 tall = (i64)few_ring(few_shape(type, columns, kFewTallRows), arch).blocks * kFewTallRows;
        if (tall > most) most = tall;
    }
    return (i64)arch.n_sm * most * a.wide.m * 4;
}

inline Launch mul_few_launch(const MulPiecesArgs& a, Arch arch) {
    struct Row {
        i32 type;
        const char* kernel[4];
    };
#define TP_ROW(name, type) {type, {"mul_few_" #name "_8", "mul_few_" #name "_16", "mul_few_" #name "_32", "mul_few_" #name "_64"}},
    static constexpr Row kRows[] = {TP_FEW_TYPES(TP_ROW)};
#undef TP_ROW
    Launch out;
    const FewShape shape = few_shape(a, arch);
    const int columns = few_columns(a.wide.m), at = columns == 8 ? 0 : columns == 16 ? 1 : columns == 32 ? 2 : 3;
    for (const Row& row : kRows)
        if (row.type == a.wide.part[0].w.type) out.kernel = few_tall(a, arch) ? "mul_few_q4_K_16_tall" : row.kernel[at];
    const i64 blocks = row_tiles(a.wide, shape.rows);
    if (blocks > 0x7fffffff || a.n_pieces > 65535) return {};
    out.grid[0] = (u32)blocks;
    out.grid[1] = (u32)a.n_pieces;
    out.block[0] = (u32)shape.threads;
    out.shared_bytes = (u32)(a.n_stages * shape.bytes);
    return out;
}

/// The most entries of an expert, on average, for which tiles of `columns` entries are taken (docs/decisions.md).
struct FewEntries {
    int columns;
    i64 most;
};
constexpr FewEntries kFewEntries[] = {{8, 4}, {16, 8}};
constexpr int kFewExpertRows = 128;
inline int few_entries(const MulIdArgs& a) {
    for (const FewEntries& e : kFewEntries)
        if (a.y.ne[1] * a.y.ne[2] <= e.most * a.w.ne2) return e.columns;
    return 0;
}
inline bool mul_few_id_can(const MulIdArgs& a, Arch arch) { return few_has(a.w.type) && mul_tile_id_can(a, arch) && few_entries(a); }

inline Launch mul_few_id_launch(MulTileIdArgs& a, int columns, Arch arch) {
    struct Row {
        i32 type;
        const char* kernel[2];
    };
#define TP_ROW(name, type) {type, {"mul_few_id_" #name "_8", "mul_few_id_" #name "_16"}},
    static constexpr Row kRows[] = {TP_FEW_TYPES(TP_ROW)};
#undef TP_ROW
    Launch out;
    const FewShape shape = few_shape(a.w.type, columns, kFewExpertRows);
    for (const Row& row : kRows)
        if (row.type == a.w.type) out.kernel = row.kernel[columns == 8 ? 0 : 1];
    a.n_stages = few_ring(shape, arch).stages;
    out.grid[0] = (u32)((a.w.n + shape.rows - 1) / shape.rows);
    out.grid[1] = (u32)most_tiles(a.y.ne[1] * a.y.ne[2], a.w.ne2, columns);
    out.block[0] = (u32)shape.threads;
    out.shared_bytes = (u32)(a.n_stages * shape.bytes);
    return out;
}

}  // namespace ggml_tp
