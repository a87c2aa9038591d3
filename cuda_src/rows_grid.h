// Launch settings for kernels with one thread per element: a block is block[0] elements of a row times block[1] rows, so that
// neither long rows (activations) nor short ones (router weights, one element a row) waste threads. Host side.
#pragma once
#include "launch.h"

namespace ggml_tp {

inline constexpr u32 kElementThreads = 256;

constexpr i64 n_rows(const View& v) { return v.ne[1] * v.ne[2] * v.ne[3]; }
constexpr i64 n_elements(const View& v) { return v.ne[0] * n_rows(v); }
constexpr bool same_shape(const View& a, const View& b) { return a.ne[0] == b.ne[0] && a.ne[1] == b.ne[1] && a.ne[2] == b.ne[2] && a.ne[3] == b.ne[3]; }
constexpr bool same_view(const View& a, const View& b) {
    return a.data == b.data && a.type == b.type && same_shape(a, b) && a.nb[0] == b.nb[0] && a.nb[1] == b.nb[1] && a.nb[2] == b.nb[2] && a.nb[3] == b.nb[3];
}
constexpr bool is_float_type(i32 type) { return type == kF32 || type == kF16 || type == kBF16; }

/// Covers `elems` elements along dim 0 (an element may be a group) of `rows` rows; nothing to do, or too much: no kernel.
inline Launch element_launch(const char* kernel, i64 elems, i64 rows) {
    Launch l;
    if (elems <= 0 || rows <= 0) return l;
    u32 bx = 1;
    while (bx < kElementThreads && bx < elems) bx *= 2;
    const u32 by = kElementThreads / bx;
    const i64 gx = (rows + by - 1) / by, gy = (elems + bx - 1) / bx;
    if (rows > 0x7fffffff || gy > 65535) return l;
    l.kernel = kernel;
    l.grid[0] = (u32)gx;
    l.grid[1] = (u32)gy;
    l.block[0] = bx;
    l.block[1] = by;
    return l;
}

/// Whether four neighbours of pieces are a load each; so is what is no pieces.
inline bool pieces_in_words(const Pieces& p) { return !p.n || ((u64)p.sums % 16 == 0 && p.column % 4 == 0 && p.piece % 4 == 0); }

}  // namespace ggml_tp
