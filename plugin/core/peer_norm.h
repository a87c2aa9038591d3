// An all_reduce and the norm behind it become one launch (cuda_src/norm_peers.cu). Of many columns a rank adds up and normalises its share of the rows and
// stores what the next products read into all peers' memory; the residual stays divided by rows, where only such launches read it. Of few columns ranks push
// their summands to each other and each does all rows.
#pragma once
#include <optional>

#include "program.h"

namespace ggml_tp {

/// As words that say that they are there, or behind flags that do.
enum Push { kTagged = 0, kFlagged = 1 };

/// What ranks count their peers' launches with, and where these push to.
class PeerMemory {
  public:
    /// Every rank has a device of its own, and reads and stores to every other's memory. pull_bytes: of an all_reduce whose rows norms pull, at least.
    /// push_bytes: what a rank may send to push one. Throws Error when memory is short.
    PeerMemory(const std::vector<std::unique_ptr<Device>>& devices, i64 pull_bytes, i64 push_bytes, double deadline_s);

    /// After a failure: counters and inboxes as at the start. No kernel may run.
    void reset() const;

    PeerState* state(int rank) const { return reinterpret_cast<PeerState*>(states_[static_cast<size_t>(rank)].pointer()); }
    /// What every rank's memory has for either way to push; see PushNormArgs.
    struct Inbox {
        i64 begin, sender_bytes, flags_at;
    };
    const Inbox& inbox(Push way) const { return inboxes_[way]; }
    char* inbox(Push way, int rank) const {
        return reinterpret_cast<char*>(pushed_[static_cast<size_t>(rank)].pointer() + static_cast<u64>(inboxes_[way].begin));
    }
    /// The way for an all_reduce of so many bytes; nothing: NCCL's, or the norm pulls.
    std::optional<Push> way_of(i64 bytes) const;
    const int n_ranks;
    const i64 pull_bytes, push_bytes;
    const double deadline_s;

  private:
    Inbox inboxes_[2];
    size_t inbox_bytes_;
    std::vector<DeviceBlock> states_, pushed_;
};

/// One rank's launch of it. norms: every rank's, b being its summand. whole_sum, whole_normed: all ranks get every row of norm.sum and of norm.y, which
/// else only the row's owner has. No kernel: not these shapes.
RankLaunch pull_norm(const std::vector<FusedNormArgs>& norms, int rank, bool whole_sum, bool whole_normed, Arch arch, const PeerMemory& memory,
                     DevicePtr fault);
/// The same, pushed; summand: where it is pieces. norm.b, or norm.a where there is no residual, is the summand's place.
RankLaunch push_norm(Push way, const FusedNormArgs& norm, const Pieces& summand, int rank, Arch arch, const PeerMemory& memory, DevicePtr fault);

/// Adds to program.survivors what is left divided by rows and not written over.
void join_norms(Program& program, const Graph& graph, const std::vector<std::unique_ptr<Device>>& devices, const PeerMemory& memory,
                const std::vector<DevicePtr>& faults);

}  // namespace ggml_tp
