// Rotary position embedding with YaRN scaling, forward, after ggml's rope_yarn. One thread per pair of elements; elements from
// n_dims on pass through. y may be x: a thread reads its pair before it writes it.
#include "rope.h"

#include "element.h"

namespace ggml_tp {
namespace {

/// The dimension that turns `n_rotations` times within the original context.
TP_DEVICE float yarn_corr_dim(const RopeArgs& args, float n_rotations) {
    return (float)args.n_dims * logf((float)args.n_ctx_orig / (n_rotations * 2.0f * 3.14159265358979323846f)) / (2.0f * logf(args.freq_base));
}

/// cos and sin (times the magnitude correction) of pair `i` at position `pos`.
TP_DEVICE void rotation(const RopeArgs& args, float pos, i64 i, float* cosine, float* sine) {
    const float theta_scale = powf(args.freq_base, -2.0f / (float)args.n_dims);
    float extrapolated = pos * powf(theta_scale, (float)i);
    if (args.has_factors) extrapolated /= load(args.factors, {i, 0, 0, 0});
    float theta = args.freq_scale * extrapolated;
    float magnitude = args.attn_factor;
    if (args.ext_factor != 0.0f) {
        const float low = fmaxf(0.0f, floorf(yarn_corr_dim(args, args.beta_fast)));
        const float high = fminf((float)(args.n_dims - 1), ceilf(yarn_corr_dim(args, args.beta_slow)));
        const float ramp = ((float)i - low) / fmaxf(0.001f, high - low);
        const float mix = (1.0f - fminf(1.0f, fmaxf(0.0f, ramp))) * args.ext_factor;
        theta = theta * (1.0f - mix) + extrapolated * mix;
        magnitude *= 1.0f + 0.1f * logf(1.0f / args.freq_scale);
    }
    *cosine = cosf(theta) * magnitude;
    *sine = sinf(theta) * magnitude;
}

template <bool kNeox>
TP_DEVICE void rope(const RopeArgs& args) {
    const View &x = args.x, &y = args.y;
    const i64 pair = (i64)blockIdx.y * blockDim.x + threadIdx.x;
    const i64 row = (i64)blockIdx.x * blockDim.y + threadIdx.y;
    if (2 * pair >= x.ne[0] || row >= x.ne[1] * x.ne[2] * x.ne[3]) return;
    const Index at = row_index((u32)row, x.ne);
    Index first = at, second = at;
    if (2 * pair >= args.n_dims) {
        first.i0 = 2 * pair;
        second.i0 = 2 * pair + 1;
        store(y, first, load(x, first));
        if (second.i0 < x.ne[0]) store(y, second, load(x, second));
        return;
    }
    first.i0 = kNeox ? pair : 2 * pair;
    second.i0 = kNeox ? pair + args.n_dims / 2 : 2 * pair + 1;
    const i32 pos = *(const i32*)(args.pos.data + at.i2 * args.pos.nb[0]);
    float cosine, sine;
    rotation(args, (float)pos, pair, &cosine, &sine);
    const float a = load(x, first), b = load(x, second);
    store(y, first, a * cosine - b * sine);
    store(y, second, a * sine + b * cosine);
}

}  // namespace
}  // namespace ggml_tp

using namespace ggml_tp;

TP_KERNEL(rope_normal, RopeArgs, 256) { rope<false>(args); }
TP_KERNEL(rope_neox, RopeArgs, 256) { rope<true>(args); }
