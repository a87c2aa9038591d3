// Attention of few tokens over a piece of the cache on tensor cores (sm_80 and later), for flash_attn.cu and stream.cu: up to eight query heads
// of one KV head are the rows of Q·K and the columns of V·P, so a cell's K and V are read once for all of them, straight into
// fragments: from memory (flash_columns) or from where the stream has brought them (stream.cu). Both products may take the elements they sum over in any order, and the rows of V·P lie anywhere: that is chosen so that each
// lane's sixteen bytes are whole fragments (mma.m16n8k16, g = lane / 4, t = lane % 4):
//   Q·K: row g is head g, column g cell g. A lane's eight halves of 32 neighbours, from 8 * t on, are two steps along k.
//   V·P: cells 2t, 2t + 1, 2t + 8 and 2t + 9 of 16 are what a lane holds of Q·K, and what it loads of V: eight rows of V·P from 8 * g on.
// Q, K and V are halves, P two of them, sums f32. With FMAs a cell took four times the instructions for four heads (docs/decisions.md).
#pragma once
#include "element.h"
#include "flash_attn.h"
#include "quantize_group.h"

#if TP_ARCH >= 800

namespace ggml_tp {

TP_DEVICE u32 half2_of(float low, float high) { return (u32)tp_float_to_half(low) | (u32)tp_float_to_half(high) << 16; }
TP_DEVICE float high_half(u32 w) { return tp_half_to_float((u16)(w >> 16)); }
TP_DEVICE float low_half(u32 w) { return tp_half_to_float((u16)(w & 0xffff)); }

/// The steps of a warp that have a cell to see. A look is at kColumnsRun cells' masks, two a lane: steps of kColumnsStep, `step` cells from one to
/// the next. Cells with a mask of -inf for this token (empty, another sequence's, the future) need not be read; a step of them is left out.
struct OpenSteps {
    const char* mask;  // of the token; null: every cell counts
    int first, end, step, stride;
    u32 ahead = 0, words = 0, open = 0;  // masks of two cells a lane: the next look's, this one's; its open steps
    int base = 0;

