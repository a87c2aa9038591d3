// An expert that all tokens share, in the persistent kernel: its products stand beside those of the experts that a router chose, so what comes between and
// behind them is not found by looking at the stage before.
#pragma once
#include <optional>
#include <vector>

#include "draft.h"

namespace ggml_tp {

/// Of stages[i] one of
/// - a GLU, which becomes a product's with its gates and ups further up; its result goes to `shared` [kStreamMostK];
/// - a product whose result, times a sigmoid if there is one, is added to what the other experts have summed up: it adds that;
/// - a product of one row of floats (the sigmoid's argument), behind the router's of the same input: a row more of that.
/// nullopt: it is something else, or cannot be.
std::optional<Join> shared_expert(const std::vector<Draft>& stages, size_t i, float* shared, u32 n_blocks);

}  // namespace ggml_tp
