#include "group.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <set>
#include <utility>

#include "abi/host.h"
#include "abi/tensor.h"
#include "connect.h"
#include "fuse.h"

namespace ggml_tp {
namespace {

const char* fault_text(u32 fault) {
    switch (fault) {
        case kFaultKvCell: return "a row number outside the tensor that it should be written to";
        case kFaultExpert: return "an expert's number outside the tensor that it should be read from";
        default: return "a row number outside the tensor that it should be read from";
    }
}

// Attention graphs change at every 256-token boundary and with the batch size; a captured graph of an 8B model holds about 1 MB.
constexpr size_t kMostPrograms = 48;
constexpr double kAbortSeconds = 10;
// Of a program, that the calling thread launches on all ranks: it takes 7 to 10 us for each of them, and a thread that sleeps 50 until it has (two H200).
constexpr size_t kStepsOfOneThread = 4;
constexpr int kTimedRepetitions = 4;
constexpr int kNcclSeveralRanksOnAGpu = 23003;  // NCCL_MULTI_RANK_GPU_ENABLE came with 2.30.3
constexpr unsigned kHostAllocPortableMapped = 1 | 2;

constexpr i64 kPushByNvlink = 3 << 19, kPushByPcie = 128 << 10;  // bytes that a rank sends: see docs/decisions.md

/// Where ranks share one, a norm that waits keeps its peer from running: seen on an H200, from 16 blocks of all ranks together on.
bool each_has_a_device(const std::vector<std::unique_ptr<Device>>& devices) {
    std::set<int> ordinals;
    for (const auto& device : devices) ordinals.insert(device->ordinal);
    return ordinals.size() == devices.size();
}

bool ends_empty(const abi::Host& host, const abi::GraphRef& graph) {
    if (graph.n_nodes() == 0) return false;
    const abi::TensorRef last(host, graph.node(graph.n_nodes() - 1));
    return last.ne(0) * last.ne(1) * last.ne(2) * last.ne(3) == 0;
}

}  // namespace

Group::Group(const Config& config_in, const std::string& plugin_dir) : config(config_in), driver_(config_in, plugin_dir) {
    int n_devices = 0;
    TP_CUDA(driver_, -1, cuDeviceGetCount, &n_devices);
    if (n_devices == 0) throw Error("the NVIDIA driver finds no GPU");
    const int n = config.n_ranks ? config.n_ranks : n_devices;
    if (config.devices.empty() && n > n_devices)
        throw Error("GGML_TP_RANKS=" + std::to_string(n) + " but there are " + std::to_string(n_devices) +
                    " devices: lower it, or name devices more than once in GGML_TP_DEVICES");
    for (int r = 0; r < n; ++r) {
        const int ordinal = config.devices.empty() ? r : config.devices[r];
        if (ordinal >= n_devices) throw Error("GGML_TP_DEVICES names device " + std::to_string(ordinal) + " but there are " + std::to_string(n_devices));
        devices_.push_back(std::make_unique<Device>(driver_, r, ordinal));
    }
    if (n > 1) {
        driver_.open_nccl();
        int version = 0;
        TP_NCCL(driver_, -1, ncclGetVersion, &version);
        for (const auto& a : devices_)
            for (const auto& b : devices_)
                if (a->rank < b->rank && a->ordinal == b->ordinal && version < kNcclSeveralRanksOnAGpu)
                    throw Error("GGML_TP_DEVICES names device " + std::to_string(a->ordinal) + " more than once; NCCL " + std::to_string(version) + " (" +
                                driver_.nccl_path() + ") cannot do that: pip install 'nvidia-nccl-cu12>=2.30.3'");
    }
    if (n > 1 && config.p2p) {
        std::vector<const Device*> devices;
        for (const auto& device : devices_) devices.push_back(device.get());
        peers_ = prove_peers(devices, config.deadline_s);
        if (!peers_.all_proven()) {
            // NCCL reads this when it makes its first communicator, which is later.
            if (peers_.any_broken()) setenv("NCCL_P2P_DISABLE", "1", 1);
            notes_ = peers_.any_broken() ? "direct copies between GPUs corrupt data (an IOMMU?): turned off for NCCL too; ggml-tp doctor shows which"
                                         : "not all GPUs can copy to each other directly: NCCL goes through the host's memory there";
        }
    }
    memory = std::make_unique<Memory>(devices_, config.split);
    memory->deadline_s = config.deadline_s;
    scratch_ = std::make_unique<Scratch>(devices_);
    rows_ = std::make_unique<RowStaging>(devices_, *memory);
    const bool reachable = n > 1 && config.p2p && peers_.all_proven();
    if (reachable) {
        enable_peers(devices_);
        const i64 push_bytes = config.push_bytes >= 0 ? config.push_bytes : all_by_nvlink(devices_) ? kPushByNvlink : kPushByPcie;
        if (each_has_a_device(devices_)) peer_memory_ = std::make_unique<PeerMemory>(devices_, config.norm_bytes, push_bytes, config.deadline_s);
    }
    if (config.persist && can_persist(devices_)) {
        stream_ = std::make_unique<StreamMemory>(devices_, reachable, config.deadline_s);
    }
    workers_ = std::make_unique<Workers>(n);
    for (int r = 0; r < n; ++r) {
        devices_[r]->make_current();
        void* word = nullptr;
        DevicePtr pointer = 0;
        TP_CUDA(driver_, r, cuMemHostAlloc, &word, 256, kHostAllocPortableMapped);
        std::memset(word, 0, 256);
        TP_CUDA(driver_, r, cuMemHostGetDevicePointer, &pointer, word, 0);
        faults_.push_back(static_cast<volatile u32*>(word));
        fault_pointers_.push_back(pointer);
    }
}

Group::~Group() {
    drop_programs();
    for (Handle comm : comms_)
        if (comm) driver_.ncclCommDestroy(comm);
    for (volatile u32* word : faults_) driver_.cuMemFreeHost(const_cast<u32*>(word));
    workers_.reset();
    stream_.reset();
    peer_memory_.reset();
    rows_.reset();
    scratch_.reset();
    memory.reset();
}

std::string Group::description() const {
    std::string out = std::to_string(n_ranks()) + (n_ranks() == 1 ? " rank, " : " ranks, ") + devices_[0]->name;
    for (const auto& device : devices_)
        if (device->name != devices_[0]->name) return out + " and others";
    return out;
}

std::string Group::devices_text() const {
    std::string out;
    for (const auto& d : devices_)
        out += "rank " + std::to_string(d->rank) + ": device " + std::to_string(d->ordinal) + ", " + d->name + ", sm_" + std::to_string(d->cc / 10) + ", " +
               std::to_string(d->n_sm) + " multiprocessors, kernels " + d->image + "\n";
    if (n_ranks() > 1) out += config.p2p ? peers_.to_text() : "direct copies are turned off (GGML_TP_P2P=0)\n";
    int version = 0;
    driver_.cuDriverGetVersion(&version);
    return out + "driver " + driver_.cuda_path() + ", CUDA " + std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10) + "\nnccl " +
           (driver_.nccl_path().empty() ? "not needed" : driver_.nccl_path()) + "\n";
}

