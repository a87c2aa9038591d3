// A two-shot all_reduce whose second half carries what the next products read: a rank reads its share of the rows from all peers' memory, adds them up in
// the order of ranks, and stores normalised activations (halves, or int8) into all peers' memory. Sums travel once, the residual not at all.
#include "norm_peers.h"

#include "element.h"
#include "quantize_group.h"

namespace ggml_tp {
namespace {

constexpr u32 kPollsPerLook = 64;
constexpr int kAhead = 4;  // peers whose words are asked for before one is added

/// Until the peer's word is `launch`; or the deadline: the results are not valid then, and nobody waits any more.
TP_DEVICE void wait_for(const PeerNormArgs& args, const u32* word, u32 launch) {
    PeerState* const own = args.state[args.rank];
    const u64 begin = tp_nanoseconds();
    for (u32 polls = 0; (i32)(tp_read_peer(word) - launch) < 0; ++polls) {
        tp_spin();
        if (polls % kPollsPerLook) continue;
        if (tp_read_peer(&own->late)) return;
        if (tp_nanoseconds() - begin <= args.deadline_ns) continue;
        tp_signal_peer(&own->late, 1);
        atomicExch(args.fault, (u32)kFaultLatePeer);
    }
}

TP_DEVICE void add_four(float (&v)[4], const TpInt4& w) {
    v[0] += __int_as_float(w.x), v[1] += __int_as_float(w.y), v[2] += __int_as_float(w.z), v[3] += __int_as_float(w.w);
}

/// The sum over up to 32 warps, in the order of warps; the same bits in every thread.
TP_DEVICE float block_sum(float v, float* partial) {
    v = tp_warp_sum(v);
    __syncthreads();  // the row before may still be read
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
    __syncthreads();
    float sum = 0.0f;
    for (u32 w = 0; w < blockDim.x / 32; w++) sum += partial[w];
    return sum;
}

}  // namespace
}  // namespace ggml_tp

using namespace ggml_tp;

TP_KERNEL(peer_norm, PeerNormArgs, 1024) {
    constexpr int kSteps = 4;
    __shared__ float partial[32];
    __shared__ int is_last;
    PeerState* const own = args.state[args.rank];
    const u32 launch = own->launches + 1, thread = threadIdx.x, n_ranks = (u32)args.n_ranks;
    if (thread < n_ranks) {
        // What was launched before has ended: this rank's summands are there, and nobody reads what peers write here.
        if (blockIdx.x == 0) tp_signal_peer(&args.state[thread]->arrived[args.rank], launch);
        wait_for(args, &own->arrived[thread], launch);
    }
    __syncthreads();
    const i64 n = args.norm.y.ne[0];
    for (i64 row = args.row_begin + blockIdx.x; row < args.row_end; row += gridDim.x) {
        const i64 at = row * n * 4;
        float v[kSteps][4] = {}, squares = 0.0f;
#pragma unroll
        for (int j = 0; j < kSteps; ++j) {
            const i64 i = ((i64)j * blockDim.x + thread) * 4;
            if (i >= n) break;
            for (u32 first = 0; first < n_ranks; first += kAhead) {
                TpInt4 w[kAhead];
#pragma unroll
                for (int r = 0; r < kAhead; ++r)
                    if (first + r < n_ranks) w[r] = tp_load_peer(args.summand[first + r] + at + i * 4);
#pragma unroll
                for (int r = 0; r < kAhead; ++r)
                    if (first + r < n_ranks) add_four(v[j], w[r]);
            }
            add_four(v[j], *(const TpInt4*)(args.norm.a.data + at + i * 4));
            store_four(args.norm.sum.data + at + i * 4, v[j]);
            for (u32 r = 0; r < n_ranks; ++r)
                if (args.sum[r]) store_four(args.sum[r] + at + i * 4, v[j]);
            for (int e = 0; e < 4; ++e) squares += v[j][e] * v[j][e];
        }
        const float scale = 1.0f / sqrtf(block_sum(squares, partial) / (float)n + args.norm.eps);
#pragma unroll
        for (int j = 0; j < kSteps; ++j) {
            const i64 first = (i64)j * blockDim.x * 4, i = first + thread * 4;
            if (first >= n) break;  // for the whole block: quantising needs whole warps
            const bool inside = i < n;
            float weight[4] = {1, 1, 1, 1};
            if (inside && args.norm.has_weight) load_four(args.norm.weight.data + i * 4, weight);
            for (int e = 0; e < 4; ++e) v[j][e] *= scale * weight[e];
            if (inside) store_four(args.norm.y.data + at + i * 4, v[j]);
            for (u32 r = 0; r < n_ranks; ++r) {
                if (inside && args.y[r]) store_four(args.y[r] + at + i * 4, v[j]);
                if (args.norm.xq) leave_four(args.norm.form, v[j], i, inside, args.xq[r], args.xd[r], (u32)row, n);
            }
        }
    }
    __syncthreads();
    if (thread == 0) is_last = tp_count_peer(&own->blocks) == gridDim.x - 1;
    __syncthreads();
    if (!is_last) return;
    // The other blocks' rows are with the peers. This launch ends when all peers' are here, and when they have read this rank's summands.
    if (thread < n_ranks) {
        tp_signal_peer(&args.state[thread]->done[args.rank], launch);
        wait_for(args, &own->done[thread], launch);
    }
    __syncthreads();
    if (thread == 0) {
        own->blocks = 0;
        own->launches = launch;
    }
}
