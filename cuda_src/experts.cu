// MUL_MAT_ID, any types and layouts, and ADD_ID. A warp computes one row of one expert for one of a token's slots.
// grid: (ceil(n / kExpertRows), n_used, n_tokens), block: 32 x kExpertRows.
#include "experts.h"

#include "dequantize.h"
#include "element.h"
#include "expert.h"
#include "quantize_group.h"

namespace ggml_tp {

struct ExpertSite {
    i64 row, slot, token, expert;
    i64 x_slot;  // x has one row for all slots of a token, or one for each
};
TP_DEVICE bool expert_site(const MulIdArgs& a, ExpertSite& s) {
    s.row = (i64)blockIdx.x * kExpertRows + threadIdx.y;
    s.slot = blockIdx.y;
    s.token = blockIdx.z;
    if (s.row >= a.w.n) return false;
    s.x_slot = s.slot % a.x.ne[1];
    s.expert = expert_of(a.ids, s.slot, s.token, a.w.ne2, a.fault);
    return s.expert >= 0;
}
TP_DEVICE void expert_store(const MulIdArgs& a, const ExpertSite& s, float acc) {
    acc = tp_warp_sum(acc);
    if (threadIdx.x == 0) *(float*)(a.y.data + s.row * a.y.nb[0] + s.slot * a.y.nb[1] + s.token * a.y.nb[2]) = acc;
}

template <int kType, bool kAligned>
TP_DEVICE void mul_id_quantized(const MulIdArgs& a) {
    ExpertSite s;
    if (!expert_site(a, s)) return;
    const WeightRow w = tp_weight_row(a.w, s.row, s.expert, 0);
    const i64 n_sub = a.w.k / 32, x_row = s.token * a.x.ne[1] + s.x_slot;
    const i64 from = a.k_begin / 32, to = (a.k_end + 31) / 32;
    float acc = 0;
    for (i64 b = from + threadIdx.x; b < to; b += 32) {
        const float* d = (const float*)a.xd + (x_row * n_sub + b) * 2;
        acc += tp_dot32<kType, kAligned>(w, b, a.xq + x_row * a.w.k + b * 32, d[0], d[1]);
    }
    expert_store(a, s, acc);
}

template <int kType>
TP_DEVICE void mul_id_elements(const MulIdArgs& a) {
    ExpertSite s;
    if (!expert_site(a, s)) return;
    const WeightRow w = tp_weight_row(a.w, s.row, s.expert, 0);
    const char* x = a.x.data + s.x_slot * a.x.nb[1] + s.token * a.x.nb[2];
    float acc = 0;
    for (i64 k = a.k_begin + threadIdx.x; k < a.k_end; k += 32) acc += tp_weight_elem(kType, w, k) * *(const float*)(x + (k - a.k_begin) * a.x.nb[0]);
    expert_store(a, s, acc);
}

}  // namespace ggml_tp

