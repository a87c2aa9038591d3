// Launch settings of mul_vec.cu.
#pragma once
#include "mul_tile.h"

namespace ggml_tp {

constexpr int kVecWarps = 4;                               // of a block, sharing the k axis
constexpr int kVecMaxColumns = 16;                         // in groups of 8; above, the tiles of mul_tile win
constexpr i64 kVecAllColumns = 65535 * 8;                  // where there is nothing above: what a grid can be
constexpr i64 kVecFloatRows = 512, kVecFloatColumns = 64;  // a router: it stays in the L2, and tiles of mul_floats leave most multiprocessors idle
constexpr int kVecMatrices = 3;                            // Q, K and V in one launch

/// Columns that one instance of the kernel computes: the next of 1, 2, 4, 8.
constexpr int mul_vec_columns(i64 m) { return m <= 1 ? 1 : m <= 2 ? 2 : m <= 4 ? 4 : 8; }

/// Whether a product is the kind that mul_vec computes: one repacked matrix, whole 16-byte pieces in each row, few columns, or any number where
/// pieces are all that there is (a group of 8 columns reads the weights again, from the L2 mostly).
inline bool mul_vec_can(const MulMatArgs& a, Arch arch) {
    const WeightFormat* format = find_weight_format(a.w.type);
    const bool plain = format && format->block_elems == 1, blocks = has_pieces(a.w.type);
    const i64 most = a.w.type == kF32 && a.w.n <= kVecFloatRows ? kVecFloatColumns : only_pieces(a.w.type, arch) ? kVecAllColumns : kVecMaxColumns;
    if ((!plain && !blocks) || !a.w.repacked || a.x.ne[1] > most || a.x.ne[2] * a.x.ne[3] != 1 || a.y.type != kF32 || a.x.type != kF32) return false;
    if (plain) return a.w.row_stride % 16 == 0 && a.x.nb[0] == 4 && a.x.nb[1] % 16 == 0 && (u64)a.x.data % 16 == 0 && a.k_begin == 0;
    return true;
}

/// The product as a launch of one matrix; mul_vec_join adds others.
inline MulVecArgs mul_vec_args(const MulMatArgs& a) {
    MulVecArgs v{};
    v.part[0] = {a.w, a.y};
    v.n_parts = 1;
    v.x = a.x;
    v.xq = a.xq;
    v.xd = a.xd;
    v.k = a.w.k;
    return v;
}

/// Puts b's matrices behind a's when both multiply the same activations by weights of one type; false: they stay two launches.
inline bool mul_vec_join(MulVecArgs& a, const MulVecArgs& b) {
    if (a.n_parts + b.n_parts > kVecMatrices || a.x.data != b.x.data || a.xq != b.xq || a.k != b.k || a.x.ne[1] != b.x.ne[1]) return false;
    if (a.part[0].w.type != b.part[0].w.type) return false;
    for (int i = 0; i < b.n_parts; ++i) a.part[a.n_parts++] = b.part[i];
    return true;
}

/// Columns of a block: as many as are read with a row at once; of few rows of floats, a router's, so few that more multiprocessors have a block.
inline int mul_vec_columns(const MulVecArgs& a, i64 row_blocks, Arch arch) {
    const i64 m = a.x.ne[1];
    int columns = mul_vec_columns(m);
    if (a.part[0].w.type != kF32) return columns;
    while (columns > 2 && row_blocks * ((m + columns / 2 - 1) / (columns / 2)) <= arch.n_sm) columns /= 2;
    return columns;
}

inline Launch mul_vec_launch(const MulVecArgs& a, Arch arch) {
    struct Row {
        i32 type;
        const char* kernel[4];
    };
#define TP_ROW(name, type) {type, {"mul_vec_" #name "_1", "mul_vec_" #name "_2", "mul_vec_" #name "_4", "mul_vec_" #name "_8"}},
    static constexpr Row kRows[] = {TP_PIECE_TYPES(TP_ROW) TP_ROW(f32, kF32) TP_ROW(f16, kF16) TP_ROW(bf16, kBF16)};
#undef TP_ROW
    Launch out;
    out.grid[0] = 0;
    for (int i = 0; i < a.n_parts; ++i) out.grid[0] += (u32)((a.part[i].w.n + kVecRows - 1) / kVecRows);
    const int columns = mul_vec_columns(a, out.grid[0], arch);
    for (const Row& row : kRows)
        if (row.type == a.part[0].w.type) out.kernel = row.kernel[columns == 1 ? 0 : columns == 2 ? 1 : columns == 4 ? 2 : 3];
    out.grid[1] = (u32)((a.x.ne[1] + columns - 1) / columns);
    out.block[0] = 32 * kVecWarps;
    return out;
}

}  // namespace ggml_tp
