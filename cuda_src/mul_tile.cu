// MUL_MAT of many columns (prefill): tensor cores on halves. A block computes kRows x kColumns of y in steps of 64 along k: while eight
// warps multiply one stage of shared memory, the next step's weights are on their way to registers, from where they are expanded to
// halves into the other stage. One barrier a step. Sums are f32. grid: (n / kRows, m / kColumns), block: 256, two stages dynamic.
// Weights are rounded to halves once (11 bits of at most 8 significant), activations too: nearer to the exact product than int8.
#include "mul_tile.h"

#include "dequantize.h"

#if TP_ARCH >= 800

namespace ggml_tp {

/// 1024 + q in each half, for q in the low byte of each half of `pairs`.
constexpr u32 kMagic = 0x64006400u, kOne = 0x3c003c00u;
TP_DEVICE u32 half_pair(float a) { return tp_float_to_half(a) * 0x10001u; }
/// Eight words of halves from 16 bytes of unsigned values v < 256: (v - offset) * scale + shift.
TP_DEVICE void expand(const TpInt4& v, float offset, float scale, float shift, u32 (&out)[8]) {
    const u32 words[4] = {(u32)v.x, (u32)v.y, (u32)v.z, (u32)v.w};
    const u32 minus = half_pair(-1024.0f - offset), s = half_pair(scale), t = half_pair(shift);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        // A byte below 0x64 is the half 1024 + byte; the subtraction is exact.
        out[2 * i] = tp_half2_fma(tp_half2_fma(tp_byte_perm(words[i], 0x64646464u, 0x4140), kOne, minus), s, t);
        out[2 * i + 1] = tp_half2_fma(tp_half2_fma(tp_byte_perm(words[i], 0x64646464u, 0x4342), kOne, minus), s, t);
    }
}
TP_DEVICE TpInt4 low(const TpInt4& v, int shift) {
    return {v.x >> shift & 0x0f0f0f0f, v.y >> shift & 0x0f0f0f0f, v.z >> shift & 0x0f0f0f0f, v.w >> shift & 0x0f0f0f0f};
}

/// Half of a row's 64 weights of a step, u = 0 or 1: two runs of 16. load() from the planes, run() gives one as halves, place() where
/// it belongs within the 64. Beyond the end of k (`ok` false) everything is zero.
template <int kType>
struct Strip;

