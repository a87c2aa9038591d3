// One block per row. A row is read from memory once and from L1 after that; y may be x, since a thread writes only what it read.
#include "norm.h"

#include "element.h"

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

TP_DEVICE void write_row(const NormArgs& args, const Index& row, float shift, float scale) {
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

}  // namespace
}  // namespace ggml_tp

using namespace ggml_tp;

TP_KERNEL(rms_norm, NormArgs, 256) {
    const Index row = row_index(blockIdx.x, args.x.ne);
    const char* x = element_at(args.x, row);
    float squares = 0.0f;
    for (i64 i = threadIdx.x; i < args.x.ne[0]; i += blockDim.x) {
        const float v = load_element(x + i * args.x.nb[0], args.x.type);
        squares += v * v;
    }
    const float mean = block_sum(squares, 0) / (float)args.x.ne[0];
    write_row(args, row, 0.0f, 1.0f / sqrtf(mean + args.eps));
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
