// Where tensors live. The host sees one range of addresses per buffer that nothing is ever stored at; behind it
//  - a compute buffer is held whole by every rank (a shard is a restriction of ranges, strides stay the host's);
//  - a stored tensor (weight, KV cache, anything in a buffer that is not for compute) is held compactly: each rank its shard.
// The maps from the host's bytes to the ranks' bytes are here and nowhere else.
#pragma once
#include <atomic>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "args.h"
#include "device.h"
#include "inputs.h"
#include "sharding.h"
#include "weight_format.h"
#include "weights.h"

namespace ggml_tp {

/// One rank's piece of a weight matrix: blocks [block_begin, block_end) of its rows, segment after segment. A row is planes of fields (weight_format.h), one
/// behind the other, so that any number of rows is one copy; each may have a few bytes behind it that nobody reads.
struct PlaneLayout {
    i64 block_begin = 0, block_end = 0;
    Ranges rows;  // [n_segments]
    i64 n_rows() const;
    i64 plane_offset[4] = {};  // within a row
    i64 row_stride = 0, matrix_stride = 0;
    i64 bytes = 0;
};
PlaneLayout plane_layout(const WeightFormat& format, const i64 ne[4], const Sharding& sharding, int rank);

struct Buffer;

struct Stored {
    std::string name;
    Buffer* buffer = nullptr;
    int type = 0;
    i64 ne[4] = {1, 1, 1, 1}, nb[4] = {};
    i64 offset = 0, bytes = 0;  // within its buffer, in the host's layout
    Role role = Role::kReplicated;
    const WeightFormat* format = nullptr;  // set: repacked planes, sharded by `sharding` on axis 0 or 1
    Sharding sharding;
    std::optional<Extent> extent;  // plain bytes: how they are divided; nullopt: every rank has all
    bool confirmed = false;        // a plan derived this sharding from the graph's structure
    bool pristine = true;          // only ever cleared
    unsigned char fill = 0;
    std::vector<DevicePtr> shard;  // [n_ranks]
    std::vector<PlaneLayout> planes;

    bool is_sharded() const { return format ? sharding.kind == Sharding::kSharded : extent.has_value(); }
    i64 local_bytes(int rank) const;
    /// Bytes of one period on this rank: its segments side by side.
    i64 local_period(int rank) const;
    /// Where byte `at` of a period lies in this rank's; -1: not there.
    i64 local_offset(int rank, i64 at) const;
    /// How it lies, and its bytes on every rank.
    std::string to_text(int n_ranks) const;
};

/// Role, format and the guessed layout of a tensor whose name, type, shape and strides are set.
void guess_layout(Stored& tensor, int n_ranks, const std::vector<double>& split);
/// The planes that follow from its layout; what local_bytes() counts.
void lay_out_planes(Stored& tensor, int n_ranks);

/// A region of a compute buffer whose bytes are valid on their owners only, or are summands.
struct Residency {
    i64 offset = 0, bytes = 0;
    Extent extent;
};

struct Buffer {
    u64 base = 0;
    i64 size = 0;
    bool is_compute = false;
    std::vector<DevicePtr> compute;                 // [n_ranks], when is_compute
    std::map<i64, std::unique_ptr<Stored>> stored;  // by offset
    std::vector<Residency> residency;
    /// How exactly this region was left divided; nullopt: whole on every rank.
    std::optional<Extent> extent_at(i64 offset, i64 bytes) const {
        for (const Residency& r : residency)
            if (r.offset == offset && r.bytes == bytes) return r.extent;
        return std::nullopt;
    }
    bool refused = false;  // there was no memory for its compute buffers; said once
    i64 announced_bytes = 0;
    struct Hole {
        DevicePtr base;
        i64 bytes;
        size_t chunk;
    };
    std::vector<std::vector<DevicePtr>> chunks;  // [rank]
    std::vector<std::vector<Hole>> holes;        // [rank], by address; neighbours of one chunk are one hole
};

class Memory {
  public:
    Memory(std::vector<std::unique_ptr<Device>>& devices, const std::vector<double>& split);
    ~Memory();

    /// Reserves addresses only. Throws Error when `bytes` cannot fit the ranks together.
    std::unique_ptr<Buffer> reserve(i64 bytes);
    void release(Buffer& buffer);
    void make_compute(Buffer& buffer);
    /// Announces a stored tensor, guesses its sharding and allocates its shards. A view or a second announcement changes nothing.
    Stored& announce(Buffer& buffer, Stored tensor);
    /// The stored tensor that holds `offset`, or null.
    static Stored* find(const Buffer& buffer, i64 offset);

