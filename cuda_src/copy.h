// Launch settings of copy.cu.
#pragma once
#include "grid_stride.h"

namespace ggml_tp {

inline Launch copy_launch(const CopyArgs& a, Arch arch) {
    const bool same = a.x.type == a.y.type && (is_float_type(a.x.type) || a.x.type == kI32);
    if (!same && (!is_float_type(a.x.type) || !is_float_type(a.y.type))) return {};
    return per_element_launch("copy", a.y, arch);
}

}  // namespace ggml_tp
