// A token's work in one persistent kernel (sm_90): a block per multiprocessor walks a table of stages. What limits decode is reading the
// weights once, so one warp streams them: it walks the products' tiles ahead of everybody, through a ring in shared memory, and never waits
// for activations. Eight warps multiply; each lane keeps its pieces of the input in registers for all rows of a product, so that
// shared memory carries the weights only and the multiplying is faster than the stream: after a wait it catches up on a full ring. One
// warp adds up what warps share and stores results, so nobody waits for a store.
// Between stages blocks wait for each other on a counter in global memory. Who waits: thread 0, with an acquire, then a barrier of the
// multiplying warps: what other blocks wrote before they arrived is seen by all threads after it. Who arrives: the last thread to know that
// the block's stores of a stage are done (the storing warp after its last tile, else thread 0 behind a barrier), with a release.
// With several ranks, products whose sums are partial store them into an inbox on every rank and count there; see StreamReduce.
// Each wait has a deadline; after it nobody waits any more: the results are not valid, and the fault says so.
#include "stream.h"

#include "elementwise.h"
#include "flash_piece.h"
#include "get_row.h"
#include "rope_pair.h"
#include "vec_piece.h"

#if TP_ARCH >= 900

namespace ggml_tp {
namespace {

constexpr int kMultiply = 32 * kStreamWarps;
constexpr int kOuts = 4;      // tiles whose sums may wait to be stored
constexpr int kInFlight = 2;  // tiles on their way: more would queue the activations' loads behind them (719 -> 744 tokens/s in the prototype)
// Cycles between tiles that are fetched ahead of their stage: while a stage hands over to the next, a full stream makes its stores and loads
// wait in line (447 -> 466 tokens/s, llama 8B Q4_0, H200; from 1000 to 8000 alike).
constexpr u64 kEarlyPause = 4000;
constexpr u32 kPollsPerLook = 1024;  // at the clock

struct Shared {
    char x[kStreamMostK];
    float xd[kStreamMostK / 32 * 2];
    char stage[3][kStreamStageBytes];
    char streamed[512], stored[512];  // the products that the streaming and the storing warp are at
    float out[kOuts][kStreamMostRows];
    float squares[kStreamWarps];
    TpBarrier full[kStreamSlots], empty[kStreamSlots], out_full[kOuts], out_empty[kOuts];
    u32 late, stage_now;
};
static_assert(kStreamSlots * kStreamSlotBytes + sizeof(Shared) <= kStreamShared, "shared memory");

/// A position in a ring of n, and the parity of its phase.
template <int n>
struct Turn {
    int at = 0, parity = 0;
    TP_MEMBER void next() {
        if (++at == n) at = 0, parity ^= 1;
    }
};

TP_DEVICE void sync_multiplying() { tp_sync_some<kMultiply>(); }

/// The part and first row of a tile.
TP_DEVICE int part_of(const StreamProduct& p, int tile, i64& row) {
    int part = 0;
    while (part + 1 < p.n_parts && !p.glu) {
        const int tiles = (int)((p.part[part].n + p.rows - 1) / p.rows);
        if (tile < tiles) break;
        tile -= tiles;
        ++part;
    }
    row = (i64)tile * (p.glu ? p.rows / 2 : p.rows);
    return part;
}

/// Brings a product into shared memory, by one warp: the table lies in memory that the weights keep pushing out of the L2.
TP_DEVICE const StreamProduct& fetch_product(const StreamStage& stage, char* to, int& next) {
    static_assert(sizeof(StreamProduct) <= 512, "one step of a warp");
    next = stage.next_product;
    __syncwarp();
    ((TpInt4*)to)[threadIdx.x % 32] = ((const TpInt4*)stage.body)[threadIdx.x % 32];
    __syncwarp();
    return *(const StreamProduct*)to;
}

// ---- the warp that streams weights. What does not change from tile to tile is in registers, not read from the product for each copy again
// (docs/decisions.md).
TP_DEVICE void stream_weights(const StreamArgs& args, Shared& s, char* ring) {
    constexpr int kCopies = 8;  // of a tile: four planes, two halves
    Turn<kStreamSlots> slot, ahead;
    int issued = 0, landed = 0;
    for (int i = args.first_product, next; i < args.n_stages; i = next) {
        const StreamProduct& p = fetch_product(args.stages[i], s.streamed, next);
        if (threadIdx.x % 32 != 0) continue;
        const int pieces = p.glu ? 2 : 1, step = p.rows / pieces, n_copies = p.n_planes * pieces, n_parts = p.glu ? 1 : p.n_parts;
        u32 bytes[kCopies], all_bytes = 0;  // of a row
        const char* from[kCopies];
        char* to[kCopies];
#pragma unroll
        for (int c = 0; c < kCopies; ++c) {
            const int plane = p.glu ? c / 2 : c, half = p.glu ? c % 2 : 0;
            bytes[c] = c < n_copies ? (u32)p.row_bytes[plane % 4] : 0;
            to[c] = ring + (c < n_copies ? p.slot_offset[plane % 4] : 0) + half * step * (int)bytes[c];
            all_bytes += bytes[c];
        }
        int tile = blockIdx.x;
        for (int part = 0; part < n_parts; ++part) {
            const int n = (int)p.part[part].n, tiles = (n + step - 1) / step;
#pragma unroll
            for (int c = 0; c < kCopies; ++c) from[c] = p.part[p.glu ? c % 2 : part].plane[(p.glu ? c / 2 : c) % 4];
            for (; tile < tiles; tile += gridDim.x) {
                const int row = tile * step, rows = n - row < step ? n - row : step;
                while (issued - landed >= kInFlight) {
                    tp_barrier_wait(&s.full[ahead.at], ahead.parity);
                    ahead.next();
                    ++landed;
                    const u64 begin = tp_cycles();
                    while (i > (int)tp_peek(&s.stage_now) && tp_cycles() - begin < kEarlyPause) tp_spin();
                }
                ++issued;
                tp_barrier_wait(&s.empty[slot.at], slot.parity ^ 1);
                tp_barrier_expect(&s.full[slot.at], (u32)rows * all_bytes);
#pragma unroll
                for (int c = 0; c < kCopies; ++c)
                    if (c < n_copies) tp_bulk_load(to[c] + slot.at * kStreamSlotBytes, from[c] + (i64)row * bytes[c], (u32)rows * bytes[c], &s.full[slot.at]);
                slot.next();
            }
            tile -= tiles;
        }
    }
}

/// This block has done its part of a stage.
TP_DEVICE void arrive(const StreamArgs& args, const StreamProduct* pushed) {
    tp_signal(&args.state->arrived);
    if (!pushed) return;
    for (int r = 0; r < pushed->n_push; ++r) tp_signal_system(args.pushed[r]);
}

TP_DEVICE float activated(int op, float x) {
    switch (op) {
        case (int)GluOp::kSwiglu: return x / (1.0f + expf(-x));
        case (int)GluOp::kGeglu: return 0.5f * x * (1.0f + tanhf(0.79788456080286535588f * x * (1.0f + 0.044715f * x * x)));
        default: return x > 0.0f ? x : 0.0f;
    }
}

// ---- the warp that stores
TP_DEVICE void store_results(const StreamArgs& args, Shared& s) {
    const int lane = threadIdx.x % 32;
    Turn<kOuts> out;
    for (int i = args.first_product, next; i < args.n_stages; i = next) {
        const StreamProduct& p = fetch_product(args.stages[i], s.stored, next);
        if ((int)blockIdx.x >= p.n_tiles) continue;
        for (int tile = blockIdx.x; tile < p.n_tiles; tile += gridDim.x) {
            i64 row;
            const int part = part_of(p, tile, row);
            tp_barrier_wait(&s.out_full[out.at], out.parity);
            float v = 0;
            if (lane < p.rows)
                for (int g = 0; g < p.k_groups; ++g) v += s.out[out.at][g * p.rows + lane];
            __syncwarp();
            if (lane == 0) tp_barrier_arrive(&s.out_empty[out.at]);
            out.next();
            if (p.glu) {
                const int half = p.rows / 2;
                const float up = __shfl_sync(0xffffffffu, v, lane + half < 32 ? lane + half : lane);
                const i64 at = row + lane;
                if (lane < half && at < p.part[0].n) {
                    p.part[0].y[at] = v;
                    p.part[1].y[at] = up;
                    p.glu_y[at] = activated(p.glu - 1, v) * up;
                }
                continue;
            }
            const i64 at = row + lane;
            if (lane >= p.rows || at >= p.part[part].n) continue;
            p.part[part].y[at] = v;
            if (p.part[part].copy) p.part[part].copy[at] = v;
            for (int r = 0; r < p.n_push; ++r) p.push[r][at] = v;
        }
        __syncwarp();
        if (lane == 0) arrive(args, &p);
        if (lane == 0 && blockIdx.x == 0) args.cycles[i * kStreamTimes + kTimeStored] = tp_cycles();
    }
}

// ---- the multiplying warps
struct Walk {
    Turn<kStreamSlots> slot;
    Turn<kOuts> out;
};

TP_DEVICE void load_eight(const float* from, float (&v)[8]) {
    const TpInt4 a = *(const TpInt4*)from, b = *(const TpInt4*)(from + 4);
    v[0] = __int_as_float(a.x), v[1] = __int_as_float(a.y), v[2] = __int_as_float(a.z), v[3] = __int_as_float(a.w);
    v[4] = __int_as_float(b.x), v[5] = __int_as_float(b.y), v[6] = __int_as_float(b.z), v[7] = __int_as_float(b.w);
}
TP_DEVICE void store_eight(float* to, const float (&v)[8]) {
    ((TpInt4*)to)[0] = {__float_as_int(v[0]), __float_as_int(v[1]), __float_as_int(v[2]), __float_as_int(v[3])};
    ((TpInt4*)to)[1] = {__float_as_int(v[4]), __float_as_int(v[5]), __float_as_int(v[6]), __float_as_int(v[7])};
}

/// Elements [first, first + kSteps * 8 * threads) of a product's input, a thread eight neighbours a step; all loads go out before any is
/// used. Of what is written for others every block writes its share [from, to). Returns this thread's sum of squares.
template <int kSteps, bool kNorm>
TP_DEVICE float take_steps(const StreamProduct& p, Shared& s, int first, i64 from, i64 to) {
    const int thread = threadIdx.x;
    float v[kSteps][8], more[kNorm ? kSteps : 1][8], weight[kNorm ? kSteps : 1][8], squares = 0;
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
        const int at = first + (j * kMultiply + thread) * 8;
        for (int i = 0; i < 8; ++i) v[j][i] = 0;
        if (at < p.k) load_eight(p.a + at, v[j]);
        if constexpr (kNorm) {
            for (int i = 0; i < 8; ++i) more[j][i] = 0, weight[j][i] = 1;
            if (at < p.k && p.b) load_eight(p.b + at, more[j]);
            if (at < p.k && p.weight) load_eight(p.weight + at, weight[j]);
        }
    }
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
        const int at = first + (j * kMultiply + thread) * 8;
        if constexpr (kNorm) {
            for (int i = 0; i < 8; ++i) v[j][i] += more[j][i];
            if (at >= from && at < to && at < p.k) {
                if (p.sum) store_eight(p.sum + at, v[j]);
                if (p.sum_copy) store_eight(p.sum_copy + at, v[j]);
            }
            for (int i = 0; i < 8; ++i) squares += v[j][i] * v[j][i], v[j][i] *= weight[j][i];
        }
        float most = 0;
        for (int i = 0; i < 8; ++i) most = fmaxf(most, fabsf(v[j][i]));
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
        const float inverse = most > 0 ? 127.0f / most : 0.0f;
        int words[2] = {};
        float sum = 0;
        for (int i = 0; i < 8; ++i) {
            const float q = rintf(v[j][i] * inverse);
            sum += q;
            words[i / 4] |= ((int)q & 255) << 8 * (i % 4);
        }
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        if (at >= p.k) continue;
        *(int*)(s.x + at) = words[0];
        *(int*)(s.x + at + 4) = words[1];
        if (at % 32 == 0) {
            const float d = most / 127.0f;
            s.xd[at / 32 * 2] = d;
            s.xd[at / 32 * 2 + 1] = d * sum;
        }
    }
    return squares;
}

