// Launch settings of halve_weights.cu.
#pragma once
#include "mul_tile_id.h"

namespace ggml_tp {

// Halves that are made and multiplied at a time: they stay in the L2 of the GPUs that have tensor cores worth the trouble. Of experts, of
// which all have to be there, 64 rows may be more.
constexpr i64 kHalvedBytes = 32 << 20, kHalvedExpertsBytes = 128 << 20;

/// Rows of each matrix of w that are halved at a time: whole tiles, of the largest kind where that fits.
inline i64 halved_rows(const Matrix& w) {
    const i64 row = w.k * 2 * w.ne2 * w.ne3, fit = row > 0 ? kHalvedBytes / row / 128 * 128 : 0, most = 65535 / 128 * 128;  // a grid's blocks
    const i64 rows = fit >= 128 ? fit : w.ne2 * w.ne3 == 1 ? 128 : 64;
    return rows > w.n ? w.n : rows > most ? most : rows;
}

/// Rows of w as halves [rows, k] of each matrix at `halves`: mul_tile's own conditions.
inline Matrix halved(const Matrix& w, const char* halves, i64 rows) {
    Matrix out{};
    out.plane[0] = halves;
    out.row_stride = w.k * 2;
    out.nb2 = rows * w.k * 2;
    out.nb3 = out.nb2 * w.ne2;
    out.block_stride[0] = 2;
    out.k = w.k;
    out.n = rows;
    out.ne2 = w.ne2;
    out.ne3 = w.ne3;
    out.type = kF16;
    out.repacked = 1;
    return out;
}

/// y's columns of those rows.
inline View of_rows(View y, i64 row_begin, i64 rows) {
    y.data += row_begin * y.nb[0];
    y.ne[0] = rows;
    return y;
}

/// Quantised weights of one matrix, enough columns.
inline bool halve_weights_can(const MulMatArgs& a, Arch arch) {
    const WeightFormat* format = find_weight_format(a.w.type);
    MulMatArgs tile = a;
    tile.w = halved(a.w, nullptr, a.w.n);
    return format && format->block_elems > 1 && a.x.ne[1] > 16 && a.w.ne2 * a.w.ne3 == 1 && mul_tile_can(tile, arch);
}

/// Quantised experts, and enough for them to do that each is worth expanding: else every slot reads its expert's weights for itself.
inline bool halve_experts_can(const MulIdArgs& a, Arch arch) {
    const WeightFormat* format = find_weight_format(a.w.type);
    MulIdArgs tile = a;
    tile.w = halved(a.w, nullptr, a.w.n);
    return format && format->block_elems > 1 && a.y.ne[1] * a.y.ne[2] > 2 * a.w.ne2 && 64 * a.w.k * 2 * a.w.ne2 <= kHalvedExpertsBytes &&
           mul_tile_id_can(tile, arch);
}

inline Launch halve_weights_launch(const HalveWeightsArgs& a, Arch) {
    Launch out;
    const i64 matrices = a.w.ne2 * a.w.ne3;
    if (a.w.k % 8 || a.rows > 65535 || a.rows <= 0 || matrices > 65535) return out;
    out.kernel = "halve_weights";
    out.grid[0] = (u32)((a.w.k / 8 + 255) / 256);
    out.grid[1] = (u32)a.rows;
    out.grid[2] = (u32)matrices;
    out.block[0] = 256;
    return out;
}

}  // namespace ggml_tp
