// Launch settings of mul_tile.cu.
#pragma once
#include "launch.h"
#include "weight_format.h"

namespace ggml_tp {

constexpr int kTileStep = 64;    // of k: 64 halves of a row are in shared memory at a time
constexpr int kTileStride = 72;  // halves between rows there: 144 bytes, so that ldmatrix meets no bank twice
constexpr int kTileThreads = 256;
constexpr i32 kTileArch = 800;  // mma.m16n8k16; older cards go on with mul_mat, or mul_vec (only_pieces)

/// Types that before tensor cores have nothing but pieces that is not element by element.
constexpr bool only_pieces(i32 type, Arch arch) { return arch.cc < kTileArch && has_pieces(type) && !has_dots(type); }

/// Bytes of two stages of both operands.
constexpr u32 mul_tile_shared(int rows, int columns) { return 2u * (u32)(rows + columns) * kTileStride * 2u; }

/// Whether a product is the kind that mul_tile computes: one repacked matrix, more columns than mul_vec takes, tensor cores.
inline bool mul_tile_can(const MulMatArgs& a, Arch arch) {
    const bool plain = a.w.type == kF16 || a.w.type == kBF16, blocks = has_pieces(a.w.type);
    if (arch.cc < kTileArch || (!plain && !blocks) || !a.w.repacked || a.x.ne[2] * a.x.ne[3] != 1 || a.y.type != kF32 || a.x.type != kF32) return false;
    return blocks || (a.w.row_stride % 16 == 0 && a.w.k % 8 == 0);
}

inline Launch mul_tile_launch(const MulTileArgs& a, Arch) {
    struct Row {
        i32 type;
        const char* kernel;
    };
#define TP_ROW(name, type) {type, "mul_tile_" #name},
    static constexpr Row kRows[] = {TP_TILE_TYPES(TP_ROW)};
#undef TP_ROW
    Launch out;
    constexpr int rows = 128, columns = 128;
    for (const Row& row : kRows)
        if (row.type == a.w.type) out.kernel = row.kernel;
    const i64 y = (a.m + columns - 1) / columns;
    if (y > 65535) return {};
    out.grid[0] = (u32)((a.w.n + rows - 1) / rows);
    out.grid[1] = (u32)y;
    out.block[0] = kTileThreads;
    out.shared_bytes = mul_tile_shared(rows, columns);
    return out;
}

}  // namespace ggml_tp
