// What every kernel includes: the same names for NVRTC (own definitions and inline PTX, no NVIDIA headers) and for the emulator
// (CUDA threads as fibers, emulator/fibers.h). A kernel is declared by TP_KERNEL(name, Args, max_threads) { ... args ... }.
#pragma once
#include "args.h"

/// Sixteen bytes, loaded and stored in one instruction.
struct alignas(16) TpInt4 {
    int x, y, z, w;
};
/// The same of eight.
struct alignas(8) TpFloat2 {
    float x, y;
};

#ifdef TP_EMULATED
#include "emulator/fibers.h"
static inline TpInt4 tp_load_stream(const char* p) { return *(const TpInt4*)p; }
static inline TpInt4 tp_load_peer(const char* p) { return *(const TpInt4*)p; }
static inline TpInt4 tp_load_in_order(const void* p, bool inside) { return inside ? *(const TpInt4*)p : TpInt4{0, 0, 0, 0}; }
static inline TpInt4 tp_load_any_in_order(const void* p) { return *(const TpInt4*)p; }
static inline int tp_load_word_in_order(const void* p, bool inside) { return inside ? *(const int*)p : 0; }
static inline float tp_mul_rounded(float a, float b) {
    float product = a * b;
    asm("" : "+x"(product));
    return product;
}
#else

typedef unsigned char u8;
typedef signed char s8;
typedef unsigned short u16;
using ggml_tp::i32;
using ggml_tp::i64;
using ggml_tp::u32;
using ggml_tp::u64;

#define TP_ARCH __CUDA_ARCH__
#define INFINITY __int_as_float(0x7f800000)
// Arguments stay in constant memory: a copy to every thread's stack would cost more than small kernels themselves.
#if __CUDA_ARCH__ >= 700
#define TP_GRID_CONSTANT __grid_constant__
#else
#define TP_GRID_CONSTANT
#endif
// The last arguments: the most threads of a block, and how many blocks a multiprocessor is to hold.
#define TP_KERNEL_BODY(name, Args, before, ...)                                                                 \
    static __device__ __forceinline__ void name##_body(const ggml_tp::Args& args);                              \
    extern "C" __global__ void __launch_bounds__(__VA_ARGS__) name(const TP_GRID_CONSTANT ggml_tp::Args args) { \
        before;                                                                                                 \
        name##_body(args);                                                                                      \
    }                                                                                                           \
    static __device__ __forceinline__ void name##_body(const ggml_tp::Args& args)
#define TP_KERNEL(name, Args, max_threads) TP_KERNEL_BODY(name, Args, tp_grid_wait(), max_threads)
// A kernel that may have all registers of so many blocks: the compiler, which knows no more than its threads, would rather spill some to
// fit one block more.
#define TP_KERNEL_RESIDENT(name, Args, max_threads, blocks) TP_KERNEL_BODY(name, Args, tp_grid_wait(), max_threads, blocks)
// A kernel that calls tp_grid_wait itself, after it has begun to read what no kernel of the graph writes: weights.
#define TP_KERNEL_EARLY(name, Args, max_threads) TP_KERNEL_BODY(name, Args, (void)0, max_threads)
#define TP_KERNEL_EARLY_RESIDENT(name, Args, max_threads, blocks) TP_KERNEL_BODY(name, Args, (void)0, max_threads, blocks)
// A kernel whose blocks wait for each other: all of them are on the device at once.
#define TP_KERNEL_COOPERATIVE(name, Args, max_threads) TP_KERNEL_BODY(name, Args, (void)0, max_threads)
#define TP_DYN_SHARED(T, name)                                \
    extern __shared__ __align__(16) char tp_dynamic_shared[]; \
    T* name = (T*)tp_dynamic_shared
#define TP_DEVICE __device__ __forceinline__
#define TP_OUTLINE static __device__ __noinline__  // registers of its own, and its code once
#define TP_MEMBER __device__ __forceinline__       // of a struct

