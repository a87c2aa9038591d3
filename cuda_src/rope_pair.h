// Pairs of elements of a rope, and what a thread of rope_store does: shared by rope.cu and stream.cu.
#pragma once
#include "element.h"
#include "rope.h"
#include "set_row.h"

namespace ggml_tp {

/// The dimension that turns `n_rotations` times within the original context.
TP_DEVICE float yarn_corr_dim(const RopeArgs& args, float n_rotations) {
    return (float)args.n_dims * logf((float)args.n_ctx_orig / (n_rotations * 2.0f * 3.14159265358979323846f)) / (2.0f * logf(args.freq_base));
}

/// Where a pair takes its position from, and which power of the base is its frequency.
struct Angle {
    i32 row;  // of positions: time, height, width, extra
    i64 power;
};
TP_DEVICE Angle angle_of(const RopeArgs& args, i64 i) {
    const i32* n = args.sections;
    if (args.sectioned == kNoSections) return {0, i};
    const i32 at = (i32)(i % (n[0] + n[1] + n[2] + n[3]));
    if (args.sectioned == kInterleaved) {  // in turns while a section has pairs left
        const i32 row = at % 3;
        return {at < 3 * n[row] ? row : 3, i};
    }
    i32 row = 0, begin = 0;
    while (row < 3 && at >= begin + n[row]) begin += n[row++];
    return {row, args.sectioned == kVision ? at - begin : i};  // a picture's sections begin anew
}

/// cos and sin (times the magnitude correction) of pair `i` at position `pos`, whose frequency is the base to the `power`.
TP_DEVICE void rotation(const RopeArgs& args, float pos, i64 i, i64 power, float* cosine, float* sine) {
    const float theta_scale = powf(args.freq_base, -2.0f / (float)args.n_dims);
    float extrapolated = pos * powf(theta_scale, (float)power);
    if (args.factors.data) extrapolated /= load(args.factors, {i, 0, 0, 0});
    float theta = args.freq_scale * extrapolated;
    float magnitude = args.attn_factor;
    if (args.ext_factor != 0.0f) {
        const float low = fmaxf(0.0f, floorf(yarn_corr_dim(args, args.beta_fast)));
        const float high = fminf((float)(args.n_dims - 1), ceilf(yarn_corr_dim(args, args.beta_slow)));
        const float ramp = ((float)i - low) / fmaxf(0.001f, high - low);
        const float mix = (1.0f - fminf(1.0f, fmaxf(0.0f, ramp))) * args.ext_factor;
        theta = theta * (1.0f - mix) + extrapolated * mix;
        magnitude *= 1.0f + 0.1f * logf(1.0f / args.freq_scale);
    }
    *cosine = cosf(theta) * magnitude;
    *sine = sinf(theta) * magnitude * args.direction;
}

/// Where the two elements of a pair lie in a head, and how they turn: the same in all heads of a token.
struct Turn {
    i64 first, second;
    bool turns;  // else they pass through
    float cosine = 1.0f, sine = 0.0f;