    TP_MEMBER u32 load(int from) const {
        const int lane = threadIdx.x % 32, cell = from + lane / 8 * step + lane % 8 * 2;
        if (cell >= end) return 0xfc00fc00u;
        if (!mask) return cell + 1 < end ? 0u : 0xfc000000u;
        const u32 low = *(const u16*)(mask + (i64)cell * 2), high = cell + 1 < end ? *(const u16*)(mask + (i64)cell * 2 + 2) : 0xfc00u;
        return low | high << 16;
    }
    TP_MEMBER void begin() { ahead = load(first); }
    /// The first cell of the next step, or -1; pairs: the masks of cells 2t, 2t + 1 and 2t + 8, 2t + 9. The same for all lanes.
    TP_MEMBER int next(u32 (&pairs)[2]) {
        while (!open) {
            if (first >= end) return -1;
            base = first;
            words = ahead;
            first += stride;
            if (first < end) ahead = load(first);
            const u32 lanes = __ballot_sync(0xffffffffu, words != 0xfc00fc00u);
#pragma unroll
            for (int s = 0; s < kColumnsRun / kColumnsStep; ++s) open |= (lanes >> 8 * s & 0xff ? 1u : 0u) << s;
        }
        int s = 0;
        while (!(open >> s & 1)) ++s;
        open &= open - 1;
        const int from = 8 * s + threadIdx.x % 4;
        pairs[0] = __shfl_sync(0xffffffffu, words, from);
        pairs[1] = __shfl_sync(0xffffffffu, words, from + 4);
        return base + s * step;
    }
};

/// The query heads of a unit, of which `n`: those of one KV head. A rank may have some of them only.
struct UnitHeads {
    int n, kv_head, first;  // of the KV heads here; local number of the first query head, which may be below 0
    int n_local;
    TP_MEMBER bool mine(int h) const { return h < n && first + h >= 0 && first + h < n_local; }
};
TP_DEVICE UnitHeads heads_of_unit(const FlashSplitArgs& args, u32 unit) {
    const FlashAttnArgs& a = args.a;
    const u32 kv_head = unit / (u32)args.head_groups;
    const int first_of_group = (int)(unit - kv_head * (u32)args.head_groups) * args.group_heads, left = a.gqa_ratio - first_of_group;
    return {left < args.group_heads ? left : args.group_heads, (int)kv_head, ((int)kv_head + a.kv_head_offset) * a.gqa_ratio + first_of_group - a.head_offset,
            (int)a.q.ne[2]};
}

/// Queries as an op in front has left them: F32, to be scaled.
struct QueriesInMemory {
    static constexpr bool kOwnCell = false;
    const FlashAttnArgs& a;
    i64 token, stream;
    TP_MEMBER void begin() const {}
    TP_MEMBER void prepare() const {}
    TP_MEMBER TpInt4 eight(const UnitHeads& heads, int h, int at) const {
        const float* from = (const float*)(a.q.data + token * a.q.nb[1] + (heads.first + h) * a.q.nb[2] + stream * a.q.nb[3]) + at;
        auto pair = [&](int i) { return (int)half2_of(from[i] * a.scale, from[i + 1] * a.scale); };
        return {pair(0), pair(2), pair(4), pair(6)};
    }
};
/// A head's element of an attention whose sinks count: from what its cells have added up to. The same of one kernel or two.
TP_DEVICE float flash_value(const FlashAttnArgs& a, i64 head, float most, float sum, float total) {
    float keep = 1.0f;
    if (a.has_sinks) {
        const float sink = *(const float*)(a.sinks.data + (head + a.head_offset) * a.sinks.nb[0]), top = fmaxf(most, sink);
        keep = most > -INFINITY ? expf(most - top) : 0.0f;
        sum = sum * keep + (sink > -INFINITY ? expf(sink - top) : 0.0f);
    }
    return sum > 0 ? total * keep / sum : 0.0f;
}
/// Elements i and i + 1 of row `row` of activations of k each, as the next product reads them; by all lanes of a warp for 64 neighbours.
TP_DEVICE void leave_two(ActivationForm form, char* xq, char* xd, i64 row, i64 i, i64 k, bool inside, float first, float second) {
    if (form != kInt8Rows) {
        auto half = [form](float v) { return (u32)(form == kBf16Panels ? tp_float_to_bf16(v) : activation_half(v)); };
        if (inside) *(u32*)(xq + panel_byte((u32)row, (u32)i, (u32)k)) = half(first) | half(second) << 16;
        return;
    }
    float most = fmaxf(fabsf(first), fabsf(second));
#pragma unroll
    for (int o = 8; o; o /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, o));  // a block of 32: 16 lanes
    const Int8Scale scale(most);
    const s8 q[2] = {(s8)(scale.bits(first) & 255), (s8)(scale.bits(second) & 255)};
    float sum = (float)q[0] + (float)q[1];
#pragma unroll
    for (int o = 8; o; o /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, o);
    if (!inside) return;
    *(u16*)(xq + row * k + i) = (u16)((u8)q[0] | (u8)q[1] << 8);
    if (i % 32 == 0) *(TpFloat2*)((float*)xd + (row * (k / 32) + i / 32) * 2) = {scale.d, scale.d * sum};
}