std::string Group::stage_times() const {
    try {
        return programs_.empty() ? "" : ggml_tp::stage_times(*programs_.front(), *devices_[0]);
    } catch (const Error& error) {
        return error.what();
    }
}

bool Group::supports(const abi::Host& host, const void* operation) const {
    std::vector<Arch> archs;
    for (const auto& device : devices_) archs.push_back(device->arch());
    return can_lower(read_operation(host, operation), archs);
}

void Group::delay(int rank, double seconds) { delays_.push_back({rank, seconds}); }

void Group::connect() {
    if (!comms_.empty() || n_ranks() == 1) return;
    std::vector<const Device*> devices;
    for (const auto& device : devices_) devices.push_back(device.get());
    connect_ranks(driver_, devices, *workers_, config.deadline_s, comms_);
}

void Group::destroy(Program& program) {
    for (Handle executable : program.executables)
        if (executable) driver_.cuGraphExecDestroy(executable);
    program.executables.clear();
    std::erase_if(seen_, [&](const Seen& seen) { return seen.program == &program; });
}

void Group::drop_programs() {
    for (auto& program : programs_) destroy(*program);
    programs_.clear();
}

/// No graph runs: compute() returns when its graph has ended, and the caller holds the mutex.
void Group::release(Buffer& buffer) {
    finish();
    std::erase_if(programs_, [&](const std::unique_ptr<Program>& program) {
        if (std::find(program->buffers.begin(), program->buffers.end(), &buffer) == program->buffers.end()) return false;
        destroy(*program);
        return true;
    });
    memory->release(buffer);
}

