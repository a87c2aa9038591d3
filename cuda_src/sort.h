// ARGSORT, TOP_K and SUM_ROWS. Launch settings.
#pragma once
#include "grid_stride.h"

namespace ggml_tp {

constexpr i64 kSortMost = 1024;      // elements of a row that one block sorts, by comparing each with each: keys are in shared memory
constexpr int kMergeRuns = 4;        // at a time: half the launches of two, and an element looks itself up in 3 runs instead of 2 times 1
constexpr i64 kSortBytes = 4 << 20;  // of each of the two buffers between passes: in the L2, and enough for a thousand blocks

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

/// Entries of a row of n between passes, in runs of `run`, of which `places` matter: never more than n, since only the last run is short.
constexpr i64 sorted_entries(i64 n, i64 run, i64 places) {
    const i64 entries = (n + run - 1) / run * (run < places ? run : places);
    return entries < n ? entries : n;
}
/// Rows that are sorted at a time.
inline i64 sorted_rows(const ArgsortArgs& a) {
    const i64 row = sorted_entries(a.x.ne[0], kSortMost, a.y.ne[0]) * 8, fit = row ? kSortBytes / row : 0, rows = n_rows(a.y);
    return fit < 1 ? 1 : fit < rows ? fit : rows;
}
inline bool sort_runs_can(const ArgsortArgs& a) {
    return a.x.type == kF32 && a.y.type == kI32 && a.x.ne[0] > kSortMost && a.x.ne[0] <= 0x7fffffff && a.y.ne[0] <= a.x.ne[0] && n_rows(a.y) <= 0x7fffffff;
}
inline Launch sort_runs_launch(const SortRunsArgs& a, Arch) {
    Launch l;
    const i64 blocks = a.rows * ((a.x.ne[0] + kSortMost - 1) / kSortMost);
    if (blocks > 0x7fffffff) return l;
    l.kernel = "sort_runs";
    l.grid[0] = (u32)blocks;
    l.block[0] = (u32)kSortMost;
    return l;
}
inline Launch merge_runs_launch(const MergeRunsArgs& a, Arch arch) {
    View entries{};
    entries.ne[0] = sorted_entries(a.n, a.run, a.places);
    entries.ne[1] = a.rows;
    entries.ne[2] = entries.ne[3] = 1;
    return per_element_launch("merge_runs", entries, arch);
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
