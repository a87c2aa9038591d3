// Element-wise ops, one thread per element. They are bound by memory (prefill) or by the launch (decode), so 4-byte coalesced
// accesses do. Arithmetic is f32 whatever the types. y may be a (or b where b is not broadcast): a thread touches one element.
#include "elementwise.h"

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

TP_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
TP_DEVICE float silu(float x) { return x / (1.0f + expf(-x)); }
TP_DEVICE float gelu(float x) { return 0.5f * x * (1.0f + tanhf(0.79788456080286535588f * x * (1.0f + 0.044715f * x * x))); }
TP_DEVICE float gelu_quick(float x) { return x / (1.0f + expf(-1.702f * x)); }
TP_DEVICE float gelu_erf(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678118654752440f)); }
TP_DEVICE float relu(float x) { return x > 0.0f ? x : 0.0f; }
TP_DEVICE float hardsigmoid(float x) { return fminf(1.0f, fmaxf(0.0f, (x + 3.0f) / 6.0f)); }
TP_DEVICE float clamp(float x, float lo, float hi) { return x < lo ? lo : x > hi ? hi : x; }

}  // namespace
}  // namespace ggml_tp

using namespace ggml_tp;

#define BINARY(name, expression)                                                   \
    TP_KERNEL(binary_##name, BinaryArgs, 256) {                                    \
        for_my_element(args.y, [&](const Index& i) {                               \
            const float a = load(args.a, i), b = load(args.b, wrap(i, args.b.ne)); \
            store(args.y, i, expression);                                          \
        });                                                                        \
    }
BINARY(add, a + b)
BINARY(sub, a - b)
BINARY(mul, a* b)
BINARY(div, a / b)

#define UNARY(name, expression)                      \
    TP_KERNEL(unary_##name, UnaryArgs, 256) {        \
        for_my_element(args.y, [&](const Index& i) { \
            const float x = load(args.x, i);         \
            store(args.y, i, expression);            \
        });                                          \
    }
UNARY(scale, x* args.p0 + args.p1)
UNARY(silu, silu(x))
UNARY(gelu, gelu(x))
UNARY(gelu_quick, gelu_quick(x))
UNARY(gelu_erf, gelu_erf(x))
UNARY(relu, relu(x))
UNARY(sigmoid, sigmoid(x))
UNARY(tanh, tanhf(x))
UNARY(neg, -x)
UNARY(abs, fabsf(x))
UNARY(exp, expf(x))
UNARY(sqr, x* x)
UNARY(sqrt, sqrtf(x))
UNARY(clamp, clamp(x, args.p0, args.p1))
UNARY(sgn, x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : 0.0f)
UNARY(step, x > 0.0f ? 1.0f : 0.0f)
UNARY(elu, x > 0.0f ? x : expm1f(x))
UNARY(hardsigmoid, hardsigmoid(x))
UNARY(hardswish, x* hardsigmoid(x))
UNARY(expm1, expm1f(x))
UNARY(softplus, x > 20.0f ? x : log1pf(expf(x)))
UNARY(xielu, x > 0.0f ? args.p1 * x * x + args.p2 * x : (expm1f(fminf(x, args.p3)) - x) * args.p0 + args.p2 * x)
UNARY(floor, floorf(x))
UNARY(ceil, ceilf(x))
UNARY(round, roundf(x))
UNARY(trunc, truncf(x))
UNARY(log, logf(x))
UNARY(sin, sinf(x))
UNARY(cos, cosf(x))
UNARY(leaky_relu, x > 0.0f ? x : args.p0 * x)

#define GLU(name, expression)                                     \
    TP_KERNEL(glu_##name, GluArgs, 256) {                         \
        for_my_element(args.y, [&](const Index& i) {              \
            const float a = load(args.a, i), b = load(args.b, i); \
            store(args.y, i, expression);                         \
        });                                                       \
    }
GLU(swiglu, silu(a) * b)
GLU(geglu, gelu(a) * b)
GLU(reglu, relu(a) * b)
GLU(geglu_erf, gelu_erf(a) * b)
GLU(geglu_quick, gelu_quick(a) * b)

// gpt-oss: the gate is clamped from above, the up half from both sides and shifted by one.
TP_KERNEL(glu_swiglu_oai, GluArgs, 256) {
    for_my_element(args.y, [&](const Index& i) {
        const float a = fminf(load(args.a, i), args.limit);
        const float b = clamp(load(args.b, i), -args.limit, args.limit);
        store(args.y, i, a / (1.0f + expf(-args.alpha * a)) * (b + 1.0f));
    });
}

GLU(swiglu_clamp, silu(fminf(a, args.limit)) * clamp(b, -args.limit, args.limit))

// Four elements a thread; grid: (rows, elements / 1024).
#define FUSED_GLU(name, expression)                                                             \
    TP_KERNEL(fused_glu_##name, FusedGluArgs, 256) {                                            \
        const GluArgs& g = args.glu;                                                            \
        const i64 at = ((i64)blockIdx.y * blockDim.x + threadIdx.x) * 4, i = at - args.k_begin; \
        const Index row = row_index(blockIdx.x, g.y.ne);                                        \
        float v[4] = {};                                                                        \
        if (i >= 0 && i < g.y.ne[0]) {                                                          \
            float va[4], vb[4];                                                                 \
            load_four(element_at(g.a, row) + i * 4, va);                                        \
            load_four(element_at(g.b, row) + i * 4, vb);                                        \
            for (int e = 0; e < 4; ++e) {                                                       \
                const float a = va[e], b = vb[e];                                               \
                v[e] = expression;                                                              \
            }                                                                                   \
            store_four(element_at(g.y, row) + i * 4, v);                                        \
        }                                                                                       \
        leave_four(args.form, v, at, at < args.k, args.xq, args.xd, blockIdx.x, args.k);        \
    }
FUSED_GLU(swiglu, silu(a) * b)
FUSED_GLU(geglu, gelu(a) * b)
FUSED_GLU(reglu, relu(a) * b)

TP_KERNEL(fill, FillArgs, 256) {
    for_my_element(args.y, [&](const Index& i) { store(args.y, i, args.value); });
}
