// The graph of one decoded token, built of a model file's tensors as a host would build it. Which tensors there are says what a layer is made of;
// architectures have no names here.
#pragma once
#include <deque>
#include <string>
#include <vector>

#include "graph.h"
#include "sharding.h"

namespace ggml_tp {

struct FileTensor {
    std::string name;
    int type = 0;
    i64 ne[4];  // ggml order
};

struct ModelShape {
    struct Layer {
        i64 n_head = 0, n_head_kv = 0, head_k = 0, head_v = 0;  // elements of one head
        i64 cells = 0;                                          // of its KV cache
        i64 cache_of = -1;                                      // the layer whose cache it reads instead of one of its own
        bool sparse_gate = false;                               // only gates above a limit open, which hangs on all of a token's
    };
    std::vector<FileTensor> tensors;  // those that a host puts on the device
    std::vector<Layer> layers;
    i64 n_embd = 0, n_expert_used = 0;
    int type_k = 0, type_v = 0;  // of the caches
    // What no tensor says.
    bool layer_norm = false;      // norms without a bias subtract the mean all the same
    bool parallel = false;        // feed forward reads what attention reads, though it has a norm of its own
    bool residual_first = false;  // of a parallel layer: feed forward is added to the residual before attention is
    bool encoder = false;         // tokens see those behind them: there is no cache
    bool unfused = false;         // K·Q, soft max and V as ops of their own, V's cache transposed
};

struct TokenGraph {
    Graph graph, of_prompt;              // of_prompt: the encoder's, where a model has one beside its decoder
    std::deque<Stored> weights, caches;  // the graphs point into them
    std::vector<std::string> notes;
};

/// Weights are laid out by the guess of their names. What has no place in the graph is named by a note.
TokenGraph token_graph(const ModelShape& model, int n_ranks, const std::vector<double>& split);

}  // namespace ggml_tp
