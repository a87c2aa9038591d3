// Launch settings of flash_attn.cu: pieces of the cache in parallel and their sum, or (odd types and shapes) a warp per head.
#pragma once
#include "grid_stride.h"

namespace ggml_tp {

constexpr int kFlashHeads = 8;                                   // query heads of one KV head that a block takes along
constexpr int kFlashHeadsWide = 4;                               // the same of heads wider than 256, before sm_80 (later: flash_wide.h)
constexpr int kFlashHead = 256, kFlashHeadWide = 512;            // elements of a head, at most; wider ones are flash_wide.h's from sm_80 on
constexpr int kFlashWarps = 4;                                   // of a block
constexpr int kFlashRestWarps = 4;                               // of a block of what neither takes, a head each
constexpr i64 kFlashLeastCells = 32;                             // of a piece: less is all merging
constexpr i32 kColumnsArch = 800;                                // tensor cores take halves into f32 (flash_columns.h); older cards have flash_split_unit
constexpr int kColumnsStep = 16;                                 // cells of a step of a warp there
constexpr int kColumnsRun = 64;                                  // cells whose mask a warp looks at together, at most
constexpr int columns_blocks(i64 d) { return d <= 64 ? 4 : 2; }  // of a multiprocessor there: what its registers hold

inline Launch flash_attn_launch(const FlashAttnArgs& a, Arch) {
    Launch out;
    if (a.q.type != kF32 || a.y.type != kF32 || !is_float_type(a.k.type) || !is_float_type(a.v.type) ||
        (a.has_mask && a.mask.type != kF16 && a.mask.type != kF32))
        return out;
    if (a.q.ne[0] > 576 || a.v.ne[0] > 576 || a.q.ne[2] > 65535 || a.q.ne[3] > 65535) return out;
    auto words = [](const View& v) {
        return v.type == kF16 && v.nb[0] == 2 && v.ne[0] % 2 == 0 && ((u64)v.data | (u64)(v.nb[1] | v.nb[2] | v.nb[3])) % 4 == 0;
    };
    out.kernel = words(a.k) && words(a.v) ? "flash_attn_halves" : "flash_attn";
    out.grid[0] = (u32)a.q.ne[1];
    out.grid[1] = (u32)((a.q.ne[2] + kFlashRestWarps - 1) / kFlashRestWarps);
    out.grid[2] = (u32)a.q.ne[3];
    out.block[0] = 32 * kFlashRestWarps;
    return out;
}

/// Whether the split kernel can: an F16 cache in 16-byte words, K and V of one head size.
inline bool flash_split_can(const FlashAttnArgs& a, Arch arch) {
    auto words = [](const View& v) {
        const bool whole = v.nb[1] % 16 == 0 && v.nb[2] % 16 == 0 && v.nb[3] % 16 == 0;
        return v.type == kF16 && v.nb[0] == 2 && whole && v.nb[1] < 1 << 28 && v.ne[1] < 1 << 30;  // 16 rows are addressed, and cells counted, in 32 bits
    };
    if (!words(a.k) || !words(a.v) || a.q.ne[0] != a.v.ne[0] || a.q.ne[0] % 8 || a.q.ne[0] > (arch.cc >= kColumnsArch ? kFlashHead : kFlashHeadWide) ||
        a.q.nb[0] != 4 || a.y.nb[0] != 4)
        return false;
    return !a.has_mask || (a.mask.type == kF16 && a.mask.ne[2] == 1);
}

/// Floats of shared memory in which the warps of a unit of flash_columns.h meet.
constexpr int flash_columns_floats(int warps, int heads, int d) { return warps * heads * (2 + d); }
/// And those through which a warp hands its sums to another: a lane's, and its counts. d: a multiple of 64.
constexpr int column_fold_floats(int d) { return (d / 4 + 2) * 32; }

constexpr i64 kFlashWholeCells = kFlashWarps * kColumnsRun;  // a look at masks of each warp
/// Divides the cells so that there are as many blocks as run at a time, where there are cells enough. The division depends on the
/// shapes and the device alone, so results repeat. Of several tokens not where one block for all cells is nearly as fast, which saves the combination: 4 us
/// of 130 for a layer of 8B (16 tokens, one H200), and 64 cells more cost a block half a microsecond.
inline FlashSplitArgs flash_split_args(const FlashAttnArgs& a, Arch arch) {
    FlashSplitArgs s{};
    s.a = a;
    s.group_heads = a.q.ne[0] > kFlashHead ? kFlashHeadsWide : kFlashHeads;
    s.head_groups = (a.gqa_ratio + s.group_heads - 1) / s.group_heads;
    const bool columns = arch.cc >= kColumnsArch;
    const i64 cells = a.k.ne[1], blocks = a.k.ne[2] * s.head_groups * a.q.ne[1] * a.q.ne[3], want = (i64)arch.n_sm * (columns ? columns_blocks(a.q.ne[0]) : 4);
    const i64 least = columns ? kFlashWarps * kColumnsStep : kFlashLeastCells, unit = columns ? kColumnsStep : 8;
    i64 splits = blocks > 0 ? want / blocks : 1;
    if (columns && a.q.ne[1] * a.q.ne[3] > 1 && (cells <= kFlashWholeCells || blocks * 4 >= (i64)arch.n_sm * 3)) splits = 1;
    const i64 most = (cells + least - 1) / least;
    splits = splits > most ? most : splits;
    splits = splits > 64 ? 64 : splits < 1 ? 1 : splits;
    i64 each = splits ? (cells + splits - 1) / splits : cells;
    each = (each + unit - 1) / unit * unit;
    s.cells = (i32)(each ? each : unit);
    s.n_splits = (i32)((cells + s.cells - 1) / s.cells);
    if (s.n_splits < 1) s.n_splits = 1;
    return s;
}
/// Floats of acc and of meta.
inline i64 flash_split_acc(const FlashSplitArgs& s) { return s.a.q.ne[1] * s.a.q.ne[2] * s.a.q.ne[3] * s.n_splits * s.a.v.ne[0]; }
inline i64 flash_split_meta(const FlashSplitArgs& s) { return s.a.q.ne[1] * s.a.q.ne[2] * s.a.q.ne[3] * s.n_splits * 2; }

inline Launch flash_split_launch(const FlashSplitArgs& s, Arch arch) {
    Launch out;
    const i64 y = s.a.k.ne[2] * s.head_groups, z = s.a.q.ne[1] * s.a.q.ne[3];
    if (!flash_split_can(s.a, arch) || y > 65535 || z > 65535) return out;
    const i64 heads = s.a.gqa_ratio < s.group_heads ? s.a.gqa_ratio : s.group_heads;
    const int d = (int)s.a.q.ne[0];
    if (arch.cc >= kColumnsArch) {
        out.kernel = d <= 64 ? "flash_columns_64" : d <= 128 ? "flash_columns_128" : d <= 192 ? "flash_columns_192" : "flash_columns_256";
        out.shared_bytes = (u32)flash_columns_floats(kFlashWarps, (int)heads, d) * 4;
    } else if (d > kFlashHead) {
        out.kernel = heads <= 1 ? "flash_split_wide_1" : heads <= 2 ? "flash_split_wide_2" : "flash_split_wide_4";
    } else {
        out.kernel = heads <= 1 ? "flash_split_1" : heads <= 2 ? "flash_split_2" : heads <= 4 ? "flash_split_4" : "flash_split_8";
    }
    out.grid[0] = (u32)s.n_splits;
    out.grid[1] = (u32)y;
    out.grid[2] = (u32)z;
    out.block[0] = 32 * kFlashWarps;
    return out;
}

inline Launch flash_combine_launch(const FlashCombineArgs& c, Arch) {
    Launch out;
    if (c.y.ne[1] > 0x7fffffff || c.y.ne[2] > 65535 || c.y.ne[3] > 65535 || (c.xq && c.y.ne[0] % 32)) return out;
    out.kernel = "flash_combine";
    out.grid[0] = (u32)c.y.ne[1];
    out.grid[1] = (u32)c.y.ne[2];
    out.grid[2] = (u32)c.y.ne[3];
    out.block[0] = (u32)((c.y.ne[0] + 31) / 32 * 32);
    return out;
}

constexpr i64 kFlashTileTokens = 64;                                  // with fewer the tensor cores idle
constexpr int kFlashTileRows = 16;                                    // of a warp: a token of a head each
constexpr int kFlashTileWindow = 32;                                  // steps whose mask a block looks at together: bits of a word
constexpr int flash_tile_cells(int d) { return d <= 128 ? 64 : 32; }  // of a step: two stages of wide heads would not fit
constexpr bool flash_tile_keeps_q(int d) { return d <= 128; }         // in registers, beside the sums

/// Whether the tensor-core kernel can: many tokens, the split kernel's cache, rows in pairs of floats.
inline bool flash_tile_can(const FlashAttnArgs& a, Arch arch) {
    auto pairs = [](const View& v) { return ((u64)v.data | (u64)v.nb[1] | (u64)v.nb[2] | (u64)v.nb[3]) % 8 == 0; };
    return arch.cc >= 800 && flash_split_can(a, arch) && a.q.ne[1] >= kFlashTileTokens && a.q.ne[1] < 1 << 30 && (!a.has_mask || a.mask.nb[1] % 16 == 0) &&
           pairs(a.q) && pairs(a.y);
}
/// Bytes of two stages of K and V, of Q where registers have no room, and of what every warp has seen in two windows of the mask.
constexpr u32 flash_tile_shared(int d, int warps) {
    const int stages = 2 * 2 * flash_tile_cells(d) * (d + 8) * 2, q = flash_tile_keeps_q(d) ? 0 : warps * kFlashTileRows * d * 2;
    return (u32)(stages + q + 2 * 2 * warps * 4);
}
static_assert(flash_tile_shared(128, 8) <= 99 << 10 && flash_tile_shared(256, 4) <= 99 << 10, "what a block may have on sm_86, sm_89 and sm_120");

/// Query heads that share the block's K and V: as many as divide, up to one per warp. The more, the fewer tokens are in a block, and
/// the fewer cells lie between what its first and its last token see.
inline i32 flash_tile_heads(const FlashAttnArgs& a, i32 warps) {
    i32 heads = warps;
    while (heads > 1 && (a.gqa_ratio % heads || a.head_offset % heads || a.q.ne[2] % heads)) heads /= 2;
    return heads;
}
inline i64 flash_tile_tiles(const FlashTileArgs& t) {
    const i64 tokens = t.warps * kFlashTileRows / t.heads;
    return (t.a.q.ne[1] + tokens - 1) / tokens;
}
/// Eight warps read K and V half as often as four; where that leaves multiprocessors without a block, four. Q of wide heads is too
/// large for eight.
inline FlashTileArgs flash_tile_args(const FlashAttnArgs& a, Arch arch) {
    FlashTileArgs t{a, flash_tile_heads(a, 8), 8};
    if (a.q.ne[0] <= 128 && flash_tile_tiles(t) * (a.q.ne[2] / t.heads) * a.q.ne[3] >= arch.n_sm) return t;
    return {a, flash_tile_heads(a, 4), 4};
}

inline Launch flash_tile_launch(const FlashTileArgs& t, Arch arch) {
    struct Width {
        int d;
        const char *four, *eight;  // warps
    };
    static constexpr Width kWidths[] = {{64, "flash_tile_64_4", "flash_tile_64_8"},
                                        {96, "flash_tile_96_4", "flash_tile_96_8"},
                                        {128, "flash_tile_128_4", "flash_tile_128_8"},
                                        {256, "flash_tile_256_4", nullptr}};
    Launch out;
    const i64 tiles = flash_tile_tiles(t);
    if (!flash_tile_can(t.a, arch) || t.a.q.ne[2] > 65535 || tiles > 65535 || t.a.q.ne[3] > 65535) return out;
    const Width* width = kWidths;
    while (width->d < t.a.q.ne[0]) ++width;
    out.kernel = t.warps == 8 ? width->eight : width->four;
    out.grid[0] = (u32)(t.a.q.ne[2] / t.heads);
    out.grid[1] = (u32)tiles;
    out.grid[2] = (u32)t.a.q.ne[3];
    out.block[0] = (u32)(32 * t.warps);
    out.shared_bytes = flash_tile_shared(width->d, t.warps);
    return out;
}

}  // namespace ggml_tp
