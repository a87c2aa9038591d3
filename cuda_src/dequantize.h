// Reading weights: one element of any type, and the dot product of 32 elements with int8 activations, per quantised type.
// Formulas: upstream's dequantize_row_* (ggml-quants.c). Fields are those of weight_format.h, in its order.
#pragma once
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
        out.plane[f] = m.plane[f] + row * m.row_stride[f] + i2 * m.nb2[f] + i3 * m.nb3[f];
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
        tp_q4_k_scale(w.plane[1] + b * w.block_stride[1], sub, scale, min);
        const char* dm = w.plane[2] + b * w.block_stride[2];
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

/// Element k of a row, any type.
TP_DEVICE float tp_weight_elem(int type, const WeightRow& w, i64 k) {
    if (type == kF32) return *(const float*)(w.plane[0] + k * w.block_stride[0]);
    if (type == kF16) return tp_load_half(w.plane[0] + k * w.block_stride[0]);
    if (type == kBF16) return tp_bf16_to_float(*(const u16*)(w.plane[0] + k * w.block_stride[0]));
    if (type == kQ4_0) {
        const int i = (int)(k % 32);
        const u8 q = *(const u8*)(w.plane[0] + k / 32 * w.block_stride[0] + i % 16);
        return tp_load_half(w.plane[1] + k / 32 * w.block_stride[1]) * (float)((i < 16 ? q & 15 : q >> 4) - 8);
    }
    if (type == kQ8_0) return tp_load_half(w.plane[1] + k / 32 * w.block_stride[1]) * (float)*(const s8*)(w.plane[0] + k / 32 * w.block_stride[0] + k % 32);
    const i64 b = k / 256;
    const int sub = (int)(k % 256 / 32), i = (int)(k % 32);
    if (type == kQ4_K) {
        const u8 q = *(const u8*)(w.plane[0] + b * w.block_stride[0] + sub / 2 * 32 + i);
        int scale, min;
        tp_q4_k_scale(w.plane[1] + b * w.block_stride[1], sub, scale, min);
        const char* dm = w.plane[2] + b * w.block_stride[2];
        return tp_load_half(dm) * (float)scale * (float)(sub % 2 ? q >> 4 : q & 15) - tp_load_half(dm + 2) * (float)min;
    }
    const int part = sub % 4;  // Q6_K
    const int low = *(const u8*)(w.plane[0] + b * w.block_stride[0] + sub / 4 * 64 + (part & 1) * 32 + i) >> (part >> 1) * 4 & 15;
    const int high = *(const u8*)(w.plane[1] + b * w.block_stride[1] + sub / 4 * 32 + i) >> part * 2 & 3;
    const s8 scale = *(const s8*)(w.plane[2] + b * w.block_stride[2] + sub * 2 + i / 16);
    return tp_load_half(w.plane[3] + b * w.block_stride[3]) * (float)scale * (float)((low | high << 4) - 32);
}

}  // namespace ggml_tp
