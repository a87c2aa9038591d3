// Launch settings for kernels that stride over all elements with a one-dimensional grid.
#pragma once
#include "rows_grid.h"

namespace ggml_tp {

/// One thread per element, 256 to a block, at most 16 blocks per multiprocessor.
inline Launch per_element_launch(const char* kernel, const View& y, Arch arch) {
    const i64 blocks = (n_elements(y) + 255) / 256, most = arch.n_sm > 0 ? (i64)arch.n_sm * 16 : 16;
    Launch out;
    out.kernel = kernel;
    out.grid[0] = (u32)(blocks < 1 ? 1 : blocks < most ? blocks : most);
    out.block[0] = 256;
    return out;
}

}  // namespace ggml_tp
