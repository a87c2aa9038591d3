// Program: what runs for one plan, per rank and in order: kernels with their arguments and collectives, everything resolved.
// Captured once into one CUDA graph per rank and replayed.
#pragma once
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "launch.h"
#include "plan.h"

namespace ggml_tp {

enum class WireType : int { kI32 = 2, kF32 = 7 };  // ncclInt32, ncclFloat32

struct RankLaunch {
    Launch launch;  // kernel == nullptr: this rank has nothing to do in this step
    Handle function = nullptr;
    std::vector<char> args;
};

template <class Args>
Args args_of(const RankLaunch& l) {
    Args args;
    std::memcpy(&args, l.args.data(), sizeof args);
    return args;
}
/// False, and l as it was, where the kernel cannot run these arguments.
template <class Args>
bool replace(RankLaunch& l, const Launch& launch, const Args& args) {
    if (!launch.kernel) return false;
    l.launch = launch;
    l.function = nullptr;
    l.args.resize(sizeof args);
    std::memcpy(l.args.data(), &args, sizeof args);
    return true;
}
/// Whether a launch refers to an address among these: its arguments are words, and pointers are aligned in them.
inline bool refers_into(const RankLaunch& l, const char* begin, i64 bytes) {
    for (size_t at = 0; at + sizeof begin <= l.args.size(); at += sizeof begin) {
        u64 word;
        std::memcpy(&word, l.args.data() + at, sizeof word);
        if (word - reinterpret_cast<u64>(begin) < static_cast<u64>(bytes)) return true;
    }
    return false;
}
inline bool refers_to(const RankLaunch& l, const char* pointer) { return refers_into(l, pointer, 1); }

struct ProgramStep {
    enum Kind { kLaunch, kAllReduce } kind = kLaunch;
    std::string label;
    std::vector<int> tensors;          // of the graph that it computes, or reduces
    std::string detail;                // whole lines: the stages of a persistent kernel
    std::vector<RankLaunch> launches;  // kLaunch: [n_ranks]
    std::vector<DevicePtr> pointers;   // kAllReduce, in place: [n_ranks]
    i64 elems = 0;
    WireType wire = WireType::kF32;
};

struct Program {
    std::vector<ProgramStep> steps;
    std::vector<Handle> executables;  // [n_ranks], once captured
    std::vector<DeviceBlock> blocks;  // device memory of this program alone
    /// Rows of a table in the host's memory: gathered and sent before a launch, as they lie there. Behind them their numbers here, 0, 1, ...
    struct HostRows {
        std::string name;
        const char* table;
        i64 row_bytes, n_table, n;
        Buffer* ids;  // n I32 at ids_offset
        i64 ids_offset;
        char* pinned;
        std::vector<DevicePtr> to;  // [n_ranks]
        bool is_pinned = false;     // else the driver had no more of it: ordinary memory, which kernels cannot read
        i64 ids_at() const { return (n * row_bytes + 255) / 256 * 256; }
        i64 bytes() const { return (ids_at() + n * 4 + 255) / 256 * 256; }
    };
    std::vector<HostRows> host_rows;
    struct Written {
        Buffer* buffer;
        i64 offset, bytes;
    };
    std::vector<Written> written;  // compute memory that the graph wrote
    struct Survivor {
        Buffer* buffer;
        Residency residency;
    };
    std::vector<Survivor> survivors;
    struct Leaf {
        Buffer* buffer;
        i64 offset, bytes;
        std::optional<Extent> extent;  // how an earlier graph left it
    };
    std::vector<Leaf> leaves;            // compute memory that the graph reads and earlier graphs may have written
    std::vector<const Buffer*> buffers;  // all that the arguments point into: when one goes, so does the program
    int all_reduces = 0, all_gathers = 0, kernel_launches = 0;
    u64 key = 0;
    std::string plan_text;

    std::string to_text() const;
};

/// Scratch memory of one rank group: grows when a program is built, never while one runs.
class Scratch {
  public:
    explicit Scratch(std::vector<std::unique_ptr<Device>>& devices) : devices_(devices), pointers_(devices.size()) {}
    ~Scratch();
    /// Two places on every rank, of at least so many bytes. True: they lie elsewhere than before. Older programs keep the memory that they were built with.
    bool grow(i64 bytes, i64 partial_bytes = 0);
    DevicePtr pointer(int rank) const { return pointers_[rank]; }
    DevicePtr partials(int rank) const { return pointers_[rank] + static_cast<u64>(bytes_); }

  private:
    std::vector<std::unique_ptr<Device>>& devices_;
    std::vector<DevicePtr> pointers_;
    std::vector<std::pair<int, DevicePtr>> retired_;
    i64 bytes_ = 0, partial_bytes_ = 0;
};

/// Where rows of the host's tables are gathered and sent to, of one graph at a time: like Scratch, and in pinned memory of the host.
class RowStaging {
  public:
    RowStaging(std::vector<std::unique_ptr<Device>>& devices, Memory& memory) : memory_(memory), device_(devices) {}
    ~RowStaging();
    bool grow(i64 bytes);
    DevicePtr pointer(int rank) const { return device_.pointer(rank); }
    char* pinned() const { return pinned_.empty() ? nullptr : pinned_.back(); }

  private:
    Memory& memory_;
    Scratch device_;
    std::vector<char*> pinned_;  // the last one is the largest
    i64 bytes_ = 0;
};

class StreamMemory;  // persist.h
class PeerMemory;    // peer_norm.h

struct LoweringContext {
    Memory& memory;
    std::vector<std::unique_ptr<Device>>& devices;
    Scratch& scratch;
    RowStaging& rows;
    const std::vector<DevicePtr>& faults;  // [n_ranks] one u32 each, device addresses
    const StreamMemory* stream;            // of the persistent kernel; null: a kernel per step
    const PeerMemory* peers;               // null: no norms that reduce
};

std::unique_ptr<Program> lower(const Graph& graph, const Plan& plan, LoweringContext context);

/// Whether kernels exist for the one operation of this graph, on every one of these architectures.
bool can_lower(const Graph& operation, const std::vector<Arch>& archs);

}  // namespace ggml_tp
