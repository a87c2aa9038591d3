// Normalisation of rows: which kernel and grid.
#pragma once
#include "rows_grid.h"

namespace ggml_tp {

inline constexpr u32 kNormThreads = 256;

namespace detail {
inline Launch norm_launch_of(const char* kernel, const NormArgs& args) {
    Launch l;
    const i64 rows = n_rows(args.x);
    if (!is_float_type(args.x.type) || !is_float_type(args.y.type) || !same_shape(args.x, args.y)) return l;
    if (args.x.ne[0] <= 0 || rows <= 0 || rows > 0x7fffffff) return l;
    if (args.has_weight) {
        if (!is_float_type(args.weight.type) || args.weight.ne[0] != args.x.ne[0]) return l;
        for (int i = 1; i < 4; i++)
            if (args.weight.ne[i] <= 0 || args.x.ne[i] % args.weight.ne[i] != 0) return l;
    }
    l.kernel = kernel;
    l.grid[0] = (u32)rows;
    // Short rows (head_dim norms) get one warp: the block reduction is then a single shuffle tree.
    l.block[0] = args.x.ne[0] <= 256 ? 32 : kNormThreads;
    return l;
}
}  // namespace detail

/// y = x / sqrt(mean(x^2) + eps) [* weight]
inline Launch rms_norm_launch(const NormArgs& args, Arch) { return detail::norm_launch_of("rms_norm", args); }
/// y = (x - mean(x)) / sqrt(var(x) + eps) [* weight]
inline Launch norm_launch(const NormArgs& args, Arch) { return detail::norm_launch_of("layer_norm", args); }

/// See RowSquaresArgs: a block a row of a view.
inline Launch row_squares_launch(const RowSquaresArgs& args, Arch) {
    Launch l;
    if (args.n_parts < 1 || args.n_parts > kMostSquares || args.rows < 1 || args.rows > 0x7fffffff) return l;
    for (int i = 0; i < args.n_parts; i++)
        if (!is_float_type(args.x[i].type) || n_rows(args.x[i]) != args.rows) return l;
    l.kernel = "row_squares";
    l.grid[0] = (u32)args.rows, l.grid[1] = (u32)args.n_parts;
    l.block[0] = kNormThreads;
    return l;
}
/// See NormBySquaresArgs.
inline Launch norm_by_squares_launch(const NormBySquaresArgs& args, Arch) {
    Launch l = detail::norm_launch_of("norm_by_squares", NormArgs{args.x, args.y, args.weight, args.has_weight, args.eps});
    if (!args.squares || args.n <= 0) return {};
    return l;
}

/// See FusedNormArgs. Up to 16,384 elements a row: four a thread and step, 1,024 threads.
inline Launch fused_norm_launch(const FusedNormArgs& f, Arch) {
    Launch l;
    auto fits = [&](const View& v) {
        return v.type == kF32 && same_shape(v, f.y) && v.nb[0] == 4 && (u64)v.data % 16 == 0 && v.nb[1] % 16 == 0 && v.nb[2] % 16 == 0 && v.nb[3] % 16 == 0;
    };
    const i64 n = f.y.ne[0], rows = n_rows(f.y);
    if (!fits(f.a) || !fits(f.y) || (f.has_b && (!fits(f.b) || !fits(f.sum))) || n % 4 || n > 16384 || rows <= 0 || rows > 0x7fffffff) return l;
    if (f.has_weight && (f.weight.type != kF32 || f.weight.nb[0] != 4 || (u64)f.weight.data % 16)) return l;
    if (f.xq && n % 32) return l;
    l.kernel = "fused_norm";
    l.grid[0] = (u32)rows;
    const i64 threads = (n / 4 + 31) / 32 * 32;
    l.block[0] = (u32)(threads < 1024 ? threads : 1024);
    return l;
}

/// The same of a product's pieces, which lie at multiples of 16 bytes then.
inline Launch fused_norm_pieces_launch(const PiecesNormArgs& p, Arch arch) {
    Launch l = fused_norm_launch(p.norm, arch);
    if (p.norm.y.ne[2] * p.norm.y.ne[3] != 1 || !pieces_in_words(p.a)) return {};
    if (l.kernel) l.kernel = "fused_norm_pieces";
    return l;
}

}  // namespace ggml_tp