/// A piece's sums, for flash_combine, or what that would make of it: elements i and i + 1 (even i), by all lanes of a warp for neighbours of one head.
struct PieceResults {
    const FlashSplitArgs& args;
    i64 split, token, stream;
    TP_MEMBER i64 piece(i64 head) const { return ((stream * args.a.q.ne[1] + token) * args.a.q.ne[2] + head) * args.n_splits + split; }
    TP_MEMBER void put_counts(i64 head, float most, float sum) const { *(TpFloat2*)(args.meta + piece(head) * 2) = {most, sum}; }
    TP_MEMBER float* acc_of(i64 head) const { return args.acc + piece(head) * args.a.q.ne[0]; }
    TP_MEMBER void put(i64 head, int i, bool inside, float most, float sum, TpFloat2 acc) const {
        if (args.whole) {
            const FlashAttnArgs& a = args.a;
            const float first = flash_value(a, head, most, sum, acc.x), second = flash_value(a, head, most, sum, acc.y);
            if (inside) *(TpFloat2*)(a.y.data + i * 4 + head * a.y.nb[1] + token * a.y.nb[2] + stream * a.y.nb[3]) = {first, second};
            const i64 d = a.y.ne[0];
            if (args.xq) leave_two(args.form, args.xq, args.xd, stream * a.y.ne[2] + token, head * d + i, d * a.y.ne[1], inside, first, second);
            return;
        }
        if (!inside) return;
        *(TpFloat2*)(acc_of(head) + i) = acc;
        if (i == 0) put_counts(head, most, sum);
    }
};

