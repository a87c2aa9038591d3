// Launch settings of mul_wgmma.cu.
#pragma once
#include "mul_tile_id.h"

namespace ggml_tp {

constexpr int kWideRows = 128;  // of weights a tile: 64 for each of two warpgroups

/// Warpgroups that bring tiles: a step of 128 columns is multiplied in half the time; with 256 the sums leave no registers for a second one.
constexpr int wide_producers(int columns) { return columns <= 128 ? 2 : 1; }
constexpr int wide_threads(int columns) { return 256 + 128 * wide_producers(columns); }
constexpr u32 wide_stage_bytes(int columns) { return (u32)(kWideRows + columns) * 128; }
/// Steps of k in shared memory: what 200 KB hold.
constexpr int wide_stages(int columns) { return (int)((200u << 10) / wide_stage_bytes(columns)); }
/// Tiles begin at multiples of 1024.
constexpr u32 wide_shared(int columns) { return 1024u + (u32)wide_stages(columns) * wide_stage_bytes(columns); }

/// Activations as panels: [m / 128][k / 64], whole ones.
constexpr u32 panel_columns_bytes(int columns) { return (u32)(columns < kPanelRows ? columns : kPanelRows) * 128u; }
constexpr i64 panel_bytes(i64 m, i64 k) { return (m + kPanelRows - 1) / kPanelRows * ((k + kTileStep - 1) / kTileStep) * kPanelBytes; }

/// Whether a product is the kind that mul_wgmma computes: mul_tile's kind, on the one architecture that has wgmma. It wins from
/// the first column that mul_vec leaves (docs/decisions.md).
inline bool mul_wgmma_can(const MulMatArgs& a, Arch arch) { return arch.wgmma && mul_tile_can(a, arch); }

inline i64 row_tiles(const MulWideArgs& a, i64 rows) {
    i64 tiles = 0;
    for (int i = 0; i < a.n_parts; ++i) tiles += (a.part[i].w.n + rows - 1) / rows;
    return tiles;
}
/// Of 128 of k.
inline i64 piece_chunks(i64 k) { return ((k + kTileStep - 1) / kTileStep + 1) / 2; }

/// Divides k in at most `pieces`, at least one, of whole `unit`s of chunks.
inline void divide_pieces(MulPiecesArgs& a, i64 pieces, i64 unit = 1) {
    const i64 chunks = piece_chunks(a.wide.k);
    if (pieces < 1) pieces = 1;
    a.chunks = (i32)(((chunks + pieces - 1) / pieces + unit - 1) / unit * unit);
    a.n_pieces = (i32)((chunks + a.chunks - 1) / a.chunks);
    a.n_rows = 0;
    for (int i = 0; i < a.wide.n_parts; ++i) a.n_rows += a.wide.part[i].w.n;
}
/// One piece: it is divided when what can be joined has been.
inline MulPiecesArgs mul_pieces_args(const MulTileArgs& a, char* sums) {
    MulPiecesArgs out{};
    out.wide.part[0] = {a.w, a.y};
    out.wide.xh = a.xh;
    out.wide.k = a.k;
    out.wide.m = a.m;
    out.wide.n_parts = 1;
    out.sums = (float*)sums;
    divide_pieces(out, 1);
    return out;
}

/// Adds b's products to a's, when both multiply the same activations by weights of one type: tiles of both fill the multiprocessors together.
inline bool mul_pieces_join(MulPiecesArgs& to, const MulPiecesArgs& from) {
    MulWideArgs& a = to.wide;
    const MulWideArgs& b = from.wide;
    if (a.n_parts + b.n_parts > 3 || a.xh != b.xh || a.k != b.k || a.m != b.m || a.part[0].w.type != b.part[0].w.type) return false;
    for (int i = 0; i < b.n_parts; ++i) a.part[a.n_parts++] = b.part[i];
    to.made |= from.made;
    divide_pieces(to, 1);
    return true;
}

inline Launch sum_pieces_launch(const MulPiecesArgs& a, Arch) {
    Launch out;
    out.kernel = "sum_pieces";
    out.grid[0] = (u32)((a.n_rows + 255) / 256);
    out.grid[1] = (u32)a.wide.m;
    out.block[0] = 256;
    return out;
}

/// Time of a product in fifths of a step (64 of k) of a tile of 128 columns, about 0.13 us on an H100. A tile of 256 columns takes 1.2 (Q6_K) to 1.4
/// times (Q4_0) as long as a narrow one, whose multiplying warps wait for weights; a tile begins and ends in 6 steps; sum_pieces is launched in 5,
/// and in one of them memory moves 250,000 sums there and back.
inline i64 wide_cost(const MulPiecesArgs& a, i64 columns, i64 pieces, Arch arch) {
    const i64 tiles = row_tiles(a.wide, kWideRows) * ((a.wide.m + columns - 1) / columns) * pieces,
              steps = 2 * ((piece_chunks(a.wide.k) + pieces - 1) / pieces);
    const i64 waves = arch.n_sm > 0 ? (tiles + arch.n_sm - 1) / arch.n_sm : tiles;
    return waves * (columns == 128 ? 5 : 7) * (steps + 6) + (pieces > 1 ? 5 * (5 + pieces * a.n_rows * a.wide.m / 250000) : 0);
}
inline int wide_columns(const MulPiecesArgs& a, Arch arch) { return wide_cost(a, 256, a.n_pieces, arch) <= wide_cost(a, 128, a.n_pieces, arch) ? 256 : 128; }

constexpr i64 kWideLeastChunks = 4;  // of a piece of k: 512
/// Bytes of `sums`, whatever else is joined to a product: pieces are one wave. None if it has more tiles than leave room for a second piece.
inline i64 wide_sums_bytes(const MulPiecesArgs& a, Arch arch) {
    const bool room = row_tiles(a.wide, kWideRows) * ((a.wide.m + 255) / 256) * 2 <= arch.n_sm && piece_chunks(a.wide.k) >= 2 * kWideLeastChunks;
    return room ? (i64)arch.n_sm * kWideRows * 256 * 4 : 0;
}
/// Divides k where that is sooner done. The division depends on shapes and device alone, so results repeat.
inline void wide_divide(MulPiecesArgs& a, Arch arch) {
    i64 best = 1, least = -1;
    const i64 most = a.sums ? piece_chunks(a.wide.k) / kWideLeastChunks : 1;
    for (i64 columns = 128; columns <= 256; columns += 128) {
        const i64 tiles = row_tiles(a.wide, kWideRows) * ((a.wide.m + columns - 1) / columns);
        for (i64 pieces = 1; pieces == 1 || (pieces <= most && tiles * pieces <= arch.n_sm); ++pieces) {
            const i64 cost = wide_cost(a, columns, pieces, arch);
            if (least < 0 || cost < least) least = cost, best = pieces;
        }
    }
    divide_pieces(a, best);
}

inline Launch mul_wgmma_launch(const MulPiecesArgs& a, Arch arch) {
    struct Row {
        i32 type;
        const char *columns_128, *columns_256;
    };
#define TP_ROW(name, type) {type, "mul_wgmma_" #name "_128", "mul_wgmma_" #name "_256"},
    static constexpr Row kRows[] = {TP_TILE_TYPES(TP_ROW)};
#undef TP_ROW
    Launch out;
    const int columns = wide_columns(a, arch);
    for (const Row& row : kRows)
        if (row.type == a.wide.part[0].w.type) out.kernel = columns == 256 ? row.columns_256 : row.columns_128;
    const i64 rows = row_tiles(a.wide, kWideRows);
    if (rows > 65535 || a.n_pieces > 65535) return {};
    // Tiles of the same weights are neighbours: those are read from memory once, x stays in the L2.
    out.grid[0] = (u32)((a.wide.m + columns - 1) / columns);
    out.grid[1] = (u32)rows;
    out.grid[2] = (u32)a.n_pieces;
    out.block[0] = (u32)wide_threads(columns);
    out.shared_bytes = wide_shared(columns);
    return out;
}

/// Bytes of the panels of as many tiles as entries of experts may need.
constexpr i64 tile_panels_bytes(i64 tiles, i64 columns, i64 k) { return tiles * ((k + kTileStep - 1) / kTileStep) * columns * 128; }

inline Launch mul_wgmma_id_launch(const MulTileIdArgs& a, i32 columns, Arch arch) {
    struct Row {
        i32 type;
        const char *columns_64, *columns_128;
    };
#define TP_ROW(name, type) {type, "mul_wgmma_id_" #name "_64", "mul_wgmma_id_" #name "_128"},
    static constexpr Row kRows[] = {TP_TILE_TYPES(TP_ROW)};
#undef TP_ROW
    Launch out;
    for (const Row& row : kRows)
        if (row.type == a.w.type) out.kernel = columns == 64 ? row.columns_64 : row.columns_128;
    // Blocks that go from tile to tile: how many there are is known on the GPU only.
    const i64 most = (a.w.n + kWideRows - 1) / kWideRows * most_tiles(a.y.ne[1] * a.y.ne[2], a.w.ne2, columns);
    if (most > 0x7fffffff) return {};
    out.grid[0] = (u32)(arch.n_sm > 0 && arch.n_sm < most ? arch.n_sm : most);
    out.block[0] = (u32)wide_threads(columns);
    out.shared_bytes = wide_shared(columns);
    return out;
}

inline Launch halve_entries_launch(const HalveEntriesArgs& a, i64 tiles, bool bf16, Arch) {
    Launch out;
    if (a.x.type != kF32) return out;
    out.kernel = bf16 ? "bf16_entries" : "half_entries";
    out.grid[0] = (u32)tiles;
    out.grid[1] = a.columns > 16 ? (u32)a.columns / 4 : 16;  // of few entries each row has a block (docs/decisions.md)
    out.block[0] = 256;
    return out;
}

/// Activations to panels of halves.
inline Launch halve_panels_launch(const QuantizeArgs& a, bool bf16, Arch) {
    const i64 rows = a.x.ne[1] * a.x.ne[2] * a.x.ne[3];
    Launch out;
    if (a.x.type != kF32 || rows > 65535) return out;
    out.kernel = bf16 ? "bf16_panels" : "half_panels";
    out.grid[0] = (u32)((a.k + 8 * 128 - 1) / (8 * 128));
    out.grid[1] = (u32)rows;
    out.block[0] = 128;
    return out;
}

}  // namespace ggml_tp
