// Launch settings of mul_mat.cu.
#pragma once
#include "grid_stride.h"
#include "weight_format.h"

namespace ggml_tp {

constexpr int kRowsPerBlock = 4;

/// Weights that are multiplied in their own integers, with int8 activations (quantize.h makes them first), by mul_vec and mul_vec_id (vec) or by mul_mat
/// and mul_id; the others element by element in f32.
inline bool mul_mat_needs_quantized_x(const Matrix& w, bool vec) { return vec ? has_pieces(w.type) : has_dots(w.type); }

inline Launch mul_mat_launch(const MulMatArgs& a, Arch) {
    struct Row {
        i32 type;
        const char *repacked_1, *repacked_8, *host_1, *host_8;
    };
    static constexpr Row kRows[] = {
        {kQ4_0, "mul_mat_q4_0_1", "mul_mat_q4_0_8", "mul_mat_q4_0_host_1", "mul_mat_q4_0_host_8"},
        {kQ8_0, "mul_mat_q8_0_1", "mul_mat_q8_0_8", "mul_mat_q8_0_host_1", "mul_mat_q8_0_host_8"},
        {kQ4_K, "mul_mat_q4_K_1", "mul_mat_q4_K_8", "mul_mat_q4_K_host_1", "mul_mat_q4_K_host_8"},
        {kQ6_K, "mul_mat_q6_K_1", "mul_mat_q6_K_8", "mul_mat_q6_K_host_1", "mul_mat_q6_K_host_8"},
        {kF32, "mul_mat_f32_1", "mul_mat_f32_8", "mul_mat_f32_1", "mul_mat_f32_8"},
        {kF16, "mul_mat_f16_1", "mul_mat_f16_8", "mul_mat_f16_1", "mul_mat_f16_8"},
        {kBF16, "mul_mat_bf16_1", "mul_mat_bf16_8", "mul_mat_bf16_1", "mul_mat_bf16_8"},
        {kQ4_1, "mul_mat_q4_1_1", "mul_mat_q4_1_8", "mul_mat_q4_1_1", "mul_mat_q4_1_8"},
        {kQ5_0, "mul_mat_q5_0_1", "mul_mat_q5_0_8", "mul_mat_q5_0_1", "mul_mat_q5_0_8"},
        {kQ5_1, "mul_mat_q5_1_1", "mul_mat_q5_1_8", "mul_mat_q5_1_1", "mul_mat_q5_1_8"},
        {kQ8_1, "mul_mat_q8_1_1", "mul_mat_q8_1_8", "mul_mat_q8_1_1", "mul_mat_q8_1_8"},
        {kQ2_K, "mul_mat_q2_K_1", "mul_mat_q2_K_8", "mul_mat_q2_K_1", "mul_mat_q2_K_8"},
        {kQ3_K, "mul_mat_q3_K_1", "mul_mat_q3_K_8", "mul_mat_q3_K_1", "mul_mat_q3_K_8"},
        {kQ5_K, "mul_mat_q5_K_1", "mul_mat_q5_K_8", "mul_mat_q5_K_1", "mul_mat_q5_K_8"},
        {kQ8_K, "mul_mat_q8_K_1", "mul_mat_q8_K_8", "mul_mat_q8_K_1", "mul_mat_q8_K_8"},
        {kIQ2_XXS, "mul_mat_iq2_xxs_1", "mul_mat_iq2_xxs_8", "mul_mat_iq2_xxs_1", "mul_mat_iq2_xxs_8"},
        {kIQ2_XS, "mul_mat_iq2_xs_1", "mul_mat_iq2_xs_8", "mul_mat_iq2_xs_1", "mul_mat_iq2_xs_8"},
        {kIQ2_S, "mul_mat_iq2_s_1", "mul_mat_iq2_s_8", "mul_mat_iq2_s_1", "mul_mat_iq2_s_8"},
        {kIQ3_XXS, "mul_mat_iq3_xxs_1", "mul_mat_iq3_xxs_8", "mul_mat_iq3_xxs_1", "mul_mat_iq3_xxs_8"},
        {kIQ3_S, "mul_mat_iq3_s_1", "mul_mat_iq3_s_8", "mul_mat_iq3_s_1", "mul_mat_iq3_s_8"},
        {kIQ1_S, "mul_mat_iq1_s_1", "mul_mat_iq1_s_8", "mul_mat_iq1_s_1", "mul_mat_iq1_s_8"},
        {kIQ1_M, "mul_mat_iq1_m_1", "mul_mat_iq1_m_8", "mul_mat_iq1_m_1", "mul_mat_iq1_m_8"},
        {kIQ4_NL, "mul_mat_iq4_nl_1", "mul_mat_iq4_nl_8", "mul_mat_iq4_nl_1", "mul_mat_iq4_nl_8"},
        {kIQ4_XS, "mul_mat_iq4_xs_1", "mul_mat_iq4_xs_8", "mul_mat_iq4_xs_1", "mul_mat_iq4_xs_8"},
        {kTQ1_0, "mul_mat_tq1_0_1", "mul_mat_tq1_0_8", "mul_mat_tq1_0_1", "mul_mat_tq1_0_8"},
        {kTQ2_0, "mul_mat_tq2_0_1", "mul_mat_tq2_0_8", "mul_mat_tq2_0_1", "mul_mat_tq2_0_8"},
        {kMXFP4, "mul_mat_mxfp4_1", "mul_mat_mxfp4_8", "mul_mat_mxfp4_1", "mul_mat_mxfp4_8"},
        {kNVFP4, "mul_mat_nvfp4_1", "mul_mat_nvfp4_8", "mul_mat_nvfp4_1", "mul_mat_nvfp4_8"},
        {kQ1_0, "mul_mat_q1_0_1", "mul_mat_q1_0_8", "mul_mat_q1_0_1", "mul_mat_q1_0_8"},
        {kQ2_0, "mul_mat_q2_0_1", "mul_mat_q2_0_8", "mul_mat_q2_0_1", "mul_mat_q2_0_8"},
    };
    Launch out;
    if ((a.x.type != kF32 && a.x.type != kF16 && a.x.type != kBF16) || a.y.type != kF32) return out;
    const i64 cols = a.x.ne[1] == 1 ? 1 : 8, y = (a.x.ne[1] + cols - 1) / cols, z = a.x.ne[2] * a.x.ne[3];
    if (y > 65535 || z > 65535) return out;
    for (const Row& row : kRows)
        if (row.type == a.w.type) out.kernel = a.w.repacked ? (cols == 1 ? row.repacked_1 : row.repacked_8) : (cols == 1 ? row.host_1 : row.host_8);
    out.grid[0] = (u32)((a.w.n + kRowsPerBlock - 1) / kRowsPerBlock);
    out.grid[1] = (u32)y;
    out.grid[2] = (u32)z;
    out.block[0] = 32;
    out.block[1] = kRowsPerBlock;
    return out;
}

inline Launch out_prod_launch(const MulMatArgs& a, Arch arch) {
    if (!is_float_type(a.x.type) || a.y.type != kF32) return {};
    return per_element_launch("out_prod", a.y, arch);
}

}  // namespace ggml_tp
