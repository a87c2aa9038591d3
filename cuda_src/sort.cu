// ARGSORT, TOP_K (a block a row) and SUM_ROWS (a warp a row).
#include "sort.h"

#include "element.h"
#include "sort_row.h"

using namespace ggml_tp;

TP_KERNEL(argsort, ArgsortArgs, 1024) {
    __shared__ u32 keys[kSortMost];
    const Index row = row_index(blockIdx.x, args.y.ne);
    argsort_row(element_at(args.x, row), args.x.nb[0], args.x.ne[0], args.descending, element_at(args.y, row), args.y.nb[0], args.y.ne[0], keys);
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
