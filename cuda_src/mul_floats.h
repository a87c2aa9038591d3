// Launch settings of mul_floats.cu.
#pragma once
#include "launch.h"
#include "weight_format.h"

namespace ggml_tp {

constexpr int kFloatsTile = 32;                 // rows, and columns, of a block's tile of y
constexpr int kFloatsStep = 64;                 // of k in shared memory at a time: 8 for each of eight warps
constexpr int kFloatsStride = kFloatsStep + 4;  // floats between rows there: eight rows' 16 bytes meet no bank twice
constexpr int kFloatsThreads = 256;
constexpr i64 kFloatsLeast = 8;  // columns that mul_mat takes at a time

/// Whether a product is the kind that mul_floats computes: floats of any strides, more columns than one warp of mul_mat.
inline bool mul_floats_can(const MulMatArgs& a) {
    const bool plain = a.w.type == kF32 || a.w.type == kF16 || a.w.type == kBF16;
    return plain && a.x.type == kF32 && a.y.type == kF32 && a.x.ne[1] > kFloatsLeast;
}

inline Launch mul_floats_launch(const MulMatArgs& a, Arch) {
    struct Row {
        i32 type;
        const char* kernel;
    };
    static constexpr Row kRows[] = {{kF32, "mul_floats_f32"}, {kF16, "mul_floats_f16"}, {kBF16, "mul_floats_bf16"}};
    Launch out;
    const i64 y = (a.x.ne[1] + kFloatsTile - 1) / kFloatsTile, z = a.x.ne[2] * a.x.ne[3];
    if (y > 65535 || z > 65535) return out;
    for (const Row& row : kRows)
        if (row.type == a.w.type) out.kernel = row.kernel;
    out.grid[0] = (u32)((a.w.n + kFloatsTile - 1) / kFloatsTile);
    out.grid[1] = (u32)y;
    out.grid[2] = (u32)z;
    out.block[0] = kFloatsThreads;
    return out;
}

}  // namespace ggml_tp
