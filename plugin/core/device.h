// The CUDA driver API and the NCCL API, opened at run time: libcuda.so.1 and libnccl.so.2, or the emulator's stand-ins.
// Nothing here links to either, so one binary loads everywhere and can say in one line what is missing.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "config.h"
#include "error.h"
#include "launch.h"

namespace ggml_tp {

using DevicePtr = unsigned long long;
using Handle = void*;

struct NcclId {
    char bytes[128];
};

// name, parameters (as in cuda.h; handles are void*)
#define GGML_TP_CUDA_FUNCTIONS(X)                                                                   \
    X(cuInit, cuInit, (unsigned))                                                                   \
    X(cuGetErrorString, cuGetErrorString, (int, const char**))                                      \
    X(cuDeviceGetCount, cuDeviceGetCount, (int*))                                                   \
    X(cuDeviceGet, cuDeviceGet, (int*, int))                                                        \
    X(cuDeviceGetName, cuDeviceGetName, (char*, int, int))                                          \
    X(cuDeviceGetAttribute, cuDeviceGetAttribute, (int*, int, int))                                 \
    X(cuDevicePrimaryCtxRetain, cuDevicePrimaryCtxRetain, (Handle*, int))                           \
    X(cuDevicePrimaryCtxRelease, cuDevicePrimaryCtxRelease_v2, (int))                               \
    X(cuCtxSetCurrent, cuCtxSetCurrent, (Handle))                                                   \
    X(cuMemGetInfo, cuMemGetInfo_v2, (size_t*, size_t*))                                            \
    X(cuMemAlloc, cuMemAlloc_v2, (DevicePtr*, size_t))                                              \
    X(cuMemFree, cuMemFree_v2, (DevicePtr))                                                         \
    X(cuMemHostAlloc, cuMemHostAlloc, (void**, size_t, unsigned))                                   \
    X(cuMemFreeHost, cuMemFreeHost, (void*))                                                        \
    X(cuMemHostGetDevicePointer, cuMemHostGetDevicePointer_v2, (DevicePtr*, void*, unsigned))       \
    X(cuMemcpyHtoDAsync, cuMemcpyHtoDAsync_v2, (DevicePtr, const void*, size_t, Handle))            \
    X(cuMemcpyDtoHAsync, cuMemcpyDtoHAsync_v2, (void*, DevicePtr, size_t, Handle))                  \
    X(cuMemcpyDtoDAsync, cuMemcpyDtoDAsync_v2, (DevicePtr, DevicePtr, size_t, Handle))              \
    X(cuDeviceCanAccessPeer, cuDeviceCanAccessPeer, (int*, int, int))                               \
    X(cuDeviceGetP2PAttribute, cuDeviceGetP2PAttribute, (int*, int, int, int))                      \
    X(cuCtxEnablePeerAccess, cuCtxEnablePeerAccess, (Handle, unsigned))                             \
    X(cuCtxDisablePeerAccess, cuCtxDisablePeerAccess, (Handle))                                     \
    X(cuMemcpyPeerAsync, cuMemcpyPeerAsync, (DevicePtr, Handle, DevicePtr, Handle, size_t, Handle)) \
    X(cuDriverGetVersion, cuDriverGetVersion, (int*))                                               \
    X(cuMemsetD8Async, cuMemsetD8Async, (DevicePtr, unsigned char, size_t, Handle))                 \
    X(cuStreamCreate, cuStreamCreate, (Handle*, unsigned))                                          \
    X(cuStreamDestroy, cuStreamDestroy_v2, (Handle))                                                \
    X(cuStreamSynchronize, cuStreamSynchronize, (Handle))                                           \
    X(cuStreamQuery, cuStreamQuery, (Handle))                                                       \
    X(cuStreamBeginCapture, cuStreamBeginCapture_v2, (Handle, int))                                 \
    X(cuStreamEndCapture, cuStreamEndCapture, (Handle, Handle*))                                    \
    X(cuGraphInstantiate, cuGraphInstantiateWithFlags, (Handle*, Handle, unsigned long long))       \
    X(cuGraphExecDestroy, cuGraphExecDestroy, (Handle))                                             \
    X(cuGraphDestroy, cuGraphDestroy, (Handle))                                                     \
    X(cuGraphLaunch, cuGraphLaunch, (Handle, Handle))                                               \
    X(cuModuleLoadData, cuModuleLoadData, (Handle*, const void*))                                   \
    X(cuModuleUnload, cuModuleUnload, (Handle))                                                     \
    X(cuModuleGetFunction, cuModuleGetFunction, (Handle*, Handle, const char*))                     \
    X(cuFuncSetAttribute, cuFuncSetAttribute, (Handle, int, int))                                   \
    X(cuLaunchKernel, cuLaunchKernel, (Handle, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Handle, void**, void**))

// Of newer drivers; null where the driver has none.
#define GGML_TP_CUDA_OPTIONAL(X) X(cuLaunchKernelEx, cuLaunchKernelEx, (const void*, Handle, void**, void**))

#define GGML_TP_NCCL_FUNCTIONS(X)                                      \
    X(ncclGetVersion, ncclGetVersion, (int*))                          \
    X(ncclGetUniqueId, ncclGetUniqueId, (NcclId*))                     \
    X(ncclCommInitRank, ncclCommInitRank, (Handle*, int, NcclId, int)) \
    X(ncclCommDestroy, ncclCommDestroy, (Handle))                      \
    X(ncclCommAbort, ncclCommAbort, (Handle))                          \
    X(ncclCommGetAsyncError, ncclCommGetAsyncError, (Handle, int*))    \
    X(ncclAllReduce, ncclAllReduce, (const void*, void*, size_t, int, int, Handle, Handle))
// Symmetric windows: newer NCCL. Null where the library has them not.
#define GGML_TP_NCCL_OPTIONAL(X)                                                             \
    X(ncclMemAlloc, ncclMemAlloc, (void**, size_t))                                          \
    X(ncclMemFree, ncclMemFree, (void*))                                                     \
    X(ncclCommWindowRegister, ncclCommWindowRegister, (Handle, void*, size_t, Handle*, int)) \
    X(ncclCommWindowDeregister, ncclCommWindowDeregister, (Handle, Handle))

/// The two libraries' functions. Throws Error with one line when a library or a function is missing.
class Driver {
  public:
    explicit Driver(const Config& config, const std::string& plugin_dir);
    ~Driver();
    Driver(const Driver&) = delete;
    Driver& operator=(const Driver&) = delete;

#define GGML_TP_DECLARE(name, symbol, parameters) int(*name) parameters = nullptr;
    GGML_TP_CUDA_FUNCTIONS(GGML_TP_DECLARE)
    GGML_TP_CUDA_OPTIONAL(GGML_TP_DECLARE)
    GGML_TP_NCCL_FUNCTIONS(GGML_TP_DECLARE)
    GGML_TP_NCCL_OPTIONAL(GGML_TP_DECLARE)
    const char* (*ncclGetErrorString)(int) = nullptr;
#undef GGML_TP_DECLARE

