// Attention over a piece of the cache by a block of kWarps warps, for flash_attn.cu and stream.cu, and the sum of such pieces.
#pragma once
#include "element.h"
#include "flash_attn.h"

namespace ggml_tp {

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

/// The running soft max of one head over the cells that a lane's group of lanes has seen: kEach elements of the sum a lane.
template <int kEach>
struct Running {
    float most, sum, acc[kEach];
    TP_MEMBER void scale_to(float next) {
        const float keep = most > -INFINITY ? expf(most - next) : 0.0f;
        sum *= keep;
#pragma unroll
        for (int i = 0; i < kEach; ++i) acc[i] *= keep;
        most = next;
    }
    TP_MEMBER void merge(float other_most, float other_sum, const float (&other)[kEach]) {
        const float next = fmaxf(most, other_most);
        if (next == -INFINITY) return;
        scale_to(next);
        const float keep = other_most > -INFINITY ? expf(other_most - next) : 0.0f;
        sum += other_sum * keep;
#pragma unroll
        for (int i = 0; i < kEach; ++i) acc[i] += other[i] * keep;
    }
};

/// Piece `split` of unit (kv head and group of its query heads, token and stream). A group of `width` lanes (head size / kEach, rounded up to a
/// power of two) takes a cell: each lane kEach elements of its K and V rows, a multiple of eight; kAhead cells of a lane group are loaded together, and with
/// kPrefetch while those before are worked on. A warp does kHeads heads; `sets` of warps (a power of two) share the unit's heads, and the
/// warps of a set its cells. merged: kWarps / 2 * kHeads * (2 + head size) floats of shared memory. sync: a barrier of the block's threads.
template <int kHeads, int kAhead, int kWarps, int kEach, bool kPrefetch, class Sync>
TP_DEVICE void flash_split_unit(const FlashSplitArgs& args, i64 split, i64 unit, i64 token_stream, int thread, int sets, float* merged, Sync sync) {
    const FlashAttnArgs& a = args.a;
    const int d = (int)a.q.ne[0], lane = thread % 32, set = thread / 32 % sets, warp = thread / 32 / sets, warps = kWarps / sets;
    int width = 1;
    while (width * kEach < d) width *= 2;
    const int part = lane % width, slot = lane / width, slots = 32 / width;
    constexpr int kRuns = kEach / 8;
    bool holds[kRuns];  // of a lane's runs of eight
#pragma unroll
    for (int r = 0; r < kRuns; ++r) holds[r] = part * kEach + 8 * r < d;
    const i64 token = token_stream % a.q.ne[1], stream = token_stream / a.q.ne[1];
    const i64 kv_head = unit / args.head_groups, first_of_group = unit % args.head_groups * args.group_heads + set * kHeads;
    const i64 head0 = (kv_head + a.kv_head_offset) * a.gqa_ratio + first_of_group - a.head_offset;  // local number of the group's first head
    const char* k = a.k.data + kv_head * a.k.nb[2] + stream % a.k.ne[3] * a.k.nb[3] + part * kEach * 2;
    const char* v = a.v.data + kv_head * a.v.nb[2] + stream % a.v.ne[3] * a.v.nb[3] + part * kEach * 2;
    // One mask for all heads: with one per head the launcher takes the plain kernel.
    const char* mask_row = a.has_mask ? a.mask.data + token * a.mask.nb[1] + stream % a.mask.ne[3] * a.mask.nb[3] : nullptr;
    float q[kHeads][kEach];
    bool mine[kHeads];
    float slope[kHeads];
    Running<kEach> run[kHeads];
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
        mine[h] = first_of_group + h < a.gqa_ratio && head0 + h >= 0 && head0 + h < a.q.ne[2];
        slope[h] = alibi_slope(a.max_bias, (i32)(head0 + h + a.head_offset), a.n_head_global);
        run[h].most = -INFINITY;
        run[h].sum = 0;
        const float* from = (const float*)(a.q.data + token * a.q.nb[1] + (mine[h] ? head0 + h : 0) * a.q.nb[2] + stream * a.q.nb[3]) + part * kEach;
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            q[h][i] = mine[h] && holds[i / 8] ? from[i] * a.scale : 0.0f;
            run[h].acc[i] = 0;
        }
    }
    const i64 begin = split * args.cells, end = begin + args.cells < a.k.ne[1] ? begin + args.cells : a.k.ne[1];
    // Every lane of a warp takes the same number of steps, shuffles need them all.
    const i64 stride = (i64)warps * slots;
    struct Cells {
        TpInt4 k[kAhead][kRuns], v[kAhead][kRuns];
        u16 mask[kAhead];
    };
    auto load_cells = [&](i64 first, Cells& c) {
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
            const i64 cell = first + j * stride;
#pragma unroll
            for (int r = 0; r < kRuns; ++r) {
                const bool inside = cell < end && holds[r];
                c.k[j][r] = inside ? *(const TpInt4*)(k + cell * a.k.nb[1] + r * 16) : TpInt4{0, 0, 0, 0};
                c.v[j][r] = inside ? *(const TpInt4*)(v + cell * a.v.nb[1] + r * 16) : TpInt4{0, 0, 0, 0};
            }
            c.mask[j] = cell < end && mask_row ? *(const u16*)(mask_row + cell * 2) : (u16)0;
        }
    };
    Cells now, next;
    const i64 start = begin + warp * slots + slot;
    if (kPrefetch) load_cells(start, next);
    for (i64 first = start; first - slot < end; first += kAhead * stride) {
        if (kPrefetch) {
            now = next;
            load_cells(first + kAhead * stride, next);
        } else {
            load_cells(first, now);
        }
        const TpInt4(&kw)[kAhead][kRuns] = now.k, (&vw)[kAhead][kRuns] = now.v;
        const u16(&mask)[kAhead] = now.mask;
        // All scores first, then one step of the soft max: independent chains hide each other's latency.
        float score[kAhead][kHeads];
#pragma unroll
        for (int j = 0; j < kAhead; ++j)
#pragma unroll
            for (int r = 0; r < kRuns; ++r) {
                const Eight kf = eight_halves(kw[j][r]);
#pragma unroll
                for (int h = 0; h < kHeads; ++h) {
                    float dot = 0;
#pragma unroll
                    for (int i = 0; i < 8; ++i) dot += q[h][8 * r + i] * kf.f[i];
                    score[j][h] = r ? score[j][h] + dot : dot;
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
            for (int i = 0; i < kEach; ++i) run[h].acc[i] *= keep;
#pragma unroll
            for (int j = 0; j < kAhead; ++j) {
                score[j][h] = expf(score[j][h] - base);
                run[h].sum += score[j][h];
            }
        }
#pragma unroll
        for (int j = 0; j < kAhead; ++j)
#pragma unroll
            for (int r = 0; r < kRuns; ++r) {
                const Eight vf = eight_halves(vw[j][r]);
#pragma unroll
                for (int h = 0; h < kHeads; ++h)
#pragma unroll
                    for (int i = 0; i < 8; ++i) run[h].acc[8 * r + i] += score[j][h] * vf.f[i];
            }
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
        for (int o = width; o < 32; o *= 2) {
            const float most = __shfl_xor_sync(0xffffffffu, run[h].most, o), sum = __shfl_xor_sync(0xffffffffu, run[h].sum, o);
            float acc[kEach];
#pragma unroll
            for (int i = 0; i < kEach; ++i) acc[i] = __shfl_xor_sync(0xffffffffu, run[h].acc[i], o);
            // Both sides of a pair must merge in one order, or their bits differ.
            if (lane & o) {
                Running<kEach> other;
                other.most = most, other.sum = sum;
#pragma unroll
                for (int i = 0; i < kEach; ++i) other.acc[i] = acc[i];
                other.merge(run[h].most, run[h].sum, run[h].acc);
                run[h] = other;
            } else {
                run[h].merge(most, sum, acc);
            }
        }
    }
    // The upper half of the warps hands its sums to the lower half, until warp 0 has all: the order depends on nothing but the shape.
    const int stride_head = 2 + d;
    for (int half = warps / 2; half >= 1; half /= 2) {
        if (warp >= half && warp < 2 * half && slot == 0) {
#pragma unroll
            for (int h = 0; h < kHeads; ++h) {
                float* to = merged + (((warp - half) * sets + set) * kHeads + h) * stride_head;
                if (part == 0) to[0] = run[h].most, to[1] = run[h].sum;
#pragma unroll
                for (int i = 0; i < kEach; ++i)
                    if (holds[i / 8]) to[2 + part * kEach + i] = run[h].acc[i];
            }
        }
        sync();
        if (warp < half) {
#pragma unroll
            for (int h = 0; h < kHeads; ++h) {
                const float* from = merged + ((warp * sets + set) * kHeads + h) * stride_head;
                float other[kEach];
#pragma unroll
                for (int i = 0; i < kEach; ++i) other[i] = holds[i / 8] ? from[2 + part * kEach + i] : 0.0f;
                run[h].merge(from[0], from[1], other);
            }
        }
        sync();
    }
    if (warp != 0 || slot != 0) return;
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
        if (!mine[h]) continue;
        const i64 at = ((stream * a.q.ne[1] + token) * a.q.ne[2] + head0 + h) * args.n_splits + split;
#pragma unroll
        for (int i = 0; i < kEach; ++i)
            if (holds[i / 8]) args.acc[at * d + part * kEach + i] = run[h].acc[i];
        if (part == 0) args.meta[at * 2] = run[h].most, args.meta[at * 2 + 1] = run[h].sum;
    }
}

