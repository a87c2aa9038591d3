// Launch settings of rows.cu.
#pragma once
#include "grid_stride.h"
#include "weight_format.h"

namespace ggml_tp {

inline Launch get_rows_launch(const GetRowsArgs& a, Arch arch) {
    if (a.idx.type != kI32 || a.y.ne[1] != a.idx.ne[0]) return {};
    if (a.w_view.type == kI32 && a.y.type == kI32) return per_element_launch("get_rows_i32", a.y, arch);
    if (!find_weight_format(a.w.type) || a.y.type != kF32) return {};
    return per_element_launch("get_rows", a.y, arch);
}
inline Launch set_rows_launch(const SetRowsArgs& a, Arch arch) {
    if (!is_float_type(a.x.type) || (a.idx.type != kI32 && a.idx.type != kI64) || a.idx.ne[1] == 0 || a.idx.ne[2] == 0) return {};
    if (a.block_elems > 1 && can_search_block(a.y.type)) return per_element_launch("set_rows_search", a.x, arch);
    if (a.block_elems > 1) return can_quantize_block(a.y.type) ? per_element_launch("set_rows_blocks", a.x, arch) : Launch{};
    return is_float_type(a.y.type) ? per_element_launch("set_rows", a.x, arch) : Launch{};
}

}  // namespace ggml_tp
