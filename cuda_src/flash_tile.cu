// FLASH_ATTN_EXT of many tokens (prefill) on tensor cores, after FlashAttention-2: a block's rows are tokens of query heads that share one
// KV head, 16 rows a warp, and it walks the cache in steps of kCells cells. A row's soft max needs no other warp, and the probabilities go
// from the accumulators of Q·K straight into the fragments of P·V. While a step is multiplied the next one's K and V are on their way to
// the other stage: one barrier a step. Before that the block has looked at the mask of 32 steps at once: those that are -inf everywhere
// (the future of a causal prompt, empty cells) do not exist for it, and those that are 0 everywhere read no mask.
// Q, K, V and P are halves, sums f32. grid: (n_head / heads, tiles of tokens, ns); the last tokens, which see most, go first.
#include "element.h"
#include "flash_attn.h"
#include "flash_look.h"

#if TP_ARCH >= 800

namespace ggml_tp {

/// kD: head size, rounded up; what lies beyond the real one is zero.
template <int kD, int kWarps>
TP_DEVICE void flash_tile(const FlashTileArgs& args) {
    constexpr int kCells = flash_tile_cells(kD), kThreads = 32 * kWarps, kRows = kFlashTileRows;
    constexpr int kStride = kD + 8;  // halves between rows of a tile: eight rows' 16 bytes lie in different banks
    constexpr int kWords = kD / 8;   // of 16 bytes, in a row
    constexpr bool kKeepsQ = flash_tile_keeps_q(kD);
    static_assert(kCells * kWords % kThreads == 0, "");
    const FlashAttnArgs& a = args.a;
    TP_DYN_SHARED(u16, shared);  // stage: K, V; stage: K, V; Q; looks
    TpInt4* q_shared = (TpInt4*)(shared + 4 * kCells * kStride);
    u32* looks = (u32*)(q_shared + (kKeepsQ ? 0 : kWarps * (kD / 16) * 32));
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
    const int d = (int)a.q.ne[0], n_tokens = (int)a.q.ne[1], n_kv = (int)a.k.ne[1], n_steps = (n_kv + kCells - 1) / kCells;
    const int tokens = kRows * kWarps / args.heads, token0 = (int)(gridDim.y - 1 - blockIdx.y) * tokens;
    const int warp_token = token0 + warp * kRows % tokens, head = (int)blockIdx.x * args.heads + warp * kRows / tokens;
    const i64 stream = blockIdx.z, kv_head = ((i64)blockIdx.x * args.heads + a.head_offset) / a.gqa_ratio - a.kv_head_offset;
    const char* k = a.k.data + kv_head * a.k.nb[2] + stream % a.k.ne[3] * a.k.nb[3];
    const char* v = a.v.data + kv_head * a.v.nb[2] + stream % a.v.ne[3] * a.v.nb[3];
    const char* mask = a.has_mask ? a.mask.data + stream % a.mask.ne[3] * a.mask.nb[3] : nullptr;
    // Scores are powers of 2: log2(e) is in Q's scale, in ALiBi's slope, and in what the soft cap multiplies by.
    const float slope = kLog2E * alibi_slope(a.max_bias, head + a.head_offset, a.n_head_global);
    const float q_scale = a.logit_softcap != 0.0f ? a.scale : a.scale * kLog2E;

    // Q as fragments: rows g and g + 8 of this warp's. Those that are not kept are written and read by the same thread.
    u32 q[kKeepsQ ? kD / 16 : 1][4];
    auto q_at = [&](int c) -> TpInt4& { return q_shared[(warp * (kD / 16) + c) * 32 + lane]; };
#pragma unroll
    for (int c = 0; c < kD / 16; ++c) {
        u32 four[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int token = warp_token + g + i % 2 * 8, at = c * 16 + 2 * t + i / 2 * 8;
            TpFloat2 two = {0.0f, 0.0f};
            if (token < n_tokens && at < d) two = *(const TpFloat2*)(a.q.data + token * a.q.nb[1] + head * a.q.nb[2] + stream * a.q.nb[3] + at * 4);
            four[i] = pack(two.x * q_scale, two.y * q_scale);
            if constexpr (kKeepsQ) q[c][i] = four[i];
        }
        if constexpr (!kKeepsQ) q_at(c) = {(int)four[0], (int)four[1], (int)four[2], (int)four[3]};
    }

    SeenSteps<kCells, kWarps> seen{mask, a.mask.nb[1], token0, tokens, n_tokens, n_kv, n_steps, looks, thread};
    auto fetch = [&](int step, int stage) {
        u16* k_tile = shared + stage * 2 * kCells * kStride;
#pragma unroll
        for (int s = 0; s < kCells * kWords / kThreads; ++s) {
            const int i = s * kThreads + thread, row = i / kWords, column = i % kWords * 8, cell = step * kCells + row;
            const bool inside = cell < n_kv && column < d;
            u16* to = k_tile + row * kStride + column;
            tp_copy_async_or_zero(to, k + (u64)(u32)cell * (u32)a.k.nb[1] + column * 2, inside);
            tp_copy_async_or_zero(to + kCells * kStride, v + (u64)(u32)cell * (u32)a.v.nb[1] + column * 2, inside);
        }
    };

    float out[kD / 8][4] = {}, most[2] = {-INFINITY, -INFINITY}, sum[2] = {};
    SeenStep step = {-1, false};
    for (int stage = 1; step.number < n_steps; stage ^= 1) {
        const SeenStep next = seen.next(step.number + 1);
        tp_copy_wait();
        __syncthreads();  // all threads' copies of this step are there, and all have read the other stage to its end
        if (next.number < n_steps) fetch(next.number, stage ^ 1);
        const int first = step.number * kCells;
        const bool masked = step.mixed;
        step = next;
        if (first < 0 || warp_token >= n_tokens) continue;  // the first round fetches alone
        const u16 *k_tile = shared + stage * 2 * kCells * kStride, *v_tile = k_tile + kCells * kStride;
        float score[kCells / 8][4] = {};
#pragma unroll
        for (int c = 0; c < kD / 16; ++c) {
            if constexpr (!kKeepsQ) {
                const TpInt4 four = q_at(c);
                q[0][0] = (u32)four.x, q[0][1] = (u32)four.y, q[0][2] = (u32)four.z, q[0][3] = (u32)four.w;
            }
#pragma unroll
            for (int j = 0; j < kCells / 8; j += 2) {
                u32 kf[4];
                tp_ldmatrix_x4(kf, k_tile + (j * 8 + lane % 8 + lane / 16 * 8) * kStride + c * 16 + lane / 8 % 2 * 8);
                const u32 left[2] = {kf[0], kf[1]}, right[2] = {kf[2], kf[3]};
                tp_mma_f16(score[j], q[kKeepsQ ? c : 0], left);
                tp_mma_f16(score[j + 1], q[kKeepsQ ? c : 0], right);
            }
        }
        if (a.logit_softcap != 0.0f) {
#pragma unroll
            for (int j = 0; j < kCells / 8; ++j)
#pragma unroll
                for (int e = 0; e < 4; ++e) score[j][e] = capped(score[j][e], a.logit_softcap);
        }
        if (masked) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int token = warp_token + g + half * 8;
                const char* row = mask + (token < n_tokens ? token : n_tokens - 1) * a.mask.nb[1];
#pragma unroll
                for (int j = 0; j < kCells / 8; ++j) {
                    const u32 two = mask_of_two(mask ? row : nullptr, first + j * 8 + 2 * t, n_kv);
                    score[j][2 * half] += slope * tp_half_to_float((u16)two);
                    score[j][2 * half + 1] += slope * tp_half_to_float((u16)(two >> 16));
                }
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float top = most[half];
#pragma unroll
            for (int j = 0; j < kCells / 8; ++j) top = fmaxf(top, fmaxf(score[j][2 * half], score[j][2 * half + 1]));
            top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
            top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
            const float base = top == -INFINITY ? 0.0f : top, keep = tp_exp2(most[half] - base);
            most[half] = top;
            sum[half] *= keep;
#pragma unroll
            for (int j = 0; j < kD / 8; ++j) out[j][2 * half] *= keep, out[j][2 * half + 1] *= keep;
#pragma unroll
            for (int j = 0; j < kCells / 8; ++j)
#pragma unroll
                for (int e = 2 * half; e < 2 * half + 2; ++e) {
                    score[j][e] = tp_exp2(score[j][e] - base);
                    sum[half] += score[j][e];
                }
        }
        // 16 cells of P are two accumulator tiles side by side.
#pragma unroll
        for (int c = 0; c < kCells / 16; ++c) {
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
            const float sink = kLog2E * *(const float*)(a.sinks.data + (head + a.head_offset) * a.sinks.nb[0]), top = fmaxf(most[half], sink);
            const float keep = most[half] > -INFINITY ? tp_exp2(most[half] - top) : 0.0f;
            scale = keep / (total * keep + tp_exp2(sink - top));
        }
        const int token = warp_token + g + half * 8;
        if (token >= n_tokens) continue;
        char* y = a.y.data + head * a.y.nb[1] + token * a.y.nb[2] + stream * a.y.nb[3];
#pragma unroll
        for (int j = 0; j < kD / 8; ++j)
            if (j * 8 < d) *(TpFloat2*)(y + (j * 8 + 2 * t) * 4) = {out[j][2 * half] * scale, out[j][2 * half + 1] * scale};
    }
}

}  // namespace ggml_tp

// Eight warps of 255 registers are what a multiprocessor has: one block or two.
#define FLASH_TILE(d, warps) \
    TP_KERNEL_RESIDENT(flash_tile_##d##_##warps, FlashTileArgs, 32 * warps, 8 / warps) { ggml_tp::flash_tile<d, warps>(args); }

FLASH_TILE(64, 4)
FLASH_TILE(64, 8)
FLASH_TILE(96, 4)
FLASH_TILE(96, 8)
FLASH_TILE(128, 4)
FLASH_TILE(128, 8)
FLASH_TILE(256, 4)

#endif
