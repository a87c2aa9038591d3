// Weights of any type to halves: what the tensor cores multiply where mul_tile has no strip for the type. A piece of 32 elements a thread where the type
// has such (vec_piece.h), else eight elements, one by one. grid: (pieces or eights of a row / 256, rows, matrices), block: 256.
#include "vec_piece.h"

namespace ggml_tp {

/// A piece a thread, where they are those of vec_piece.h.
template <int kType>
TP_DEVICE void halve_pieces(const HalveWeightsArgs& a) {
    const i64 p = (i64)blockIdx.x * 256 + threadIdx.x;
    if (p * 32 >= a.w.k) return;
    const WeightRow row = tp_weight_row(a.w, a.row_begin + blockIdx.y, blockIdx.z % a.w.ne2, blockIdx.z / a.w.ne2);
    Piece<kType> piece;
    piece.load(row.plane, p, LoadStream());
    char* const out = a.out + (blockIdx.z * a.rows + blockIdx.y) * a.w.k * 2;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const PieceRun run = piece.run(r);
        u32 words[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const u32 two = (u32)(&run.bytes.x)[i / 2] >> i % 2 * 16;
            words[i] = tp_float_to_half((float)(s8)two * run.scale + run.shift) | (u32)tp_float_to_half((float)(s8)(two >> 8) * run.scale + run.shift) << 16;
        }
        TpInt4* const to = (TpInt4*)(out + (r ? Piece<kType>::second(p) : Piece<kType>::first(p)) * 2);
        to[0] = {(int)words[0], (int)words[1], (int)words[2], (int)words[3]};
        to[1] = {(int)words[4], (int)words[5], (int)words[6], (int)words[7]};
    }
}

}  // namespace ggml_tp

TP_KERNEL(halve_weights, HalveWeightsArgs, 256) {
    using namespace ggml_tp;
    const i64 first = ((i64)blockIdx.x * 256 + threadIdx.x) * 8;
    if (first >= args.w.k) return;
    const WeightRow row = tp_weight_row(args.w, args.row_begin + blockIdx.y, blockIdx.z % args.w.ne2, blockIdx.z / args.w.ne2);
    u32 words[4] = {};
    for (int i = 0; i < 8; ++i) words[i / 2] |= (u32)tp_float_to_half(tp_weight_elem(args.w.type, row, first + i)) << 16 * (i % 2);
    *(TpInt4*)(args.out + ((blockIdx.z * args.rows + blockIdx.y) * args.w.k + first) * 2) = {(int)words[0], (int)words[1], (int)words[2], (int)words[3]};
}

#define HALVE_PIECES(name, type) \
    TP_KERNEL(halve_##name, HalveWeightsArgs, 256) { ggml_tp::halve_pieces<type>(args); }

HALVE_PIECES(q4_1, ggml_tp::kQ4_1)
HALVE_PIECES(q5_0, ggml_tp::kQ5_0)
HALVE_PIECES(q5_1, ggml_tp::kQ5_1)
HALVE_PIECES(q2_K, ggml_tp::kQ2_K)
HALVE_PIECES(q3_K, ggml_tp::kQ3_K)
HALVE_PIECES(q5_K, ggml_tp::kQ5_K)
HALVE_PIECES(iq4_nl, ggml_tp::kIQ4_NL)
HALVE_PIECES(iq4_xs, ggml_tp::kIQ4_XS)
HALVE_PIECES(tq2_0, ggml_tp::kTQ2_0)
HALVE_PIECES(mxfp4, ggml_tp::kMXFP4)
HALVE_PIECES(nvfp4, ggml_tp::kNVFP4)