/// Scores of 16 cells: of head g and cells 2t, 2t + 1 of each eight.
struct ColumnScores {
    float of[2][4] = {};  // [8 cells][.. and two that no head has]
    /// 32 elements of the head: q, and k of cells g and 8 + g, a lane's eight halves each.
    TP_MEMBER void add(const TpInt4& q, const TpInt4 (&k)[2]) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const u32 low[4] = {(u32)q.x, 0u, (u32)q.y, 0u}, high[4] = {(u32)q.z, 0u, (u32)q.w, 0u};
            const u32 first[2] = {(u32)k[j].x, (u32)k[j].y}, second[2] = {(u32)k[j].z, (u32)k[j].w};
            tp_mma_f16(of[j], low, first);
            tp_mma_f16(of[j], high, second);
        }
    }
};
/// Probabilities of 16 cells, each as two halves that add up to it: rounded to one, the next int8 rounding would go the other way for one activation
/// in a hundred whenever a cache is divided otherwise, by ranks or pieces (NMSE of logits 1e-4 instead of 1e-13).
struct ColumnWeights {
    u32 pf[2], rest[2];
};
/// What a warp has of its heads: the running soft max of head g; sums of rows 64 b + 8 g + 2 w + i / 2 for head 2t + i % 2. kBlocks: 64 elements of a head each.
template <int kBlocks>
struct ColumnSums {
    float most = -INFINITY, sum = 0, out[kBlocks][4][4] = {};
    /// pairs: the masks of cells 2t, 2t + 1 and 2t + 8, 2t + 9.
    TP_MEMBER ColumnWeights weigh(ColumnScores& scores, const u32 (&pairs)[2], float slope, float softcap) {
        const int t = threadIdx.x % 4;
        float(&score)[2][4] = scores.of;
        float next_most = most;
        if (softcap != 0.0f)
#pragma unroll
            for (int j = 0; j < 2; ++j)
#pragma unroll
                for (int i = 0; i < 2; ++i) score[j][i] = softcap * tanhf(score[j][i]);
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float s = score[j][i];
                s += slope * (i ? high_half(pairs[j]) : low_half(pairs[j]));
                score[j][i] = s;
                next_most = fmaxf(next_most, s);
            }
        next_most = fmaxf(next_most, __shfl_xor_sync(0xffffffffu, next_most, 1));
        next_most = fmaxf(next_most, __shfl_xor_sync(0xffffffffu, next_most, 2));
        if (__ballot_sync(0xffffffffu, next_most > most)) {
            if (__ballot_sync(0xffffffffu, most > -INFINITY)) {  // not of a warp's first cells: there are no sums yet
                const float keep = most > -INFINITY ? expf(most - next_most) : 0.0f;
                sum *= keep;
                const float first = __shfl_sync(0xffffffffu, keep, 8 * t), second = __shfl_sync(0xffffffffu, keep, 8 * t + 4);  // of heads 2t, 2t + 1
#pragma unroll
                for (int b = 0; b < kBlocks; ++b)
#pragma unroll
                    for (int w = 0; w < 4; ++w) out[b][w][0] *= first, out[b][w][2] *= first, out[b][w][1] *= second, out[b][w][3] *= second;
            }
            most = next_most;
        }
        const float base = most == -INFINITY ? 0.0f : most;  // while all are masked, every exponential is 0
        float p[2][2];
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
            for (int i = 0; i < 2; ++i) sum += p[j][i] = expf(score[j][i] - base);
        ColumnWeights weights;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            weights.pf[j] = half2_of(p[j][0], p[j][1]);
            weights.rest[j] = half2_of(p[j][0] - low_half(weights.pf[j]), p[j][1] - high_half(weights.pf[j]));
        }
        return weights;
    }
    /// Elements [64 b, 64 b + 64): v of cells 2t, 2t + 1, 2t + 8, 2t + 9, a lane's eight halves each.
    TP_MEMBER void add(int b, const TpInt4 (&v)[4], const ColumnWeights& weights) {
        u32 words[4][4];
#pragma unroll
        for (int i = 0; i < 4; ++i) words[i][0] = (u32)v[i].x, words[i][1] = (u32)v[i].y, words[i][2] = (u32)v[i].z, words[i][3] = (u32)v[i].w;
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            const u32 vt[4] = {tp_byte_perm(words[0][w], words[1][w], 0x5410), tp_byte_perm(words[0][w], words[1][w], 0x7632),
                               tp_byte_perm(words[2][w], words[3][w], 0x5410), tp_byte_perm(words[2][w], words[3][w], 0x7632)};
            tp_mma_f16(out[b][w], vt, weights.pf);
            tp_mma_f16(out[b][w], vt, weights.rest);
        }
    }
    /// Member 0 of each set of warps gets what `members` of them (a power of two) have of the same heads, as in merge(): halves of them hand over to the other
    /// halves, a lane to the same lane. through: column_fold_floats of all sets' warps. Every thread of the block comes here.
    template <class Sync>
    TP_MEMBER void fold(int member, int members, int set, int sets, float* through, Sync sync) {
        constexpr int kWords = 4 * kBlocks;  // TpInt4 of a lane
        const int lane = threadIdx.x % 32, t = lane % 4;
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        for (int half = members / 2; half > 0; half /= 2) {
            float* const place = through + ((member % half) * sets + set) * column_fold_floats(kBlocks * 64);
            TpInt4* const words = (TpInt4*)place + lane;
            float* const counts = place + kWords * 4 * 32 + 2 * lane;
            if (member >= half && member < 2 * half) {
#pragma unroll
                for (int i = 0; i < kWords; ++i) {
                    const float(&o)[4] = out[i / 4][i % 4];
                    words[32 * i] = {__float_as_int(o[0]), __float_as_int(o[1]), __float_as_int(o[2]), __float_as_int(o[3])};
                }
                counts[0] = most, counts[1] = sum;
            }
            sync();
            if (member < half) {
                const float other_most = counts[0], next = fmaxf(most, other_most), base = next > -INFINITY ? next : 0.0f;
                const float keep = expf(most - base), add = expf(other_most - base);
                sum = sum * keep + counts[1] * add;
                most = next;
                const float keep1 = __shfl_sync(0xffffffffu, keep, 8 * t), keep2 = __shfl_sync(0xffffffffu, keep, 8 * t + 4);  // of heads 2t, 2t + 1
                const float add1 = __shfl_sync(0xffffffffu, add, 8 * t), add2 = __shfl_sync(0xffffffffu, add, 8 * t + 4);
#pragma unroll
                for (int i = 0; i < kWords; ++i) {
                    float(&o)[4] = out[i / 4][i % 4];
                    const TpInt4 its = words[32 * i];
                    o[0] = o[0] * keep1 + __int_as_float(its.x) * add1, o[2] = o[2] * keep1 + __int_as_float(its.z) * add1;
                    o[1] = o[1] * keep2 + __int_as_float(its.y) * add2, o[3] = o[3] * keep2 + __int_as_float(its.w) * add2;
                }
            }
            sync();
        }
    }
    /// Of a warp that has all of its heads' cells: after fold().
    template <class Results>
    TP_MEMBER void store(const UnitHeads& heads, int d, const Results& results) const {
        const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
        if (t == 0 && heads.mine(g)) results.put_counts(heads.first + g, most, sum);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (!heads.mine(2 * t + i)) continue;
            float* const to = results.acc_of(heads.first + 2 * t + i) + g * 8;
#pragma unroll
            for (int b = 0; b < kBlocks; ++b)
                if (b * 64 + g * 8 < d)
#pragma unroll
                    for (int w = 0; w < 4; w += 2)
                        *(TpInt4*)(to + b * 64 + 2 * w) = {__float_as_int(out[b][w][i]), __float_as_int(out[b][w][2 + i]), __float_as_int(out[b][w + 1][i]),
                                                           __float_as_int(out[b][w + 1][2 + i])};
        }
    }
    /// Adds up what kWarps warps have of the same heads, in their order, through shared memory. merged: flash_columns_floats. All threads of the block
    /// come here.
    template <int kWarps, class Results, class Sync>
    TP_MEMBER void merge(const UnitHeads& heads, int d, int warp, float* merged, const Results& results, Sync sync) {
        const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, stride_warp = heads.n * d;
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        // Every warp's sums into shared memory; then a thread adds up two elements of all warps, and a lane knows what a warp's count.
        float* to = merged + warp * stride_warp;
        float* const counts = merged + kWarps * stride_warp;  // {most, sum} of [warp][head]
        if (t == 0 && g < heads.n) *(TpFloat2*)(counts + 2 * (warp * heads.n + g)) = {most, sum};
#pragma unroll
        for (int i = 0; i < 2; ++i)
            if (2 * t + i < heads.n)
#pragma unroll
                for (int b = 0; b < kBlocks; ++b)
                    if (const int at = b * 64 + g * 8; at < d)
#pragma unroll
                        for (int w = 0; w < 4; w += 2)
                            *(TpInt4*)(to + (2 * t + i) * d + at + 2 * w) = {__float_as_int(out[b][w][i]), __float_as_int(out[b][w][2 + i]),
                                                                             __float_as_int(out[b][w + 1][i]), __float_as_int(out[b][w + 1][2 + i])};
        sync();
        for (int unit = warp; unit < heads.n * kBlocks; unit += kWarps) {
            const int h = unit / kBlocks, i = unit % kBlocks * 64 + 2 * lane;
            const float* from = merged + h * d;
            const TpFloat2 of_lane = *(const TpFloat2*)(counts + 2 * (lane % kWarps * heads.n + h));
            float all_most = of_lane.x;
#pragma unroll
            for (int o = 1; o < kWarps; o *= 2) all_most = fmaxf(all_most, __shfl_xor_sync(0xffffffffu, all_most, o));
            const float keep = expf(of_lane.x - (all_most > -INFINITY ? all_most : 0.0f));
            float all_sum = of_lane.y * keep;
#pragma unroll
            for (int o = 1; o < kWarps; o *= 2) all_sum += __shfl_xor_sync(0xffffffffu, all_sum, o);
            TpFloat2 all = {0, 0};
#pragma unroll
            for (int w = 0; w < kWarps; ++w) {
                const float share = __shfl_sync(0xffffffffu, keep, w);
                if (i >= d) continue;
                const TpFloat2 its = *(const TpFloat2*)(from + w * stride_warp + i);
                all.x += its.x * share, all.y += its.y * share;
            }
            if (heads.mine(h)) results.put(heads.first + h, i, i < d, all_most, all_sum, all);
        }
    }
};

