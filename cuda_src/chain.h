// Launch settings of chain.cu, and which launches may become steps of one.
#pragma once
#include "rows_grid.h"

namespace ggml_tp {

constexpr i64 kChainElems = 2048;  // of any tensor of a chain: more is worth a launch of its own
constexpr i64 kChainRow = 1024;    // of a row to sort
constexpr u32 kChainThreads = 256, kChainMostThreads = 1024;

inline bool chain_can(const ChainStep& s) {
    const bool sorts = s.op == ChainOp::kArgsort, rows = s.op == ChainOp::kGetRows || s.op == ChainOp::kSetRows;
    if (s.a.type != kF32 || s.y.type != (sorts ? kI32 : kF32) || (sorts && s.a.ne[0] > kChainRow)) return false;
    if ((rows || s.op <= ChainOp::kDiv) && s.b.type != (rows ? kI32 : kF32)) return false;
    return n_elements(s.a) <= kChainElems && n_elements(s.y) <= kChainElems && n_elements(s.y) > 0;
}

/// int8 by blocks behind the chain's: whole rows of four neighbouring floats a lane.
inline bool chain_can_quantize(const QuantizeArgs& q) {
    const View& x = q.x;
    return x.type == kF32 && x.nb[0] == 4 && (u64)x.data % 16 == 0 && x.nb[1] % 16 == 0 && x.nb[2] % 16 == 0 && x.nb[3] % 16 == 0 && q.k_begin == 0 &&
           q.k_end == q.k && q.k % 32 == 0;
}

inline Launch chain_launch(const ChainArgs& a, Arch) {
    Launch l;
    l.kernel = "chain";
    // One token's rows are a few hundred elements, and a barrier of few warps is a short one; several tokens' are for a whole multiprocessor.
    i64 most = 0;
    for (int i = 0; i < a.n_steps; ++i) most = n_elements(a.step[i].a) > most ? n_elements(a.step[i].a) : most;
    l.block[0] = most <= 2 * (i64)kChainThreads ? kChainThreads : kChainMostThreads;
    const i64 warps = l.block[0] / 32;
    if (a.quantize.xq) l.grid[0] += (u32)((n_rows(a.quantize.x) * ((a.quantize.k + 127) / 128) + warps - 1) / warps);
    return l;
}

}  // namespace ggml_tp