/// Programmatic dependent launch (sm_90): this grid was started before the one ahead of it had ended, and waits for it here; the one
/// behind may start now. Elsewhere grids follow each other and this is nothing.
TP_DEVICE void tp_grid_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;\n\tgriddepcontrol.wait;" ::: "memory");
#endif
}
/// Sixteen aligned bytes that are read once: they need not stay in L1.
TP_DEVICE TpInt4 tp_load_stream(const char* p) {
    TpInt4 v;
#if __CUDA_ARCH__ >= 700
    asm volatile("ld.global.nc.L1::no_allocate.v4.s32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
#else
    asm volatile("ld.global.nc.v4.s32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
#endif
    return v;
}
/// Aligned words; zero where not `inside`. They go out in the order in which they are written, and before anything that waits for one of them:
/// left to itself, the compiler puts loads where their values are used, one wait behind the other.
TP_DEVICE TpInt4 tp_load_in_order(const void* p, bool inside) {
    TpInt4 v;
    asm volatile(
        "{ .reg .pred q; setp.ne.s32 q, %5, 0; mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0; @q ld.global.v4.s32 {%0, %1, %2, %3}, [%4]; }"
        : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
        : "l"(p), "r"((int)inside));
    return v;
}
/// From global or shared memory.
TP_DEVICE TpInt4 tp_load_any_in_order(const void* p) {
    TpInt4 v;
    asm volatile("ld.v4.s32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}
TP_DEVICE int tp_load_word_in_order(const void* p, bool inside) {
    int v;
    asm volatile("{ .reg .pred q; setp.ne.s32 q, %2, 0; mov.b32 %0, 0; @q ld.global.s32 %0, [%1]; }" : "=&r"(v) : "l"(p), "r"((int)inside));
    return v;
}
/// Brings a line of 128 bytes into the L2.
TP_DEVICE void tp_prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
TP_DEVICE u64 tp_nanoseconds() {
    u64 t;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
    return t;
}
TP_DEVICE u64 tp_cycles() {
    u64 t;
    asm volatile("mov.u64 %0, %clock64;" : "=l"(t));
    return t;
}
TP_DEVICE float tp_half_to_float(u16 h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}
TP_DEVICE u16 tp_float_to_half(float f) {
    u16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}
TP_DEVICE float tp_bf16_to_float(u16 b) { return __int_as_float((int)b << 16); }
TP_DEVICE u16 tp_float_to_bf16(float f) {
    u32 x = (u32)__float_as_int(f);
    if ((x & 0x7fffffffu) > 0x7f800000u) return (u16)((x >> 16) | 64);  // NaN stays NaN
    return (u16)((x + 0x7fffu + (x >> 16 & 1u)) >> 16);
}
/// a / b rounded as `/` does, for b and 1 / b that are normal numbers: without `/`'s path for all others, which zeros take too (one H100: 1,250
/// cycles of a layer of Qwen3-30B-A3B were that path).
TP_DEVICE float tp_quotient(float a, float b) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(b));
    r = fmaf(fmaf(-b, r, 1.0f), r, r);
    float q = a * r;
    q = fmaf(fmaf(-b, q, a), r, q);
    return fmaf(fmaf(-b, q, a), r, q);
}
/// A product that is rounded, never part of a fused multiply-add.
TP_DEVICE float tp_mul_rounded(float a, float b) { return __fmul_rn(a, b); }
/// 2 to the x, in one instruction: 2 units in the last place; 0 of -inf and of what would be denormal.
TP_DEVICE float tp_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
TP_DEVICE float tp_warp_sum(float v) {
#pragma unroll
    for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o);
    return v;
}
TP_DEVICE float tp_warp_max(float v) {
#pragma unroll
    for (int o = 16; o; o >>= 1) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, o));
    return v;
}
TP_DEVICE int tp_dp4a(int a, int b, int c) {
#if __CUDA_ARCH__ >= 610
    return __dp4a(a, b, c);
#else  // sm_60 has no dp4a
    return c + (s8)a * (s8)b + (s8)(a >> 8) * (s8)(b >> 8) + (s8)(a >> 16) * (s8)(b >> 16) + (a >> 24) * (b >> 24);
#endif
}
/// The same of unsigned bytes in a.
TP_DEVICE int tp_dp4a_unsigned(u32 a, int b, int c) {
#if __CUDA_ARCH__ >= 610
    asm("dp4a.u32.s32 %0, %0, %1, %2;" : "+r"(a) : "r"(b), "r"(c));
    return (int)a;
#else
    return c + (int)(a & 255) * (s8)b + (int)(a >> 8 & 255) * (s8)(b >> 8) + (int)(a >> 16 & 255) * (s8)(b >> 16) + (int)(a >> 24) * (b >> 24);
#endif
}
/// Two halves: x * y + z, rounded once.
TP_DEVICE u32 tp_half2_fma(u32 x, u32 y, u32 z) {
    u32 out;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(x), "r"(y), "r"(z));
    return out;
}
/// One half of two, twice. (As byte permutations these were instructions, and registers, of their own; moved so they are an operand's selector.)
TP_DEVICE u32 tp_half_twice(u32 halves, int which) {
    u32 out;
    if (which) asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; mov.b32 %0, {h, h}; }" : "=r"(out) : "r"(halves));
    else asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; mov.b32 %0, {l, l}; }" : "=r"(out) : "r"(halves));
    return out;
}
/// Words that other GPUs wait for: what this thread, and by a barrier before it its block, has written to any GPU is seen after a read of the word.
TP_DEVICE void tp_signal_peer(u32* p, u32 v) {
#if __CUDA_ARCH__ >= 700
    asm volatile("fence.acq_rel.sys;\n\tst.release.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
#else
    asm volatile("membar.sys;\n\tst.volatile.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
#endif
}
TP_DEVICE u32 tp_read_peer(const u32* p) {
    u32 v;
#if __CUDA_ARCH__ >= 700
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
#else
    asm volatile("ld.volatile.global.u32 %0, [%1];\n\tmembar.sys;" : "=r"(v) : "l"(p) : "memory");
#endif
    return v;
}
/// Adds one; returns what was there. The last to add may tell other GPUs what all before it have written.
TP_DEVICE u32 tp_count_peer(u32* p) {
#if __CUDA_ARCH__ >= 700
    asm volatile("fence.acq_rel.sys;" ::: "memory");
    const u32 v = atomicAdd(p, 1u);
    asm volatile("fence.acq_rel.sys;" ::: "memory");
#else
    asm volatile("membar.sys;" ::: "memory");
    const u32 v = atomicAdd(p, 1u);
    asm volatile("membar.sys;" ::: "memory");
#endif
    return v;
}
/// Sixteen aligned bytes of any GPU, not those that L1 may hold.
TP_DEVICE TpInt4 tp_load_peer(const char* p) {
    TpInt4 v;
    asm volatile("ld.global.cg.v4.s32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
    return v;
}
/// Two words {value, tag} side by side, at a multiple of 16 bytes, that another GPU reads while this one stores them: neither is ever half of one. Nothing else
/// is ordered by them.
TP_DEVICE void tp_store_tagged_pair(u64* p, float first, float second, u32 tag) {
    asm volatile("{ .reg .b64 v, w; mov.b64 v, {%1, %3}; mov.b64 w, {%2, %3}; st.volatile.global.v2.b64 [%0], {v, w}; }" ::"l"(p), "r"(__float_as_int(first)),
                 "r"(__float_as_int(second)), "r"(tag)
                 : "memory");
}
struct TpTaggedPair {
    u64 first, second;
};
TP_DEVICE TpTaggedPair tp_load_tagged_pair(const u64* p) {
    TpTaggedPair v;
    asm volatile("ld.volatile.global.v2.b64 {%0, %1}, [%2];" : "=l"(v.first), "=l"(v.second) : "l"(p) : "memory");
    return v;
}
TP_DEVICE void tp_spin() {}
TP_DEVICE u32 tp_byte_perm(u32 x, u32 y, u32 selector) { return __byte_perm(x, y, selector); }
/// Each byte's top bit all over it. (PTX's prmt has that mode, __byte_perm leaves the selector's bit for it out.)
TP_DEVICE u32 tp_byte_signs(u32 x) {
    u32 out;
    asm("prmt.b32 %0, %1, 0, 0xba98;" : "=r"(out) : "r"(x));
    return out;
}
/// tp_byte_perm, but where the top bit of a selector's nibble is set the byte's sign, all over it.
TP_DEVICE u32 tp_byte_perm_sign(u32 x, u32 y, u32 selector) {
    u32 out;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(x), "r"(y), "r"(selector));
    return out;
}
/// A constant that the compiler does not know, as blocks are not that high: what it knows it puts into instructions, and their other operands that do
/// not fit there beside it into registers, again and again.
TP_DEVICE u32 tp_in_register(u32 v) { return v + threadIdx.z; }
#if __CUDA_ARCH__ >= 700
TP_DEVICE u32 tp_shared_address(const void* p) {
    u32 address;
    asm("{ .reg .u64 p; cvta.to.shared.u64 p, %1; cvt.u32.u64 %0, p; }" : "=r"(address) : "l"(p));
    return address;
}
/// Where something is in shared memory: an address of 32 bits. Of a pointer the compiler finds the upper half again at each use, which takes 35
/// cycles, and throws it away; volatile, as it would not be kept either.
struct TpSharedAt {
    u32 address;
    TP_MEMBER TpSharedAt(const void* p) { asm volatile("{ .reg .u64 p; cvta.to.shared.u64 p, %1; cvt.u32.u64 %0, p; }" : "=r"(address) : "l"(p)); }
    TP_MEMBER TpSharedAt operator+(u32 bytes) const {
        TpSharedAt other = *this;
        other.address += bytes;
        return other;
    }
};
#endif
#if __CUDA_ARCH__ >= 900
/// A barrier in shared memory (mbarrier): a phase ends when `count` arrivals and all announced bytes are there.
struct TpBarrier {
    u64 word;
};
/// A barrier, or the first of some.
struct TpBarrierAt {
    u32 address;
    TP_MEMBER TpBarrierAt(const TpBarrier* b) : address(TpSharedAt(b).address) {}
    TP_MEMBER TpBarrierAt operator+(int i) const {
        TpBarrierAt other = *this;
        other.address += (u32)i * 8;
        return other;
    }
};
TP_DEVICE void tp_barrier_init(TpBarrierAt b, int count) { asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(b.address), "r"(count) : "memory"); }
/// After the last init, before the block's first barrier.
/// What this thread stored into shared memory comes before other threads' wgmma and bulk copies, once they have waited for it.
TP_DEVICE void tp_async_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
TP_DEVICE void tp_barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
TP_DEVICE void tp_barrier_arrive(TpBarrierAt b) { asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(b.address) : "memory"); }
TP_DEVICE void tp_barrier_expect(TpBarrierAt b, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(b.address), "r"(bytes) : "memory");
}
/// What is computed here, and not where it is used: the compiler would move that behind a wait.
TP_DEVICE void tp_keep(u32& v) { asm volatile("" : "+r"(v)); }
TP_DEVICE void tp_keep(const char*& p) { asm volatile("" : "+l"(p)); }
TP_DEVICE void tp_keep(TpSharedAt& at) { tp_keep(at.address); }
TP_DEVICE void tp_keep(TpBarrierAt& at) { tp_keep(at.address); }
/// Until the phase of this parity has ended.
TP_DEVICE void tp_barrier_wait(TpBarrierAt b, int parity) {
    asm volatile("{ .reg .pred p; AGAIN: mbarrier.try_wait.parity.shared.b64 p, [%0], %1; @p bra DONE; bra AGAIN; DONE: }" ::"r"(b.address), "r"(parity)
                 : "memory");
}
/// Copies `bytes` (a multiple of 16, both ends 16-byte aligned) to shared memory; they count towards b's announced bytes.
TP_DEVICE void tp_bulk_load(TpSharedAt to, const char* from, u32 bytes, TpBarrierAt b) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to.address), "l"(from), "r"(bytes),
                 "r"(b.address)
                 : "memory");
}
/// The same of bytes that nobody reads again soon: they leave the L2 first. once: tp_read_once().
TP_DEVICE u64 tp_read_once() {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
TP_DEVICE void tp_bulk_load_once(TpSharedAt to, const char* from, u32 bytes, TpBarrierAt b, u64 once) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(to.address), "l"(from),
                 "r"(bytes), "r"(b.address), "l"(once)
                 : "memory");
}
/// A barrier of the first `threads` threads of a block.
template <int kThreads>
TP_DEVICE void tp_sync_some() {
    asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory");
}
/// Counters that blocks (and GPUs) wait for: what was written before an add is seen after a read of its result.
TP_DEVICE void tp_signal(u32* p) { asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(p) : "memory"); }
TP_DEVICE u32 tp_read_signal(const u32* p) {
    u32 v;
    asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
/// A word {value, tag} that another GPU reads while this one stores it: never half of it. Nothing else is ordered by it.
TP_DEVICE void tp_store_tagged(u64* p, float value, u32 tag) {
    asm volatile("{ .reg .b64 v; mov.b64 v, {%1, %2}; st.relaxed.sys.global.b64 [%0], v; }" ::"l"(p), "r"(__float_as_int(value)), "r"(tag) : "memory");
}
TP_DEVICE u64 tp_load_tagged(const u64* p) {
    u64 v;
    asm volatile("ld.relaxed.sys.global.b64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
    return v;
}
/// Adds one; returns what was there.
TP_DEVICE u32 tp_count(u32* p) {
    u32 v;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(v) : "l"(p) : "memory");
    return v;
}
/// A word of shared memory that one warp writes and another looks at now and then: a hint, nothing is ordered by it.
TP_DEVICE u32 tp_peek(u32* p) { return atomicOr(p, 0u); }
TP_DEVICE void tp_poke(u32* p, u32 v) { atomicExch(p, v); }
#endif
#if __CUDA_ARCH__ >= 800
/// Sixteen bytes to shared memory, without waiting; tp_copy_wait waits for all that this thread has begun.
TP_DEVICE void tp_copy_async(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(tp_shared_address(to)), "l"(from) : "memory");
}
/// The same; zeros where not `inside`, and nothing is read.
TP_DEVICE void tp_copy_async_or_zero(void* to, const void* from, bool inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(tp_shared_address(to)), "l"(from), "r"(inside ? 16 : 0) : "memory");
}
TP_DEVICE void tp_copy_async_or_zero(TpSharedAt to, const void* from, bool inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to.address), "l"(from), "r"(inside ? 16 : 0) : "memory");
}
/// Four aligned bytes, of which the first `bytes` (0 to 4) are read and the others zero.
TP_DEVICE void tp_copy_async_four(TpSharedAt to, const void* from, int bytes) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to.address), "l"(from), "r"(bytes) : "memory");
}
/// Ends a group of them; tp_copy_wait_but<n> waits for all groups but the last n.
TP_DEVICE void tp_copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int n>
TP_DEVICE void tp_copy_wait_but() {
    asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
}
TP_DEVICE void tp_copy_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }
TP_DEVICE void tp_mma_f16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
TP_DEVICE void tp_mma_bf16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
/// Four 8x8 matrices of halves from shared memory: lane l gives the address of row l % 8 of matrix l / 8.
TP_DEVICE void tp_ldmatrix_x4(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(tp_shared_address(row))
                 : "memory");
}
/// The same, each matrix transposed.
TP_DEVICE void tp_ldmatrix_x4_trans(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(tp_shared_address(row))
                 : "memory");
}
#endif
// ---- warpgroups (sm_90a alone): four warps multiply tiles in shared memory, 64 x 16 by 16 x N, while they go on.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define TP_WGMMA 1
/// The first multiple of 1024 from p on: where a tile with swizzled rows may begin.
TP_DEVICE char* tp_align_tile(char* p) { return p + ((0u - tp_shared_address(p)) & 1023u); }
/// A tile of halves with 128 bytes of k a row, 16-byte chunk c of row r at r * 128 + (c ^ r % 8) * 16; p: 32 bytes on for each 16 of k.
/// Bits: address / 16; 62: the swizzle of 128 bytes; 32: 1024 / 16 between groups of eight rows.
TP_DEVICE u64 tp_wgmma_tile(const char* p) { return 1ull << 62 | 64ull << 32 | 1ull << 16 | (tp_shared_address(p) >> 4 & 0x3fffu); }
/// The tile that lies so many bytes behind.
TP_DEVICE u64 tp_wgmma_behind(u64 tile, u32 bytes) { return (tile & ~0xffffffffull) | ((u32)tile + (bytes >> 4)); }
/// Before the first product of a group: registers are as they should be.
TP_DEVICE void tp_wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
TP_DEVICE void tp_wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
/// Until at most `kLeft` of the groups are under way: the others' tiles are free, and with 0 the sums are there.
template <int kLeft>
TP_DEVICE void tp_wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}
#define TP_NUMBERS_32 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TP_NUMBERS_64 \
    TP_NUMBERS_32     \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define TP_NUMBERS_128 \
    TP_NUMBERS_64      \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define TP_SUMS_8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define TP_SUMS_32(i) TP_SUMS_8(i), TP_SUMS_8(i + 8), TP_SUMS_8(i + 16), TP_SUMS_8(i + 24)
