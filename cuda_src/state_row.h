// A row of a state, and a window over tokens: shared by recurrent.cu and stream.cu.
#pragma once
#include "element.h"
#include "recurrent.h"

namespace ggml_tp {

constexpr int kLaneElems = kMostStateElems / 32;

struct Lanes {
    float v[kLaneElems];
};
/// f(j, i) for element i = j * 32 + lane of n.
template <class F>
TP_DEVICE void for_lanes(i64 n, F f) {
#pragma unroll
    for (int j = 0; j < kLaneElems; ++j) {
        const i64 i = j * 32 + (i64)(threadIdx.x % 32);
        if (i < n) f(j, i);
    }
}
TP_DEVICE float at(const View& v, i64 i0, i64 i1, i64 i2, i64 i3) { return *(const float*)element_at(v, {i0, i1, i2, i3}); }

/// The walk of a row over tokens, by a warp. load(i) and store(i, where) know how a state row lies in memory; step(t, state) returns the lane's part of y.
template <class Load, class Place, class Step>
TP_DEVICE void walk(const RecurrentArgs& args, i64 row, i64 head, i64 seq, Load load, Place place, Step step) {
    Lanes state = {};
    for_lanes(args.n, [&](int j, i64 i) { state.v[j] = load(i); });
    for (i64 t = 0; t < args.n_tokens; ++t) {
        const float y = tp_warp_sum(step(t, state));
        if (threadIdx.x % 32 == 0) args.y[((seq * args.n_tokens + t) * args.n_head_global + head) * args.rows + row] = y;
        const i64 slot = args.n_tokens - 1 - t;
        if (slot >= args.snapshots) continue;
        float* to = args.state + ((slot * args.n_seqs + seq) * args.n_head_global + head) * args.rows * args.n;
        for_lanes(args.n, [&](int j, i64 i) { to[place(i)] = state.v[j]; });
    }
}
// src: q, k [n, heads that repeat, n_tokens, sequences that repeat], v [n, n_head, n_tokens, n_seqs], g [1 or n, ...], beta [1, ...],
// state [n, n, n_head, n_seqs].
TP_DEVICE void gated_delta_row(const RecurrentArgs& args, i64 row, i64 head, i64 seq) {
    const View *src = args.src, &q = src[0], &k = src[1], &v = src[2], &g = src[3];
    const i64 q_head = (args.head_begin + head) % args.n_group[0] - args.group_begin[0],
              k_head = (args.head_begin + head) % args.n_group[1] - args.group_begin[1];
    const i64 q_seq = seq / (v.ne[3] / q.ne[3]), k_seq = seq / (v.ne[3] / k.ne[3]);
    // The state of a sequence is packed, whatever the shape that it comes in.
    const float* from = (const float*)(src[5].data + seq * src[5].nb[3]) + (head * args.n + row) * args.n;
    walk(
        args, row, head, seq, [&](i64 i) { return from[i]; }, [&](i64 i) { return row * args.n + i; },
        [&](i64 t, Lanes& state) {
            float held = 0;
            for_lanes(args.n, [&](int j, i64 i) {
                state.v[j] *= expf(at(g, g.ne[0] == 1 ? 0 : i, head, t, seq));
                held += state.v[j] * at(k, i, k_head, t, k_seq);
            });
            const float delta = (at(v, row, head, t, seq) - tp_warp_sum(held)) * at(src[4], 0, head, t, seq);
            float y = 0;
            for_lanes(args.n, [&](int j, i64 i) {
                state.v[j] += at(k, i, k_head, t, k_seq) * delta;
                y += state.v[j] * at(q, i, q_head, t, q_seq);
            });
            return y * args.scale;
        });
}

/// The same of kDeltaRows rows from `row` on; a lane has four neighbours of each.
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

/// Element (channel, token, sequence) of a window of x [n_tokens + d_conv - 1, channels, n_seqs] by w [d_conv, channels].
TP_DEVICE float windowed(const View& x, const View& w, const Index& to) {
    float sum = 0;
    for (i64 tap = 0; tap < w.ne[0]; ++tap) sum += at(x, to.i1 + tap, to.i0, to.i2, 0) * at(w, tap, to.i0, 0, 0);
    return sum;
}

}  // namespace ggml_tp