/// kAhead: a step's V is loaded with its K, K while the step before is worked on, and queries are kept, where there are registers for them.
/// Piece `split` of the cells for `heads` and one token of one stream, by kWarps warps. kD: head size rounded up to a multiple of 64.
/// merged: flash_columns_floats floats of shared memory. sync: a barrier of the block's threads. queries: begin() what they are made of, and
/// prepare() them; the first masks are on their way. Queries::kOwnCell: from then on key and value of one cell are in shared memory, own_row(0) and (1), and
/// of cells own_cell(0), own_cell(1), or -1: another block writes them to the cache meanwhile.
template <int kD, int kWarps, bool kAhead, class Queries, class Results, class Sync>
TP_DEVICE void flash_columns(const FlashSplitArgs& args, const UnitHeads& heads, int split, i64 token, i64 stream, int thread, float* merged, Queries queries,
                             const Results& results, Sync sync) {
    constexpr int kChunks = kD / 32, kBlocks = kD / 64;                                                                      // of K, of V
    constexpr int kChunksAtOnce = kAhead || kChunks < 4 ? kChunks : 4, kBlocksAtOnce = kAhead || kBlocks < 2 ? kBlocks : 2;  // 32 registers each
    static_assert((kWarps & (kWarps - 1)) == 0 && kWarps <= 32, "a lane has a warp's sums at the end");
    const FlashAttnArgs& a = args.a;
    const int d = (int)a.q.ne[0], lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
    auto of_stream = [&](const View& x) { return x.ne[3] > 1 ? (i64)((u32)stream % (u32)x.ne[3]) * x.nb[3] : 0; };
    const char* k = a.k.data + heads.kv_head * a.k.nb[2] + of_stream(a.k) + t * 16;
    const char* v = a.v.data + heads.kv_head * a.v.nb[2] + of_stream(a.v) + g * 16;
    const int n_cells = (int)a.k.ne[1], begin = split * args.cells, end = n_cells - begin < args.cells ? n_cells : begin + args.cells;
    const float slope = alibi_slope(a.max_bias, (i32)(heads.first + g + a.head_offset), a.n_head_global);

    OpenSteps steps;
    // One mask for all heads: with one per head the launcher takes the plain kernel.
    steps.mask = a.has_mask ? a.mask.data + token * a.mask.nb[1] + of_stream(a.mask) : nullptr;
    // Few cells: a warp's steps lie apart, so that each has some of a cache that is not full, and one look is enough.
    const bool few = end - begin <= kWarps * kColumnsRun;
    steps.first = begin + warp * (few ? kColumnsStep : kColumnsRun);
    steps.step = few ? kWarps * kColumnsStep : kColumnsStep;
    steps.end = end;
    steps.stride = kWarps * kColumnsRun;
    steps.begin();
    queries.begin();
    queries.prepare();

    auto load_q = [&](int c) { return heads.mine(g) && c * 32 + t * 8 < d ? queries.eight(heads, g, c * 32 + t * 8) : TpInt4{0, 0, 0, 0}; };
    ColumnSums<kBlocks> sums;
    const u32 k_row = (u32)a.k.nb[1], v_row = (u32)a.v.nb[1];
    // Beyond the last cell: that one again, it counts nothing there. Beyond the head: its first elements, which meet a query of zero, or are not stored.
    auto inside = [&](int cell, int at) { return (u32)(cell + at < end ? at : end - 1 - cell); };
    auto load = [](const char* from) {
        if constexpr (Queries::kOwnCell) return tp_load_any_in_order(from);
        else return kAhead ? *(const TpInt4*)from : tp_load_in_order(from, true);
    };
    // Where a lane's keys and values of a step of cells are.
    struct Rows {
        const char *k[2], *v[4];
    };
    auto rows_of = [&](int cell) {
        Rows rows;
        const char *const first_k = k + cell * a.k.nb[1], *const first_v = v + cell * a.v.nb[1];
        auto place = [&](int i, const char* first, u32 bytes, int in_step) {
            const u32 at = inside(cell, in_step);
            const char* row = first + at * bytes;
            if constexpr (Queries::kOwnCell) row = cell + (int)at == queries.own_cell(i) ? (const char*)queries.own_row(i) + (i ? g : t) * 16 : row;
            return row;
        };
#pragma unroll
        for (int j = 0; j < 2; ++j) rows.k[j] = place(0, first_k, k_row, j * 8 + g);
#pragma unroll
        for (int i = 0; i < 4; ++i) rows.v[i] = place(1, first_v, v_row, 2 * t + i % 2 + i / 2 * 8);
        return rows;
    };
    auto load_k = [&](const Rows& rows, int c, TpInt4(&to)[2]) {
        const int offset = c * 32 + t * 8 < d ? c * 64 : -t * 16;
#pragma unroll
        for (int j = 0; j < 2; ++j) to[j] = load(rows.k[j] + offset);
    };
    auto load_v = [&](const Rows& rows, int b, TpInt4(&to)[4]) {
        const int offset = b * 64 + g * 8 < d ? b * 128 : -g * 16;
#pragma unroll
        for (int i = 0; i < 4; ++i) to[i] = load(rows.v[i] + offset);
    };
    u32 pairs[2] = {};
    if constexpr (kAhead) {
        TpInt4 q[kChunks], kf[kChunks][2] = {};
#pragma unroll
        for (int c = 0; c < kChunks; ++c) q[c] = load_q(c);
        auto load_all_k = [&](const Rows& rows) {
#pragma unroll
            for (int c = 0; c < kChunks; ++c) load_k(rows, c, kf[c]);
        };
        int cell = steps.next(pairs);
        if (cell >= 0) load_all_k(rows_of(cell));
        while (cell >= 0) {
            const Rows rows = rows_of(cell);
            TpInt4 vf[kBlocks][4];
#pragma unroll
            for (int b = 0; b < kBlocks; ++b) load_v(rows, b, vf[b]);
            ColumnScores scores;
#pragma unroll
            for (int c = 0; c < kChunks; ++c) scores.add(q[c], kf[c]);
            u32 next_pairs[2] = {};
            cell = steps.next(next_pairs);
            if (cell >= 0) load_all_k(rows_of(cell));
            const ColumnWeights weights = sums.weigh(scores, pairs, slope, a.logit_softcap);
#pragma unroll
            for (int b = 0; b < kBlocks; ++b) sums.add(b, vf[b], weights);
            pairs[0] = next_pairs[0], pairs[1] = next_pairs[1];
        }
    } else {
        constexpr int kBlocksWithK = kBlocks <= 2 ? 1 : 0;  // of V: what registers are left
        for (int cell; (cell = steps.next(pairs)) >= 0;) {
            const Rows rows = rows_of(cell);
            ColumnScores scores;
            TpInt4 vf[kBlocks][4];
#pragma unroll
            for (int c = 0; c < kChunks; c += kChunksAtOnce) {
                TpInt4 kf[kChunksAtOnce][2];
#pragma unroll
                for (int i = 0; i < kChunksAtOnce; ++i) load_k(rows, c + i, kf[i]);
                if (c == 0)
#pragma unroll
                    for (int b = 0; b < kBlocksWithK; ++b) load_v(rows, b, vf[b]);
#pragma unroll
                for (int i = 0; i < kChunksAtOnce; ++i) scores.add(load_q(c + i), kf[i]);
            }
#pragma unroll
            for (int b = kBlocksWithK; b < kBlocksAtOnce; ++b) load_v(rows, b, vf[b]);
            const ColumnWeights weights = sums.weigh(scores, pairs, slope, a.logit_softcap);
#pragma unroll
            for (int b = 0; b < kBlocks; ++b) {
                if (b && b % kBlocksAtOnce == 0)
#pragma unroll
                    for (int i = 0; i < kBlocksAtOnce; ++i) load_v(rows, b + i, vf[b + i]);
                sums.add(b, vf[b], weights);
            }
        }
    }
    sums.template merge<kWarps>(heads, d, warp, merged, results, sync);
}

}  // namespace ggml_tp

#endif