    /// NCCL is opened when a group of more than one rank first needs it.
    void open_nccl();
    const std::string& cuda_path() const { return cuda_path_; }
    const std::string& nccl_path() const { return nccl_path_; }

    void check_cuda(int code, const char* api, int rank, const char* file, int line) const;
    void check_nccl(int code, const char* api, int rank, const char* file, int line) const;

  private:
    bool emulated_;
    std::string plugin_dir_, wanted_nccl_, cuda_path_, nccl_path_;
    void* cuda_library_ = nullptr;
    void* nccl_library_ = nullptr;
};

/// CUDA devices of this machine, or emulated ones. Throws Error where there is no driver.
int count_devices(const Config& config, const std::string& plugin_dir);

#define TP_CUDA(driver, rank, call, ...) (driver).check_cuda((driver).call(__VA_ARGS__), #call, rank, __FILE__, __LINE__)
#define TP_NCCL(driver, rank, call, ...) (driver).check_nccl((driver).call(__VA_ARGS__), #call, rank, __FILE__, __LINE__)

/// One rank's device: its primary context, one stream, its kernels. All calls make the context current themselves.
class Device {
  public:
    Device(const Driver& driver, int rank, int ordinal);
    ~Device();
    Device(const Device&) = delete;
    Device& operator=(const Device&) = delete;

    void make_current() const;
    DevicePtr allocate(size_t bytes) const;  // throws Error: out of memory says how much was asked for
    void release(DevicePtr pointer) const;
    void memory(size_t* free_bytes, size_t* total_bytes) const;
    Handle function(const std::string& name);  // resolved once, when a program is built
    void launch(Handle function, const Launch& launch, const void* args) const;
    /// What `enqueue` puts on the stream, as a graph that can be launched (cuGraphExecDestroy it). Each rank on a thread of its own.
    Handle capture(const std::function<void()>& enqueue) const;
    /// Waits for the stream; false when `deadline_s` passed first.
    bool wait(double deadline_s) const;

    const Driver& driver;
    const int rank, ordinal;
    int cc = 0, n_sm = 0;  // cc as in __CUDA_ARCH__
    bool wgmma = false;    // its kernels are those of sm_90a
    Arch arch() const { return {cc, n_sm, wgmma}; }
    std::string name;
    std::string image;  // which of the embedded kernels run here: "sm_90", or "compute_80 (PTX)"
    Handle stream = nullptr;
    Handle context() const { return context_; }

  private:
    struct Function {
        std::string name;
        Handle handle;
    };
    Handle context_ = nullptr;
    bool dependent_launch_ = false;  // kernels wait for the one before themselves (tp_grid_wait)
    std::vector<Handle> modules_;
    std::vector<Function> functions_;
};

/// Device memory that is released with its owner.
class DeviceBlock {
  public:
    DeviceBlock() = default;
    DeviceBlock(const Device& device, size_t bytes) : device_(&device), pointer_(device.allocate(bytes)) {}
    DeviceBlock(DeviceBlock&& o) noexcept : device_(o.device_), pointer_(std::exchange(o.pointer_, 0)) {}
    DeviceBlock& operator=(DeviceBlock&& o) noexcept {
        std::swap(device_, o.device_), std::swap(pointer_, o.pointer_);
        return *this;
    }
    ~DeviceBlock() {
        if (pointer_) device_->release(pointer_);
    }
    /// Kernels may use it for ever: it is never released.
    void abandon() { pointer_ = 0; }
    const Device* device() const { return device_; }
    DevicePtr pointer() const { return pointer_; }

  private:
    const Device* device_ = nullptr;
    DevicePtr pointer_ = 0;
};

}  // namespace ggml_tp
