// Layers with a state instead of a cache. A state is a matrix per head and sequence whose rows do not see each other: a warp takes a row
// through all tokens with its n elements in registers, lane l those at l, l + 32, ... grid: (rows, heads, sequences).
#include "activation.h"
#include "index.h"
#include "state_row.h"

namespace ggml_tp {
namespace {

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

/// The walk over tokens. load(i) and store(i, where) know how a state row lies in memory; step(t, state) returns the lane's part of y.
template <class Load, class Place, class Step>
TP_DEVICE void walk(const RecurrentArgs& args, Load load, Place place, Step step) {
    const i64 row = blockIdx.x, head = blockIdx.y, seq = blockIdx.z;
    Lanes state = {};
    for_lanes(args.n, [&](int j, i64 i) { state.v[j] = load(i); });
    for (i64 t = 0; t < args.n_tokens; ++t) {
        const float y = tp_warp_sum(step(t, state));
        if (threadIdx.x == 0) args.y[((seq * args.n_tokens + t) * args.n_head_global + head) * args.rows + row] = y;
        const i64 slot = args.n_tokens - 1 - t;
        if (slot >= args.snapshots) continue;
        float* to = args.state + ((slot * args.n_seqs + seq) * args.n_head_global + head) * args.rows * args.n;
        for_lanes(args.n, [&](int j, i64 i) { to[place(i)] = state.v[j]; });
    }
}
/// The same where all sequences' tokens are one axis and a sequence's state is packed, [n * n * n_head, n_seqs]: step(token, state).
template <class Place, class Step>
TP_DEVICE void walk_packed(const RecurrentArgs& args, const View& states, Place place, Step step) {
    const i64 head = blockIdx.y, seq = blockIdx.z;
    const float* from = (const float*)(states.data + seq * states.nb[1]) + head * args.n * args.n;
    walk(args, [&](i64 i) { return from[place(i)]; }, place, [&](i64 t, Lanes& state) { return step(seq * args.n_tokens + t, state); });
}

}  // namespace
}  // namespace ggml_tp

using namespace ggml_tp;

// src: state [d_state, dim, n_head, ...], x [dim, n_head, n_tokens, n_seqs], dt [n_head, n_tokens, n_seqs], A [d_state or 1, n_head],
// B and C [d_state, n_group, n_tokens, n_seqs], the states' numbers [n_seqs].
TP_KERNEL(ssm_scan, RecurrentArgs, 32) {
    const View *src = args.src, &x = src[1], &dt = src[2], &a = src[3], &b = src[4], &c = src[5];
    const i64 row = blockIdx.x, head = blockIdx.y, seq = blockIdx.z,
              group = (args.head_begin + head) / (args.n_head_global / args.n_group[0]) - args.group_begin[0];
    const i64 number = state_number(args, seq);
    if (number < 0) return;
    walk(
        args, [&](i64 i) { return at(src[0], i, row, head, number); }, [&](i64 i) { return row * args.n + i; },
        [&](i64 t, Lanes& state) {
            const float delta = softplus(at(dt, head, t, seq, 0)), push = at(x, row, head, t, seq) * delta;
            float y = 0;
            for_lanes(args.n, [&](int j, i64 i) {
                const float decay = expf(delta * at(a, a.ne[0] == 1 ? 0 : i, head, 0, 0));
                state.v[j] = state.v[j] * decay + at(b, i, group, t, seq) * push;
                y += state.v[j] * at(c, i, group, t, seq);
            });
            return y;
        });
}

