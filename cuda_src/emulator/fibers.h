// CUDA kernels on the CPU: a block's threads are fibers of one OS thread, switched at barriers and warp collectives, so the same
// source that NVRTC compiles runs under g++ (and its sanitizers). Blocks of a launch run on a few OS threads.
// A collective's work is done by the last lane to arrive. Not covered: the GPU's memory model and timing.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <chrono>
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
extern constinit thread_local Context current;  // constinit: else each use asks whether it is initialised

enum class Collective { kSync, kSum, kMax, kShuffle, kCall };

void sync_block();
/// A barrier of the block's first n threads.
void sync_some(unsigned n);
/// The running fiber waits for something that another fiber or another block will do, and asks again after this.
void spin();
/// What tp_signal and its readers order, for TSan: kernels' accesses before an add are seen after a read.
u32 read_signal(const u32* p);
void signal(u32* p);
void signal_peer(u32* p, u32 v);
u32 count(u32* p);
/// value: this lane's contribution; source: the lane read by a shuffle. Returns this lane's result.
float warp_float(Collective op, u32 mask, float value, int source);
u32 warp_ballot(u32 mask, bool predicate);
/// Every lane hands in a pointer; the last to arrive calls `function` with those of all 32 lanes.
using WarpFunction = void (*)(void* const (&lanes)[32]);
void warp_call(WarpFunction function, void* lane);
/// A lane's part of a warpgroup's product, computed as late as it may be: when the lane waits for its group. A tile that was given back
/// before then, or a sum that was read, is wrong here too.
using ProductFunction = void (*)(float* d, const char* a, const char* b, int thread);
void product_begin(ProductFunction function, float* d, u64 a, u64 b);
void product_commit();
void product_wait(int groups_left);

