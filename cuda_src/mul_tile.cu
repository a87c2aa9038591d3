// MUL_MAT of many columns (prefill): tensor cores on halves. A block computes kRows x kColumns of y in steps of 64 along k: while eight
// warps multiply one stage of shared memory, the next step's weights are on their way to registers, from where they are expanded to
// halves into the other stage. One barrier a step. Sums are f32. grid: (n / kRows, m / kColumns), block: 256, two stages dynamic.
// Weights are rounded to halves once (11 bits of at most 8 significant), activations too: nearer to the exact product than int8.
#include "mul_tile.h"

#include "tile_piece.h"

#if TP_ARCH >= 800

namespace ggml_tp {

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
    const i64 row0 = (i64)blockIdx.x * kRows;
    const u32 steps = (u32)((a.k + kTileStep - 1) / kTileStep);
    constexpr int kMostStrips = kStrips > 0 ? kStrips : 1;
    Strip<kType> strip[kMostStrips];
    TpInt4 words[kWords];
    const char* x[kWords];  // null beyond the last column
#pragma unroll
    for (int s = 0; s < kWords; ++s) {
        const i64 column = (s * kTileThreads + thread) / 8;
        x[s] = columns.has(column) ? a.xh + columns.x_row(column) * a.k * 2 : nullptr;
    }
    auto fetch = [&](u32 step) {
#pragma unroll
        for (int s = 0; s < kMostStrips; ++s) {
            const int i = s * kTileThreads + thread;
            if (kHalfThreads && i >= kRows * 2) break;
            const i64 row = row0 + i / 2 < a.w.n ? row0 + i / 2 : a.w.n - 1;
            const char* plane[4];
            for (int f = 0; f < 4; ++f) plane[f] = a.w.plane[f] + matrix * a.w.nb2 + row * a.w.row_stride;
            load_strip<kType>(strip[s], plane, step, i % 2, a.k);
        }
#pragma unroll
        for (int s = 0; s < kWords; ++s) {
            const int i = s * kTileThreads + thread;
            const u32 at = step * kTileStep + (u32)(i % 8 * 8);
            words[s] = x[s] && at < a.k ? *(const TpInt4*)(x[s] + at * 2) : TpInt4{0, 0, 0, 0};
        }
    };
    auto keep = [&](u32 step) {
        const int stage = (int)(step % 2);
#pragma unroll
        for (int s = 0; s < kMostStrips; ++s) {
            const int i = s * kTileThreads + thread;
            if (kHalfThreads && i >= kRows * 2) break;
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                u32 halves[8];
                strip[s].run(step, i % 2, r, halves);
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
    for (u32 step = 0; step < steps; ++step) {
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
        if (step + 1 < steps) keep(step + 1);
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < kM; ++i)
#pragma unroll
        for (int j = 0; j < kN; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const i64 row = row0 + warp_row + i * 16 + lane / 4 + e / 2 * 8, column = warp_column + j * 8 + lane % 4 * 2 + e % 2;
                if (row < a.w.n && columns.has(column)) *(float*)columns.y(row, column) = acc[i][j][e] * kUnhalved<kType>;
            }
}

template <int kType, int kRows, int kColumns>
TP_DEVICE void mul_tile_columns(const MulTileArgs& a) {
    mul_tile<kType, kRows, kColumns>(a, 0, TileColumns{a.y, a.m, (i64)blockIdx.y * kColumns});
}
/// The grid is for the worst case: blocks without a tile leave.
template <int kType, int kRows, int kColumns>
TP_DEVICE void mul_tile_entries(const MulTileIdArgs& a) {
    if ((i32)blockIdx.y >= *a.n_tiles) return;
    const ExpertTile& tile = a.tiles[blockIdx.y];
    mul_tile<kType, kRows, kColumns>(a, tile.expert, TileEntries{a, a.entries + tile.first, tile.count});
}

}  // namespace ggml_tp

#define MUL_TILE(name, type)                                                                                        \
    TP_KERNEL(mul_tile_##name, MulTileArgs, 256) { ggml_tp::mul_tile_columns<ggml_tp::type, 128, 128>(args); }      \
    TP_KERNEL(mul_tile_id_##name, MulTileIdArgs, 256) { ggml_tp::mul_tile_entries<ggml_tp::type, 128, 128>(args); } \
    TP_KERNEL(mul_tile_id_##name##_small, MulTileIdArgs, 256) { ggml_tp::mul_tile_entries<ggml_tp::type, 64, 64>(args); }

TP_TILE_TYPES(MUL_TILE)

#endif
