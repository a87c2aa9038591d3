// FLASH_ATTN_EXT on tensor cores of latent attention (DeepSeek-V2, arXiv 2405.04434, with its matrices absorbed): one row of keys a cell for all query heads,
// and the values are its beginning, so that a step of cells is in shared memory once for both products. And of heads too wide for flash_tile (Gemma 4): a
// step's values come while its scores are computed, the next one's keys while its values are added up. A row is a token of a head of those that share keys,
// rows of a token one behind the other, 16 a group of warps, which the group's warps share twice: each has some of the step's cells for Q·K, and some of V's
// columns for P·V, as 16 times 512 sums are more than a warp's registers. Between them the topmost scores and the probabilities go through shared memory.
// Q, K, V and P are halves, sums f32. grid: (blocks of rows, pieces of the cells, ns * KV heads); the last tokens, which see most, go first.
#include "flash_wide.h"

#include "element.h"
#include "flash_look.h"

#if TP_ARCH >= 800

namespace ggml_tp {

/// kApart: values have memory of their own.
template <int kD, int kGroups, int kParts, int kCells, bool kApart>
TP_DEVICE void flash_wide(const FlashSplitArgs& args) {
    constexpr int kDv = kApart ? kD : kLatentValues, kWarps = kGroups * kParts, kThreads = 32 * kWarps, kRows = 16 * kGroups;
    constexpr int kStride = kD + 8, kWeights = kCells + 8;  // halves between rows: eight rows' 16 bytes lie in different banks
    constexpr int kMine = kCells / kParts, kColumns = kDv / kParts, kWords = kD / 8;
    static_assert(kMine % 8 == 0 && kColumns % 16 == 0 && kCells % 16 == 0 && kCells * kWords % kThreads == 0 && kD % 32 == 0, "");
    const FlashAttnArgs& a = args.a;
    TP_DYN_SHARED(u16, queries);
    u16* const stages = queries + kRows * kStride;
    u16* const weights = stages + 2 * kCells * kStride;
    float* const tops = (float*)(weights + kRows * kWeights);  // [part][row]
    u32* const looks = (u32*)(tops + kParts * kRows);
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4, group = warp / kParts, part = warp % kParts;
    const int d = (int)a.q.ne[0], dv = (int)a.v.ne[0], n_tokens = (int)a.q.ne[1], n_heads = (int)a.q.ne[2];
    const int together = kApart ? a.gqa_ratio : n_heads, n_rows = n_tokens * together;  // heads that share keys, of which a rank may have some only
    const int kv_heads = kApart ? (int)a.k.ne[2] : 1, kv_head = kApart ? (int)blockIdx.z % kv_heads : 0;
    const int first_head = kApart ? (kv_head + a.kv_head_offset) * a.gqa_ratio - a.head_offset : 0;
    const int row0 = (int)(gridDim.x - 1 - blockIdx.x) * kRows, last = row0 + kRows < n_rows ? row0 + kRows : n_rows, token0 = row0 / together;
    const int begin = (int)blockIdx.y * args.cells, n_kv = (int)a.k.ne[1], end = n_kv - begin < args.cells ? n_kv : begin + args.cells;
    const int first_step = begin / kCells, n_steps = (end + kCells - 1) / kCells;
    const i64 stream = (int)blockIdx.z / kv_heads;
    const char* const k = a.k.data + kv_head * a.k.nb[2] + stream % a.k.ne[3] * a.k.nb[3];
    const char* const v = a.v.data + kv_head * a.v.nb[2] + stream % a.v.ne[3] * a.v.nb[3];
    const char* mask = a.has_mask ? a.mask.data + stream % a.mask.ne[3] * a.mask.nb[3] : nullptr;
    // Scores are powers of 2: log2(e) is in Q's scale, in ALiBi's slope, and in what the soft cap multiplies by.
    const float q_scale = a.logit_softcap != 0.0f ? a.scale : a.scale * kLog2E;
    const bool active = row0 + group * 16 < n_rows;

    // This lane's two rows: g and g + 8 of the group. Beyond the last: that one, which is not stored.
    struct Row {
        int token, head;
        float slope;
    } mine[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        int row = row0 + group * 16 + g + half * 8;
        row = row < n_rows ? row : n_rows - 1;
        mine[half].token = row / together, mine[half].head = first_head + row % together;
        mine[half].slope = kLog2E * alibi_slope(a.max_bias, mine[half].head + a.head_offset, a.n_head_global);
    }
    for (int r = warp; r < kRows; r += kWarps) {
        const int row = row0 + r, token = row / together, head = first_head + row % together;
        const bool here = row < n_rows && (!kApart || (head >= 0 && head < n_heads));
        const char* from = a.q.data + token * a.q.nb[1] + head * a.q.nb[2] + stream * a.q.nb[3];
        TpFloat2 two[kD / 64];
#pragma unroll
        for (int i = 0; i < kD / 64; ++i) {
            const int at = (i * 32 + lane) * 2;
            two[i] = here && at < d ? *(const TpFloat2*)(from + at * 4) : TpFloat2{0.0f, 0.0f};
        }
#pragma unroll
        for (int i = 0; i < kD / 64; ++i) *(u32*)(queries + r * kStride + (i * 32 + lane) * 2) = pack(two[i].x * q_scale, two[i].y * q_scale);
    }

    SeenSteps<kCells, kWarps> seen{mask, a.mask.nb[1], token0, (last - 1) / together - token0 + 1, n_tokens, end, n_steps, looks, thread};
    auto fetch = [&](const char* from, u32 row_bytes, int step, int stage) {
        u16* tile = stages + stage * kCells * kStride;
#pragma unroll
        for (int s = 0; s < kCells * kWords / kThreads; ++s) {
            const int i = s * kThreads + thread, row = i / kWords, column = i % kWords * 8, cell = step * kCells + row;
            tp_copy_async_or_zero(tile + row * kStride + column, from + (u64)(u32)cell * row_bytes + column * 2, cell < end && column < d);
        }
    };

    float out[kColumns / 8][4] = {}, most[2] = {-INFINITY, -INFINITY}, sum[2] = {};
    SeenStep step = {first_step - 1, false};
    for (int stage = 1; step.number < n_steps; stage ^= 1) {
        const SeenStep next = seen.next(step.number + 1);
        tp_copy_wait();
        __syncthreads();  // all threads' copies of this step are there, and all have read the other stage to its end
        const bool there = step.number >= first_step, masked = step.mixed;
        if (kApart && there) fetch(v, (u32)a.v.nb[1], step.number, 1);
        else if (next.number < n_steps) fetch(k, (u32)a.k.nb[1], next.number, kApart ? 0 : stage ^ 1);
        const int first = step.number * kCells + part * kMine;  // of this warp's cells
        step = next;
        if (!there) continue;  // the first round fetches alone
        const u16 *const tile = stages + (kApart ? 0 : stage * kCells * kStride), *const values = kApart ? stages + kCells * kStride : tile;
        float score[kMine / 8][4] = {}, odd[kMine / 8][4] = {};  // sums by turns: each product would wait for the one before
        if (active) {
            const u16* q = queries + (group * 16 + lane % 16) * kStride + lane / 16 * 8;
#pragma unroll 6
            for (int c = 0; c < kD / 16; c += 2) {
                u32 qf[2][4];
                tp_ldmatrix_x4(qf[0], q + c * 16);
                tp_ldmatrix_x4(qf[1], q + c * 16 + 16);
#pragma unroll
                for (int j = 0; j < kMine / 8; ++j) {
                    u32 kf[4];  // of both steps of 16
                    tp_ldmatrix_x4(kf, tile + (part * kMine + j * 8 + lane % 8) * kStride + c * 16 + lane / 8 * 8);
                    const u32 left[2] = {kf[0], kf[1]}, right[2] = {kf[2], kf[3]};
                    tp_mma_f16(score[j], qf[0], left);
                    tp_mma_f16(odd[j], qf[1], right);
                }
            }
#pragma unroll
            for (int j = 0; j < kMine / 8; ++j)
#pragma unroll
                for (int e = 0; e < 4; ++e) score[j][e] += odd[j][e];
            if (a.logit_softcap != 0.0f) {
#pragma unroll
                for (int j = 0; j < kMine / 8; ++j)
#pragma unroll
                    for (int e = 0; e < 4; ++e) score[j][e] = capped(score[j][e], a.logit_softcap);
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float top = -INFINITY;
                const char* row = masked && mask ? mask + mine[half].token * a.mask.nb[1] : nullptr;
#pragma unroll
                for (int j = 0; j < kMine / 8; ++j) {
                    if (masked) {
                        const u32 two = mask_of_two(row, first + j * 8 + 2 * t, end);
                        score[j][2 * half] += mine[half].slope * tp_half_to_float((u16)two);
                        score[j][2 * half + 1] += mine[half].slope * tp_half_to_float((u16)(two >> 16));
                    }
                    top = fmaxf(top, fmaxf(score[j][2 * half], score[j][2 * half + 1]));
                }
                top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
                top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
                if (t == 0) tops[part * kRows + group * 16 + g + half * 8] = top;
            }
        }
        __syncthreads();
        if (active) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = group * 16 + g + half * 8;
                float top = most[half];
#pragma unroll
                for (int p = 0; p < kParts; ++p) top = fmaxf(top, tops[p * kRows + row]);
                const float base = top == -INFINITY ? 0.0f : top, keep = tp_exp2(most[half] - base);
                most[half] = top;
                sum[half] *= keep;
#pragma unroll
                for (int j = 0; j < kColumns / 8; ++j) out[j][2 * half] *= keep, out[j][2 * half + 1] *= keep;
#pragma unroll
                for (int j = 0; j < kMine / 8; ++j) {
                    const float x = tp_exp2(score[j][2 * half] - base), y = tp_exp2(score[j][2 * half + 1] - base);
                    sum[half] += x + y;
                    *(u32*)(weights + row * kWeights + part * kMine + j * 8 + 2 * t) = pack(x, y);
                }
            }
        }
        if (kApart) tp_copy_wait();
        __syncthreads();
        if (kApart && next.number < n_steps) fetch(k, (u32)a.k.nb[1], next.number, 0);
        if (active) {
#pragma unroll
            for (int c = 0; c < kCells / 16; ++c) {
                u32 p[4];
                tp_ldmatrix_x4(p, weights + (group * 16 + lane % 16) * kWeights + c * 16 + lane / 16 * 8);
#pragma unroll
                for (int j = 0; j < kColumns / 8; j += 2) {
                    u32 vf[4];
                    tp_ldmatrix_x4_trans(vf, values + (c * 16 + lane % 16) * kStride + part * kColumns + j * 8 + lane / 16 * 8);
                    const u32 left[2] = {vf[0], vf[1]}, right[2] = {vf[2], vf[3]};
                    tp_mma_f16(out[j], p, left);
                    tp_mma_f16(out[j + 1], p, right);
                }
            }
        }
    }
    // A row's sum is its parts', in their order. The last step's readers of `tops` are behind a barrier.
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 1);
        sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 2);
        if (t == 0) tops[part * kRows + group * 16 + g + half * 8] = sum[half];
    }
    __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = group * 16 + g + half * 8;
        if (row0 + row >= n_rows || (kApart && (mine[half].head < 0 || mine[half].head >= n_heads))) continue;
        float total = 0.0f;
