#include "device.h"

#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <thread>

#include "kernel_images.h"

namespace ggml_tp {
namespace {

constexpr int kErrorNotReady = 600;
constexpr int kAttributeSmCount = 16, kAttributeCcMajor = 75, kAttributeCcMinor = 76;
constexpr int kStreamNonBlocking = 1;
constexpr int kFuncMaxDynamicShared = 8;
constexpr double kPollSeconds = 0.02;
constexpr int kDefaultShared = 48 * 1024;  // more must be asked for, per kernel

constexpr int kCooperative = 2, kProgrammaticStreamSerialization = 6;  // CUlaunchAttributeID
constexpr int kCaptureThreadLocal = 1;
struct LaunchAttribute {  // CUlaunchAttribute
    int id;
    char pad[4];
    int value;
    char rest[60];
};
static_assert(sizeof(LaunchAttribute) == 72);
struct LaunchConfig {  // CUlaunchConfig
    unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes;
    Handle stream;
    LaunchAttribute* attributes;
    unsigned n_attributes;
};

void* resolve(void* library, const char* path, const char* symbol) {
    void* address = dlsym(library, symbol);
    if (!address) throw Error(std::string(path) + " has no function " + symbol + ": it is too old; update the driver or NCCL");
    return address;
}

/// What CUDA and NCCL read from the environment before their first call; a value that the user set stays.
void prepare_environment(const Config& config) {
    setenv("NCCL_NVLS_ENABLE", "0", 0);  // multicast is of no use for a token's few KB and can wedge shared hosts
    if (!config.p2p) setenv("NCCL_P2P_DISABLE", "1", 1);
    std::vector<int> devices = config.devices;
    std::sort(devices.begin(), devices.end());
    if (std::adjacent_find(devices.begin(), devices.end()) == devices.end()) return;
    // Several ranks on one GPU: all their kernels must be resident together, so NCCL gets few blocks and the GPU many queues. Without
    // this, 1 MiB on 4 ranks hung (NCCL 2.32.3 on an H200).
    setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1", 0);
    setenv("NCCL_MAX_CTAS", devices.size() > 4 ? "1" : "2", 0);
    setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0);
}

}  // namespace

Driver::Driver(const Config& config, const std::string& plugin_dir)
    : emulated_(config.emulated_cc != 0), plugin_dir_(plugin_dir), wanted_nccl_(config.nccl_path) {
    prepare_environment(config);
    cuda_path_ = emulated_ ? plugin_dir + "/libggml-tp-emulator.so" : "libcuda.so.1";
    cuda_library_ = dlopen(cuda_path_.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!cuda_library_)
        throw Error(emulated_ ? "GGML_TP_EMULATE is set but " + cuda_path_ + " cannot be opened (" + dlerror() + "): run build.py"
                              : "no NVIDIA driver (libcuda.so.1 cannot be opened), so no device is offered; "
                                "GGML_TP_EMULATE=\"sm_80*2\" runs on emulated GPUs, slowly, for tests");
    if (emulated_) {
        auto configure = reinterpret_cast<int (*)(int, int, unsigned long long)>(resolve(cuda_library_, cuda_path_.c_str(), "tp_emulator_configure"));
        if (int code = configure(config.emulated_devices, config.emulated_cc, 8ull << 30))
            throw Error("the emulator refused its configuration (" + std::to_string(code) + ")");
    }
#define GGML_TP_RESOLVE(name, symbol, parameters) name = reinterpret_cast<int(*) parameters>(resolve(cuda_library_, cuda_path_.c_str(), #symbol));
    GGML_TP_CUDA_FUNCTIONS(GGML_TP_RESOLVE)
#undef GGML_TP_RESOLVE
#define GGML_TP_RESOLVE(name, symbol, parameters) name = reinterpret_cast<int(*) parameters>(dlsym(cuda_library_, #symbol));
    GGML_TP_CUDA_OPTIONAL(GGML_TP_RESOLVE)
#undef GGML_TP_RESOLVE
    TP_CUDA(*this, -1, cuInit, 0);
}

Driver::~Driver() = default;  // libraries stay open: their threads and atexit handlers outlive any one group

