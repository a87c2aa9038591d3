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

/// How many of a row's keys come before its i-th, `key`; equal ones in front of it do. What is surely in front or behind (by 32, so that a warp's lanes
/// agree) takes one comparison, and four keys one load where the row begins at a multiple of 16 bytes.
TP_DEVICE u32 place_of(const u32* keys, u32 n, u32 i, u32 key) {
    const u32 near = i / 32 * 32, far = near + 32 < n ? near + 32 : n;
    u32 place = 0;
    if (n % 4 == 0) {
#pragma unroll 2
        for (u32 j = 0; j < near; j += 4) {
            const TpInt4 v = *(const TpInt4*)(keys + j);
            place += ((u32)v.x <= key) + ((u32)v.y <= key) + ((u32)v.z <= key) + ((u32)v.w <= key);
        }
#pragma unroll 2
        for (u32 j = far; j < n; j += 4) {
            const TpInt4 v = *(const TpInt4*)(keys + j);
            place += ((u32)v.x < key) + ((u32)v.y < key) + ((u32)v.z < key) + ((u32)v.w < key);
        }
    } else {
        for (u32 j = 0; j < near; ++j) place += keys[j] <= key;
        for (u32 j = far; j < n; ++j) place += keys[j] < key;
    }
#pragma unroll 4
    for (u32 j = near; j < far; ++j) place += keys[j] < key || (keys[j] == key && j < i);
    return place;
}

/// The whole block, for `rows` rows of n elements `stride` bytes apart, which begin at at(row): put(row, place, i, key) for every element. keys: shared,
/// rows * n of them, aligned to 16 bytes.
template <class At, class Put>
TP_DEVICE void sort_rows(u32 rows, u32 n, const At& at, i64 stride, bool descending, u32* keys, const Put& put) {
    for (u32 e = threadIdx.x; e < rows * n; e += blockDim.x) keys[e] = sort_key(*(const float*)(at(e / n) + (i64)(e % n) * stride), descending);
    __syncthreads();
    for (u32 e = threadIdx.x; e < rows * n; e += blockDim.x) {
        const u32 row = e / n, i = e - row * n, key = keys[e];
        put(row, place_of(keys + row * n, n, i, key), i, key);
    }
}
template <class Put>
TP_DEVICE void sort_row(const char* x, i64 stride, i64 n, bool descending, u32* keys, const Put& put) {
    sort_rows(1, (u32)n, [&](u32) { return x; }, stride, descending, keys, [&](u32, u32 place, u32 i, u32 key) { put((i64)place, (i64)i, key); });
}

/// The first `places` of a row's order go to y.
TP_DEVICE void argsort_row(const char* x, i64 stride, i64 n, bool descending, char* y, i64 y_stride, i64 places, u32* keys) {
    sort_row(x, stride, n, descending, keys, [&](i64 place, i64 i, u32) {
        if (place < places) *(i32*)(y + place * y_stride) = (i32)i;
    });
}

}  // namespace ggml_tp
