// One pair of elements of a rope, and what a thread of rope_store does: shared by rope.cu and stream.cu.
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
    if (args.has_factors) extrapolated /= load(args.factors, {i, 0, 0, 0});
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

/// Where the two elements of pair `pair` of a row lie, and what becomes of them. table: {cos, sin} of the pair at 2 * its number, where they
/// are known already (and positions are of one kind); else null.
struct Pair {
    Index first, second;
    float a, b;
};
TP_DEVICE Pair rotate(const RopeArgs& args, i64 pair, i64 row, bool neox, const float* table = nullptr) {
    const View& x = args.x;
    Pair p;
    p.first = p.second = row_index((u32)row, x.ne);
    const i64 turning = args.sectioned == kVision ? 2 * args.n_dims : args.n_dims;
    if (2 * pair < args.n_offs || 2 * pair >= args.n_offs + turning) {
        p.first.i0 = 2 * pair;
        p.second.i0 = 2 * pair + 1;
        p.a = load(x, p.first);
        p.b = p.second.i0 < x.ne[0] ? load(x, p.second) : 0.0f;
        return p;
    }
    const i64 turned = pair - args.n_offs / 2;
    p.first.i0 = args.n_offs + (neox ? turned : 2 * turned);
    p.second.i0 = args.n_offs + (neox ? turned + turning / 2 : 2 * turned + 1);
    float cosine, sine;
    if (table) {
        cosine = table[2 * turned], sine = table[2 * turned + 1];
    } else {
        const Angle angle = angle_of(args, turned);
        const i32 pos = *(const i32*)(args.pos.data + (p.first.i2 + angle.row * x.ne[2]) * args.pos.nb[0]);
        rotation(args, (float)pos, turned, angle.power, &cosine, &sine);
    }
    const float a = load(x, p.first), b = load(x, p.second);
    p.a = a * cosine - b * sine;
    p.b = a * sine + b * cosine;
    return p;
}

/// Thread `thread` of block `block` (of 256): one pair of a rope, or one element to be stored.
template <bool kTables>
TP_DEVICE void rope_store_one(const RopeStoreArgs& args, i64 block, int thread, const float* const* tables) {
    for (int r = 0; r < args.n_ropes; ++r) {
        const RopeArgs& rope = args.rope[r];
        const i64 half = rope.x.ne[0] / 2, n = half * rope.x.ne[1] * rope.x.ne[2] * rope.x.ne[3], blocks = (n + 255) / 256;
        if (block >= blocks) {
            block -= blocks;
            continue;
        }
        const i64 i = block * 256 + thread;
        if (i >= n) return;
        const Pair p = rotate(rope, i % half, i / half, rope.neox, kTables ? tables[r] : nullptr);
        store(rope.y, p.first, p.a);
        store(rope.y, p.second, p.b);
        if (args.stored_rope == r) {
            const i64 head = p.first.i1 * rope.y.ne[0];
            set_row_element(args.store[0], head + p.first.i0, p.first.i2, 0, 0, p.a);
            set_row_element(args.store[0], head + p.second.i0, p.first.i2, 0, 0, p.b);
        }
        return;
    }
    for (int s = args.stored_rope >= 0 ? 1 : 0; s < args.n_stores; ++s) {
        const View& x = args.store[s].x;
        const i64 n = x.ne[0] * x.ne[1] * x.ne[2] * x.ne[3], blocks = (n + 255) / 256;
        if (block >= blocks) {
            block -= blocks;
            continue;
        }
        const i64 i = block * 256 + thread;
        if (i >= n) return;
        Index at = row_index((u32)(i / x.ne[0]), x.ne);
        at.i0 = i % x.ne[0];
        set_row_element(args.store[s], at.i0, at.i1, at.i2, at.i3, load(x, at));
        return;
    }
}

}  // namespace ggml_tp