/// Element i of the sum of a head's pieces; all lanes of a warp call it for neighbours of one head, and each of them looks at one piece of 32.
TP_DEVICE float flash_combined(const FlashCombineArgs& args, i64 head, i64 token, i64 stream, i64 i) {
    const i64 dv = args.y.ne[0], at = ((stream * args.y.ne[2] + token) * args.y.ne[1] + head) * args.n_splits;
    const int lane = threadIdx.x % 32;
    const bool inside = i < dv;
    float most = -INFINITY;
    for (int first = 0; first < args.n_splits; first += 32)
        if (first + lane < args.n_splits) most = fmaxf(most, args.meta[(at + first + lane) * 2]);
    most = tp_warp_max(most);
    float sink = -INFINITY;
    if (args.has_sinks) {
        sink = *(const float*)(args.sinks.data + (head + args.head_offset) * args.sinks.nb[0]);
        most = fmaxf(most, sink);
    }
    if (most == -INFINITY) return 0.0f;
    float sum = 0, total = 0;
    for (int first = 0; first < args.n_splits; first += 32) {
        const bool mine = first + lane < args.n_splits;
        const float piece = mine ? args.meta[(at + first + lane) * 2] : -INFINITY;
        const float keep = piece > -INFINITY ? expf(piece - most) : 0.0f;
        if (mine) sum += args.meta[(at + first + lane) * 2 + 1] * keep;
        const int n = args.n_splits - first < 32 ? args.n_splits - first : 32;
#pragma unroll 8
        for (int s = 0; s < n; ++s) {
            const float share = __shfl_sync(0xffffffffu, keep, s);
            if (inside && share > 0) total += args.acc[(at + first + s) * dv + i] * share;
        }
    }
    sum = tp_warp_sum(sum);
    if (sink > -INFINITY) sum += expf(sink - most);
    return sum > 0 ? total / sum : 0.0f;
}

}  // namespace ggml_tp
