// MUL_MAT_ID of few tokens (decode): bound by reading the chosen experts' weights once. A warp computes kVecRows rows of one slot's expert:
// k is short here (2048 and less, and a rank's share of 768), so that the 32 lanes of a warp cover it in few steps, and nothing is shared
// but the last sum. A block is the slots of one token: it holds all summands of its rows, and the weighted sum over experts is its last act.
// grid: (rows of gate and up / kVecRows, tokens), block: 32 x n_used.
#include "mul_vec_id.h"

#include "expert.h"
#include "grid_piece.h"

namespace ggml_tp {

template <int kType>
TP_DEVICE void vec_id_dot(const MulVecIdArgs& a, const char* const (&plane)[kVecRows][4], i64 slot, i64 token, float (&acc)[kVecRows]) {
    const i64 x_slot = a.x.ne[1] == 1 ? 0 : slot % a.x.ne[1];
    if constexpr (kType == kF32 || kType == kF16 || kType == kBF16) {
        using Words = FloatWords<kType>;
        constexpr int kElems = Words::kElems;
        const char* x = a.x.data + x_slot * a.x.nb[1] + token * a.x.nb[2];
#pragma unroll 1
        for (i64 k = (i64)threadIdx.x * kElems; k < a.k; k += 32 * kElems) {
            TpInt4 w[kVecRows];
#pragma unroll
            for (int r = 0; r < kVecRows; ++r) w[r] = tp_load_stream(plane[r][0] + k * (16 / kElems));
            float v[kElems];
#pragma unroll
            for (int i = 0; i < kElems; i += 4) {
                const TpInt4 words = *(const TpInt4*)(x + (k + i) * 4);
                v[i] = __int_as_float(words.x), v[i + 1] = __int_as_float(words.y), v[i + 2] = __int_as_float(words.z), v[i + 3] = __int_as_float(words.w);
            }
#pragma unroll
            for (int r = 0; r < kVecRows; ++r)
#pragma unroll
                for (int i = 0; i < kElems; ++i) acc[r] += Words::get(w[r], i) * v[i];
        }
    } else {
        const i64 pieces = a.k / 32, x_row = token * a.x.ne[1] + x_slot;
        const char* xq = a.xq + x_row * a.k;
        const TpFloat2* d = (const TpFloat2*)a.xd + x_row * pieces;
#pragma unroll 1
        for (i64 p = threadIdx.x; p < pieces; p += 32) {
            Piece<kType> w[kVecRows];
#pragma unroll
            for (int r = 0; r < kVecRows; ++r) w[r].load(plane[r], p, LoadStream());
            const i64 first = Piece<kType>::first(p), second = Piece<kType>::second(p);
            const TpInt4 x0 = *(const TpInt4*)(xq + first), x1 = *(const TpInt4*)(xq + second);
            const TpFloat2 d0 = d[first / 32], d1 = d[second / 32];
#pragma unroll
            for (int r = 0; r < kVecRows; ++r) acc[r] += w[r].dot(p, x0, x1, d0, d1);
        }
    }
}

template <int kType>
TP_DEVICE void mul_vec_id(const MulVecIdArgs& a) {
    __shared__ float values[kVecSlots][kVecRows];
    const i64 slot = threadIdx.y, token = blockIdx.y, blocks = (a.part[0].w.n + kVecRows - 1) / kVecRows;
    const int second = blockIdx.x >= blocks;
    const MulVecPart& part = a.part[second];
    const i64 row = (blockIdx.x - (second ? blocks : 0)) * kVecRows, n = part.w.n;
    const i64 expert = expert_of(a.ids, slot, token, part.w.ne2, a.fault);
    const ExpertBias& bias = a.bias[second];
    float acc[kVecRows] = {};
    if (expert >= 0) {
        const char* plane[kVecRows][4];
#pragma unroll
        for (int r = 0; r < kVecRows; ++r) {
            const i64 at = row + r < n ? row + r : n - 1;  // a row beyond the end reads the last one and stores nothing
#pragma unroll
            for (int f = 0; f < 4; ++f) plane[r][f] = part.w.plane[f] + at * part.w.row_stride + expert * part.w.nb2;
        }
        vec_id_dot<kType>(a, plane, slot, token, acc);
    }
#pragma unroll
    for (int r = 0; r < kVecRows; ++r) {
        const float sum = tp_warp_sum(acc[r]);
        if (threadIdx.x) continue;
        values[slot][r] = sum;
        if (row + r < n) *(float*)(part.y.data + (row + r) * 4 + slot * part.y.nb[1] + token * part.y.nb[2]) = sum;
    }
    if (bias.y.data) {
        __syncwarp();
        const int r = threadIdx.x;
        if (r < kVecRows && row + r < n) {
            // The expert is read again: it would hold registers while its rows are multiplied.
            const i64 again = tp_load_word_in_order(a.ids.data + slot * a.ids.nb[0] + token * a.ids.nb[1], true);
            if (bias.rows && again >= 0 && again < part.w.ne2) values[slot][r] += *(const float*)(bias.rows + again * bias.row_bytes + (row + r) * 4);
            *(float*)(bias.y.data + (row + r) * 4 + slot * bias.y.nb[1] + token * bias.y.nb[2]) = values[slot][r];
        }
    }
    if (!a.scaled) return;
    __syncthreads();
    const int r = threadIdx.x;
    if (slot != 0 || r >= kVecRows || row + r >= n) return;
    for (int j = 0; j < (int)blockDim.y; ++j) {
        values[j][r] *= *(const float*)(a.weights.data + j * a.weights.nb[1] + token * a.weights.nb[2]);
        *(float*)(a.products.data + (row + r) * 4 + j * a.products.nb[1] + token * a.products.nb[2]) = values[j][r];
    }
    float sum = values[0][r];
    for (int i = 0; i < a.n_sums; ++i) {
        sum += values[i + 1][r];
        *(float*)(a.sum[i].data + (row + r) * 4 + token * a.sum[i].nb[1]) = sum;
    }
}

}  // namespace ggml_tp

#define MUL_VEC_ID(name, type) \
    TP_KERNEL(mul_vec_id_##name, MulVecIdArgs, 32 * ggml_tp::kVecSlots) { ggml_tp::mul_vec_id<ggml_tp::type>(args); }

TP_PIECE_TYPES(MUL_VEC_ID)
MUL_VEC_ID(f32, kF32)
MUL_VEC_ID(f16, kF16)
MUL_VEC_ID(bf16, kBF16)
