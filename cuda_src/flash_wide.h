// Launch settings of flash_wide.cu: attention whose values are the beginning of its keys, of which all query heads share one row a cell (latent), and of
// heads wider than 256 (Gemma 4's, of 512).
#pragma once
#include "flash_attn.h"
#include "shared_memory.h"

namespace ggml_tp {

constexpr i64 kLatentStepCost = 10;                    // of a step of cells, in pieces that flash_combine adds up
constexpr int kLatentKeys = 576, kLatentValues = 512;  // halves of a cell at most: DeepSeek's; less is filled up with zeros

/// A block: groups * 16 rows (a token of a head each) times steps of `cells` cells, by groups * parts warps.
struct WideShape {
    const char* kernel;
    int keys;  // halves of a cell
    int groups, parts, cells;
    constexpr int warps() const { return groups * parts; }
    constexpr int rows() const { return groups * 16; }
    /// Queries, two stages of cells (of keys and values apart, one each), a step's probabilities, the topmost score of each part and row, what every warp has seen in two windows.
    constexpr u32 shared_bytes() const {
        return (u32)((rows() + 2 * cells) * (keys + 8) * 2 + rows() * (cells + 8) * 2 + parts * rows() * 4 + 2 * 2 * warps() * 4);
    }
};
/// By rows of a block: many, as many as multiprocessors of less memory have room for, and few.
struct WideShapes {
    WideShape many, some, few;
    constexpr bool fit() const { return many.shared_bytes() <= 163 << 10 && some.shared_bytes() <= 99 << 10 && few.shared_bytes() <= 99 << 10; }
};
constexpr WideShapes kLatent{
    {"flash_latent_64", kLatentKeys, 4, 2, 32}, {"flash_latent_32", kLatentKeys, 2, 2, 16}, {"flash_latent_16", kLatentKeys, 1, 4, 32}};
constexpr WideShapes kWide{
    {"flash_wide_64", kFlashHeadWide, 4, 2, 32}, {"flash_wide_32", kFlashHeadWide, 2, 2, 16}, {"flash_wide_16", kFlashHeadWide, 1, 4, 32}};
static_assert(kLatent.fit() && kWide.fit(), "what a block may have");

inline bool flash_latent_can(const FlashAttnArgs& a, Arch arch) {
    auto pairs = [](const View& v) { return ((u64)v.data | (u64)v.nb[1] | (u64)v.nb[2] | (u64)v.nb[3]) % 8 == 0; };
    auto words = [](const View& v) { return v.type == kF16 && v.nb[0] == 2 && ((u64)v.data | (u64)v.nb[1] | (u64)v.nb[3]) % 16 == 0; };
    const bool shared = a.k.data == a.v.data && a.k.nb[1] == a.v.nb[1] && a.k.nb[3] == a.v.nb[3] && a.k.ne[1] == a.v.ne[1] && a.k.ne[3] == a.v.ne[3];
    return arch.cc >= kColumnsArch && shared && words(a.k) && a.k.ne[2] == 1 && a.v.ne[2] == 1 && a.k.nb[1] < 1 << 28 && a.k.ne[1] < 1 << 30 &&
           a.q.ne[0] <= kLatentKeys && a.q.ne[0] % 8 == 0 && a.v.ne[0] <= kLatentValues && a.v.ne[0] % 8 == 0 && a.v.ne[0] <= a.q.ne[0] &&
           a.q.ne[1] * a.q.ne[2] < 1 << 24 && a.q.ne[3] <= 65535 && a.q.type == kF32 && a.q.nb[0] == 4 && a.y.type == kF32 && a.y.nb[0] == 4 && pairs(a.q) &&
           pairs(a.y) && !a.has_sinks && (!a.has_mask || (a.mask.type == kF16 && a.mask.ne[2] == 1 && a.mask.nb[0] == 2 && a.mask.nb[1] % 16 == 0));
}
/// Keys and values apart, of one size, an F16 cache in 16-byte words.
inline bool flash_heads_can(const FlashAttnArgs& a, Arch arch) {
    auto pairs = [](const View& v) { return ((u64)v.data | (u64)v.nb[1] | (u64)v.nb[2] | (u64)v.nb[3]) % 8 == 0; };
    auto words = [](const View& v) {
        const bool whole = ((u64)v.data | (u64)v.nb[1] | (u64)v.nb[2] | (u64)v.nb[3]) % 16 == 0;
        return v.type == kF16 && v.nb[0] == 2 && whole && v.nb[1] < 1 << 28 && v.ne[1] < 1 << 30;
    };
    return arch.cc >= kColumnsArch && words(a.k) && words(a.v) && a.q.ne[0] > kFlashHead && a.q.ne[0] <= kFlashHeadWide && a.q.ne[0] % 8 == 0 &&
           a.q.ne[0] == a.v.ne[0] && a.q.ne[1] * a.gqa_ratio < 1 << 24 && a.q.ne[3] * a.k.ne[2] <= 65535 && a.q.type == kF32 && a.q.nb[0] == 4 &&
           a.y.type == kF32 && a.y.nb[0] == 4 && pairs(a.q) && pairs(a.y) &&
           (!a.has_mask || (a.mask.type == kF16 && a.mask.ne[2] == 1 && a.mask.nb[0] == 2 && a.mask.nb[1] % 16 == 0));
}
inline bool flash_wide_can(const FlashAttnArgs& a, Arch arch) { return flash_latent_can(a, arch) || flash_heads_can(a, arch); }
/// Rows that share a cell's keys.
inline i64 wide_rows(const FlashAttnArgs& a, Arch arch) { return a.q.ne[1] * (flash_latent_can(a, arch) ? a.q.ne[2] : a.gqa_ratio); }
/// Few rows share their scores among more warps. Of more, as many as a multiprocessor's memory has room for, as each block reads all cells.
inline WideShape wide_shape(const FlashAttnArgs& a, Arch arch) {
    const WideShapes& shapes = flash_latent_can(a, arch) ? kLatent : kWide;
    if (wide_rows(a, arch) <= 2 * shapes.few.rows()) return shapes.few;
    return (int)shapes.many.shared_bytes() <= shared_kb(arch.cc) << 10 ? shapes.many : shapes.some;
}
inline i64 wide_blocks(const FlashAttnArgs& a, const WideShape& shape, Arch arch) { return (wide_rows(a, arch) + shape.rows() - 1) / shape.rows(); }
/// Pieces of the cells where there are fewer blocks than multiprocessors; with one piece the kernel writes y, else acc and meta of FlashSplitArgs.
inline FlashSplitArgs flash_wide_args(const FlashAttnArgs& a, Arch arch) {
    const WideShape shape = wide_shape(a, arch);
    FlashSplitArgs s{};
    s.a = a;
    s.head_groups = 1, s.group_heads = a.gqa_ratio;
    const i64 blocks = wide_blocks(a, shape, arch) * a.q.ne[3] * a.k.ne[2], steps = (a.k.ne[1] + shape.cells - 1) / shape.cells;
    const i64 resident = (shared_kb(arch.cc) << 10) / ((i64)shape.shared_bytes() + 1024);
    i64 splits = blocks > 0 ? arch.n_sm * resident / blocks : 1;
    if (blocks * 4 >= (i64)arch.n_sm * 3) splits = 1;
    splits = splits > steps / 2 ? steps / 2 : splits;  // two steps at least: one would be all set-up
    splits = splits > 64 ? 64 : splits < 1 ? 1 : splits;
    while (splits * splits > kLatentStepCost * steps) --splits;
    i64 each = (steps + splits - 1) / splits;
    if (each < 1) each = 1;
    s.cells = (i32)(each * shape.cells);
    s.n_splits = (i32)((steps + each - 1) / each);
    if (s.n_splits < 1) s.n_splits = 1;
    return s;
}
inline Launch flash_wide_launch(const FlashSplitArgs& s, Arch arch) {
    Launch out;
    if (!flash_wide_can(s.a, arch)) return out;
    const WideShape shape = wide_shape(s.a, arch);
    out.kernel = shape.kernel;
    out.shared_bytes = shape.shared_bytes();
    out.grid[0] = (u32)wide_blocks(s.a, shape, arch);
    out.grid[1] = (u32)s.n_splits;
    out.grid[2] = (u32)(s.a.q.ne[3] * s.a.k.ne[2]);
    out.block[0] = (u32)shape.warps() * 32;
    return out;
}

}  // namespace ggml_tp