/// Wall clock around a few launches that take milliseconds each; the best round counts.
Rates Group::measure(int rank, u64 bytes, int rounds) {
    Device& device = *devices_[rank];
    bytes = bytes / 512 * 512;
    const DevicePtr memory_in = device.allocate(bytes), half = memory_in + bytes / 2;
    Rates out;
    try {
        TP_CUDA(driver_, rank, cuMemsetD8Async, memory_in, 0, bytes, device.stream);
        const ReadRateArgs args{reinterpret_cast<const char*>(memory_in), bytes / 16};
        Launch launch;
        launch.grid[0] = static_cast<u32>(device.n_sm) * 4;
        launch.block[0] = 512;
        const Handle kernel = device.function("read_rate");
        auto seconds = [&](auto&& work) {
            if (!device.wait(config.deadline_s)) throw Error("a measurement did not end in time");
            const auto begin = std::chrono::steady_clock::now();
            for (int i = 0; i < 4; ++i) work();
            if (!device.wait(config.deadline_s)) throw Error("a measurement did not end in time");
            return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() / 4;
        };
        for (int i = 0; i < rounds; ++i) {
            const double read = seconds([&] { device.launch(kernel, launch, &args); });
            const double copy = seconds([&] { TP_CUDA(driver_, rank, cuMemcpyDtoDAsync, memory_in, half, bytes / 2, device.stream); });
            out.read = std::max(out.read, static_cast<double>(bytes) / read);
            out.copy = std::max(out.copy, static_cast<double>(bytes) / copy);
        }
    } catch (...) {
        device.release(memory_in);
        throw;
    }
    device.release(memory_in);
    return out;
}

bool Group::can_reduce(Reduce how, u64 bytes) {
    if (how == Reduce::kPull) return peer_memory_ != nullptr;
    if (how == Reduce::kPush) return peer_memory_ && peer_memory_->pushes(static_cast<i64>(bytes));
    if (how != Reduce::kNcclSymmetric) return how == Reduce::kNccl || how == Reduce::kNcclGraph;
    driver_.open_nccl();
    return driver_.ncclMemAlloc && driver_.ncclMemFree && driver_.ncclCommWindowRegister && driver_.ncclCommWindowDeregister;
}

namespace {

constexpr size_t kTimedRow = 4096;  // elements: 8B's
size_t timed_row(size_t elems) { return elems >= kTimedRow ? kTimedRow : elems / 32 * 32; }
size_t timed_norm_bytes(size_t elems) { return elems * 4 * 4 + kPanelRows * timed_row(elems) * 2; }

}  // namespace

