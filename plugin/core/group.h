// A group of ranks that a host sees as one device: owns the devices, their memory, communicators, workers and cached programs, and
// takes a host graph through graph -> plan -> program -> ranks.
#pragma once
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "config.h"
#include "device.h"
#include "graph.h"
#include "memory.h"
#include "peers.h"
#include "peer_norm.h"
#include "persist.h"
#include "program.h"
#include "runner.h"

namespace ggml_tp {

struct Counters {
    u64 graphs_computed = 0, programs_built = 0, graph_launches_per_rank = 0, weights_resharded = 0;
    u64 last_all_reduces = 0, last_all_gathers = 0, last_kernel_launches = 0;
    u64 host_all_reduces = 0;  // among groups, asked for by the host
    u64 graphs_unread = 0;     // batches of a prompt but the last: the host goes on with the next one's inputs while they run
};

/// Ways to reduce, as numbered in inspect.h.
enum class Reduce { kNccl = 0, kNcclGraph = 1, kNcclSymmetric = 2, kPull = 3, kPush = 4 };

struct Rates {
    double read = 0, copy = 0;  // bytes per second; a copy counts what it reads and what it writes
};

class Group {
  public:
    /// Throws Error with one line when there is no device or library to run on.
    Group(const Config& config, const std::string& plugin_dir);
    ~Group();

    /// Runs the host's graph to its end. Throws Error; the next graph may run.
    void compute(const abi::Host& host, void* cgraph, BufferOf buffer_of, void* context);
    /// While there are such owners compute() returns when the graph is launched; whoever reads results calls finish() first. `give_up` is
    /// called, with the mutex held, when ranks fail or are late: it ends what they wait for from outside of this group.
    void overlap(const void* owner, std::function<void()> give_up);
    void end_overlap(const void* owner);
    /// Waits for what was launched. Throws Error when that failed.
    void finish();
    /// An all_reduce with other groups was enqueued: finish() has to wait for it.
    void expect_all_reduce() { in_flight_ = true, ++counters.host_all_reduces; }
    Driver& driver() { return driver_; }
    Device& device(int rank) { return *devices_[static_cast<size_t>(rank)]; }
    bool supports(const abi::Host& host, const void* operation) const;
    /// Frees a buffer of the host, and the captured programs that point into it: contexts come and go, their graphs must go as well.
    void release(Buffer& buffer);

    /// For tests: the rank's next graph begins that much later on its device.
    void delay(int rank, double seconds);
    /// What a user should know of the devices, or empty.
    const std::string& notes() const { return notes_; }
    Rates measure(int rank, u64 bytes, int rounds);
    bool can_reduce(Reduce how, u64 bytes);
    /// Seconds of one f32 all_reduce of `bytes`, one of `rounds` in a row.
    double time_all_reduce(u64 bytes, Reduce how, int rounds);
    size_t n_programs() const { return programs_.size(); }

    int n_ranks() const { return static_cast<int>(devices_.size()); }
    std::string description() const;
    std::string devices_text() const;
    /// Where the time of the last program went, on rank 0; empty without a persistent kernel.
    std::string stage_times() const;
    const Config config;
    std::mutex mutex;  // of everything below: several backend instances may call from several threads
    std::unique_ptr<Memory> memory;
    Counters counters;
    std::string last_plan, last_program;

  private:
    /// The program of a graph that the host says it has not changed since (same uid), without reading it; null: read it.
    Program* program_seen(u64 uid, const void* cgraph, int n_nodes);
    Program& program_for(const Graph& graph);
    std::unique_ptr<Program> build(const Graph& graph_in, u64 key);
    void capture(Program& program);
    std::vector<RankLaunch> timed_norms(const std::vector<DevicePtr>& buffers, size_t elems, Reduce how);
    void gather(const Program::HostRows& rows);
    void record(const Program& program, int rank);
    void connect();
    void destroy(Program& program);
    void drop_programs();
    void fail();
    void wait_for_ranks();
    void check_faults() const;

    Driver driver_;
    std::vector<std::unique_ptr<Device>> devices_;
    std::unique_ptr<Scratch> scratch_;
    std::unique_ptr<RowStaging> rows_;
    std::unique_ptr<StreamMemory> stream_;     // null: no persistent kernel here
    std::unique_ptr<PeerMemory> peer_memory_;  // null: not all ranks reach each other's memory, or some share a device
    Peers peers_;
    std::string notes_;
    std::vector<std::pair<int, double>> delays_;
    std::vector<Handle> comms_;  // [n_ranks], empty until the first plan
    std::vector<volatile u32*> faults_;
    std::vector<DevicePtr> fault_pointers_;
    std::unique_ptr<Workers> workers_;
    std::list<std::unique_ptr<Program>> programs_;  // most recently used first
    struct Seen {
        u64 uid = 0, epoch = 0;
        const void* cgraph = nullptr;
        int n_nodes = 0;
        Program* program = nullptr;
    };
    std::vector<std::pair<const void*, std::function<void()>>> overlaps_;  // owner, give_up; not empty: compute() does not wait
    bool in_flight_ = false;
    std::vector<Seen> seen_;  // at most one per program, forgotten with it
};

}  // namespace ggml_tp
