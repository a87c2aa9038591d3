// FLASH_ATTN_EXT. flash_split and flash_combine, below, do the usual cache; flash_attn does the rest: a warp per (token, head, stream); each lane scores its own cell of 32, then all lanes gather V over dv.
// Online soft max in f32; sums run in the order of cells, so results do not depend on the launch. grid: (n_tok, n_head, ns).
#include "flash_attn.h"

#include "element.h"
#include "index.h"

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

namespace ggml_tp {
namespace {

struct Eight {
    float f[8];
};
TP_DEVICE Eight eight_halves(const TpInt4& v) {
    Eight out;
    const int words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        out.f[2 * i] = tp_half_to_float((u16)((u32)words[i] & 0xffff));
        out.f[2 * i + 1] = tp_half_to_float((u16)((u32)words[i] >> 16));
    }
    return out;
}

/// The running soft max of one head over the cells that a lane's group of lanes has seen: eight elements of the sum a lane.
struct Running {
    float most, sum, acc[8];
    TP_MEMBER void scale_to(float next) {
        const float keep = most > -INFINITY ? expf(most - next) : 0.0f;
        sum *= keep;
#pragma unroll
        for (int i = 0; i < 8; ++i) acc[i] *= keep;
        most = next;
    }
    TP_MEMBER void merge(float other_most, float other_sum, const float (&other)[8]) {
        const float next = fmaxf(most, other_most);
        if (next == -INFINITY) return;
        scale_to(next);
        const float keep = other_most > -INFINITY ? expf(other_most - next) : 0.0f;
        sum += other_sum * keep;
#pragma unroll
        for (int i = 0; i < 8; ++i) acc[i] += other[i] * keep;
    }
};

/// A group of `width` lanes (head size / 8, rounded up to a power of two) takes a cell: each lane eight elements of its K and V rows.
template <int kHeads>
TP_DEVICE void flash_split(const FlashSplitArgs& args) {
    const FlashAttnArgs& a = args.a;
    __shared__ float merged[kFlashWarps][kHeads][2 + 256];
    const int d = (int)a.q.ne[0], lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int width = 1;
    while (width * 8 < d) width *= 2;
    const int part = lane % width, slot = lane / width, slots = 32 / width;
    const bool holds = part * 8 < d;
    const i64 token = blockIdx.z % a.q.ne[1], stream = blockIdx.z / a.q.ne[1];
    const i64 kv_head = blockIdx.y / args.head_groups, first_of_group = blockIdx.y % args.head_groups * kFlashHeads;
    const i64 head0 = (kv_head + a.kv_head_offset) * a.gqa_ratio + first_of_group - a.head_offset;  // local number of the group's first head
    const char* k = a.k.data + kv_head * a.k.nb[2] + stream % a.k.ne[3] * a.k.nb[3] + part * 16;
    const char* v = a.v.data + kv_head * a.v.nb[2] + stream % a.v.ne[3] * a.v.nb[3] + part * 16;
    // One mask for all heads: with one per head the launcher takes the plain kernel.
    const char* mask_row = a.has_mask ? a.mask.data + token * a.mask.nb[1] + stream % a.mask.ne[3] * a.mask.nb[3] : nullptr;
    float q[kHeads][8];
    bool mine[kHeads];
    float slope[kHeads];
    Running run[kHeads];
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
        mine[h] = first_of_group + h < a.gqa_ratio && head0 + h >= 0 && head0 + h < a.q.ne[2];
        slope[h] = alibi_slope(a.max_bias, (i32)(head0 + h + a.head_offset), a.n_head_global);
        run[h].most = -INFINITY;
        run[h].sum = 0;
        const float* from = (const float*)(a.q.data + token * a.q.nb[1] + (mine[h] ? head0 + h : 0) * a.q.nb[2] + stream * a.q.nb[3]) + part * 8;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            q[h][i] = mine[h] && holds ? from[i] * a.scale : 0.0f;
            run[h].acc[i] = 0;
        }
    }
    const i64 begin = (i64)blockIdx.x * args.cells, end = begin + args.cells < a.k.ne[1] ? begin + args.cells : a.k.ne[1];
    // Four cells of a lane group at a time: their loads go out together. Every lane of a warp takes the same number of steps, shuffles
    // need them all.
    constexpr int kAhead = 4;
    const i64 stride = (i64)kFlashWarps * slots;
    for (i64 first = begin + warp * slots + slot; first - slot < end; first += kAhead * stride) {
        TpInt4 kw[kAhead], vw[kAhead];
        u16 mask[kAhead];
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
            const i64 cell = first + j * stride;
            const bool inside = cell < end && holds;
            kw[j] = inside ? *(const TpInt4*)(k + cell * a.k.nb[1]) : TpInt4{0, 0, 0, 0};
            vw[j] = inside ? *(const TpInt4*)(v + cell * a.v.nb[1]) : TpInt4{0, 0, 0, 0};
            mask[j] = cell < end && mask_row ? *(const u16*)(mask_row + cell * 2) : (u16)0;
        }
        // All scores first, then one step of the soft max: independent chains hide each other's latency.
        float score[kAhead][kHeads];
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
            const Eight kf = eight_halves(kw[j]);
