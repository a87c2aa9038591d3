// What a kernel family tells the core: which kernel runs given arguments, with which grid. Pure functions, no CUDA.
#pragma once
#include "args.h"

namespace ggml_tp {

struct Launch {
    const char* kernel = nullptr;  // plain (extern "C") name; nullptr: this family cannot run these arguments
    u32 grid[3] = {1, 1, 1};
    u32 block[3] = {1, 1, 1};
    u32 shared_bytes = 0;      // dynamic
    bool cooperative = false;  // blocks wait for each other: all must be on the device at once
};

// Compute capability as major*100 + minor*10, as in __CUDA_ARCH__: 600, 610, 700, 750, 860, 900.
struct Arch {
    i32 cc;
    i32 n_sm;
    bool wgmma = false;  // the kernels that run there are those of sm_90a
};

}  // namespace ggml_tp
