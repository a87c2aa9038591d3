// MUL_MAT of many columns on sm_90a: warpgroup products (wgmma) of tiles in shared memory. One warpgroup brings the tiles, stage after
// stage of a ring: columns of x, which lie in memory as the tiles that wgmma reads (half_panels), as bulk copies; weights through its
// registers, several steps of loads ahead, as strips expanded to halves. Two warpgroups multiply, 64 rows of w each. While they do (1024
// cycles a step of 128 x 256, 512 of 128 x 128), expanding the next step's weights costs about 200 instructions a warp of the first: it is
// hidden, and weights are never anywhere as halves but here.
// grid: (m / kColumns, n / 128 of all matrices, pieces of k), of experts (n / 128, tiles); block: 512, for 256 columns 384; the ring dynamic.
#include "mul_wgmma.h"

#include "tile_piece.h"

#if TP_WGMMA

namespace ggml_tp {

/// Rows [row0, row0 + 128) of a matrix times the columns, in steps [begin, end) of k. xh: the activations as panels; row_bytes: between rows of y.
template <int kType, int kColumns, class Columns>
TP_DEVICE void mul_wgmma(const Matrix& w, i64 matrix, i64 row0, const char* xh, i64 row_bytes, const Columns& columns, u32 begin, u32 end) {
    constexpr int kStages = wide_stages(kColumns), kProducers = wide_producers(kColumns), kAhead = 2 / kProducers;
    constexpr int kStrips = kWideRows * 2 / 128;  // of a thread and step
    constexpr u32 kPanel = panel_columns_bytes(kColumns), kWBytes = kWideRows * 128, kStageBytes = wide_stage_bytes(kColumns);
    TP_DYN_SHARED(char, dynamic);
    __shared__ TpBarrier full[kStages], empty[kStages];
    char* const ring = tp_align_tile(dynamic);
    const int thread = threadIdx.x, lane = thread % 32, group = thread / 128;
    const u32 steps = (u32)((w.k + kTileStep - 1) / kTileStep);
    if (thread == 0) {
        for (int s = 0; s < kStages; ++s) {
            tp_barrier_init(&full[s], 1 + 4);  // whoever announces the bytes of x, the warps that store w
            tp_barrier_init(&empty[s], 8);     // the warps that multiply
        }
        tp_barrier_init_fence();
    }
    __syncthreads();
    if (group >= 2) {
        const int panels = columns.panels(kColumns), t = thread % 128;
        const char *plane[kStrips][4], *x = xh + columns.panel() * (i64)steps * kPanel;
        for (int s = 0; s < kStrips; ++s) {
            const i64 row = row0 + s * 64 + t / 2 < w.n ? row0 + s * 64 + t / 2 : w.n - 1;
            for (int f = 0; f < 4; ++f) plane[s][f] = w.plane[f] + matrix * w.nb2[f] + row * w.row_stride[f];
        }
        const int first = group - 2;  // of several, each takes every so many steps
        Strip<kType> strip[kAhead][kStrips];
#pragma unroll
        for (int i = 0; i < kAhead; ++i)
#pragma unroll
            for (int s = 0; s < kStrips; ++s) load_strip<kType>(strip[i][s], plane[s], begin + (u32)(first + i * kProducers), t % 2, w.k);
        int stage = first, phase = 1;  // a barrier's phase before the first counts as ended
        for (u32 step0 = begin + (u32)first; step0 < end; step0 += kAhead * kProducers) {
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
                const u32 step = step0 + (u32)(i * kProducers);
                if (step >= end) break;
                tp_barrier_wait(&empty[stage], phase);
                char *const w_tile = ring + (u32)stage * kStageBytes, *const x_tile = w_tile + kWBytes;
                if (t == 0) {
                    tp_barrier_expect(&full[stage], (u32)panels * kPanel);
                    tp_bulk_load(x_tile, x + (i64)step * kPanel, kPanel, &full[stage]);
                    if (kColumns > kPanelRows && panels > 1)
                        tp_bulk_load(x_tile + kPanelBytes, x + ((i64)steps + step) * kPanelBytes, kPanelBytes, &full[stage]);
                }
#pragma unroll
                for (int s = 0; s < kStrips; ++s) {
                    const int row = s * 64 + t / 2;
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
                        u32 halves[8];
                        strip[i][s].run(step, t % 2, r, halves);
                        const int chunk = Strip<kType>::place(t % 2, r) / 8;
                        char* const to = w_tile + row * 128;
                        *(TpInt4*)(to + (chunk ^ row % 8) * 16) = {(int)halves[0], (int)halves[1], (int)halves[2], (int)halves[3]};
                        *(TpInt4*)(to + ((chunk + 1) ^ row % 8) * 16) = {(int)halves[4], (int)halves[5], (int)halves[6], (int)halves[7]};
                    }
                }
                // It waits for loads too, so the next ones begin behind it: they have a step's time.
                tp_wgmma_stored();
                __syncwarp();
                if (lane == 0) tp_barrier_arrive(&full[stage]);
#pragma unroll
                for (int s = 0; s < kStrips; ++s) load_strip<kType>(strip[i][s], plane[s], step + kAhead * kProducers, t % 2, w.k);  // beyond the end: zeros
                stage += kProducers;
                if (stage >= kStages) stage -= kStages, phase ^= 1;
            }
        }
        return;
    }
    float acc[kColumns / 2];
    for (int i = 0; i < kColumns / 2; ++i) acc[i] = 0.0f;
    int stage = 0, phase = 0, before = 0;
    for (u32 step = begin; step < end; ++step) {
        tp_barrier_wait(&full[stage], phase);
        const char *const x_tile = ring + (u32)stage * kStageBytes + kWBytes, *const w_tile = ring + (u32)stage * kStageBytes + group * 8192;
        tp_wgmma_fence();
#pragma unroll
        for (int k = 0; k < kTileStep; k += 16) tp_wgmma<kColumns, kType == kBF16>(acc, tp_wgmma_tile(w_tile + k * 2), tp_wgmma_tile(x_tile + k * 2));
        tp_wgmma_commit();
        tp_wgmma_wait<1>();  // the step before: its stage is free
        if (step > begin && lane == 0) tp_barrier_arrive(&empty[before]);
        before = stage;
        if (++stage == kStages) stage = 0, phase ^= 1;
    }
    tp_wgmma_wait<0>();
    const i64 row = row0 + thread / 32 * 16 + lane / 4;
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const i64 column = j * 8 + lane % 4 * 2 + e;
            if (!columns.has(column)) continue;
            char* const y = columns.y(row, column);
            if (row < w.n) *(float*)y = acc[j * 4 + e] * kUnhalved<kType>;
            if (row + 8 < w.n) *(float*)(y + 8 * row_bytes) = acc[j * 4 + 2 + e] * kUnhalved<kType>;
        }
}

