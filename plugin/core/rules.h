// How shardings pass through ops: one row per op in rules.cpp's table, and the propagation that applies them in graph order.
#pragma once
#include "plan.h"

namespace ggml_tp {

/// Whether t is linear in the sources that are Partial (bit i: source i), so that its result may be Partial too: scaling, adding Partials.
bool may_pass_partial(const Tensor& t, u32 partial_sources);

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
    /// The same for ops that are computed segment by segment; for others, what is divided in segments is gathered.
    Sharding segmented_source(const Tensor& t, int i);
    bool is_partial(const Tensor& t, int i) const;
    /// Whether t is read by nothing but one sum that has, or leads to one with, another Partial: then t may be a Partial too and is reduced
    /// with that one. Attention and ffn of a parallel residual are one all_reduce so.
    bool meets_partial(const Tensor& t) const;
    /// Makes source i of t whole on every rank.
    void gather(const Tensor& t, int i, const std::string& reason);
    /// Whether source i of t is divided as a weight's name says, in segments or heads that nothing in the graph has asked for.
    bool is_by_name_alone(const Tensor& t, int i) const;
    /// Adds up the squares of t's only source, which lies so, over all ranks.
    void sum_squares(const Tensor& t, const Sharding& lies);
    /// Whether source i of t is computed by its owners in the same proportion as `cache` is divided.
    bool in_proportion(const Tensor& t, int i, const Extent& cache) const;
    void want(Stored* stored, const Sharding& sharding, const std::optional<Extent>& extent);

    const Graph& graph;
    const int n_ranks;
    const std::vector<double>& split;

  private:
    struct State {
        Sharding::Kind kind = Sharding::kReplicated;
        std::vector<Part> parts;  // kSharded: of all its bytes
        bool operator==(const State&) const = default;
    };
    /// Of the product that source i of t comes from; null: it comes from something else.
    Stored* weight_of(const Tensor& t, int i) const;
    void reduce(int root, const std::string& reason);
    void gather_parts(int root, const std::string& reason);
    Sharding lies(const Tensor& t, int i);
    bool will_be_partial(const Tensor& t) const;

    PlanResult& result_;
    std::vector<State> states_;    // by root
    std::vector<char> passed_on_;  // by root: a Partial that an op has read as one
    std::vector<char> computed_;   // by root
};

}  // namespace ggml_tp
