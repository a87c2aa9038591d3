// Plan: every tensor's sharding and every reshard between them, decided by rules (rules.cpp) and verified. No pointer, no CUDA.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "graph.h"

namespace ggml_tp {

/// How one attention's heads are divided: whole KV heads while there are enough, else Q heads, with KV heads held more than once.
struct HeadPartition {
    Ranges q, kv;
};
HeadPartition divide_heads(i64 n_head, i64 n_head_kv, int n_ranks, const std::vector<double>& split);

struct PlanStep {
    // kSumSquares: the sums of squares of divided rows over all ranks, which the kCompute steps of their norms take. One all_reduce.
    enum Kind { kCompute, kAllReduce, kAllGather, kSumSquares } kind = kCompute;
    int tensor = 0;                // kCompute: the node; kAllReduce, kAllGather: the root that is resharded in place; kSumSquares: the first of norms
    std::vector<Sharding> inputs;  // kCompute: how each source is read, a restriction of how it lies; kSumSquares: how each norm's source is
    Sharding output;               // kCompute
    Part part;                     // kAllGather: who owned what before
    std::string reason;            // of what is no kCompute
    std::vector<int> norms = {};   // kSumSquares: nodes, of as many rows each
    /// What ranks exchange, of which tensors.
    i64 bytes(const Graph& graph) const;
    std::string names(const Graph& graph) const;
};

struct Plan {
    int n_ranks = 1;
    std::vector<PlanStep> steps;
    struct Survivor {
        int root;
        Part part;
    };
    std::vector<Survivor> survivors;  // roots that stay sharded or Partial after the graph: reads of them are gathered, or summed

    int count(PlanStep::Kind kind) const;
    /// Of Partials and of sums of squares.
    int n_all_reduces() const { return count(PlanStep::kAllReduce) + count(PlanStep::kSumSquares); }
    std::string to_text(const Graph& graph) const;
};

/// A stored tensor that the graph's structure wants to lie otherwise.
struct Want {
    Stored* stored;
    Sharding sharding;
    std::optional<Extent> extent;
};

struct PlanResult {
    Plan plan;
    std::vector<Want> wants;
};  // wants not empty: lay them out, then plan again

PlanResult make_plan(const Graph& graph, int n_ranks, const std::vector<double>& split);

/// Plans until the graph wants nothing more of its stored tensors; `lay_out` gives one the layout that it is wanted in.
using LayOut = std::function<void(Stored&, const Sharding&, const std::optional<Extent>&)>;
Plan settle(const Graph& graph, int n_ranks, const std::vector<double>& split, const LayOut& lay_out);

/// Proves of a plan: no op reads a Partial that it may not read, every reader's restriction is owned, every stored tensor is
/// written as it lies. Throws Error naming the step.
void verify(const Plan& plan, const Graph& graph);

}  // namespace ggml_tp
