// Walking a tensor element by element, and loading and storing elements of the plain types.
#pragma once
#include "tp.h"

namespace ggml_tp {

struct Index4 {
    i64 i[4];
};
TP_DEVICE Index4 tp_index(const i64* ne, i64 linear) {
    Index4 out;
    for (int d = 0; d < 3; ++d) {
        out.i[d] = linear % ne[d];
        linear /= ne[d];
    }
    out.i[3] = linear;
    return out;
}
TP_DEVICE char* tp_at(const View& v, const Index4& x) { return v.data + x.i[0] * v.nb[0] + x.i[1] * v.nb[1] + x.i[2] * v.nb[2] + x.i[3] * v.nb[3]; }
/// The element that is repeated over a larger tensor's index.
TP_DEVICE char* tp_at_repeated(const View& v, const Index4& x) {
    return v.data + x.i[0] % v.ne[0] * v.nb[0] + x.i[1] % v.ne[1] * v.nb[1] + x.i[2] % v.ne[2] * v.nb[2] + x.i[3] % v.ne[3] * v.nb[3];
}
TP_DEVICE i64 tp_elems(const View& v) { return v.ne[0] * v.ne[1] * v.ne[2] * v.ne[3]; }
TP_DEVICE float tp_load(int type, const char* p) {
    if (type == kF32) return *(const float*)p;
    if (type == kF16) return tp_half_to_float(*(const u16*)p);
    if (type == kBF16) return tp_bf16_to_float(*(const u16*)p);
    return (float)*(const i32*)p;
}
TP_DEVICE void tp_store(int type, char* p, float v) {
    if (type == kF32) *(float*)p = v;
    else if (type == kF16) *(u16*)p = tp_float_to_half(v);
    else if (type == kBF16) *(u16*)p = tp_float_to_bf16(v);
    else *(i32*)p = (i32)v;
}

}  // namespace ggml_tp

// One thread per element, in strides of the whole grid.
#define TP_FOR_EACH(i, n) \
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x, i##_n = (n), i##_step = (i64)gridDim.x * blockDim.x; i < i##_n; i += i##_step)
