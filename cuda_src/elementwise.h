// Element-wise ops: which kernel and grid. Views may have any strides; F32, F16 and BF16 in any mix.
#pragma once
#include "rows_grid.h"

namespace ggml_tp {

enum class BinaryOp { kAdd, kSub, kMul, kDiv };
enum class UnaryOp {
    kScale,
    kSilu,
    kGelu,
    kGeluQuick,
    kGeluErf,
    kRelu,
    kSigmoid,
    kTanh,
    kNeg,
    kAbs,
    kExp,
    kSqr,
    kSqrt,
    kClamp,
};
enum class GluOp { kSwiglu, kGeglu, kReglu, kSwigluOai, kGegluErf, kGegluQuick };

inline constexpr const char* kBinaryKernels[] = {"binary_add", "binary_sub", "binary_mul", "binary_div"};
inline constexpr const char* kUnaryKernels[] = {
    "unary_scale", "unary_silu", "unary_gelu", "unary_gelu_quick", "unary_gelu_erf", "unary_relu", "unary_sigmoid",
    "unary_tanh",  "unary_neg",  "unary_abs",  "unary_exp",        "unary_sqr",      "unary_sqrt", "unary_clamp",
};
inline constexpr const char* kGluKernels[] = {
    "glu_swiglu", "glu_geglu", "glu_reglu", "glu_swiglu_oai", "glu_geglu_erf", "glu_geglu_quick",
};

/// y has a's shape; each extent of b divides a's.
inline Launch binary_launch(BinaryOp op, const BinaryArgs& args, Arch) {
    const View &a = args.a, &b = args.b, &y = args.y;
    if (!is_float_type(a.type) || !is_float_type(b.type) || !is_float_type(y.type) || !same_shape(a, y)) return {};
    for (int i = 0; i < 4; i++)
        if (b.ne[i] <= 0 || a.ne[i] % b.ne[i] != 0) return {};
    return element_launch(kBinaryKernels[(int)op], y.ne[0], n_rows(y));
}

inline Launch unary_launch(UnaryOp op, const UnaryArgs& args, Arch) {
    if (!is_float_type(args.x.type) || !is_float_type(args.y.type) || !same_shape(args.x, args.y)) return {};
    return element_launch(kUnaryKernels[(int)op], args.y.ne[0], n_rows(args.y));
}

inline Launch glu_launch(GluOp op, const GluArgs& args, Arch) {
    const View &a = args.a, &b = args.b, &y = args.y;
    if (!is_float_type(a.type) || !is_float_type(b.type) || !is_float_type(y.type)) return {};
    if (!same_shape(a, y) || !same_shape(b, y)) return {};
    return element_launch(kGluKernels[(int)op], y.ne[0], n_rows(y));
}

inline Launch fill_launch(const FillArgs& args, Arch) {
    if (!is_float_type(args.y.type) && args.y.type != kI32) return {};
    return element_launch("fill", args.y.ne[0], n_rows(args.y));
}

}  // namespace ggml_tp
