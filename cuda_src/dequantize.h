// Reading weights: one element of any type, and the dot product of 32 elements with int8 activations, per quantised type.
// Formulas: upstream's dequantize_row_* (ggml-quants.c). Fields are those of weight_format.h, in its order.
#pragma once
#include "codebooks.h"
#include "tp.h"

namespace ggml_tp {

// Blocks of the host's layout are only 2-byte aligned (18, 34, 210 bytes); planes of the repacked layout are 16-byte aligned.
template <bool kAligned>
TP_DEVICE int tp_load_word(const char* p) {
    if (kAligned) return *(const int*)p;
    const u16* h = (const u16*)p;
    return (int)(h[0] | (u32)h[1] << 16);
}
TP_DEVICE float tp_load_half(const char* p) { return tp_half_to_float(*(const u16*)p); }

// The 6-bit scale and min of sub-block j of a Q4_K block, packed in 12 bytes.
TP_DEVICE void tp_q4_k_scale(const char* packed, int j, int& scale, int& min) {
    const u8* q = (const u8*)packed;
    if (j < 4) {
        scale = q[j] & 63;
        min = q[j + 4] & 63;
    } else {
        scale = (q[j + 4] & 15) | (q[j - 4] >> 6) << 4;
        min = (q[j + 4] >> 4) | (q[j] >> 6) << 4;
    }
}

// One row of a matrix: fields of block b at plane[f] + b * block_stride[f].
struct WeightRow {
    const char* plane[4];
    i32 block_stride[4];
};
TP_DEVICE WeightRow tp_weight_row(const Matrix& m, i64 row, i64 i2, i64 i3) {
    WeightRow out;
    for (int f = 0; f < 4; ++f) {
        out.plane[f] = m.plane[f] + row * m.row_stride + i2 * m.nb2 + i3 * m.nb3;
        out.block_stride[f] = m.block_stride[f];
    }
    return out;
}

/// Sum over 32 elements (sub-block s of the row) of weight * x, where x = xq * xd.x and xd.y = xd.x * sum(xq).
template <int kType, bool kAligned>
TP_DEVICE float tp_dot32(const WeightRow& w, i64 s, const char* xq, float d, float d_sum) {
    const int* x = (const int*)xq;
    int sum = 0;
    if (kType == kQ4_0) {
        const char* q = w.plane[0] + s * w.block_stride[0];
        for (int i = 0; i < 4; ++i) {
            const int word = tp_load_word<kAligned>(q + 4 * i);
            sum = tp_dp4a(word & 0x0f0f0f0f, x[i], sum);
            sum = tp_dp4a(word >> 4 & 0x0f0f0f0f, x[i + 4], sum);
        }
        return tp_load_half(w.plane[1] + s * w.block_stride[1]) * ((float)sum * d - 8.0f * d_sum);
    }
    if (kType == kQ8_0) {
        const char* q = w.plane[0] + s * w.block_stride[0];
        for (int i = 0; i < 8; ++i) sum = tp_dp4a(tp_load_word<kAligned>(q + 4 * i), x[i], sum);
        return tp_load_half(w.plane[1] + s * w.block_stride[1]) * (float)sum * d;
    }
    const i64 b = s / 8;
    const int sub = (int)(s % 8);
    if (kType == kQ4_K) {
        const char* q = w.plane[0] + b * w.block_stride[0] + sub / 2 * 32;
        const int shift = sub % 2 * 4;
        for (int i = 0; i < 8; ++i) sum = tp_dp4a(tp_load_word<kAligned>(q + 4 * i) >> shift & 0x0f0f0f0f, x[i], sum);
        int scale, min;
        const char* dm = w.plane[1] + b * w.block_stride[1];
        tp_q4_k_scale(dm + 4, sub, scale, min);
        return tp_load_half(dm) * (float)scale * ((float)sum * d) - tp_load_half(dm + 2) * (float)min * d_sum;
    }
    // Q6_K: 4 low bits and 2 high bits, offset 32, a signed scale for each 16 elements.
    const int part = sub % 4;
    const char* low = w.plane[0] + b * w.block_stride[0] + sub / 4 * 64 + (part & 1) * 32;
    const char* high = w.plane[1] + b * w.block_stride[1] + sub / 4 * 32;
    const s8* scales = (const s8*)(w.plane[2] + b * w.block_stride[2]) + sub * 2;
    float total = 0;
    for (int half = 0; half < 2; ++half) {
        int products = 0, plain = 0;
        for (int i = 4 * half; i < 4 * half + 4; ++i) {
            const int word =
                (tp_load_word<kAligned>(low + 4 * i) >> (part >> 1) * 4 & 0x0f0f0f0f) | (tp_load_word<kAligned>(high + 4 * i) >> part * 2 & 0x03030303) << 4;
            products = tp_dp4a(word, x[i], products);
            plain = tp_dp4a(0x01010101, x[i], plain);
        }
        total += (float)(products - 32 * plain) * (float)scales[half];
    }
    return tp_load_half(w.plane[3] + b * w.block_stride[3]) * total * d;
}

// ---- one element

TP_DEVICE int tp_nibble(u8 byte, bool high) { return high ? byte >> 4 : byte & 15; }
/// Four bytes of the host's layout, which may lie at any address.
TP_DEVICE u32 tp_load_u32(const u8* p) { return (u32)p[0] | (u32)p[1] << 8 | (u32)p[2] << 16 | (u32)p[3] << 24; }

static const s8 kIq4Values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
/// Twice the value of a 4-bit float: sign, two bits of exponent, one of mantissa.
TP_DEVICE int tp_fp4_doubled(int q) {
    const int m = q & 7, v = m < 2 ? m : (2 + (m & 1)) << (m / 2 - 1);
    return q & 8 ? -v : v;
}
/// Half of 2^(e - 127), and half of an unsigned float of 4 bits of exponent and 3 of mantissa: the values above are doubled.
TP_DEVICE float tp_e8m0_half(u8 e) { return __int_as_float(e < 2 ? 0x00200000 << e : (e - 1) << 23); }
TP_DEVICE float tp_ue4m3_half(u8 x) {
    if (x == 0x7f) return 0.0f;
    const int exponent = x >> 3 & 15, mantissa = x & 7;
    if (exponent == 0) return (float)mantissa * (1.0f / 1024.0f);
    return __int_as_float((exponent - 8 + 127) << 23 | mantissa << 20);
}
/// Sign j of eight, of which seven bits are stored: the number of minus signs is even.
TP_DEVICE bool tp_negative(u32 seven, int j) {
    if (j < 7) return seven >> j & 1;
    u32 parity = seven ^ seven >> 4;
    parity ^= parity >> 2;
    return (parity ^ parity >> 1) & 1;
}
TP_DEVICE float tp_grid2(const u16* grid, int entry, int j) {
    const int q = grid[entry] >> 2 * j & 3;
    return (float)(8 + 17 * q + (q >> 1));  // 8, 25, 43
}
TP_DEVICE float tp_grid3(const u16* grid, int entry, int j) { return (float)(grid[entry] >> 4 * j & 7); }
/// A trit of a byte that holds a fraction in base 3, minus one.
TP_DEVICE float tp_trit(u8 byte, int n) {
    int power = 1;
    for (int i = 0; i < n; ++i) power *= 3;
    return (float)((((byte * power) & 255) * 3 >> 8) - 1);
}

/// Element k of a row, any type. With a constant type only that type's case is left.
TP_DEVICE float tp_weight_elem(int type, const WeightRow& w, i64 k) {
    // Byte `at` of field f of block b.
    auto field = [&](int f, i64 b, int at) { return (const u8*)(w.plane[f] + b * w.block_stride[f] + at); };
    auto half = [&](int f, i64 b, int at) { return tp_load_half(w.plane[f] + b * w.block_stride[f] + at); };
    const i64 small = k / 32, b = k / 256;            // numbers of a block of 32, of 256
    const int i = (int)(k % 32), e = (int)(k % 256);  // within them
    const int sub = e / 32, l = i / 8, j = i % 8;     // 32 of 256; 8 of 32
    switch (type) {
        case kF32: return *(const float*)(w.plane[0] + k * w.block_stride[0]);
        case kF16: return tp_load_half(w.plane[0] + k * w.block_stride[0]);
        case kBF16: return tp_bf16_to_float(*(const u16*)(w.plane[0] + k * w.block_stride[0]));
        case kQ4_0: return half(1, small, 0) * (float)(tp_nibble(*field(0, small, i % 16), i >= 16) - 8);
        case kQ4_1: return half(1, small, 0) * (float)tp_nibble(*field(0, small, i % 16), i >= 16) + half(1, small, 2);
        case kQ5_0:
        case kQ5_1: {
            const int q = tp_nibble(*field(0, small, i % 16), i >= 16) | (*field(1, small, l) >> j & 1) << 4;
            return type == kQ5_0 ? half(2, small, 0) * (float)(q - 16) : half(2, small, 0) * (float)q + half(2, small, 2);
        }
        case kQ8_0:
        case kQ8_1: return half(1, small, 0) * (float)*(const s8*)field(0, small, i);
        case kQ2_K: {
            const int q = *field(0, b, e / 128 * 32 + i) >> 2 * (sub % 4) & 3, scales = *field(1, b, e / 16);
            return half(2, b, 0) * (float)(scales & 15) * (float)q - half(2, b, 2) * (float)(scales >> 4);
        }
        case kQ3_K: {
            const int q = (*field(0, b, e / 128 * 32 + i) >> 2 * (sub % 4) & 3) - (*field(1, b, i) >> sub & 1 ? 0 : 4), s = e / 16;
            const int scale = tp_nibble(*field(2, b, s % 8), s >= 8) | (*field(2, b, 8 + s % 4) >> 2 * (s / 4) & 3) << 4;
            return half(3, b, 0) * (float)(scale - 32) * (float)q;
        }
        case kQ4_K:
        case kQ5_K: {
            const bool five = type == kQ5_K;
            const int header = five ? 2 : 1;
            int q = tp_nibble(*field(0, b, sub / 2 * 32 + i), sub % 2), scale, min;
            if (five) q |= (*field(1, b, i) >> sub & 1) << 4;
            tp_q4_k_scale((const char*)field(header, b, 4), sub, scale, min);
            return half(header, b, 0) * (float)scale * (float)q - half(header, b, 2) * (float)min;
        }
        case kQ6_K: {
            const int part = sub % 4, low = tp_nibble(*field(0, b, sub / 4 * 64 + (part & 1) * 32 + i), part >> 1);
            const int high = *field(1, b, sub / 4 * 32 + i) >> part * 2 & 3;
            return half(3, b, 0) * (float)*(const s8*)field(2, b, e / 16) * (float)((low | high << 4) - 32);
        }
        case kQ8_K: return *(const float*)field(2, b, 0) * (float)*(const s8*)field(0, b, e);
        case kIQ2_XXS: {
            const u32 signs = tp_load_u32(field(0, b, sub * 8 + 4));
            const float v = half(1, b, 0) * (0.5f + (float)(signs >> 28)) * 0.25f * tp_grid2(kGridIq2Xxs, *field(0, b, sub * 8 + l), j);
            return tp_negative(signs >> 7 * l & 127, j) ? -v : v;
        }
        case kIQ2_XS: {
            const u32 entry = *(const u16*)field(0, b, (sub * 4 + l) * 2);
            const float v = half(2, b, 0) * (0.5f + (float)tp_nibble(*field(1, b, sub), l >= 2)) * 0.25f * tp_grid2(kGridIq2Xs, entry & 511, j);
            return tp_negative(entry >> 9, j) ? -v : v;
        }
        case kIQ2_S: {
            const int entry = *field(0, b, sub * 4 + l) | (*field(1, b, sub) >> 2 * l & 3) << 8;
            const float v = half(3, b, 0) * (0.5f + (float)tp_nibble(*field(2, b, sub), l >= 2)) * 0.25f * tp_grid2(kGridIq2S, entry, j);
            return *field(0, b, 32 + sub * 4 + l) >> j & 1 ? -v : v;
        }
        case kIQ3_XXS: {
            const u32 signs = tp_load_u32(field(0, b, 64 + sub * 4));
            const float level = tp_grid3(kGridIq3Xxs, *field(0, b, sub * 8 + i / 4), i % 4);
            const float v = half(1, b, 0) * (0.5f + (float)(signs >> 28)) * 0.5f * (4.0f + 8.0f * level + (level == 7.0f ? 2.0f : 0.0f));
            return tp_negative(signs >> 7 * l & 127, j) ? -v : v;
        }
        case kIQ3_S: {
            const int entry = *field(0, b, sub * 8 + i / 4) | (*field(1, b, sub) >> i / 4 & 1) << 8;
            const float scale = (float)(1 + 2 * tp_nibble(*field(2, b, 32 + sub / 2), sub % 2));
            const float v = half(3, b, 0) * scale * (1.0f + 2.0f * tp_grid3(kGridIq3S, entry, i % 4));
            return *field(2, b, sub * 4 + l) >> j & 1 ? -v : v;
        }
        case kIQ1_S: {
            const int high = *(const u16*)field(1, b, sub * 2), entry = *field(0, b, sub * 4 + l) | (high >> 3 * l & 7) << 8;
            const float level = (float)((kGridIq1[entry] >> 2 * j & 3) - 1);
            return half(2, b, 0) * (float)(2 * (high >> 12 & 7) + 1) * (level + (high & 0x8000 ? -0.125f : 0.125f));
        }
        case kIQ1_M: {
            const u16* scales = (const u16*)field(2, b, 0);
            const u16 d = (u16)(scales[0] >> 12 | (scales[1] >> 8 & 0xf0) | (scales[2] >> 4 & 0xf00) | (scales[3] & 0xf000));
            const int high = *field(1, b, sub * 2 + l / 2) >> 4 * (l % 2), entry = *field(0, b, sub * 4 + l) | (high & 7) << 8;
            const int scale = scales[sub / 2] >> (6 * (sub % 2) + 3 * (l / 2)) & 7;
            const float level = (float)((kGridIq1[entry] >> 2 * j & 3) - 1);
            return tp_half_to_float(d) * (float)(2 * scale + 1) * (level + (high & 8 ? -0.125f : 0.125f));
        }
        case kIQ4_NL: return half(1, small, 0) * (float)kIq4Values[tp_nibble(*field(0, small, i % 16), i >= 16)];
        case kIQ4_XS: {
            const int scale = tp_nibble(*field(1, b, 4 + sub / 2), sub % 2) | (*(const u16*)field(1, b, 2) >> 2 * sub & 3) << 4;
            return half(1, b, 0) * (float)(scale - 32) * (float)kIq4Values[tp_nibble(*field(0, b, sub * 16 + i % 16), i >= 16)];
        }
        case kTQ1_0: {
            const float d = half(2, b, 0);
            if (e < 160) return tp_trit(*field(0, b, e % 32), e / 32) * d;
            if (e < 240) return tp_trit(*field(0, b, 32 + (e - 160) % 16), (e - 160) / 16) * d;
            return tp_trit(*field(1, b, (e - 240) % 4), (e - 240) / 4) * d;
        }
        case kTQ2_0: return (float)((*field(0, b, e / 128 * 32 + i) >> 2 * (sub % 4) & 3) - 1) * half(1, b, 0);
        case kMXFP4: return (float)tp_fp4_doubled(tp_nibble(*field(0, small, i % 16), i >= 16)) * tp_e8m0_half(*field(1, small, 0));
        case kNVFP4: {
            const int s = (int)(k % 64) / 16, at = i % 16;
            return (float)tp_fp4_doubled(tp_nibble(*field(0, k / 64, s * 8 + at % 8), at >= 8)) * tp_ue4m3_half(*field(1, k / 64, s));
        }
        case kQ1_0: return *field(0, k / 128, (int)(k % 128) / 8) >> j & 1 ? half(1, k / 128, 0) : -half(1, k / 128, 0);
        case kQ2_0: return (float)((*field(0, k / 64, (int)(k % 64) / 4) >> 2 * (i % 4) & 3) - 1) * half(1, k / 64, 0);
        default: return 0.0f;
    }
}

}  // namespace ggml_tp
