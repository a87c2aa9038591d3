// Launch settings of copy.cu.
#pragma once
#include "grid_stride.h"
#include "weight_format.h"

namespace ggml_tp {

constexpr bool is_plain_type(i32 type) { return is_float_type(type) || type == kI32; }
/// Elements of a block, and its bytes, of types that are moved but not read: 1 element.
constexpr i64 block_elems(i32 type) {
    const WeightFormat* format = find_weight_format(type);
    return format ? format->block_elems : 1;
}
constexpr i32 unit_bytes(i32 type) {
    if (const WeightFormat* format = find_weight_format(type)) return format->block_bytes;
    return type == kI8 ? 1 : type == kI16 ? 2 : type == kI32 ? 4 : type == kI64 ? 8 : 0;
}

/// Between plain types.
inline Launch copy_launch(const CopyArgs& a, Arch arch) {
    if (!is_plain_type(a.x.type) || !is_plain_type(a.y.type)) return {};
    return per_element_launch("copy", a.y, arch);
}
/// The first n pieces; most_bytes: of the largest.
inline Launch copy_inputs_launch(int n, i64 most_bytes) {
    const i64 blocks = (most_bytes + 256 * 16 - 1) / (256 * 16);
    Launch out;
    out.kernel = "copy_inputs";
    out.grid[0] = (u32)(blocks < 1 ? 1 : blocks);
    out.grid[1] = (u32)n;
    out.block[0] = 256;
    return out;
}
/// One type, blocks and integers of all widths. x and y count elements.
inline CopyUnitsArgs copy_units_args(View x, View y) {
    CopyUnitsArgs a{x, y, unit_bytes(x.type), 0};
    a.x.ne[0] /= block_elems(x.type);
    a.y.ne[0] /= block_elems(y.type);
    return a;
}
inline Launch copy_units_launch(const CopyUnitsArgs& a, Arch arch) {
    if (a.x.type != a.y.type || !a.bytes) return {};
    return per_element_launch("copy_units", a.y, arch);
}
inline Launch copy_from_blocks_launch(const CopyBlocksArgs& a, Arch arch) {
    if (!find_weight_format(a.x.type) || !is_plain_type(a.y.type)) return {};
    return per_element_launch("copy_from_blocks", a.y, arch);
}
/// y counts blocks.
inline Launch copy_to_blocks_launch(const CopyArgs& a, Arch arch) {
    if (!is_plain_type(a.x.type)) return {};
    if (can_search_block(a.y.type)) return per_element_launch("copy_to_search", a.y, arch);
    return can_quantize_block(a.y.type) ? per_element_launch("copy_to_blocks", a.y, arch) : Launch{};
}

}  // namespace ggml_tp
