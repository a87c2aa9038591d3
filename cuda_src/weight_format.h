// One row per weight type: how a block of the host's layout falls apart into fields. Source: ggml-common.h's block structs
// (sizes and field order are part of the GGUF format). A repacked shard keeps each field in a plane of its own, so uploading is
// a byte permutation and get_tensor gives back exactly the bytes that were set.
#pragma once
#include "args.h"

namespace ggml_tp {

struct WeightField {
    i32 offset, bytes;
};
struct WeightFormat {
    Type type;
    const char* name;
    i32 block_elems, block_bytes, n_fields;
    WeightField field[4];
};

inline constexpr WeightFormat kWeightFormats[] = {
    {kF32, "f32", 1, 4, 1, {{0, 4}}},
    {kF16, "f16", 1, 2, 1, {{0, 2}}},
    {kBF16, "bf16", 1, 2, 1, {{0, 2}}},
    {kQ4_0, "q4_0", 32, 18, 2, {{2, 16}, {0, 2}}},                             // quants, scale
    {kQ8_0, "q8_0", 32, 34, 2, {{2, 32}, {0, 2}}},                             // quants, scale
    {kQ4_K, "q4_K", 256, 144, 3, {{16, 128}, {4, 12}, {0, 4}}},                // quants, 6-bit scales and mins, {d, dmin}
    {kQ6_K, "q6_K", 256, 210, 4, {{0, 128}, {128, 64}, {192, 16}, {208, 2}}},  // low 4 bits, high 2 bits, scales, d
};

constexpr const WeightFormat* find_weight_format(i32 type) {
    for (const WeightFormat& f : kWeightFormats)
        if (f.type == type) return &f;
    return nullptr;
}

}  // namespace ggml_tp