#pragma unroll
            for (int h = 0; h < kHeads; ++h) {
                float dot = 0;
#pragma unroll
                for (int i = 0; i < 8; ++i) dot += q[h][i] * kf.f[i];
                score[j][h] = dot;
            }
        }
        for (int o = 1; o < width; o *= 2)
#pragma unroll
            for (int j = 0; j < kAhead; ++j)
#pragma unroll
                for (int h = 0; h < kHeads; ++h) score[j][h] += __shfl_xor_sync(0xffffffffu, score[j][h], o);
#pragma unroll
        for (int h = 0; h < kHeads; ++h) {
            float most = run[h].most;
#pragma unroll
            for (int j = 0; j < kAhead; ++j) {
                float s = score[j][h];
                if (a.logit_softcap != 0.0f) s = a.logit_softcap * tanhf(s);
                s += slope[h] * tp_half_to_float(mask[j]);
                score[j][h] = first + j * stride < end && mine[h] ? s : -INFINITY;
                most = fmaxf(most, score[j][h]);
            }
            const float base = most == -INFINITY ? 0.0f : most;  // while all are masked, every exponential below is 0
            const float keep = expf(run[h].most - base);
            run[h].most = most;
            run[h].sum *= keep;
#pragma unroll
            for (int i = 0; i < 8; ++i) run[h].acc[i] *= keep;
#pragma unroll
            for (int j = 0; j < kAhead; ++j) {
                score[j][h] = expf(score[j][h] - base);
                run[h].sum += score[j][h];
            }
        }
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
            const Eight vf = eight_halves(vw[j]);
#pragma unroll
            for (int h = 0; h < kHeads; ++h)
