// CUDA kernels on the CPU: a block's threads are fibers of one OS thread, switched at barriers and warp collectives, so the same
// source that NVRTC compiles runs under g++ (and its sanitizers). Blocks of a launch run on a few OS threads.
// A collective's work is done by the last lane to arrive. Not covered: the GPU's memory model and timing.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "args.h"

#ifndef TP_ARCH
#define TP_ARCH 600
#endif

typedef unsigned char u8;
typedef signed char s8;
typedef unsigned short u16;
using ggml_tp::i32;
using ggml_tp::i64;
using ggml_tp::u32;
using ggml_tp::u64;

namespace tp_emulator {

struct Dim3 {
    unsigned x, y, z;
};

/// What the running fiber sees. Set by the scheduler before it switches to a fiber.
struct Context {
    Dim3 thread, block, block_dim, grid_dim;
    unsigned linear;  // thread index within the block
    char* dynamic_shared;
};
extern thread_local Context current;

enum class Collective { kSync, kSum, kMax, kShuffle };

void sync_block();
/// value: this lane's contribution; source: the lane read by a shuffle. Returns this lane's result.
float warp_float(Collective op, u32 mask, float value, int source);
u32 warp_ballot(u32 mask, bool predicate);

using Entry = void (*)(const void* args);
struct Kernel {
    const char* name;
    int arch_class;
    Entry entry;
    size_t args_bytes;
    unsigned max_threads;
};
/// Registration at load time; one per kernel and compile class.
struct Registration {
    explicit Registration(const Kernel& kernel);
};
const Kernel* find_kernel(const char* name, int compute_capability);

/// Runs a launch to its end on the calling thread and its helpers. False: a block deadlocked (reason in *error).
bool run(const Kernel& kernel, Dim3 grid, Dim3 block, size_t dynamic_shared_bytes, const void* args, const char** error);

}  // namespace tp_emulator

#define __device__
#define __global__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __shared__ static thread_local  // one block at a time per OS thread
#define __align__(n) alignas(n)
#define TP_DEVICE static inline
#define TP_MEMBER inline
#define threadIdx (tp_emulator::current.thread)
#define blockIdx (tp_emulator::current.block)
#define blockDim (tp_emulator::current.block_dim)
#define gridDim (tp_emulator::current.grid_dim)

#define TP_KERNEL(name, Args, max_threads)                                                                             \
    static void name(const ggml_tp::Args args);                                                                        \
    static void name##_entry(const void* p) { name(*static_cast<const ggml_tp::Args*>(p)); }                           \
    static const tp_emulator::Registration name##_registration(                                                        \
        tp_emulator::Kernel{#name, TP_ARCH, name##_entry, sizeof(ggml_tp::Args), static_cast<unsigned>(max_threads)}); \
    static void name(const ggml_tp::Args args)
#define TP_DYN_SHARED(T, name) T* name = reinterpret_cast<T*>(tp_emulator::current.dynamic_shared)

static inline void __syncthreads() { tp_emulator::sync_block(); }
static inline void __syncwarp(u32 mask = ~0u) { tp_emulator::warp_float(tp_emulator::Collective::kSync, mask, 0, 0); }
static inline float __shfl_sync(u32 mask, float v, int source) { return tp_emulator::warp_float(tp_emulator::Collective::kShuffle, mask, v, source); }
static inline float __shfl_xor_sync(u32 mask, float v, int x) {
    return tp_emulator::warp_float(tp_emulator::Collective::kShuffle, mask, v, static_cast<int>(tp_emulator::current.linear & 31) ^ x);
}
static inline u32 __ballot_sync(u32 mask, int p) { return tp_emulator::warp_ballot(mask, p != 0); }
static inline float tp_warp_sum(float v) { return tp_emulator::warp_float(tp_emulator::Collective::kSum, ~0u, v, 0); }
static inline float tp_warp_max(float v) { return tp_emulator::warp_float(tp_emulator::Collective::kMax, ~0u, v, 0); }
static inline u32 atomicExch(u32* p, u32 v) { return __atomic_exchange_n(p, v, __ATOMIC_RELAXED); }

static inline float __int_as_float(int x) {
    float f;
    std::memcpy(&f, &x, 4);
    return f;
}
static inline int __float_as_int(float f) {
    int x;
    std::memcpy(&x, &f, 4);
    return x;
}
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline float tp_half_to_float(u16 h) {
    _Float16 f;
    std::memcpy(&f, &h, 2);
    return static_cast<float>(f);
}
static inline u16 tp_float_to_half(float f) {
    _Float16 v = static_cast<_Float16>(f);
    u16 h;
    std::memcpy(&h, &v, 2);
    return h;
}
static inline float tp_bf16_to_float(u16 b) { return __int_as_float(static_cast<int>(static_cast<u32>(b) << 16)); }
static inline u16 tp_float_to_bf16(float f) {
    u32 x = static_cast<u32>(__float_as_int(f));
    if ((x & 0x7fffffffu) > 0x7f800000u) return static_cast<u16>((x >> 16) | 64);
    return static_cast<u16>((x + 0x7fffu + (x >> 16 & 1u)) >> 16);
}
static inline int tp_dp4a(int a, int b, int c) {
    for (int i = 0; i < 32; i += 8) c += static_cast<s8>(a >> i) * static_cast<s8>(b >> i);
    return c;
}
