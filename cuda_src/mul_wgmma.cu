// MUL_MAT of many columns on sm_90a: warpgroup products (wgmma) of tiles in shared memory. One warpgroup brings the tiles, stage after
// stage of a ring: columns of x, which lie in memory as the tiles that wgmma reads (half_panels), as bulk copies; weights through its
// registers, several steps of loads ahead, as strips expanded to halves. Two warpgroups multiply, 64 rows of w each. While they do (1024
// cycles a step of 128 x 256, 512 of 128 x 128), expanding the next step's weights costs about 200 instructions a warp of the first: it is
// hidden, and weights are never anywhere as halves but here.
// grid: (m / kColumns, n / 128 of all matrices, pieces of k), of experts a block a multiprocessor; block: 512, for 256 columns 384; the ring dynamic.
#include "mul_wgmma.h"

#include "tile_piece.h"

#if TP_WGMMA

namespace ggml_tp {

/// One tile of y: rows [row0, row0 + 128) of a matrix times some columns, in steps [begin, end) of k.
template <class Columns>
struct WideItem {
    i64 matrix, row0;
    Columns columns;
};
/// Steps of weights that a thread has on their way. Where each tile has weights of its own (experts), what registers hold; of Q4_K the
/// four that share scales.
template <int kType, int kColumns, bool kOneItem>
constexpr int wide_ahead() {
    if (kOneItem) return 2 / wide_producers(kColumns);
    return sizeof(Strip<kType>) <= 32 ? 4 : sizeof(Strip<kType>) <= 40 ? 2 : 1;
}

/// Items [0, n_items) of tiles, one after the other: the ring goes on from one to the next, so that the next one's weights are on their way while
/// this one's sums are stored. items(i) is the i-th. xh: the activations as panels; row_bytes: between rows of y.
template <int kType, int kColumns, bool kOneItem, class Items>
TP_DEVICE void mul_wgmma(const Matrix& w, const char* xh, i64 row_bytes, u32 n_items, u32 begin, u32 end, const Items& items) {
    constexpr int kStages = wide_stages(kColumns), kProducers = wide_producers(kColumns), kAhead = wide_ahead<kType, kColumns, kOneItem>();
    constexpr int kStrips = kWideRows * 2 / 128;  // of a thread and step
    static_assert(kType != kQ4_K || kOneItem || kAhead == 4, "load_next_strip: a turn is 256 weights");
    constexpr u32 kPanel = panel_columns_bytes(kColumns), kWBytes = kWideRows * 128, kStageBytes = wide_stage_bytes(kColumns);
    TP_DYN_SHARED(char, dynamic);
    __shared__ TpBarrier full_barriers[kStages], empty_barriers[kStages];
    const TpBarrierAt full(full_barriers), empty(empty_barriers);
    char* const ring = tp_align_tile(dynamic);
    const int thread = threadIdx.x, lane = thread % 32, group = thread / 128;
    const u32 steps = (u32)((w.k + kTileStep - 1) / kTileStep);
    if (thread == 0) {
        for (int s = 0; s < kStages; ++s) {
            tp_barrier_init(full + s, 1 + 4);  // whoever announces the bytes of x, the warps that store w
            tp_barrier_init(empty + s, 8);     // the warps that multiply
        }
        tp_barrier_init_fence();
    }
    __syncthreads();
    if (group >= 2) {
        const int t = thread % 128;
        const char* plane[kStrips][4];
        auto weights_of = [&](u32 item) {
            const auto at = items(item);
            for (int s = 0; s < kStrips; ++s) {
                const i64 row = at.row0 + s * 64 + t / 2 < w.n ? at.row0 + s * 64 + t / 2 : w.n - 1;
                for (int f = 0; f < 4; ++f) plane[s][f] = w.plane[f] + at.matrix * w.nb2 + row * w.row_stride;
            }
        };
        const char* x;
        int panels;
        auto columns_of = [&](u32 item) {
            const auto at = items(item);
            panels = at.columns.panels(kColumns);
            x = xh + at.columns.panel() * (i64)steps * kPanel;
        };
        // Where loads are, and where what has come is stored: of several producers, each takes every so many turns of all items' steps. A turn is as
        // many steps as are on their way; of one item, one step, whose place is free for the next load as soon as it is stored.
        constexpr u32 kTurn = kOneItem ? 1 : kAhead;
        struct Place {
            u32 item, step;
        };
        const Place first = {0, begin + (u32)(group - 2) * kTurn};
        Place loads = first, stores = first;
        auto settle = [&](Place& place, auto&& enter) {
            if constexpr (!kOneItem) {
                if (place.step < end) return;
                while (place.step >= end) place.step -= end - begin, ++place.item;
                if (place.item < n_items) enter(place.item);
            }
        };
        auto done = [&](const Place& place) { return kOneItem ? place.step >= end : place.item >= n_items; };
        weights_of(0);
        columns_of(0);
        settle(loads, weights_of);
        settle(stores, columns_of);
        Strip<kType> strip[kAhead][kStrips];
        auto steps_on = [](int i) { return (u32)i % kTurn + 1 < kTurn ? 1 : 1 + (u32)(kProducers - 1) * kTurn; };  // from the i-th of a turn
        auto load = [&](int i) {
            if (kOneItem || !done(loads)) {  // one item's: beyond the end of k, zeros
#pragma unroll
                for (int s = 0; s < kStrips; ++s) {
                    if (kOneItem || i == 0) load_strip<kType>(strip[i][s], plane[s], loads.step, t % 2, w.k);
                    else load_next_strip<kType>(strip[i][s], plane[s], loads.step, t % 2, w.k);
                }
            }
            loads.step += steps_on(i);
            settle(loads, weights_of);
        };
#pragma unroll
        for (int i = 0; i < kAhead; ++i) load(i);
        int stage = (group - 2) * (int)kTurn, phase = 1;  // a barrier's phase before the first counts as ended
        while (!done(stores)) {
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
                if (done(stores)) break;
                const u32 step = stores.step;
                tp_barrier_wait(empty + stage, phase);
                char *const w_tile = ring + (u32)stage * kStageBytes, *const x_tile = w_tile + kWBytes;
                if (t == 0) {
                    tp_barrier_expect(full + stage, (u32)panels * kPanel);
                    tp_bulk_load(x_tile, x + (i64)step * kPanel, kPanel, full + stage);
                    if (kColumns > kPanelRows && panels > 1)
                        tp_bulk_load(x_tile + kPanelBytes, x + ((i64)steps + step) * kPanelBytes, kPanelBytes, full + stage);
                }
#pragma unroll
                for (int s = 0; s < kStrips; ++s) {
                    const int row = s * 64 + t / 2;
#pragma unroll
                    for (int first_run = 0; first_run < 2; ++first_run) {
                        const int r = Strip<kType>::kCrossed ? first_run ^ t % 2 : first_run;
                        u32 halves[8];
                        run_strip<kType>(strip[i][s], strip[kOneItem ? i : 0][s], step, t % 2, r, halves);
                        const int chunk = Strip<kType>::place(t % 2, r) / 8;
                        char* const to = w_tile + row * 128;
                        *(TpInt4*)(to + (chunk ^ row % 8) * 16) = {(int)halves[0], (int)halves[1], (int)halves[2], (int)halves[3]};
                        *(TpInt4*)(to + ((chunk + 1) ^ row % 8) * 16) = {(int)halves[4], (int)halves[5], (int)halves[6], (int)halves[7]};
                    }
                }
                // It waits for loads too, so the next ones begin behind it: they have a step's time.
                tp_async_fence();
                __syncwarp();
                if (lane == 0) tp_barrier_arrive(full + stage);
                if (kOneItem) load(i);
                stores.step += steps_on(i);
                settle(stores, columns_of);
                stage += (int)steps_on(i);
                if (stage >= kStages) stage -= kStages, phase ^= 1;
            }
            if (!kOneItem) {
#pragma unroll
                for (int i = 0; i < kAhead; ++i) load(i);
            }
        }
        return;
    }
    const u64 w_first = tp_wgmma_tile(ring + group * 8192), x_first = tp_wgmma_tile(ring + kWBytes);
    int stage = 0, phase = 0, before = 0;
    for (u32 item = 0; item < n_items; ++item) {
        float acc[kColumns / 2];
        for (int i = 0; i < kColumns / 2; ++i) acc[i] = 0.0f;
        for (u32 step = begin; step < end; ++step) {
            tp_barrier_wait(full + stage, phase);
            const u32 at = (u32)stage * kStageBytes;
            tp_wgmma_fence();
#pragma unroll
            for (int k = 0; k < kTileStep; k += 16)
                tp_wgmma<kColumns, kType == kBF16>(acc, tp_wgmma_behind(w_first, at + k * 2), tp_wgmma_behind(x_first, at + k * 2));
            tp_wgmma_commit();
            tp_wgmma_wait<1>();  // the step before: its stage is free
            if (step > begin && lane == 0) tp_barrier_arrive(empty + before);
            before = stage;
            if (++stage == kStages) stage = 0, phase ^= 1;
        }
        tp_wgmma_wait<0>();
        if (!kOneItem && lane == 0) tp_barrier_arrive(empty + before);
        const auto at = items(item);
        const i64 row = at.row0 + thread / 32 * 16 + lane / 4;
#pragma unroll
        for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const i64 column = j * 8 + lane % 4 * 2 + e;
                if (!at.columns.has(column)) continue;
                char* const y = at.columns.y(row, column);
                if (row < w.n) *(float*)y = acc[j * 4 + e] * kUnhalved<kType>;
                if (row + 8 < w.n) *(float*)(y + 8 * row_bytes) = acc[j * 4 + 2 + e] * kUnhalved<kType>;
            }
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
    auto item = [&](u32) { return WideItem<TileColumns>{0, (i64)tile * kWideRows, {y, a.m, (i64)blockIdx.x * kColumns}}; };
    mul_wgmma<kType, kColumns, true>(a.part[part].w, a.xh, y.nb[0], 1, begin, end < steps ? end : steps, item);
}

