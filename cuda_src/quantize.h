// Launch settings of quantize.cu.
#pragma once
#include "launch.h"

namespace ggml_tp {

inline Launch quantize_launch(const QuantizeArgs& a, Arch) {
    const i64 rows = a.x.ne[1] * a.x.ne[2] * a.x.ne[3];
    Launch out;
    if ((a.x.type != kF32 && a.x.type != kF16 && a.x.type != kBF16) || a.k % 32 || rows > 0x7fffffff || a.k > 65535 * 128) return out;
    out.kernel = "quantize_x";
    out.grid[0] = (u32)rows;
    out.grid[1] = (u32)((a.k / 32 + 3) / 4);
    out.block[0] = 32;
    out.block[1] = 4;
    return out;
}

/// To halves; k a multiple of 8.
inline Launch halve_launch(const QuantizeArgs& a, bool bf16, Arch) {
    const i64 rows = a.x.ne[1] * a.x.ne[2] * a.x.ne[3];
    Launch out;
    if (a.x.type != kF32 || a.k % 8 || rows > 0x7fffffff || a.k > 65535 * 512) return out;
    out.kernel = bf16 ? "bf16_x" : "half_x";
    out.grid[0] = (u32)rows;
    out.grid[1] = (u32)((a.k + 511) / 512);
    out.block[0] = 32;
    out.block[1] = 4;
    return out;
}

}  // namespace ggml_tp
