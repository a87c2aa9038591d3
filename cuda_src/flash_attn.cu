// FLASH_ATTN_EXT. flash_split (before sm_80) or flash_columns, and flash_combine, below, do the usual cache; flash_attn does the rest: a warp
// per (token, head, stream), whose lanes have pairs of neighbours of a cell's K and V; kAtOnce cells' loads go out together. Warps of a block have heads
// side by side, which often read the same cells. Online soft max in f32; sums run in the order of cells, so results do not depend on the launch.
// grid: (n_tok, n_head / kFlashRestWarps, ns).
#include "flash_attn.h"

#include "element.h"
#include "flash_columns.h"
#include "flash_piece.h"
#include "index.h"
#include "quantize_group.h"

namespace ggml_tp {

constexpr int kMaxHead = 576, kLanePairs = kMaxHead / 64;

/// kHalves: K and V are F16, rows side by side in words; else of any type and strides.
template <bool kHalves>
TP_DEVICE void attend_head(const FlashAttnArgs& args, i64 token, i64 head, i64 stream) {
    constexpr int kAtOnce = 4;
    const int lane = threadIdx.x % 32, d = (int)args.q.ne[0], dv = (int)args.v.ne[0];
    const i64 n_kv = args.k.ne[1], kv_head = (head + args.head_offset) / args.gqa_ratio - args.kv_head_offset;
    const char* q = args.q.data + token * args.q.nb[1] + head * args.q.nb[2] + stream * args.q.nb[3];
    const char* k = args.k.data + kv_head * args.k.nb[2] + stream % args.k.ne[3] * args.k.nb[3];
    const char* v = args.v.data + kv_head * args.v.nb[2] + stream % args.v.ne[3] * args.v.nb[3];
    const char* mask = args.mask.data;
    if (args.has_mask)
        mask += token * args.mask.nb[1] + (head + args.head_offset) % args.mask.ne[2] * args.mask.nb[2] + stream % args.mask.ne[3] * args.mask.nb[3];
    const float slope = alibi_slope(args.max_bias, (i32)head + args.head_offset, args.n_head_global);
    // Pair j of a lane: elements 64 j + 2 lane and the next.
    auto pair_of = [](const View& x, const char* row, int at, int n) -> TpFloat2 {
        if (at >= n) return {0.0f, 0.0f};
        if constexpr (kHalves) {
            const u32 two = *(const u32*)(row + at * 2);
            return {tp_half_to_float((u16)two), tp_half_to_float((u16)(two >> 16))};
        } else {
            return {tp_load(x.type, row + at * x.nb[0]), at + 1 < n ? tp_load(x.type, row + (at + 1) * x.nb[0]) : 0.0f};
        }
    };
    float query[kLanePairs][2], acc[kLanePairs][2] = {}, most = -INFINITY, sum = 0;
#pragma unroll
    for (int j = 0; j < kLanePairs; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int at = 64 * j + 2 * lane + e;
            query[j][e] = at < d ? *(const float*)(q + at * args.q.nb[0]) : 0.0f;
        }
    for (i64 first = 0; first < n_kv; first += kAtOnce) {
        float score[kAtOnce], bias[kAtOnce];
        bool any = false;
#pragma unroll
        for (int c = 0; c < kAtOnce; ++c) {
            const i64 cell = first + c;
            bias[c] = cell >= n_kv ? -INFINITY : args.has_mask ? slope * tp_load(args.mask.type, mask + cell * args.mask.nb[0]) : 0.0f;
            any |= bias[c] > -INFINITY;
        }
        if (!any) continue;  // all are masked, for every lane alike
#pragma unroll
        for (int c = 0; c < kAtOnce; ++c) {
            const char* row = k + (first + c < n_kv ? first + c : n_kv - 1) * args.k.nb[1];
            score[c] = 0;
#pragma unroll
            for (int j = 0; j < kLanePairs; ++j) {
                const TpFloat2 two = pair_of(args.k, row, 64 * j + 2 * lane, d);
                score[c] += query[j][0] * two.x + query[j][1] * two.y;
            }
        }
        float top = most;
#pragma unroll
        for (int c = 0; c < kAtOnce; ++c) {
            score[c] = tp_warp_sum(score[c]) * args.scale;
            if (args.logit_softcap != 0.0f) score[c] = args.logit_softcap * tanhf(score[c]);
            score[c] = bias[c] > -INFINITY ? score[c] + bias[c] : -INFINITY;
            top = fmaxf(top, score[c]);
        }
        if (top == -INFINITY) continue;
        const float keep = most > -INFINITY ? expf(most - top) : 0.0f;
        most = top;
        sum *= keep;
#pragma unroll
        for (int j = 0; j < kLanePairs; ++j) acc[j][0] *= keep, acc[j][1] *= keep;
#pragma unroll
        for (int c = 0; c < kAtOnce; ++c) {
            const float p = score[c] > -INFINITY ? expf(score[c] - top) : 0.0f;
            if (p == 0.0f) continue;  // also what a cell that nobody has written may hold
            sum += p;
            const char* row = v + (first + c) * args.v.nb[1];
#pragma unroll
            for (int j = 0; j < kLanePairs; ++j) {
                const TpFloat2 two = pair_of(args.v, row, 64 * j + 2 * lane, dv);
                acc[j][0] += p * two.x, acc[j][1] += p * two.y;
            }
        }
    }
    float scale = sum > 0 ? 1.0f / sum : 0.0f;
    if (args.has_sinks) {
        const float sink = *(const float*)(args.sinks.data + (head + args.head_offset) * args.sinks.nb[0]), top = fmaxf(most, sink);
        const float keep = most > -INFINITY ? expf(most - top) : 0.0f, total = sum * keep + expf(sink - top);
        scale = total > 0 ? keep / total : 0.0f;
    }
    char* y = args.y.data + head * args.y.nb[1] + token * args.y.nb[2] + stream * args.y.nb[3];
#pragma unroll
    for (int j = 0; j < kLanePairs; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e)
            if (const int at = 64 * j + 2 * lane + e; at < dv) *(float*)(y + at * args.y.nb[0]) = acc[j][e] * scale;
}

}  // namespace ggml_tp

