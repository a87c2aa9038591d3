// Values to a block whose encoder searches (k-quants, IQ4_XS), in the host's layout. Among guesses of a scale the best one wins, and many guesses
// differ in the last bit of their errors only, so sums run in the order of upstream's quantize_row_*_ref and each operation is rounded by itself:
// the block is the CPU's, bit for bit.
#pragma once
#include "quantize_block.h"

namespace ggml_tp {

/// A float whose products are rounded before something is added to them.
struct Rounded {
    float v;
    TP_MEMBER Rounded(float x) : v(x) {}
    TP_MEMBER Rounded& operator+=(Rounded b) { return v += b.v, *this; }
};
TP_DEVICE Rounded operator+(Rounded a, Rounded b) { return a.v + b.v; }
TP_DEVICE Rounded operator-(Rounded a, Rounded b) { return a.v - b.v; }
TP_DEVICE Rounded operator*(Rounded a, Rounded b) { return tp_mul_rounded(a.v, b.v); }
TP_DEVICE Rounded operator/(Rounded a, Rounded b) { return a.v / b.v; }
TP_DEVICE bool operator>(Rounded a, Rounded b) { return a.v > b.v; }

/// The nearest level, ties to even. Beyond 2^22 it is what the CPU's trick makes of it.
TP_DEVICE int tp_level(Rounded v, int least, int most) {
    const int nearest = (__float_as_int(v.v + 12582912.0f) & 0x7fffff) - 0x400000;
    return nearest < least ? least : nearest > most ? most : nearest;
}

/// Scale and levels of n values on a symmetric grid.
struct SymmetricFit {
    float scale;
    int level[16];
};
TP_DEVICE float tp_largest(const float* x, int n) {
    float max = 0;
    for (int i = 0; i < n; ++i)
        if (fabsf(x[i]) > fabsf(max)) max = x[i];
    return max;
}
/// 16 values, levels 0 to 63 for -32 to 31: of 19 guesses around the one that has the largest at -32, the one whose least squares scale is best.
TP_DEVICE void tp_fit_q6(const float* x, SymmetricFit& fit) {
    const float max = tp_largest(x, 16);
    fit.scale = 0;
    for (int i = 0; i < 16; ++i) fit.level[i] = 0;
    if (fabsf(max) < 1e-15f) return;
    Rounded best = 0;
    for (int guess = 0; guess < 19; ++guess) {
        const int shift = guess == 0 ? 0 : guess < 10 ? guess - 10 : guess - 9;  // 0, then -9 to 9
        const Rounded inverse = (Rounded(32) + Rounded(0.1f) * Rounded((float)shift)) / -max;
        Rounded product = 0, square = 0;
        for (int i = 0; i < 16; ++i) {
            const Rounded v = x[i], q = (float)tp_level(inverse * v, -32, 31), weight = v * v;
            product += weight * v * q;
            square += weight * q * q;
        }
        if (guess > 0 && !(square > 0 && product * product > best * square)) continue;
        fit.scale = square.v != 0.0f ? product.v / square.v : 0.0f;
        best = Rounded(fit.scale) * product;
        for (int i = 0; i < 16; ++i) fit.level[i] = 32 + tp_level(inverse * x[i], -32, 31);
    }
}
/// 16 values, levels 0 to 7 for -4 to 3: one guess, then up to five rounds in which each level moves to where it fits the others' scale.
TP_DEVICE void tp_fit_q3(const float* x, SymmetricFit& fit) {
    const float max = tp_largest(x, 16);
    fit.scale = 0;
    for (int i = 0; i < 16; ++i) fit.level[i] = 0;
    if (fabsf(max) < 1e-15f) return;
    const Rounded inverse = -4.0f / max;
    Rounded product = 0, square = 0;
    for (int i = 0; i < 16; ++i) {
        fit.level[i] = tp_level(inverse * x[i], -4, 3);
        const Rounded v = x[i], q = (float)fit.level[i], weight = v * v;
        product += weight * v * q;
        square += weight * q * q;
    }
    bool moved = true;
    for (int round = 0; round < 5 && moved; ++round) {
        moved = false;
        for (int i = 0; i < 16; ++i) {
            const Rounded v = x[i], q = (float)fit.level[i], weight = v * v;
            Rounded others = product - weight * v * q;
            if (!(others > 0)) continue;
            Rounded others_square = square - weight * q * q;
            const int level = tp_level(v * others_square / others, -4, 3);
            if (level == fit.level[i]) continue;
            const Rounded other = (float)level;
            others += weight * v * other;
            others_square += weight * other * other;
            if (!(others_square > 0 && others * others * square > product * product * others_square)) continue;
            fit.level[i] = level;
            product = others;
            square = others_square;
            moved = true;
        }
    }
    for (int i = 0; i < 16; ++i) fit.level[i] += 4;
    fit.scale = square > 0 ? product.v / square.v : 0.0f;
}

/// Scale, what is subtracted, and levels of up to 32 values on a grid from 0 on.
struct AffineFit {
    float scale, min;
    int level[32];
};
/// Guesses put the range on `first` + i / 10 levels more than there are; each takes scale and minimum by weighted least squares. The minimum of the
/// best so far is where the next guesses begin.
TP_DEVICE void tp_fit_affine(const float* x, const float* weights, int n, int levels, float first, int guesses, bool absolute, AffineFit& fit) {
    float min = x[0], max = x[0];
    Rounded weight_sum = weights[0], x_sum = weight_sum * x[0];
    for (int i = 1; i < n; ++i) {
        min = fminf(min, x[i]);
        max = fmaxf(max, x[i]);
        weight_sum += weights[i];
        x_sum += Rounded(weights[i]) * x[i];
    }
    min = fminf(min, 0.0f);
    fit.scale = 0;
    fit.min = -min;
    for (int i = 0; i < n; ++i) fit.level[i] = 0;
    if (max == min) return;
    auto error = [&](Rounded scale, Rounded offset, Rounded inverse, float from) {
        Rounded sum = 0;
        for (int i = 0; i < n; ++i) {
            const Rounded difference = scale * (float)tp_level(inverse * (x[i] - from), 0, levels) + offset - x[i];
            sum += Rounded(weights[i]) * (absolute ? Rounded(fabsf(difference.v)) : difference * difference);
        }
        return sum.v;
    };
    auto take = [&](Rounded inverse, float from) {
        for (int i = 0; i < n; ++i) fit.level[i] = tp_level(inverse * (x[i] - from), 0, levels);
    };
    float inverse = (float)levels / (max - min);
    fit.scale = 1.0f / inverse;
    float least = error(fit.scale, min, inverse, min);
    take(inverse, min);
    for (int guess = 0; guess <= guesses; ++guess) {
        inverse = (Rounded(first) + Rounded(0.1f) * (float)guess + (float)levels).v / (max - min);
        Rounded sum = 0, square = 0, product = 0;
        for (int i = 0; i < n; ++i) {
            const Rounded q = (float)tp_level(Rounded(inverse) * (x[i] - min), 0, levels), weight = weights[i];
            sum += weight * q;
            square += weight * q * q;
            product += weight * q * x[i];
        }
        const Rounded determinant = weight_sum * square - sum * sum;
        if (!(determinant > 0)) continue;
        Rounded scale = (weight_sum * product - x_sum * sum) / determinant, offset = (square * x_sum - sum * product) / determinant;
        if (offset > 0) offset = 0, scale = product / square;
        const float now = error(scale, offset, inverse, min);
        if (!(now < least)) continue;
        take(inverse, min);
        least = now;
        fit.scale = scale.v;
        min = offset.v;
    }
    fit.min = -min;
}

/// Scale of 32 values on the grid of kIq4Values: guesses have the largest at up to seven away from the grid's ends.
TP_DEVICE float tp_fit_iq4(const float* x) {
    const float max = tp_largest(x, 32);
    if (fabsf(max) < 1e-15f) return 0.0f;
    float scale = 0;
    Rounded best = 0;
    for (int guess = -8; guess <= 7; ++guess) {
        const bool opposite = guess == -8;  // the first has it at the other end's number, with its sign turned
        const Rounded inverse = opposite ? 1.0f / (-max / (float)kIq4Values[0]) : (float)(guess + kIq4Values[0]) / max;
        Rounded product = 0, square = 0;
        for (int i = 0; i < 32; ++i) {
            const Rounded v = x[i], q = (float)kIq4Values[tp_nearest_iq4((inverse * v).v)], weight = v * v;
            product += weight * q * v;
            square += weight * q * q;
        }
        if (!opposite && !(square > 0 && product * product > best * square)) continue;
        scale = square > 0 ? product.v / square.v : 0.0f;
        best = Rounded(scale) * product;
    }
    return scale;
}

/// Block `out` of 256 values x(0), x(1), ..., which are read again where that saves memory of the thread.
template <class X>
TP_DEVICE void tp_search_block(int type, X x, char* out) {
    const int bytes = type == kQ2_K ? 84 : type == kQ3_K ? 110 : type == kQ4_K ? 144 : type == kQ5_K ? 176 : type == kQ6_K ? 210 : 136;
    for (int i = 0; i < bytes; ++i) out[i] = 0;
    const bool affine = type == kQ2_K || type == kQ4_K || type == kQ5_K;
    const int n = type == kQ4_K || type == kQ5_K || type == kIQ4_XS ? 32 : 16, groups = 256 / n;
    float values[32], weights[32], scales[16], mins[16] = {};
    SymmetricFit symmetric = {};
    AffineFit fit = {};
    auto search = [&](int g) {
        for (int i = 0; i < n; ++i) values[i] = x(g * n + i);
        if (type == kQ6_K) {
            tp_fit_q6(values, symmetric);
        } else if (type == kQ3_K) {
            tp_fit_q3(values, symmetric);
        } else if (type == kQ2_K) {
            for (int i = 0; i < n; ++i) weights[i] = fabsf(values[i]);
            tp_fit_affine(values, weights, n, 3, -0.5f, 15, true, fit);
        } else {
            Rounded square = 0;
            for (int i = 0; i < n; ++i) square += Rounded(values[i]) * values[i];
            const float mean = sqrtf(square.v / 32.0f);
            for (int i = 0; i < n; ++i) weights[i] = mean + fabsf(values[i]);
            tp_fit_affine(values, weights, n, type == kQ4_K ? 15 : 31, type == kQ4_K ? -1.0f : -0.5f, type == kQ4_K ? 20 : 15, false, fit);
        }
    };
    // Scales of the groups and the largest of them.
    float largest = 0, largest_min = 0;
    for (int g = 0; g < groups; ++g) {
        if (type == kIQ4_XS) {
            for (int i = 0; i < n; ++i) values[i] = x(g * n + i);
            scales[g] = tp_fit_iq4(values);
        } else {
            search(g);
            scales[g] = affine ? fit.scale : symmetric.scale;
            if (affine) mins[g] = fit.min;
        }
        if (affine ? scales[g] > largest : fabsf(scales[g]) > fabsf(largest)) largest = scales[g];
        if (affine && mins[g] > largest_min) largest_min = mins[g];
    }
    if (type == kQ6_K && fabsf(largest) < 1e-15f) return;
    // Their own scale, a half, and for affine grids that of the minima.
    const float steps = type == kQ2_K ? 15.0f : type == kQ3_K ? -32.0f : type == kQ6_K ? -128.0f : 63.0f;
    float inverse = affine && !(largest > 0.0f) ? 0.0f : largest != 0.0f ? steps / largest : 0.0f;
    float block_scale = affine ? largest / steps : tp_inverse(inverse);
    if (type == kIQ4_XS) block_scale = -largest / 32.0f, inverse = tp_inverse(block_scale);
    char* at = out + (type == kQ2_K ? 80 : type == kQ3_K ? 108 : type == kQ6_K ? 208 : 0);
    tp_put_half(at, block_scale);
    const float d = tp_half_to_float(*(const u16*)at);
    float inverse_min = 0, d_min = 0;
    if (affine) {
        inverse_min = largest_min > 0.0f ? steps / largest_min : 0.0f;
        tp_put_half(at + 2, largest_min / steps);
        d_min = tp_half_to_float(*(const u16*)(at + 2));
    }
    for (int g = 0; g < groups; ++g) {
        const Rounded scaled = Rounded(inverse) * scales[g];
        int scale, min = 0;
        if (type == kQ6_K) {
            scale = tp_level(scaled, -128, 127);
            out[192 + g] = (char)scale;
        } else if (type == kQ3_K) {
            // Nothing but zeros: the stored scale is 0, which stands for -32.
            scale = largest != 0.0f ? tp_level(scaled, -32, 31) : -32;
            const int stored = scale + 32;
            out[96 + g % 8] |= (char)((stored & 15) << (g < 8 ? 0 : 4));
            out[104 + g % 4] |= (char)(stored >> 4 << 2 * (g / 4));
        } else if (type == kIQ4_XS) {
            scale = tp_level(scaled, -32, 31);
            const int stored = scale + 32;
            out[4 + g / 2] |= (char)((stored & 15) << (g % 2 * 4));
            out[2 + g / 4] |= (char)(stored >> 4 << 2 * (g % 4));
        } else {
            // As bytes: below 0, where least squares may leave a scale, it is the largest.
            const int most = type == kQ2_K ? 15 : 63;
            scale = tp_least(most, (u8)tp_level(scaled, -128, 127));
            min = tp_least(most, (u8)tp_level(Rounded(inverse_min) * mins[g], -128, 127));
            if (type == kQ2_K) {
                out[g] = (char)(scale | min << 4);
            } else if (g < 4) {
                out[4 + g] |= (char)scale;
                out[8 + g] |= (char)min;
            } else {
                out[8 + g] = (char)((scale & 15) | (min & 15) << 4);
                out[g] |= (char)(scale >> 4 << 6);
                out[4 + g] |= (char)(min >> 4 << 6);
            }
        }
        const float step = (type == kIQ4_XS ? block_scale : d) * (float)scale;
        const float shift = tp_mul_rounded(d_min, (float)min);
        if (type == kIQ4_XS) {
            const Rounded per = tp_inverse(step);
            for (int i = 0; i < 16; ++i) {
                const int low = tp_nearest_iq4((per * x(g * 32 + i)).v), high = tp_nearest_iq4((per * x(g * 32 + 16 + i)).v);
                out[8 + g * 16 + i] = (char)(low | high << 4);
            }
            continue;
        }
        // A scale that is rounded to 0 leaves the levels of the search, which say nothing, but the CPU stores them.
        if (step == 0.0f) search(g);
        for (int i = 0; i < n; ++i) {
            const int e = g * n + i, half = e / 128 * 32 + e % 32;
            const float v = x(e);
            if (type == kQ6_K) {
                const int q = step == 0.0f ? symmetric.level[i] : tp_level(v / step, -32, 31) + 32, quarter = e % 128 / 32;
                out[e / 128 * 64 + quarter % 2 * 32 + e % 32] |= (char)((q & 15) << quarter / 2 * 4);
                out[128 + half] |= (char)(q >> 4 << quarter * 2);
            } else if (type == kQ3_K) {
                const int q = step == 0.0f ? symmetric.level[i] : tp_level(v / step, -4, 3) + 4;
                out[32 + half] |= (char)((q & 3) << e % 128 / 32 * 2);
                out[e % 32] |= (char)(q >> 2 << e / 32);
            } else if (type == kQ2_K) {
                const int q = step == 0.0f ? fit.level[i] : tp_level((v + shift) / step, 0, 3);
                out[16 + half] |= (char)(q << e % 128 / 32 * 2);
            } else {
                const int q = step == 0.0f ? fit.level[i] : tp_level((v + shift) / step, 0, type == kQ4_K ? 15 : 31);
                out[(type == kQ4_K ? 16 : 48) + e / 64 * 32 + e % 32] |= (char)((q & 15) << e % 64 / 32 * 4);
                if (type == kQ5_K) out[16 + e % 32] |= (char)(q >> 4 << e / 32);
            }
        }
    }
}

}  // namespace ggml_tp
