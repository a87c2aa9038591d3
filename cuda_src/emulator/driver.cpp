// The subset of the CUDA driver API and of NCCL that the core uses, over CPU memory and threads. A stream is a queue with a thread;
// a graph is the list of operations captured from one stream; a collective meets its peers when it is executed.
// Errors are sticky per stream, as on a GPU: the next query or synchronise returns them.
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "fibers.h"

#define API extern "C" __attribute__((visibility("default")))

namespace tp_emulator {
namespace {

enum : int {
    kOk = 0,
    kInvalidValue = 1,
    kOutOfMemory = 2,
    kNotInitialized = 3,
    kNcclInternalError = 3,
    kInvalidDevice = 101,
    kNotFound = 500,
    kNotReady = 600,
    kIllegalAddress = 700,
    kLaunchFailed = 719
};

constexpr unsigned kMultiprocessors = 4;

using Operation = std::function<int()>;  // returns a CUresult

struct Stream {
    int device = 0;
    std::mutex mutex;
    std::condition_variable changed;
    std::deque<Operation> queue;
    bool busy = false, stop = false;
    std::atomic<int> error{0};
    std::unique_ptr<std::vector<Operation>> capture;  // not null: operations are recorded instead of run
    std::thread thread;

    Stream() : thread([this] { work(); }) {}
    ~Stream() {
        {
            std::lock_guard lock(mutex);
            stop = true;
        }
        changed.notify_all();
        thread.join();
    }
    /// An illegal address is for ever, as on a GPU.
    int take_error() { return error == kIllegalAddress ? kIllegalAddress : error.exchange(0); }
    bool is_capturing() {
        std::lock_guard lock(mutex);
        return capture != nullptr;
    }
    void submit(Operation op) {
        std::lock_guard lock(mutex);
        if (capture) {
            capture->push_back(std::move(op));
            return;
        }
        queue.push_back(std::move(op));
        changed.notify_all();
    }
    void work() {
        std::unique_lock lock(mutex);
        for (;;) {
            changed.wait(lock, [&] { return stop || !queue.empty(); });
            if (queue.empty()) return;
            Operation op = std::move(queue.front());
            queue.pop_front();
            busy = true;
            lock.unlock();
            if (!error) {
                if (int code = op()) error = code;
            }
            op = nullptr;
            lock.lock();
            busy = false;
            changed.notify_all();
        }
    }
};

struct Graph {
    std::vector<Operation> operations;
};

struct World {
    std::mutex mutex;
    int n_devices = 0, compute_capability = 0;
    unsigned long long device_bytes = 0;
    std::vector<unsigned long long> used;
    std::map<unsigned long long, std::pair<int, size_t>> allocations;
};
World& world() {
    static World w;
    return w;
}
thread_local int current_device = 0;

Stream* stream_of(void* handle) { return static_cast<Stream*>(handle); }
int copy(void* stream, void* to, const void* from, size_t bytes) {
    stream_of(stream)->submit([=] {
        std::memcpy(to, from, bytes);
        return kOk;
    });
    return kOk;
}

// Communicators: all ranks of one id share a Meeting.
struct Meeting {
    std::mutex mutex;
    std::condition_variable changed;
    int n_ranks = 0, joined = 0, arrived = 0, left = 0;
    bool aborted = false, mismatch = false;
    size_t count = 0;
    int type = 0;
    std::vector<const void*> sources;
    std::vector<char> result;
};
struct Communicator {
    std::shared_ptr<Meeting> meeting;
    int rank;
    bool connected = false;
    std::shared_ptr<char> memory = std::make_shared<char>();  // what kernels read; a captured graph keeps it
};
std::mutex meetings_mutex;
std::map<std::string, std::shared_ptr<Meeting>> meetings;

size_t type_bytes(int type) { return type == 2 || type == 3 || type == 7 ? 4 : type == 6 || type == 9 ? 2 : 0; }

/// Sums in rank order, so that every rank gets the same bits.
void sum(Meeting& m) {
    m.result.assign(m.count * type_bytes(m.type), 0);
    for (int r = 0; r < m.n_ranks; ++r) {
        if (m.type == 7) {
            float* to = reinterpret_cast<float*>(m.result.data());
            const float* from = static_cast<const float*>(m.sources[r]);
            for (size_t i = 0; i < m.count; ++i) to[i] = r ? to[i] + from[i] : from[i];
        } else if (m.type == 2 || m.type == 3) {
            u32* to = reinterpret_cast<u32*>(m.result.data());
            const u32* from = static_cast<const u32*>(m.sources[r]);
            for (size_t i = 0; i < m.count; ++i) to[i] += from[i];
        } else {
            u16* to = reinterpret_cast<u16*>(m.result.data());
            const u16* from = static_cast<const u16*>(m.sources[r]);
            auto up = [&](u16 x) { return m.type == 6 ? tp_half_to_float(x) : tp_bf16_to_float(x); };
            for (size_t i = 0; i < m.count; ++i) {
                const float s = up(to[i]) + up(from[i]);
                to[i] = r ? (m.type == 6 ? tp_float_to_half(s) : tp_float_to_bf16(s)) : from[i];
            }
        }
    }
}

int all_reduce(Communicator& comm, const void* source, void* target, size_t count, int type) {
    Meeting& m = *comm.meeting;
    std::unique_lock lock(m.mutex);
    m.changed.wait(lock, [&] { return m.aborted || m.left == 0; });  // the meeting before this one is over
    if (m.aborted) return kOk;                                       // the kernel ends, whatever it has summed
    if (m.arrived == 0) m.count = count, m.type = type, m.mismatch = false;
    if (m.count != count || m.type != type) m.mismatch = true;
    m.sources[comm.rank] = source;
    if (++m.arrived == m.n_ranks) {
        if (!m.mismatch) sum(m);
        m.left = m.n_ranks;
        m.changed.notify_all();
    } else {
        m.changed.wait(lock, [&] { return m.aborted || m.left > 0; });
        if (m.left == 0) return kOk;
    }
    const bool bad = m.mismatch;
    if (!bad) std::memcpy(target, m.result.data(), m.result.size());
    if (--m.left == 0) {
        m.arrived = 0;
        m.changed.notify_all();
    }
    if (bad) std::fprintf(stderr, "emulator: ranks disagree on an all_reduce's size or type\n");
    return bad ? kLaunchFailed : kOk;
}

}  // namespace
}  // namespace tp_emulator