void Driver::open_nccl() {
    if (nccl_library_) return;
    std::vector<std::string> candidates;
    if (!wanted_nccl_.empty()) candidates = {wanted_nccl_};
    else if (emulated_) candidates = {cuda_path_};
    else candidates = {plugin_dir_ + "/../nvidia/nccl/lib/libnccl.so.2", "libnccl.so.2"};
    std::string why;
    for (const std::string& path : candidates) {
        nccl_library_ = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
        if (nccl_library_) {
            nccl_path_ = path;
            break;
        }
        why = dlerror();
    }
    if (!nccl_library_)
        throw Error("NCCL cannot be opened (" + why + "): pip install 'nvidia-nccl-cu12>=2.30.3', name it in GGML_TP_NCCL, or run with GGML_TP_RANKS=1");
#define GGML_TP_RESOLVE(name, symbol, parameters) name = reinterpret_cast<int(*) parameters>(resolve(nccl_library_, nccl_path_.c_str(), #symbol));
    GGML_TP_NCCL_FUNCTIONS(GGML_TP_RESOLVE)
#undef GGML_TP_RESOLVE
#define GGML_TP_RESOLVE(name, symbol, parameters) name = reinterpret_cast<int(*) parameters>(dlsym(nccl_library_, #symbol));
    GGML_TP_NCCL_OPTIONAL(GGML_TP_RESOLVE)
#undef GGML_TP_RESOLVE
    ncclGetErrorString = reinterpret_cast<const char* (*)(int)>(resolve(nccl_library_, nccl_path_.c_str(), "ncclGetErrorString"));
}

void Driver::check_cuda(int code, const char* api, int rank, const char* file, int line) const {
    if (code == 0) return;
    const char* meaning = nullptr;
    if (cuGetErrorString) cuGetErrorString(code, &meaning);
    throw Error(api, code, meaning ? meaning : "unknown error", rank, file, line);
}

void Driver::check_nccl(int code, const char* api, int rank, const char* file, int line) const {
    if (code == 0) return;
    throw Error(api, code, ncclGetErrorString ? ncclGetErrorString(code) : "unknown error", rank, file, line);
}

int count_devices(const Config& config, const std::string& plugin_dir) {
    const Driver driver(config, plugin_dir);
    int n = 0;
    TP_CUDA(driver, -1, cuDeviceGetCount, &n);
    return n;
}

Device::Device(const Driver& driver_in, int rank_in, int ordinal_in) : driver(driver_in), rank(rank_in), ordinal(ordinal_in) {
    int device = 0, major = 0, minor = 0;
    TP_CUDA(driver, rank, cuDeviceGet, &device, ordinal);
    char text[256] = {};
    TP_CUDA(driver, rank, cuDeviceGetName, text, static_cast<int>(sizeof text), device);
    name = text;
    TP_CUDA(driver, rank, cuDeviceGetAttribute, &major, kAttributeCcMajor, device);
    TP_CUDA(driver, rank, cuDeviceGetAttribute, &minor, kAttributeCcMinor, device);
    TP_CUDA(driver, rank, cuDeviceGetAttribute, &n_sm, kAttributeSmCount, device);
    cc = major * 100 + minor * 10;
    dependent_launch_ = cc >= 900 && driver.cuLaunchKernelEx != nullptr;
    TP_CUDA(driver, rank, cuDevicePrimaryCtxRetain, &context_, device);
    make_current();
    TP_CUDA(driver, rank, cuStreamCreate, &stream, kStreamNonBlocking);
    // Same major version, highest minor not above the device's; "a" images (sm_90a) only on their own architecture; else PTX.
    std::vector<std::string> loaded;
    auto load = [&](const KernelImage& image) {
        for (const std::string& have : loaded)
            if (have == image.module) return;
        Handle module = nullptr;
        TP_CUDA(driver, rank, cuModuleLoadData, &module, image.data);
        modules_.push_back(module);
        loaded.push_back(image.module);
        if (this->image.empty())
            this->image =
                (image.ptx ? "compute_" : "sm_") + std::to_string(image.major * 10 + image.minor) + (image.feature_a ? "a" : "") + (image.ptx ? " (PTX)" : "");
        wgmma = image.feature_a && image.major == 9;
    };
    if (name.rfind("Emulated", 0) == 0) {
        Handle module = nullptr;
        TP_CUDA(driver, rank, cuModuleLoadData, &module, "");
        modules_.push_back(module);
        image = "emulated";
        wgmma = cc == 900;
        return;
    }
    for (int want = minor; want >= 0; --want)
        for (int i = 0; i < kKernelImageCount; ++i) {
            const KernelImage& image = kKernelImages[i];
            if (!image.ptx && image.major == major && image.minor == want && (!image.feature_a || want == minor)) load(image);
        }
    const bool whole = !loaded.empty();  // a build holds every module for each of its architectures
    for (int i = 0; !whole && i < kKernelImageCount; ++i)
        if (kKernelImages[i].ptx && kKernelImages[i].major * 10 + kKernelImages[i].minor <= major * 10 + minor) load(kKernelImages[i]);
    if (modules_.empty())
        throw Error("libggml-tp.so was built without kernels for " + name + " (sm_" + std::to_string(cc / 10) + "): run build.py --arch sm_" +
                    std::to_string(cc / 10));
}

