// Launch settings of reduce.cu.
#pragma once
#include "rows_grid.h"

namespace ggml_tp {

/// A block per row of x; y F32, or the numbers that argmax gives.
inline Launch reduce_rows_launch(const char* kernel, const ReduceArgs& a, Arch, i32 y_type = kF32) {
    Launch out;
    const i64 rows = n_rows(a.x);
    if (a.x.type != kF32 || a.y.type != y_type || a.x.ne[0] <= 0 || rows <= 0 || rows > 0x7fffffff) return out;
    out.kernel = kernel;
    out.grid[0] = (u32)rows;
    out.block[0] = 256;
    return out;
}
inline Launch sum_all_launch(const ReduceArgs& a, Arch arch) {
    if (a.x.nb[0] != 4) return {};  // the host's CPU reads such rows as if they were side by side: nobody can say what is meant
    Launch out = reduce_rows_launch("sum_all", a, arch);
    out.grid[0] = 1;
    return out;
}
inline Launch group_norm_launch(const ReduceArgs& a, Arch arch) {
    if (a.n_groups <= 0 || a.x.ne[3] > 65535) return {};
    Launch out = reduce_rows_launch("group_norm", a, arch);
    out.grid[0] = (u32)a.n_groups;
    out.grid[1] = (u32)a.x.ne[3];
    return out;
}

}  // namespace ggml_tp
