// Launch settings of mul_mat.cu.
#pragma once
#include "launch.h"
#include "weight_format.h"

namespace ggml_tp {

constexpr int kRowsPerBlock = 4;

/// Quantised weights are multiplied with int8 activations (quantize.h makes them first).
inline bool mul_mat_needs_quantized_x(const Matrix& w, i64, Arch) {
    const WeightFormat* format = find_weight_format(w.type);
    return format && format->block_elems > 1;
}

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
    };
    Launch out;
    const bool x_ok = a.x.type == kF32 || (a.x.type == kF16 && !mul_mat_needs_quantized_x(a.w, 0, {}));
    if (!x_ok || a.y.type != kF32) return out;
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

}  // namespace ggml_tp
