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
constexpr int kDeltaRows = 4;  // of a state, that a warp takes at once
/// Whether gated_delta_rows may be called: one token of one sequence, rows of up to 128 floats, sixteen bytes of which are read and written at once.
inline bool delta_in_fours(const RecurrentArgs& args) {
    auto fours = [](const View& v) { return v.nb[0] == 4 && ((u64)v.data | (u64)v.nb[1]) % 16 == 0; };
    return args.n <= 128 && args.n % 4 == 0 && args.rows % kDeltaRows == 0 && args.n_tokens == 1 && args.n_seqs == 1 && fours(args.src[0]) &&
           fours(args.src[1]) && (args.src[3].ne[0] == 1 || fours(args.src[3])) && ((u64)args.src[5].data | (u64)args.state) % 16 == 0;
}
constexpr int kScanRows = 4;  // of all heads' states, that a group of a warp's lanes takes at once
/// Whether scan_rows may be called: one token of one sequence, rows of 4, 8, .. 256 floats, sixteen bytes of which are read and written at once.
inline bool scan_in_fours(const RecurrentArgs& args) {
    auto fours = [](const View& v) { return v.nb[0] == 4 && ((u64)v.data | (u64)v.nb[1]) % 16 == 0; };
    const View* src = args.src;
    return args.n >= 4 && args.n <= kMostStateElems && (args.n & (args.n - 1)) == 0 && args.n_tokens == 1 && args.n_seqs == 1 && fours(src[0]) &&
           src[0].nb[1] == args.n * 4 && src[0].nb[2] == args.rows * args.n * 4 && src[0].nb[3] % 16 == 0 && (src[3].ne[0] == 1 || fours(src[3])) &&
           fours(src[4]) && fours(src[5]) && (u64)args.state % 16 == 0;
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
