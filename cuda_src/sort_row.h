// The order of one row, found by counting: an element's place is the number of those before it. For the few hundred elements of a
// router's row that is one pass without barriers, where a bitonic network has 28 for 128 elements. Equal elements stay in order.
#pragma once
#include "sort.h"
#include "tp.h"

namespace ggml_tp {

/// Floats as numbers in the same order, all of them different from each other's place for NaN too: an order is always a permutation.
TP_DEVICE u32 sort_key(float v, bool descending) {
    const u32 bits = (u32)__float_as_int(v + 0.0f);  // -0 is 0
    const u32 key = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return descending ? ~key : key;
}

/// The whole block, for one row of n elements `stride` bytes apart: put(place, i, key) for every element. keys: shared, n of them.
template <class Put>
TP_DEVICE void sort_row(const char* x, i64 stride, i64 n, bool descending, u32* keys, Put put) {
    for (i64 i = threadIdx.x; i < n; i += blockDim.x) keys[i] = sort_key(*(const float*)(x + i * stride), descending);
    __syncthreads();
    for (i64 i = threadIdx.x; i < n; i += blockDim.x) {
        const u32 key = keys[i];
        i64 place = 0;
        for (i64 j = 0; j < n; ++j) place += keys[j] < key || (keys[j] == key && j < i);
        put(place, i, key);
    }
}

/// The first `places` of a row's order go to y.
TP_DEVICE void argsort_row(const char* x, i64 stride, i64 n, bool descending, char* y, i64 y_stride, i64 places, u32* keys) {
    sort_row(x, stride, n, descending, keys, [&](i64 place, i64 i, u32) {
        if (place < places) *(i32*)(y + place * y_stride) = (i32)i;
    });
}

}  // namespace ggml_tp