// src: q, k [n, heads that repeat, n_tokens, sequences that repeat], v [n, n_head, n_tokens, n_seqs], g [1 or n, ...], beta [1, ...],
// state [n, n, n_head, n_seqs].
TP_KERNEL(gated_delta_net, RecurrentArgs, 32) {
    const View *src = args.src, &q = src[0], &k = src[1], &v = src[2], &g = src[3];
    const i64 row = blockIdx.x, head = blockIdx.y, seq = blockIdx.z;
    const i64 q_head = (args.head_begin + head) % args.n_group[0] - args.group_begin[0],
              k_head = (args.head_begin + head) % args.n_group[1] - args.group_begin[1];
    const i64 q_seq = seq / (v.ne[3] / q.ne[3]), k_seq = seq / (v.ne[3] / k.ne[3]);
    // The state of a sequence is packed, whatever the shape that it comes in.
    const float* from = (const float*)(src[5].data + seq * src[5].nb[3]) + (head * args.n + row) * args.n;
    walk(
        args, [&](i64 i) { return from[i]; }, [&](i64 i) { return row * args.n + i; },
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

// The three below: [n, n_head, all tokens], states [n * n * n_head, n_seqs].
// src: k, v, q, g, state. A row here is a column in memory.
TP_KERNEL(gated_linear_attn, RecurrentArgs, 32) {
    const View* src = args.src;
    const i64 row = blockIdx.x, head = blockIdx.y;
    walk_packed(
        args, src[4], [&](i64 i) { return i * args.n + row; },
        [&](i64 token, Lanes& state) {
            const float v = at(src[1], row, head, token, 0);
            float y = 0;
            for_lanes(args.n, [&](int j, i64 i) {
                state.v[j] = state.v[j] * at(src[3], i, head, token, 0) + at(src[0], i, head, token, 0) * v;
                y += state.v[j] * at(src[2], i, head, token, 0);
            });
            return y * args.scale;
        });
}

// src: k, v, r, what the present token counts [n, n_head], decay, state.
TP_KERNEL(rwkv_wkv6, RecurrentArgs, 32) {
    const View* src = args.src;
    const i64 row = blockIdx.x, head = blockIdx.y;
    walk_packed(
        args, src[5], [&](i64 i) { return i * args.n + row; },
        [&](i64 token, Lanes& state) {
            const float v = at(src[1], row, head, token, 0);
            float y = 0;
            for_lanes(args.n, [&](int j, i64 i) {
                const float kv = at(src[0], i, head, token, 0) * v;
                y += (kv * at(src[3], i, head, 0, 0) + state.v[j]) * at(src[2], i, head, token, 0);
                state.v[j] = state.v[j] * at(src[4], i, head, token, 0) + kv;
            });
            return y;
        });
}

// src: r, w, k, v, a, b, state.
TP_KERNEL(rwkv_wkv7, RecurrentArgs, 32) {
    const View* src = args.src;
    const i64 row = blockIdx.x, head = blockIdx.y;
    walk_packed(
        args, src[6], [&](i64 i) { return row * args.n + i; },
        [&](i64 token, Lanes& state) {
            const float v = at(src[3], row, head, token, 0);
            float held = 0, y = 0;
            for_lanes(args.n, [&](int j, i64 i) { held += at(src[4], i, head, token, 0) * state.v[j]; });
            held = tp_warp_sum(held);
            for_lanes(args.n, [&](int j, i64 i) {
                state.v[j] = state.v[j] * at(src[1], i, head, token, 0) + v * at(src[2], i, head, token, 0) + held * at(src[5], i, head, token, 0);
                y += state.v[j] * at(src[0], i, head, token, 0);
            });
            return y;
        });
}

// y [d_inner, n_tokens, n_seqs] = a window of src[0] [n_tokens + d_conv - 1, d_inner, n_seqs] by src[1] [d_conv, d_inner]. Element by element.
TP_KERNEL(ssm_conv, BinaryArgs, 256) {
    TP_FOR_EACH(i, tp_elems(args.y)) {
        const Index4 to = tp_index(args.y.ne, i);
        *(float*)tp_at(args.y, to) = windowed(args.a, args.b, {to.i[0], to.i[1], to.i[2], 0});
    }
}

// a x = b with a [n, n] lower triangular, b and x = y [columns, n]: a thread a column.
TP_KERNEL(solve_tri, BinaryArgs, 256) {
    const i64 n = args.b.ne[1], columns = args.b.ne[0];
    TP_FOR_EACH(i, columns * args.b.ne[2] * args.b.ne[3]) {
        const i64 column = i % columns, i2 = i / columns % args.b.ne[2], i3 = i / columns / args.b.ne[2];
        for (i64 row = 0; row < n; ++row) {
            float sum = 0;
            for (i64 k = 0; k < row; ++k) sum += at(args.a, k, row, i2, i3) * at(args.y, column, k, i2, i3);
            *(float*)element_at(args.y, {column, row, i2, i3}) = (at(args.b, column, row, i2, i3) - sum) / at(args.a, row, row, i2, i3);
        }
    }
}