/// The input of a product, as int8 in shared memory, without the norm's 1 / root mean square: that is returned, and scales the results.
TP_DEVICE float take_input(const StreamProduct& p, Shared& s) {
    const int thread = threadIdx.x;
    const i64 share = ((p.k + gridDim.x - 1) / gridDim.x + 7) / 8 * 8, from = blockIdx.x * share, to = from + share;
    if (p.input != kInputNorm) {
        for (int first = 0; first < p.k; first += 4 * kMultiply * 8) take_steps<4, false>(p, s, first, from, to);
        sync_multiplying();
        return 1.0f;
    }
    float squares = 0;
    for (int first = 0; first < p.k; first += 2 * kMultiply * 8) squares += take_steps<2, true>(p, s, first, from, to);
    squares = tp_warp_sum(squares);
    if (thread % 32 == 0) s.squares[thread / 32] = squares;
    sync_multiplying();
    float total = 0;
    for (int w = 0; w < kStreamWarps; ++w) total += s.squares[w];
    const float scale = 1.0f / sqrtf(total / (float)p.k + p.eps);
    // The norm itself, for whoever else may read it: the last warp's work, while the others begin to multiply.
    if (p.norm && thread / 32 == kStreamWarps - 1)
        for (i64 at = from + thread % 32; at < to && at < p.k; at += 32)
            p.norm[at] = (p.a[at] + (p.b ? p.b[at] : 0.0f)) * scale * (p.weight ? p.weight[at] : 1.0f);
    return scale;
}

