// Values to a block of a quantised type, in the host's layout: what SET_ROWS and CPY store. Rounding is that of upstream's
// quantize_row_*_ref (ggml-quants.c), operation by operation, so that a cache written here is the one that the CPU would write. Products
// are rounded before they are shifted: fused, ties among values that were halves before would fall differently.
#pragma once
#include "dequantize.h"

namespace ggml_tp {

/// In one store: as two bytes, ptxas 12.9 makes the low one of `st.u8` of a converted half a conversion to an integer (F2I.U8.F16), and every
/// scale was wrong on an H200. Blocks with halves begin at even addresses.
TP_DEVICE void tp_put_half(char* p, float v) { *(u16*)p = tp_float_to_half(v); }
TP_DEVICE int tp_least(int a, int b) { return a < b ? a : b; }
TP_DEVICE float tp_inverse(float d) { return d != 0.0f ? 1.0f / d : 0.0f; }

/// The nearest of kIq4Values.
TP_DEVICE int tp_nearest_iq4(float v) {
    if (v <= (float)kIq4Values[0]) return 0;
    if (v >= (float)kIq4Values[15]) return 15;
    int above = 1;
    while (v >= (float)kIq4Values[above]) ++above;
    return v - (float)kIq4Values[above - 1] < (float)kIq4Values[above] - v ? above - 1 : above;
}
/// The nearest 4-bit float times d (which is half of the scale), the first of equals.
TP_DEVICE int tp_nearest_fp4(float v, float d) {
    int best = 0;
    float least = fabsf(v);
    for (int i = 1; i < 16; ++i) {
        const float error = fabsf((float)tp_fp4_doubled(i) * d - v);
        if (error < least) best = i, least = error;
    }
    return best;
}
/// The nearest 8-bit scale (4 bits of exponent, 3 of mantissa) of v >= 0.
TP_DEVICE u8 tp_to_ue4m3(float v) {
    if (!(v > 0.0f)) return 0;
    v = fminf(v, 448.0f);
    const u32 bits = (u32)__float_as_int(v);
    int exponent = (int)(bits >> 23 & 255) - 120, mantissa = (int)(bits >> 20 & 7);
    if (exponent <= 0) return (u8)tp_least((int)(v * 512.0f + 0.5f), 7);
    if (exponent >= 15) return 0x7e;
    mantissa += bits >> 19 & 1;
    if (mantissa > 7) mantissa = 0, ++exponent;
    return exponent >= 15 ? (u8)0x7e : (u8)(exponent << 3 | mantissa);
}

/// The scale of 32 values on the grid of kIq4Values: least squares for the points nearest to them at `inverse` of a first guess.
template <class X>
TP_DEVICE float tp_iq4_scale(X x, float inverse) {
    float product = 0, square = 0;
    for (int i = 0; i < 32; ++i) {
        const float v = x(i), q = (float)kIq4Values[tp_nearest_iq4(inverse * v)], weight = v * v;
        product += weight * q * v;
        square += weight * q * q;
    }
    return square > 0 ? product / square : 0.0f;
}

/// Block `out` from values x(0), x(1), ...
template <class X>
TP_DEVICE void tp_quantize_block(int type, X x, char* out) {
    if (type == kQ4_0 || type == kQ5_0) {
        const int steps = type == kQ4_0 ? 8 : 16;
        float most = 0, max = 0;
        for (int i = 0; i < 32; ++i)
            if (most < fabsf(x(i))) most = fabsf(x(i)), max = x(i);
        const float d = max / (float)-steps, inverse = tp_inverse(d);
        tp_put_half(out, d);
        u32 high = 0;
        char* q = out + (type == kQ4_0 ? 2 : 6);
        for (int i = 0; i < 16; ++i) {
            const int a = tp_least(2 * steps - 1, (s8)(int)(tp_mul_rounded(x(i), inverse) + ((float)steps + 0.5f)));
            const int b = tp_least(2 * steps - 1, (s8)(int)(tp_mul_rounded(x(i + 16), inverse) + ((float)steps + 0.5f)));
            q[i] = (char)((a & 15) | (b & 15) << 4);
            high |= (u32)(a >> 4 & 1) << i | (u32)(b >> 4 & 1) << (i + 16);
        }
        if (type == kQ5_0)
            for (int i = 0; i < 4; ++i) out[2 + i] = (char)(high >> 8 * i & 255);
    } else if (type == kQ4_1 || type == kQ5_1) {
        const int levels = type == kQ4_1 ? 15 : 31;
        float min = x(0), max = x(0);
        for (int i = 1; i < 32; ++i) min = fminf(min, x(i)), max = fmaxf(max, x(i));
        const float d = (max - min) / (float)levels, inverse = tp_inverse(d);
        tp_put_half(out, d);
        tp_put_half(out + 2, min);
        u32 high = 0;
        char* q = out + (type == kQ4_1 ? 4 : 8);
        for (int i = 0; i < 16; ++i) {
            const int a = tp_least(levels, (int)(tp_mul_rounded(x(i) - min, inverse) + 0.5f)),
                      b = tp_least(levels, (int)(tp_mul_rounded(x(i + 16) - min, inverse) + 0.5f));
            q[i] = (char)((a & 15) | (b & 15) << 4);
            high |= (u32)(a >> 4) << i | (u32)(b >> 4) << (i + 16);
        }
        if (type == kQ5_1)
            for (int i = 0; i < 4; ++i) out[4 + i] = (char)(high >> 8 * i & 255);
    } else if (type == kQ8_0) {
        float most = 0;
        for (int i = 0; i < 32; ++i) most = fmaxf(most, fabsf(x(i)));
        const float inverse = most > 0.0f ? 127.0f / most : 0.0f;  // and halves to even, as the CPU's vector code does
        tp_put_half(out, most / 127.0f);
        for (int i = 0; i < 32; ++i) out[2 + i] = (char)(int)rintf(x(i) * inverse);
    } else if (type == kIQ4_NL) {
        float most = 0, max = 0;
        for (int i = 0; i < 32; ++i)
            if (fabsf(x(i)) > most) most = fabsf(x(i)), max = x(i);
        const float guess = max / (float)kIq4Values[0], inverse = most < 1e-15f ? 0.0f : 1.0f / guess;
        tp_put_half(out, most < 1e-15f ? 0.0f : tp_iq4_scale(x, inverse));
        for (int i = 0; i < 16; ++i) out[2 + i] = (char)(tp_nearest_iq4(inverse * x(i)) | tp_nearest_iq4(inverse * x(i + 16)) << 4);
    } else if (type == kMXFP4) {
        float most = 0;
        for (int i = 0; i < 32; ++i) most = fmaxf(most, fabsf(x(i)));
        const u8 e = most > 0.0f ? (u8)(int)(floorf(log2f(most)) - 2.0f + 127.0f) : (u8)0;
        const float d = tp_e8m0_half(e);
        out[0] = (char)e;
        for (int i = 0; i < 16; ++i) out[1 + i] = (char)(tp_nearest_fp4(x(i), d) | tp_nearest_fp4(x(i + 16), d) << 4);
    } else if (type == kNVFP4) {
        for (int s = 0; s < 4; ++s) {
            float most = 0;
            for (int i = 0; i < 16; ++i) most = fmaxf(most, fabsf(x(s * 16 + i)));
            const u8 e = tp_to_ue4m3(most / 6.0f);
            const float d = tp_ue4m3_half(e);
            out[s] = (char)e;
            for (int i = 0; i < 8; ++i) out[4 + s * 8 + i] = (char)(tp_nearest_fp4(x(s * 16 + i), d) | tp_nearest_fp4(x(s * 16 + 8 + i), d) << 4);
        }
    } else if (type == kQ1_0) {
        float sum = 0;
        for (int i = 0; i < 128; ++i) sum += fabsf(x(i));
        tp_put_half(out, sum / 128.0f);
        for (int byte = 0; byte < 16; ++byte) {
            int bits = 0;
            for (int i = 0; i < 8; ++i) bits |= (x(byte * 8 + i) >= 0.0f) << i;
            out[2 + byte] = (char)bits;
        }
    } else {  // Q2_0, TQ1_0, TQ2_0: steps of the largest magnitude
        const int n = type == kQ2_0 ? 64 : 256;
        float most = 0;
        for (int i = 0; i < n; ++i) most = fmaxf(most, fabsf(x(i)));
        const float inverse = tp_inverse(most);
        auto level = [&](int i) { return (int)roundf(x(i) * inverse) + 1; };
        if (type == kQ2_0) {
            tp_put_half(out, most);
            for (int byte = 0; byte < 16; ++byte) {
                int bits = 0;
                for (int i = 0; i < 4; ++i) bits |= tp_least(3, level(byte * 4 + i)) << 2 * i;
                out[2 + byte] = (char)bits;
            }
        } else if (type == kTQ2_0) {
            tp_put_half(out + 64, most);
            for (int byte = 0; byte < 64; ++byte) {
                int bits = 0;
                for (int i = 0; i < 4; ++i) bits |= (level(byte / 32 * 128 + byte % 32 + i * 32) & 3) << 2 * i;
                out[byte] = (char)bits;
            }
        } else {
            tp_put_half(out + 52, most);
            // A byte is the fraction (trits in base 3) / 243, rounded up, of 256.
            auto put = [&](int byte, int first, int step, int trits) {
                int q = 0;
                for (int t = 0; t < 5; ++t) q = q * 3 + (t < trits ? level(first + t * step) : 0);
                out[byte] = (char)((q * 256 + 242) / 243);
            };
            for (int byte = 0; byte < 32; ++byte) put(byte, byte, 32, 5);
            for (int byte = 0; byte < 16; ++byte) put(32 + byte, 160 + byte, 16, 5);
            for (int byte = 0; byte < 4; ++byte) put(48 + byte, 240 + byte, 4, 4);
        }
    }
}

}  // namespace ggml_tp
