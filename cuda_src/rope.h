// Rotary position embedding: which kernel and grid.
#pragma once
#include "rows_grid.h"

namespace ggml_tp {

inline Launch rope_launch(const RopeArgs& args, Arch) {
    const View &x = args.x, &y = args.y;
    if (!is_float_type(x.type) || !is_float_type(y.type) || !same_shape(x, y)) return {};
    if (args.pos.type != kI32 || args.pos.ne[0] < x.ne[2]) return {};
    // n_dims = 0 turns nothing; a host asks for it when it looks for a place for rope_freqs.weight.
    if (args.n_dims < 0 || args.n_dims % 2 != 0 || args.n_dims > x.ne[0]) return {};
    if (args.has_factors && (args.factors.type != kF32 || args.factors.ne[0] < args.n_dims / 2)) return {};
    return element_launch(args.neox ? "rope_neox" : "rope_normal", (x.ne[0] + 1) / 2, n_rows(x));
}

}  // namespace ggml_tp
