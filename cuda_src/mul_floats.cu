// MUL_MAT of floats and many columns in f32, on any architecture: routers (whose near ties tensor cores' halves would tip), attention without
// flash attention, and F16 weights where there are no tensor cores. A block computes 32 x 32 of y; k comes in steps of 64 through shared memory,
// the next step's elements in registers meanwhile. Each warp multiplies all of the tile by its own eighth of a step, four rows by eight columns a
// lane, so that few tiles fill a GPU (a router of 128 experts and 512 tokens has 64); the eight warps' sums meet at the end, in order.
// grid: (n / 32, m / 32, ne2 * ne3 of x), block: 256.
#include "mul_floats.h"

#include "dequantize.h"
#include "index.h"
#include "quantize_group.h"

namespace ggml_tp {

template <int kType>
TP_DEVICE void mul_floats(const MulMatArgs& a) {
    constexpr int kWarps = kFloatsThreads / 32, kOwn = kFloatsStep / kWarps, kFetched = kFloatsTile * kFloatsStep / kFloatsThreads;
    constexpr int kRows = 4, kColumns = 8;                             // of a lane, 8 and 4 apart
    __shared__ TpInt4 shared[kWarps * kFloatsTile * kFloatsTile / 4];  // two tiles of a step, then the sums
    float *const w_tile = (float*)shared, *const x_tile = w_tile + kFloatsTile * kFloatsStride;
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, lane_row = lane / 4, lane_column = lane % 4;
    const i64 row0 = (i64)blockIdx.x * kFloatsTile, column0 = (i64)blockIdx.y * kFloatsTile, i2 = blockIdx.z % a.x.ne[2], i3 = blockIdx.z / a.x.ne[2];
    const i64 w2 = (i2 + a.dim2_offset_x) / a.ratio2 - a.dim2_offset_w, w3 = i3 / a.ratio3;
    constexpr int kApart = kFloatsThreads / kFloatsStep;  // between the rows, or columns, that a thread fetches
    const int first = thread / kFloatsStep;
    const i64 w_apart = kApart * a.w.row_stride, x_apart = kApart * a.x.nb[1];
    const WeightRow w_row = tp_weight_row(a.w, row0 + first, w2, w3);
    const char *w_at = w_row.plane[0] + (a.k_begin + thread % kFloatsStep) * w_row.block_stride[0],
               *x_at = a.x.data + i2 * a.x.nb[2] + i3 * a.x.nb[3] + (column0 + first) * a.x.nb[1] + thread % kFloatsStep * a.x.nb[0];
    const int rows = (int)(a.w.n - row0 < kFloatsTile ? a.w.n - row0 : kFloatsTile),
              columns = (int)(a.x.ne[1] - column0 < kFloatsTile ? a.x.ne[1] - column0 : kFloatsTile);
    float w_next[kFetched], x_next[kFetched];
    auto fetch = [&](i64 k0) {
        const bool within = k0 + thread % kFloatsStep < a.k_end;
        const char *w = w_at, *x = x_at;
#pragma unroll
        for (int i = 0; i < kFetched; ++i, w += w_apart, x += x_apart) {
            w_next[i] = within && first + i * kApart < rows ? tp_load(kType, w) : 0.0f;
            x_next[i] = within && first + i * kApart < columns ? *(const float*)x : 0.0f;
        }
        w_at += kFloatsStep * (i64)w_row.block_stride[0];
        x_at += kFloatsStep * a.x.nb[0];
    };
    float acc[kRows][kColumns] = {};
    fetch(a.k_begin);
    for (i64 k0 = a.k_begin; k0 < a.k_end; k0 += kFloatsStep) {
#pragma unroll
        for (int i = 0; i < kFetched; ++i) {
            const int at = (first + i * kApart) * kFloatsStride + thread % kFloatsStep;
            w_tile[at] = w_next[i];
            x_tile[at] = x_next[i];
        }
        __syncthreads();
        if (k0 + kFloatsStep < a.k_end) fetch(k0 + kFloatsStep);
#pragma unroll
        for (int k = 0; k < kOwn; k += 4) {
            const int at = warp * kOwn + k;
            float w[kRows][4];
#pragma unroll
            for (int r = 0; r < kRows; ++r) load_four((const char*)(w_tile + (lane_row + r * 8) * kFloatsStride + at), w[r]);
#pragma unroll
            for (int c = 0; c < kColumns; ++c) {
                float v[4];
                load_four((const char*)(x_tile + (lane_column + c * 4) * kFloatsStride + at), v);
#pragma unroll
                for (int r = 0; r < kRows; ++r)
#pragma unroll
                    for (int e = 0; e < 4; ++e) acc[r][c] += w[r][e] * v[e];
            }
        }
        __syncthreads();
    }
    float* const sums = (float*)shared;  // [warp][column][row]
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int c = 0; c < kColumns; ++c) sums[(warp * kFloatsTile + lane_column + c * 4) * kFloatsTile + lane_row + r * 8] = acc[r][c];
    __syncthreads();
    for (int c = warp; c < kFloatsTile; c += kWarps) {
        float sum = 0;
        for (int part = 0; part < kWarps; ++part) sum += sums[(part * kFloatsTile + c) * kFloatsTile + lane];
        if (lane < rows && c < columns) *(float*)(a.y.data + (row0 + lane) * a.y.nb[0] + (column0 + c) * a.y.nb[1] + i2 * a.y.nb[2] + i3 * a.y.nb[3]) = sum;
    }
}

}  // namespace ggml_tp

TP_KERNEL_RESIDENT(mul_floats_f32, MulMatArgs, 256, 2) { ggml_tp::mul_floats<ggml_tp::kF32>(args); }
TP_KERNEL_RESIDENT(mul_floats_f16, MulMatArgs, 256, 2) { ggml_tp::mul_floats<ggml_tp::kF16>(args); }
TP_KERNEL_RESIDENT(mul_floats_bf16, MulMatArgs, 256, 2) { ggml_tp::mul_floats<ggml_tp::kBF16>(args); }