/// Tiles of all experts in turn among the blocks; those that share columns are neighbours: x is read from memory once.
template <int kType, int kColumns>
TP_DEVICE void mul_wgmma_entries(const MulTileIdArgs& a) {
    const u32 rows = (u32)((a.w.n + kWideRows - 1) / kWideRows), n = (u32)*a.n_tiles * rows;
    if (blockIdx.x >= n) return;
    auto item = [&](u32 i) {
        const u32 at = blockIdx.x + i * gridDim.x, number = at / rows;
        const ExpertTile& tile = a.tiles[number];
        return WideItem<TileEntries>{tile.expert, (i64)(at - number * rows) * kWideRows, {a, a.entries + tile.first, tile.count, (i64)number}};
    };
    mul_wgmma<kType, kColumns, false>(a.w, a.xh, a.y.nb[0], (n - blockIdx.x + gridDim.x - 1) / gridDim.x, 0, (u32)((a.w.k + kTileStep - 1) / kTileStep), item);
}

}  // namespace ggml_tp

#define MUL_WGMMA_OF(name, type, columns) \
    TP_KERNEL(mul_wgmma_##name##_##columns, MulPiecesArgs, ggml_tp::wide_threads(columns)) { ggml_tp::mul_wgmma_columns<ggml_tp::type, columns>(args); }
#define MUL_WGMMA_ID_OF(name, type, columns) \
    TP_KERNEL(mul_wgmma_id_##name##_##columns, MulTileIdArgs, ggml_tp::wide_threads(columns)) { ggml_tp::mul_wgmma_entries<ggml_tp::type, columns>(args); }
#define MUL_WGMMA(name, type)       \
    MUL_WGMMA_OF(name, type, 128)   \
    MUL_WGMMA_OF(name, type, 256)   \
    MUL_WGMMA_ID_OF(name, type, 64) \
    MUL_WGMMA_ID_OF(name, type, 128)

TP_TILE_TYPES(MUL_WGMMA)

#endif