Device::~Device() {
    driver.cuCtxSetCurrent(context_);
    for (Handle module : modules_) driver.cuModuleUnload(module);
    if (stream) driver.cuStreamDestroy(stream);
    int device = 0;
    if (driver.cuDeviceGet(&device, ordinal) == 0 && context_) driver.cuDevicePrimaryCtxRelease(device);
}

void Device::make_current() const { TP_CUDA(driver, rank, cuCtxSetCurrent, context_); }

DevicePtr Device::allocate(size_t bytes) const {
    make_current();
    DevicePtr pointer = 0;
    int code = driver.cuMemAlloc(&pointer, bytes ? bytes : 1);
    if (code) {
        size_t free_bytes = 0, total_bytes = 0;
        driver.cuMemGetInfo(&free_bytes, &total_bytes);
        throw Error("rank " + std::to_string(rank) + " (" + name + ") cannot allocate " + std::to_string(bytes >> 20) + " MiB, " +
                    std::to_string(free_bytes >> 20) + " MiB are free: use a smaller context, fewer layers or more ranks");
    }
    return pointer;
}

void Device::release(DevicePtr pointer) const {
    if (!pointer) return;
    driver.cuCtxSetCurrent(context_);
    driver.cuMemFree(pointer);
}

void Device::memory(size_t* free_bytes, size_t* total_bytes) const {
    make_current();
    TP_CUDA(driver, rank, cuMemGetInfo, free_bytes, total_bytes);
}

Handle Device::function(const std::string& wanted) {
    for (const Function& f : functions_)
        if (f.name == wanted) return f.handle;
    make_current();
    for (Handle module : modules_) {
        Handle handle = nullptr;
        if (driver.cuModuleGetFunction(&handle, module, wanted.c_str()) != 0) continue;
        functions_.push_back({wanted, handle});
        return handle;
    }
    throw Error("no kernel " + wanted + " for sm_" + std::to_string(cc / 10) + " in libggml-tp.so: run build.py again");
}

void Device::launch(Handle function, const Launch& l, const void* args) const {
    if (l.shared_bytes > kDefaultShared) TP_CUDA(driver, rank, cuFuncSetAttribute, function, kFuncMaxDynamicShared, static_cast<int>(l.shared_bytes));
    void* parameters[] = {const_cast<void*>(args)};
    const unsigned *grid = l.grid, *block = l.block;
    if (driver.cuLaunchKernelEx && (dependent_launch_ || l.cooperative)) {
        LaunchAttribute attribute{l.cooperative ? kCooperative : kProgrammaticStreamSerialization, {}, 1, {}};
        const LaunchConfig config{grid[0], grid[1], grid[2], block[0], block[1], block[2], l.shared_bytes, stream, &attribute, 1};
        TP_CUDA(driver, rank, cuLaunchKernelEx, &config, function, parameters, nullptr);
        return;
    }
    TP_CUDA(driver, rank, cuLaunchKernel, function, grid[0], grid[1], grid[2], block[0], block[1], block[2], l.shared_bytes, stream, parameters, nullptr);
}

Handle Device::capture(const std::function<void()>& enqueue) const {
    make_current();
    TP_CUDA(driver, rank, cuStreamBeginCapture, stream, kCaptureThreadLocal);
    Handle graph = nullptr, executable = nullptr;
    try {
        enqueue();
    } catch (...) {  // the stream must not stay in capture
        if (driver.cuStreamEndCapture(stream, &graph) == 0 && graph) driver.cuGraphDestroy(graph);
        throw;
    }
    TP_CUDA(driver, rank, cuStreamEndCapture, stream, &graph);
    const int code = driver.cuGraphInstantiate(&executable, graph, 0);
    driver.cuGraphDestroy(graph);
    driver.check_cuda(code, "cuGraphInstantiateWithFlags", rank, __FILE__, __LINE__);
    return executable;
}

bool Device::wait(double deadline_s) const {
    using Clock = std::chrono::steady_clock;
    make_current();
    const auto begin = Clock::now();
    for (;;) {
        int code = driver.cuStreamQuery(stream);
        if (code == 0) return true;
        if (code != kErrorNotReady) driver.check_cuda(code, "cuStreamQuery", rank, __FILE__, __LINE__);
        const double waited = std::chrono::duration<double>(Clock::now() - begin).count();
        if (waited > deadline_s) return false;
        // A decoded token takes milliseconds: its end is polled for; a long prefill leaves the core to the host's threads.
        if (waited > kPollSeconds) std::this_thread::sleep_for(std::chrono::microseconds(50));
        else std::this_thread::yield();
    }
}

}  // namespace ggml_tp
