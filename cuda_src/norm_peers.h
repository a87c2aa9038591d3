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

/// Up to a block a row, all on the device at once; a sender's part must have room for rows in whole steps of its threads.
inline Launch push_norm_launch(const PushNormArgs& args, bool tagged, Arch arch) {
    Launch l = detail::peer_norm_launch(tagged ? "push_norm_tagged" : "push_norm_flagged", args.norm, arch);
    const i64 n = args.norm.y.ne[0], rows = args.norm.y.ne[1], steps = (n + 4095) / 4096, threads = (n + 4 * steps - 1) / (4 * steps),
              warps = (threads + 31) / 32;
    const bool room =
        tagged ? rows * steps * warps * 128 * 8 <= args.sender_bytes : rows * n * 4 <= args.flags_at && args.flags_at + rows * 4 <= args.sender_bytes;
    if (!l.kernel || !room || !pieces_in_words(args.summand)) return {};
    l.block[0] = (u32)(warps * 32);
    l.grid[0] = (u32)(rows < arch.n_sm ? rows : arch.n_sm);
    return l;
}

}  // namespace ggml_tp