#define MUL_ID_QUANTIZED(name, type)                                                          \
    TP_KERNEL(mul_id_##name, MulIdArgs, 128) { ggml_tp::mul_id_quantized<type, true>(args); } \
    TP_KERNEL(mul_id_##name##_host, MulIdArgs, 128) { ggml_tp::mul_id_quantized<type, false>(args); }
#define MUL_ID_ELEMENTS(name, type) \
    TP_KERNEL(mul_id_##name, MulIdArgs, 128) { ggml_tp::mul_id_elements<type>(args); }

MUL_ID_QUANTIZED(q4_0, ggml_tp::kQ4_0)
MUL_ID_QUANTIZED(q8_0, ggml_tp::kQ8_0)
MUL_ID_QUANTIZED(q4_K, ggml_tp::kQ4_K)
MUL_ID_QUANTIZED(q6_K, ggml_tp::kQ6_K)
MUL_ID_ELEMENTS(f32, ggml_tp::kF32)
MUL_ID_ELEMENTS(f16, ggml_tp::kF16)
MUL_ID_ELEMENTS(bf16, ggml_tp::kBF16)
MUL_ID_ELEMENTS(q4_1, ggml_tp::kQ4_1)
MUL_ID_ELEMENTS(q5_0, ggml_tp::kQ5_0)
MUL_ID_ELEMENTS(q5_1, ggml_tp::kQ5_1)
MUL_ID_ELEMENTS(q8_1, ggml_tp::kQ8_1)
MUL_ID_ELEMENTS(q2_K, ggml_tp::kQ2_K)
MUL_ID_ELEMENTS(q3_K, ggml_tp::kQ3_K)
MUL_ID_ELEMENTS(q5_K, ggml_tp::kQ5_K)
MUL_ID_ELEMENTS(q8_K, ggml_tp::kQ8_K)
MUL_ID_ELEMENTS(iq2_xxs, ggml_tp::kIQ2_XXS)
MUL_ID_ELEMENTS(iq2_xs, ggml_tp::kIQ2_XS)
MUL_ID_ELEMENTS(iq2_s, ggml_tp::kIQ2_S)
MUL_ID_ELEMENTS(iq3_xxs, ggml_tp::kIQ3_XXS)
MUL_ID_ELEMENTS(iq3_s, ggml_tp::kIQ3_S)
MUL_ID_ELEMENTS(iq1_s, ggml_tp::kIQ1_S)
MUL_ID_ELEMENTS(iq1_m, ggml_tp::kIQ1_M)
MUL_ID_ELEMENTS(iq4_nl, ggml_tp::kIQ4_NL)
MUL_ID_ELEMENTS(iq4_xs, ggml_tp::kIQ4_XS)
MUL_ID_ELEMENTS(tq1_0, ggml_tp::kTQ1_0)
MUL_ID_ELEMENTS(tq2_0, ggml_tp::kTQ2_0)
MUL_ID_ELEMENTS(mxfp4, ggml_tp::kMXFP4)
MUL_ID_ELEMENTS(nvfp4, ggml_tp::kNVFP4)
MUL_ID_ELEMENTS(q1_0, ggml_tp::kQ1_0)
MUL_ID_ELEMENTS(q2_0, ggml_tp::kQ2_0)

// y[:, j, t] = a[:, j, t] + b[:, ids[j, t]]
TP_KERNEL(add_id, AddIdArgs, 256) {
    using namespace ggml_tp;
    const i64 i0 = (i64)blockIdx.y * blockDim.x + threadIdx.x;
    const i64 row = (i64)blockIdx.x * blockDim.y + threadIdx.y;
    if (i0 >= args.y.ne[0] || row >= args.y.ne[1] * args.y.ne[2] * args.y.ne[3]) return;
    Index at = row_index((u32)row, args.y.ne);
    at.i0 = i0;
    float v = load(args.a, at);
    if (args.has_b) {
        const i64 expert = expert_of(args.ids, at.i1, at.i2, args.b.ne[1], args.fault);
        if (expert < 0) return;
        v += load(args.b, {i0, expert, 0, 0});
    }
    store(args.y, at, v);
}

// products = x * weights and their sums slot by slot, each product and sum rounded as the single ops round them. grid: (tokens, elements / 1024).
TP_KERNEL(weighted_sum, WeightedSumArgs, 256) {
    using namespace ggml_tp;
    const i64 at = ((i64)blockIdx.y * blockDim.x + threadIdx.x) * 4, token = blockIdx.x, n_used = args.x.ne[1];
    if (at >= args.x.ne[0]) return;
    const char *const x = args.x.data + at * 4 + token * args.x.nb[2], *const weights = args.weights.data + token * args.weights.nb[2];
    char* const products = args.products.data + at * 4 + token * args.products.nb[2];
    float sum[4];
#pragma unroll 4
    for (i64 slot = 0; slot < n_used; ++slot) {
        float v[4];
        load_four(x + slot * args.x.nb[1], v);
        const float weight = *(const float*)(weights + slot * args.weights.nb[1]);
        for (int e = 0; e < 4; ++e) {
            v[e] = tp_mul_rounded(v[e], weight);
            sum[e] = slot == 0 ? v[e] : sum[e] + v[e];
        }
        store_four(products + slot * args.products.nb[1], v);
        const i64 i = slot - 1;
        if (i < 0 || i >= args.n_sums || (i + 1 < args.n_sums && args.sum[i].data == args.sum[i + 1].data)) continue;  // the next sum takes its place
        store_four(args.sum[i].data + at * 4 + token * args.sum[i].nb[1], sum);
    }
}
