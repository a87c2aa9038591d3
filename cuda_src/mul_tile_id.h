// Launch settings of the products of experts in mul_tile.cu, and of group.cu, which they need.
#pragma once
#include "mul_tile.h"

namespace ggml_tp {

constexpr i64 kGroupExperts = 1024;  // whose counts are in shared memory
constexpr u32 kGroupThreads = 256;

/// The tiles that there can be: every expert's last one is ragged.
constexpr i64 most_tiles(i64 entries, i64 n_expert, i64 columns) { return entries / columns + n_expert < entries ? entries / columns + n_expert : entries; }

inline const char* mul_tile_id_kernel(i32 type, bool small) {
    struct Row {
        i32 type;
        const char *large, *small;
    };
#define TP_ROW(name, type) {type, "mul_tile_id_" #name, "mul_tile_id_" #name "_small"},
    static constexpr Row kRows[] = {TP_TILE_TYPES(TP_ROW)};
#undef TP_ROW
    for (const Row& row : kRows)
        if (row.type == type) return small ? row.small : row.large;
    return nullptr;
}

/// Whether a product of experts is the kind that mul_tile computes.
inline bool mul_tile_id_can(const MulIdArgs& a, Arch arch) {
    if (arch.cc < kTileArch || !a.w.repacked || !mul_tile_id_kernel(a.w.type, false) || a.y.type != kF32 || a.x.type != kF32) return false;
    if (a.ids.type != kI32 || a.w.ne3 != 1 || a.w.ne2 > kGroupExperts || (a.x.ne[1] != 1 && a.x.ne[1] != a.y.ne[1])) return false;
    const bool plain = a.w.type == kF16 || a.w.type == kBF16;
    return (!plain || a.w.row_stride % 16 == 0) && a.w.k % 8 == 0 && a.x.ne[1] * a.x.ne[2] <= 65535 && most_tiles(a.y.ne[1] * a.y.ne[2], a.w.ne2, 64) <= 65535;
}

/// Columns of a tile: large ones where an expert has many entries.
inline i32 tile_columns(const MulIdArgs& a) { return a.y.ne[1] * a.y.ne[2] > 96 * a.w.ne2 ? 128 : 64; }

inline Launch group_launch(const GroupArgs& a, Arch) {
    Launch out;
    out.kernel = "group_experts";
    out.grid[0] = (u32)a.n_expert;
    out.block[0] = kGroupThreads;
    return out;
}

inline Launch mul_tile_id_launch(const MulTileIdArgs& a, i32 columns, Arch) {
    Launch out;
    out.kernel = mul_tile_id_kernel(a.w.type, columns == 64);
    out.grid[0] = (u32)((a.w.n + columns - 1) / columns);  // tiles are square
    out.grid[1] = (u32)most_tiles(a.y.ne[1] * a.y.ne[2], a.w.ne2, columns);
    out.block[0] = kTileThreads;
    out.shared_bytes = mul_tile_shared(columns, columns);
    return out;
}

}  // namespace ggml_tp
