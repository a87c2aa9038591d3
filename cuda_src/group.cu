// Which entries each expert has: for products of many tokens. A block an expert; each counts all entries, so that none waits for another.
// The order of an expert's entries is that of arrival, which no result depends on: a column's sum does not know its place.
#include "expert.h"
#include "mul_tile_id.h"

TP_KERNEL(group_experts, GroupArgs, 256) {
    using namespace ggml_tp;
    __shared__ i32 counts[kGroupExperts];
    __shared__ i32 before[2], taken;  // entries and tiles of the experts before this one
    const i32 expert = (i32)blockIdx.x, n_used = (i32)args.ids.ne[0], n = (i32)(args.ids.ne[0] * args.ids.ne[1]);
    if (!args.ids.data) {  // each has as many
        const i32 count = n / (i32)args.n_expert, n_tiles = (count + args.columns - 1) / args.columns;
        for (i32 i = (i32)threadIdx.x; i < count; i += (i32)blockDim.x) args.entries[expert * count + i] = i * (i32)args.n_expert + expert;
        for (i32 i = (i32)threadIdx.x; i < n_tiles; i += (i32)blockDim.x) {
            const i32 left = count - i * args.columns;
            args.tiles[expert * n_tiles + i] = {expert, expert * count + i * args.columns, left < args.columns ? left : args.columns, 0};
        }
        if (expert == 0 && threadIdx.x == 0) *args.n_tiles = (i32)args.n_expert * n_tiles;
        return;
    }
    for (i32 e = (i32)threadIdx.x; e < (i32)args.n_expert; e += (i32)blockDim.x) counts[e] = 0;
    if (threadIdx.x == 0) taken = 0;
    __syncthreads();
    for (i32 i = (i32)threadIdx.x; i < n; i += (i32)blockDim.x) {
        const i64 e = expert_of(args.ids, i % n_used, i / n_used, args.n_expert, args.fault);
        if (e >= 0) atomicAdd(&counts[e], 1);
    }
    __syncthreads();
    if (threadIdx.x < 32) {
        float entries = 0, tiles = 0;  // exact: far less than 2^24
        for (i32 e = (i32)threadIdx.x; e < expert; e += 32) entries += (float)counts[e], tiles += (float)((counts[e] + args.columns - 1) / args.columns);
        entries = tp_warp_sum(entries);
        tiles = tp_warp_sum(tiles);
        if (threadIdx.x == 0) before[0] = (i32)entries, before[1] = (i32)tiles;
    }
    __syncthreads();
    const i32 count = counts[expert], first = before[0], first_tile = before[1], n_tiles = (count + args.columns - 1) / args.columns;
    for (i32 i = (i32)threadIdx.x; i < n; i += (i32)blockDim.x) {
        const i32 e = *(const i32*)(args.ids.data + i % n_used * args.ids.nb[0] + i / n_used * args.ids.nb[1]);
        if (e == expert) args.entries[first + atomicAdd(&taken, 1)] = i;
    }
    for (i32 i = (i32)threadIdx.x; i < n_tiles; i += (i32)blockDim.x) {
        const i32 left = count - i * args.columns;
        args.tiles[first_tile + i] = {expert, first + i * args.columns, left < args.columns ? left : args.columns, 0};
    }
    if (expert == args.n_expert - 1 && threadIdx.x == 0) *args.n_tiles = first_tile + n_tiles;
}
