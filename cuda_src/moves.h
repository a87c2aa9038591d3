// Launch settings of moves.cu.
#pragma once
#include "copy.h"

namespace ggml_tp {

/// x (and b) and y of one type that is moved as its bytes; blocks count as elements.
inline Launch move_launch(const char* kernel, const MoveArgs& a, Arch arch) {
    if (a.x.type != a.y.type || !a.bytes || n_elements(a.x) == 0) return {};
    return per_element_launch(kernel, a.y, arch);
}
/// Where constants are written too.
inline Launch move_or_fill_launch(const char* kernel, const MoveArgs& a, Arch arch) {
    return is_plain_type(a.y.type) ? move_launch(kernel, a, arch) : Launch{};
}
inline Launch concat_launch(const MoveArgs& a, Arch arch) { return a.b.type == a.y.type ? move_launch("concat", a, arch) : Launch{}; }
inline Launch arange_launch(const MoveArgs& a, Arch arch) { return is_plain_type(a.y.type) ? per_element_launch("arange", a.y, arch) : Launch{}; }

}  // namespace ggml_tp