using namespace tp_emulator;
using DevicePtr = unsigned long long;

API int tp_emulator_configure(int n_devices, int compute_capability, unsigned long long device_bytes) {
    World& w = world();
    std::lock_guard lock(w.mutex);
    if (n_devices < 1 || n_devices > 16 || compute_capability < 600) return kInvalidValue;
    w.n_devices = n_devices;
    w.compute_capability = compute_capability;
    const char* mib = std::getenv("TP_EMULATOR_MEMORY_MIB");  // smaller GPUs, for tests of what fits
    w.device_bytes = mib ? std::strtoull(mib, nullptr, 10) << 20 : device_bytes;
    w.used.resize(static_cast<size_t>(n_devices));
    return kOk;
}
/// Dynamic shared memory that a block may ask for; as on the GPUs of those architectures.
static unsigned most_shared() {
    const int cc = world().compute_capability;
    return (cc >= 900 && cc < 1200 ? 227u : cc == 800 || cc == 870 ? 163u : 99u) << 10;
}
API int cuInit(unsigned) { return world().n_devices ? kOk : kNotInitialized; }
API int cuDriverGetVersion(int* v) { return *v = 12090, kOk; }
API int cuGetErrorString(int code, const char** text) {
    switch (code) {
        case kOutOfMemory: *text = "out of memory"; break;
        case kLaunchFailed: *text = "launch failed"; break;
        case kNotFound: *text = "named symbol not found"; break;
        case kInvalidValue: *text = "invalid argument"; break;
        default: *text = "error";
    }
    return kOk;
}
API int cuDeviceGetCount(int* n) { return *n = world().n_devices, kOk; }
API int cuDeviceGet(int* device, int ordinal) { return ordinal < 0 || ordinal >= world().n_devices ? kInvalidDevice : (*device = ordinal, kOk); }
API int cuDeviceGetName(char* text, int n, int) { return std::snprintf(text, static_cast<size_t>(n), "Emulated sm_%d", world().compute_capability / 10), kOk; }
API int cuDeviceGetAttribute(int* value, int attribute, int) {
    const int cc = world().compute_capability;
    *value = attribute == 16   ? static_cast<int>(kMultiprocessors)
             : attribute == 75 ? cc / 100
             : attribute == 76 ? cc / 10 % 10
             : attribute == 95 ? 1
             : attribute == 97 ? static_cast<int>(most_shared())
                               : 0;
    return kOk;
}
API int cuDevicePrimaryCtxRetain(void** context, int device) { return *context = reinterpret_cast<void*>(static_cast<intptr_t>(device + 1)), kOk; }
API int cuDevicePrimaryCtxRelease_v2(int) { return kOk; }
API int cuCtxSetCurrent(void* context) { return current_device = static_cast<int>(reinterpret_cast<intptr_t>(context)) - 1, kOk; }
API int cuMemGetInfo_v2(size_t* free_bytes, size_t* total_bytes) {
    World& w = world();
    std::lock_guard lock(w.mutex);
    *total_bytes = w.device_bytes;
    *free_bytes = w.device_bytes - w.used[static_cast<size_t>(current_device)];
    return kOk;
}
API int cuMemAlloc_v2(DevicePtr* pointer, size_t bytes) {
    World& w = world();
    std::lock_guard lock(w.mutex);
    const size_t device = static_cast<size_t>(current_device);
    if (bytes == 0) return kInvalidValue;
    if (bytes > w.device_bytes - w.used[device]) return kOutOfMemory;
    void* p = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
    if (!p) return kOutOfMemory;
    w.used[device] += bytes;
    *pointer = reinterpret_cast<DevicePtr>(p);
    w.allocations[*pointer] = {current_device, bytes};
    return kOk;
}
API int cuMemFree_v2(DevicePtr pointer) {
    World& w = world();
    std::lock_guard lock(w.mutex);
    auto found = w.allocations.find(pointer);
    if (found == w.allocations.end()) return kInvalidValue;
    w.used[static_cast<size_t>(found->second.first)] -= found->second.second;
    w.allocations.erase(found);
    std::free(reinterpret_cast<void*>(pointer));
    return kOk;
}
API int cuMemHostAlloc(void** pointer, size_t bytes, unsigned) { return (*pointer = std::aligned_alloc(256, (bytes + 255) / 256 * 256)) ? kOk : kOutOfMemory; }
API int cuMemFreeHost(void* pointer) { return std::free(pointer), kOk; }
API int cuMemHostGetDevicePointer_v2(DevicePtr* device, void* host, unsigned) { return *device = reinterpret_cast<DevicePtr>(host), kOk; }
API int cuMemcpyHtoDAsync_v2(DevicePtr to, const void* from, size_t n, void* stream) {
    // Pageable memory is staged before the call returns, as the driver does.
    auto staged = std::make_shared<std::vector<char>>(static_cast<const char*>(from), static_cast<const char*>(from) + n);
    stream_of(stream)->submit([=] {
        std::memcpy(reinterpret_cast<void*>(to), staged->data(), n);
        return kOk;
    });
    return kOk;
}
API int cuMemcpyDtoHAsync_v2(void* to, DevicePtr from, size_t n, void* stream) { return copy(stream, to, reinterpret_cast<const void*>(from), n); }
API int cuMemcpyDtoDAsync_v2(DevicePtr to, DevicePtr from, size_t n, void* stream) {
    return copy(stream, reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), n);
}
API int cuMemsetD8Async(DevicePtr to, unsigned char value, size_t n, void* stream) {
    stream_of(stream)->submit([=] {
        std::memset(reinterpret_cast<void*>(to), value, n);
        return kOk;
    });
    return kOk;
}
API int cuDeviceCanAccessPeer(int* can, int, int) { return *can = 1, kOk; }
/// Of native atomics: links are NVLink, or PCIe, for tests.
API int cuDeviceGetP2PAttribute(int* value, int, int, int) { return *value = std::getenv("TP_EMULATOR_PCIE") == nullptr, kOk; }
API int cuCtxEnablePeerAccess(void*, unsigned) { return kOk; }
API int cuCtxDisablePeerAccess(void*) { return kOk; }
API int cuMemcpyPeerAsync(DevicePtr to, void*, DevicePtr from, void*, size_t n, void* stream) {
    // A broken bridge, for tests: one bit in the middle arrives wrong.
    const bool broken = std::getenv("TP_EMULATOR_BROKEN_P2P") != nullptr;
    stream_of(stream)->submit([=] {
        std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), n);
        if (broken) reinterpret_cast<char*>(to)[n / 2] ^= 4;
        return kOk;
    });
    return kOk;
}
API int cuStreamCreate(void** stream, unsigned) {
    auto* s = new Stream;
    s->device = current_device;
    return *stream = s, kOk;
}
API int cuStreamDestroy_v2(void* stream) { return delete stream_of(stream), kOk; }
API int cuStreamSynchronize(void* stream) {
    Stream& s = *stream_of(stream);
    std::unique_lock lock(s.mutex);
    s.changed.wait(lock, [&] { return s.queue.empty() && !s.busy; });
    return s.take_error();
}
API int cuStreamQuery(void* stream) {
    Stream& s = *stream_of(stream);
    std::unique_lock lock(s.mutex);
    // A poll costs the emulated kernels a core: sleep on the queue a little instead.
    s.changed.wait_for(lock, std::chrono::milliseconds(2), [&] { return s.queue.empty() && !s.busy; });
    if (!s.queue.empty() || s.busy) return kNotReady;
    return s.take_error();
}
API int cuStreamBeginCapture_v2(void* stream, int) {
    Stream& s = *stream_of(stream);
    std::lock_guard lock(s.mutex);
    s.capture = std::make_unique<std::vector<Operation>>();
    return kOk;
}
API int cuStreamEndCapture(void* stream, void** graph) {
    Stream& s = *stream_of(stream);
    std::lock_guard lock(s.mutex);
    if (!s.capture) return kInvalidValue;
    auto* g = new Graph{std::move(*s.capture)};
    s.capture.reset();
    return *graph = g, kOk;
}
// An executable that is destroyed while it runs goes on to its end, as on a GPU.
using Executable = std::shared_ptr<const Graph>;
API int cuGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long) {
    return *executable = new Executable(std::make_shared<const Graph>(*static_cast<Graph*>(graph))), kOk;
}
API int cuGraphExecDestroy(void* executable) { return delete static_cast<Executable*>(executable), kOk; }
API int cuGraphDestroy(void* graph) { return delete static_cast<Graph*>(graph), kOk; }
API int cuGraphLaunch(void* executable, void* stream) {
    const Executable g = *static_cast<Executable*>(executable);
    stream_of(stream)->submit([g] {
        for (const Operation& op : g->operations)
            if (int code = op()) return code;
        return static_cast<int>(kOk);
    });
    return kOk;
}
API int cuModuleLoadData(void** module, const void*) { return *module = &world(), kOk; }
API int cuModuleUnload(void*) { return kOk; }
API int cuModuleGetFunction(void** function, void*, const char* name) {
    const Kernel* kernel = find_kernel(name, world().compute_capability);
    return kernel ? (*function = const_cast<Kernel*>(kernel), kOk) : kNotFound;
}
API int cuFuncSetAttribute(void*, int, int) { return kOk; }
API int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared_bytes, void* stream,
                       void** parameters, void**) {
    const Kernel* kernel = static_cast<Kernel*>(function);
    const unsigned long long threads = 1ull * bx * by * bz;
    if (!gx || !gy || !gz || gx > 0x7fffffffu || gy > 65535 || gz > 65535 || !threads || threads > kernel->max_threads || shared_bytes > most_shared() ||
        (kernel->cooperative && (gx > kMultiprocessors || gy != 1 || gz != 1)))
        return kInvalidValue;
    auto args = std::make_shared<std::vector<char>>(static_cast<char*>(parameters[0]), static_cast<char*>(parameters[0]) + kernel->args_bytes);
    stream_of(stream)->submit([=] {
        const char* error = nullptr;
        if (run(*kernel, {gx, gy, gz}, {bx, by, bz}, shared_bytes, args->data(), &error)) return static_cast<int>(kOk);
        std::fprintf(stderr, "emulator: kernel %s: %s\n", kernel->name, error);
        return static_cast<int>(kLaunchFailed);
    });
    return kOk;
}