/// All tiles of a product. A warp takes two rows at a time, so that their loads, products and sums overlap.
template <int kType, int kPieces>
TP_DEVICE void multiply(const StreamProduct& p, Shared& s, const char* ring, Walk& walk, float scale) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, pieces = p.k / 32;
    const int row_groups = kStreamWarps / p.k_groups, group = warp / row_groups, first_row = warp % row_groups;
    TpInt4 x0[kPieces], x1[kPieces];
    float d0[kPieces], m0[kPieces], d1[kPieces], m1[kPieces];
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
        const int piece = (group * kPieces + j) * 32 + lane;
        const bool inside = piece < pieces;
        const int a = inside ? (int)Piece<kType>::first(piece) : 0, b = inside ? (int)Piece<kType>::second(piece) : 0;
        x0[j] = *(const TpInt4*)(s.x + a);
        x1[j] = *(const TpInt4*)(s.x + b);
        d0[j] = inside ? s.xd[a / 32 * 2] * scale : 0.0f, m0[j] = inside ? s.xd[a / 32 * 2 + 1] * scale : 0.0f;
        d1[j] = inside ? s.xd[b / 32 * 2] * scale : 0.0f, m1[j] = inside ? s.xd[b / 32 * 2 + 1] * scale : 0.0f;
    }
    const int rows = p.rows, n_tiles = p.n_tiles;
    int offset[4], stride[4];
