// Weights of any type to halves: what the tensor cores multiply where mul_tile has no strip for the type. Eight elements a thread.
// grid: (eights of a row / 256, rows, matrices), block: 256.
#include "dequantize.h"

TP_KERNEL(halve_weights, HalveWeightsArgs, 256) {
    using namespace ggml_tp;
    const i64 first = ((i64)blockIdx.x * 256 + threadIdx.x) * 8;
    if (first >= args.w.k) return;
    const WeightRow row = tp_weight_row(args.w, args.row_begin + blockIdx.y, blockIdx.z % args.w.ne2, blockIdx.z / args.w.ne2);
    u32 words[4] = {};
    for (int i = 0; i < 8; ++i) words[i / 2] |= (u32)tp_float_to_half(tp_weight_elem(args.w.type, row, first + i)) << 16 * (i % 2);
    *(TpInt4*)(args.out + ((blockIdx.z * args.rows + blockIdx.y) * args.w.k + first) * 2) = {(int)words[0], (int)words[1], (int)words[2], (int)words[3]};
}