/// Tiles of rows are counted through the matrices.
template <int kType, int kColumns>
TP_DEVICE void mul_wgmma_columns(const MulPiecesArgs& args) {
    const MulWideArgs& a = args.wide;
    u32 tile = blockIdx.y, part = 0;
    i64 rows_before = 0;
    while (part + 1 < (u32)a.n_parts) {
        const u32 tiles = (u32)((a.part[part].w.n + kWideRows - 1) / kWideRows);
        if (tile < tiles) break;
        tile -= tiles;
        rows_before += a.part[part++].w.n;
    }
    View y = a.part[part].y;
    if (args.n_pieces > 1) {
        y.data = (char*)(args.sums + (i64)blockIdx.z * a.m * args.n_rows + rows_before);
        y.nb[0] = 4, y.nb[1] = args.n_rows * 4;
    }
    const u32 steps = (u32)((a.k + kTileStep - 1) / kTileStep), begin = blockIdx.z * (u32)args.chunks * 2, end = begin + (u32)args.chunks * 2;
    mul_wgmma<kType, kColumns>(a.part[part].w, 0, (i64)tile * kWideRows, a.xh, y.nb[0], TileColumns{y, a.m, (i64)blockIdx.x * kColumns}, begin,
                               end < steps ? end : steps);
}

/// The grid is for the worst case: blocks without a tile leave.
template <int kType, int kColumns>
TP_DEVICE void mul_wgmma_entries(const MulTileIdArgs& a) {
    if ((i32)blockIdx.y >= *a.n_tiles) return;
    const ExpertTile& tile = a.tiles[blockIdx.y];
    mul_wgmma<kType, kColumns>(a.w, tile.expert, (i64)blockIdx.x * kWideRows, a.xh, a.y.nb[0],
                               TileEntries{a, a.entries + tile.first, tile.count, (i64)blockIdx.y}, 0, (u32)((a.w.k + kTileStep - 1) / kTileStep));
}

}  // namespace ggml_tp

#define MUL_WGMMA_OF(name, type, columns) \
    TP_KERNEL(mul_wgmma_##name##_##columns, MulPiecesArgs, ggml_tp::wide_threads(columns)) { ggml_tp::mul_wgmma_columns<type, columns>(args); }
#define MUL_WGMMA_ID_OF(name, type, columns) \
    TP_KERNEL(mul_wgmma_id_##name##_##columns, MulTileIdArgs, ggml_tp::wide_threads(columns)) { ggml_tp::mul_wgmma_entries<type, columns>(args); }
#define MUL_WGMMA(name, type)       \
    MUL_WGMMA_OF(name, type, 128)   \
    MUL_WGMMA_OF(name, type, 256)   \
    MUL_WGMMA_ID_OF(name, type, 64) \
    MUL_WGMMA_ID_OF(name, type, 128)

MUL_WGMMA(q4_0, ggml_tp::kQ4_0)
MUL_WGMMA(q8_0, ggml_tp::kQ8_0)
MUL_WGMMA(q4_K, ggml_tp::kQ4_K)
MUL_WGMMA(q6_K, ggml_tp::kQ6_K)
MUL_WGMMA(f16, ggml_tp::kF16)
MUL_WGMMA(bf16, ggml_tp::kBF16)

#endif