#pragma unroll
    for (int f = 0; f < 4; ++f) offset[f] = p.slot_offset[f], stride[f] = p.row_bytes[f];
    for (int tile = blockIdx.x; tile < n_tiles; tile += gridDim.x) {
        tp_barrier_wait(&s.full[walk.slot.at], walk.slot.parity);
        tp_barrier_wait(&s.out_empty[walk.out.at], walk.out.parity ^ 1);
        const char* slot = ring + walk.slot.at * kStreamSlotBytes;
        for (int row = first_row; row < rows; row += 2 * row_groups) {
            const bool two = row + row_groups < rows;
            const int other = two ? row + row_groups : row;
            const char *plane[4], *plane_of_other[4];
#pragma unroll
            for (int f = 0; f < 4; ++f) plane[f] = slot + offset[f] + row * stride[f], plane_of_other[f] = slot + offset[f] + other * stride[f];
            float sum = 0, sum_of_other = 0;
#pragma unroll
            for (int j = 0; j < kPieces; ++j) {
                // Beyond the end: any weights, times an input of zero. A branch here would keep the loads from going out together.
                const int at = (group * kPieces + j) * 32 + lane, piece = at < pieces ? at : pieces - 1;
                Piece<kType> w, w_of_other;
                w.load((const char* const*)plane, piece, LoadShared());
                w_of_other.load((const char* const*)plane_of_other, piece, LoadShared());
                sum += w.dot(piece, x0[j], x1[j], {d0[j], m0[j]}, {d1[j], m1[j]});
                sum_of_other += w_of_other.dot(piece, x0[j], x1[j], {d0[j], m0[j]}, {d1[j], m1[j]});
            }
            sum = tp_warp_sum(sum);
            sum_of_other = tp_warp_sum(sum_of_other);
            if (lane == 0) s.out[walk.out.at][group * rows + row] = sum;
            if (lane == 0 && two) s.out[walk.out.at][group * rows + other] = sum_of_other;
        }
        __syncwarp();
        if (lane == 0) {
            tp_barrier_arrive(&s.empty[walk.slot.at]);
            tp_barrier_arrive(&s.out_full[walk.out.at]);
        }
        walk.slot.next();
        walk.out.next();
    }
}

