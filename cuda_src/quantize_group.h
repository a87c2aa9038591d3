// Activations to int8 by the kernel that computes them: a thread holds four neighbouring elements, eight threads a block of 32.
// The same arithmetic as quantize.cu, bit for bit.
#pragma once
#include "tp.h"

namespace ggml_tp {

/// Element `at` (a multiple of 4) of a row and the three after it; all 32 lanes of a warp call it. Lanes beyond the row (`inside` false) hold
/// zeros and write nothing. xq: the row's int8, xd: its {scale, scale * sum} per 32.
TP_DEVICE void quantize_four(const float (&v)[4], i64 at, bool inside, char* xq, char* xd) {
    float most = fmaxf(fmaxf(fabsf(v[0]), fabsf(v[1])), fmaxf(fabsf(v[2]), fabsf(v[3])));
#pragma unroll
    for (int o = 1; o < 8; o *= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, o));
    const float d = most / 127.0f;
    float sum = 0;
    int word = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float q = d > 0 ? rintf(v[i] / d) : 0.0f;
        sum += q;
        word |= ((int)q & 255) << 8 * i;
    }
#pragma unroll
    for (int o = 1; o < 8; o *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, o);
    if (!inside) return;
    *(int*)(xq + at) = word;
    if (at % 32 == 0) {
        float* out = (float*)xd + at / 32 * 2;
        out[0] = d;
        out[1] = d * sum;
    }
}

}  // namespace ggml_tp
