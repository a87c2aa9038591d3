// FLASH_ATTN_EXT. flash_split (before sm_80) or flash_columns, and flash_combine, below, do the usual cache; flash_attn does the rest: a warp
// per (token, head, stream); each lane scores its own cell of 32, then all lanes gather V over dv.
// Online soft max in f32; sums run in the order of cells, so results do not depend on the launch. grid: (n_tok, n_head, ns).
#include "flash_attn.h"

#include "element.h"
#include "flash_columns.h"
#include "flash_piece.h"
#include "index.h"
#include "quantize_group.h"

constexpr int kMaxHead = 576, kLaneValues = kMaxHead / 32;

TP_KERNEL(flash_attn, FlashAttnArgs, 32) {
    using namespace ggml_tp;
    __shared__ float q_shared[kMaxHead];
    __shared__ float p_shared[32];
    const int lane = threadIdx.x, d = (int)args.q.ne[0], dv = (int)args.v.ne[0];
    const i64 token = blockIdx.x, head = blockIdx.y, stream = blockIdx.z, n_kv = args.k.ne[1];
    const i64 kv_head = (head + args.head_offset) / args.gqa_ratio - args.kv_head_offset;
    const char* q = args.q.data + token * args.q.nb[1] + head * args.q.nb[2] + stream * args.q.nb[3];
    const char* k = args.k.data + kv_head * args.k.nb[2] + stream % args.k.ne[3] * args.k.nb[3];
    const char* v = args.v.data + kv_head * args.v.nb[2] + stream % args.v.ne[3] * args.v.nb[3];
    const char* mask = args.mask.data;
    if (args.has_mask)
        mask += token * args.mask.nb[1] + (head + args.head_offset) % args.mask.ne[2] * args.mask.nb[2] + stream % args.mask.ne[3] * args.mask.nb[3];
    const float slope = alibi_slope(args.max_bias, (i32)head + args.head_offset, args.n_head_global);
    for (int i = lane; i < d; i += 32) q_shared[i] = *(const float*)(q + i * args.q.nb[0]);
    __syncwarp();
    float acc[kLaneValues] = {}, most = -INFINITY, sum = 0;
    for (i64 first = 0; first < n_kv; first += 32) {
        const i64 cell = first + lane;
        float score = -INFINITY;
        float bias = 0;
        if (cell < n_kv && args.has_mask) bias = slope * tp_load(args.mask.type, mask + cell * args.mask.nb[0]);
        if (cell < n_kv && bias > -INFINITY) {
            float dot = 0;
            for (int i = 0; i < d; ++i) dot += q_shared[i] * tp_load(args.k.type, k + cell * args.k.nb[1] + i * args.k.nb[0]);
            dot *= args.scale;
            if (args.logit_softcap != 0.0f) dot = args.logit_softcap * tanhf(dot);
            score = dot + bias;
        }
        const float new_most = fmaxf(most, tp_warp_max(score));
        if (new_most == -INFINITY) continue;  // all 32 are masked, for every lane alike
        const float p = score > -INFINITY ? expf(score - new_most) : 0.0f, keep = most > -INFINITY ? expf(most - new_most) : 0.0f;
        sum = sum * keep + tp_warp_sum(p);
        most = new_most;
        p_shared[lane] = p;
        __syncwarp();
        const int cells = (int)(n_kv - first < 32 ? n_kv - first : 32);
#pragma unroll
        for (int j = 0; j < kLaneValues; ++j) {
            const int i = j * 32 + lane;
            if (i >= dv) break;
            float a = acc[j] * keep;
            for (int c = 0; c < cells; ++c)
                if (p_shared[c] != 0.0f) a += p_shared[c] * tp_load(args.v.type, v + (first + c) * args.v.nb[1] + i * args.v.nb[0]);
            acc[j] = a;
        }
        __syncwarp();
    }
    float scale = sum > 0 ? 1.0f / sum : 0.0f;
    if (args.has_sinks) {
        const float sink = *(const float*)(args.sinks.data + (head + args.head_offset) * args.sinks.nb[0]), top = fmaxf(most, sink);
        const float keep = most > -INFINITY ? expf(most - top) : 0.0f, total = sum * keep + expf(sink - top);
        scale = total > 0 ? keep / total : 0.0f;
    }
    char* y = args.y.data + head * args.y.nb[1] + token * args.y.nb[2] + stream * args.y.nb[3];
#pragma unroll
    for (int j = 0; j < kLaneValues; ++j)
        if (j * 32 + lane < dv) *(float*)(y + (j * 32 + lane) * args.y.nb[0]) = acc[j] * scale;
}

#if TP_ARCH < 800
#define FLASH_SPLIT(heads)                                                                                                                      \
    TP_KERNEL(flash_split_##heads, FlashSplitArgs, 32 * ggml_tp::kFlashWarps) {                                                                 \
        __shared__ float merged[ggml_tp::kFlashWarps / 2 * heads * (2 + 256)];                                                                  \
        ggml_tp::flash_split_unit<heads, 4, ggml_tp::kFlashWarps, false>(args, blockIdx.x, blockIdx.y, blockIdx.z, (int)threadIdx.x, 1, merged, \
                                                                         [] { __syncthreads(); });                                              \
    }
FLASH_SPLIT(1)
FLASH_SPLIT(2)
FLASH_SPLIT(4)
FLASH_SPLIT(8)
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
