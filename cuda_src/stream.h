// The persistent decode kernel of sm_90 and later (stream.cu): its shape, and which products fit it. Host side and device side.
#pragma once
#include "elementwise.h"
#include "flash_attn.h"
#include "launch.h"
#include "weight_format.h"

namespace ggml_tp {

constexpr int kStreamPieces = 2;                                // of a tile, that arrive one by one
constexpr i32 kStreamArch = 900;                                // bulk copies and mbarriers
constexpr int kStreamThreads = 32 * (kStreamWarps + 2);         // and a warp that streams weights, a warp that stores results
constexpr int kStreamMostRows = 32;                             // of a tile: a lane of the storing warp each
constexpr int kStreamQueryBytes = (kFlashHeads + 2) * 256 * 2;  // an attention's queries, own key and value as halves, in front of where its warps meet
constexpr int kStreamInputBytes = kStreamMostK * 5 / 4;         // int8, and {scale, scale * sum} per 32
constexpr int kStreamMostElems = 128;                           // of the input, that a lane keeps in registers
constexpr int kStreamMostSums = 64;                             // of a tile of experts: rows times slots
constexpr u32 kStreamShared = kStreamSlots * kStreamSlotBytes + kStreamInputBytes + 3 * kStreamStageBytes + 2944;
static_assert(kStreamShared <= 227 * 1024, "what a block of sm_90 may have");

constexpr int kStreamLatentHeads = 16;   // of a unit of latent attention: the rows of a product of tensor cores
constexpr int kStreamLatentCells = 32;   // of a step of it
constexpr i64 kStreamLatentWhole = 256;  // cells up to which it is one piece: a combination is a stage more, and 256 are what hosts begin with

/// Whether the kernel has this type's pieces.
constexpr bool stream_can_type(i32 type) { return has_pieces(type); }

/// Weights that a lane takes at a time (vec_piece.h, Unit).
constexpr int stream_unit(i32 type) { return type == kQ4_K || type == kQ5_K || type == kQ3_K ? 64 : 32; }

constexpr int kStreamStep = 8 * 32 * kStreamWarps;  // elements of an input that a block takes at once: eight neighbours a thread
/// Elements of an input that each of so many blocks writes for others; a thread may have eight of them at most.
inline i32 stream_share(i64 k, i64 blocks) { return (i32)(((k + blocks - 1) / blocks + 7) / 8 * 8); }

constexpr i64 kStreamLongRow = 512;  // elements; norms of such rows are a block's, of shorter ones a warp's
/// Whether a tile has rows of several slots, each multiplied by an input of its own.
constexpr bool stream_by_slots(const StreamProduct& p) { return p.role == kExpertsSum || p.role == kHeads; }
/// Elements of a product's input.
inline i32 stream_input(const StreamProduct& p) { return p.k * (p.role == kExpertsSum ? p.slots : p.role == kHeads ? p.slots * p.slot_groups : 1); }

/// Of a tile, that arrive one by one.
constexpr i32 stream_tile_pieces(const StreamProduct& p) {
    return stream_by_slots(p) || 1 << p.piece_shift >= (p.glu ? p.rows / 2 : p.rows) ? 1 : kStreamPieces;
}

// Pieces on their way to a multiprocessor, of half a slot. More would queue the activations' loads and the results' stores behind them: 55 KB of the
// stage that is multiplied, where bandwidth counts; 18 KB ahead of it, while stages hand over (docs/decisions.md).
constexpr int kStreamInFlight = 3, kStreamInFlightEarly = 1;
// Of experts, which nobody knows early, as many whole tiles as this has bytes, or two (Qwen3-30B-A3B, tiles of 18 KB: three 520, 520 tokens/s, four 522, 522,
// of 36 KB two 510, 509, three 513, 511; gpt-oss, 24 KB: two 626, 642, four 636, 630).
constexpr i64 kStreamExpertsInFlight = 65536;
// What a tile costs the warp that streams: cycles for each of its pieces and for each copy, and cycles in which the memory brings a KB to a multiprocessor,
// all of them at it (one H200: gates and ups of Q6_K, four planes, took 2,066 cycles a tile of 27 KB in two pieces, its output product 1,822, its down
// product 1,736 of 23 KB; a copy alone takes 58; docs/decisions.md).
constexpr int kStreamPieceCycles = 590, kStreamCopyCycles = 55, kStreamCyclesPerKB = 60;
/// Slots of the ring: where a product's type has a grid, the grids have the last one. (From the L1, 16 rows of 4,096 in IQ2_XS took 2,889 cycles; 2,045.)
inline i32 stream_slots(bool grids) { return kStreamSlots - (grids ? 1 : 0); }
/// Pieces at most that are on their way: not all of the ring, whose barriers' phases would come round.
constexpr i32 stream_most_in_flight(i32 slots) { return (slots - 1) * kStreamPieces; }
/// Pieces that should be, of so many bytes each, `of` of which always come together.
inline i32 stream_in_flight(i64 piece_bytes, i64 of) {
    const i64 all = kStreamInFlight * kStreamSlotBytes / kStreamPieces / (piece_bytes > 0 ? piece_bytes : 1);
    const i64 least = (kStreamInFlight + of - 1) / of * of, n = all / of * of;
    return (i32)(n < least ? least : n);
}

/// Fills in the tiles of a product of which parts, n_parts, type, k, row_bytes, plane_at, glu, slots and role are set, for so many blocks. False: it does not fit the
/// ring, or its copies would not begin at multiples of 16 bytes.
inline bool stream_fit(StreamProduct& p, i64 blocks) {
    const WeightFormat* format = find_weight_format(p.type);
    if (!format || !stream_can_type(p.type) || p.k % format->block_elems || stream_input(p) > kStreamMostK) return false;
    const bool sums = stream_by_slots(p);
    const i32 least = p.glu ? 2 : 1, copies = sums ? p.slots : 1;  // of a row in a tile
    p.rows = kStreamMostRows;
    auto fits = [&] { return p.rows * copies * p.row_bytes <= kStreamSlotBytes && p.rows * copies <= (sums ? kStreamMostSums : kStreamMostRows); };
    while (p.rows >= least && !fits()) p.rows /= 2;
    if (p.rows < least) return false;
    // Half the rows, where that takes the fullest block less: its warps go over a tile twice as many rows at a time as they are, and a tile costs half as
    // much as going over it once (1B: the output product's 64 tiles became 128 for 132 blocks).
    i64 all_rows = 0;
    for (int i = 0; i < p.n_parts; ++i) all_rows += p.part[i].n;
    auto cost = [&](i64 rows) { return ((all_rows + rows - 1) / rows + blocks - 1) / blocks * (2 * ((rows + 2 * kStreamWarps - 1) / (2 * kStreamWarps)) + 1); };
    if (!p.role && p.rows > 2 * kStreamWarps && cost(p.rows / 2) < cost(p.rows)) p.rows /= 2;
    if (p.role == kExpertsEach && p.rows > 2 * kStreamWarps) p.rows /= 2;  // whoever has just been chosen is there sooner
    const i32 unit = stream_unit(p.type), units = p.k / unit;
    if (sums) {
        for (p.lanes = 8; p.lanes < 32 && p.lanes < units;) p.lanes *= 2;
        for (p.k_shift = 0; p.slots << (p.k_shift + 1) <= 32 * kStreamWarps / p.lanes && 2 << p.k_shift <= p.rows;) ++p.k_shift;
        p.units_each = (units + p.lanes - 1) / p.lanes;
    } else {
        // As few groups along k as give every warp two rows, which it multiplies at once anyway, and as a lane's registers allow: sums within a warp are
        // cheapest.
        auto units_each = [&] { return (units + (32 << p.k_shift) - 1) >> p.k_shift >> 5; };
        p.k_shift = 0;
        while (1 << p.k_shift < kStreamWarps && (p.rows << p.k_shift < 2 * kStreamWarps || units_each() * unit > kStreamMostElems)) ++p.k_shift;
        const i32 each = units_each();
        p.units_each = each < 1 ? 1 : each;
        if (each * unit > kStreamMostElems) return false;
    }
    const i32 step = p.glu ? p.rows / 2 : p.rows;
    i32 piece_rows = step > kStreamPieces ? step / kStreamPieces : 1;
    const i64 tile_bytes = (i64)p.rows * copies * p.row_bytes;
    // One piece, where two would keep the streaming warp longer than the memory.
    const int n_copies = p.glu ? 2 : 1;
    if (kStreamPieces * (kStreamPieceCycles + n_copies * kStreamCopyCycles) > tile_bytes * kStreamCyclesPerKB / 1024) piece_rows = step;
    for (p.piece_shift = 0; 1 << p.piece_shift < piece_rows;) ++p.piece_shift;
    const i32 pieces = stream_tile_pieces(p);
    const i64 of_experts = kStreamExpertsInFlight / tile_bytes;
    p.in_flight = p.role ? (i32)(of_experts < 2 ? 2 : of_experts) * kStreamPieces : stream_in_flight(tile_bytes / kStreamPieces, kStreamPieces / pieces);
    p.in_flight_early = kStreamInFlightEarly * kStreamPieces / pieces;
    p.n_tiles = 0;
    for (int i = 0; i < 3; ++i) p.first_tile[i] = 0;
    for (int i = 0; i < p.n_parts; ++i) {
        const i64 n = p.part[i].n;
        if ((u64)p.part[i].w % 16 || p.row_bytes % 16) return false;
        if (p.glu && i > 0) continue;
        p.n_tiles += (i32)((n + step - 1) / step) * (p.role == kExpertsEach ? p.slots : p.role == kHeads ? p.slot_groups : 1);
        for (int after = i + 1; after < 3; ++after) p.first_tile[after] = p.n_tiles;
    }
    return true;
}

// Cells of a cache beyond which they come through the ring (one H100, tokens/s with it, without): 8B, Q4_0 at 768 cells 478, 462, at 1,280 460, 442, at 4,352
// 423, 395; but where heads are normed, 32 of them in every block: Qwen3-30B-A3B at 1,280 365, 378, at 2,304 346, 370, at 4,352 340, 342, at 16,640
// 303, 243.
constexpr i64 kStreamedCells = 512, kStreamedCellsNormed = 4096;
constexpr int kStreamedStep = 32 * kColumnsStep;  // cells that a warp's look at masks covers

/// For divisions of small numbers (stream.cu, divided).
constexpr u32 stream_inverse(i64 of) { return of > 0 ? (u32)((65536 + of - 1) / of) : 0; }
/// Bytes in front of where an attention's queries, and later its warps, meet: its own token's K and V rows.
constexpr i64 stream_own_bytes(i64 kv_heads, i64 d) { return 2 * kv_heads * d * 2; }
/// What a combination of n pieces needs: 32 elements and two counts of each, and the sums of the warps.
constexpr i64 stream_combine_bytes(i64 n) { return n * (32 + 2) * 4 + kStreamWarps * 33 * 4; }
/// How many heads of F32 have room behind those rows and the queries, and behind three other rows, with a float each; at most all.
constexpr int stream_head_batch(i64 kv_heads, i64 query_heads, i64 d) {
    const i64 all = query_heads + 2 * kv_heads, room = (kStreamInputBytes - stream_own_bytes(kv_heads, d) - query_heads * d * 2 - all * 4) / (d * 4) - 3;
    return (int)(room < all ? room : all);
}
/// Whether an attention's cells can come through the ring: fills in f.cells and the pieces of f.args. What f.own has is whole already. Where a
/// unit has all heads of a cell, rows lie side by side and several are one copy: a copy takes 140 cycles, however small (one H100: rows of 1 KB came at
/// 1.8 TB/s; two and four lanes that meet in a bank cost less). Else so that the lanes of a quarter of a warp, which read together, find different banks.
inline bool stream_cells_fit(StreamFlash& f, i64 blocks) {
    FlashSplitArgs& args = f.args;
    const FlashAttnArgs& a = args.a;
    const i64 d = a.q.ne[0], heads = a.k.ne[2], cells = a.k.ne[1];
    auto rows = [&](const View& v) { return (u64)v.data % 16 == 0 && (heads <= 1 || v.nb[2] == d * 2) && v.nb[1] >= heads * d * 2; };
    if (cells % kColumnsStep || cells > 1 << 30 || !rows(a.k) || !rows(a.v) || (a.has_mask && (u64)a.mask.data % 16)) return false;
    StreamCells c{};
    c.k = a.k.data, c.v = a.v.data, c.mask = a.has_mask ? a.mask.data : nullptr;
    c.k_row = a.k.nb[1], c.v_row = a.v.nb[1];
    c.n_cells = (i32)cells, c.n_heads = (i32)heads, c.head_bytes = (i32)(d * 2);
    for (i64 most = kStreamWarps / args.head_groups; most > 0; --most) {
        const i64 units = (heads + most - 1) / most, each = units > 0 ? (heads + units - 1) / units : 1, row = each * d * 2;
        auto stride = [row, units](i64 from, i64 rest) {
            if (units == 1 && from == row) return (i32)row;
            const i64 apart = row + (rest - row % 128 + 128) % 128;
            return (i32)(apart == from ? apart + 128 : apart);  // as it lies in memory would mean that several rows are one copy
        };
        c.unit_heads = (i32)each, c.n_units = (i32)units, c.k_stride = stride(c.k_row, 64), c.v_stride = stride(c.v_row, 16);
        const i64 sets = each * args.head_groups, tallest = c.k_stride > c.v_stride ? c.k_stride : c.v_stride;
        for (c.groups = 1; c.groups * 2 * sets <= kStreamWarps && c.groups * 2 * kColumnsStep * tallest <= kStreamSlotBytes;) c.groups *= 2;
        const i64 merged = stream_own_bytes(each, d) + sets * (c.groups / 2) * column_fold_floats(d <= 64 ? 64 : d <= 128 ? 128 : 256) * 4;
        if (c.groups * kColumnsStep * tallest > kStreamSlotBytes || merged > kStreamInputBytes) continue;
        if (stream_own_bytes(each, d) + each * a.gqa_ratio * d * 2 > kStreamInputBytes || units * blocks > 1 << 16) continue;
        const i64 query_heads = each * a.gqa_ratio, all_heads = query_heads + 2 * each;
        if (f.own.table && stream_head_batch(each, query_heads, d) < (all_heads < kStreamWarps ? all_heads : kStreamWarps)) continue;
        const i64 tile = c.groups * kColumnsStep, tiles = (cells + tile - 1) / tile;
        i64 splits = units > 0 ? blocks / units : 1;
        splits = splits < 1 ? 1 : splits > tiles ? tiles : splits;
        c.split_cells = (i32)((cells + splits - 1) / splits + kColumnsStep - 1) / kColumnsStep * kColumnsStep;
        c.n_splits = (i32)((cells + c.split_cells - 1) / c.split_cells);
        if (stream_combine_bytes(c.n_splits) > kStreamInputBytes) continue;
        c.most_in_flight = stream_in_flight(c.groups * kColumnsStep / kStreamPieces * row, 1);
        c.units_inverse = stream_inverse(units), c.sets_inverse = stream_inverse(sets), c.head_groups_inverse = stream_inverse(args.head_groups);
        args.cells = c.split_cells, args.n_splits = c.n_splits;
        f.cells = c;
        return true;
    }
    return false;
}

/// How the cells of a latent attention come through the ring, in pieces of so many steps of kStreamLatentCells: fills in f.cells and the pieces of f.args. False:
/// they cannot. A tile is 16 rows in one slot, four and four one behind the other, which most caches have so: then each four are one copy, and lanes that read of
/// different fours find different banks. (A copy for each row: a step of 32 cells took 4,800 cycles.)
inline bool stream_latent_fit(StreamFlash& f, i64 most_splits) {
    const FlashAttnArgs& a = f.args.a;
    const i64 cells = a.k.ne[1], row = a.q.ne[0] * 2, units = (a.q.ne[2] + kStreamLatentHeads - 1) / kStreamLatentHeads;
    const i64 steps = (cells + kStreamLatentCells - 1) / kStreamLatentCells, most = most_splits < steps ? most_splits : steps, splits = most < 1 ? 1 : most;
    StreamCells c{};
    c.k = a.k.data, c.mask = a.has_mask ? a.mask.data : nullptr;
    c.k_row = a.k.nb[1], c.n_cells = (i32)cells, c.n_heads = c.unit_heads = 1, c.head_bytes = (i32)row, c.n_units = (i32)units;
    c.groups = 1, c.k_stride = (i32)(4 * row + (32 - 4 * row % 128 + 128) % 128);
    c.split_cells = (i32)((steps + splits - 1) / splits * kStreamLatentCells);
    c.n_splits = (i32)((cells + c.split_cells - 1) / c.split_cells);
    c.most_in_flight = stream_in_flight(kColumnsStep / kStreamPieces * row, kStreamPieces), c.units_inverse = stream_inverse(units);
    if (row % 64 || cells <= 0 || cells % kColumnsStep || cells > 1 << 30 || (u64)a.k.data % 16 || (u64)c.mask % 16 || c.k_row % 16 ||
        c.k_stride * kColumnsStep / 4 > kStreamSlotBytes || units * units * c.n_splits >= 1 << 16 || stream_combine_bytes(c.n_splits) > kStreamInputBytes)
        return false;
    f.args.cells = c.split_cells, f.args.n_splits = c.n_splits, f.n_units = c.n_units;
    f.cells = c;
    return true;
}

/// What linear attention does with a float of each head, or with z. (All of UnaryOp, six times: 87 KB of code, which comes at five cycles an instruction.)
constexpr bool stream_head_op(UnaryOp op) { return op == UnaryOp::kSilu || op == UnaryOp::kSigmoid || op == UnaryOp::kSoftplus; }

/// blocks: at most one per multiprocessor, fewer where ranks share a device.
inline Launch stream_launch(u32 blocks) {
    Launch out;
    out.kernel = "stream";
    out.grid[0] = blocks;
    out.block[0] = kStreamThreads;
    out.shared_bytes = kStreamShared;
    out.cooperative = true;
    return out;
}

}  // namespace ggml_tp