template <int kType>
TP_DEVICE void multiply(const StreamProduct& p, Shared& s, const char* ring, Walk& walk, float scale) {
    if (p.pieces_each == 1) multiply<kType, 1>(p, s, ring, walk, scale);
    else if (p.pieces_each == 2) multiply<kType, 2>(p, s, ring, walk, scale);
    else multiply<kType, 4>(p, s, ring, walk, scale);
}

/// A stage that is no product: elements, rows or units of all blocks' threads.
TP_DEVICE void do_stage(const StreamStage& stage, Shared& s) {
    const char* body = stage.body;
    const int thread = threadIdx.x, lane = thread % 32;
    const i64 first = (i64)blockIdx.x * kMultiply + thread, step = (i64)gridDim.x * kMultiply;
    switch (stage.kind) {
        case kStreamReduce: {
            const StreamReduce& a = *(const StreamReduce*)body;
            for (i64 i = first; i < a.n; i += step) {
                float sum = a.inbox[i];
                for (int r = 1; r < a.n_ranks; ++r) sum += a.inbox[r * a.n + i];
                a.y[i] = sum;
                if (a.copy) a.copy[i] = sum;
            }
            break;
        }
        case kStreamNormRows: {  // a warp a row
            const FusedNormArgs& a = ((const StreamNormRows*)body)->norm;
            const i64 rows = a.y.ne[1] * a.y.ne[2] * a.y.ne[3], n = a.y.ne[0];
            for (i64 row = first / 32; row < rows; row += step / 32) {
                const Index at = row_index((u32)row, a.y.ne);
                const float* x = (const float*)element_at(a.a, at);
                float squares = 0;
                for (i64 i = lane; i < n; i += 32) squares += x[i] * x[i];
                const float scale = 1.0f / sqrtf(tp_warp_sum(squares) / (float)n + a.eps);
                float* y = (float*)element_at(a.y, at);
                for (i64 i = lane; i < n; i += 32) y[i] = x[i] * scale * (a.has_weight ? ((const float*)a.weight.data)[i] : 1.0f);
            }
            break;
        }
        case kStreamBinary: {
            const StreamBinary& b = *(const StreamBinary*)body;
            for (i64 i = first; i < tp_elems(b.args.y); i += step) {
                const Index4 at4 = tp_index(b.args.y.ne, i);
                const Index at = {at4.i[0], at4.i[1], at4.i[2], at4.i[3]};
                const float x = load(b.args.a, at), y = load(b.args.b, wrap(at, b.args.b.ne));
                store(b.args.y, at, b.op == (i32)BinaryOp::kAdd ? x + y : b.op == (i32)BinaryOp::kSub ? x - y : b.op == (i32)BinaryOp::kMul ? x * y : x / y);
            }
            break;
        }
        case kStreamTurns: {
            const StreamTurns& a = *(const StreamTurns*)body;
            for (i64 i = first; i < a.rope.n_dims / 2; i += step)
                rotation(a.rope, (float)*(const i32*)a.rope.pos.data, i, i, a.table + 2 * i, a.table + 2 * i + 1);
            break;
        }
        case kStreamRopeStore: {  // blocks of 256 threads
            const StreamRope& a = *(const StreamRope*)body;
            for (i64 block = first / 256; block < stage.count; block += step / 256) rope_store_one<true>(a.args, block, thread % 256, a.table);
            break;
        }
        case kStreamSetRows: {
            const SetRowsArgs& a = *(const SetRowsArgs*)body;
            for (i64 i = first; i < tp_elems(a.x); i += step) {
                const Index4 at = tp_index(a.x.ne, i);
                set_row_element(a, at.i[0], at.i[1], at.i[2], at.i[3], tp_load(a.x.type, tp_at(a.x, at)));
            }
            break;
        }
        case kStreamGetRows: {
            const GetRowsArgs& a = *(const GetRowsArgs*)body;
            for (i64 i = first; i < tp_elems(a.y); i += step) get_row_element(a, i);
            break;
        }
        case kStreamFlash: {
            const StreamFlash& f = *(const StreamFlash*)body;
            float* merged = (float*)s.x;
            for (int unit = blockIdx.x; unit < f.n_units * f.args.n_splits; unit += gridDim.x) {
                const int split = unit % f.args.n_splits, head = unit / f.args.n_splits;
                flash_split_unit<1, 4, kStreamWarps, true>(f.args, split, head, 0, thread, f.args.group_heads, merged, sync_multiplying);
            }
            break;
        }
        case kStreamCombine: {  // a warp for 32 elements of a head
            const FlashCombineArgs& a = ((const StreamCombine*)body)->args;
            const i64 chunks = (a.y.ne[0] + 31) / 32;
            for (i64 c = first / 32; c < chunks * a.y.ne[1]; c += step / 32) {
                const i64 head = c / chunks, i = c % chunks * 32 + lane;
                const float y = flash_combined(a, head, 0, 0, i);
                if (i < a.y.ne[0]) *(float*)(a.y.data + i * 4 + head * a.y.nb[1]) = y;
            }
            break;
        }
        default: break;
    }
}

