// Launch settings of mul_few.cu.
#pragma once
#include "mul_wgmma.h"

namespace ggml_tp {

constexpr int kFewRows = 128, kFewThreads = 128;
constexpr int kFewStages = 4;       // chunks of x in shared memory
constexpr i64 kFewLeast = 6;        // columns that mul_vec takes where it can (docs/decisions.md)
constexpr i64 kFewColumns = 64;     // at most; mul_tile and mul_wgmma take more
constexpr int kFewBlocks = 2;       // of a multiprocessor
constexpr i32 kFewLeastChunks = 4;  // of a piece of k: 512

/// Whether a product is the kind that mul_few computes: mul_tile's kind, of few columns.
inline bool mul_few_can(const MulMatArgs& a, Arch arch) { return a.x.ne[1] <= kFewColumns && mul_tile_can(a, arch); }

inline i64 few_row_blocks(const MulPiecesArgs& a) { return row_tiles(a.wide, kFewRows); }
/// Divides k where the rows alone leave multiprocessors idle. The division depends on shapes and device alone, so results repeat.
inline void few_divide(MulPiecesArgs& a, Arch arch) {
    const i64 blocks = few_row_blocks(a), chunks = piece_chunks(a.wide.k);
    i64 pieces = blocks > 0 ? (i64)arch.n_sm * kFewBlocks / blocks : 1;
    const i64 most = chunks / kFewLeastChunks;
    pieces = pieces > most ? most : pieces;
    divide_pieces(a, pieces);
}
/// Bytes of `sums`, whatever else is joined to a product of m columns.
inline i64 few_sums_bytes(i64 m, Arch arch) { return (i64)arch.n_sm * kFewBlocks * kFewRows * m * 4; }

inline Launch mul_few_launch(const MulPiecesArgs& a, Arch) {
    struct Row {
        i32 type;
        const char* kernel[3];
    };
    static constexpr Row kRows[] = {
        {kQ4_0, {"mul_few_q4_0_16", "mul_few_q4_0_32", "mul_few_q4_0_64"}}, {kQ8_0, {"mul_few_q8_0_16", "mul_few_q8_0_32", "mul_few_q8_0_64"}},
        {kQ4_K, {"mul_few_q4_K_16", "mul_few_q4_K_32", "mul_few_q4_K_64"}}, {kQ6_K, {"mul_few_q6_K_16", "mul_few_q6_K_32", "mul_few_q6_K_64"}},
        {kF16, {"mul_few_f16_16", "mul_few_f16_32", "mul_few_f16_64"}},     {kBF16, {"mul_few_bf16_16", "mul_few_bf16_32", "mul_few_bf16_64"}},
    };
    Launch out;
    const int at = a.wide.m <= 16 ? 0 : a.wide.m <= 32 ? 1 : 2, columns = 16 << at;
    for (const Row& row : kRows)
        if (row.type == a.wide.part[0].w.type) out.kernel = row.kernel[at];
    const i64 blocks = few_row_blocks(a);
    if (blocks > 0x7fffffff || a.n_pieces > 65535) return {};
    out.grid[0] = (u32)blocks;
    out.grid[1] = (u32)a.n_pieces;
    out.block[0] = kFewThreads;
    out.shared_bytes = (u32)(kFewStages * (2 * columns * 128 + 64));
    return out;
}

}  // namespace ggml_tp
