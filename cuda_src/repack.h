// Launch settings of repack.cu.
#pragma once
#include "launch.h"

namespace ggml_tp {

inline Launch repack_launch(const RepackArgs& a, Arch arch) {
    Launch out;
    out.kernel = "repack";
    const i64 blocks = (a.bytes + 255) / 256, most = (i64)arch.n_sm * 16;
    out.grid[0] = (u32)(blocks < most ? (blocks ? blocks : 1) : most);
    out.block[0] = 256;
    return out;
}

}  // namespace ggml_tp
