#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "repack.h"

namespace ggml_tp {
namespace {

constexpr i64 kStagingBytes = 16 << 20;  // per rank; one upload step
constexpr i64 kRingBytes = 4 << 20;      // pinned, for inputs and results of a token; a vocabulary of 128k is 0.5 MB of logits
// Of pinned memory, inputs from this size on are copied from where they are and waited for: about what two copies by the CPU take.
constexpr i64 kDirectBytes = 128 << 10;
constexpr i64 kAlign = 256;  // of shards and planes: 16-byte loads, and what cuMemAlloc gives
// Planes begin at multiples of what bulk copies and wide loads take: 2,880 weights of MXFP4 have 90 bytes of scales and are 0.4 % longer for it, 96 of Q4_0, as a
// small expert's rows on eight ranks have, 19 %. A type of one plane only where that is at most a 32nd of a row.
constexpr i64 kRowAlign = 16, kRowsPerPadding = 32;
constexpr unsigned kHostAllocPortable = 1;
// Per rank: 512 MiB of mask at 512 Ki cells, 260 MB of logits of a batch, NCCL's channels, graphs.
constexpr u64 kKeptBackBytes = 1ull << 30;
constexpr i64 kChunkBytes = 256 << 20;  // drivers hand out 2 MiB at a time: less than 1 % lost
i64 round_up(i64 value, i64 to) { return (value + to - 1) / to * to; }

/// What a model's first layer begins with.
bool is_first_norm(const Stored& tensor) { return tensor.name == "blk.0.attn_norm.weight"; }

bool overlaps(i64 a, i64 a_bytes, i64 b, i64 b_bytes) { return a < b + b_bytes && b < a + a_bytes; }

}  // namespace

PlaneLayout plane_layout(const WeightFormat& format, const i64 ne[4], const Sharding& sharding, int rank) {
    PlaneLayout out;
    i64 k_begin = 0, k_end = ne[0];
    if (sharding.kind == Sharding::kSharded && sharding.axis == 0) k_begin = sharding.ranges[rank].begin, k_end = sharding.ranges[rank].end;
    if (sharding.kind == Sharding::kSharded && sharding.axis == 1)
        for (int i = 0; i < sharding.n_segments(); ++i) out.rows.push_back(sharding.segment(i).ranges[rank]);
    else out.rows = {{0, ne[1]}};
    // A cut inside a block is stored on both sides; the products mask the foreign half (MulMatArgs::k_begin, k_end).
    out.block_begin = k_begin / format.block_elems;
    out.block_end = k_end > k_begin ? (k_end + format.block_elems - 1) / format.block_elems : out.block_begin;
    const i64 blocks = out.block_end - out.block_begin, rows = out.n_rows(), matrices = ne[2] * ne[3];
    i64 padding = 0;
    for (int f = 0; f < format.n_fields; ++f) padding += round_up(blocks * format.field[f].bytes, kRowAlign) - blocks * format.field[f].bytes;
    const i64 row_align = format.n_fields > 1 || padding * kRowsPerPadding <= blocks * format.block_bytes ? kRowAlign : 1;
    for (int f = 0; f < format.n_fields; ++f) {
        out.plane_offset[f] = out.row_stride;
        out.row_stride = round_up(out.row_stride + blocks * format.field[f].bytes, row_align);
    }
    out.matrix_stride = rows * out.row_stride;
    out.bytes = round_up(matrices * out.matrix_stride, kAlign);
    return out;
}

i64 PlaneLayout::n_rows() const {
    i64 n = 0;
    for (const Range& range : rows) n += range.size();
    return n;
}

i64 Stored::local_bytes(int rank) const {
    if (format) return planes[rank].bytes;
    if (!extent) return bytes;
    return bytes / extent->period_bytes * local_period(rank);
}

i64 Stored::local_period(int rank) const {
    i64 sum = 0;
    for (int s = 0; s < extent->n_segments(); ++s) sum += extent->segment(s)[static_cast<size_t>(rank)].size();
    return sum;
}

i64 Stored::local_offset(int rank, i64 at) const {
    i64 before = 0;
    for (int s = 0; s < extent->n_segments(); ++s) {
        const Range& own = extent->segment(s)[static_cast<size_t>(rank)];
        if (own.begin <= at && at < own.end) return before + at - own.begin;
        before += own.size();
    }
    return -1;
}

std::string Stored::to_text(int n_ranks) const {
    Sharding lies = format ? sharding : replicated();
    std::string out;
    if (!format && extent) {
        const WeightFormat* blocks = find_weight_format(type);
        const Strided strided{{ne[0], ne[1], ne[2], ne[3]}, {nb[0], nb[1], nb[2], nb[3]}, 0, nb[0], blocks ? blocks->block_elems : 1};
        if (const auto elements = sharding_of(*extent, strided)) {
            lies = *elements;
        } else {  // cut inside of an element: bytes say it
            out = "sharded by bytes of " + std::to_string(extent->period_bytes);
            for (int s = 0; s < extent->n_segments(); ++s) {
                if (s) out += " |";
                for (const Range& range : extent->segment(s)) out += " [" + std::to_string(range.begin) + "," + std::to_string(range.end) + ")";
            }
        }
    }
    if (out.empty()) out = lies.to_text();
    out += "; bytes";
    for (int r = 0; r < n_ranks; ++r) out += " " + std::to_string(local_bytes(r));
    return out;
}

void guess_layout(Stored& tensor, int n_ranks, const std::vector<double>& split) {
    tensor.role = role_of(tensor.name);
    int n_dims = 1;
    for (int d = 1; d < 4; ++d)
        if (tensor.ne[d] > 1) n_dims = d + 1;
    const WeightFormat* format = find_weight_format(tensor.type);
    Sharding guess = guess_sharding(tensor.role, tensor.ne, n_dims, n_ranks, split);
    const bool is_matrix = (tensor.role == Role::kColumn || tensor.role == Role::kSegments || tensor.role == Role::kMixer || tensor.role == Role::kRow ||
                            tensor.role == Role::kWhole) &&
                           (n_dims == 2 || n_dims == 3) && format;
    if (is_matrix) {
        tensor.format = format;
        tensor.sharding = guess;
    } else if (guess.kind == Sharding::kSharded && (!format || format->block_elems == 1 || tensor.role == Role::kKvCache)) {
        Strided strided{{tensor.ne[0], tensor.ne[1], tensor.ne[2], tensor.ne[3]}, {tensor.nb[0], tensor.nb[1], tensor.nb[2], tensor.nb[3]}, 0, tensor.nb[0]};
        if (format && format->block_elems > 1) {  // a quantised cache: cut between blocks
            strided.ne[0] /= format->block_elems;
            guess.ranges = divide(strided.ne[0], 1, n_ranks, split);
        }
        tensor.extent = extent_of(guess, strided);
    }
}

void lay_out_planes(Stored& tensor, int n_ranks) {
    tensor.planes.clear();
    if (tensor.format)
        for (int r = 0; r < n_ranks; ++r) tensor.planes.push_back(plane_layout(*tensor.format, tensor.ne, tensor.sharding, r));
}

Memory::Memory(std::vector<std::unique_ptr<Device>>& devices, const std::vector<double>& split)
    : devices_(devices), split_(split), staging_(devices.size()), weight_bytes_(devices.size()), kv_bytes_(devices.size()), compute_bytes_(devices.size()) {
    for (const auto& device : devices) copy_inputs_.push_back(device->function("copy_inputs"));
}

Memory::~Memory() {
    if (ring_) devices_[0]->driver.cuMemFreeHost(ring_);
    for (size_t r = 0; r < devices_.size(); ++r) devices_[r]->release(staging_[r]);
}

double Memory::share(int rank) const {
    double sum = 0;
    for (double part : split_) sum += part;
    return split_.empty() ? 1.0 / n_ranks() : split_[static_cast<size_t>(rank)] / sum;
}

/// Less what contexts hold of it by now. The mask alone is 1 KB a cell on every rank, beside 32 KB (1B) to 300 KB (70B) of cache that is
/// divided: the more ranks, the larger its part. Seen: 8 ranks of 1.5 GiB, 351 MiB each, which the host's fit counted once.
u64 Memory::kept_back(int rank, u64 device_bytes) const {
    const u64 n = static_cast<u64>(n_ranks()),
              wanted = n > 1 ? std::min(device_bytes * n / 40, kKeptBackBytes) : std::min(device_bytes / 64, kKeptBackBytes / 8);
    return wanted > compute_bytes_[static_cast<size_t>(rank)] ? wanted - compute_bytes_[static_cast<size_t>(rank)] : 0;
}

template <class F>
size_t Memory::fitting(F&& of) const {
    double least = 1e30;
    for (const auto& device : devices_) {
        double bytes = 0, share_here = 0;  // ranks on the same device share its memory
        for (const auto& other : devices_)
            if (other->ordinal == device->ordinal) share_here += share(other->rank);
        bytes = static_cast<double>(of(*device));
        if (share_here > 0) least = std::min(least, bytes / share_here);
    }
    return static_cast<size_t>(least);
}

void Memory::report(size_t* free_bytes, size_t* total_bytes) const {
    *free_bytes = fitting([&](const Device& device) {
        size_t free_here = 0, total_here = 0;
        device.memory(&free_here, &total_here);
        u64 kept = 0;
        for (const auto& other : devices_)
            if (other->ordinal == device.ordinal) kept += kept_back(other->rank, total_here);
        return free_here > kept ? free_here - kept : 0;
    });
    *total_bytes = fitting([&](const Device& device) {
        size_t free_here = 0, total_here = 0;
        device.memory(&free_here, &total_here);
        return total_here;
    });
}

char* Memory::allocate_pinned(i64 bytes) {
    const size_t size = static_cast<size_t>(round_up(std::max<i64>(bytes, 1), kAlign));
    void* memory = nullptr;
    devices_[0]->make_current();
    const bool by_driver = devices_[0]->driver.cuMemHostAlloc(&memory, size, kHostAllocPortable) == 0;
    if (!by_driver) memory = std::aligned_alloc(kAlign, size);
    if (!memory) throw Error("the host has no " + std::to_string(bytes >> 20) + " MiB of memory for a batch: use a smaller one");
    pinned_[static_cast<char*>(memory)] = {static_cast<i64>(size), by_driver};
    return static_cast<char*>(memory);
}

void Memory::release_pinned(char* memory) {
    const auto found = pinned_.find(memory);
    if (found == pinned_.end()) return;
    if (found->second.by_driver) devices_[0]->driver.cuMemFreeHost(memory);
    else std::free(memory);
    pinned_.erase(found);
}

bool Memory::is_pinned(const void* data, i64 bytes) const {
    const char* begin = static_cast<const char*>(data);
    auto after = pinned_.upper_bound(begin);
    if (after == pinned_.begin()) return false;
    --after;
    return after->second.by_driver && begin + bytes <= after->first + after->second.bytes;
}

char* Memory::in_ring(i64 bytes) {
    bytes = round_up(bytes, kAlign);
    if (bytes > kRingBytes / 2) return nullptr;
    if (!ring_) {
        void* memory = nullptr;
        devices_[0]->make_current();
        TP_CUDA(devices_[0]->driver, 0, cuMemHostAlloc, &memory, kRingBytes, kHostAllocPortable);
        ring_ = static_cast<char*>(memory);
    }
    if (ring_used_ + bytes > kRingBytes) {
        enqueue_inputs();
        wait_all();
        ring_used_ = 0;
    }
    ring_used_ += bytes;
    return ring_ + ring_used_ - bytes;
}

std::unique_ptr<Buffer> Memory::reserve(i64 bytes) {
    const size_t free_bytes = fitting([&](const Device& device) {
        size_t free_here = 0, total_here = 0;
        device.memory(&free_here, &total_here);
        return free_here;
    });
    if (static_cast<size_t>(bytes) > free_bytes)
        throw Error("the host asks for " + std::to_string(bytes >> 20) + " MiB, " + std::to_string(free_bytes >> 20) +
                    " MiB are free on all ranks together: use a smaller context, fewer layers or more ranks");
    auto buffer = std::make_unique<Buffer>();
    buffer->size = bytes;
    void* address = mmap(nullptr, static_cast<size_t>(std::max<i64>(bytes, 4096)), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (address == MAP_FAILED) throw Error("no addresses left for a buffer of " + std::to_string(bytes >> 20) + " MiB");
    buffer->base = reinterpret_cast<u64>(address);
    buffer->chunks.resize(devices_.size());
    buffer->holes.resize(devices_.size());
    return buffer;
}

void Memory::release(Buffer& buffer) {
    ++epoch_;
    std::erase_if(inputs_, [&](const Input& input) { return input.buffer == &buffer; });
    try {
        // Shards may still be cleared: a host frees a buffer as soon as one of its tensors had no memory.
        wait_all();
    } catch (const Error&) {  // whoever ran that stream has reported it
    }
    for (auto& [offset, tensor] : buffer.stored) account(*tensor, -1), first_norms_ -= is_first_norm(*tensor);
    for (size_t r = 0; r < devices_.size(); ++r) {
        for (const DevicePtr chunk : buffer.chunks[r]) devices_[r]->release(chunk);
        if (!buffer.compute.empty()) {
            devices_[r]->release(buffer.compute[r]);
            compute_bytes_[r] -= static_cast<u64>(buffer.size);
        }
    }
    if (buffer.base) munmap(reinterpret_cast<void*>(buffer.base), static_cast<size_t>(std::max<i64>(buffer.size, 4096)));
    buffer.base = 0;
}

void Memory::make_compute(Buffer& buffer) {
    if (buffer.is_compute) return;
    if (buffer.refused) throw Error("");
    ++epoch_;
    std::vector<DevicePtr> pointers(devices_.size());
    try {
        // All of them before anything is enqueued: a rank without memory must not free what another rank's stream still clears.
        for (size_t r = 0; r < devices_.size(); ++r) pointers[r] = devices_[r]->allocate(static_cast<size_t>(buffer.size));
        for (size_t r = 0; r < devices_.size(); ++r) {
            devices_[r]->make_current();
            TP_CUDA(devices_[r]->driver, static_cast<int>(r), cuMemsetD8Async, pointers[r], 0, static_cast<size_t>(std::max<i64>(buffer.size, 1)),
                    devices_[r]->stream);
        }
        wait_all();
    } catch (...) {
        for (size_t r = 0; r < devices_.size(); ++r) devices_[r]->release(pointers[r]);
        buffer.refused = true;  // the host announces hundreds of tensors, whatever the first one's status
        throw;
    }
    buffer.compute = pointers;
    buffer.is_compute = true;
    for (size_t r = 0; r < devices_.size(); ++r) compute_bytes_[r] += static_cast<u64>(buffer.size);
}

DevicePtr Memory::take(Buffer& buffer, int rank, i64 bytes) {
    bytes = round_up(std::max<i64>(bytes, 1), kAlign);
    auto& holes = buffer.holes[static_cast<size_t>(rank)];
    auto best = holes.end();
    for (auto it = holes.begin(); it != holes.end(); ++it)
        if (it->bytes >= bytes && (best == holes.end() || it->bytes < best->bytes)) best = it;
    if (best == holes.end()) {
        // A chunk for several tensors keeps the number of allocations small. As many of this size as fit it, and no more than the rest of the
        // buffer will need: caches are large, all of one size, and a fifth of the memory was lost to the ends of chunks.
        const double rest = static_cast<double>(buffer.size - buffer.announced_bytes) * share(rank);
        const i64 wanted = std::min<i64>(kChunkBytes, bytes + round_up(static_cast<i64>(std::max(rest, 0.0)), kAlign));
        const i64 size = wanted > bytes ? wanted / bytes * bytes : bytes;
        buffer.chunks[static_cast<size_t>(rank)].push_back(devices_[static_cast<size_t>(rank)]->allocate(static_cast<size_t>(size)));
        const Buffer::Hole hole{buffer.chunks[static_cast<size_t>(rank)].back(), size, buffer.chunks[static_cast<size_t>(rank)].size() - 1};
        best = holes.insert(std::lower_bound(holes.begin(), holes.end(), hole, [](const auto& a, const auto& b) { return a.base < b.base; }), hole);
    }
    const DevicePtr out = best->base;
    best->base += static_cast<u64>(bytes);
    best->bytes -= bytes;
    if (best->bytes == 0) holes.erase(best);
    return out;
}

void Memory::give_back(Buffer& buffer, int rank, DevicePtr base, i64 bytes) {
    if (!base) return;
    auto& chunks = buffer.chunks[static_cast<size_t>(rank)];
    auto& holes = buffer.holes[static_cast<size_t>(rank)];
    // The chunk with the highest address that is not above.
    size_t chunk = 0;
    for (size_t i = 0; i < chunks.size(); ++i)
        if (chunks[i] <= base && (chunks[chunk] > base || chunks[i] > chunks[chunk])) chunk = i;
    Buffer::Hole hole{base, round_up(std::max<i64>(bytes, 1), kAlign), chunk};
    auto it = std::lower_bound(holes.begin(), holes.end(), hole, [](const auto& a, const auto& b) { return a.base < b.base; });
    if (it != holes.end() && it->chunk == chunk && hole.base + static_cast<u64>(hole.bytes) == it->base) {
        hole.bytes += it->bytes;
        it = holes.erase(it);
    }
    if (it != holes.begin() && std::prev(it)->chunk == chunk && std::prev(it)->base + static_cast<u64>(std::prev(it)->bytes) == base)
        std::prev(it)->bytes += hole.bytes;
    else holes.insert(it, hole);
}

/// Before what divides them (sharding, extent, planes) changes.
void Memory::give_back_shards(Buffer& buffer, Stored& tensor) {
    if (tensor.shard.empty()) return;
    account(tensor, -1);
    for (int r = 0; r < n_ranks(); ++r) give_back(buffer, r, tensor.shard[r], tensor.local_bytes(r));
    tensor.shard.clear();
}

void Memory::account(const Stored& tensor, int sign) {
    for (int r = 0; r < n_ranks() && !tensor.shard.empty(); ++r) {
        if (!tensor.shard[r]) continue;
        u64& counter = tensor.role == Role::kKvCache || tensor.role == Role::kState ? kv_bytes_[r] : weight_bytes_[r];
        counter += static_cast<u64>(sign * tensor.local_bytes(r));
    }
}

void Memory::allocate_shards(Buffer& buffer, Stored& tensor) {
    ++epoch_;
    const int n = n_ranks();
    lay_out_planes(tensor, n);
    std::vector<DevicePtr> shard(n);
    try {
        for (int r = 0; r < n; ++r) shard[r] = take(buffer, r, tensor.local_bytes(r));
    } catch (...) {
        for (int r = 0; r < n; ++r) give_back(buffer, r, shard[r], tensor.local_bytes(r));
        throw;
    }
    for (int r = 0; r < n; ++r) {
        const i64 bytes = tensor.local_bytes(r);
        // Defined bytes from the start: what a host never writes (alignment gaps, unused cells) must not be NaN by accident.
        devices_[r]->make_current();
        TP_CUDA(devices_[r]->driver, r, cuMemsetD8Async, shard[r], tensor.fill, static_cast<size_t>(round_up(std::max<i64>(bytes, 1), kAlign)),
                devices_[r]->stream);
    }
    tensor.shard = shard;
    account(tensor, +1);
}

Stored& Memory::announce(Buffer& buffer, Stored tensor) {
    auto found = buffer.stored.find(tensor.offset);
    if (found != buffer.stored.end() && found->second->bytes == tensor.bytes && found->second->name == tensor.name) return *found->second;
    // The host has laid the buffer out anew (a scratch context reused): what lies under the new tensor is gone.
    for (auto it = buffer.stored.begin(); it != buffer.stored.end();) {
        if (overlaps(it->second->offset, std::max<i64>(it->second->bytes, 1), tensor.offset, std::max<i64>(tensor.bytes, 1))) {
            give_back_shards(buffer, *it->second);
            buffer.announced_bytes -= it->second->bytes;
            first_norms_ -= is_first_norm(*it->second);
            it = buffer.stored.erase(it);
        } else {
            ++it;
        }
    }
    guess_layout(tensor, n_ranks(), split_);
    tensor.buffer = &buffer;
    auto owned = std::make_unique<Stored>(std::move(tensor));
    buffer.announced_bytes += owned->bytes;
    allocate_shards(buffer, *owned);
    first_norms_ += is_first_norm(*owned);
    Stored& out = *owned;
    buffer.stored[out.offset] = std::move(owned);
    return out;
}

Stored* Memory::find(const Buffer& buffer, i64 offset) {
    auto it = buffer.stored.upper_bound(offset);
    if (it == buffer.stored.begin()) return nullptr;
    --it;
    Stored* tensor = it->second.get();
    return offset < tensor->offset + std::max<i64>(tensor->bytes, 1) ? tensor : nullptr;
}

void Memory::wait_all() const {
    for (const auto& device : devices_)
        if (!device->wait(deadline_s))
            throw Error("rank " + std::to_string(device->rank) + " did not finish a transfer within " + std::to_string(deadline_s) + " s");
}

std::vector<Memory::Piece> Memory::pieces(const Stored& tensor, i64 begin, i64 bytes, bool all_owners) const {
    std::vector<Piece> out;
    if (!tensor.extent) {
        const int n = all_owners ? n_ranks() : 1;
        for (int r = 0; r < n; ++r) out.push_back({r, tensor.shard[r] + static_cast<u64>(begin), 0, bytes});
        return out;
    }
    const i64 period = tensor.extent->period_bytes;
    for (i64 p = begin / period; p * period < begin + bytes; ++p) {
        const i64 from = std::max(begin - p * period, i64{0}), to = std::min(begin + bytes - p * period, period);
        for (int s = 0; s < tensor.extent->n_segments(); ++s) {
            i64 done = from;
            for (int r = 0; r < n_ranks(); ++r) {
                const Range& own = tensor.extent->segment(s)[static_cast<size_t>(r)];
                const i64 lo = std::max(all_owners ? from : done, own.begin), hi = std::min(to, own.end);
                if (hi <= lo) continue;
                const i64 at = p * tensor.local_period(r) + tensor.local_offset(r, lo);
                out.push_back({r, tensor.shard[r] + static_cast<u64>(at), p * period + lo - begin, hi - lo});
                done = std::max(done, hi);
            }
        }
    }
    return out;
}

void Memory::transfer_planes(Stored& tensor, i64 begin, char* data, i64 bytes, bool to_host) {
    const WeightFormat& format = *tensor.format;
    const i64 row_blocks = (tensor.ne[0] + format.block_elems - 1) / format.block_elems;
    for (i64 done = 0; done < bytes; done += kStagingBytes) {
        const i64 n = std::min(kStagingBytes, bytes - done);
        for (int r = 0; r < n_ranks(); ++r) {
            Device& device = *devices_[r];
            device.make_current();
            if (!staging_[r]) staging_[r] = device.allocate(kStagingBytes);
            const PlaneLayout& planes = tensor.planes[r];
            i64 rows_before = 0;
            for (const Range& rows : planes.rows) {
                const i64 first_row = rows_before;
                rows_before += rows.size();
                // Only the rows that this rank has: else N ranks take N times one GPU's bytes over the bus.
                i64 from = begin + done, to = from + n;
                if (tensor.ne[2] * tensor.ne[3] == 1) {
                    from = std::max(from, rows.begin * row_blocks * format.block_bytes);
                    to = std::min(to, rows.end * row_blocks * format.block_bytes);
                }
                if (to <= from || rows.size() == 0) continue;
                char* const host = data + (from - begin);
                RepackArgs args{};
                args.host = reinterpret_cast<char*>(staging_[r]);
                args.offset = from;
                args.bytes = to - from;
                args.row_blocks = row_blocks;
                args.block_begin = planes.block_begin;
                args.block_end = planes.block_end;
                args.row_begin = rows.begin;
                args.row_end = rows.end;
                args.n_rows = tensor.ne[1];
                for (int f = 0; f < format.n_fields; ++f) {
                    args.plane[f] = reinterpret_cast<char*>(tensor.shard[r]) + planes.plane_offset[f] + first_row * planes.row_stride;
                    args.field_offset[f] = format.field[f].offset;
                    args.field_bytes[f] = format.field[f].bytes;
                }
                args.row_stride = planes.row_stride;
                args.matrix_stride = planes.matrix_stride;
                args.n_fields = format.n_fields;
                args.block_bytes = format.block_bytes;
                args.to_host = to_host;
                const Launch launch = repack_launch(args, device.arch());
                // Reading: shards are laid over one another in the staging, so that each rank only fills in what it owns.
                TP_CUDA(device.driver, r, cuMemcpyHtoDAsync, staging_[r], host, static_cast<size_t>(to - from), device.stream);
                device.launch(device.function(launch.kernel), launch, &args);
                if (to_host) {
                    TP_CUDA(device.driver, r, cuMemcpyDtoHAsync, host, staging_[r], static_cast<size_t>(to - from), device.stream);
                    if (!device.wait(deadline_s)) throw Error("rank " + std::to_string(r) + " did not return a weight in time");
                }
            }
        }
        if (!to_host) wait_all();
    }
}

void Memory::write_stored(Stored& tensor, i64 begin, const char* data, i64 bytes) {
    tensor.pristine = false;
    if (tensor.format) return transfer_planes(tensor, begin, const_cast<char*>(data), bytes, false);
    for (const Piece& piece : pieces(tensor, begin, bytes, true)) {
        Device& device = *devices_[piece.rank];
        device.make_current();
        TP_CUDA(device.driver, piece.rank, cuMemcpyHtoDAsync, piece.device, data + piece.host_offset, static_cast<size_t>(piece.bytes), device.stream);
    }
    wait_all();
}

void Memory::read_stored(Stored& tensor, i64 begin, char* data, i64 bytes) {
    if (tensor.format) return transfer_planes(tensor, begin, data, bytes, true);
    for (const Piece& piece : pieces(tensor, begin, bytes, false)) {
        Device& device = *devices_[piece.rank];
        device.make_current();
        TP_CUDA(device.driver, piece.rank, cuMemcpyDtoHAsync, data + piece.host_offset, piece.device, static_cast<size_t>(piece.bytes), device.stream);
    }
    wait_all();
}

void Memory::write(Buffer& buffer, i64 offset, const void* data, i64 bytes) {
    if (offset < 0 || bytes < 0 || offset + bytes > buffer.size) throw Error("a write outside its buffer was refused");
    if (bytes == 0) return;
    if (buffer.refused) throw Error("");
    // Memory that a host took without telling of tensors in it: where it adds up summands by itself.
    if (!buffer.is_compute && buffer.stored.empty()) make_compute(buffer);
    if (buffer.is_compute) {
        std::erase_if(buffer.residency, [&](const Residency& r) { return overlaps(r.offset, r.bytes, offset, bytes); });
        char* copy = bytes >= kDirectBytes && is_pinned(data, bytes) ? nullptr : in_ring(bytes);
        if (copy) {
            std::memcpy(copy, data, static_cast<size_t>(bytes));
            return add_input({&buffer, offset, copy, bytes});
        }
        enqueue_inputs();
        for (int r = 0; r < n_ranks(); ++r) {
            Device& device = *devices_[r];
            device.make_current();
            TP_CUDA(device.driver, r, cuMemcpyHtoDAsync, buffer.compute[r] + static_cast<u64>(offset), data, static_cast<size_t>(bytes), device.stream);
        }
        return wait_all();
    }
    const char* from = static_cast<const char*>(data);
    while (bytes > 0) {
        Stored* tensor = find(buffer, offset);
        if (!tensor) throw Error("a write to an address that holds no tensor was refused");
        const i64 n = std::min(bytes, tensor->offset + tensor->bytes - offset);
        if (n <= 0) throw Error("a write beyond the end of " + tensor->name + " was refused");
        write_stored(*tensor, offset - tensor->offset, from, n);
        offset += n, from += n, bytes -= n;
    }
}

void Memory::add_input(const Input& input) {
    // Written once more before its graph: pieces of one launch have no order, launches have.
    if (std::any_of(inputs_.begin(), inputs_.end(),
                    [&](const Input& i) { return i.buffer == input.buffer && overlaps(i.offset, i.bytes, input.offset, input.bytes); }))
        enqueue_inputs();
    inputs_.push_back(input);
}

const char* Memory::pending_input(const Buffer& buffer, i64 offset, i64 bytes) const {
    for (auto input = inputs_.rbegin(); input != inputs_.rend(); ++input) {
        if (input->buffer != &buffer || !overlaps(input->offset, input->bytes, offset, bytes)) continue;
        return input->offset <= offset && offset + bytes <= input->offset + input->bytes ? input->data + (offset - input->offset) : nullptr;
    }
    return nullptr;
}

InputCopies Memory::pending_inputs(int rank) const {
    const size_t r = static_cast<size_t>(rank);
    InputCopies out(*devices_[r], copy_inputs_[r]);
    for (const Input& input : inputs_) out.add(input.data, input.buffer->compute[r] + static_cast<u64>(input.offset), input.bytes, true);
    return out;
}

void Memory::enqueue_inputs() {
    if (inputs_.empty()) return;
    for (int r = 0; r < n_ranks(); ++r) {
        devices_[static_cast<size_t>(r)]->make_current();
        pending_inputs(r).send();
    }
    inputs_enqueued();
}

void Memory::read_sums(const Buffer& buffer, const Residency& region, i64 offset, char* data, i64 bytes) {
    const i64 lo = std::max(offset, region.offset), hi = std::min(offset + bytes, region.offset + region.bytes);
    const i64 from = lo / 4 * 4, n = (round_up(hi, 4) - from) / 4;
    std::vector<float> sum(static_cast<size_t>(n)), summand(static_cast<size_t>(n));
    for (int r = 0; r < n_ranks(); ++r) {
        Device& device = *devices_[r];
        device.make_current();
        TP_CUDA(device.driver, r, cuMemcpyDtoHAsync, summand.data(), buffer.compute[r] + static_cast<u64>(from), static_cast<size_t>(n * 4), device.stream);
        if (!device.wait(deadline_s)) throw Error("rank " + std::to_string(r) + " did not return its summand in time");
        for (size_t i = 0; i < sum.size(); ++i) sum[i] = r ? sum[i] + summand[i] : summand[i];
    }
    std::memcpy(data + (lo - offset), reinterpret_cast<const char*>(sum.data()) + (lo - from), static_cast<size_t>(hi - lo));
}

void Memory::read(Buffer& buffer, i64 offset, void* data, i64 bytes) {
    if (offset < 0 || bytes < 0 || offset + bytes > buffer.size) throw Error("a read outside its buffer was refused");
    if (bytes == 0) return;
    if (buffer.is_compute) {
        enqueue_inputs();
        char* copy = is_pinned(data, bytes) ? nullptr : in_ring(bytes);
        char* to = copy ? copy : static_cast<char*>(data);
        Device& first = *devices_[0];  // replicated bytes are the same on every rank
        first.make_current();
        const Residency* covering = nullptr;
        for (const Residency& r : buffer.residency)
            if (r.offset <= offset && offset + bytes <= r.offset + r.bytes) covering = &r;
        if (!covering) {
            TP_CUDA(first.driver, 0, cuMemcpyDtoHAsync, to, buffer.compute[0] + static_cast<u64>(offset), static_cast<size_t>(bytes), first.stream);
            if (!buffer.residency.empty()) wait_all();  // what other ranks own is laid over it
        }
        for (const Residency& region : buffer.residency) {
            if (!overlaps(region.offset, region.bytes, offset, bytes)) continue;
            if (region.extent.is_partial) {
                read_sums(buffer, region, offset, to, bytes);
                continue;
            }
            const i64 lo = std::max(offset, region.offset) - region.offset, hi = std::min(offset + bytes, region.offset + region.bytes) - region.offset;
            const i64 period = region.extent.period_bytes;
            for (i64 p = lo / period; p * period < hi; ++p) {
                const i64 end = std::min(hi - p * period, period);
                for (int s = 0; s < region.extent.n_segments(); ++s) {
                    i64 done = std::max(lo - p * period, i64{0});
                    for (int r = 0; r < n_ranks(); ++r) {
                        const Range& own = region.extent.segment(s)[r];
                        const i64 a = std::max(done, i64{own.begin}), b = std::min(end, i64{own.end});
                        if (b <= a) continue;
                        Device& device = *devices_[r];
                        device.make_current();
                        const i64 at = region.offset + p * period + a;
                        TP_CUDA(device.driver, r, cuMemcpyDtoHAsync, to + (at - offset), buffer.compute[r] + static_cast<u64>(at), static_cast<size_t>(b - a),
                                device.stream);
                        done = b;
                    }
                }
            }
        }
        wait_all();
        if (copy) std::memcpy(data, copy, static_cast<size_t>(bytes));
        return;
    }
    char* to = static_cast<char*>(data);
    while (bytes > 0) {
        Stored* tensor = find(buffer, offset);
        if (!tensor) throw Error("a read from an address that holds no tensor was refused");
        const i64 n = std::min(bytes, tensor->offset + tensor->bytes - offset);
        if (n <= 0) throw Error("a read beyond the end of " + tensor->name + " was refused");
        read_stored(*tensor, offset - tensor->offset, to, n);
        offset += n, to += n, bytes -= n;
    }
}

void Memory::fill(Buffer& buffer, i64 offset, unsigned char value, i64 bytes) {
    if (offset < 0 || bytes < 0 || offset + bytes > buffer.size) throw Error("a fill outside its buffer was refused");
    if (buffer.is_compute) {
        std::erase_if(buffer.residency, [&](const Residency& r) { return overlaps(r.offset, r.bytes, offset, bytes); });
        enqueue_inputs();
        for (int r = 0; r < n_ranks() && bytes; ++r) {
            devices_[r]->make_current();
            TP_CUDA(devices_[r]->driver, r, cuMemsetD8Async, buffer.compute[r] + static_cast<u64>(offset), value, static_cast<size_t>(bytes),
                    devices_[r]->stream);
        }
        return wait_all();
    }
    for (auto& [start, tensor] : buffer.stored) {
        const i64 lo = std::max(offset, start), hi = std::min(offset + bytes, start + tensor->bytes);
        if (hi <= lo) continue;
        if (lo == start && hi == start + tensor->bytes) {
            for (int r = 0; r < n_ranks(); ++r) {
                devices_[r]->make_current();
                if (const i64 n = tensor->local_bytes(r))
                    TP_CUDA(devices_[r]->driver, r, cuMemsetD8Async, tensor->shard[r], value, static_cast<size_t>(n), devices_[r]->stream);
            }
            tensor->pristine = true;
            tensor->fill = value;
        } else {
            const std::vector<char> bytes_of(static_cast<size_t>(hi - lo), static_cast<char>(value));
            write_stored(*tensor, lo - start, bytes_of.data(), hi - lo);
        }
    }
    wait_all();
}

void Memory::reshard(Buffer& buffer, Stored& tensor, const Sharding& sharding, const std::optional<Extent>& extent) {
    std::vector<char> contents;
    if (!tensor.pristine) {
        contents.resize(static_cast<size_t>(tensor.bytes));
        read_stored(tensor, 0, contents.data(), tensor.bytes);
    }
    // No graph runs: programs that were captured with the old shards have keys that no tensor will have again, or are right as they are.
    const Sharding old_sharding = tensor.sharding;
    const std::optional<Extent> old_extent = tensor.extent;
    give_back_shards(buffer, tensor);
    try {
        tensor.sharding = sharding;
        tensor.extent = extent;
        allocate_shards(buffer, tensor);
    } catch (...) {  // as it was, so that the next graph may try
        tensor.sharding = old_sharding;
        tensor.extent = old_extent;
        allocate_shards(buffer, tensor);
        if (!tensor.pristine) write_stored(tensor, 0, contents.data(), tensor.bytes);
        throw;
    }
    if (!tensor.pristine) write_stored(tensor, 0, contents.data(), tensor.bytes);
    wait_all();
}

Matrix Memory::matrix(const Stored& tensor, int rank, int segment) const {
    Matrix out{};
    const WeightFormat& format = *tensor.format;
    const PlaneLayout& planes = tensor.planes[rank];
    i64 first_row = 0;
    for (int i = 0; i < segment; ++i) first_row += planes.rows[static_cast<size_t>(i)].size();
    for (int f = 0; f < format.n_fields; ++f) {
        out.plane[f] = reinterpret_cast<const char*>(tensor.shard[rank]) + planes.plane_offset[f] + first_row * planes.row_stride;
        out.block_stride[f] = format.field[f].bytes;
    }
    out.row_stride = planes.row_stride;
    out.nb2 = planes.matrix_stride;
    out.nb3 = planes.matrix_stride * tensor.ne[2];
    out.k = (planes.block_end - planes.block_begin) * format.block_elems;
    out.n = planes.rows[static_cast<size_t>(segment)].size();
    out.ne2 = tensor.ne[2];
    out.ne3 = tensor.ne[3];
    out.type = tensor.type;
    out.repacked = 1;
    return out;
}

}  // namespace ggml_tp
