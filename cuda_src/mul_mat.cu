// MUL_MAT and OUT_PROD. MUL_MAT: a warp computes one row of w against up to kCols columns of x; the weights are read once per column group.
// grid: (ceil(n / kRowsPerBlock), ceil(m / kCols), ne2 * ne3 of x), block: 32 x kRowsPerBlock.
#include "dequantize.h"
#include "index.h"
#include "mul_mat.h"

namespace ggml_tp {

struct MulMatSite {
    i64 row, column, i2, i3, w2, w3;
};

TP_DEVICE bool mul_mat_site(const MulMatArgs& a, int cols, MulMatSite& s) {
    s.row = (i64)blockIdx.x * kRowsPerBlock + threadIdx.y;
    s.column = (i64)blockIdx.y * cols;
    s.i2 = blockIdx.z % a.x.ne[2];
    s.i3 = blockIdx.z / a.x.ne[2];
    s.w2 = (s.i2 + a.dim2_offset_x) / a.ratio2 - a.dim2_offset_w;
    s.w3 = s.i3 / a.ratio3;
    return s.row < a.w.n;
}

template <int kCols>
TP_DEVICE void mul_mat_store(const MulMatArgs& a, const MulMatSite& s, float (&acc)[kCols]) {
    for (int c = 0; c < kCols; ++c) {
        const float sum = tp_warp_sum(acc[c]);
        if (threadIdx.x == 0 && s.column + c < a.x.ne[1])
            *(float*)(a.y.data + s.row * a.y.nb[0] + (s.column + c) * a.y.nb[1] + s.i2 * a.y.nb[2] + s.i3 * a.y.nb[3]) = sum;
    }
}

template <int kType, bool kAligned, int kCols>
TP_DEVICE void mul_mat_quantized(const MulMatArgs& a) {
    MulMatSite s;
    if (!mul_mat_site(a, kCols, s)) return;
    const WeightRow w = tp_weight_row(a.w, s.row, s.w2, s.w3);
    const i64 n_sub = a.w.k / 32, x_row = (s.i3 * a.x.ne[2] + s.i2) * a.x.ne[1] + s.column;
    const i64 from = a.k_begin / 32, to = (a.k_end + 31) / 32;
    float acc[kCols] = {};
    for (i64 b = from + threadIdx.x; b < to; b += 32)
        for (int c = 0; c < kCols; ++c) {
            if (s.column + c >= a.x.ne[1]) break;
            const float* d = (const float*)a.xd + ((x_row + c) * n_sub + b) * 2;
            acc[c] += tp_dot32<kType, kAligned>(w, b, a.xq + (x_row + c) * a.w.k + b * 32, d[0], d[1]);
        }
    mul_mat_store<kCols>(a, s, acc);
}

template <int kType, int kCols>
TP_DEVICE void mul_mat_elements(const MulMatArgs& a) {
    MulMatSite s;
    if (!mul_mat_site(a, kCols, s)) return;
    const WeightRow w = tp_weight_row(a.w, s.row, s.w2, s.w3);
    const char* x = a.x.data + s.column * a.x.nb[1] + s.i2 * a.x.nb[2] + s.i3 * a.x.nb[3];
    float acc[kCols] = {};
    for (i64 k = a.k_begin + threadIdx.x; k < a.k_end; k += 32) {
        const float weight = tp_weight_elem(kType, w, k);
        for (int c = 0; c < kCols; ++c) {
            if (s.column + c >= a.x.ne[1]) break;
            const char* p = x + (k - a.k_begin) * a.x.nb[0] + c * a.x.nb[1];
            acc[c] += weight * tp_load(a.x.type, p);
        }
    }
    mul_mat_store<kCols>(a, s, acc);
}

}  // namespace ggml_tp

// OUT_PROD: y[i, j] = sum over rows r of w[r][i] * x[j, r], a thread each, in the order of r. w.n counts the rows.
TP_KERNEL(out_prod, MulMatArgs, 256) {
    using namespace ggml_tp;
    TP_FOR_EACH(i, tp_elems(args.y)) {
        const Index4 at = tp_index(args.y.ne, i);
        const char* x = args.x.data + at.i[1] * args.x.nb[0] + at.i[2] * args.x.nb[2] + at.i[3] * args.x.nb[3];
        float sum = 0;
        for (i64 r = 0; r < args.w.n; ++r)
            sum += tp_weight_elem(args.w.type, tp_weight_row(args.w, r, at.i[2] / args.ratio2, at.i[3] / args.ratio3), at.i[0]) *
                   tp_load(args.x.type, x + r * args.x.nb[1]);
        *(float*)tp_at(args.y, at) = sum;
    }
}

