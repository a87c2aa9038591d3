// Which tensor is guessed to be sharded how, by name, when the host announces it. One row per name; a new model family adds rows.
// A wrong guess costs one reshard at the first plan and is never wrong in its results (docs/decisions.md).
#pragma once
#include <string_view>

#include "sharding.h"

namespace ggml_tp {

enum class Role {
    kReplicated,
    kWhole,     // [k, n]: whole on every rank, in the layout that the products like to read (routers)
    kColumn,    // [k, n]: n is divided (Q, K, V, gate, up, vocabulary head); a bias [n] likewise
    kSegments,  // [k, n]: several matrices of columns side by side, each divided (fused Q, K and V; gate and up)
    kMixer,     // [k, n]: n is divided as the heads of a recurrent layer are; whole where no graph asks for heads
    kRow,       // [k, n]: k is divided (attention output, down); its product is Partial
    kKvCache,   // [n_embd_gqa, cells, streams]: divided along a row of one cell
    kState,     // [n, sequences] of a recurrent layer: whole until a graph says what heads it is of
};

/// The role of a tensor of this name.
Role role_of(std::string_view name);

/// The sharding guessed for a role; Replicated when the shape gives nothing to divide. `ne` in ggml order.
Sharding guess_sharding(Role role, const i64 ne[4], int n_dims, int n_ranks, const std::vector<double>& split);

}  // namespace ggml_tp