#define FLASH_REST(name, halves)                                                                             \
    TP_KERNEL(name, FlashAttnArgs, 32 * ggml_tp::kFlashRestWarps) {                                          \
        const i64 head = (i64)blockIdx.y * ggml_tp::kFlashRestWarps + threadIdx.x / 32;                      \
        if (head < args.q.ne[2]) ggml_tp::attend_head<halves>(args, (i64)blockIdx.x, head, (i64)blockIdx.z); \
    }
FLASH_REST(flash_attn, false)
FLASH_REST(flash_attn_halves, true)

#if TP_ARCH < 800
#define FLASH_SPLIT(name, heads, ahead, each)                                                                                                             \
    TP_KERNEL(name##_##heads, FlashSplitArgs, 32 * ggml_tp::kFlashWarps) {                                                                                \
        __shared__ float merged[ggml_tp::kFlashWarps / 2 * heads * (2 + 32 * each)];                                                                      \
        ggml_tp::flash_split_unit<heads, ahead, ggml_tp::kFlashWarps, each, false>(args, blockIdx.x, blockIdx.y, blockIdx.z, (int)threadIdx.x, 1, merged, \
                                                                                   [] { __syncthreads(); });                                              \
    }
FLASH_SPLIT(flash_split, 1, 4, 8)
FLASH_SPLIT(flash_split, 2, 4, 8)
FLASH_SPLIT(flash_split, 4, 4, 8)
FLASH_SPLIT(flash_split, 8, 4, 8)
FLASH_SPLIT(flash_split_wide, 1, 2, 16)
FLASH_SPLIT(flash_split_wide, 2, 2, 16)
FLASH_SPLIT(flash_split_wide, 4, 2, 16)
#endif
#if TP_ARCH >= 800
namespace ggml_tp {
template <int kD>
TP_DEVICE void flash_columns_block(const FlashSplitArgs& args) {
    TP_DYN_SHARED(float, merged);
    const FlashAttnArgs& a = args.a;
    const i64 stream = (u32)blockIdx.z / (u32)a.q.ne[1], token = (u32)blockIdx.z % (u32)a.q.ne[1];
    flash_columns<kD, kFlashWarps, kD <= 128>(args, heads_of_unit(args, blockIdx.y), blockIdx.x, token, stream, (int)threadIdx.x, merged,
                                              QueriesInMemory{a, token, stream}, PieceResults{args, blockIdx.x, token, stream}, [] { __syncthreads(); });
}
}  // namespace ggml_tp
#define FLASH_COLUMNS(d) \
    TP_KERNEL(flash_columns_##d, FlashSplitArgs, 128) { ggml_tp::flash_columns_block<d>(args); }
FLASH_COLUMNS(64)
FLASH_COLUMNS(128)
FLASH_COLUMNS(192)
FLASH_COLUMNS(256)
#endif

// grid: (n_head, n_tok, ns), a thread per element of a head.
TP_KERNEL(flash_combine, FlashCombineArgs, 512) {
    using namespace ggml_tp;
    const i64 head = blockIdx.x, token = blockIdx.y, stream = blockIdx.z, dv = args.y.ne[0];
    const float y = flash_combined(args, head, token, stream, threadIdx.x);
    if (threadIdx.x < dv) *(float*)(args.y.data + threadIdx.x * 4 + head * args.y.nb[1] + token * args.y.nb[2] + stream * args.y.nb[3]) = y;
    if (!args.xq) return;
    const i64 row = stream * args.y.ne[2] + token, k = dv * args.y.ne[1], i = head * dv + threadIdx.x;
    if (args.form != kInt8Rows) {
        *(u16*)(args.xq + panel_byte((u32)row, (u32)i, (u32)k)) = args.form == kBf16Panels ? tp_float_to_bf16(y) : activation_half(y);
        return;
    }
    // A warp is a block of 32: the arithmetic of quantize.cu.
    const Int8Scale scale(tp_warp_max(fabsf(y)));
    const s8 q = (s8)(scale.bits(y) & 255);
    const float q_sum = tp_warp_sum((float)q), d = scale.d;
    ((s8*)args.xq)[row * k + i] = q;
    if (threadIdx.x % 32 == 0) {
        float* out = (float*)args.xd + (row * (k / 32) + i / 32) * 2;
        out[0] = d;
        out[1] = d * q_sum;
    }
}
