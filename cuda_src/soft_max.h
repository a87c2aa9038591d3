// Softmax of rows (ggml_soft_max_ext): which kernel and grid.
#pragma once
#include "rows_grid.h"

namespace ggml_tp {

inline constexpr u32 kSoftMaxThreads = 256;

inline Launch soft_max_launch(const SoftMaxArgs& args, Arch) {
    Launch l;
    const View &x = args.x, &y = args.y;
    const i64 rows = n_rows(x);
    if (!is_float_type(x.type) || !is_float_type(y.type) || !same_shape(x, y)) return l;
    if (x.ne[0] <= 0 || rows <= 0 || rows > 0x7fffffff) return l;
    if (args.has_mask) {
        const View& mask = args.mask;
        if (!is_float_type(mask.type) || mask.ne[0] < x.ne[0] || mask.ne[1] < x.ne[1]) return l;
        if (mask.ne[2] <= 0 || mask.ne[3] <= 0) return l;
    }
    if (args.has_sinks && (args.sinks.type != kF32 || args.sinks.ne[0] < x.ne[2])) return l;
    l.kernel = "soft_max";
    l.grid[0] = (u32)rows;
    l.block[0] = x.ne[0] <= 128 ? 32 : kSoftMaxThreads;
    return l;
}

}  // namespace ggml_tp
