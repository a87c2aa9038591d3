// Element-wise ops, one thread per element. They are bound by memory (prefill) or by the launch (decode), so 4-byte coalesced
// accesses do. Arithmetic is f32 whatever the types. y may be a (or b where b is not broadcast): a thread touches one element.
#include "elementwise.h"

#include "activation.h"
#include "element.h"
#include "quantize_group.h"

namespace ggml_tp {
namespace {

/// Calls f(index) for this thread's element of y; see element_launch.
template <class F>
TP_DEVICE void for_my_element(const View& y, F f) {
    const i64 i0 = (i64)blockIdx.y * blockDim.x + threadIdx.x;
    const i64 row = (i64)blockIdx.x * blockDim.y + threadIdx.y;
    if (i0 >= y.ne[0] || row >= y.ne[1] * y.ne[2] * y.ne[3]) return;
    Index i = row_index((u32)row, y.ne);
    i.i0 = i0;
    f(i);
}

/// Four elements a thread; grid: (rows, elements / 1024).
template <GluOp op>
TP_DEVICE void fused_glu(const FusedGluArgs& args) {
    const GluArgs& g = args.glu;
    const i64 at = ((i64)blockIdx.y * blockDim.x + threadIdx.x) * 4, i = at - args.k_begin;
    const Index row = row_index(blockIdx.x, g.y.ne);
    float v[4] = {};
    if (i >= 0 && i < g.y.ne[0]) {
        float a[4], b[4];
        if (args.a.n) sum_four(args.a, blockIdx.x, i, element_at(g.a, row) + i * 4, a);
        else load_four(element_at(g.a, row) + i * 4, a);
        if (args.b.n) sum_four(args.b, blockIdx.x, i, element_at(g.b, row) + i * 4, b);
        else load_four(element_at(g.b, row) + i * 4, b);
        for (int e = 0; e < 4; ++e) v[e] = glu_of(op, a[e], b[e], g.alpha, g.limit);
        store_four(element_at(g.y, row) + i * 4, v);
    }
    leave_four(args.form, v, at, at < args.k, args.xq, args.xd, blockIdx.x, args.k);
}

}  // namespace
}  // namespace ggml_tp

using namespace ggml_tp;

#define BINARY(name, op)                                                                                                                               \
    TP_KERNEL(binary_##name, BinaryArgs, 256) {                                                                                                        \
        for_my_element(args.y, [&](const Index& i) { store(args.y, i, binary_of(BinaryOp::op, load(args.a, i), load(args.b, wrap(i, args.b.ne)))); }); \
    }
BINARY(add, kAdd)
BINARY(sub, kSub)
BINARY(mul, kMul)
BINARY(div, kDiv)

#define UNARY(name, op)                                                                                                                                \
    TP_KERNEL(unary_##name, UnaryArgs, 256) {                                                                                                          \
        for_my_element(args.y, [&](const Index& i) { store(args.y, i, unary_of(UnaryOp::op, load(args.x, i), args.p0, args.p1, args.p2, args.p3)); }); \
    }
UNARY(scale, kScale)
UNARY(silu, kSilu)
UNARY(gelu, kGelu)
UNARY(gelu_quick, kGeluQuick)
UNARY(gelu_erf, kGeluErf)
UNARY(relu, kRelu)
UNARY(sigmoid, kSigmoid)
UNARY(tanh, kTanh)
UNARY(neg, kNeg)
UNARY(abs, kAbs)
UNARY(exp, kExp)
UNARY(sqr, kSqr)
UNARY(sqrt, kSqrt)
UNARY(clamp, kClamp)
UNARY(sgn, kSgn)
UNARY(step, kStep)
UNARY(elu, kElu)
UNARY(hardsigmoid, kHardSigmoid)
UNARY(hardswish, kHardSwish)
UNARY(expm1, kExpm1)
UNARY(softplus, kSoftplus)
UNARY(xielu, kXielu)
UNARY(floor, kFloor)
UNARY(ceil, kCeil)
UNARY(round, kRound)
UNARY(trunc, kTrunc)
UNARY(log, kLog)
UNARY(sin, kSin)
UNARY(cos, kCos)
UNARY(leaky_relu, kLeakyRelu)

#define GLU(name, op)                                                                                                                                   \
    TP_KERNEL(glu_##name, GluArgs, 256) {                                                                                                               \
        for_my_element(args.y, [&](const Index& i) { store(args.y, i, glu_of(GluOp::op, load(args.a, i), load(args.b, i), args.alpha, args.limit)); }); \
    }                                                                                                                                                   \
    TP_KERNEL(fused_glu_##name, FusedGluArgs, 256) { fused_glu<GluOp::op>(args); }
GLU(swiglu, kSwiglu)
GLU(geglu, kGeglu)
GLU(reglu, kReglu)
GLU(swiglu_oai, kSwigluOai)
GLU(geglu_erf, kGegluErf)
GLU(geglu_quick, kGegluQuick)
GLU(swiglu_clamp, kSwigluClamp)

TP_KERNEL(fill, FillArgs, 256) {
    for_my_element(args.y, [&](const Index& i) { store(args.y, i, args.value); });
}
