// Launch settings of halve_weights.cu.
#pragma once
#include "mul_tile.h"

namespace ggml_tp {

// Halves that are made and multiplied at a time: they stay in the L2 of the GPUs that have tensor cores worth the trouble.
constexpr i64 kHalvedBytes = 32 << 20;

/// Rows of w that are halved at a time: whole tiles of the largest kind.
inline i64 halved_rows(const Matrix& w) {
    const i64 fit = w.k > 0 ? kHalvedBytes / (w.k * 2) / 128 * 128 : 0, most = 65535 / 128 * 128, rows = fit < 128 ? 128 : fit < most ? fit : most;
    return rows < w.n ? rows : w.n;
}

/// The product with w as halves [rows, k] at `halves`: mul_tile's own conditions.
inline MulMatArgs halved(const MulMatArgs& a, const char* halves, i64 row_begin, i64 rows) {
    MulMatArgs out = a;
    out.w = Matrix{};
    out.w.plane[0] = halves;
    out.w.row_stride[0] = a.w.k * 2;
    out.w.nb2[0] = out.w.nb3[0] = rows * a.w.k * 2;
    out.w.block_stride[0] = 2;
    out.w.k = a.w.k;
    out.w.n = rows;
    out.w.ne2 = a.w.ne2;
    out.w.ne3 = a.w.ne3;
    out.w.type = kF16;
    out.w.repacked = 1;
    out.y.data += row_begin * a.y.nb[0];
    out.y.ne[0] = rows;
    return out;
}

/// Quantised weights of one matrix, enough columns.
inline bool halve_weights_can(const MulMatArgs& a, Arch arch) {
    const WeightFormat* format = find_weight_format(a.w.type);
    return format && format->block_elems > 1 && a.x.ne[1] > 16 && a.w.ne2 * a.w.ne3 == 1 && mul_tile_can(halved(a, nullptr, 0, a.w.n), arch);
}

inline Launch halve_weights_launch(const HalveWeightsArgs& a, Arch) {
    Launch out;
    if (a.w.k % 8 || a.rows > 65535 || a.rows <= 0) return out;
    out.kernel = "halve_weights";
    out.grid[0] = (u32)((a.w.k / 8 + 255) / 256);
    out.grid[1] = (u32)a.rows;
    out.block[0] = 256;
    return out;
}

}  // namespace ggml_tp
