// Activations to int8, one scale per 32 elements: a warp per block of 32. grid: (rows, k / 32 / 4), block: 32 x 4.
#include "index.h"
#include "quantize_group.h"

TP_KERNEL(quantize_x, QuantizeArgs, 128) {
    const i64 block = (i64)blockIdx.y * 4 + threadIdx.y, row = blockIdx.x, k = block * 32 + threadIdx.x;
    if (block >= args.k / 32) return;
    const i64 i1 = row % args.x.ne[1], i2 = row / args.x.ne[1] % args.x.ne[2], i3 = row / (args.x.ne[1] * args.x.ne[2]);
    float v = 0;
    if (k >= args.k_begin && k < args.k_end)
        v = ggml_tp::tp_load(args.x.type, args.x.data + (k - args.k_begin) * args.x.nb[0] + i1 * args.x.nb[1] + i2 * args.x.nb[2] + i3 * args.x.nb[3]);
    const ggml_tp::Int8Scale scale(tp_warp_max(fabsf(v)));
    const s8 q = (s8)(scale.bits(v) & 255);
    const float sum = tp_warp_sum((float)q), d = scale.d;
    ((s8*)args.xq)[row * args.k + k] = q;
    if (threadIdx.x == 0) {
        float* out = (float*)args.xd + (row * (args.k / 32) + block) * 2;
        out[0] = d;
        out[1] = d * sum;
    }
}

// Activations to halves for the tensor cores (mul_tile.cu): [rows][k] at xq, zero outside [k_begin, k_end). Four elements a thread.
template <bool kBf16>
TP_DEVICE void halve(const ggml_tp::QuantizeArgs& args) {
    const i64 k = ((i64)blockIdx.y * 128 + threadIdx.y * 32 + threadIdx.x) * 4, row = blockIdx.x;
    if (k >= args.k) return;
    const i64 i1 = row % args.x.ne[1], i2 = row / args.x.ne[1] % args.x.ne[2], i3 = row / (args.x.ne[1] * args.x.ne[2]);
    const char* x = args.x.data + i1 * args.x.nb[1] + i2 * args.x.nb[2] + i3 * args.x.nb[3];
    u32 words[2] = {};
    for (int i = 0; i < 4; ++i) {
        const i64 at = k + i;
        const float v = at >= args.k_begin && at < args.k_end ? *(const float*)(x + (at - args.k_begin) * args.x.nb[0]) : 0.0f;
        words[i / 2] |= (u32)(kBf16 ? tp_float_to_bf16(v) : ggml_tp::activation_half(v)) << 16 * (i % 2);
    }
    u32* out = (u32*)(args.xq + (row * args.k + k) * 2);
    out[0] = words[0];
    out[1] = words[1];
}
TP_KERNEL(half_x, QuantizeArgs, 128) { halve<false>(args); }
TP_KERNEL(bf16_x, QuantizeArgs, 128) { halve<true>(args); }

/// Elements [k, k + 8) of a row as halves, zero outside of [k_begin, k_end); `args` as in QuantizeArgs.
template <bool kBf16, class Args>
TP_DEVICE TpInt4 eight_halves(const Args& args, const char* x, i64 k) {
    float v[8] = {};
    if (args.x.nb[0] == 4 && k >= args.k_begin && k + 8 <= args.k_end && ((u64)x + (u64)(k - args.k_begin) * 4) % 16 == 0) {
        for (int i = 0; i < 2; ++i) {
            const TpInt4 words = *(const TpInt4*)(x + (k - args.k_begin) * 4 + i * 16);
            v[4 * i] = __int_as_float(words.x), v[4 * i + 1] = __int_as_float(words.y);
            v[4 * i + 2] = __int_as_float(words.z), v[4 * i + 3] = __int_as_float(words.w);
        }
    } else {
        for (int i = 0; i < 8; ++i)
            if (k + i >= args.k_begin && k + i < args.k_end) v[i] = *(const float*)(x + (k + i - args.k_begin) * args.x.nb[0]);
    }
    u32 words[4] = {};
    for (int i = 0; i < 8; ++i) words[i / 2] |= (u32)(kBf16 ? tp_float_to_bf16(v[i]) : ggml_tp::activation_half(v[i])) << 16 * (i % 2);
    return {(int)words[0], (int)words[1], (int)words[2], (int)words[3]};
}
// The same as panels (quantize_group.h), zero up to a multiple of 64 elements; rows beyond the last are nobody's. Eight elements, a chunk, a
// thread. grid: (k / 1024, rows), block: 128.
template <bool kBf16>
TP_DEVICE void halve_panels(const ggml_tp::QuantizeArgs& args) {
    const u32 k = (blockIdx.x * 128 + threadIdx.x) * 8, row = blockIdx.y, n1 = (u32)args.x.ne[1], n2 = (u32)args.x.ne[2];
    if (k >= (args.k + 63) / 64 * 64) return;
    const char* x = args.x.data + row % n1 * args.x.nb[1] + row / n1 % n2 * args.x.nb[2] + row / (n1 * n2) * args.x.nb[3];
    *(TpInt4*)(args.xq + ggml_tp::panel_byte(row, k, (u32)args.k)) = eight_halves<kBf16>(args, x, k);
}
// A tile's entries' rows as its panel; grid: (tiles that there may be, blocks that share a tile's rows), block: 256.
template <bool kBf16>
TP_DEVICE void halve_entries(const ggml_tp::HalveEntriesArgs& args) {
    if ((i32)blockIdx.x >= *args.n_tiles) return;
    const ggml_tp::ExpertTile& tile = args.tiles[blockIdx.x];
    const u32 rows = (u32)args.columns, steps = (u32)((args.k + 63) / 64);
    for (u32 r = blockIdx.y; (i32)r < tile.count; r += gridDim.y) {
        const u32 entry = (u32)args.entries[tile.first + (i32)r], token = entry / (u32)args.n_used, slot = args.x_per_slot ? entry % (u32)args.n_used : 0;
        const char* x = args.x.data + slot * args.x.nb[1] + token * args.x.nb[2];
        for (u32 k = threadIdx.x * 8; k < steps * 64; k += 2048)
            *(TpInt4*)(args.xh + (i64)blockIdx.x * steps * rows * 128 + ggml_tp::panel_byte(r, k, (u32)args.k, rows)) = eight_halves<kBf16>(args, x, k);
    }
}
TP_KERNEL(half_panels, QuantizeArgs, 128) { halve_panels<false>(args); }
TP_KERNEL(bf16_panels, QuantizeArgs, 128) { halve_panels<true>(args); }
TP_KERNEL(half_entries, HalveEntriesArgs, 256) { halve_entries<false>(args); }
TP_KERNEL(bf16_entries, HalveEntriesArgs, 256) { halve_entries<true>(args); }
