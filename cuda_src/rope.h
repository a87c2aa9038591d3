// Rotary position embedding: which kernel and grid.
#pragma once
#include "rows_grid.h"

namespace ggml_tp {

constexpr int kRopeHeads = 8;      // of a token, that a thread turns at most: all of its loads are under way together
constexpr i64 kRopeThreads = 512;  // of a multiprocessor: with so many and their loads, memory is not waited for

/// Heads for whose pairs a thread computes a cosine and a sine once: more, as long as threads are left for all multiprocessors. One token's
/// are few, and its turns may come from a table (rank_run_attention.cpp), which is the same for all heads.
inline i32 rope_heads(const RopeArgs& args, Arch arch) {
    const View& x = args.x;
    i32 heads = 1;
    if (x.ne[2] * x.ne[3] == 1) return heads;
    while (heads < kRopeHeads && heads < x.ne[1] && n_elements(x) / 2 / (2 * heads) >= arch.n_sm * kRopeThreads) heads *= 2;
    return heads;
}
/// Runs of so many heads of a token.
constexpr i64 rope_runs(const RopeArgs& args) { return (args.x.ne[1] + args.heads - 1) / args.heads * args.x.ne[2] * args.x.ne[3]; }

inline Launch rope_launch(const RopeArgs& args, Arch) {
    const View &x = args.x, &y = args.y;
    if (!is_float_type(x.type) || !is_float_type(y.type) || !same_shape(x, y)) return {};
    if (args.heads < 1 || args.heads > kRopeHeads || n_rows(x) > 0x7fffffff) return {};
    if (args.pos.type != kI32 || args.pos.ne[0] < x.ne[2] * (args.sectioned ? 4 : 1)) return {};
    if (args.sectioned && args.sections[0] + args.sections[1] + args.sections[2] + args.sections[3] <= 0) return {};
    const i64 turning = args.sectioned == kVision ? 2 * (i64)args.n_dims : args.n_dims;
    // n_dims = 0 turns nothing; a host asks for it when it looks for a place for rope_freqs.weight.
    if (args.n_dims < 0 || args.n_dims % 2 != 0 || args.n_offs < 0 || args.n_offs % 2 != 0 || args.n_offs + turning > x.ne[0]) return {};
    if (args.factors.data && (args.factors.type != kF32 || args.factors.ne[0] < turning / 2)) return {};
    return element_launch(args.neox ? "rope_neox" : "rope_normal", (x.ne[0] + 1) / 2, rope_runs(args));
}

/// See RopeStoreArgs: blocks of 256 pairs of runs of the first rope, then of the second, then of the second store's elements (the first's
/// too when no rope feeds it), all counted in 32 bits. F32 ropes of one mode.
inline Launch rope_store_launch(const RopeStoreArgs& a, Arch arch) {
    Launch out;
    i64 blocks = 0;
    for (int i = 0; i < a.n_ropes; ++i) {
        if (!rope_launch(a.rope[i], arch).kernel || a.rope[i].x.type != kF32 || a.rope[i].y.type != kF32) return {};
        blocks += (a.rope[i].x.ne[0] / 2 * rope_runs(a.rope[i]) + 255) / 256;
        if (a.rope[i].x.ne[0] % 2) return {};
    }
    for (int i = 0; i < a.n_stores; ++i) {
        if (a.store[i].x.type != kF32 || !is_float_type(a.store[i].y.type)) return {};
        if (i != 0 || a.stored_rope < 0) blocks += (n_elements(a.store[i].x) + 255) / 256;
    }
    if (blocks >= 1 << 24) return {};
    out.kernel = "rope_store";
    out.grid[0] = (u32)blocks;
    out.block[0] = 256;
    return out;
}

/// The same of a product's pieces: heads side by side in its columns, which are tokens.
inline Launch rope_store_pieces_launch(const PiecesRopeArgs& p, Arch arch) {
    for (int i = 0; i < p.args.n_ropes; ++i)
        if (const View& x = p.args.rope[i].x; p.rope[i].n && (x.nb[1] != x.ne[0] * 4 || x.ne[3] != 1)) return {};
    for (int i = 0; i < p.args.n_stores; ++i)
        if (const View& x = p.args.store[i].x; p.store[i].n && x.ne[2] * x.ne[3] != 1) return {};
    Launch out = rope_store_launch(p.args, arch);
    if (out.kernel) out.kernel = "rope_store_pieces";
    return out;
}

}  // namespace ggml_tp
