// All_reduces together with the residual, the norm and the activations behind it: which kernel and grid.
#pragma once
#include "norm.h"

namespace ggml_tp {

namespace detail {
/// Of norms whose rows lie one behind the other.
inline Launch peer_norm_launch(const char* kernel, const FusedNormArgs& norm, Arch arch) {
    Launch l = fused_norm_launch(norm, arch);
    const View& y = norm.y;
    auto packed = [&](const View& v) { return v.nb[1] == y.ne[0] * 4; };
    if (!l.kernel || y.ne[2] * y.ne[3] != 1 || !packed(y) || !packed(norm.a) || (norm.has_b && (!packed(norm.b) || !packed(norm.sum)))) return {};
    l.kernel = kernel;
    return l;
}
}  // namespace detail

inline Launch pull_norm_launch(const PullNormArgs& args, Arch arch) {
    constexpr i64 kBlocks = 2;  // of a multiprocessor, of up to 1,024 threads: all that it holds
    Launch l = detail::peer_norm_launch("pull_norm", args.norm, arch);
    if (!l.kernel || !args.norm.has_b) return {};
    const i64 rows = args.row_end - args.row_begin, most = kBlocks * arch.n_sm;
    l.grid[0] = rows < 1 ? 1 : (u32)(rows < most ? rows : most);  // one without rows tells its peers so
    return l;
}

/// Up to a block a row, all on the device at once. Up to 512 threads, that values of up to 8 steps stay in registers; no more than a row has in whole steps.
inline Launch push_norm_launch(const PushNormArgs& args, Arch arch) {
    Launch l = detail::peer_norm_launch("push_norm", args.norm, arch);
    const i64 n = args.norm.y.ne[0], rows = args.norm.y.ne[1], steps = (n + 2047) / 2048, threads = (n + 4 * steps - 1) / (4 * steps),
              warps = (threads + 31) / 32;
    if (!l.kernel || rows * steps * warps * 128 > args.inbox_words || !pieces_in_words(args.summand)) return {};
    l.block[0] = (u32)(warps * 32);
    l.grid[0] = (u32)(rows < arch.n_sm ? rows : arch.n_sm);
    return l;
}

}  // namespace ggml_tp
