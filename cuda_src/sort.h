// ARGSORT, TOP_K and SUM_ROWS: ops along short rows, as routers have them. Launch settings.
#pragma once
#include "rows_grid.h"

namespace ggml_tp {

constexpr i64 kSortMost = 4096;  // elements of a row, whose keys are in shared memory

/// The first y.ne[0] places of the sorted order; y I32.
inline Launch argsort_launch(const ArgsortArgs& a, Arch) {
    Launch l;
    const i64 rows = n_rows(a.y);
    if (a.x.type != kF32 || a.y.type != kI32 || a.x.ne[0] > kSortMost || a.y.ne[0] > a.x.ne[0] || rows > 0x7fffffff) return l;
    l.kernel = "argsort";
    l.grid[0] = (u32)rows;
    l.block[0] = 32;
    while (l.block[0] < a.x.ne[0] && l.block[0] < 1024) l.block[0] *= 2;
    return l;
}

/// A warp a row.
inline Launch sum_rows_launch(const UnaryArgs& a, Arch) {
    Launch l;
    const i64 rows = n_rows(a.x);
    if (!is_float_type(a.x.type) || a.y.type != kF32 || rows > 0x7fffffff) return l;
    l.kernel = "sum_rows";
    l.grid[0] = (u32)((rows + 3) / 4);
    l.block[0] = 32;
    l.block[1] = 4;
    return l;
}

}  // namespace ggml_tp
