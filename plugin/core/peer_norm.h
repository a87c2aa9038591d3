// An all_reduce and the norm behind it become one launch (cuda_src/norm_peers.cu). Of many columns a rank adds up and normalises its share of the rows and
// stores what the next products read into all peers' memory; the residual stays divided by rows, where only such launches read it. Of few columns ranks push
// their summands to each other and each does all rows.
#pragma once
#include "program.h"

namespace ggml_tp {

/// What ranks count their peers' launches with, and where these push to.
class PeerMemory {
  public:
    /// Every rank has a device of its own, and reads and stores to every other's memory. pull_bytes: of an all_reduce whose rows norms pull, at least.
    /// push_bytes: what a rank may send to push one. Throws Error when memory is short.
    PeerMemory(const std::vector<std::unique_ptr<Device>>& devices, i64 pull_bytes, i64 push_bytes, double deadline_s);

    /// After a failure: counters and inboxes as at the start. No kernel may run.
    void reset() const;

    PeerState* state(int rank) const { return reinterpret_cast<PeerState*>(states_[static_cast<size_t>(rank)].pointer()); }
    u64* inbox(int rank) const { return reinterpret_cast<u64*>(inboxes_[static_cast<size_t>(rank)].pointer()); }
    /// Whether an all_reduce of so many bytes may be pushed.
    bool pushes(i64 bytes) const { return bytes * (n_ranks - 1) <= push_bytes; }
    const int n_ranks;
    const i64 pull_bytes, push_bytes;
    const i64 inbox_words;  // of a sender, see PushNormArgs
    const double deadline_s;

  private:
    size_t inbox_bytes() const { return static_cast<size_t>(2 * n_ranks * inbox_words) * sizeof(u64); }

    std::vector<DeviceBlock> states_, inboxes_;
};

/// One rank's launch of it. norms: every rank's, b being its summand. whole_sum, whole_normed: all ranks get every row of norm.sum and of norm.y, which
/// else only the row's owner has. No kernel: not these shapes.
RankLaunch pull_norm(const std::vector<FusedNormArgs>& norms, int rank, bool whole_sum, bool whole_normed, Arch arch, const PeerMemory& memory,
                     DevicePtr fault);
/// The same, pushed; summand: where it is pieces. norm.b, or norm.a where there is no residual, is the summand's place.
RankLaunch push_norm(const FusedNormArgs& norm, const Pieces& summand, int rank, Arch arch, const PeerMemory& memory, DevicePtr fault);

/// Adds to program.survivors what is left divided by rows and not written over.
void join_norms(Program& program, const Graph& graph, const std::vector<std::unique_ptr<Device>>& devices, const PeerMemory& memory,
                const std::vector<DevicePtr>& faults);

}  // namespace ggml_tp
