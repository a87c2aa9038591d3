// One row per weight type: how a block of the host's layout falls apart into fields. Source: ggml-common.h's block structs
// (sizes and field order are part of the GGUF format). A row of a repacked shard keeps each field in a plane of its own, so uploading is
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
    {kQ4_1, "q4_1", 32, 20, 2, {{4, 16}, {0, 4}}},                             // quants, {d, m}
    {kQ5_0, "q5_0", 32, 22, 3, {{6, 16}, {2, 4}, {0, 2}}},                     // low 4 bits, high bit, scale
    {kQ5_1, "q5_1", 32, 24, 3, {{8, 16}, {4, 4}, {0, 4}}},                     // low 4 bits, high bit, {d, m}
    {kQ8_0, "q8_0", 32, 34, 2, {{2, 32}, {0, 2}}},                             // quants, scale
    {kQ8_1, "q8_1", 32, 36, 2, {{4, 32}, {0, 4}}},                             // quants, {d, d * sum}
    {kQ2_K, "q2_K", 256, 84, 3, {{16, 64}, {0, 16}, {80, 4}}},                 // quants, 4-bit scales and mins, {d, dmin}
    {kQ3_K, "q3_K", 256, 110, 4, {{32, 64}, {0, 32}, {96, 12}, {108, 2}}},     // low 2 bits, high bit, 6-bit scales, d
    {kQ4_K, "q4_K", 256, 144, 2, {{16, 128}, {0, 16}}},                        // quants; d, dmin, 12 bytes of 6-bit scales and mins
    {kQ5_K, "q5_K", 256, 176, 3, {{48, 128}, {16, 32}, {0, 16}}},              // low 4 bits, high bit; d, dmin, 12 bytes of 6-bit scales and mins
    {kQ6_K, "q6_K", 256, 210, 4, {{0, 128}, {128, 64}, {192, 16}, {208, 2}}},  // low 4 bits, high 2 bits, scales, d
    {kQ8_K, "q8_K", 256, 292, 3, {{4, 256}, {260, 32}, {0, 4}}},               // quants, their sums, f32 scale
    {kIQ2_XXS, "iq2_xxs", 256, 66, 2, {{2, 64}, {0, 2}}},                      // grid numbers, signs and scales of 32; d
    {kIQ2_XS, "iq2_xs", 256, 74, 3, {{2, 64}, {66, 8}, {0, 2}}},               // grid numbers and signs, scales, d
    {kIQ2_S, "iq2_s", 256, 82, 4, {{2, 64}, {66, 8}, {74, 8}, {0, 2}}},        // grid numbers then signs, high bits, scales, d
    {kIQ3_XXS, "iq3_xxs", 256, 98, 2, {{2, 96}, {0, 2}}},                      // grid numbers, then signs and scales; d
    {kIQ3_S, "iq3_s", 256, 110, 4, {{2, 64}, {66, 8}, {74, 36}, {0, 2}}},      // grid numbers, high bits, 32 of signs then 4 of scales, d
    {kIQ1_S, "iq1_s", 256, 50, 3, {{2, 32}, {34, 16}, {0, 2}}},                // grid numbers; high bits, shift and scale; d
    {kIQ1_M, "iq1_m", 256, 56, 3, {{0, 32}, {32, 16}, {48, 8}}},               // grid numbers, high bits and shifts, scales with d's bits
    {kIQ4_NL, "iq4_nl", 32, 18, 2, {{2, 16}, {0, 2}}},                         // quants, scale
    {kIQ4_XS, "iq4_xs", 256, 136, 2, {{8, 128}, {0, 8}}},                      // quants; d, scales' high 2 bits, low 4 bits
    {kTQ1_0, "tq1_0", 256, 54, 3, {{0, 48}, {48, 4}, {52, 2}}},                // five trits a byte, four trits a byte, d
    {kTQ2_0, "tq2_0", 256, 66, 2, {{0, 64}, {64, 2}}},                         // quants, d
    {kMXFP4, "mxfp4", 32, 17, 2, {{1, 16}, {0, 1}}},                           // quants, exponent
    {kNVFP4, "nvfp4", 64, 36, 2, {{4, 32}, {0, 4}}},                           // quants, 8-bit scales of 16
    {kQ1_0, "q1_0", 128, 18, 2, {{2, 16}, {0, 2}}},                            // signs, d
    {kQ2_0, "q2_0", 64, 18, 2, {{2, 16}, {0, 2}}},                             // quants, d
};

