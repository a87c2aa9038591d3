// FLASH_ATTN_EXT of many tokens (prefill) on tensor cores, after FlashAttention-2: a block takes 64 tokens of one head and walks the cache
// in steps of 64 cells; each of four warps owns 16 tokens, so its soft max needs no other warp, and the probabilities go from the
// accumulators of Q·K straight into the fragments of P·V. Steps whose mask is -inf everywhere (the future of a causal prompt, empty
// cells) are skipped. Q, K, V and P are halves, sums f32. grid: (n_tok / 64, n_head, ns).
#include "element.h"
#include "flash_attn.h"

#if TP_ARCH >= 800

namespace ggml_tp {

TP_DEVICE u32 pack(float low, float high) { return (u32)tp_float_to_half(low) | (u32)tp_float_to_half(high) << 16; }

/// kD: head size, rounded up to a multiple of 32; what lies beyond the real one is zero.
template <int kD>
TP_DEVICE void flash_tile(const FlashAttnArgs& a) {
    constexpr int kStride = kD + 8, kMaskStride = kFlashTile + 8, kTile = kFlashTile;
    TP_DYN_SHARED(u16, shared);
    u16 *k_tile = shared, *v_tile = k_tile + kTile * kStride, *mask_tile = v_tile + kTile * kStride;
    __shared__ u32 any[4];
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, d = (int)a.q.ne[0];
    const i64 token0 = (i64)blockIdx.x * kTile, head = blockIdx.y, stream = blockIdx.z, n_kv = a.k.ne[1], n_tokens = a.q.ne[1];
    const i64 kv_head = (head + a.head_offset) / a.gqa_ratio - a.kv_head_offset;
    const char* k = a.k.data + kv_head * a.k.nb[2] + stream % a.k.ne[3] * a.k.nb[3];
    const char* v = a.v.data + kv_head * a.v.nb[2] + stream % a.v.ne[3] * a.v.nb[3];
    const char* mask = a.has_mask ? a.mask.data + stream % a.mask.ne[3] * a.mask.nb[3] : nullptr;
    const float slope = alibi_slope(a.max_bias, (i32)(head + a.head_offset), a.n_head_global);
    // Q as fragments: rows g and g + 8 of this warp's 16 tokens.
    const int g = lane / 4, t = lane % 4;
    u32 q[kD / 16][4];
#pragma unroll
    for (int c = 0; c < kD / 16; ++c)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const i64 token = token0 + warp * 16 + g + i % 2 * 8;
            const int at = c * 16 + 2 * t + i / 2 * 8;
            const float* from = (const float*)(a.q.data + (token < n_tokens ? token : 0) * a.q.nb[1] + head * a.q.nb[2] + stream * a.q.nb[3]);
            const bool inside = token < n_tokens && at < d;
            q[c][i] = inside ? pack(from[at] * a.scale, from[at + 1] * a.scale) : 0u;
        }
    float out[kD / 8][4] = {}, most[2] = {-INFINITY, -INFINITY}, sum[2] = {};
    for (i64 first = 0; first < n_kv; first += kTile) {
        // Every warp reads its own tokens' rows of the mask, and says whether any cell counts.
        u32 open = mask ? 0u : 1u;
        __syncwarp();  // its lanes have read the rows of the step before
        if (mask) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int row = warp * 16 + i * 4 + lane / 8, column = lane % 8 * 8;
                const i64 token = token0 + row, cell = first + column;
                u16 eight[8];
                const bool whole = token < n_tokens && cell + 8 <= n_kv;
                if (whole) *(TpInt4*)eight = *(const TpInt4*)(mask + token * a.mask.nb[1] + cell * 2);
#pragma unroll
                for (int e = 0; e < 8; ++e) {
                    if (!whole) eight[e] = token < n_tokens && cell + e < n_kv ? *(const u16*)(mask + token * a.mask.nb[1] + (cell + e) * 2) : (u16)0xfc00;
                    open |= eight[e] != 0xfc00;
                    mask_tile[row * kMaskStride + column + e] = eight[e];
                }
            }
            open = __ballot_sync(0xffffffffu, (int)open);
        }
        if (lane == 0) any[warp] = open;
        __syncthreads();  // the stage before is read to its end, and the mask is there
        const bool skip = !(any[0] | any[1] | any[2] | any[3]);
        __syncthreads();
        if (skip) continue;
#pragma unroll 4
        for (int i = thread; i < kTile * (kD / 8); i += 128) {
            const int row = i / (kD / 8), column = i % (kD / 8) * 8;
            const bool inside = first + row < n_kv && column < d;
            *(TpInt4*)(k_tile + row * kStride + column) = inside ? *(const TpInt4*)(k + (first + row) * a.k.nb[1] + column * 2) : TpInt4{0, 0, 0, 0};
            *(TpInt4*)(v_tile + row * kStride + column) = inside ? *(const TpInt4*)(v + (first + row) * a.v.nb[1] + column * 2) : TpInt4{0, 0, 0, 0};
        }
        __syncthreads();
        float score[kTile / 8][4] = {};