/// With the residual, the norm and halves for the next products.
std::vector<RankLaunch> Group::timed_norms(const std::vector<DevicePtr>& buffers, size_t elems, Reduce how) {
    const i64 k = static_cast<i64>(timed_row(elems));
    if (!k || elems % static_cast<size_t>(k)) throw Error("rows of " + std::to_string(kTimedRow) + " elements, or one shorter one, can be reduced so");
    std::vector<FusedNormArgs> norms;
    for (const DevicePtr buffer : buffers) {
        auto view = [&](size_t i) {
            View v{};
            v.data = reinterpret_cast<char*>(buffer + i * elems * 4);
            v.type = kF32;
            const i64 ne[4] = {k, static_cast<i64>(elems) / k, 1, 1};
            i64 bytes = 4;
            for (int d = 0; d < 4; ++d) v.ne[d] = ne[d], v.nb[d] = bytes, bytes *= ne[d];
            return v;
        };
        FusedNormArgs norm{};
        norm.b = view(0);
        norm.a = norm.sum = view(1);
        norm.y = view(2);
        norm.xq = view(3).data;
        norm.has_b = 1;
        norm.eps = 1e-5f;
        norm.form = kHalfPanels;
        norms.push_back(norm);
    }
    std::vector<RankLaunch> out;
    for (int r = 0; r < n_ranks(); ++r) {
        const Arch arch = devices_[r]->arch();
        out.push_back(how == Reduce::kPush ? push_norm(norms[r], Pieces{}, r, arch, *peer_memory_, fault_pointers_[r])
                                           : pull_norm(norms, r, false, false, arch, *peer_memory_, fault_pointers_[r]));
        if (!out.back().launch.kernel) throw Error(std::to_string(elems * 4) + " bytes in rows of " + std::to_string(k) + " cannot be reduced so");
        out.back().function = devices_[r]->function(out.back().launch.kernel);
    }
    return out;
}

/// Every rank enqueues `rounds` of them at once, so that the time is the all_reduce's own and not the host's round trip; the best of a few.
double Group::time_all_reduce(u64 bytes, Reduce how, int rounds) {
    if (n_ranks() < 2) throw Error("one rank has nobody to reduce with");
    connect();
    const size_t elems = std::max<u64>(bytes / 4, 1);
    std::vector<DevicePtr> buffers(devices_.size());
    // A window is memory of NCCL's own, registered by all ranks together.
    constexpr int kSymmetric = 1;  // NCCL_WIN_COLL_SYMMETRIC
    const bool windows = how == Reduce::kNcclSymmetric, norms = how >= Reduce::kPull;
    const size_t own_bytes = norms ? timed_norm_bytes(elems) : elems * 4;
    std::vector<Handle> window(devices_.size());
    auto free_buffers = [&] {
        if (!windows)
            for (size_t r = 0; r < devices_.size(); ++r) devices_[r]->release(buffers[r]);
        else
            workers_->run([&](int r) {
                devices_[r]->make_current();
                if (window[r]) driver_.ncclCommWindowDeregister(comms_[r], window[r]);
                if (buffers[r]) driver_.ncclMemFree(reinterpret_cast<void*>(buffers[r]));
            });
    };
    try {
        if (!windows)
            for (size_t r = 0; r < devices_.size(); ++r) buffers[r] = devices_[r]->allocate(own_bytes);
        else
            workers_->run([&](int r) {
                devices_[r]->make_current();
                void* memory = nullptr;
                TP_NCCL(driver_, r, ncclMemAlloc, &memory, elems * 4);
                buffers[r] = reinterpret_cast<DevicePtr>(memory);
                TP_NCCL(driver_, r, ncclCommWindowRegister, comms_[r], memory, elems * 4, &window[r], kSymmetric);
            });
    } catch (...) {
        free_buffers();
        throw;
    }
    std::vector<RankLaunch> launches;
    if (norms) launches = timed_norms(buffers, elems, how);
    auto enqueue = [&](int r, int n) {
        for (int i = 0; i < n && norms; ++i) devices_[r]->launch(launches[r].function, launches[r].launch, launches[r].args.data());
        for (int i = 0; i < n && !norms; ++i)
            TP_NCCL(driver_, r, ncclAllReduce, reinterpret_cast<const void*>(buffers[r]), reinterpret_cast<void*>(buffers[r]), elems,
                    static_cast<int>(WireType::kF32), kNcclSum, comms_[r], devices_[r]->stream);
    };
    for (volatile u32* fault : faults_) *fault = kFaultNone;  // of an earlier failure
    auto seconds = [&](const std::function<void(int)>& job) {
        const auto begin = std::chrono::steady_clock::now();
        workers_->run(job);
        for (const auto& device : devices_)
            if (!device->wait(config.deadline_s)) throw Error("an all_reduce of " + std::to_string(bytes) + " bytes did not end in time");
        for (volatile u32* fault : faults_)
            if (*fault == kFaultLatePeer) throw Error("an all_reduce of " + std::to_string(bytes) + " bytes waited for a peer in vain");
        return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() / rounds;
    };
    programs_.push_back(std::make_unique<Program>());  // where fail() finds its graphs; it has no key and no buffers of a host
    Program& timed = *programs_.back();
    timed.executables.assign(devices_.size(), nullptr);
    double best = 1e30;
    try {
        // Unmeasured: NCCL chooses and loads a kernel per size class.
        seconds([&](int r) {
            devices_[r]->make_current();
            TP_CUDA(driver_, r, cuMemsetD8Async, buffers[r], 0, own_bytes, devices_[r]->stream);
            enqueue(r, 1);
        });
        if (how != Reduce::kNccl) workers_->run([&](int r) { timed.executables[r] = devices_[r]->capture([&] { enqueue(r, rounds); }); });
        for (int i = 0; i < kTimedRepetitions; ++i) {
            const double time = seconds([&](int r) {
                devices_[r]->make_current();
                if (timed.executables[r]) TP_CUDA(driver_, r, cuGraphLaunch, timed.executables[r], devices_[r]->stream);
                else enqueue(r, rounds);
            });
            if (i > 0) best = std::min(best, time);  // the first launch of a graph uploads it
        }
    } catch (...) {
        fail();  // the buffers stay: a late rank may still write to them
        throw;
    }
    destroy(timed);
    programs_.pop_back();
    free_buffers();
    return best;
}

