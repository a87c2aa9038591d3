// One all_reduce over groups of one rank each, for a host that divides models by itself (llama.cpp's -sm tensor): what it looks up in a
// registration as ggml_backend_comm_*.
#pragma once
#include <atomic>
#include <list>
#include <string>
#include <vector>

#include "group.h"

namespace ggml_tp {

class Comm {
  public:
    /// Connects the groups, which must have one rank each, and lets them overlap from now on. Throws Error.
    explicit Comm(std::vector<Group*> groups);
    ~Comm();
    Comm(const Comm&) = delete;
    Comm& operator=(const Comm&) = delete;

    struct Summand {
        Buffer* buffer = nullptr;  // a compute buffer of the group at the same index
        i64 offset = 0;            // bytes; f32 elements
        bool is_zero = false;      // the host has not computed it: it counts as zeros
    };
    /// Sums the summands in place, on each group's stream; does not wait. False: a peer was late before, or its memory is not where it must
    /// be; nothing was touched, the host has to add them up by itself. Throws Error when a device or NCCL fails.
    bool all_reduce(const std::vector<Summand>& summands, i64 elems);

    /// What a user should know, or empty.
    const std::string& notes() const { return notes_; }

  private:
    /// One all_reduce of every rank, captured: NCCL starts it in half the time (two H100, 16 KB: 6.9 us, 15.3 without a graph), and an
    /// abort keeps a communicator's memory for as long as a graph holds it.
    struct Captured {
        std::vector<void*> pointers;  // by rank
        i64 elems;
        std::vector<Handle> executables;
    };
    const Captured& captured(const std::vector<void*>& pointers, i64 elems);
    static void destroy(const Driver& driver, const Captured& captured);
    void give_up();

    std::vector<Group*> groups_;  // by rank of this all_reduce; as their devices, they live as long as the process
    std::vector<Handle> comms_;
    std::list<Captured> captured_;  // the last used first
    Workers workers_;
    std::string notes_;
    std::atomic<bool> broken_{false};
};

}  // namespace ggml_tp