template <>
struct Strip<kQ4_0> {
    TpInt4 q;
    float d;
    TP_MEMBER void load(const char* const* plane, i64 step, int u, bool ok) {
        q = ok ? *(const TpInt4*)(plane[0] + (step * 2 + u) * 16) : TpInt4{0, 0, 0, 0};
        d = ok ? tp_load_half(plane[1] + (step * 2 + u) * 2) : 0.0f;
    }
    TP_MEMBER void run(int r, u32 (&out)[8]) const { expand(low(q, 4 * r), 8.0f, d, 0.0f, out); }
    static TP_MEMBER int place(int u, int r) { return u * 32 + r * 16; }
    static TP_MEMBER i64 end(i64 step, int u) { return step * 64 + u * 32 + 32; }
};
template <>
struct Strip<kQ8_0> {
    TpInt4 q[2];
    float d;
    TP_MEMBER void load(const char* const* plane, i64 step, int u, bool ok) {
        for (int r = 0; r < 2; ++r) q[r] = ok ? *(const TpInt4*)(plane[0] + (step * 2 + u) * 32 + r * 16) : TpInt4{0, 0, 0, 0};
        d = ok ? tp_load_half(plane[1] + (step * 2 + u) * 2) : 0.0f;
    }
    TP_MEMBER void run(int r, u32 (&out)[8]) const {
        const int flip = (int)0x80808080u;  // signed to offset 128
        expand({q[r].x ^ flip, q[r].y ^ flip, q[r].z ^ flip, q[r].w ^ flip}, 128.0f, d, 0.0f, out);
    }
    static TP_MEMBER int place(int u, int r) { return u * 32 + r * 16; }
    static TP_MEMBER i64 end(i64 step, int u) { return step * 64 + u * 32 + 32; }
};
template <>
struct Strip<kQ4_K> {
    TpInt4 q;
    float d[2], m[2];
    TP_MEMBER void load(const char* const* plane, i64 step, int u, bool ok) {
        q = ok ? *(const TpInt4*)(plane[0] + (step * 2 + u) * 16) : TpInt4{0, 0, 0, 0};
        const i64 b = step / 4;
        for (int r = 0; r < 2; ++r) {
            int scale = 0, min = 0;
            if (ok) tp_q4_k_scale(plane[1] + b * 12, (int)(step % 4) * 2 + r, scale, min);
            d[r] = ok ? tp_load_half(plane[2] + b * 4) * (float)scale : 0.0f;
            m[r] = ok ? tp_load_half(plane[2] + b * 4 + 2) * (float)min : 0.0f;
        }
    }
    TP_MEMBER void run(int r, u32 (&out)[8]) const { expand(low(q, 4 * r), 0.0f, d[r], -m[r], out); }
    static TP_MEMBER int place(int u, int r) { return r * 32 + u * 16; }
    static TP_MEMBER i64 end(i64 step, int) { return step * 64 + 64; }
};
// 128 weights share 64 bytes of low nibbles: an even step takes the low ones, an odd step the high ones.
template <>
struct Strip<kQ6_K> {
    TpInt4 q[2];
    float d[2];
    TP_MEMBER void load(const char* const* plane, i64 step, int u, bool ok) {
        const int odd = (int)(step % 2), top = (u + 2 * odd) * 2;
        for (int r = 0; r < 2; ++r) {
            q[r] = {0, 0, 0, 0};
            d[r] = 0;
            if (!ok) continue;
            const TpInt4 l = low(*(const TpInt4*)(plane[0] + step / 2 * 64 + u * 32 + r * 16), 4 * odd);
            const TpInt4 h = *(const TpInt4*)(plane[1] + step / 2 * 32 + r * 16);
            auto six = [&](int a, int b) { return a | (b >> top & 0x03030303) << 4; };
            q[r] = {six(l.x, h.x), six(l.y, h.y), six(l.z, h.z), six(l.w, h.w)};
            d[r] = tp_load_half(plane[3] + step / 4 * 2) * (float)((const s8*)plane[2])[step * 4 + u * 2 + r];
        }
    }
    TP_MEMBER void run(int r, u32 (&out)[8]) const { expand(q[r], 32.0f, d[r], 0.0f, out); }
    static TP_MEMBER int place(int u, int r) { return u * 32 + r * 16; }
    static TP_MEMBER i64 end(i64 step, int) { return step * 64 + 64; }
};
/// F16 and BF16: the words as they are.
struct HalfStrip {
    TpInt4 q[4];
    TP_MEMBER void load_halves(const char* const* plane, i64 step, int u, i64 k) {
        for (int i = 0; i < 4; ++i) {
            const i64 at = step * 64 + u * 32 + i * 8;
            q[i] = at < k ? *(const TpInt4*)(plane[0] + at * 2) : TpInt4{0, 0, 0, 0};
        }
    }
    TP_MEMBER void run(int r, u32 (&out)[8]) const {
        for (int i = 0; i < 2; ++i) {
            const TpInt4& v = q[2 * r + i];
            out[4 * i] = (u32)v.x, out[4 * i + 1] = (u32)v.y, out[4 * i + 2] = (u32)v.z, out[4 * i + 3] = (u32)v.w;
        }
    }
    static TP_MEMBER int place(int u, int r) { return u * 32 + r * 16; }
};
template <>
struct Strip<kF16> : HalfStrip {};
template <>
struct Strip<kBF16> : HalfStrip {};

/// Loads whatever of a strip lies within k.
template <int kType>
TP_DEVICE void load_strip(Strip<kType>& strip, const char* const* plane, i64 step, int u, i64 k) {
    if constexpr (kType == kF16 || kType == kBF16) strip.load_halves(plane, step, u, k);
    else strip.load(plane, step, u, Strip<kType>::end(step, u) <= k);
}

