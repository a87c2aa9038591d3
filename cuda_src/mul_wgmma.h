// Launch settings of mul_wgmma.cu.
#pragma once
#include "mul_tile_id.h"

namespace ggml_tp {

constexpr int kWideRows = 128;  // of weights a tile: 64 for each of two warpgroups

/// Warpgroups that bring tiles: a step of 128 columns is multiplied in half the time; with 256 the sums leave no registers for a second one.
constexpr int wide_producers(int columns) { return columns <= 128 ? 2 : 1; }
constexpr int wide_threads(int columns) { return 256 + 128 * wide_producers(columns); }
constexpr u32 wide_stage_bytes(int columns) { return (u32)(kWideRows + columns) * 128; }
/// Steps of k in shared memory: what 200 KB hold.
constexpr int wide_stages(int columns) { return (int)((200u << 10) / wide_stage_bytes(columns)); }
/// Tiles begin at multiples of 1024.
constexpr u32 wide_shared(int columns) { return 1024u + (u32)wide_stages(columns) * wide_stage_bytes(columns); }

/// Activations as panels: [m / 128][k / 64], whole ones.
constexpr u32 panel_columns_bytes(int columns) { return (u32)(columns < kPanelRows ? columns : kPanelRows) * 128u; }
constexpr i64 panel_bytes(i64 m, i64 k) { return (m + kPanelRows - 1) / kPanelRows * ((k + kTileStep - 1) / kTileStep) * kPanelBytes; }

/// Whether a product is the kind that mul_wgmma computes: mul_tile's kind, on the one architecture that has wgmma. It wins from
/// the first column that mul_vec leaves (docs/decisions.md).
inline bool mul_wgmma_can(const MulMatArgs& a, Arch arch) { return arch.wgmma && mul_tile_can(a, arch); }

inline MulWideArgs mul_wide_args(const MulTileArgs& a) {
    MulWideArgs out{};
    out.part[0] = {a.w, a.y};
    out.xh = a.xh;
    out.k = a.k;
    out.m = a.m;
    out.n_parts = 1;
    return out;
}

/// Adds b's products to a's, when both multiply the same activations by weights of one type: tiles of both fill the multiprocessors together.
inline bool mul_wide_join(MulWideArgs& a, const MulWideArgs& b) {
    if (a.n_parts + b.n_parts > 3 || a.xh != b.xh || a.k != b.k || a.m != b.m || a.part[0].w.type != b.part[0].w.type) return false;
    for (int i = 0; i < b.n_parts; ++i) a.part[a.n_parts++] = b.part[i];
    return true;
}

inline Launch mul_wgmma_launch(const MulWideArgs& a, Arch arch) {
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
    i64 row_tiles = 0;
    for (int i = 0; i < a.n_parts; ++i) row_tiles += (a.part[i].w.n + kWideRows - 1) / kWideRows;
    auto waves = [&](i64 columns) {
        const i64 tiles = row_tiles * ((a.m + columns - 1) / columns);
        return arch.n_sm > 0 ? (tiles + arch.n_sm - 1) / arch.n_sm : tiles;
    };
    // A wide tile takes 1.2 (Q6_K) to 1.4 times (Q4_0) as long as a narrow one, whose multiplying warps wait for weights.
    const bool wide = waves(256) * 7 <= waves(128) * 5;
    const int columns = wide ? 256 : 128;
    for (const Row& row : kRows)
        if (row.type == a.part[0].w.type) out.kernel = wide ? row.columns_256 : row.columns_128;
    if (row_tiles > 65535) return {};
    // Tiles of the same weights are neighbours: those are read from memory once, x stays in the L2.
    out.grid[0] = (u32)((a.m + columns - 1) / columns);
    out.grid[1] = (u32)row_tiles;
    out.block[0] = (u32)wide_threads(columns);
    out.shared_bytes = wide_shared(columns);
    return out;
}

/// Bytes of the panels of as many tiles as entries of experts may need.
constexpr i64 tile_panels_bytes(i64 tiles, i64 columns, i64 k) { return tiles * ((k + kTileStep - 1) / kTileStep) * columns * 128; }

inline Launch mul_wgmma_id_launch(const MulTileIdArgs& a, i32 columns, Arch) {
    struct Row {
        i32 type;
        const char *columns_64, *columns_128;
    };
    static constexpr Row kRows[] = {
        {kQ4_0, "mul_wgmma_id_q4_0_64", "mul_wgmma_id_q4_0_128"}, {kQ8_0, "mul_wgmma_id_q8_0_64", "mul_wgmma_id_q8_0_128"},
        {kQ4_K, "mul_wgmma_id_q4_K_64", "mul_wgmma_id_q4_K_128"}, {kQ6_K, "mul_wgmma_id_q6_K_64", "mul_wgmma_id_q6_K_128"},
        {kF16, "mul_wgmma_id_f16_64", "mul_wgmma_id_f16_128"},    {kBF16, "mul_wgmma_id_bf16_64", "mul_wgmma_id_bf16_128"},
    };
    Launch out;
    for (const Row& row : kRows)
        if (row.type == a.w.type) out.kernel = columns == 64 ? row.columns_64 : row.columns_128;
    out.grid[0] = (u32)((a.w.n + kWideRows - 1) / kWideRows);  // of one tile of x: that is read from memory once
    out.grid[1] = (u32)most_tiles(a.y.ne[1] * a.y.ne[2], a.w.ne2, columns);
    out.block[0] = (u32)wide_threads(columns);
    out.shared_bytes = wide_shared(columns);
    return out;
}

inline Launch halve_entries_launch(const HalveEntriesArgs& a, i64 tiles, bool bf16, Arch) {
    Launch out;
    if (a.x.type != kF32) return out;
    out.kernel = bf16 ? "bf16_entries" : "half_entries";
    out.grid[0] = (u32)tiles;
    out.grid[1] = (u32)(a.columns / 16);
    out.block[0] = 256;
    return out;
}

/// Activations to panels of halves.
inline Launch halve_panels_launch(const QuantizeArgs& a, bool bf16, Arch) {
    const i64 rows = a.x.ne[1] * a.x.ne[2] * a.x.ne[3];
    Launch out;
    if (a.x.type != kF32 || rows > 65535) return out;
    out.kernel = bf16 ? "bf16_panels" : "half_panels";
    out.grid[0] = (u32)((a.k + 8 * 128 - 1) / (8 * 128));
    out.grid[1] = (u32)rows;
    out.block[0] = 128;
    return out;
}

}  // namespace ggml_tp
