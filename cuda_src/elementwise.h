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
    kSgn,
    kStep,
    kElu,
    kHardSigmoid,
    kHardSwish,
    kExpm1,
    kSoftplus,
    kXielu,
    kFloor,
    kCeil,
    kRound,
    kTrunc,
    kLog,
    kSin,
    kCos,
    kLeakyRelu,
};
enum class GluOp { kSwiglu, kGeglu, kReglu, kSwigluOai, kGegluErf, kGegluQuick, kSwigluClamp };

inline constexpr const char* kBinaryKernels[] = {"binary_add", "binary_sub", "binary_mul", "binary_div"};
inline constexpr const char* kUnaryKernels[] = {
    "unary_scale", "unary_silu",        "unary_gelu",      "unary_gelu_quick", "unary_gelu_erf", "unary_relu",       "unary_sigmoid", "unary_tanh",
    "unary_neg",   "unary_abs",         "unary_exp",       "unary_sqr",        "unary_sqrt",     "unary_clamp",      "unary_sgn",     "unary_step",
    "unary_elu",   "unary_hardsigmoid", "unary_hardswish", "unary_expm1",      "unary_softplus", "unary_xielu",      "unary_floor",   "unary_ceil",
    "unary_round", "unary_trunc",       "unary_log",       "unary_sin",        "unary_cos",      "unary_leaky_relu",
};
inline constexpr const char* kGluKernels[] = {
    "glu_swiglu", "glu_geglu", "glu_reglu", "glu_swiglu_oai", "glu_geglu_erf", "glu_geglu_quick", "glu_swiglu_clamp",
};
inline constexpr const char* kFusedGluKernels[] = {
    "fused_glu_swiglu", "fused_glu_geglu", "fused_glu_reglu", "fused_glu_swiglu_oai", "fused_glu_geglu_erf", "fused_glu_geglu_quick", "fused_glu_swiglu_clamp",
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

/// `kernel`: that of the plain GLU. Rows of F32 side by side, quantised in whole blocks of 32 of which they may fill a part.
inline Launch fused_glu_launch(const char* kernel, const FusedGluArgs& args, Arch) {
    const GluArgs& g = args.glu;
    Launch l;
    auto fits = [](const View& v) {
        return v.type == kF32 && v.nb[0] == 4 && (u64)v.data % 16 == 0 && v.nb[1] % 16 == 0 && v.nb[2] % 16 == 0 && v.nb[3] % 16 == 0;
    };
    if (!fits(g.a) || !fits(g.b) || !fits(g.y)) return l;
    const i64 rows = n_rows(g.y), blocks = (args.k / 4 + kElementThreads - 1) / kElementThreads;
    if (!pieces_in_words(args.a) || !pieces_in_words(args.b) || ((args.a.n || args.b.n) && g.y.ne[2] * g.y.ne[3] != 1)) return l;
    if (args.k % 32 || g.y.ne[0] % 4 || args.k_begin % 4 || rows <= 0 || rows > 0x7fffffff || blocks > 65535) return l;
    for (const char* fused : kFusedGluKernels) {
        const char* const plain = fused + 6;  // behind "fused_"
        bool same = true;
        for (int i = 0; same && (plain[i] || kernel[i]); ++i) same = plain[i] == kernel[i];
        if (same) l.kernel = fused;
    }
    l.grid[0] = (u32)rows;
    l.grid[1] = (u32)blocks;
    l.block[0] = kElementThreads;
    return l;
}

inline Launch fill_launch(const FillArgs& args, Arch) {
    if (!is_float_type(args.y.type) && args.y.type != kI32) return {};
    return element_launch("fill", args.y.ne[0], n_rows(args.y));
}

}  // namespace ggml_tp
