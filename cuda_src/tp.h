// What every kernel includes: the same names for NVRTC (own definitions and inline PTX, no NVIDIA headers) and for the emulator
// (CUDA threads as fibers, emulator/fibers.h). A kernel is declared by TP_KERNEL(name, Args, max_threads) { ... args ... }.
#pragma once
#include "args.h"

/// Sixteen bytes, loaded and stored in one instruction.
struct alignas(16) TpInt4 {
    int x, y, z, w;
};

#ifdef TP_EMULATED
#include "emulator/fibers.h"
static inline TpInt4 tp_load_stream(const char* p) { return *(const TpInt4*)p; }
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
#define TP_KERNEL(name, Args, max_threads) extern "C" __global__ void __launch_bounds__(max_threads) name(const ggml_tp::Args args)
#define TP_DYN_SHARED(T, name)                                \
    extern __shared__ __align__(16) char tp_dynamic_shared[]; \
    T* name = (T*)tp_dynamic_shared
#define TP_DEVICE __device__ __forceinline__
#define TP_MEMBER __device__ __forceinline__  // of a struct

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
#endif
