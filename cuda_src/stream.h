// The persistent decode kernel of sm_90 and later (stream.cu): its shape, and which products fit it. Host side and device side.
#pragma once
#include "flash_attn.h"
#include "launch.h"
#include "weight_format.h"

namespace ggml_tp {

constexpr int kStreamPieces = 2;                          // of a tile, that arrive one by one
constexpr i32 kStreamArch = 900;                          // bulk copies and mbarriers
constexpr int kStreamThreads = 32 * (kStreamWarps + 2);   // and a warp that streams weights, a warp that stores results
constexpr int kStreamMostRows = 32;                       // of a tile: a lane of the storing warp each
constexpr int kStreamQueryBytes = kFlashHeads * 256 * 2;  // an attention's queries as halves, in front of where its warps meet
constexpr int kStreamInputBytes = kStreamMostK * 5 / 4;   // int8, and {scale, scale * sum} per 32
constexpr int kStreamMostElems = 128;                     // of the input, that a lane keeps in registers
constexpr int kStreamMostSums = 64;                       // of a tile of experts: rows times slots
constexpr u32 kStreamShared = kStreamSlots * kStreamSlotBytes + kStreamInputBytes + 3 * kStreamStageBytes + 2944;
static_assert(kStreamShared <= 227 * 1024, "what a block of sm_90 may have");

/// Whether the kernel has this type's pieces.
constexpr bool stream_can_type(i32 type) { return type == kQ4_0 || type == kQ8_0 || type == kQ4_K || type == kQ6_K; }

/// Weights that a lane takes at a time (vec_piece.h, Unit).
constexpr int stream_unit(i32 type) { return type == kQ4_K ? 64 : 32; }

/// Elements of a product's input.
inline i32 stream_input(const StreamProduct& p) { return p.role == kExpertsSum ? p.k * p.slots : p.k; }

/// Fills in the tiles of a product of which parts, n_parts, type, k, glu, slots and role are set. False: it does not fit the ring, or its rows do
/// not begin at multiples of 16 bytes.
inline bool stream_fit(StreamProduct& p) {
    const WeightFormat* format = find_weight_format(p.type);
    if (!format || !stream_can_type(p.type) || p.k % format->block_elems || stream_input(p) > kStreamMostK) return false;
    p.n_planes = format->n_fields;
    for (int f = 0; f < p.n_planes; ++f) p.row_bytes[f] = p.k / format->block_elems * format->field[f].bytes;
    const bool sums = p.role == kExpertsSum;
    const i32 least = p.glu ? 2 : 1, copies = sums ? p.slots : 1;  // of a row in a tile
    p.rows = kStreamMostRows;
    auto fits = [&] {
        i32 at = 0;
        for (int f = 0; f < p.n_planes; ++f) {
            p.slot_offset[f] = at;
            at = (at + p.rows * copies * p.row_bytes[f] + 15) / 16 * 16;
        }
        return at <= kStreamSlotBytes && p.rows * copies <= (sums ? kStreamMostSums : kStreamMostRows);
    };
    while (p.rows >= least && !fits()) p.rows /= 2;
    if (p.rows < least) return false;
    const i32 unit = stream_unit(p.type), units = p.k / unit;
    if (sums) {
        for (p.lanes = 8; p.lanes < 32 && p.lanes < units;) p.lanes *= 2;
        p.k_groups = p.units_each = 1;
    } else {
        // As few groups along k as there are rows for all warps, and as a lane's registers allow: sums within a warp are cheapest.
        auto units_each = [&] { return (units + 32 * p.k_groups - 1) / (32 * p.k_groups); };
        p.k_groups = p.rows < kStreamWarps ? kStreamWarps / p.rows : 1;
        while (p.k_groups < kStreamWarps && units_each() * unit > kStreamMostElems) p.k_groups *= 2;
        const i32 each = units_each();
        p.units_each = each <= 1 ? 1 : each <= 2 ? 2 : 4;
        if (each * unit > kStreamMostElems) return false;
    }
    // Every copy is of whole 16 bytes from a multiple of 16: also the last tile's.
    const i32 step = p.glu ? p.rows / 2 : p.rows;
    i32 piece_rows = step > kStreamPieces ? step / kStreamPieces : 1;
    auto aligned = [&] {
        for (int f = 0; f < p.n_planes; ++f)
            if (piece_rows * p.row_bytes[f] % 16) return false;
        return true;
    };
    while (piece_rows < step && !aligned()) piece_rows *= 2;
    for (p.piece_shift = 0; 1 << p.piece_shift < piece_rows;) ++p.piece_shift;
    p.n_tiles = 0;
    for (int i = 0; i < 3; ++i) p.first_tile[i] = 0;
    for (int i = 0; i < p.n_parts; ++i) {
        const i64 n = p.part[i].n;
        for (int f = 0; f < p.n_planes; ++f) {
            if ((u64)p.part[i].plane[f] % 16 || step * p.row_bytes[f] % 16 || n % step * p.row_bytes[f] % 16) return false;
            if (p.role && n * p.row_bytes[f] % 16) return false;  // where the next expert begins
        }
        if (p.glu && i > 0) continue;
        p.n_tiles += (i32)((n + step - 1) / step) * (p.role == kExpertsEach ? p.slots : 1);
        for (int after = i + 1; after < 3; ++after) p.first_tile[after] = p.n_tiles;
    }
    return true;
}

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