/// A rank failed or is late: communicators cannot be trusted, nor graphs that hold them. The next graph makes both anew.
/// The order is NCCL's: ncclCommAbort ends the kernels that wait for a peer, then waits until no captured graph refers to the communicator,
/// and only then frees it. So the graphs go while it waits, after the last of their kernels: sooner, a late rank's kernel read freed memory
/// (seen on an H200); after it, the abort never came back.
void Group::fail() {
    in_flight_ = false;
    for (const auto& [owner, give_up] : overlaps_) give_up();
    struct Aborting {
        std::mutex mutex;
        std::condition_variable changed;
        size_t left;
    };
    auto aborting = std::make_shared<Aborting>();
    aborting->left = comms_.size();
    for (Handle comm : comms_)
        std::thread([aborting, comm, abort = driver_.ncclCommAbort] {
            if (comm) abort(comm);
            std::lock_guard lock(aborting->mutex);
            --aborting->left;
            aborting->changed.notify_all();
        }).detach();  // one that does not end must not take the host along
    comms_.clear();
    bool drained = true;
    for (const auto& device : devices_) {
        try {
            drained &= device->wait(kAbortSeconds);
        } catch (const Error&) {  // the stream's error was reported by whoever called us
        }
    }
    if (drained) {
        drop_programs();
        if (stream_) stream_->reset();
        if (peer_memory_) peer_memory_->reset();
    } else {  // what still runs keeps its graph and its memory
        for (auto& program : programs_)
            for (DeviceBlock& block : program->blocks) block.abandon();
        programs_.clear();
        seen_.clear();
    }
    std::unique_lock lock(aborting->mutex);
    aborting->changed.wait_for(lock, std::chrono::duration<double>(kAbortSeconds), [&] { return aborting->left == 0; });
}

/// Enqueues every step of rank r on its stream.
void Group::record(const Program& program, int r) {
    Device& device = *devices_[r];
    for (const ProgramStep& step : program.steps) {
        if (step.kind == ProgramStep::kAllReduce) {
            TP_NCCL(driver_, r, ncclAllReduce, reinterpret_cast<const void*>(step.pointers[r]), reinterpret_cast<void*>(step.pointers[r]),
                    static_cast<size_t>(step.elems), static_cast<int>(step.wire), kNcclSum, comms_[r], device.stream);
            continue;
        }
        const RankLaunch& l = step.launches[r];
        if (l.launch.kernel) device.launch(l.function, l.launch, l.args.data());
    }
}

void Group::capture(Program& program) {
    program.executables.assign(devices_.size(), nullptr);
    workers_->run([&](int r) { program.executables[r] = devices_[r]->capture([&] { record(program, r); }); });
}

