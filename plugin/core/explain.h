// What a group of ranks would make of a model, from its file's tensor list alone: no host, no device. The graph of one decoded token is
// built as a host would build it, then the same code plans it that plans a host's graphs (plan.cpp, memory.cpp).
#pragma once
#include <cstdint>
#include <string>
#include <vector>

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
    };
    std::vector<FileTensor> tensors;  // those that a host puts on the device
    std::vector<Layer> layers;
    i64 n_embd = 0, n_expert_used = 0;
    int type_k = 0, type_v = 0;  // of the caches
};

/// JSON: {"tensors": [{name, type, role, layout, bytes, reason, planned}], "caches": [the same], "reshards": [{kind, tensor, bytes, reason}],
/// "notes": []}. `planned` is false for tensors that the graph does not read: their layout is the guess by name.
/// {"error": text} when there is no plan.
std::string explain(const ModelShape& model, int n_ranks, const std::vector<double>& split);

}  // namespace ggml_tp
