// The all_reduce of many columns together with the residual, the norm and the activations behind it: which grid.
#pragma once
#include "norm.h"

namespace ggml_tp {

inline Launch peer_norm_launch(const PeerNormArgs& args, Arch arch) {
    constexpr i64 kBlocks = 2;  // of a multiprocessor, of up to 1,024 threads: all that it holds
    Launch l = fused_norm_launch(args.norm, arch);
    const View& y = args.norm.y;
    auto packed = [&](const View& v) { return v.nb[1] == y.ne[0] * 4; };
    if (!l.kernel || !args.norm.has_b || y.ne[2] * y.ne[3] != 1 || !packed(y) || !packed(args.norm.a) || !packed(args.norm.b) || !packed(args.norm.sum))
        return Launch{};
    const i64 rows = args.row_end - args.row_begin, most = kBlocks * arch.n_sm;
    l.kernel = "peer_norm";
    l.grid[0] = rows < 1 ? 1 : (u32)(rows < most ? rows : most);  // one without rows tells its peers so
    return l;
}

}  // namespace ggml_tp