/// Which columns of x a block multiplies, and where its results go.
struct TileColumns {
    const MulTileArgs& a;
    i64 column0 = 0;
    TP_MEMBER bool has(i64 column) const { return column0 + column < a.m; }
    TP_MEMBER i64 x_row(i64 column) const { return column0 + column; }
    TP_MEMBER char* y(i64 row, i64 column) const { return a.y.data + row * a.y.nb[0] + (column0 + column) * a.y.nb[1]; }
};
/// Of one expert: the entries (token * n_used + slot) of one tile of its list.
struct TileEntries {
    const MulTileIdArgs& a;
    const i32* entry;
    i64 count;
    TP_MEMBER bool has(i64 column) const { return column < count; }
    TP_MEMBER i64 x_row(i64 column) const { return a.x_per_slot ? entry[column] : (u32)entry[column] / (u32)a.n_used; }
    TP_MEMBER char* y(i64 row, i64 column) const {
        const u32 token = (u32)entry[column] / (u32)a.n_used, slot = (u32)entry[column] - token * (u32)a.n_used;
        return a.y.data + row * a.y.nb[0] + slot * a.y.nb[1] + token * a.y.nb[2];
    }
};

/// Matrix `matrix` of a.w times the columns.
template <int kType, int kRows, int kColumns, class Args, class Columns>
TP_DEVICE void mul_tile(const Args& a, i64 matrix, const Columns& columns) {
    constexpr int kWarpRows = kRows / 4, kWarpColumns = kColumns / 2;                        // of one of 4 x 2 warps
    constexpr int kM = kWarpRows / 16, kN = kWarpColumns / 8;                                // its mma tiles
    constexpr int kStrips = kRows * 2 / kTileThreads, kWords = kColumns * 8 / kTileThreads;  // what a thread fetches of a step
    constexpr bool kHalfThreads = kRows * 2 < kTileThreads;                                  // not all threads have a strip
    TP_DYN_SHARED(u16, shared);
    u16 *w_stage[2] = {shared, shared + kRows * kTileStride}, *x_stage[2] = {shared + 2 * kRows * kTileStride, shared + (2 * kRows + kColumns) * kTileStride};
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const i64 row0 = (i64)blockIdx.x * kRows, steps = (a.k + kTileStep - 1) / kTileStep;
    constexpr int kMostStrips = kStrips > 0 ? kStrips : 1;
    Strip<kType> strip[kMostStrips];
    TpInt4 words[kWords];
    const char* x[kWords];  // null beyond the last column
#pragma unroll
    for (int s = 0; s < kWords; ++s) {
        const i64 column = (s * kTileThreads + thread) / 8;
        x[s] = columns.has(column) ? a.xh + columns.x_row(column) * a.k * 2 : nullptr;
    }
    auto fetch = [&](i64 step) {
#pragma unroll
        for (int s = 0; s < kMostStrips; ++s) {
            const int i = s * kTileThreads + thread;
            if (kHalfThreads && i >= kRows * 2) break;
            const i64 row = row0 + i / 2 < a.w.n ? row0 + i / 2 : a.w.n - 1;
            const char* plane[4];
            for (int f = 0; f < 4; ++f) plane[f] = a.w.plane[f] + matrix * a.w.nb2[f] + row * a.w.row_stride[f];
            load_strip<kType>(strip[s], plane, step, i % 2, a.k);
        }
#pragma unroll
        for (int s = 0; s < kWords; ++s) {
            const int i = s * kTileThreads + thread;
            const i64 at = step * kTileStep + i % 8 * 8;
            words[s] = x[s] && at < a.k ? *(const TpInt4*)(x[s] + at * 2) : TpInt4{0, 0, 0, 0};
        }
    };
    auto keep = [&](int stage) {
#pragma unroll
        for (int s = 0; s < kMostStrips; ++s) {
            const int i = s * kTileThreads + thread;
            if (kHalfThreads && i >= kRows * 2) break;
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                u32 halves[8];
                strip[s].run(r, halves);
                TpInt4* to = (TpInt4*)(w_stage[stage] + i / 2 * kTileStride + Strip<kType>::place(i % 2, r));
                to[0] = {(int)halves[0], (int)halves[1], (int)halves[2], (int)halves[3]};
                to[1] = {(int)halves[4], (int)halves[5], (int)halves[6], (int)halves[7]};
            }
        }
#pragma unroll
        for (int s = 0; s < kWords; ++s) {
            const int i = s * kTileThreads + thread;
            *(TpInt4*)(x_stage[stage] + i / 8 * kTileStride + i % 8 * 8) = words[s];
        }
    };
    float acc[kM][kN][4] = {};
    const int warp_row = warp % 4 * kWarpRows, warp_column = warp / 4 * kWarpColumns;
    // ldmatrix: lanes 0-7, 8-15, 16-23, 24-31 give the rows of the four matrices of a 16 x 16 piece (w), of 16 columns (x).
    const int w_lane = (lane % 16) * kTileStride + lane / 16 * 8, x_lane = (lane % 8 + lane / 16 * 8) * kTileStride + lane / 8 % 2 * 8;
    fetch(0);
    keep(0);
    __syncthreads();
    for (i64 step = 0; step < steps; ++step) {
        const int stage = (int)(step % 2);
        if (step + 1 < steps) fetch(step + 1);
#pragma unroll
        for (int k = 0; k < kTileStep; k += 16) {
            u32 wf[kM][4];
#pragma unroll
            for (int i = 0; i < kM; ++i) tp_ldmatrix_x4(wf[i], w_stage[stage] + (warp_row + i * 16) * kTileStride + k + w_lane);
#pragma unroll
            for (int j = 0; j < kN; j += 2) {
                u32 xf[4];
                tp_ldmatrix_x4(xf, x_stage[stage] + (warp_column + j * 8) * kTileStride + k + x_lane);
                const u32 first[2] = {xf[0], xf[1]}, second[2] = {xf[2], xf[3]};
#pragma unroll
                for (int i = 0; i < kM; ++i) {
                    if constexpr (kType == kBF16) {
                        tp_mma_bf16(acc[i][j], wf[i], first);
                        tp_mma_bf16(acc[i][j + 1], wf[i], second);
                    } else {
                        tp_mma_f16(acc[i][j], wf[i], first);
                        tp_mma_f16(acc[i][j + 1], wf[i], second);
                    }
                }
            }
        }
        if (step + 1 < steps) keep(stage ^ 1);
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < kM; ++i)
#pragma unroll
        for (int j = 0; j < kN; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const i64 row = row0 + warp_row + i * 16 + lane / 4 + e / 2 * 8, column = warp_column + j * 8 + lane % 4 * 2 + e % 2;
                if (row < a.w.n && columns.has(column)) *(float*)columns.y(row, column) = acc[i][j][e];
            }
}

