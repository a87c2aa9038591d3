// Rows of a state for one token, and a window over tokens: of stream.cu and recurrent.cu.
#pragma once
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

/// Element (channel, token, sequence) of a window of x [n_tokens + d_conv - 1, channels, n_seqs] by w [d_conv, channels].
TP_DEVICE float windowed(const View& x, const View& w, const Index& to) {
    float sum = 0;
    for (i64 tap = 0; tap < w.ne[0]; ++tap) sum += at(x, to.i1 + tap, to.i0, to.i2, 0) * at(w, tap, to.i0, 0, 0);
    return sum;
}

}  // namespace ggml_tp