#pragma unroll
                for (int i = 0; i < 8; ++i) run[h].acc[i] += score[j][h] * vf.f[i];
        }
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
        for (int o = width; o < 32; o *= 2) {
            const float most = __shfl_xor_sync(0xffffffffu, run[h].most, o), sum = __shfl_xor_sync(0xffffffffu, run[h].sum, o);
            float acc[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) acc[i] = __shfl_xor_sync(0xffffffffu, run[h].acc[i], o);
            // Both sides of a pair must merge in one order, or their bits differ.
            if (lane & o) {
                Running other;
                other.most = most, other.sum = sum;
#pragma unroll
                for (int i = 0; i < 8; ++i) other.acc[i] = acc[i];
                other.merge(run[h].most, run[h].sum, run[h].acc);
                run[h] = other;
            } else {
                run[h].merge(most, sum, acc);
            }
        }
        if (slot == 0) {
            float* to = merged[warp][h];
            if (part == 0) to[0] = run[h].most, to[1] = run[h].sum;
            if (holds)
#pragma unroll
                for (int i = 0; i < 8; ++i) to[2 + part * 8 + i] = run[h].acc[i];
        }
    }
    __syncthreads();
    for (int h = 0; h < kHeads; ++h) {
        if (first_of_group + h >= a.gqa_ratio || head0 + h < 0 || head0 + h >= a.q.ne[2]) continue;
        float most = -INFINITY;
        for (int w = 0; w < kFlashWarps; ++w) most = fmaxf(most, merged[w][h][0]);
        float keep[kFlashWarps], sum = 0;
        for (int w = 0; w < kFlashWarps; ++w) {
            keep[w] = merged[w][h][0] > -INFINITY ? expf(merged[w][h][0] - most) : 0.0f;
            sum += merged[w][h][1] * keep[w];
        }
        const i64 at = ((stream * a.q.ne[1] + token) * a.q.ne[2] + head0 + h) * args.n_splits + blockIdx.x;
        for (int i = threadIdx.x; i < d; i += 32 * kFlashWarps) {
            float total = 0;
            for (int w = 0; w < kFlashWarps; ++w) total += merged[w][h][2 + i] * keep[w];
            args.acc[at * d + i] = total;
        }
        if (threadIdx.x == 0) args.meta[at * 2] = most, args.meta[at * 2 + 1] = sum;
    }
}

}  // namespace
}  // namespace ggml_tp

TP_KERNEL(flash_split_1, FlashSplitArgs, 128) { ggml_tp::flash_split<1>(args); }
TP_KERNEL(flash_split_2, FlashSplitArgs, 128) { ggml_tp::flash_split<2>(args); }
TP_KERNEL(flash_split_4, FlashSplitArgs, 128) { ggml_tp::flash_split<4>(args); }
TP_KERNEL(flash_split_8, FlashSplitArgs, 128) { ggml_tp::flash_split<8>(args); }

// grid: (n_head, n_tok, ns), a thread per element of a head.
TP_KERNEL(flash_combine, FlashCombineArgs, 256) {
    using namespace ggml_tp;
    const i64 head = blockIdx.x, token = blockIdx.y, stream = blockIdx.z, dv = args.y.ne[0];
    const i64 at = ((stream * args.y.ne[2] + token) * args.y.ne[1] + head) * args.n_splits;
    float most = -INFINITY, sum = 0, total = 0;
    for (int s = 0; s < args.n_splits; ++s) most = fmaxf(most, args.meta[(at + s) * 2]);
    float sink = -INFINITY;
    if (args.has_sinks) {
        sink = *(const float*)(args.sinks.data + (head + args.head_offset) * args.sinks.nb[0]);
        most = fmaxf(most, sink);
    }
    const bool inside = threadIdx.x < dv;
    for (int s = 0; s < args.n_splits; ++s) {
        const float piece = args.meta[(at + s) * 2];
        if (piece == -INFINITY) continue;
        const float keep = expf(piece - most);
        sum += args.meta[(at + s) * 2 + 1] * keep;
        if (inside) total += args.acc[(at + s) * dv + threadIdx.x] * keep;
    }
    if (sink > -INFINITY) sum += expf(sink - most);
    const float y = sum > 0 ? total / sum : 0.0f;
    if (inside) *(float*)(args.y.data + threadIdx.x * 4 + head * args.y.nb[1] + token * args.y.nb[2] + stream * args.y.nb[3]) = y;
    if (!args.xq) return;
    // A warp is a block of 32: the arithmetic of quantize.cu.
    const i64 row = stream * args.y.ne[2] + token, k = dv * args.y.ne[1], i = head * dv + threadIdx.x;
    const float d = tp_warp_max(fabsf(y)) / 127.0f, q = d > 0 ? rintf(y / d) : 0.0f, q_sum = tp_warp_sum(q);
    ((s8*)args.xq)[row * k + i] = (s8)(int)q;
    if (threadIdx.x % 32 == 0) {
        float* out = (float*)args.xd + (row * (k / 32) + i / 32) * 2;
        out[0] = d;
        out[1] = d * q_sum;
    }
}
