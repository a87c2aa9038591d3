// Launch settings of mul_wgmma.cu.
#pragma once
#include "mul_tile.h"

namespace ggml_tp {

constexpr int kPanelRows = 64, kPanelBytes = kPanelRows * 128;  // 64 rows of 64 halves along k, swizzled as wgmma reads them
constexpr int kWideRows = 128;                                  // of weights a tile: 64 for each of two warpgroups
constexpr int kWideThreads = 384;                               // a third warpgroup brings the tiles
constexpr i64 kWideColumns = 64;                                // more columns than that; fewer are mul_tile's

constexpr u32 wide_stage_bytes(int columns) { return (u32)(kWideRows + columns) * 128; }
/// Steps of k in shared memory: what 200 KB hold.
constexpr int wide_stages(int columns) { return (int)((200u << 10) / wide_stage_bytes(columns)); }
/// Tiles begin at multiples of 1024.
constexpr u32 wide_shared(int columns) { return 1024u + (u32)wide_stages(columns) * wide_stage_bytes(columns); }

/// Activations as panels: [m / 64][k / 64], whole ones.
constexpr i64 panel_bytes(i64 m, i64 k) { return (m + kPanelRows - 1) / kPanelRows * ((k + kTileStep - 1) / kTileStep) * kPanelBytes; }

/// Whether a product is the kind that mul_wgmma computes: mul_tile's kind, on the one architecture that has wgmma, of many columns.
inline bool mul_wgmma_can(const MulMatArgs& a, Arch arch) { return arch.wgmma && a.x.ne[1] > kWideColumns && mul_tile_can(a, arch); }

inline Launch mul_wgmma_launch(const MulTileArgs& a, Arch arch) {
    struct Row {
        i32 type;
        const char *columns_128, *columns_256;
    };
    static constexpr Row kRows[] = {
        {kQ4_0, "mul_wgmma_q4_0_128", "mul_wgmma_q4_0_256"}, {kQ8_0, "mul_wgmma_q8_0_128", "mul_wgmma_q8_0_256"},
        {kQ4_K, "mul_wgmma_q4_K_128", "mul_wgmma_q4_K_256"}, {kQ6_K, "mul_wgmma_q6_K_128", "mul_wgmma_q6_K_256"},
        {kF16, "mul_wgmma_f16_128", "mul_wgmma_f16_256"},    {kBF16, "mul_wgmma_bf16_128", "mul_wgmma_bf16_256"},
    };
    Launch out;
    auto tiles = [&](i64 columns) { return (a.w.n + kWideRows - 1) / kWideRows * ((a.m + columns - 1) / columns); };
    auto waves = [&](i64 columns) { return arch.n_sm > 0 ? (tiles(columns) + arch.n_sm - 1) / arch.n_sm : tiles(columns); };
    // A wide tile takes about twice the time of a narrow one: it must save half of the rounds.
    const bool wide = waves(256) * 2 <= waves(128);
    const int columns = wide ? 256 : 128;
    for (const Row& row : kRows)
        if (row.type == a.w.type) out.kernel = wide ? row.columns_256 : row.columns_128;
    const i64 y = (a.w.n + kWideRows - 1) / kWideRows;
    if (y > 65535) return {};
    // Tiles of the same weights are neighbours: those are read from memory once, x stays in the L2.
    out.grid[0] = (u32)((a.m + columns - 1) / columns);
    out.grid[1] = (u32)y;
    out.block[0] = kWideThreads;
    out.shared_bytes = wide_shared(columns);
    return out;
}

/// Activations to panels of halves.
inline Launch halve_panels_launch(const QuantizeArgs& a, bool bf16, Arch) {
    const i64 m = a.x.ne[1] * a.x.ne[2] * a.x.ne[3], rows = (m + kPanelRows - 1) / kPanelRows * kPanelRows;
    Launch out;
    if (a.x.type != kF32 || rows > 65535) return out;
    out.kernel = bf16 ? "bf16_panels" : "half_panels";
    out.grid[0] = (u32)((a.k + 8 * 128 - 1) / (8 * 128));
    out.grid[1] = (u32)rows;
    out.block[0] = 128;
    return out;
}

}  // namespace ggml_tp