constexpr const WeightFormat* find_weight_format(i32 type) {
    for (const WeightFormat& f : kWeightFormats)
        if (f.type == type) return &f;
    return nullptr;
}

/// Types whose quants are numbers of a grid's entries (grid_piece.h): a row of each table of kernels, by their names.
#define TP_GRID_TYPES(ROW) \
    ROW(iq2_xxs, kIQ2_XXS) \
    ROW(iq2_xs, kIQ2_XS)   \
    ROW(iq2_s, kIQ2_S)     \
    ROW(iq3_xxs, kIQ3_XXS) \
    ROW(iq3_s, kIQ3_S)     \
    ROW(iq1_s, kIQ1_S)     \
    ROW(iq1_m, kIQ1_M)
/// Types that are multiplied in their own integers, with int8 activations, in pieces of few columns (vec_piece.h, grid_piece.h), and that are strips of
/// halves for tensor cores (tile_piece.h).
#define TP_PIECE_TYPES(ROW) \
    ROW(q4_0, kQ4_0)        \
    ROW(q8_0, kQ8_0)        \
    ROW(q4_K, kQ4_K)        \
    ROW(q6_K, kQ6_K)        \
    ROW(q4_1, kQ4_1)        \
    ROW(q5_0, kQ5_0)        \
    ROW(q5_1, kQ5_1)        \
    ROW(q2_K, kQ2_K)        \
    ROW(q3_K, kQ3_K)        \
    ROW(q5_K, kQ5_K)        \
    ROW(iq4_nl, kIQ4_NL)    \
    ROW(iq4_xs, kIQ4_XS)    \
    ROW(tq2_0, kTQ2_0)      \
    ROW(mxfp4, kMXFP4)      \
    ROW(nvfp4, kNVFP4)      \
    TP_GRID_TYPES(ROW)
/// And those of two bytes, which tensor cores multiply as they are.
#define TP_TILE_TYPES(ROW) TP_PIECE_TYPES(ROW) ROW(f16, kF16) ROW(bf16, kBF16)

constexpr bool has_grid(i32 type) {
#define TP_IS(name, type_of) || type == type_of
    return false TP_GRID_TYPES(TP_IS);
#undef TP_IS
}
constexpr bool has_pieces(i32 type) {
#define TP_IS(name, type_of) || type == type_of
    return false TP_PIECE_TYPES(TP_IS);
#undef TP_IS
}
/// Of those, types with products of the host's layout and of many columns before tensor cores (tp_dot32).
constexpr bool has_dots(i32 type) { return type == kQ4_0 || type == kQ8_0 || type == kQ4_K || type == kQ6_K; }

/// Whether quantize_search.h writes the type: its encoder searches.
constexpr bool can_search_block(i32 type) { return type == kQ2_K || type == kQ3_K || type == kQ4_K || type == kQ5_K || type == kQ6_K || type == kIQ4_XS; }
/// Whether quantize_block.h writes the type. Neither file has those that need an importance matrix (IQ1 to IQ3), which hosts do not write either.
constexpr bool can_quantize_block(i32 type) {
    return type == kQ4_0 || type == kQ4_1 || type == kQ5_0 || type == kQ5_1 || type == kQ8_0 || type == kIQ4_NL || type == kMXFP4 || type == kNVFP4 ||
           type == kQ1_0 || type == kQ2_0 || type == kTQ1_0 || type == kTQ2_0;
}

}  // namespace ggml_tp
