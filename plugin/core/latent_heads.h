// Latent attention of one token in the persistent kernel: what a host computes between its products and the attention (a norm, two ropes, two joins, a store
// into the cache) is the attention's own work, and what packs heads for the products on both its sides is theirs.
#pragma once
#include <optional>
#include <vector>

#include "draft.h"

namespace ggml_tp {

/// Of stages[i] one of
/// - a latent attention of queries and a cache in memory: it makes them out of the products' results, and where it is one piece it leaves its own in `attended`
///   [kStreamMostK], as blocks still read what a host lets its result lie over;
/// - heads' parts that are packed into `packed` for the product behind (kHeads): that takes them from where they are;
/// - a copy of all that the product before (kHeads) has just left: that writes it there.
/// nullopt: it is something else, or cannot be.
std::optional<Join> latent_heads(const std::vector<Draft>& stages, size_t i, float* packed, float* attended);

}  // namespace ggml_tp
