// How shardings pass through ops: one row per op in rules.cpp's table, and the propagation that applies them in graph order.
#pragma once
#include "plan.h"

namespace ggml_tp {

/// Linear in every source that is Partial: scaling, adding Partials, gathering rows.
bool may_pass_partial(const Tensor& t);

class Propagation {
  public:
    Propagation(const Graph& graph, int n_ranks, const std::vector<double>& split, PlanResult& result);
    void step(int node);
    /// Reduces what is still Partial, records what stays sharded.
    void finish();

    // What rules use.
    const Tensor& at(int id) const { return graph.tensors[id]; }
    /// How source i of t lies now; never Partial unless allow_partial (it is reduced first).
    Sharding source(const Tensor& t, int i, bool allow_partial = false);
    /// Makes source i of t whole on every rank.
    void gather(const Tensor& t, int i, const std::string& reason);
    /// Whether source i of t is computed by its owners in the same proportion as `cache` is divided.
    bool in_proportion(const Tensor& t, int i, const Extent& cache) const;
    void want(Stored* stored, const Sharding& sharding, const std::optional<Extent>& extent);

    const Graph& graph;
    const int n_ranks;
    const std::vector<double>& split;

  private:
    struct State {
        Sharding::Kind kind = Sharding::kReplicated;
        Extent extent;
    };
    void reduce(int root, const std::string& reason);
    State& state_of(int root);

    PlanResult& result_;
    std::vector<State> states_;  // by root
};

}  // namespace ggml_tp
