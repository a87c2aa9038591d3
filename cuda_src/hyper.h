// Launch settings of hyper.cu.
#pragma once
#include "copy.h"

namespace ggml_tp {

inline Launch indexer_launch(const IndexerArgs& a, Arch) {
    Launch out;
    if (!find_weight_format(a.k.type) || a.q.type != kF32 || a.weights.type != kF32 || a.y.type != kF32 || !is_float_type(a.mask.type)) return out;
    if (a.y.ne[0] > 0x7fffffff || a.y.ne[1] > 65535 || a.y.ne[3] > 65535 || a.mask.ne[3] <= 0) return out;
    out.kernel = "indexer";
    out.grid[0] = (u32)a.y.ne[0];
    out.grid[1] = (u32)a.y.ne[1];
    out.grid[2] = (u32)a.y.ne[3];
    out.block[0] = 32;
    return out;
}
/// All F32 (a view that a kernel does not read has no type of its own: its data is null).
inline Launch hyper_launch(const char* kernel, const HyperArgs& a, const View& threads, Arch arch) {
    for (const View* v : {&a.x, &a.residual, &a.post, &a.comb, &a.y})
        if (v->type != kF32) return {};
    return per_element_launch(kernel, threads, arch);
}

}  // namespace ggml_tp