template <int kType, int kRows, int kColumns>
TP_DEVICE void mul_tile_columns(const MulTileArgs& a) {
    mul_tile<kType, kRows, kColumns>(a, 0, TileColumns{a, (i64)blockIdx.y * kColumns});
}
/// The grid is for the worst case: blocks without a tile leave.
template <int kType, int kRows, int kColumns>
TP_DEVICE void mul_tile_entries(const MulTileIdArgs& a) {
    if ((i32)blockIdx.y >= *a.n_tiles) return;
    const ExpertTile& tile = a.tiles[blockIdx.y];
    mul_tile<kType, kRows, kColumns>(a, tile.expert, TileEntries{a, a.entries + tile.first, tile.count});
}

}  // namespace ggml_tp

#define MUL_TILE(name, type)                                                                                \
    TP_KERNEL(mul_tile_##name, MulTileArgs, 256) { ggml_tp::mul_tile_columns<type, 128, 128>(args); }       \
    TP_KERNEL(mul_tile_##name##_small, MulTileArgs, 256) { ggml_tp::mul_tile_columns<type, 64, 64>(args); } \
    TP_KERNEL(mul_tile_id_##name, MulTileIdArgs, 256) { ggml_tp::mul_tile_entries<type, 128, 128>(args); }  \
    TP_KERNEL(mul_tile_id_##name##_small, MulTileIdArgs, 256) { ggml_tp::mul_tile_entries<type, 64, 64>(args); }

MUL_TILE(q4_0, ggml_tp::kQ4_0)
MUL_TILE(q8_0, ggml_tp::kQ8_0)
MUL_TILE(q4_K, ggml_tp::kQ4_K)
MUL_TILE(q6_K, ggml_tp::kQ6_K)
MUL_TILE(f16, ggml_tp::kF16)
MUL_TILE(bf16, ggml_tp::kBF16)

#endif
