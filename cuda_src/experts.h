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
        {kQ4_0, "mul_id_q4_0", "mul_id_q4_0_host"}, {kQ8_0, "mul_id_q8_0", "mul_id_q8_0_host"}, {kQ4_K, "mul_id_q4_K", "mul_id_q4_K_host"},
        {kQ6_K, "mul_id_q6_K", "mul_id_q6_K_host"}, {kF32, "mul_id_f32", "mul_id_f32"},         {kF16, "mul_id_f16", "mul_id_f16"},
        {kBF16, "mul_id_bf16", "mul_id_bf16"},
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

}  // namespace ggml_tp