// NCCL
struct NcclId {
    char bytes[128];
};
API int ncclGetVersion(int* v) { return *v = 23203, kOk; }
API const char* ncclGetErrorString(int) { return "emulated NCCL error"; }
API int ncclGetUniqueId(NcclId* id) {
    static std::atomic<unsigned> next{0};
    std::memset(id, 0, sizeof *id);
    std::snprintf(id->bytes, sizeof id->bytes, "group-%u", next++);
    return kOk;
}
API int ncclCommInitRank(void** comm, int n_ranks, NcclId id, int rank) {
    std::shared_ptr<Meeting> meeting;
    {
        std::lock_guard lock(meetings_mutex);
        auto& slot = meetings[id.bytes];
        if (!slot) slot = std::make_shared<Meeting>();
        meeting = slot;
    }
    std::unique_lock lock(meeting->mutex);
    meeting->n_ranks = n_ranks;
    meeting->sources.resize(static_cast<size_t>(n_ranks));
    ++meeting->joined;
    meeting->changed.notify_all();
    if (!meeting->changed.wait_for(lock, std::chrono::seconds(60), [&] { return meeting->joined == n_ranks; })) return 6;
    return *comm = new Communicator{meeting, rank}, kOk;
}
/// As NCCL: ends the kernels that wait for a peer, waits until no graph holds the communicator, frees what its kernels read.
API int ncclCommAbort(void* comm) {
    auto* c = static_cast<Communicator*>(comm);
    std::unique_lock lock(c->meeting->mutex);
    c->meeting->aborted = true;
    c->meeting->changed.notify_all();
    while (c->memory && c->memory.use_count() > 1) {
        lock.unlock();
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
        lock.lock();
    }
    c->memory.reset();
    return kOk;
}
API int ncclCommDestroy(void* comm) { return ncclCommAbort(comm); }
API int ncclCommGetAsyncError(void*, int* code) { return *code = 0, kOk; }
API int ncclAllReduce(const void* source, void* target, size_t count, int type, int op, void* comm, void* stream) {
    if (op != 0 || !type_bytes(type)) return 4;
    Communicator* c = static_cast<Communicator*>(comm);
    std::shared_ptr<char> held;
    std::weak_ptr<char> memory;
    {
        std::lock_guard lock(c->meeting->mutex);
        const bool captured = stream_of(stream)->is_capturing();
        if (captured && !c->connected) return kNcclInternalError;  // it connects its peers at the first call, which cannot be captured
        c->connected = true;
        memory = c->memory;
        if (captured) held = c->memory;
    }
    stream_of(stream)->submit([=] {
        (void)held;
        return memory.expired() ? kIllegalAddress : all_reduce(*c, source, target, count, type);
    });
    return kOk;
}