    TP_MEMBER Turn(const RopeArgs& args, i64 pair, bool neox) : first(2 * pair), second(2 * pair + 1), turns(false) {
        const i64 turning = args.sectioned == kVision ? 2 * args.n_dims : args.n_dims, turned = pair - args.n_offs / 2;
        if (2 * pair < args.n_offs || 2 * pair >= args.n_offs + turning) return;
        turns = true;
        first = args.n_offs + (neox ? turned : 2 * turned);
        second = args.n_offs + (neox ? turned + turning / 2 : 2 * turned + 1);
    }
    /// table: {cos, sin} of the pair at 2 * its number, where they are known already (and positions are of one kind); else null.
    TP_MEMBER void find(const RopeArgs& args, i64 pair, i64 token, const float* table) {
        if (!turns) return;
        const i64 turned = pair - args.n_offs / 2;
        if (table) {
            cosine = table[2 * turned], sine = table[2 * turned + 1];
            return;
        }
        const Angle angle = angle_of(args, turned);
        const i32 pos = *(const i32*)(args.pos.data + (token + angle.row * args.x.ne[2]) * args.pos.nb[0]);
        rotation(args, (float)pos, turned, angle.power, &cosine, &sine);
    }
};

/// What a rope turns, or a store stores, where its view says: element (i0, head, token, 3), i0 being inside.
struct InView {
    const View& x;
    template <int kMost>
    TP_MEMBER void read(const Turn& turn, const Index& at, int left, float (&a)[kMost], float (&b)[kMost]) const {
#pragma unroll
        for (int h = 0; h < kMost; ++h) {
            if (h >= left) break;
            a[h] = load(x, {turn.first, at.i1 + h, at.i2, at.i3});
            b[h] = turn.second < x.ne[0] ? load(x, {turn.second, at.i1 + h, at.i2, at.i3}) : 0.0f;
        }
    }
    template <int kMost>
    TP_MEMBER void keep(const Turn&, const Index&, int, const float (&)[kMost], const float (&)[kMost]) const {}
    TP_MEMBER float element(const Index& at) const { return load(x, at); }
};
/// The same of a product's pieces, heads side by side in its columns, which are tokens. a and b are zero before.
struct InPieces {
    const View& x;
    const Pieces& pieces;
    template <int kMost>
    TP_MEMBER void read(const Turn& turn, const Index& at, int left, float (&a)[kMost], float (&b)[kMost]) const {
        const float* from = pieces.sums + at.i2 * pieces.column + at.i1 * x.ne[0];
#pragma unroll 4
        for (int piece = 0; piece < pieces.n; ++piece, from += pieces.piece)
#pragma unroll
            for (int h = 0; h < kMost; ++h) {
                if (h >= left) break;
                a[h] += from[h * x.ne[0] + turn.first], b[h] += from[h * x.ne[0] + turn.second];
            }
    }
    template <int kMost>
    TP_MEMBER void keep(const Turn& turn, const Index& at, int left, const float (&a)[kMost], const float (&b)[kMost]) const {
        if (!pieces.kept) return;
#pragma unroll
        for (int h = 0; h < kMost; ++h) {
            if (h >= left) break;
            store(x, {turn.first, at.i1 + h, at.i2, 0}, a[h]);
            store(x, {turn.second, at.i1 + h, at.i2, 0}, b[h]);
        }
    }
    TP_MEMBER float element(const Index& at) const {
        float sum = 0;
#pragma unroll 4
        for (int piece = 0; piece < pieces.n; ++piece) sum += pieces.sums[piece * pieces.piece + at.i1 * pieces.column + at.i0];
        if (pieces.kept) store(x, at, sum);
        return sum;
    }
};

/// Pair `pair` of run `run`, which is args.heads heads of a token, at most kMost. All are read before done(first, second, a, b) is told
/// where the elements lie and what becomes of them, head by head. kMost = 1: runs are of one head.
template <int kMost, class From, class Done>
TP_DEVICE void turn_run(const RopeArgs& args, i64 pair, u32 run, bool neox, const float* table, const From& from, const Done& done) {
    const View& x = args.x;
    const i64 heads = kMost == 1 ? 1 : args.heads, ne[4] = {x.ne[0], (x.ne[1] + heads - 1) / heads, x.ne[2], x.ne[3]};
    Index at = row_index(run, ne);
    at.i1 *= heads;
    const int left = (int)(x.ne[1] - at.i1 < heads ? x.ne[1] - at.i1 : heads);
    Turn turn(args, pair, neox);
    float a[kMost] = {}, b[kMost] = {};
    from.template read<kMost>(turn, at, left, a, b);
    turn.find(args, pair, at.i2, table);  // while they are on their way
    from.template keep<kMost>(turn, at, left, a, b);
#pragma unroll
    for (int h = 0; h < kMost; ++h) {
        if (h >= left) break;
        const float first = turn.turns ? a[h] * turn.cosine - b[h] * turn.sine : a[h], second = turn.turns ? a[h] * turn.sine + b[h] * turn.cosine : b[h];
        done(Index{turn.first, at.i1 + h, at.i2, at.i3}, Index{turn.second, at.i1 + h, at.i2, at.i3}, first * args.factor, second * args.factor);
    }
}

/// Where all of it lies where its views say.
struct NoPieces {
    template <class Do>
    TP_MEMBER void of_rope(const RopeArgs& rope, int, const Do& go) const {
        go(InView{rope.x});
    }
    template <class Do>
    TP_MEMBER void of_store(const SetRowsArgs& store, int, const Do& go) const {
        go(InView{store.x});
    }
};
/// Where some may lie in pieces.
struct SomePieces {
    const PiecesRopeArgs& args;
    template <class Do>
    TP_MEMBER void of_rope(const RopeArgs& rope, int i, const Do& go) const {
        if (args.rope[i].n) go(InPieces{rope.x, args.rope[i]});
        else go(InView{rope.x});
    }
    template <class Do>
    TP_MEMBER void of_store(const SetRowsArgs& store, int i, const Do& go) const {
        if (args.store[i].n) go(InPieces{store.x, args.store[i]});
        else go(InView{store.x});
    }
};
/// Thread `thread` of block `block` (of 256): a pair of a run of a rope, or one element to be stored. With tables runs are of one head.
template <bool kTables, class Sources>
TP_DEVICE void rope_store_one(const RopeStoreArgs& args, i64 block, int thread, const float* const* tables, const Sources& sources) {
    u32 left = (u32)block;
    for (int r = 0; r < args.n_ropes; ++r) {
        const RopeArgs& rope = args.rope[r];
        const u32 half = (u32)rope.x.ne[0] / 2, n = half * (u32)(kTables ? n_rows(rope.x) : rope_runs(rope)), blocks = (n + 255) / 256;
        if (left >= blocks) {
            left -= blocks;
            continue;
        }
        const u32 i = left * 256 + (u32)thread;
        if (i >= n) return;
        const u32 run = i / half;
        i64 token = -1, row = -1;
        auto done = [&](const Index& first, const Index& second, float a, float b) {
            store(rope.y, first, a);
            store(rope.y, second, b);
            if (args.stored_rope != r) return;
            if (token < 0) token = first.i2, row = target_row(args.store[0], token, 0, 0);  // once for all heads
            if (row < 0) return;
            const i64 head = first.i1 * rope.y.ne[0];
            store(args.store[0].y, {head + first.i0, row, 0, 0}, a);
            store(args.store[0].y, {head + second.i0, row, 0, 0}, b);
        };
        sources.of_rope(rope, r, [&](const auto& from) {
            turn_run<kTables ? 1 : kRopeHeads>(rope, i - run * half, run, rope.neox, kTables ? tables[r] : nullptr, from, done);
        });
        return;
    }
    for (int s = args.stored_rope >= 0 ? 1 : 0; s < args.n_stores; ++s) {
        const View& x = args.store[s].x;
        const u32 n = (u32)(x.ne[0] * x.ne[1] * x.ne[2] * x.ne[3]), blocks = (n + 255) / 256;
        if (left >= blocks) {
            left -= blocks;
            continue;
        }
        const u32 i = left * 256 + (u32)thread;
        if (i >= n) return;
        const u32 row = i / (u32)x.ne[0];
        Index at = row_index(row, x.ne);
        at.i0 = i - row * (u32)x.ne[0];
        sources.of_store(args.store[s], s, [&](const auto& from) { set_row_element(args.store[s], at.i0, at.i1, at.i2, at.i3, from.element(at)); });
        return;
    }
}

}  // namespace ggml_tp
