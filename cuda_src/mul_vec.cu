// MUL_MAT of few columns (decode): bound by reading the weights once. A block of four warps computes kVecRows rows of one matrix; its
// 128 threads share the k axis, 16 bytes of each row a thread and step, all loads of a step issued before any is used, so that a
// multiprocessor has 64 KB in flight. Up to three matrices that multiply the same activations (Q, K, V; gate, up) are one launch.
// Activations of quantised weights are int8 (quantize.h); they are small and stay in L1.
#include "mul_vec.h"

#include "grid_piece.h"

namespace ggml_tp {

/// The matrix and the first row of this block.
TP_DEVICE int vec_part(const MulVecArgs& a, i64& row) {
    i64 block = blockIdx.x;
    int part = 0;
    while (part + 1 < a.n_parts) {
        const i64 blocks = (a.part[part].w.n + kVecRows - 1) / kVecRows;
        if (block < blocks) break;
        block -= blocks;
        ++part;
    }
    row = block * kVecRows;
    return part;
}

/// Sums over the block's threads, and stores.
template <int kCols>
TP_DEVICE void vec_store(const MulVecArgs& a, const MulVecPart& part, i64 row, float (&acc)[kVecRows][kCols]) {
    __shared__ float sums[kVecWarps][kVecRows * kCols];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int r = 0; r < kVecRows; ++r)
#pragma unroll
        for (int c = 0; c < kCols; ++c) {
            const float sum = tp_warp_sum(acc[r][c]);
            if (lane == 0) sums[warp][r * kCols + c] = sum;
        }
    __syncthreads();
    const int i = threadIdx.x, r = i / kCols;
    const i64 c = (i64)blockIdx.y * kCols + i % kCols;
    if (i >= kVecRows * kCols || row + r >= part.w.n || c >= a.x.ne[1]) return;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kVecWarps; ++w) sum += sums[w][i];
    *(float*)(part.y.data + (row + r) * part.y.nb[0] + c * part.y.nb[1]) = sum;
}

template <int kType, int kCols>
TP_DEVICE void mul_vec_quantized(const MulVecArgs& a) {
    i64 row;
    const MulVecPart& part = a.part[vec_part(a, row)];
    const i64 pieces = a.k / 32, n = part.w.n;
    const char* plane[kVecRows][4];
#pragma unroll
    for (int r = 0; r < kVecRows; ++r) {
        const i64 at = row + r < n ? row + r : n - 1;  // a row beyond the end reads the last one and stores nothing
#pragma unroll
        for (int f = 0; f < 4; ++f) plane[r][f] = part.w.plane[f] + at * part.w.row_stride;
    }
    const i64 column0 = (i64)blockIdx.y * kCols;
    float acc[kVecRows][kCols] = {};
    Piece<kType> w[kVecRows];
    auto load = [&](i64 p) {
#pragma unroll
        for (int r = 0; r < kVecRows; ++r) w[r].load(plane[r], p, LoadStream());
    };
    if (threadIdx.x < pieces) load(threadIdx.x);
    tp_grid_wait();  // the activations are the work of the kernel before; the weights were not
    for (i64 p = threadIdx.x; p < pieces; p += 32 * kVecWarps) {
        if (p >= 32 * kVecWarps) load(p);
        const i64 first = Piece<kType>::first(p), second = Piece<kType>::second(p);
#pragma unroll
        for (int c = 0; c < kCols; ++c) {
            if (column0 + c >= a.x.ne[1]) break;
            const TpInt4 x0 = *(const TpInt4*)(a.xq + (column0 + c) * a.k + first), x1 = *(const TpInt4*)(a.xq + (column0 + c) * a.k + second);
            const TpFloat2* d = (const TpFloat2*)a.xd + (column0 + c) * pieces;
            const TpFloat2 d0 = d[first / 32], d1 = d[second / 32];
#pragma unroll
            for (int r = 0; r < kVecRows; ++r) acc[r][c] += w[r].dot(p, x0, x1, d0, d1);
        }
    }
    vec_store<kCols>(a, part, row, acc);
}

template <int kType, int kCols>
TP_DEVICE void mul_vec_float(const MulVecArgs& a) {
    using Words = FloatWords<kType>;
    constexpr int kElems = Words::kElems;
    i64 row;
    const MulVecPart& part = a.part[vec_part(a, row)];
    const i64 n = part.w.n;
    const char* base[kVecRows];
#pragma unroll
    for (int r = 0; r < kVecRows; ++r) base[r] = part.w.plane[0] + (row + r < n ? row + r : n - 1) * part.w.row_stride;
    const i64 column0 = (i64)blockIdx.y * kCols, columns = a.x.ne[1];
    float acc[kVecRows][kCols] = {};
    TpInt4 w[kVecRows];
    auto load = [&](i64 k) {
#pragma unroll
        for (int r = 0; r < kVecRows; ++r) w[r] = tp_load_stream(base[r] + k * (16 / kElems));
    };
    if ((i64)threadIdx.x * kElems < a.k) load((i64)threadIdx.x * kElems);
    tp_grid_wait();
    for (i64 k = (i64)threadIdx.x * kElems; k < a.k; k += 32 * kVecWarps * kElems) {
        if (k >= 32 * kVecWarps * kElems) load(k);
        // All columns' loads go out together; beyond the last column: that one again, which is not stored.
        TpInt4 words[kCols][kElems / 4];
#pragma unroll
        for (int c = 0; c < kCols; ++c)
#pragma unroll
            for (int i = 0; i < kElems / 4; ++i)
                words[c][i] = *(const TpInt4*)(a.x.data + (column0 + c < columns ? column0 + c : columns - 1) * a.x.nb[1] + (k + 4 * i) * 4);
#pragma unroll
        for (int c = 0; c < kCols; ++c)
#pragma unroll
            for (int i = 0; i < kElems; ++i) {
                const TpInt4& four = words[c][i / 4];
                const float v = __int_as_float(i % 4 == 0 ? four.x : i % 4 == 1 ? four.y : i % 4 == 2 ? four.z : four.w);
#pragma unroll
                for (int r = 0; r < kVecRows; ++r) acc[r][c] += Words::get(w[r], i) * v;
            }
    }
    vec_store<kCols>(a, part, row, acc);
}

}  // namespace ggml_tp

#define MUL_VEC(kind, name, type)                                                                              \
    TP_KERNEL_EARLY(mul_vec_##name##_1, MulVecArgs, 32 * ggml_tp::kVecWarps) { ggml_tp::kind<type, 1>(args); } \
    TP_KERNEL_EARLY(mul_vec_##name##_2, MulVecArgs, 32 * ggml_tp::kVecWarps) { ggml_tp::kind<type, 2>(args); } \
    TP_KERNEL_EARLY(mul_vec_##name##_4, MulVecArgs, 32 * ggml_tp::kVecWarps) { ggml_tp::kind<type, 4>(args); } \
    TP_KERNEL_EARLY(mul_vec_##name##_8, MulVecArgs, 32 * ggml_tp::kVecWarps) { ggml_tp::kind<type, 8>(args); }
#define MUL_VEC_PIECES(name, type) MUL_VEC(mul_vec_quantized, name, ggml_tp::type)

TP_PIECE_TYPES(MUL_VEC_PIECES)
MUL_VEC(mul_vec_float, f32, ggml_tp::kF32)
MUL_VEC(mul_vec_float, f16, ggml_tp::kF16)
MUL_VEC(mul_vec_float, bf16, ggml_tp::kBF16)