std::unique_ptr<Program> Group::build(const Graph& graph, u64 key) {
    Plan plan = settle(graph, n_ranks(), config.split, [&](Stored& tensor, const Sharding& sharding, const std::optional<Extent>& extent) {
        memory->reshard(*tensor.buffer, tensor, sharding, extent);
        ++counters.weights_resharded;
    });
    for (int id : graph.nodes)  // what a graph has written a later re-shard must keep
        if (Stored* written = graph.tensors[static_cast<size_t>(id)].stored) written->pristine = false;
    schedule(plan, graph);
    verify(plan, graph);
    // Other programs hold the addresses of shards that were laid out anew; their keys no longer match, so they are never replayed.
    std::unique_ptr<Program> program = lower(graph, plan, {*memory, devices_, *scratch_, *rows_, fault_pointers_, stream_.get(), peer_memory_.get()});
    program->plan_text = plan.to_text(graph);
    program->key = key;
    try {
        connect();
        capture(*program);
    } catch (...) {
        destroy(*program);
        fail();
        throw;
    }
    for (const Tensor& tensor : graph.tensors)
        if (tensor.buffer && std::find(program->buffers.begin(), program->buffers.end(), tensor.buffer) == program->buffers.end())
            program->buffers.push_back(tensor.buffer);
    ++counters.programs_built;
    return program;
}

Program* Group::program_seen(u64 uid, const void* cgraph, int n_nodes) {
    if (uid == 0) return nullptr;
    for (const Seen& seen : seen_) {
        if (seen.uid != uid || seen.cgraph != cgraph || seen.n_nodes != n_nodes || seen.epoch != memory->layout_epoch()) continue;
        for (const Program::Leaf& leaf : seen.program->leaves)
            if (leaf.buffer->extent_at(leaf.offset, leaf.bytes) != leaf.extent) return nullptr;
        return seen.program;
    }
    return nullptr;
}

Program& Group::program_for(const Graph& graph) {
    u64 key = graph_key(graph);
    for (auto it = programs_.begin(); it != programs_.end(); ++it)
        if ((*it)->key == key) {
            programs_.splice(programs_.begin(), programs_, it);
            return *programs_.front();
        }
    std::unique_ptr<Program> program = build(graph, key);
    program->key = graph_key(graph);  // building may have laid weights out anew
    programs_.push_front(std::move(program));
    if (programs_.size() > kMostPrograms) {
        destroy(*programs_.back());
        programs_.pop_back();
    }
    last_plan = programs_.front()->plan_text;
    last_program = programs_.front()->to_text();
    return *programs_.front();
}

/// Of numbers that the host has just written, as a rule; else they are read back.
void Group::gather(const Program::HostRows& rows) {
    finish();  // what runs may read the rows of before
    std::vector<char> read;
    const char* ids = memory->pending_input(*rows.ids, rows.ids_offset, rows.n * 4);
    if (!ids) {
        read.resize(static_cast<size_t>(rows.n * 4));
        memory->read(*rows.ids, rows.ids_offset, read.data(), rows.n * 4);
        ids = read.data();
    }
    for (i64 i = 0; i < rows.n; ++i) {
        i32 id;
        std::memcpy(&id, ids + i * 4, 4);
        if (id < 0 || id >= rows.n_table) throw Error(rows.name + " has no row " + std::to_string(id) + "; the graph is refused");
        std::memcpy(rows.pinned + i * rows.row_bytes, rows.table + id * rows.row_bytes, static_cast<size_t>(rows.row_bytes));
        const i32 number = static_cast<i32>(i);
        std::memcpy(rows.pinned + rows.ids_at() + i * 4, &number, 4);
    }
}