#pragma unroll
        for (int p = 0; p < kParts; ++p) total += tops[p * kRows + row];
        const i64 piece = ((stream * n_tokens + mine[half].token) * n_heads + mine[half].head) * args.n_splits + blockIdx.y;
        float scale = 1.0f, *y = args.acc + piece * dv;
        if (args.n_splits == 1) {
            scale = total > 0 ? 1.0f / total : 0.0f;
            if (kApart && a.has_sinks) {
                const float sink = kLog2E * *(const float*)(a.sinks.data + (mine[half].head + a.head_offset) * a.sinks.nb[0]), top = fmaxf(most[half], sink);
                const float keep = most[half] > -INFINITY ? tp_exp2(most[half] - top) : 0.0f;
                scale = keep / (total * keep + tp_exp2(sink - top));
            }
            y = (float*)(a.y.data + mine[half].head * a.y.nb[1] + mine[half].token * a.y.nb[2] + stream * a.y.nb[3]);
        } else if (part == 0 && t == 0) {
            args.meta[piece * 2] = most[half] / kLog2E, args.meta[piece * 2 + 1] = total;  // e to the first, as flash_combine wants it
        }
#pragma unroll
        for (int j = 0; j < kColumns / 8; ++j)
            if (const int at = part * kColumns + j * 8; at < dv) *(TpFloat2*)(y + at + 2 * t) = {out[j][2 * half] * scale, out[j][2 * half + 1] * scale};
    }
}

}  // namespace ggml_tp

#define FLASH_WIDE(name, shape, n_rows, blocks, apart)                                                                            \
    static_assert(ggml_tp::shape.rows() == n_rows, "");                                                                           \
    TP_KERNEL_RESIDENT(name##_##n_rows, FlashSplitArgs, 32 * ggml_tp::shape.warps(), blocks) {                                    \
        ggml_tp::flash_wide<ggml_tp::shape.keys, ggml_tp::shape.groups, ggml_tp::shape.parts, ggml_tp::shape.cells, apart>(args); \
    }

FLASH_WIDE(flash_latent, kLatent.many, 64, 1, false)
FLASH_WIDE(flash_latent, kLatent.some, 32, 1, false)
FLASH_WIDE(flash_latent, kLatent.few, 16, 2, false)
FLASH_WIDE(flash_wide, kWide.many, 64, 1, true)
FLASH_WIDE(flash_wide, kWide.some, 32, 1, true)
FLASH_WIDE(flash_wide, kWide.few, 16, 2, true)

#endif
