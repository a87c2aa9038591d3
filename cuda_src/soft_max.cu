// Softmax of rows, one block per row, two passes: running maximum and sum, then the values. y may be x.
// A row with nothing but -inf gives zeros, where a plain softmax would give NaN.
#include "soft_max.h"

#include "element.h"

namespace ggml_tp {
namespace {

/// A sum of exp(v - max) over some values; the empty one is {-inf, 0}.
struct ExpSum {
    float max, sum;
};

TP_DEVICE float exp_from(float v, float max) { return v == -INFINITY ? 0.0f : expf(v - max); }

TP_DEVICE ExpSum warp_merge(ExpSum a) {
    const float max = tp_warp_max(a.max);
    return {max, tp_warp_sum(a.sum * exp_from(a.max, max))};
}

TP_DEVICE ExpSum block_merge(ExpSum a) {
    __shared__ ExpSum partial[kSoftMaxThreads / 32];
    a = warp_merge(a);
    if (blockDim.x == 32) return a;
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = a;
    __syncthreads();
    ExpSum all = {-INFINITY, 0.0f};
    for (u32 w = 0; w < blockDim.x / 32; w++) all.max = fmaxf(all.max, partial[w].max);
    for (u32 w = 0; w < blockDim.x / 32; w++) all.sum += partial[w].sum * exp_from(partial[w].max, all.max);
    return all;
}

}  // namespace
}  // namespace ggml_tp

using namespace ggml_tp;

TP_KERNEL(soft_max, SoftMaxArgs, 256) {
    const View &x = args.x, &y = args.y, &mask = args.mask;
    const Index row = row_index(blockIdx.x, x.ne);
    const char* x_row = element_at(x, row);
    char* y_row = element_at(y, row);
    const char* mask_row = nullptr;
    float slope = 1.0f;
    if (args.has_mask) {
        const i64 head = row.i2 + args.head_offset;  // the mask is replicated: its dim 2 goes by the global head
        mask_row = element_at(mask, {0, row.i1, wrap(head, mask.ne[2]), wrap(row.i3, mask.ne[3])});
        slope = alibi_slope(args.max_bias, (i32)head, args.n_head_global);
    }
    auto logit = [&](i64 i) {
        float v = load_element(x_row + i * x.nb[0], x.type) * args.scale;
        if (mask_row) v += slope * load_element(mask_row + i * mask.nb[0], mask.type);
        return v;
    };

    ExpSum mine = {-INFINITY, 0.0f};
    for (i64 i = threadIdx.x; i < x.ne[0]; i += blockDim.x) {
        const float v = logit(i);
        if (v > mine.max) {
            mine.sum = mine.sum * exp_from(mine.max, v) + 1.0f;
            mine.max = v;
        } else {
            mine.sum += exp_from(v, mine.max);
        }
    }
    ExpSum all = block_merge(mine);
    if (args.has_sinks) {
        const float sink = load(args.sinks, {row.i2 + args.head_offset, 0, 0, 0});
        const float max = fmaxf(all.max, sink);
        all = {max, all.sum * exp_from(all.max, max) + exp_from(sink, max)};
    }
    const float inverse = all.sum > 0.0f ? 1.0f / all.sum : 0.0f;
    for (i64 i = threadIdx.x; i < x.ne[0]; i += blockDim.x) store_element(y_row + i * y.nb[0], y.type, exp_from(logit(i), all.max) * inverse);
}