    void write(Buffer& buffer, i64 offset, const void* data, i64 bytes);
    /// Small inputs of a graph are kept until it is launched: to be sent before anything else that is enqueued on the ranks' streams may read or overwrite
    /// them. Of one rank, by any thread; inputs_enqueued() after all of them. None of it waits.
    InputCopies pending_inputs(int rank) const;
    void inputs_enqueued() { inputs_.clear(); }
    void enqueue_inputs();  // to all ranks
    void read(Buffer& buffer, i64 offset, void* data, i64 bytes);
    void fill(Buffer& buffer, i64 offset, unsigned char value, i64 bytes);
    /// Lays a stored tensor out anew, keeping its contents.
    void reshard(Buffer& buffer, Stored& tensor, const Sharding& sharding, const std::optional<Extent>& extent);

    /// Whether a model's first layer begins here, with a norm: embeddings are wanted here then, as they are.
    bool has_first_layer() const { return first_norms_.load() > 0; }
    /// What was written there and is not yet enqueued; null: not all of it.
    const char* pending_input(const Buffer& buffer, i64 offset, i64 bytes) const;

    /// Memory of the host that all devices copy to and from directly; ordinary memory where the driver has no more of it to give. Throws Error
    /// when there is neither.
    char* allocate_pinned(i64 bytes);
    void release_pinned(char* memory);
    /// Whether these bytes are such memory, which devices read, and not the ordinary one.
    bool is_pinned(const void* data, i64 bytes) const;

    /// A rank's rows of one segment of a weight.
    Matrix matrix(const Stored& tensor, int rank, int segment = 0) const;
    /// What the host may be told: how large a model and cache may be, cut as they will be, before the first rank is full. What a context
    /// needs beyond what the host counts is kept back: every rank has the whole compute buffer, communicators, captured graphs.
    void report(size_t* free_bytes, size_t* total_bytes) const;
    u64 weight_bytes(int rank) const { return weight_bytes_[rank]; }
    u64 kv_bytes(int rank) const { return kv_bytes_[rank]; }
    u64 compute_bytes(int rank) const { return compute_bytes_[rank]; }
    int n_ranks() const { return static_cast<int>(devices_.size()); }
    const std::vector<double>& split() const { return split_; }
    void wait_all() const;
    double deadline_s = 60;
    /// Counts every change of where tensors lie: what was derived from an older count may be stale.
    u64 layout_epoch() const { return epoch_; }

  private:
    /// Pinned memory that devices read while the host goes on. Small inputs (a token's position, mask, embedding) are copied here
    /// and need no wait: 9 of them cost a decoded token 9 round trips otherwise.
    char* in_ring(i64 bytes);
    struct Input {
        const Buffer* buffer;
        i64 offset;
        const char* data;  // in the ring
        i64 bytes;
    };
    void add_input(const Input& input);
    struct Piece {
        int rank;
        DevicePtr device;
        i64 host_offset, bytes;
    };
    void allocate_shards(Buffer& buffer, Stored& tensor);
    void account(const Stored& tensor, int sign);
    DevicePtr take(Buffer& buffer, int rank, i64 bytes);
    void give_back(Buffer& buffer, int rank, DevicePtr base, i64 bytes);
    void give_back_shards(Buffer& buffer, Stored& tensor);
    double share(int rank) const;
    u64 kept_back(int rank, u64 device_bytes) const;
    /// The host's bytes that fit when the tightest device has `of(rank)` bytes to give.
    template <class F>
    size_t fitting(F&& of) const;
    /// Device pieces of bytes [begin, begin + bytes) of a plainly stored tensor; all owners, or the first owner of each byte.
    std::vector<Piece> pieces(const Stored& tensor, i64 begin, i64 bytes, bool all_owners) const;
    /// The part of [offset, offset + bytes) that lies in a region of summands: f32, added up in the order of ranks.
    void read_sums(const Buffer& buffer, const Residency& region, i64 offset, char* data, i64 bytes);
    void transfer_planes(Stored& tensor, i64 begin, char* data, i64 bytes, bool to_host);
    void write_stored(Stored& tensor, i64 begin, const char* data, i64 bytes);
    void read_stored(Stored& tensor, i64 begin, char* data, i64 bytes);

    std::vector<std::unique_ptr<Device>>& devices_;
    std::vector<double> split_;
    u64 epoch_ = 0;
    std::atomic<int> first_norms_ = 0;  // hosts ask without a lock
    struct Pinned {
        i64 bytes;
        bool by_driver;
    };
    std::map<const char*, Pinned> pinned_;  // by address
    std::vector<Input> inputs_;             // written, not yet enqueued; no two overlap
    std::vector<Handle> copy_inputs_;       // each rank's kernel
    char* ring_ = nullptr;
    i64 ring_used_ = 0;
    std::vector<DevicePtr> staging_;  // one per rank, kStagingBytes
    std::vector<u64> weight_bytes_, kv_bytes_, compute_bytes_;
};

}  // namespace ggml_tp
