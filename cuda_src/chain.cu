// A chain of small ops in one block, a barrier after each: what it wrote it may read. Seven launches of a router become one.
#include "chain.h"

#include "element.h"
#include "quantize_group.h"
#include "sort_row.h"

namespace ggml_tp {
namespace {

/// Index of an element of a small tensor: 32-bit divisions.
TP_DEVICE Index small_index(u32 i, const i64 (&ne)[4]) {
    const u32 n0 = (u32)ne[0];
    Index out = row_index(i / n0, ne);
    out.i0 = i % n0;
    return out;
}
template <class F>
TP_DEVICE void for_each(const View& y, F f) {
    const u32 n = (u32)(y.ne[0] * y.ne[1] * y.ne[2] * y.ne[3]);
    for (u32 i = threadIdx.x; i < n; i += blockDim.x) f(small_index(i, y.ne));
}
/// A warp a row.
template <class F>
TP_DEVICE void for_each_row(const View& x, F f) {
    const u32 n = (u32)(x.ne[1] * x.ne[2] * x.ne[3]);
    for (u32 row = threadIdx.x / 32; row < n; row += blockDim.x / 32) f(row_index(row, x.ne), threadIdx.x % 32);
}
TP_DEVICE float at(const View& v, const Index& i) { return *(const float*)element_at(v, i); }
TP_DEVICE void set(const View& v, const Index& i, float value) { *(float*)element_at(v, i) = value; }

TP_DEVICE void soft_max_row(const ChainStep& s, const Index& row, int lane) {
    const char* x = element_at(s.a, row);
    char* y = element_at(s.y, row);
    auto logit = [&](i64 i) { return *(const float*)(x + i * s.a.nb[0]) * s.p0; };
    float most = -INFINITY, sum = 0;
    for (i64 i = lane; i < s.a.ne[0]; i += 32) most = fmaxf(most, logit(i));
    most = tp_warp_max(most);
    for (i64 i = lane; i < s.a.ne[0]; i += 32) sum += most == -INFINITY ? 0.0f : expf(logit(i) - most);
    sum = tp_warp_sum(sum);
    const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
    for (i64 i = lane; i < s.a.ne[0]; i += 32) *(float*)(y + i * s.y.nb[0]) = most == -INFINITY ? 0.0f : expf(logit(i) - most) * inverse;
}

TP_DEVICE void chain_step(const ChainStep& s, u32* fault, u32* keys) {
    auto two = [&](auto f) { for_each(s.y, [&](const Index& i) { set(s.y, i, f(at(s.a, i), at(s.b, wrap(i, s.b.ne)))); }); };
    auto one = [&](auto f) { for_each(s.y, [&](const Index& i) { set(s.y, i, f(at(s.a, i))); }); };
    switch (s.op) {
        case ChainOp::kAdd: return two([](float a, float b) { return a + b; });
        case ChainOp::kSub: return two([](float a, float b) { return a - b; });
        case ChainOp::kMul: return two([](float a, float b) { return a * b; });
        case ChainOp::kDiv: return two([](float a, float b) { return a / b; });
        case ChainOp::kScale: return one([&](float x) { return x * s.p0 + s.p1; });
        case ChainOp::kClamp: return one([&](float x) { return x < s.p0 ? s.p0 : x > s.p1 ? s.p1 : x; });
        case ChainOp::kSigmoid: return one([](float x) { return 1.0f / (1.0f + expf(-x)); });
        case ChainOp::kSoftMax: return for_each_row(s.a, [&](const Index& row, int lane) { soft_max_row(s, row, lane); });
        case ChainOp::kSumRows:
            return for_each_row(s.a, [&](const Index& row, int lane) {
                float sum = 0;
                for (i64 i = lane; i < s.a.ne[0]; i += 32) sum += *(const float*)(element_at(s.a, row) + i * s.a.nb[0]);
                sum = tp_warp_sum(sum);
                if (lane == 0) set(s.y, row, sum);
            });
        case ChainOp::kArgsort:
            return sort_rows((u32)(s.y.ne[1] * s.y.ne[2] * s.y.ne[3]), (u32)s.a.ne[0], [&](u32 row) { return element_at(s.a, row_index(row, s.y.ne)); },
                             s.a.nb[0], s.p0 != 0.0f, keys,
                             [&](u32 row, u32 place, u32 i, u32) {
                                 if (place < s.y.ne[0]) *(i32*)(element_at(s.y, row_index(row, s.y.ne)) + (i64)place * s.y.nb[0]) = (i32)i;
                             });
        case ChainOp::kGetRows:
            return for_each(s.y, [&](const Index& i) {
                const i32 row = *(const i32*)element_at(s.b, {i.i1, i.i2, i.i3, 0});
                if (row < 0 || row >= s.a.ne[1]) atomicExch(fault, (u32)kFaultRowIndex);
                else set(s.y, i, at(s.a, {i.i0, row, wrap(i.i2, s.a.ne[2]), wrap(i.i3, s.a.ne[3])}));
            });
        case ChainOp::kFill: return for_each(s.y, [&](const Index& i) { set(s.y, i, s.p0); });
        case ChainOp::kSetRows:
            return for_each(s.a, [&](const Index& i) {
                const i32 row = *(const i32*)element_at(s.b, {i.i1, wrap(i.i2, s.b.ne[1]), wrap(i.i3, s.b.ne[2]), 0});
                if (row < 0 || row >= s.y.ne[1]) atomicExch(fault, (u32)kFaultRowIndex);
                else set(s.y, {i.i0, row, i.i2, i.i3}, at(s.a, i));
            });
    }
}

}  // namespace
}  // namespace ggml_tp

using namespace ggml_tp;

TP_KERNEL(chain, ChainArgs, kChainMostThreads) {
    __shared__ TpInt4 sorted[kChainElems / 4];
    u32* const keys = (u32*)sorted;
    if (blockIdx.x == 0) {
        for (int i = 0; i < args.n_steps; ++i) {
            if (i) __syncthreads();
            chain_step(args.step[i], args.fault, keys);
        }
        return;
    }
    const QuantizeArgs& q = args.quantize;
    const u32 groups = (u32)((q.k + 127) / 128), warp = (blockIdx.x - 1) * (blockDim.x / 32) + threadIdx.x / 32, row = warp / groups;
    if (row >= (u32)(q.x.ne[1] * q.x.ne[2] * q.x.ne[3])) return;
    const i64 i = (warp % groups) * 128 + threadIdx.x % 32 * 4;
    float v[4] = {};
    if (i < q.k)
        for (int e = 0; e < 4; ++e) v[e] = ((const float*)element_at(q.x, row_index(row, q.x.ne)))[i + e];
    quantize_four(v, i, i < q.k, q.xq + row * q.k, q.xd + row * (q.k / 32) * 8);
}
