// Linear attention of one token as one stage of the persistent kernel: what comes between a layer's products (a window over tokens, norms of Q and K, gates,
// GATED_DELTA_NET, its state's way out of a cache and back, the norm of its result, z) are a dozen stages, which wait for each other eight times. And a state
// space's layer (SSM_SCAN as Mamba 2 has it), whose stages are as many.
#pragma once
#include <optional>
#include <vector>

#include "draft.h"

namespace ggml_tp {

struct DeltaHeads : Join {  // the stage stands where the last of those that it takes stood, and a product takes its result from `attended`
    size_t place;           // of the stage
    StreamHeads shift;      // what brings its windows up to date: behind a wait that is behind the stage, as that of the product is
    std::vector<Span> shift_reads, shift_writes;

    /// Into a stage of this kind behind it.
    void shift_in(Draft& stage) const;
};

/// Of the kStreamDelta, or kStreamScan of one decay a head, at stages[delta]; nullopt: something about it is otherwise. windows: kStreamMostK floats, for what
/// windows take in; attended: as many, for the result. keep_rows: the windows' rows are copied out of their cache all the same, where that copy is not the
/// stages' own.
std::optional<DeltaHeads> delta_heads(const std::vector<Draft>& stages, size_t delta, bool keep_rows, float* windows, float* attended, i64 blocks);

}  // namespace ggml_tp
