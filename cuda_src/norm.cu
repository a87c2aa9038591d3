// One block per row. A row is read from memory once and from L1 after that; y may be x, since a thread writes only what it read.
#include "norm.h"

#include "element.h"
#include "quantize_group.h"

namespace ggml_tp {
namespace {

/// The sum over the block, the same bits in every thread. Called twice in a row: `slot` keeps the calls apart without a third barrier.
TP_DEVICE float block_sum(float v, int slot) {
    __shared__ float partial[2][kNormThreads / 32];
    v = tp_warp_sum(v);
    if (blockDim.x == 32) return v;
    if (threadIdx.x % 32 == 0) partial[slot][threadIdx.x / 32] = v;
    __syncthreads();
    float sum = 0.0f;
    for (u32 w = 0; w < blockDim.x / 32; w++) sum += partial[slot][w];
    return sum;
}

/// The sum over up to 32 warps, in the order of warps.
TP_DEVICE float wide_block_sum(float v) {
    __shared__ float partial[32];
    v = tp_warp_sum(v);
    if (blockDim.x == 32) return v;
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
    __syncthreads();
    float sum = 0.0f;
    for (u32 w = 0; w < blockDim.x / 32; w++) sum += partial[w];
    return sum;
}

template <class Args>  // NormArgs, NormBySquaresArgs
TP_DEVICE void write_row(const Args& args, const Index& row, float shift, float scale) {
    const View &x = args.x, &y = args.y, &weight = args.weight;
    const char* x_row = element_at(x, row);
    char* y_row = element_at(y, row);
    const char* w_row = nullptr;
    if (args.has_weight) w_row = element_at(weight, wrap(row, weight.ne));
    for (i64 i = threadIdx.x; i < x.ne[0]; i += blockDim.x) {
        float v = (load_element(x_row + i * x.nb[0], x.type) - shift) * scale;
        if (w_row) v *= load_element(w_row + i * weight.nb[0], weight.type);
        store_element(y_row + i * y.nb[0], y.type, v);
    }
}

/// The sum over the block of a row's squares.
TP_DEVICE float squares_of_row(const View& v, const Index& row) {
    const char* x = element_at(v, row);
    float squares = 0.0f;
    for (i64 i = threadIdx.x; i < v.ne[0]; i += blockDim.x) {
        const float e = load_element(x + i * v.nb[0], v.type);
        squares += e * e;
    }
    return block_sum(squares, 0);
}

/// The row stays in registers between the sum of squares and the result. load_a(i, v): elements i to i + 3 of a.
template <class LoadA>
TP_DEVICE void norm_row(const FusedNormArgs& args, const LoadA& load_a) {
    constexpr int kSteps = 4;
    const Index row = row_index(blockIdx.x, args.y.ne);
    const i64 n = args.y.ne[0];
    const char* b = args.has_b ? element_at(args.b, row) : nullptr;
    char *sum_row = args.has_b ? element_at(args.sum, row) : nullptr, *y = element_at(args.y, row);
    float v[kSteps][4] = {}, squares = 0.0f;
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
        const i64 i = ((i64)j * blockDim.x + threadIdx.x) * 4;
        if (i >= n) break;
        load_a(i, v[j]);
        if (b) {
            float more[4];
            load_four(b + i * 4, more);
            for (int e = 0; e < 4; ++e) v[j][e] += more[e];
            store_four(sum_row + i * 4, v[j]);
        }
        for (int e = 0; e < 4; ++e) squares += v[j][e] * v[j][e];
    }
    const float scale = 1.0f / sqrtf(wide_block_sum(squares) / (float)n + args.eps);
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
        const i64 first = (i64)j * blockDim.x * 4, i = first + threadIdx.x * 4;
        if (first >= n) break;  // for the whole block: quantising needs whole warps
        const bool inside = i < n;
        float weight[4] = {1, 1, 1, 1};
        if (inside && args.has_weight) load_four(args.weight.data + i * 4, weight);
        for (int e = 0; e < 4; ++e) v[j][e] *= scale * weight[e];
        if (inside) store_four(y + i * 4, v[j]);
        if (args.xq) leave_four(args.form, v[j], i, inside, args.xq, args.xd, blockIdx.x, n);
    }
}

}  // namespace
}  // namespace ggml_tp

using namespace ggml_tp;

TP_KERNEL(rms_norm, NormArgs, 256) {
    const Index row = row_index(blockIdx.x, args.x.ne);
    const float mean = squares_of_row(args.x, row) / (float)args.x.ne[0];
    write_row(args, row, 0.0f, 1.0f / sqrtf(mean + args.eps));
}

TP_KERNEL(row_squares, RowSquaresArgs, 256) {
    const View& x = args.x[blockIdx.y];
    const float sum = squares_of_row(x, row_index(blockIdx.x, x.ne));
    if (threadIdx.x == 0) args.sums[(i64)blockIdx.y * args.rows + blockIdx.x] = sum;
}

TP_KERNEL(norm_by_squares, NormBySquaresArgs, 256) {
    write_row(args, row_index(blockIdx.x, args.x.ne), 0.0f, 1.0f / sqrtf(args.squares[blockIdx.x] / (float)args.n + args.eps));
}

TP_KERNEL(layer_norm, NormArgs, 256) {
    const Index row = row_index(blockIdx.x, args.x.ne);
    const char* x = element_at(args.x, row);
    float sum = 0.0f;
    for (i64 i = threadIdx.x; i < args.x.ne[0]; i += blockDim.x) sum += load_element(x + i * args.x.nb[0], args.x.type);
    const float mean = block_sum(sum, 0) / (float)args.x.ne[0];
    float squares = 0.0f;  // about the mean: the one-pass formula cancels when |mean| >> deviation
    for (i64 i = threadIdx.x; i < args.x.ne[0]; i += blockDim.x) {
        const float v = load_element(x + i * args.x.nb[0], args.x.type) - mean;
        squares += v * v;
    }
    const float variance = block_sum(squares, 1) / (float)args.x.ne[0];
    write_row(args, row, mean, 1.0f / sqrtf(variance + args.eps));
}

TP_KERNEL(fused_norm, FusedNormArgs, 1024) {
    const char* a = element_at(args.a, row_index(blockIdx.x, args.y.ne));
    norm_row(args, [&](i64 i, float(&v)[4]) { load_four(a + i * 4, v); });
}

TP_KERNEL(fused_norm_pieces, PiecesNormArgs, 1024) {
    char* const a = element_at(args.norm.a, row_index(blockIdx.x, args.norm.y.ne));
    norm_row(args.norm, [&](i64 i, float(&v)[4]) { sum_four(args.a, blockIdx.x, i, a + i * 4, v); });
}
