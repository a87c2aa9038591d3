// MUL_MAT of few columns (a batch of sequences, a draft) from sm_80 on: weights go from memory straight into fragments, as halves, and are
// multiplied by up to kColumns columns of x. A block has kFewRows rows, 32 a warp, and walks its share of k in chunks of 128: a lane's strips (16
// bytes of 4-bit weights, 32 of a row) are four lanes' 128 along k, in an order that x's panels are read in as well: which k a lane's element
// has does not matter to a sum, as long as both operands agree. The next chunk's strips are on their way to registers while this one's are
// multiplied; x comes through a ring in shared memory. grid: (row blocks of all parts, pieces of k), block: 128.
#include "mul_few.h"

#include "tile_piece.h"

#if TP_ARCH >= 800

namespace ggml_tp {

/// The part that a row block belongs to, and its first row there; before: rows of the parts in front.
TP_DEVICE int few_part(const MulPiecesArgs& a, i64 block, i64& row, i64& before) {
    int part = 0;
    before = 0;
    for (; part + 1 < a.wide.n_parts; ++part) {
        const i64 blocks = (a.wide.part[part].w.n + kFewRows - 1) / kFewRows;
        if (block < blocks) break;
        block -= blocks;
        before += a.wide.part[part].w.n;
    }
    row = block * kFewRows;
    return part;
}

template <int kType, int kColumns>
TP_DEVICE void mul_few(const MulPiecesArgs& a) {
    // Of 128 bytes a column and step; the second step's lie so that the lanes of a quarter warp meet no bank twice (strips take their x 32 or 16
    // halves apart).
    constexpr int kApart = kColumns * 128 + (kType == kQ4_K ? 64 : 32), kStage = kApart + kColumns * 128;
    TP_DYN_SHARED(char, ring);
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
    i64 row0, before;
    const MulVecPart& p = a.wide.part[few_part(a, blockIdx.x, row0, before)];
    const u32 steps = (u32)((a.wide.k + kTileStep - 1) / kTileStep), first = blockIdx.y * (u32)a.chunks, chunks_of_all = (steps + 1) / 2;
    const u32 end = first + (u32)a.chunks < chunks_of_all ? first + (u32)a.chunks : chunks_of_all;
    auto bring_x = [&](u32 chunk) {
        if (chunk < end) {
            char* to = ring + chunk % kFewStages * kStage;
            for (int i = thread; i < 2 * kColumns * 8; i += kFewThreads) {
                const int half = i / (kColumns * 8), at = i % (kColumns * 8) * 16;
                const u32 step = 2 * chunk + (u32)half < steps ? 2 * chunk + (u32)half : steps - 1;  // beyond k: anything finite, times a zero
                tp_copy_async(to + half * kApart + at, a.wide.xh + (i64)step * kPanelBytes + at);
            }
        }
        tp_copy_commit();
    };
    const char* plane[4][4];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        const i64 row = row0 + warp * 32 + r * 8 + g, inside = row < p.w.n ? row : p.w.n - 1;
#pragma unroll
        for (int f = 0; f < 4; ++f) plane[r][f] = p.w.plane[f] + inside * p.w.row_stride[f];
    }
    Strip<kType> strip[4], next[4];
    auto load = [&](u32 chunk) {
#pragma unroll
        for (int r = 0; r < 4; ++r) load_strip<kType>(next[r], plane[r], 2 * chunk + (u32)(t / 2), t % 2, a.wide.k);
    };
    float acc[2][kColumns / 8][4] = {};
    load(first);
#pragma unroll
    for (int i = 0; i < kFewStages - 1; ++i) bring_x(first + (u32)i);
    for (u32 chunk = first; chunk < end; ++chunk) {
#pragma unroll
        for (int r = 0; r < 4; ++r) strip[r] = next[r];
        if (chunk + 1 < end) load(chunk + 1);
        tp_copy_wait_but<kFewStages - 2>();
        __syncthreads();
        bring_x(chunk + kFewStages - 1);  // where the chunk before was, which all warps have multiplied
        const char* x = ring + chunk % kFewStages * kStage + t / 2 * kApart + g * 128;
        const u32 step = 2 * chunk + (u32)(t / 2);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            u32 w[4][8];
#pragma unroll
            for (int row = 0; row < 4; ++row) strip[row].run(step, t % 2, r, w[row]);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int unit = (Strip<kType>::place(t % 2, r) / 8 + i) ^ g;
#pragma unroll
                for (int n = 0; n < kColumns / 8; ++n) {
                    const TpInt4 v = *(const TpInt4*)(x + n * 1024 + unit * 16);
                    const u32 b[2][2] = {{(u32)v.x, (u32)v.y}, {(u32)v.z, (u32)v.w}};
#pragma unroll
                    for (int m = 0; m < 2; ++m)
#pragma unroll
                        for (int h = 0; h < 2; ++h) {
                            const int at = 4 * i + 2 * h;
                            const u32 fragment[4] = {w[2 * m][at], w[2 * m + 1][at], w[2 * m][at + 1], w[2 * m + 1][at + 1]};
                            if constexpr (kType == kBF16) tp_mma_bf16(acc[m][n], fragment, b[h]);
                            else tp_mma_f16(acc[m][n], fragment, b[h]);
                        }
                }
            }
        }
    }
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const i64 row = row0 + warp * 32 + m * 16 + g + e / 2 * 8, column = n * 8 + 2 * t + e % 2;
                if (row >= p.w.n || column >= a.wide.m) continue;
                const float y = acc[m][n][e] * kUnhalved<kType>;
                if (a.n_pieces > 1) a.sums[((i64)blockIdx.y * a.wide.m + column) * a.n_rows + before + row] = y;
                else *(float*)(p.y.data + row * p.y.nb[0] + column * p.y.nb[1]) = y;
            }
}

}  // namespace ggml_tp

#define MUL_FEW(name, type)                                                                  \
    TP_KERNEL(mul_few_##name##_16, MulPiecesArgs, 128) { ggml_tp::mul_few<type, 16>(args); } \
    TP_KERNEL(mul_few_##name##_32, MulPiecesArgs, 128) { ggml_tp::mul_few<type, 32>(args); } \
    TP_KERNEL(mul_few_##name##_64, MulPiecesArgs, 128) { ggml_tp::mul_few<type, 64>(args); }

MUL_FEW(q4_0, ggml_tp::kQ4_0)
MUL_FEW(q8_0, ggml_tp::kQ8_0)
MUL_FEW(q4_K, ggml_tp::kQ4_K)
MUL_FEW(q6_K, ggml_tp::kQ6_K)
MUL_FEW(f16, ggml_tp::kF16)
MUL_FEW(bf16, ggml_tp::kBF16)

// The pieces of k, in their order. grid: (rows of all parts / 256, m).
TP_KERNEL(sum_pieces, MulPiecesArgs, 256) {
    using namespace ggml_tp;
    i64 row = (i64)blockIdx.x * 256 + threadIdx.x;
    const i64 column = blockIdx.y;
    if (row >= args.n_rows) return;
    float sum = 0;
#pragma unroll 4
    for (int piece = 0; piece < args.n_pieces; ++piece) sum += args.sums[((i64)piece * args.wide.m + column) * args.n_rows + row];
    int part = 0;
    while (part + 1 < args.wide.n_parts && row >= args.wide.part[part].w.n) row -= args.wide.part[part++].w.n;
    const View& y = args.wide.part[part].y;
    *(float*)(y.data + row * y.nb[0] + column * y.nb[1]) = sum;
}

#endif
