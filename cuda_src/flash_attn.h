// Launch settings of flash_attn.cu.
#pragma once
#include "grid_stride.h"

namespace ggml_tp {

inline Launch flash_attn_launch(const FlashAttnArgs& a, Arch) {
    Launch out;
    if (a.q.type != kF32 || a.y.type != kF32 || !is_float_type(a.k.type) || !is_float_type(a.v.type) ||
        (a.has_mask && a.mask.type != kF16 && a.mask.type != kF32))
        return out;
    if (a.q.ne[0] > 576 || a.v.ne[0] > 576 || a.q.ne[2] > 65535 || a.q.ne[3] > 65535) return out;
    out.kernel = "flash_attn";
    for (int d = 0; d < 3; ++d) out.grid[d] = (u32)a.q.ne[d + 1];
    out.block[0] = 32;
    return out;
}

}  // namespace ggml_tp