void Group::compute(const abi::Host& host, void* cgraph, BufferOf buffer_of, void* context) {
    const abi::GraphRef ref(host, cgraph);
    Program* found = program_seen(ref.uid(), cgraph, ref.n_nodes());
    if (!found) {
        finish();  // a new program may take the place of one that runs, or lay memory out anew
        const Graph graph = read_graph(host, cgraph, buffer_of, context);
        if (graph.nodes.empty()) return;
        found = &program_for(graph);
        std::erase_if(seen_, [&](const Seen& seen) { return seen.program == found; });
        seen_.push_back({ref.uid(), memory->layout_epoch(), cgraph, ref.n_nodes(), found});
    }
    const Program& program = *found;
    // A host cuts a prompt into batches and asks only the last for logits: the others end with a tensor of no rows, nobody reads them, and the host
    // may go on with the next one's inputs. Their failure is said by what finishes them, as the next graph's status.
    const bool unread = ends_empty(host, ref), waits = overlaps_.empty() && !unread;
    if (!in_flight_)
        for (volatile u32* fault : faults_) *fault = kFaultNone;
    for (const Program::HostRows& rows : program.host_rows) gather(rows);
    const auto delays = std::exchange(delays_, {});
    try {
        const auto launch = [&](int r) {
            devices_[r]->make_current();
            for (const auto& [rank, seconds] : delays)
                if (rank == r) {
                    const SpinArgs args{static_cast<u64>(seconds * 1e9)};
                    devices_[r]->launch(devices_[r]->function("spin"), Launch{}, &args);
                }
            InputCopies inputs = memory->pending_inputs(r);
            for (const Program::HostRows& rows : program.host_rows) inputs.add(rows.pinned, rows.to[static_cast<size_t>(r)], rows.bytes(), rows.is_pinned);
            inputs.send();
            TP_CUDA(driver_, r, cuGraphLaunch, program.executables[r], devices_[r]->stream);
        };
        if (program.steps.size() > kStepsOfOneThread) workers_->run(launch);
        else
            for (int r = 0; r < n_ranks(); ++r) launch(r);
        memory->inputs_enqueued();
        in_flight_ = true;
        if (waits) wait_for_ranks();
        for (const Program::Written& w : program.written)
            std::erase_if(w.buffer->residency, [&](const Residency& r) { return r.offset < w.offset + w.bytes && w.offset < r.offset + r.bytes; });
        for (const Program::Survivor& s : program.survivors) s.buffer->residency.push_back(s.residency);
        ++counters.graphs_computed;
        counters.graphs_unread += unread;
        ++counters.graph_launches_per_rank;
        counters.last_all_reduces = static_cast<u64>(program.all_reduces);
        counters.last_all_gathers = static_cast<u64>(program.all_gathers);
        counters.last_kernel_launches = static_cast<u64>(program.kernel_launches);
    } catch (...) {
        memory->inputs_enqueued();
        fail();
        throw;
    }
    if (waits) check_faults();
}

void Group::overlap(const void* owner, std::function<void()> give_up) { overlaps_.push_back({owner, std::move(give_up)}); }

void Group::end_overlap(const void* owner) {
    std::erase_if(overlaps_, [&](const auto& overlap) { return overlap.first == owner; });
}

void Group::finish() {
    if (!in_flight_) return;
    try {
        wait_for_ranks();
    } catch (...) {
        fail();
        throw;
    }
    check_faults();
}

void Group::wait_for_ranks() {
    in_flight_ = false;
    for (const auto& device : devices_)
        if (!device->wait(config.deadline_s))
            throw Error("rank " + std::to_string(device->rank) + " did not finish a graph within " + std::to_string(config.deadline_s) +
                        " s (GGML_TP_DEADLINE); its peers are given up and " +
                        (overlaps_.empty() ? "connected anew" : "the host adds up by itself until its next context"));
    for (size_t r = 0; r < faults_.size(); ++r)
        if (*faults_[r] == kFaultLatePeer)
            throw Error("rank " + std::to_string(r) + " waited for a peer for more than " + std::to_string(config.deadline_s) +
                        " s (GGML_TP_DEADLINE); the graph's results are not valid");
}

void Group::check_faults() const {
    for (size_t r = 0; r < faults_.size(); ++r)
        if (const u32 fault = *faults_[r])
            throw Error(std::string("rank ") + std::to_string(r) + ": " + fault_text(fault) + "; nothing was touched there, the graph's results are not valid");
}

}  // namespace ggml_tp
