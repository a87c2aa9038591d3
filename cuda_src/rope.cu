// Rotary position embedding with YaRN scaling, after ggml's rope_yarn; forward and back, positions of one kind or of four. One thread per pair of elements; elements from
// n_dims on pass through. y may be x: a thread reads its pair before it writes it.
#include "rope_pair.h"

namespace ggml_tp {
namespace {

template <bool kNeox>
TP_DEVICE void rope(const RopeArgs& args) {
    const View &x = args.x, &y = args.y;
    const i64 pair = (i64)blockIdx.y * blockDim.x + threadIdx.x;
    const i64 row = (i64)blockIdx.x * blockDim.y + threadIdx.y;
    if (2 * pair >= x.ne[0] || row >= x.ne[1] * x.ne[2] * x.ne[3]) return;
    const Pair p = rotate(args, pair, row, kNeox);
    store(y, p.first, p.a);
    if (p.second.i0 < x.ne[0]) store(y, p.second, p.b);
}

}  // namespace
}  // namespace ggml_tp

using namespace ggml_tp;

TP_KERNEL(rope_normal, RopeArgs, 256) { rope<false>(args); }
TP_KERNEL(rope_neox, RopeArgs, 256) { rope<true>(args); }

TP_KERNEL(rope_store, RopeStoreArgs, 256) { rope_store_one<false>(args, blockIdx.x, (int)threadIdx.x, nullptr); }
