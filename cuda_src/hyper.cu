// DeepSeek's sparse-attention indexer and hyper-connections.
#include "dequantize.h"
#include "element.h"
#include "index.h"

using namespace ggml_tp;

// q [n, n_head, n_tokens, ns], k [n, 1, n_kv, ns], weights [n_head, n_tokens, 1, ns], mask F16 [n_kv, n_tokens, 1, ns or a divisor].
// A warp per (cell, token). grid: (n_kv, n_tokens, ns).
TP_KERNEL(indexer, IndexerArgs, 32) {
    const i64 cell = blockIdx.x, token = blockIdx.y, stream = blockIdx.z, n = args.q.ne[0];
    const WeightRow k = tp_weight_row(args.k, 0, cell, stream);
    float score = 0;
    for (i64 head = 0; head < args.q.ne[1]; ++head) {
        float dot = 0;
        for (i64 i = threadIdx.x; i < n; i += 32) dot += load(args.q, {i, head, token, stream}) * tp_weight_elem(args.k.type, k, i);
        score += fmaxf(tp_warp_sum(dot), 0.0f) * load(args.weights, {head, token, 0, stream});
    }
    if (threadIdx.x == 0) store(args.y, {cell, token, 0, stream}, score + load(args.mask, {cell, token, 0, stream % args.mask.ne[3]}));
}

// y[i, token] = scale * sum over h of x[i, h, token] * w, w = residual[h, token], or its sigmoid's argument [i, h, token] (flag).
TP_KERNEL(hyper_pre, HyperArgs, 256) {
    TP_FOR_EACH(i, tp_elems(args.y)) {
        const Index4 to = tp_index(args.y.ne, i);
        float sum = 0;
        for (i64 h = 0; h < args.x.ne[1]; ++h) {
            float w;
            if (args.flag) w = 1.0f / (1.0f + expf(-load(args.residual, {to.i[0], h, to.i[1], 0})));
            else w = load(args.residual, {h, to.i[1], 0, 0});
            sum += load(args.x, {to.i[0], h, to.i[1], 0}) * w;
        }
        *(float*)tp_at(args.y, to) = args.scale * sum;
    }
}

// y[i, to, token] = x[i, token] * post[to, token] + sum over from of residual[i, from, token] * comb[to, from, token]; flag: comb is 1.
TP_KERNEL(hyper_post, HyperArgs, 256) {
    TP_FOR_EACH(i, tp_elems(args.y)) {
        const Index4 to = tp_index(args.y.ne, i);
        float sum = load(args.x, {to.i[0], to.i[2], 0, 0}) * load(args.post, {to.i[1], to.i[2], 0, 0});
        if (args.flag) {
            sum += load(args.residual, {to.i[0], to.i[1], to.i[2], 0});
        } else {
            for (i64 from = 0; from < args.residual.ne[1]; ++from)
                sum += load(args.residual, {to.i[0], from, to.i[2], 0}) * load(args.comb, {to.i[1], from, to.i[2], 0});
        }
        *(float*)tp_at(args.y, to) = sum;
    }
}

// A 4 x 4 matrix per token that is made doubly stochastic: soft max over targets, then columns and rows divided by their sums in turn.
// x: the logits' factors [24, n_tokens], of which the last 16; residual: three scales, of which the last; post: 24 shifts. A thread a token.
TP_KERNEL(hyper_comb, HyperArgs, 256) {
    constexpr int kStreams = 4;
    TP_FOR_EACH(token, args.x.ne[1]) {
        const float scale = load(args.residual, {2, 0, 0, 0});
        float comb[kStreams][kStreams];  // [source][target]
        for (int s = 0; s < kStreams; ++s) {
            float most = -INFINITY, sum = 0;
            for (int t = 0; t < kStreams; ++t) {
                const i64 i = 2 * kStreams + s * kStreams + t;
                comb[s][t] = load(args.x, {i, token, 0, 0}) * scale + load(args.post, {i, 0, 0, 0});
                most = fmaxf(most, comb[s][t]);
            }
            for (int t = 0; t < kStreams; ++t) comb[s][t] = expf(comb[s][t] - most), sum += comb[s][t];
            for (int t = 0; t < kStreams; ++t) comb[s][t] = comb[s][t] / sum + args.eps;
        }
        for (int pass = 0; pass < 2 * args.n_iter - 1; ++pass)
            for (int a = 0; a < kStreams; ++a) {
                const bool columns = pass % 2 == 0;  // a: a target, or a source
                float sum = args.eps;
                for (int b = 0; b < kStreams; ++b) sum += columns ? comb[b][a] : comb[a][b];
                for (int b = 0; b < kStreams; ++b) (columns ? comb[b][a] : comb[a][b]) /= sum;
            }
        for (int s = 0; s < kStreams; ++s)
            for (int t = 0; t < kStreams; ++t) store(args.y, {t, s, token, 0}, comb[s][t]);
    }
}
