// Rotary position embedding with YaRN scaling, after ggml's rope_yarn; forward and back, positions of one kind or of four. One thread per
// pair of elements of a run of heads of one token; elements from n_dims on pass through. y may be x: a thread reads its pairs before it
// writes them.
#include "rope_pair.h"

namespace ggml_tp {
namespace {

template <bool kNeox>
TP_DEVICE void rope(const RopeArgs& args) {
    const View &x = args.x, &y = args.y;
    const i64 pair = (i64)blockIdx.y * blockDim.x + threadIdx.x;
    const i64 run = (i64)blockIdx.x * blockDim.y + threadIdx.y;
    if (2 * pair >= x.ne[0] || run >= rope_runs(args)) return;
    turn_run<kRopeHeads>(args, pair, (u32)run, kNeox, nullptr, InView{x}, [&](const Index& first, const Index& second, float a, float b) {
        store(y, first, a);
        if (second.i0 < x.ne[0]) store(y, second, b);
    });
}

}  // namespace
}  // namespace ggml_tp

using namespace ggml_tp;

// Three blocks are more than kRopeThreads.
TP_KERNEL_RESIDENT(rope_normal, RopeArgs, 256, 3) { rope<false>(args); }
TP_KERNEL_RESIDENT(rope_neox, RopeArgs, 256, 3) { rope<true>(args); }

TP_KERNEL_RESIDENT(rope_store, RopeStoreArgs, 256, 3) { rope_store_one<false>(args, blockIdx.x, (int)threadIdx.x, nullptr, NoPieces{}); }
TP_KERNEL_RESIDENT(rope_store_pieces, PiecesRopeArgs, 256, 3) { rope_store_one<false>(args.args, blockIdx.x, (int)threadIdx.x, nullptr, SomePieces{args}); }
