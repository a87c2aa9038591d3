// Runs of launches that the persistent kernel (cuda_src/stream.cu) can do become one launch of it, with a table of stages; an all_reduce
// between them becomes stores into the peers' memory. Whatever it does not know stays a launch of its own, between two such runs.
#pragma once
#include "program.h"
#include "stream.h"

namespace ggml_tp {

/// What the persistent kernels of a group share, per rank: counters, vectors that only they read and write, and inboxes for peers' sums.
class StreamMemory {
  public:
    /// peers: every rank's memory can be stored to from every other rank's device. Throws Error when memory is short.
    StreamMemory(std::vector<std::unique_ptr<Device>>& devices, bool peers, double deadline_s);

    /// After a failure: counters and inboxes as at the start. No kernel may run.
    void reset() const;

    struct Rank {
        DeviceBlock block;
        size_t bytes = 0;
        StreamState* state = nullptr;
        float* vectors[20] = {};  // kStreamMostK floats each: rank_run.h, Vector
        u64* inbox = nullptr;     // twice [n_ranks][kStreamMostK]: see StreamReduce
        u32 n_blocks = 0;         // of a launch
    };
    std::vector<Rank> ranks;
    const bool peers;       // several ranks, and all of them can be reached
    const i64 inbox_words;  // of one of the two
    const double deadline_s;
};

/// Whether these devices run it: each sm_90 or newer, with room for its ring.
bool can_persist(const std::vector<std::unique_ptr<Device>>& devices);

void persist(Program& program, std::vector<std::unique_ptr<Device>>& devices, const StreamMemory& memory, const std::vector<DevicePtr>& faults);

/// Of the persistent kernels of a program that has run: a line per stage, cycles that block 0 waited, spent on the
/// input, on the rest, and until its results were stored.
std::string stage_times(const Program& program, const Device& device);

}  // namespace ggml_tp
