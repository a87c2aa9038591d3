// Sums, scans and the largest of rows, and norms other than those of norm.cu: a block per row or group. F32.
#include "element.h"
#include "index.h"

namespace ggml_tp {
namespace {

constexpr int kReduceThreads = 256;

/// The sum over the block, in every thread, in the order of warps.
TP_DEVICE float block_sum(float v) {
    __shared__ float partial[kReduceThreads / 32];
    v = tp_warp_sum(v);
    __syncthreads();  // the last call's readers are done
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
    __syncthreads();
    float sum = 0;
    for (int w = 0; w < kReduceThreads / 32; ++w) sum += partial[w];
    return sum;
}
/// The sum of f(i) over i < n.
template <class F>
TP_DEVICE float sum_of(i64 n, F f) {
    float sum = 0;
    for (i64 i = threadIdx.x; i < n; i += kReduceThreads) sum += f(i);
    return block_sum(sum);
}
TP_DEVICE float row_value(const ReduceArgs& args, const char* row, i64 i) { return *(const float*)(row + i * args.x.nb[0]); }

}  // namespace
}  // namespace ggml_tp

using namespace ggml_tp;

TP_KERNEL(sum_all, ReduceArgs, 256) {
    const float sum = sum_of(tp_elems(args.x), [&](i64 i) { return *(const float*)tp_at(args.x, tp_index(args.x.ne, i)); });
    if (threadIdx.x == 0) *(float*)args.y.data = sum;
}

TP_KERNEL(mean_rows, ReduceArgs, 256) {
    const Index at = row_index(blockIdx.x, args.x.ne);
    const char* row = element_at(args.x, at);
    const float sum = sum_of(args.x.ne[0], [&](i64 i) { return row_value(args, row, i); });
    if (threadIdx.x == 0) *(float*)element_at(args.y, at) = sum / (float)args.x.ne[0];
}

// 256 elements at a time: each warp scans 32, then adds what is before it.
TP_KERNEL(cumsum, ReduceArgs, 256) {
    __shared__ float warp_sums[kReduceThreads / 32];
    const Index at = row_index(blockIdx.x, args.x.ne);
    const char* row = element_at(args.x, at);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float before = 0;
    for (i64 first = 0; first < args.x.ne[0]; first += kReduceThreads) {
        const i64 i = first + threadIdx.x;
        float v = i < args.x.ne[0] ? row_value(args, row, i) : 0.0f;
        for (int o = 1; o < 32; o *= 2) {
            const float left = __shfl_sync(0xffffffffu, v, lane >= o ? lane - o : lane);
            if (lane >= o) v += left;
        }
        if (lane == 31) warp_sums[warp] = v;
        __syncthreads();
        float left = before;
        for (int w = 0; w < kReduceThreads / 32; ++w) {
            if (w < warp) left += warp_sums[w];
            before += warp_sums[w];
        }
        if (i < args.x.ne[0]) *(float*)(element_at(args.y, at) + i * args.y.nb[0]) = left + v;
        __syncthreads();
    }
}

// The last of equals, as the host's CPU takes it; 0 where nothing is a number.
TP_KERNEL(argmax, ReduceArgs, 256) {
    __shared__ float values[kReduceThreads];
    __shared__ i64 places[kReduceThreads];
    const char* row = element_at(args.x, row_index(blockIdx.x, args.x.ne));
    float most = -INFINITY;
    i64 place = -1;
    for (i64 i = threadIdx.x; i < args.x.ne[0]; i += kReduceThreads) {
        const float v = row_value(args, row, i);
        if (v >= most) most = v, place = i;
    }
    values[threadIdx.x] = most;
    places[threadIdx.x] = place;
    for (int half = kReduceThreads / 2; half; half /= 2) {
        __syncthreads();
        if ((int)threadIdx.x >= half) continue;
        const float other = values[threadIdx.x + half];
        const i64 other_place = places[threadIdx.x + half];
        if (other > values[threadIdx.x] || (other == values[threadIdx.x] && other_place > places[threadIdx.x]))
            values[threadIdx.x] = other, places[threadIdx.x] = other_place;
    }
    if (threadIdx.x == 0) *(i32*)(args.y.data + blockIdx.x * args.y.nb[0]) = places[0] < 0 ? 0 : (i32)places[0];
}

TP_KERNEL(l2_norm, ReduceArgs, 256) {
    const Index at = row_index(blockIdx.x, args.x.ne);
    const char* row = element_at(args.x, at);
    const float squares = sum_of(args.x.ne[0], [&](i64 i) { return row_value(args, row, i) * row_value(args, row, i); });
    const float scale = 1.0f / fmaxf(sqrtf(squares), args.eps);
    for (i64 i = threadIdx.x; i < args.x.ne[0]; i += kReduceThreads) *(float*)(element_at(args.y, at) + i * args.y.nb[0]) = row_value(args, row, i) * scale;
}

// grid: (groups of channels, ne[3]).
TP_KERNEL(group_norm, ReduceArgs, 256) {
    const i64 channels = args.x.ne[2], each = (channels + args.n_groups - 1) / args.n_groups, begin = blockIdx.x * each;
    const i64 end = begin + each < channels ? begin + each : channels, plane = args.x.ne[0] * args.x.ne[1], n = plane * (end - begin);
    if (n <= 0) return;
    auto place = [&](const View& v, i64 i) {
        return (float*)element_at(v, {i % args.x.ne[0], i / args.x.ne[0] % args.x.ne[1], begin + i / plane, (i64)blockIdx.y});
    };
    const float mean = sum_of(n, [&](i64 i) { return *place(args.x, i); }) / (float)n;
    const float variance = sum_of(n,
                                  [&](i64 i) {
                                      const float v = *place(args.x, i) - mean;
                                      return v * v;
                                  }) /
                           (float)n;
    const float scale = 1.0f / sqrtf(variance + args.eps);
    for (i64 i = threadIdx.x; i < n; i += kReduceThreads) *place(args.y, i) = (*place(args.x, i) - mean) * scale;
}
