// Launch settings of experts.cu.
#pragma once
#include "rows_grid.h"
#include "weight_format.h"

namespace ggml_tp {

constexpr int kExpertRows = 4;  // of one expert, that a block of the general kernel computes

inline Launch mul_id_launch(const MulIdArgs& a, Arch) {
    struct Row {
        i32 type;
        const char *repacked, *host;
    };
    static constexpr Row kRows[] = {
        {kQ4_0, "mul_id_q4_0", "mul_id_q4_0_host"},     {kQ8_0, "mul_id_q8_0", "mul_id_q8_0_host"},  {kQ4_K, "mul_id_q4_K", "mul_id_q4_K_host"},
        {kQ6_K, "mul_id_q6_K", "mul_id_q6_K_host"},     {kF32, "mul_id_f32", "mul_id_f32"},          {kF16, "mul_id_f16", "mul_id_f16"},
        {kBF16, "mul_id_bf16", "mul_id_bf16"},          {kQ4_1, "mul_id_q4_1", "mul_id_q4_1"},       {kQ5_0, "mul_id_q5_0", "mul_id_q5_0"},
        {kQ5_1, "mul_id_q5_1", "mul_id_q5_1"},          {kQ8_1, "mul_id_q8_1", "mul_id_q8_1"},       {kQ2_K, "mul_id_q2_K", "mul_id_q2_K"},
        {kQ3_K, "mul_id_q3_K", "mul_id_q3_K"},          {kQ5_K, "mul_id_q5_K", "mul_id_q5_K"},       {kQ8_K, "mul_id_q8_K", "mul_id_q8_K"},
        {kIQ2_XXS, "mul_id_iq2_xxs", "mul_id_iq2_xxs"}, {kIQ2_XS, "mul_id_iq2_xs", "mul_id_iq2_xs"}, {kIQ2_S, "mul_id_iq2_s", "mul_id_iq2_s"},
        {kIQ3_XXS, "mul_id_iq3_xxs", "mul_id_iq3_xxs"}, {kIQ3_S, "mul_id_iq3_s", "mul_id_iq3_s"},    {kIQ1_S, "mul_id_iq1_s", "mul_id_iq1_s"},
        {kIQ1_M, "mul_id_iq1_m", "mul_id_iq1_m"},       {kIQ4_NL, "mul_id_iq4_nl", "mul_id_iq4_nl"}, {kIQ4_XS, "mul_id_iq4_xs", "mul_id_iq4_xs"},
        {kTQ1_0, "mul_id_tq1_0", "mul_id_tq1_0"},       {kTQ2_0, "mul_id_tq2_0", "mul_id_tq2_0"},    {kMXFP4, "mul_id_mxfp4", "mul_id_mxfp4"},
        {kNVFP4, "mul_id_nvfp4", "mul_id_nvfp4"},       {kQ1_0, "mul_id_q1_0", "mul_id_q1_0"},       {kQ2_0, "mul_id_q2_0", "mul_id_q2_0"},
    };
    Launch out;
    if (a.x.type != kF32 || a.y.type != kF32 || a.ids.type != kI32 || a.w.ne3 != 1 || a.y.ne[3] != 1) return out;
    if (a.y.ne[1] > 65535 || a.y.ne[2] > 65535 || a.x.ne[1] < 1 || a.y.ne[1] % a.x.ne[1]) return out;
    for (const Row& row : kRows)
        if (row.type == a.w.type) out.kernel = a.w.repacked ? row.repacked : row.host;
    out.grid[0] = (u32)((a.w.n + kExpertRows - 1) / kExpertRows);
    out.grid[1] = (u32)a.y.ne[1];
    out.grid[2] = (u32)a.y.ne[2];
    out.block[0] = 32;
    out.block[1] = kExpertRows;
    return out;
}

inline Launch add_id_launch(const AddIdArgs& a, Arch) {
    if (a.a.type != kF32 || a.b.type != kF32 || a.y.type != kF32 || a.ids.type != kI32 || !same_shape(a.a, a.y) || a.b.ne[0] != a.a.ne[0]) return {};
    return element_launch("add_id", a.y.ne[0], n_rows(a.y));
}

constexpr int kWeightedThreads = 256;  // four elements of a token each

inline Launch weighted_sum_launch(const WeightedSumArgs& a, Arch) {
    Launch out;
    const View& x = a.x;
    auto fits = [](const View& v) { return v.type == kF32 && v.nb[0] == 4 && (u64)v.data % 16 == 0 && v.nb[1] % 16 == 0 && v.nb[2] % 16 == 0; };
    if (!fits(x) || !fits(a.products) || x.ne[3] != 1 || x.ne[0] % 4 || x.ne[1] > kVecSlots || x.ne[2] > 0x7fffffff || a.n_sums + 1 > x.ne[1]) return out;
    for (int i = 0; i < a.n_sums; ++i)
        if (!fits(a.sum[i])) return out;
    const i64 blocks = (x.ne[0] / 4 + kWeightedThreads - 1) / kWeightedThreads;
    if (blocks > 65535) return out;
    out.kernel = "weighted_sum";
    out.grid[0] = (u32)x.ne[2];
    out.grid[1] = (u32)blocks;
    out.block[0] = kWeightedThreads;
    return out;
}

}  // namespace ggml_tp
