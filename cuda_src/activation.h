// What activations make of a float, in the arithmetic that is the same wherever they are fused in.
#pragma once
#include "elementwise.h"
#include "tp.h"

namespace ggml_tp {

TP_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
TP_DEVICE float silu(float x) { return x / (1.0f + expf(-x)); }
TP_DEVICE float gelu(float x) { return 0.5f * x * (1.0f + tanhf(0.79788456080286535588f * x * (1.0f + 0.044715f * x * x))); }
TP_DEVICE float gelu_quick(float x) { return x / (1.0f + expf(-1.702f * x)); }
TP_DEVICE float gelu_erf(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678118654752440f)); }
TP_DEVICE float relu(float x) { return x > 0.0f ? x : 0.0f; }
TP_DEVICE float clamp(float x, float lo, float hi) { return x < lo ? lo : x > hi ? hi : x; }

TP_DEVICE float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }
TP_DEVICE float hardsigmoid(float x) { return fminf(1.0f, fmaxf(0.0f, (x + 3.0f) / 6.0f)); }

/// gpt-oss: the gate is clamped from above, the up half from both sides and shifted by one.
TP_DEVICE float swiglu_oai(float gate, float up, float alpha, float limit) {
    const float a = fminf(gate, limit);
    return a / (1.0f + expf(-alpha * a)) * (clamp(up, -limit, limit) + 1.0f);
}

/// A gated linear unit.
TP_DEVICE float glu_of(GluOp op, float gate, float up, float alpha, float limit) {
    switch (op) {
        case GluOp::kSwiglu: return silu(gate) * up;
        case GluOp::kGeglu: return gelu(gate) * up;
        case GluOp::kReglu: return relu(gate) * up;
        case GluOp::kSwigluOai: return swiglu_oai(gate, up, alpha, limit);
        case GluOp::kGegluErf: return gelu_erf(gate) * up;
        case GluOp::kGegluQuick: return gelu_quick(gate) * up;
        case GluOp::kSwigluClamp: return silu(fminf(gate, limit)) * clamp(up, -limit, limit);
    }
    return 0;
}

/// An element-wise op of one operand; p0 to p3 as UnaryArgs has them.
TP_DEVICE float unary_of(UnaryOp op, float x, float p0, float p1, float p2, float p3) {
    switch (op) {
        case UnaryOp::kScale: return x * p0 + p1;
        case UnaryOp::kSilu: return silu(x);
        case UnaryOp::kGelu: return gelu(x);
        case UnaryOp::kGeluQuick: return gelu_quick(x);
        case UnaryOp::kGeluErf: return gelu_erf(x);
        case UnaryOp::kRelu: return relu(x);
        case UnaryOp::kSigmoid: return sigmoid(x);
        case UnaryOp::kTanh: return tanhf(x);
        case UnaryOp::kNeg: return -x;
        case UnaryOp::kAbs: return fabsf(x);
        case UnaryOp::kExp: return expf(x);
        case UnaryOp::kSqr: return x * x;
        case UnaryOp::kSqrt: return sqrtf(x);
        case UnaryOp::kClamp: return clamp(x, p0, p1);
        case UnaryOp::kSgn: return x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : 0.0f;
        case UnaryOp::kStep: return x > 0.0f ? 1.0f : 0.0f;
        case UnaryOp::kElu: return x > 0.0f ? x : expm1f(x);
        case UnaryOp::kHardSigmoid: return hardsigmoid(x);
        case UnaryOp::kHardSwish: return x * hardsigmoid(x);
        case UnaryOp::kExpm1: return expm1f(x);
        case UnaryOp::kSoftplus: return softplus(x);
        case UnaryOp::kXielu: return x > 0.0f ? p1 * x * x + p2 * x : (expm1f(fminf(x, p3)) - x) * p0 + p2 * x;
        case UnaryOp::kFloor: return floorf(x);
        case UnaryOp::kCeil: return ceilf(x);
        case UnaryOp::kRound: return roundf(x);
        case UnaryOp::kTrunc: return truncf(x);
        case UnaryOp::kLog: return logf(x);
        case UnaryOp::kSin: return sinf(x);
        case UnaryOp::kCos: return cosf(x);
        case UnaryOp::kLeakyRelu: return x > 0.0f ? x : p0 * x;
    }
    return 0;
}
TP_DEVICE float binary_of(BinaryOp op, float a, float b) {
    return op == BinaryOp::kAdd ? a + b : op == BinaryOp::kSub ? a - b : op == BinaryOp::kMul ? a * b : a / b;
}

}  // namespace ggml_tp
