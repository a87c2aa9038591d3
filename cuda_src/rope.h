// Rotary position embedding: which kernel and grid.
#pragma once
#include "rows_grid.h"

namespace ggml_tp {

inline Launch rope_launch(const RopeArgs& args, Arch) {
    const View &x = args.x, &y = args.y;
    if (!is_float_type(x.type) || !is_float_type(y.type) || !same_shape(x, y)) return {};
    if (args.pos.type != kI32 || args.pos.ne[0] < x.ne[2] * (args.sectioned ? 4 : 1)) return {};
    if (args.sectioned && args.sections[0] + args.sections[1] + args.sections[2] + args.sections[3] <= 0) return {};
    const i64 turning = args.sectioned == kVision ? 2 * (i64)args.n_dims : args.n_dims;
    // n_dims = 0 turns nothing; a host asks for it when it looks for a place for rope_freqs.weight.
    if (args.n_dims < 0 || args.n_dims % 2 != 0 || args.n_offs < 0 || args.n_offs % 2 != 0 || args.n_offs + turning > x.ne[0]) return {};
    if (args.has_factors && (args.factors.type != kF32 || args.factors.ne[0] < turning / 2)) return {};
    return element_launch(args.neox ? "rope_neox" : "rope_normal", (x.ne[0] + 1) / 2, n_rows(x));
}

/// See RopeStoreArgs: blocks of 256 pairs of the first rope, then of the second, then of the second store's elements (the first's too
/// when no rope feeds it). F32 ropes of one mode.
inline Launch rope_store_launch(const RopeStoreArgs& a, Arch arch) {
    Launch out;
    i64 blocks = 0;
    for (int i = 0; i < a.n_ropes; ++i) {
        if (!rope_launch(a.rope[i], arch).kernel || a.rope[i].x.type != kF32 || a.rope[i].y.type != kF32) return {};
        blocks += (n_elements(a.rope[i].y) / 2 + 255) / 256;
        if (a.rope[i].x.ne[0] % 2) return {};
    }
    for (int i = 0; i < a.n_stores; ++i) {
        if (a.store[i].x.type != kF32 || !is_float_type(a.store[i].y.type)) return {};
        if (i != 0 || a.stored_rope < 0) blocks += (n_elements(a.store[i].x) + 255) / 256;
    }
    if (blocks > 0x7fffffff) return {};
    out.kernel = "rope_store";
    out.grid[0] = (u32)blocks;
    out.block[0] = 256;
    return out;
}

}  // namespace ggml_tp
