// All_reduces together with the residual, the norm and the activations behind it, over direct links.
// Of many rows in two steps (pull_norm): a rank reads its share of the rows from all peers' memory, adds them up in the order of ranks, and stores normalised
// activations (halves, or int8) into all peers' memory. Sums travel once, the residual not at all.
// Of few in one (push_norm): each rank's summands go to all peers as words that say themselves that they are there, and every rank does all rows.
#include "norm_peers.h"

#include "element.h"
#include "quantize_group.h"

namespace ggml_tp {
namespace {

constexpr u32 kPollsPerLook = 64;
constexpr int kAhead = 4;  // peers whose words are asked for before one is added

/// Until is_there(); or the deadline: the results are not valid then, and nobody waits any more.
template <class IsThere>
TP_DEVICE void wait_until(PeerState* own, u32* fault, u64 deadline_ns, IsThere is_there) {
    u64 begin = 0;
    for (u32 polls = 0; !is_there(); ++polls) {
        tp_spin();
        if (polls % kPollsPerLook) continue;
        if (tp_read_peer(&own->late)) return;
        const u64 now = tp_nanoseconds();
        if (polls == 0) begin = now;
        if (now - begin <= deadline_ns) continue;
        tp_signal_peer(&own->late, 1);
        atomicExch(fault, (u32)kFaultLatePeer);
    }
}
/// Until the peer's word is `launch`.
TP_DEVICE void wait_for(const PullNormArgs& args, const u32* word, u32 launch) {
    wait_until(args.state[args.rank], args.fault, args.deadline_ns, [&] { return (i32)(tp_read_peer(word) - launch) >= 0; });
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

/// Of a row, v being its sums: y, and what leave(v, i, inside) makes of elements i to i + 3. All threads call it, and leave is called by whole warps.
template <int kSteps, class Leave>
TP_DEVICE void normalise(const FusedNormArgs& norm, i64 row, float (&v)[kSteps][4], float squares, float* partial, const Leave& leave) {
    const i64 n = norm.y.ne[0];
    const float scale = 1.0f / sqrtf(block_sum(squares, partial) / (float)n + norm.eps);
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
        const i64 first = (i64)j * blockDim.x * 4, i = first + threadIdx.x * 4;
        if (first >= n) break;  // for the whole block: quantising needs whole warps
        const bool inside = i < n;
        float weight[4] = {1, 1, 1, 1};
        if (inside && norm.has_weight) load_four(norm.weight.data + i * 4, weight);
        for (int e = 0; e < 4; ++e) v[j][e] *= scale * weight[e];
        if (inside) store_four(norm.y.data + (row * n + i) * 4, v[j]);
        leave(v[j], i, inside);
    }
}

}  // namespace
}  // namespace ggml_tp

using namespace ggml_tp;

TP_KERNEL(pull_norm, PullNormArgs, 1024) {
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
        normalise(args.norm, row, v, squares, partial, [&](const float(&four)[4], i64 i, bool inside) {
            for (u32 r = 0; r < n_ranks; ++r) {
                if (inside && args.y[r]) store_four(args.y[r] + at + i * 4, four);
                if (args.norm.xq) leave_four(args.norm.form, four, i, inside, args.xq[r], args.xd[r], (u32)row, n);
            }
        });
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

// All blocks are on the device at once, and push a row before they wait for its peers'.
TP_KERNEL(push_norm, PushNormArgs, 512) {
    constexpr int kSteps = 8;
    __shared__ float partial[32];
    __shared__ u32 number;
    PeerState* const own = args.own;
    const int thread = (int)threadIdx.x, rank = args.rank, n_ranks = args.n_ranks, step = (int)blockDim.x * 4;
    if (thread == 0) number = own->launches + 1;
    const FusedNormArgs& norm = args.norm;
    const int n = (int)norm.y.ne[0], rows = (int)norm.y.ne[1];
    const i64 row_words = (n + step - 1) / step * step;
    i32 count = 0;
    u32 launch = 0;
    for (int row = (int)blockIdx.x; row < rows; row += (int)gridDim.x) {
        const i64 at = (i64)row * n * 4;
        char* const place = (norm.has_b ? norm.b.data : norm.a.data) + at;
        // A row has one word an element; threads' pairs of words lie side by side.
        const i64 of_row = row * row_words + thread * 2;
#pragma unroll 1
        for (int first = 0; first < n; first += step) {
            float summand[4] = {};
            const int i = first + thread * 4;
            if (i < n) {
                if (args.summand.n) sum_four(args.summand, row, i, place + i * 4, summand);
                else load_four(place + i * 4, summand);
            }
            if (launch == 0) {
                __syncthreads();
                launch = number;
                if (thread == 0) count = atomicAdd((i32*)&own->blocks, 1);  // it has read the number of the launch, which the last one may count up
            }
            for (int r = 0; r < n_ranks; ++r) {
                u64* const to = args.inbox[r] + of_row + first + ((launch % 2 ? n_ranks : 0) + rank) * args.inbox_words;
                tp_store_tagged_pair(to, summand[0], summand[1], launch);
                tp_store_tagged_pair(to + step / 2, summand[2], summand[3], launch);
            }
        }
        float v[kSteps][4] = {}, squares = 0.0f;
#pragma unroll
        for (int j = 0; j < kSteps; ++j) {
            const int i = j * step + thread * 4;
            if (i >= n) break;
            float residual[4];
            if (norm.has_b) load_four(norm.a.data + at + i * 4, residual);  // on its way while peers' words are
            const u64* const from = args.inbox[rank] + of_row + j * step + (launch % 2 ? n_ranks * args.inbox_words : 0);
            for (int first = 0; first < n_ranks; first += kAhead) {
                TpTaggedPair w[kAhead][2];
                wait_until(own, args.fault, args.deadline_ns, [&] {
                    bool there = true;
#pragma unroll
                    for (int r = 0; r < kAhead; ++r) {
                        if (first + r >= n_ranks) break;
                        const u64* const pair = from + (first + r) * args.inbox_words;
                        w[r][0] = tp_load_tagged_pair(pair), w[r][1] = tp_load_tagged_pair(pair + step / 2);
                    }
#pragma unroll
                    for (int r = 0; r < kAhead; ++r) {
                        if (first + r >= n_ranks) break;
                        for (const TpTaggedPair& pair : w[r]) there &= (u32)(pair.first >> 32) == launch && (u32)(pair.second >> 32) == launch;
                    }
                    return there;
                });
#pragma unroll
                for (int r = 0; r < kAhead; ++r) {
                    if (first + r >= n_ranks) break;
                    add_four(v[j], {(int)w[r][0].first, (int)w[r][0].second, (int)w[r][1].first, (int)w[r][1].second});
                }
            }
            if (norm.has_b) {
                for (int e = 0; e < 4; ++e) v[j][e] += residual[e];
                store_four(norm.sum.data + at + i * 4, v[j]);
            }
            for (int e = 0; e < 4; ++e) squares += v[j][e] * v[j][e];
        }
        normalise(norm, row, v, squares, partial, [&](const float(&four)[4], i64 i, bool inside) {
            if (norm.xq) leave_four(norm.form, four, i, inside, norm.xq, norm.xd, (u32)row, n);
        });
    }
    if (thread == 0 && count == (i32)gridDim.x - 1) {
        own->blocks = 0;
        own->launches = launch;
    }
}
