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

}  // namespace ggml_tp