#pragma unroll
        for (int c = 0; c < kD / 16; ++c)
#pragma unroll
            for (int j = 0; j < kTile / 8; j += 2) {
                u32 kf[4];
                tp_ldmatrix_x4(kf, k_tile + (j * 8 + lane % 8 + lane / 16 * 8) * kStride + c * 16 + lane / 8 % 2 * 8);
                const u32 left[2] = {kf[0], kf[1]}, right[2] = {kf[2], kf[3]};
                tp_mma_f16(score[j], q[c], left);
                tp_mma_f16(score[j + 1], q[c], right);
            }
        float next[2] = {most[0], most[1]};
#pragma unroll
        for (int j = 0; j < kTile / 8; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int row = warp * 16 + g + e / 2 * 8, column = j * 8 + 2 * t + e % 2;
                float s = score[j][e];
                if (a.logit_softcap != 0.0f) s = a.logit_softcap * tanhf(s);
                if (mask) s += slope * tp_half_to_float(mask_tile[row * kMaskStride + column]);
                else if (first + column >= n_kv) s = -INFINITY;
                score[j][e] = s;
                next[e / 2] = fmaxf(next[e / 2], s);
            }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            next[half] = fmaxf(next[half], __shfl_xor_sync(0xffffffffu, next[half], 1));
            next[half] = fmaxf(next[half], __shfl_xor_sync(0xffffffffu, next[half], 2));
            const float base = next[half] == -INFINITY ? 0.0f : next[half], keep = expf(most[half] - base);
            most[half] = next[half];
            sum[half] *= keep;
#pragma unroll
            for (int j = 0; j < kD / 8; ++j) out[j][2 * half] *= keep, out[j][2 * half + 1] *= keep;
#pragma unroll
            for (int j = 0; j < kTile / 8; ++j)
#pragma unroll
                for (int e = 2 * half; e < 2 * half + 2; ++e) {
                    score[j][e] = expf(score[j][e] - base);
                    sum[half] += score[j][e];
                }
        }
        // 16 cells of P are two accumulator tiles side by side.
#pragma unroll
        for (int c = 0; c < kTile / 16; ++c) {
            const u32 p[4] = {pack(score[2 * c][0], score[2 * c][1]), pack(score[2 * c][2], score[2 * c][3]), pack(score[2 * c + 1][0], score[2 * c + 1][1]),
                              pack(score[2 * c + 1][2], score[2 * c + 1][3])};
#pragma unroll
            for (int j = 0; j < kD / 8; j += 2) {
                u32 vf[4];
                tp_ldmatrix_x4_trans(vf, v_tile + (c * 16 + lane % 16) * kStride + j * 8 + lane / 16 * 8);
                const u32 left[2] = {vf[0], vf[1]}, right[2] = {vf[2], vf[3]};
                tp_mma_f16(out[j], p, left);
                tp_mma_f16(out[j + 1], p, right);
            }
        }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float total = sum[half];
        total += __shfl_xor_sync(0xffffffffu, total, 1);
        total += __shfl_xor_sync(0xffffffffu, total, 2);
        float scale = total > 0 ? 1.0f / total : 0.0f;
        if (a.has_sinks) {
            const float sink = *(const float*)(a.sinks.data + (head + a.head_offset) * a.sinks.nb[0]), top = fmaxf(most[half], sink);
            const float keep = most[half] > -INFINITY ? expf(most[half] - top) : 0.0f;
            scale = keep / (total * keep + expf(sink - top));
        }
        const i64 token = token0 + warp * 16 + g + half * 8;
        if (token >= n_tokens) continue;
        char* y = a.y.data + head * a.y.nb[1] + token * a.y.nb[2] + stream * a.y.nb[3];
#pragma unroll
        for (int j = 0; j < kD / 8; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e)
                if (j * 8 + 2 * t + e < d) *(float*)(y + (j * 8 + 2 * t + e) * 4) = out[j][2 * half + e] * scale;
    }
}

}  // namespace ggml_tp

TP_KERNEL(flash_tile_64, FlashAttnArgs, 128) { ggml_tp::flash_tile<64>(args); }
TP_KERNEL(flash_tile_96, FlashAttnArgs, 128) { ggml_tp::flash_tile<96>(args); }
TP_KERNEL(flash_tile_128, FlashAttnArgs, 128) { ggml_tp::flash_tile<128>(args); }

#endif
