// Activations to int8, one scale per 32 elements: a warp per block of 32. grid: (k / 32 / 4, rows), block: 32 x 4.
#include "index.h"

TP_KERNEL(quantize_x, QuantizeArgs, 128) {
    const i64 block = (i64)blockIdx.x * 4 + threadIdx.y, row = blockIdx.y, k = block * 32 + threadIdx.x;
    if (block >= args.k / 32) return;
    const i64 i1 = row % args.x.ne[1], i2 = row / args.x.ne[1] % args.x.ne[2], i3 = row / (args.x.ne[1] * args.x.ne[2]);
    float v = 0;
    if (k >= args.k_begin && k < args.k_end)
        v = ggml_tp::tp_load(args.x.type, args.x.data + (k - args.k_begin) * args.x.nb[0] + i1 * args.x.nb[1] + i2 * args.x.nb[2] + i3 * args.x.nb[3]);
    const float d = tp_warp_max(fabsf(v)) / 127.0f;
    const float q = d > 0 ? rintf(v / d) : 0.0f;
    const float sum = tp_warp_sum(q);
    ((s8*)args.xq)[row * args.k + k] = (s8)(int)q;
    if (threadIdx.x == 0) {
        float* out = (float*)args.xd + (row * (args.k / 32) + block) * 2;
        out[0] = d;
        out[1] = d * sum;
    }
}

// Activations to halves for the tensor cores (mul_tile.cu): [rows][k] at xq, zero outside [k_begin, k_end). Four elements a thread.
template <bool kBf16>
TP_DEVICE void halve(const ggml_tp::QuantizeArgs& args) {
    const i64 k = ((i64)blockIdx.x * 128 + threadIdx.y * 32 + threadIdx.x) * 4, row = blockIdx.y;
    if (k >= args.k) return;
    const i64 i1 = row % args.x.ne[1], i2 = row / args.x.ne[1] % args.x.ne[2], i3 = row / (args.x.ne[1] * args.x.ne[2]);
    const char* x = args.x.data + i1 * args.x.nb[1] + i2 * args.x.nb[2] + i3 * args.x.nb[3];
    u32 words[2] = {};
    for (int i = 0; i < 4; ++i) {
        const i64 at = k + i;
        const float v = at >= args.k_begin && at < args.k_end ? *(const float*)(x + (at - args.k_begin) * args.x.nb[0]) : 0.0f;
        words[i / 2] |= (u32)(kBf16 ? tp_float_to_bf16(v) : tp_float_to_half(v)) << 16 * (i % 2);
    }
    u32* out = (u32*)(args.xq + (row * args.k + k) * 2);
    out[0] = words[0];
    out[1] = words[1];
}
TP_KERNEL(half_x, QuantizeArgs, 128) { halve<false>(args); }
TP_KERNEL(bf16_x, QuantizeArgs, 128) { halve<true>(args); }