/// Thread 0: until `counter` has passed `target`, or the deadline.
template <bool kSystem>
TP_DEVICE void wait_for(const u32* counter, u32 target, const StreamArgs& args, Shared& s) {
    if (s.late) return;
    const u64 begin = tp_nanoseconds();
    for (u32 polls = 1;; ++polls) {
        const u32 now = kSystem ? tp_read_signal_system(counter) : tp_read_signal(counter);
        if ((i32)(now - target) >= 0) return;
        if (polls % kPollsPerLook == 0 && tp_nanoseconds() - begin > args.deadline_ns) break;
        tp_spin();
    }
    s.late = 1;
    atomicExch(args.fault, (u32)kFaultLatePeer);
}

TP_DEVICE void multiply_and_more(const StreamArgs& args, Shared& s, const char* ring) {
    const int thread = threadIdx.x;
    constexpr int kWords = kStreamStageBytes / 16;
    Walk walk;
    float scale = 1.0f;
    u32 pushed_before = 0;
    if (thread == 0) pushed_before = args.state->pushed_before;
    // Stages come into shared memory two ahead: see fetch_product.
    auto fetch = [&](int stage) {
        if (thread < kWords && stage < args.n_stages) tp_copy_async((TpInt4*)s.stage[stage % 3] + thread, (const TpInt4*)(args.stages + stage) + thread);
    };
    auto mark = [&](int stage, StreamTime what) {
        if (thread == 0 && blockIdx.x == 0) args.cycles[stage * kStreamTimes + what] = tp_cycles();
    };
    fetch(0);
    fetch(1);
    tp_copy_wait();
    sync_multiplying();
    for (int i = 0; i < args.n_stages; ++i) {
        mark(i, kTimeBegin);
        const StreamStage& stage = *(const StreamStage*)s.stage[i % 3];
        if (thread == 0 && stage.wait == 1) wait_for<false>(&args.state->arrived, (u32)i * gridDim.x, args, s);
        if (thread == 0 && stage.wait == 2) wait_for<true>(&args.state->pushed, pushed_before + (u32)(stage.pushes * args.blocks_of_all), args, s);
        tp_copy_wait();
        sync_multiplying();  // and nobody reads the stage before any more, and everybody sees the next
        fetch(i + 2);
        mark(i, kTimeWaited);
        if (thread == 0) tp_poke(&s.stage_now, (u32)i);
        if (stage.kind != kStreamProduct) {
            do_stage(stage, s);
            sync_multiplying();
            if (thread == 0) arrive(args, nullptr);
            mark(i, kTimeInput);
            mark(i, kTimeDone);
            continue;
        }
        const StreamProduct& p = *(const StreamProduct*)stage.body;
        if (p.input != kInputKept) scale = take_input(p, s);
        mark(i, kTimeInput);
        if (p.type == kQ4_0) multiply<kQ4_0>(p, s, ring, walk, scale);
        else if (p.type == kQ8_0) multiply<kQ8_0>(p, s, ring, walk, scale);
        else if (p.type == kQ4_K) multiply<kQ4_K>(p, s, ring, walk, scale);
        else multiply<kQ6_K>(p, s, ring, walk, scale);
        mark(i, kTimeDone);
        if ((int)blockIdx.x >= p.n_tiles) {  // nothing for the storing warp; what take_input wrote counts all the same
            sync_multiplying();
            if (thread == 0) arrive(args, &p);
        }
    }
}

}  // namespace
}  // namespace ggml_tp

