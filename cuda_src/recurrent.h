// Launch settings of recurrent.cu.
#pragma once
#include "grid_stride.h"

namespace ggml_tp {

constexpr i64 kMostStateElems = 256;  // of a row of state: eight registers a lane

inline Launch recurrent_launch(const char* kernel, const RecurrentArgs& a, int n_sources, Arch) {
    Launch out;
    for (int i = 0; i < n_sources; ++i)
        if (a.src[i].type != kF32) return out;
    if (a.n <= 0 || a.n > kMostStateElems || a.rows <= 0 || a.n_head <= 0 || a.n_head > 65535 || a.n_seqs <= 0 || a.n_seqs > 65535) return out;
    out.kernel = kernel;
    out.grid[0] = (u32)a.rows;
    out.grid[1] = (u32)a.n_head;
    out.grid[2] = (u32)a.n_seqs;
    out.block[0] = 32;
    return out;
}
inline bool all_f32(const BinaryArgs& a) { return a.a.type == kF32 && a.b.type == kF32 && a.y.type == kF32; }
inline Launch ssm_conv_launch(const BinaryArgs& a, Arch arch) { return all_f32(a) ? per_element_launch("ssm_conv", a.y, arch) : Launch{}; }
inline Launch solve_tri_launch(const BinaryArgs& a, Arch arch) {
    if (!all_f32(a)) return {};
    View columns = a.b;
    columns.ne[1] = 1;
    return per_element_launch("solve_tri", columns, arch);
}

}  // namespace ggml_tp