#define MUL_MAT_QUANTIZED(name, type)                                                                         \
    TP_KERNEL(mul_mat_##name##_1, MulMatArgs, 128) { ggml_tp::mul_mat_quantized<type, true, 1>(args); }       \
    TP_KERNEL(mul_mat_##name##_8, MulMatArgs, 128) { ggml_tp::mul_mat_quantized<type, true, 8>(args); }       \
    TP_KERNEL(mul_mat_##name##_host_1, MulMatArgs, 128) { ggml_tp::mul_mat_quantized<type, false, 1>(args); } \
    TP_KERNEL(mul_mat_##name##_host_8, MulMatArgs, 128) { ggml_tp::mul_mat_quantized<type, false, 8>(args); }
#define MUL_MAT_ELEMENTS(name, type)                                                             \
    TP_KERNEL(mul_mat_##name##_1, MulMatArgs, 128) { ggml_tp::mul_mat_elements<type, 1>(args); } \
    TP_KERNEL(mul_mat_##name##_8, MulMatArgs, 128) { ggml_tp::mul_mat_elements<type, 8>(args); }

MUL_MAT_QUANTIZED(q4_0, ggml_tp::kQ4_0)
MUL_MAT_QUANTIZED(q8_0, ggml_tp::kQ8_0)
MUL_MAT_QUANTIZED(q4_K, ggml_tp::kQ4_K)
MUL_MAT_QUANTIZED(q6_K, ggml_tp::kQ6_K)
MUL_MAT_ELEMENTS(f32, ggml_tp::kF32)
MUL_MAT_ELEMENTS(f16, ggml_tp::kF16)
MUL_MAT_ELEMENTS(bf16, ggml_tp::kBF16)
MUL_MAT_ELEMENTS(q4_1, ggml_tp::kQ4_1)
MUL_MAT_ELEMENTS(q5_0, ggml_tp::kQ5_0)
MUL_MAT_ELEMENTS(q5_1, ggml_tp::kQ5_1)
MUL_MAT_ELEMENTS(q8_1, ggml_tp::kQ8_1)
MUL_MAT_ELEMENTS(q2_K, ggml_tp::kQ2_K)
MUL_MAT_ELEMENTS(q3_K, ggml_tp::kQ3_K)
MUL_MAT_ELEMENTS(q5_K, ggml_tp::kQ5_K)
MUL_MAT_ELEMENTS(q8_K, ggml_tp::kQ8_K)
MUL_MAT_ELEMENTS(iq2_xxs, ggml_tp::kIQ2_XXS)
MUL_MAT_ELEMENTS(iq2_xs, ggml_tp::kIQ2_XS)
MUL_MAT_ELEMENTS(iq2_s, ggml_tp::kIQ2_S)
MUL_MAT_ELEMENTS(iq3_xxs, ggml_tp::kIQ3_XXS)
MUL_MAT_ELEMENTS(iq3_s, ggml_tp::kIQ3_S)
MUL_MAT_ELEMENTS(iq1_s, ggml_tp::kIQ1_S)
MUL_MAT_ELEMENTS(iq1_m, ggml_tp::kIQ1_M)
MUL_MAT_ELEMENTS(iq4_nl, ggml_tp::kIQ4_NL)
MUL_MAT_ELEMENTS(iq4_xs, ggml_tp::kIQ4_XS)
MUL_MAT_ELEMENTS(tq1_0, ggml_tp::kTQ1_0)
MUL_MAT_ELEMENTS(tq2_0, ggml_tp::kTQ2_0)
MUL_MAT_ELEMENTS(mxfp4, ggml_tp::kMXFP4)
MUL_MAT_ELEMENTS(nvfp4, ggml_tp::kNVFP4)
MUL_MAT_ELEMENTS(q1_0, ggml_tp::kQ1_0)
MUL_MAT_ELEMENTS(q2_0, ggml_tp::kQ2_0)