using Entry = void (*)(const void* args);
struct Kernel {
    const char* name;
    int arch_class;
    Entry entry;
    size_t args_bytes;
    unsigned max_threads;
    bool cooperative;  // its blocks wait for each other: each has an OS thread
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
#define TP_OUTLINE static __attribute__((noinline))
#define TP_MEMBER inline
#define threadIdx (tp_emulator::current.thread)
#define blockIdx (tp_emulator::current.block)
#define blockDim (tp_emulator::current.block_dim)
#define gridDim (tp_emulator::current.grid_dim)

#define TP_KERNEL_OF_KIND(name, Args, max_threads, cooperative)                                                                     \
    static void name(const ggml_tp::Args args);                                                                                     \
    static void name##_entry(const void* p) { name(*static_cast<const ggml_tp::Args*>(p)); }                                        \
    static const tp_emulator::Registration name##_registration(                                                                     \
        tp_emulator::Kernel{#name, TP_ARCH, name##_entry, sizeof(ggml_tp::Args), static_cast<unsigned>(max_threads), cooperative}); \
    static void name(const ggml_tp::Args args)
#define TP_KERNEL(name, Args, max_threads) TP_KERNEL_OF_KIND(name, Args, max_threads, false)
#define TP_KERNEL_RESIDENT(name, Args, max_threads, blocks) TP_KERNEL(name, Args, max_threads)
#define TP_KERNEL_COOPERATIVE(name, Args, max_threads) TP_KERNEL_OF_KIND(name, Args, max_threads, true)
#define TP_KERNEL_EARLY(name, Args, max_threads) TP_KERNEL(name, Args, max_threads)
#define TP_KERNEL_EARLY_RESIDENT(name, Args, max_threads, blocks) TP_KERNEL(name, Args, max_threads)
static inline void tp_grid_wait() {}
static inline u64 tp_nanoseconds() { return static_cast<u64>(std::chrono::steady_clock::now().time_since_epoch().count()); }
static inline u64 tp_cycles() { return tp_nanoseconds(); }
#define TP_DYN_SHARED(T, name) T* name = reinterpret_cast<T*>(tp_emulator::current.dynamic_shared)

static inline void __syncthreads() { tp_emulator::sync_block(); }
static inline void __syncwarp(u32 mask = ~0u) { tp_emulator::warp_float(tp_emulator::Collective::kSync, mask, 0, 0); }
// By bits: an integer that became a float on its way would lose its low ones.
template <class T>
static inline T __shfl_sync(u32 mask, T v, int source) {
    static_assert(sizeof(T) == sizeof(float));
    return __builtin_bit_cast(T, tp_emulator::warp_float(tp_emulator::Collective::kShuffle, mask, __builtin_bit_cast(float, v), source));
}
template <class T>
static inline T __shfl_xor_sync(u32 mask, T v, int x) {
    return __shfl_sync(mask, v, static_cast<int>(tp_emulator::current.linear & 31) ^ x);
}
static inline u32 __ballot_sync(u32 mask, int p) { return tp_emulator::warp_ballot(mask, p != 0); }
static inline float tp_warp_sum(float v) { return tp_emulator::warp_float(tp_emulator::Collective::kSum, ~0u, v, 0); }
static inline float tp_warp_max(float v) { return tp_emulator::warp_float(tp_emulator::Collective::kMax, ~0u, v, 0); }
static inline i32 atomicAdd(i32* p, i32 v) { return __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }
static inline u32 atomicExch(u32* p, u32 v) { return __atomic_exchange_n(p, v, __ATOMIC_RELAXED); }

/// mbarrier: a phase ends when all arrivals and all announced bytes are there. One OS thread runs a block: plain words do.
struct TpBarrier {
    u32 phase;
    int count, pending, bytes;
};
using TpBarrierAt = TpBarrier*;
using TpSharedAt = char*;
namespace tp_emulator {
void barrier_arrive(TpBarrier* b, int bytes_expected, int bytes_done, int arrivals);
void barrier_wait(TpBarrier* b, int parity);
}  // namespace tp_emulator
static inline void tp_barrier_init(TpBarrier* b, int count) { *b = {0, count, count, 0}; }
static inline void tp_barrier_init_fence() {}
static inline void tp_barrier_arrive(TpBarrier* b) { tp_emulator::barrier_arrive(b, 0, 0, 1); }
static inline void tp_barrier_expect(TpBarrier* b, u32 bytes) { tp_emulator::barrier_arrive(b, static_cast<int>(bytes), 0, 1); }
static inline void tp_barrier_wait(TpBarrier* b, int parity) { tp_emulator::barrier_wait(b, parity); }
static inline void tp_bulk_load(void* to, const char* from, u32 bytes, TpBarrier* b) {
    std::memcpy(to, from, bytes);
    tp_emulator::barrier_arrive(b, 0, static_cast<int>(bytes), 0);
}
static inline void tp_prefetch(const void*) {}
static inline u64 tp_read_once() { return 0; }
template <class T>
static inline void tp_keep(T&) {}
static inline void tp_bulk_load_once(void* to, const char* from, u32 bytes, TpBarrier* b, u64) { tp_bulk_load(to, from, bytes, b); }
static inline void tp_copy_async(void* to, const void* from) { std::memcpy(to, from, 16); }
static inline void tp_copy_async_or_zero(void* to, const void* from, bool inside) { inside ? std::memcpy(to, from, 16) : std::memset(to, 0, 16); }
static inline void tp_copy_async_four(void* to, const void* from, int bytes) { std::memset(to, 0, 4), std::memcpy(to, from, static_cast<size_t>(bytes)); }
static inline void tp_copy_commit() {}
template <int n>
static inline void tp_copy_wait_but() {}
static inline void tp_copy_wait() {}
template <int kThreads>
static inline void tp_sync_some() {
    tp_emulator::sync_some(kThreads);
}
static inline void tp_signal_peer(u32* p, u32 v) { tp_emulator::signal_peer(p, v); }
static inline u32 tp_read_peer(const u32* p) { return tp_emulator::read_signal(p); }
static inline u32 tp_count_peer(u32* p) { return tp_emulator::count(p); }
static inline void tp_signal(u32* p) { tp_emulator::signal(p); }
static inline u32 tp_read_signal(const u32* p) { return tp_emulator::read_signal(p); }
static inline void tp_store_tagged(u64* p, float value, u32 tag) {
    u32 bits;
    std::memcpy(&bits, &value, 4);
    __atomic_store_n(p, static_cast<u64>(tag) << 32 | bits, __ATOMIC_RELAXED);
}
static inline u64 tp_load_tagged(const u64* p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
static inline void tp_store_tagged_pair(u64* p, float first, float second, u32 tag) { tp_store_tagged(p, first, tag), tp_store_tagged(p + 1, second, tag); }
struct TpTaggedPair {
    u64 first, second;
};
static inline TpTaggedPair tp_load_tagged_pair(const u64* p) { return {tp_load_tagged(p), tp_load_tagged(p + 1)}; }
static inline u32 tp_in_register(u32 v) { return v; }
static inline u32 tp_half_twice(u32 halves, int which) { return (halves >> 16 * which & 0xffffu) * 0x10001u; }
static inline u32 tp_count(u32* p) { return tp_emulator::count(p); }
static inline u32 tp_peek(const u32* p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
static inline void tp_poke(u32* p, u32 v) { __atomic_store_n(p, v, __ATOMIC_RELAXED); }
static inline void tp_spin() { tp_emulator::spin(); }

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
static inline float tp_quotient(float a, float b) { return a / b; }
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline float tp_exp2(float x) { return exp2f(x); }
static inline float __fdividef(float x, float y) { return x / y; }
static inline int __ffs(int x) { return __builtin_ffs(x); }
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
static inline int tp_dp4a_unsigned(u32 a, int b, int c) {
    for (int i = 0; i < 32; i += 8) c += static_cast<int>(a >> i & 255) * static_cast<s8>(b >> i);
    return c;
}

// Tensor cores: fragments as in the PTX ISA's mma.m16n8k16. g = lane / 4, t = lane % 4; a: rows g, g + 8 at k 2t, 2t + 8; b: column g at
// k 2t, 2t + 8; d: rows g, g + 8 at columns 2t, 2t + 1.
namespace tp_emulator {
/// Eight numbers that lie side by side.
template <bool kBf16>
inline __m256 widen(const void* from) {
    const __m128i in = _mm_loadu_si128(static_cast<const __m128i*>(from));
    return kBf16 ? _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(in), 16)) : _mm256_cvtph_ps(in);
}
struct MmaLane {
    float* d;
    const u32 *a, *b;
};
template <bool kBf16>
inline void mma_16816(void* const (&lanes)[32]) {
    u16 bits[16][16], of_k[16][8];
    auto at = [&](int lane) -> const MmaLane& { return *static_cast<const MmaLane*>(lanes[lane]); };
    for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; ++i) std::memcpy(&bits[g + i % 2 * 8][2 * t + i / 2 * 8], &at(lane).a[i], 4);
        for (int i = 0; i < 2; ++i)
            for (int half = 0; half < 2; ++half) of_k[2 * t + i * 8 + half][g] = static_cast<u16>(at(lane).b[i] >> 16 * half);
    }
    __m256 columns[16];
    for (int k = 0; k < 16; ++k) columns[k] = widen<kBf16>(of_k[k]);
    for (int row = 0; row < 16; ++row) {
        const __m256 a[2] = {widen<kBf16>(bits[row]), widen<kBf16>(bits[row] + 8)};
        __m256 sum{};
#pragma GCC unroll 16
        for (int k = 0; k < 16; ++k) sum += a[k / 8][k % 8] * columns[k];
#pragma GCC unroll 8
        for (int column = 0; column < 8; ++column) at(row % 8 * 4 + column / 2).d[row / 8 * 2 + column % 2] += sum[column];
    }
}
struct LdmatrixLane {
    u32* r;
    const char* row;
    const char* from[4];
};
/// Lane l gives the address of row l % 8 of matrix l / 8, and is told which addresses to read: it reads them itself, so that a
/// sanitizer sees who does.
inline void ldmatrix_x4(void* const (&lanes)[32]) {
    for (int lane = 0; lane < 32; ++lane)
        for (int m = 0; m < 4; ++m) static_cast<LdmatrixLane*>(lanes[lane])->from[m] = static_cast<LdmatrixLane*>(lanes[8 * m + lane / 4])->row + lane % 4 * 4;
}
}  // namespace tp_emulator
static inline void tp_mma_f16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    tp_emulator::MmaLane lane{d, a, b};
    tp_emulator::warp_call(tp_emulator::mma_16816<false>, &lane);
}
static inline void tp_mma_bf16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    tp_emulator::MmaLane lane{d, a, b};
    tp_emulator::warp_call(tp_emulator::mma_16816<true>, &lane);
}
static inline void tp_ldmatrix_x4(u32 (&r)[4], const void* row) {
    tp_emulator::LdmatrixLane lane{r, static_cast<const char*>(row), {}};
    tp_emulator::warp_call(tp_emulator::ldmatrix_x4, &lane);
    for (int m = 0; m < 4; ++m) std::memcpy(&r[m], lane.from[m], 4);
}
static inline void tp_ldmatrix_x4_trans(u32 (&r)[4], const void* row) {
    struct Lane {
        const char* row;
        const char* from[4][2];
    } lane{static_cast<const char*>(row), {}};
    tp_emulator::warp_call(
        [](void* const(&lanes)[32]) {
            for (int l = 0; l < 32; ++l)
                for (int m = 0; m < 4; ++m)
                    for (int i = 0; i < 2; ++i) static_cast<Lane*>(lanes[l])->from[m][i] = static_cast<Lane*>(lanes[8 * m + l % 4 * 2 + i])->row + l / 4 * 2;
        },
        &lane);
    for (int m = 0; m < 4; ++m) {
        u16 half[2];
        for (int i = 0; i < 2; ++i) std::memcpy(&half[i], lane.from[m][i], 2);
        r[m] = half[0] | static_cast<u32>(half[1]) << 16;
    }
}
// Warpgroups: see tp.h. A tile's name is its address; as on a GPU, bits 4 to 6 of an address within it are exchanged by bits 7 to 9.
#define TP_WGMMA (TP_ARCH == 900)
namespace tp_emulator {
template <int kColumns, bool kBf16>
inline void wgmma_lane(float* d, const char* a, const char* b, int thread) {
    struct Row {
        __m256 k[2];
    };
    auto row = [](const char* tile, int r) {
        Row out;
        for (int i = 0; i < 2; ++i) {
            const u64 at = reinterpret_cast<u64>(tile) + static_cast<u64>(r / 8 * 1024 + r % 8 * 128 + i * 16);
            out.k[i] = widen<kBf16>(reinterpret_cast<const char*>(at ^ (at >> 7 & 7) << 4));
        }
        return out;
    };
    const int first = thread / 32 * 16 + thread % 32 / 4;
    const Row rows[2] = {row(a, first), row(a, first + 8)};
    for (int i = 0; i < kColumns / 4; ++i) {
        const Row column = row(b, i / 2 * 8 + thread % 4 * 2 + i % 2);
        for (int e = 0; e < 2; ++e) {
            const __m256 products = rows[e].k[0] * column.k[0] + rows[e].k[1] * column.k[1];
            float sum = 0;
#pragma GCC unroll 8
            for (int k = 0; k < 8; ++k) sum += products[k];
            d[i / 2 * 4 + e * 2 + i % 2] += sum;
        }
    }
}
}  // namespace tp_emulator
static inline char* tp_align_tile(char* p) { return p + (0 - reinterpret_cast<u64>(p)) % 1024; }
static inline u64 tp_wgmma_tile(const char* p) { return reinterpret_cast<u64>(p); }
static inline u64 tp_wgmma_behind(u64 tile, u32 bytes) { return tile + bytes; }
static inline void tp_async_fence() {}
static inline void tp_wgmma_fence() {}
static inline void tp_wgmma_commit() { tp_emulator::product_commit(); }
template <int kLeft>
static inline void tp_wgmma_wait() {
    tp_emulator::product_wait(kLeft);
    __syncwarp();  // .sync.aligned: a warp's lanes have waited when one has
}
template <int kColumns, bool kBf16>
static inline void tp_wgmma(float (&d)[kColumns / 2], u64 a, u64 b) {
    tp_emulator::product_begin(tp_emulator::wgmma_lane<kColumns, kBf16>, d, a, b);
}
/// Two halves: x * y + z, rounded once.
static inline u32 tp_half2_fma(u32 x, u32 y, u32 z) {
    u32 out = 0;
    for (int i = 0; i < 2; ++i) {
        auto part = [&](u32 v) { return tp_half_to_float(static_cast<u16>(v >> 16 * i)); };
        out |= static_cast<u32>(tp_float_to_half(part(x) * part(y) + part(z))) << 16 * i;
    }
    return out;
}
static inline u32 tp_byte_perm(u32 x, u32 y, u32 selector) {
    const u64 bytes = static_cast<u64>(y) << 32 | x;
    u32 out = 0;
    for (int i = 0; i < 4; ++i) out |= static_cast<u32>(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return out;
}
static inline u32 tp_byte_signs(u32 x) { return (x >> 7 & 0x01010101u) * 255u; }
static inline u32 tp_byte_perm_sign(u32 x, u32 y, u32 selector) {
    const u32 bytes = tp_byte_perm(x, y, selector), of_sign = selector >> 3 & 0x1111u;
    u32 which = 0;
    for (int i = 0; i < 4; ++i) which |= (of_sign >> 4 * i & 1) * 255u << 8 * i;
    return (bytes & ~which) | (tp_byte_signs(bytes) & which);
}
