// Ops with a state instead of a cache (SSM_SCAN, GATED_DELTA_NET, ...), as far as a division by heads is concerned: one row per op says along
// which axis each source has its heads. Of Mamba-1 every channel is a head.
#pragma once
#include "plan.h"

namespace ggml_tp {

struct Recurrence {
    enum Lies { kWhole, kHeads, kGroups, kState };  // kGroups: shared by several heads, as B and C, or Q and K of fewer heads than V
    struct Source {
        Lies lies = kWhole;
        int axis = 0;
    };
    abi::Op op;
    Source sources[7];
    int values;  // the source whose heads the result's are; its first axis is a head's row of results
    bool tiled;  // head h reads group h % groups, not h / (heads of a group)
};

/// Null for every other op.
const Recurrence* recurrence_of(abi::Op op);

/// Channels that do not see each other, of a convolution or of Mamba-1, where there are no heads.
Ranges divide_channels(i64 n, int n_ranks, const std::vector<double>& split);

/// How one such op is divided, and what that asks of its sources. A result has two parts: y [row, heads, tokens], then states.
class RecurrentHeads {
  public:
    RecurrentHeads(const Graph& graph, const Tensor& t);
    i64 n_head() const { return n_head_; }
    /// Heads of each rank: whole groups while there are enough of them.
    Ranges divide(int n_ranks, const std::vector<double>& split) const;
    /// What source i must be on each rank for these heads; nullopt: no Sharding of its shape says it.
    std::optional<Sharding> needs(int i, const Ranges& heads) const;
    Sharding y(const Ranges& heads) const { return sharded(0, scaled(heads, row_)); }  // of a row of y
    std::vector<Part> parts(const Ranges& heads) const;

  private:
    const Tensor& source(int i) const { return graph_.tensors[static_cast<size_t>(t_.src[i])]; }
    i64 n_groups(int i) const { return source(i).ne[op_.sources[i].axis]; }
    /// How often source i's heads were repeated by an op of the graph before.
    i64 repeats(int i) const;

    const Graph& graph_;
    const Tensor& t_;
    const Recurrence& op_;
    i64 n_head_, row_, state_row_, y_bytes_;
};

}  // namespace ggml_tp