TP_KERNEL_COOPERATIVE(stream, StreamArgs, 320) {
    using namespace ggml_tp;
    static_assert(kStreamThreads == 320, "the launch bound above");
    TP_DYN_SHARED(char, ring);
    Shared& s = *(Shared*)(ring + kStreamSlots * kStreamSlotBytes);
    const int thread = threadIdx.x;
    if (thread == 0) {
        for (int i = 0; i < kStreamSlots; ++i) tp_barrier_init(&s.full[i], 1), tp_barrier_init(&s.empty[i], kStreamWarps);
        for (int i = 0; i < kOuts; ++i) tp_barrier_init(&s.out_full[i], kStreamWarps), tp_barrier_init(&s.out_empty[i], 1);
        s.late = 0, s.stage_now = 0;
        tp_barrier_init_fence();
    }
    __syncthreads();
    if (thread < kMultiply) multiply_and_more(args, s, ring);
    else if (thread < kMultiply + 32) stream_weights(args, s, ring);
    else store_results(args, s);
    __syncthreads();
    // The last block to end leaves the counters as the next launch wants them: nobody waits on them any more.
    if (thread == 0 && tp_count(&args.state->done) == gridDim.x - 1) {
        args.state->arrived = 0;
        args.state->done = 0;
        args.state->pushed_before += (u32)(args.n_pushes * args.blocks_of_all);
    }
}

#endif
