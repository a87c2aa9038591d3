// What a group of ranks would make of a model, from its file's tensor list alone: no host, no device. The graph of one decoded token is
// built as a host would build it, then the same code plans it that plans a host's graphs (plan.cpp, memory.cpp).
#pragma once
#include <string>
#include <vector>

#include "token.h"

namespace ggml_tp {

/// JSON: {"tensors": [{name, type, role, layout, bytes, reason, planned}], "caches": [the same], "reshards": [{kind, tensor, bytes, reason}],
/// "notes": []}. `planned` is false for tensors that the graph does not read: their layout is the guess by name.
/// {"error": text} when there is no plan.
std::string explain(const ModelShape& model, int n_ranks, const std::vector<double>& split);

}  // namespace ggml_tp
