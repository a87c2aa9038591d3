// ARGSORT and TOP_K (a block a row, or runs of a long row sorted and merged), and SUM_ROWS (a warp a row).
#include "sort.h"

#include "element.h"
#include "index.h"
#include "sort_row.h"

using namespace ggml_tp;

TP_KERNEL(argsort, ArgsortArgs, 1024) {
    __shared__ TpInt4 words[kSortMost / 4];
    u32* const keys = (u32*)words;
    const Index row = row_index(blockIdx.x, args.y.ne);
    argsort_row(element_at(args.x, row), args.x.nb[0], args.x.ne[0], args.descending, element_at(args.y, row), args.y.nb[0], args.y.ne[0], keys);
}

// A block sorts one run of one row.
TP_KERNEL(sort_runs, SortRunsArgs, 1024) {
    __shared__ TpInt4 words[kSortMost / 4];
    u32* const keys = (u32*)words;
    const i64 n = args.x.ne[0], runs = (n + kSortMost - 1) / kSortMost, row = blockIdx.x / runs, first = blockIdx.x % runs * kSortMost;
    const i64 kept = kSortMost < args.places ? kSortMost : args.places;
    const char* x = element_at(args.x, row_index((u32)(args.row_begin + row), args.x.ne)) + first * args.x.nb[0];
    u64* to = args.to + row * sorted_entries(n, kSortMost, args.places) + blockIdx.x % runs * kept;
    sort_row(x, args.x.nb[0], n - first < kSortMost ? n - first : kSortMost, args.descending, keys, [&](i64 place, i64 i, u32 key) {
        if (place < kept) to[place] = (u64)key << 32 | (u32)(first + i);
    });
}

// An entry's place among kMergeRuns runs: its own in its run, and how many are before it in each of the others.
TP_KERNEL(merge_runs, MergeRunsArgs, 256) {
    const i64 runs = (args.n + args.run - 1) / args.run, kept = args.run < args.places ? args.run : args.places;
    const i64 merged = args.run * kMergeRuns, merged_kept = merged < args.places ? merged : args.places;
    const i64 width = sorted_entries(args.n, args.run, args.places), merged_width = sorted_entries(args.n, merged, args.places);
    TP_FOR_EACH(at, args.rows * width) {
        const i64 row = at / width, run = at % width / kept, group = run / kMergeRuns;
        const u64* own = args.from + row * width;
        auto entries = [&](i64 r) {  // the last run is a short one
            const i64 left = args.n - r * args.run;
            return left < kept ? left : kept;
        };
        i64 place = at % width % kept;
        if (place >= entries(run)) continue;
        const u64 entry = args.from[at];
        for (i64 r = group * kMergeRuns; r < group * kMergeRuns + kMergeRuns && r < runs; ++r) {
            if (r == run) continue;
            const u64* other = own + r * kept;
            i64 before = 0;
            for (i64 end = entries(r); before < end;) {
                const i64 middle = (before + end) / 2;
                if (other[middle] < entry) before = middle + 1;
                else end = middle;
            }
            place += before;
        }
        if (place >= merged_kept) continue;
        if (args.to) args.to[row * merged_width + group * merged_kept + place] = entry;
        else *(i32*)(element_at(args.y, row_index((u32)(args.row_begin + row), args.y.ne)) + place * args.y.nb[0]) = (i32)(u32)entry;
    }
}

TP_KERNEL(sum_rows, UnaryArgs, 128) {
    const i64 row = (i64)blockIdx.x * 4 + threadIdx.y;
    if (row >= args.x.ne[1] * args.x.ne[2] * args.x.ne[3]) return;
    const Index at = row_index((u32)row, args.x.ne);
    const char* x = element_at(args.x, at);
    float sum = 0;
    for (i64 i = threadIdx.x; i < args.x.ne[0]; i += 32) sum += load_element(x + i * args.x.nb[0], args.x.type);
    sum = tp_warp_sum(sum);
    if (threadIdx.x == 0) store(args.y, at, sum);
}