#define TP_SUMS_64(i) TP_SUMS_32(i), TP_SUMS_32(i + 32)
#define TP_SUMS_128(i) TP_SUMS_64(i), TP_SUMS_64(i + 64)
#define TP_WGMMA_OF(columns, type, registers, a_number, b_number)                                                                                     \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." #type "." #type " {" TP_NUMBERS_##registers "}, %" #a_number ", %" #b_number \
                                                                                                                     ", 1, 1, 1, 0, 0;"               \
                 : TP_SUMS_##registers(0)                                                                                                             \
                 : "l"(a), "l"(b))
#define TP_WGMMA_OF_TYPES(columns, registers, a_number, b_number)                   \
    if constexpr (kBf16) TP_WGMMA_OF(columns, bf16, registers, a_number, b_number); \
    else TP_WGMMA_OF(columns, f16, registers, a_number, b_number)
/// d[4 * j + e] of lane l of warp w: row 16 * w + l / 4 + e / 2 * 8, column 8 * j + l % 4 * 2 + e % 2 of the product of tiles a and b.
template <int kColumns, bool kBf16>
TP_DEVICE void tp_wgmma(float (&d)[kColumns / 2], u64 a, u64 b) {
    if constexpr (kColumns == 64) {
        TP_WGMMA_OF_TYPES(64, 32, 32, 33);
    } else if constexpr (kColumns == 128) {
        TP_WGMMA_OF_TYPES(128, 64, 64, 65);
    } else {
        static_assert(kColumns == 256, "");
        TP_WGMMA_OF_TYPES(256, 128, 128, 129);
    }
}
#endif
#endif
