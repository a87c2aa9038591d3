// An all_reduce of several columns and the norm behind it become one launch (cuda_src/norm_peers.cu): a rank adds up and normalises its share of the rows and
// stores what the next products read into all peers' memory. The residual stays divided by rows, where only such launches read it.
#pragma once
#include "program.h"

namespace ggml_tp {

/// What ranks count their peers' launches with.
class PeerMemory {
  public:
    /// Every rank has a device of its own, and reads and stores to every other's memory. Throws Error when memory is short.
    PeerMemory(const std::vector<std::unique_ptr<Device>>& devices, i64 least_bytes, double deadline_s);

    /// After a failure: counters as at the start. No kernel may run.
    void reset() const;

    PeerState* state(int rank) const { return reinterpret_cast<PeerState*>(blocks_[static_cast<size_t>(rank)].pointer()); }
    const i64 least_bytes;  // of an all_reduce that a norm does
    const double deadline_s;

  private:
    std::vector<DeviceBlock> blocks_;
};

/// One rank's launch of it. norms: every rank's, b being its summand. whole_sum, whole_normed: all ranks get every row of norm.sum and of norm.y, which
/// else only the row's owner has. No kernel: not these shapes.
RankLaunch peer_norm(const std::vector<FusedNormArgs>& norms, int rank, bool whole_sum, bool whole_normed, Arch arch, const PeerMemory& memory,
                     DevicePtr fault);

/// Adds to program.survivors what is left divided by rows and not written over.
void join_norms(Program& program, const Graph& graph, const std::vector<std::unique_ptr<Device>>& devices, const PeerMemory& memory,
                const std::vector<DevicePtr>& faults);

}  // namespace ggml_tp
