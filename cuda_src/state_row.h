// Rows of a state for one token, and a window over tokens: of stream.cu and recurrent.cu.
#pragma once
#include "activation.h"
#include "element.h"
#include "recurrent.h"

namespace ggml_tp {

TP_DEVICE float at(const View& v, i64 i0, i64 i1, i64 i2, i64 i3) { return *(const float*)element_at(v, {i0, i1, i2, i3}); }

/// GATED_DELTA_NET's step (recurrent.cu) of one token: kDeltaRows rows of a head's state from `row` on, where delta_in_fours; a lane has four neighbours of each.
TP_DEVICE void gated_delta_rows(const RecurrentArgs& args, int row, int head) {
    const View *src = args.src, &g = src[3];
    const int lane = threadIdx.x % 32, begin = 4 * lane;
    const i64 q_head = (args.head_begin + head) % args.n_group[0] - args.group_begin[0],
              k_head = (args.head_begin + head) % args.n_group[1] - args.group_begin[1], at_row = (head * args.rows + row) * args.n + begin;
    const bool inside = begin < args.n;
    auto four = [inside](const float* p, float(&v)[4]) {
        const TpInt4 w = inside ? *(const TpInt4*)p : TpInt4{0, 0, 0, 0};
        v[0] = __int_as_float(w.x), v[1] = __int_as_float(w.y), v[2] = __int_as_float(w.z), v[3] = __int_as_float(w.w);
    };
    float state[kDeltaRows][4], k[4], q[4], decay[4], v[kDeltaRows];
#pragma unroll
    for (int r = 0; r < kDeltaRows; ++r) four((const float*)src[5].data + at_row + r * args.n, state[r]);
    four((const float*)element_at(src[1], {0, k_head, 0, 0}) + begin, k);
    four((const float*)element_at(src[0], {0, q_head, 0, 0}) + begin, q);
    if (g.ne[0] == 1) decay[0] = decay[1] = decay[2] = decay[3] = at(g, 0, head, 0, 0);
    else four((const float*)element_at(g, {0, head, 0, 0}) + begin, decay);
#pragma unroll
    for (int r = 0; r < kDeltaRows; ++r) v[r] = at(src[2], row + r, head, 0, 0);
    const float beta = at(src[4], 0, head, 0, 0);
    for (int i = 0; i < 4; ++i) decay[i] = expf(decay[i]);
    float held[kDeltaRows] = {}, y[kDeltaRows] = {};
#pragma unroll
    for (int r = 0; r < kDeltaRows; ++r)
        for (int i = 0; i < 4; ++i) state[r][i] *= decay[i], held[r] += state[r][i] * k[i];
#pragma unroll
    for (int o = 16; o; o /= 2)
#pragma unroll
        for (int r = 0; r < kDeltaRows; ++r) held[r] += __shfl_xor_sync(0xffffffffu, held[r], o);
#pragma unroll
    for (int r = 0; r < kDeltaRows; ++r) {
        const float delta = (v[r] - held[r]) * beta;
        for (int i = 0; i < 4; ++i) state[r][i] += k[i] * delta, y[r] += state[r][i] * q[i];
    }
#pragma unroll
    for (int o = 16; o; o /= 2)
#pragma unroll
        for (int r = 0; r < kDeltaRows; ++r) y[r] += __shfl_xor_sync(0xffffffffu, y[r], o);
#pragma unroll
    for (int r = 0; r < kDeltaRows; ++r) {
        if (lane == 0) args.y[head * args.rows + row + r] = y[r] * args.scale;
        if (args.snapshots > 0 && inside)
            *(TpInt4*)(args.state + at_row + r * args.n) = {__float_as_int(state[r][0]), __float_as_int(state[r][1]), __float_as_int(state[r][2]),
                                                            __float_as_int(state[r][3])};
    }
}

/// Which of SSM_SCAN's states a sequence has; -1: one that is not there, which is said.
TP_DEVICE i64 state_number(const RecurrentArgs& args, i64 seq) {
    const i64 number = *(const i32*)(args.src[6].data + seq * args.src[6].nb[0]);
    if (number >= 0 && number < args.src[0].ne[3]) return number;
    if (threadIdx.x % 32 == 0) atomicExch(args.fault, (u32)kFaultRowIndex);
    return -1;
}

/// SSM_SCAN's step (recurrent.cu) of one token, where scan_in_fours: rows of all heads' states from `first` on. A group of lanes has kScanRows of them, one
/// behind the other; a lane has four neighbours of each, of rows of more than 128 elements twice four. A warp of groups takes scan_at_once() rows.
TP_DEVICE int scan_width(const RecurrentArgs& args) { return args.n < 128 ? (int)args.n / 4 : 32; }
TP_DEVICE int scan_at_once(const RecurrentArgs& args) { return kScanRows * (32 / scan_width(args)); }
TP_DEVICE void scan_rows(const RecurrentArgs& args, u32 first) {
    constexpr int kFours = (int)kMostStateElems / 128;
    const View *src = args.src, &a = src[3];
    const int width = scan_width(args), lane = threadIdx.x % 32 % width;
    const u32 row_0 = first + threadIdx.x % 32 / (u32)width * kScanRows, heads_of_group = (u32)(args.n_head_global / args.n_group[0]);
    const i64 number = state_number(args, 0);
    if (number < 0) return;
    const float* const from = (const float*)(src[0].data + number * src[0].nb[3]);
    float state[kScanRows][kFours][4] = {}, y[kScanRows] = {};
    auto four = [](const void* p, float(&v)[4]) {
        const TpInt4 w = *(const TpInt4*)p;
        v[0] = __int_as_float(w.x), v[1] = __int_as_float(w.y), v[2] = __int_as_float(w.z), v[3] = __int_as_float(w.w);
    };
    auto inside = [&](int r, int f) { return row_0 + r < (u32)(args.rows * args.n_head) && f * 128 + lane * 4 < args.n; };
    auto at_row = [&](int r, int f) { return (i64)(row_0 + r) * args.n + f * 128 + lane * 4; };
#pragma unroll
    for (int r = 0; r < kScanRows; ++r)
#pragma unroll
        for (int f = 0; f < kFours; ++f)
            if (inside(r, f)) four(from + at_row(r, f), state[r][f]);
#pragma unroll
    for (int r = 0; r < kScanRows; ++r) {
        if (!inside(r, 0)) continue;
        const u32 head = (row_0 + r) / (u32)args.rows, row = row_0 + r - head * (u32)args.rows;
        const i64 group = ((u32)args.head_begin + head) / heads_of_group - args.group_begin[0];
        const float delta = softplus(at(src[2], head, 0, 0, 0)), push = at(src[1], row, head, 0, 0) * delta;
        const float of_head = a.ne[0] == 1 ? expf(delta * at(a, 0, head, 0, 0)) : 0;
#pragma unroll
        for (int f = 0; f < kFours; ++f) {
            if (!inside(r, f)) continue;
            float decay[4] = {of_head, of_head, of_head, of_head}, b[4], c[4];
            four(element_at(src[4], {f * 128 + lane * 4, group, 0, 0}), b);
            four(element_at(src[5], {f * 128 + lane * 4, group, 0, 0}), c);
            if (a.ne[0] != 1) {
                four(element_at(a, {f * 128 + lane * 4, (i64)head, 0, 0}), decay);
                for (int e = 0; e < 4; ++e) decay[e] = expf(delta * decay[e]);
            }
            for (int e = 0; e < 4; ++e) state[r][f][e] = state[r][f][e] * decay[e] + b[e] * push, y[r] += state[r][f][e] * c[e];
        }
    }
#pragma unroll 1
    for (int o = width / 2; o; o /= 2)
#pragma unroll
        for (int r = 0; r < kScanRows; ++r) y[r] += __shfl_xor_sync(0xffffffffu, y[r], o);
#pragma unroll
    for (int r = 0; r < kScanRows; ++r)
#pragma unroll
        for (int f = 0; f < kFours; ++f) {
            if (!inside(r, f)) continue;
            if (f == 0 && lane == 0) args.y[row_0 + r] = y[r];
            const float(&v)[4] = state[r][f];
            *(TpInt4*)(args.state + at_row(r, f)) = {__float_as_int(v[0]), __float_as_int(v[1]), __float_as_int(v[2]), __float_as_int(v[3])};
        }
}

/// Element (channel, token, sequence) of a window of x [n_tokens + d_conv - 1, channels, n_seqs] by w [d_conv, channels].
TP_DEVICE float windowed(const View& x, const View& w, const Index& to) {
    float sum = 0;
    for (i64 tap = 0; tap < w.ne[0]; ++tap) sum += at(x, to.i1 + tap, to.i0, to.i2, 0) * at(w, tap, to.i0, 0, 0);
    return sum;
}

}  // namespace ggml_tp
