// The rate at which this GPU reads its memory: what every speed here is a share of. grid: any, block: 512.
// x holds n 16-byte words; each thread keeps eight loads in flight. The sum is written so that the loads are not removed.
#include "tp.h"

TP_KERNEL(read_rate, ReadRateArgs, 512) {
    const u64 step = (u64)gridDim.x * blockDim.x;
    u32 sum = 0;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < args.n; i += 8 * step) {
        TpInt4 v[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) v[j] = i + j * step < args.n ? tp_load_stream(args.x + 16 * (i + j * step)) : TpInt4{0, 0, 0, 0};
#pragma unroll
        for (int j = 0; j < 8; ++j) sum += (u32)(v[j].x ^ v[j].y ^ v[j].z ^ v[j].w);
    }
    if (sum == 0x9e3779b9u) *(u32*)args.x = sum;  // never true for zeroed memory
}

// Keeps a stream busy: a late peer, for tests. One thread.
TP_KERNEL(spin, SpinArgs, 32) {
    const u64 begin = tp_nanoseconds();
    while (tp_nanoseconds() - begin < args.nanoseconds) {}
}
