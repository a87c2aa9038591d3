// A token's work in one persistent kernel (sm_90): a block per multiprocessor walks a table of stages. What limits decode is reading the
// weights once, so one warp streams them: it walks the products' tiles ahead of everybody, through a ring in shared memory, and never waits
// for activations. Eight warps multiply; each lane keeps its pieces of the input in registers for all rows of a product, so that
// shared memory carries the weights only and the multiplying is faster than the stream: after a wait it catches up on a full ring. One
// warp adds up what warps share and stores results, so nobody waits for a store.
// Between stages blocks wait for each other on a counter in global memory. Who waits: thread 0, with an acquire, then a barrier of the
// multiplying warps: what other blocks wrote before they arrived is seen by all threads after it. Who arrives: the last thread to know that
// the block's stores of a stage are done (the storing warp after its last tile, else thread 0 behind a barrier), with a release.
// With several ranks, products whose sums are partial store them into an inbox on every rank; see StreamReduce.
// Each wait has a deadline; after it nobody waits any more: the results are not valid, and the fault says so.
#include "stream.h"

#include "elementwise.h"
#include "flash_columns.h"
#include "flash_piece.h"
#include "get_row.h"
#include "quantize_group.h"
#include "rope_pair.h"
#include "sort_row.h"
#include "vec_piece.h"

#if TP_ARCH >= 900

namespace ggml_tp {
namespace {

constexpr int kMultiply = 32 * kStreamWarps;
constexpr int kOuts = 3;  // tiles whose sums may wait to be stored: what shared memory has left
// Pieces on their way to a multiprocessor. More would queue the activations' loads and the results' stores behind them: 55 KB of the stage that
// is multiplied, where bandwidth counts; 18 KB ahead of it, while stages hand over (docs/decisions.md). Experts' tiles are small.
constexpr int kInFlight = 3, kInFlightEarly = 1, kInFlightExperts = 2 * kStreamPieces;
constexpr int kAheadCells = 512;     // of the cache, that a block asks for ahead
constexpr u32 kPollsPerLook = 1024;  // at the clock
constexpr int kFloatRows = 4;        // of a product of floats, that a block computes at once

struct Shared {
    char x[kStreamMostK];
    float xd[kStreamMostK / 32 * 2];
    char stage[3][kStreamStageBytes];
    char streamed[sizeof(StreamExperts)], stored[sizeof(StreamExperts)];  // the products that the streaming and the storing warp are at
    float out[kOuts][kStreamMostSums];
    float squares[kStreamWarps];
    i32 experts[kVecSlots];  // that the last router chose
    float weights[kVecSlots];
    TpBarrier full[kStreamSlots * kStreamPieces], empty[kStreamSlots], out_full[kOuts], out_empty[kOuts];
    TpBarrier routed;   // the blocks have arrived that a router's choice waits for
    TpBarrier weighed;  // the storing warp has read what the last one chose
    u32 late, stage_now;
    u32 pushed_before;
    u32* fault;
    i64 inbox_words;
    u64 deadline_ns;
};
static_assert(kStreamSlots * kStreamSlotBytes + sizeof(Shared) <= kStreamShared, "shared memory");

// The parts of this kernel are functions that are called: inlined into one, their invariants took the registers of each other's loops
// (docs/decisions.md). They find shared memory by themselves, as addresses that are passed would be generic ones.
TP_DEVICE char* ring_of() {
    TP_DYN_SHARED(char, ring);
    return ring;
}
TP_DEVICE Shared& shared_of() { return *(Shared*)(ring_of() + kStreamSlots * kStreamSlotBytes); }
TP_DEVICE const StreamStage& stage_at(int at) { return *(const StreamStage*)shared_of().stage[at]; }

/// A position in a ring of n, and the parity of its phase.
template <int n>
struct Turn {
    int at = 0, parity = 0;
    TP_MEMBER void next() {
        if (++at == n) at = 0, parity ^= 1;
    }
};

TP_DEVICE void sync_multiplying() { tp_sync_some<kMultiply>(); }

/// The part and first row of a tile, of one slot's where experts' tiles are.
TP_DEVICE int part_of(const StreamProduct& p, int tile, i64& row) {
    const int part = (tile >= p.first_tile[1]) + (tile >= p.first_tile[2]);
    row = (i64)(tile - p.first_tile[part]) * (p.glu ? p.rows / 2 : p.rows);
    return part;
}

/// Brings a product into shared memory, by one warp: the table lies in memory that the weights keep pushing out of the L2.
TP_DEVICE const StreamExperts& fetch_product(const StreamStage& stage, char* to, int& next) {
    static_assert(sizeof(StreamExperts) % 16 == 0 && sizeof(StreamExperts) <= 1024, "two steps of a warp");
    next = stage.next_product;
    __syncwarp();
    for (int i = threadIdx.x % 32; i < (int)sizeof(StreamExperts) / 16; i += 32) ((TpInt4*)to)[i] = ((const TpInt4*)stage.body)[i];
    __syncwarp();
    return *(const StreamExperts*)to;
}

// ---- a router's choice. The warp that streams makes it, since it is who waits for it: each block for itself, which is cheaper than asking another.
// It is code that runs once a layer, at five cycles an instruction: experts come first (with their weights in one
// function, unrolled, it took 7,000 cycles before that). Weights are the storing warp's work, while it waits for the experts' last product.

TP_DEVICE float logit_of(const StreamRoute& r, int e, bool inside) {
    const float x = __int_as_float(tp_load_word_in_order(r.logits + e, inside));
    return r.logits_bias ? x + __int_as_float(tp_load_word_in_order(r.logits_bias + e, inside)) : x;
}
/// An expert's logit, or its sigmoid.
TP_DEVICE float gate_of(const StreamRoute& r, int e, bool inside) {
    const float x = logit_of(r, e, inside);
    return r.gating == kGatingSigmoid ? 1.0f / (1.0f + expf(-x)) : x;
}
/// The soft max of v over the values of all lanes' calls: first their largest and sum.
struct SoftMax {
    float scale, most = -INFINITY, inverse = 0;
    TP_MEMBER float power(float v) const { return most == -INFINITY ? 0.0f : expf(v * scale - most); }
    TP_MEMBER float of(float v) const { return power(v) * inverse; }
};
TP_DEVICE SoftMax soft_max_of_gates(const StreamRoute& r) {
    const int lane = threadIdx.x % 32;
    SoftMax out{r.scale_before};
    for (int e = lane; e < r.n_expert; e += 32) out.most = fmaxf(out.most, gate_of(r, e, true) * out.scale);
    out.most = tp_warp_max(out.most);
    float sum = 0;
    for (int e = lane; e < r.n_expert; e += 32) sum += out.power(gate_of(r, e, true));
    sum = tp_warp_sum(sum);
    out.inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
    return out;
}

/// The experts of one token, into shared memory: the first of the largest, again and again, in the order of sort_row.h. A soft max without a
/// selection bias orders as its logits do.
template <int kPer>
TP_DEVICE void choose_experts(const StreamRoute& r, Shared& s) {
    const int lane = threadIdx.x % 32, n = r.n_expert, n_used = r.n_used;
    u32 key[kPer], left = 0;
    const SoftMax gates = r.selection_bias && r.gating == kGatingSoftMax ? soft_max_of_gates(r) : SoftMax{};
#pragma unroll
    for (int j = 0; j < kPer; ++j) {
        const int e = lane + 32 * j;
        float by = gate_of(r, e, e < n);
        if (r.selection_bias) by = (r.gating == kGatingSoftMax ? gates.of(by) : by) + __int_as_float(tp_load_word_in_order(r.selection_bias + e, e < n));
        key[j] = e < n ? sort_key(by, true) : ~0u;
        left |= (u32)(e < n) << j;
    }
    for (int i = 0; i < n_used; ++i) {
        u32 best = ~0u, first = ~0u;
#pragma unroll
        for (int j = 0; j < kPer; ++j)
            if (left >> j & 1 && key[j] < best) best = key[j];
        best = tp_warp_min(best);
#pragma unroll
        for (int j = kPer; j-- > 0;)
            if (left >> j & 1 && key[j] == best) first = (u32)(lane + 32 * j);
        const int e = (int)tp_warp_min(first);
        if (lane == e % 32) left &= ~(1u << e / 32);
        if (lane == 0) s.experts[i] = e;
    }
    __syncwarp();
}
TP_OUTLINE void choose_experts() {
    Shared& s = shared_of();
    const StreamRoute& r = ((const StreamExperts*)s.streamed)->route;
    if (r.n_expert <= 128) choose_experts<4>(r, s);
    else if (r.n_expert <= 256) choose_experts<8>(r, s);
    else choose_experts<kStreamMostExperts / 32>(r, s);
}
/// Their weights, into shared memory; arithmetic and order are those of chain.cu. And all that others may read.
TP_OUTLINE void weigh_experts(const StreamRoute& r, const StreamProduct& p) {
    Shared& s = shared_of();
    const int lane = threadIdx.x % 32, n = r.n_expert, n_used = r.n_used, n_writers = p.n_tiles < (int)gridDim.x ? p.n_tiles : (int)gridDim.x;
    const bool writes = (int)blockIdx.x == n_writers - 1;  // that block has the fewest tiles
    const SoftMax gates = r.gating == kGatingSoftMax ? soft_max_of_gates(r) : SoftMax{};
    auto gated = [&](int e, bool inside) {
        const float gate = gate_of(r, e, inside);
        return r.gating == kGatingSoftMax ? gates.of(gate) : gate;
    };
    const bool used = lane < n_used;
    float weight = used ? gated(s.experts[lane], true) : 0.0f;
    auto give = [&](float* to, float v) {
        if (writes && to && used) to[lane] = v;
    };
    give(r.chosen, weight);
    if (r.steps & kRouteSoftMax) {
        SoftMax after{r.scale_after, tp_warp_max(used ? weight * r.scale_after : -INFINITY)};
        const float sum = tp_warp_sum(used ? after.power(weight) : 0.0f);
        after.inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
        weight = used ? after.of(weight) : 0.0f;
        give(r.after, weight);
    }
    if (r.steps & kRouteDivide) {
        float sum = tp_warp_sum(weight);
        if (writes && r.sum && lane == 0) *r.sum = sum;
        if (r.steps & kRouteClamp) sum = sum < r.least ? r.least : sum > r.most ? r.most : sum;
        if (writes && r.clamped_sum && lane == 0) *r.clamped_sum = sum;
        weight = weight / sum;
        give(r.norms, weight);
    }
    if (r.steps & kRouteScale) {
        weight = weight * r.factor + r.shift;
        give(r.scaled_weights, weight);
    }
    if (used) s.weights[lane] = weight;
    if (r.visible && (int)blockIdx.x < n_writers) {
        for (int e = lane; e < n && writes; e += 32) {
            const float v = gated(e, true);
            if (r.biased) r.biased[e] = logit_of(r, e, true);
            if (r.gated) r.gated[e] = v;
            if (r.selection) r.selection[e] = v + r.selection_bias[e];
        }
        // The whole order: a block finds the places of some experts.
        auto key_of = [&](int e) {
            const float by = r.selection_bias ? gated(e, true) + r.selection_bias[e] : gate_of(r, e, true);
            return sort_key(by, true);
        };
        for (int e = blockIdx.x; r.order && e < n; e += n_writers) {
            const u32 key = key_of(e);
            float before = 0;
            for (int other = lane; other < n; other += 32) {
                const u32 of_other = key_of(other);
                before += of_other < key || (of_other == key && other < e) ? 1.0f : 0.0f;
            }
            const int place = (int)tp_warp_sum(before);
            if (lane == 0 && place < r.n_order) r.order[place] = e;
        }
    }
    __syncwarp();
}

// ---- the warp that streams weights. A lane has a copy of each tile (two where slots times planes are more than lanes): one thread took 280 cycles
// for each of a tile's copies, 6,700 for those of eight experts.
struct Copy {
    const char* from = nullptr;
    u32 bytes = 0, to = 0;  // of a row; within a slot
    /// Rows [row, row + rows) of the matrix, into the slot from its row `at` on.
    TP_MEMBER void issue(TpSharedAt slot, TpBarrierAt full, u32 at, i64 row, u32 rows, u64 once) const {
        const u32 n = rows * bytes;
        if (n) tp_bulk_load_once(slot + (to + at * bytes), from + row * bytes, n, full, once);
    }
};
TP_OUTLINE void stream_weights(const StreamArgs& args) {
    Shared& s = shared_of();
    const TpSharedAt ring(ring_of());
    const TpBarrierAt full(s.full), empty(s.empty);
    const int lane = threadIdx.x % 32;
    Turn<kStreamSlots> slot;
    Turn<kStreamSlots * kStreamPieces> ahead;
    Turn<1> routed, weighed;
    bool weighs = false;  // the storing warp, what was chosen last
    const u64 once = tp_read_once();
    int in_flight = 0, most_in_flight = kInFlight;
    bool early = true;  // ahead of the stage that is multiplied
    // Room for piece q of the next tile of product i, and its bytes announced (a copy may land before: the phase waits for the announcement). All
    // lanes wait: one that did so for the others cost 1,000 cycles a tile, in leaving and joining them again.
    auto begin_piece = [&](int i, int q, u32 bytes) {
        while (in_flight >= (early ? kInFlightEarly : most_in_flight)) {
            tp_barrier_wait(full + ahead.at, ahead.parity);
            ahead.next();
            --in_flight;
            if (early) early = i > __shfl_sync(0xffffffffu, (int)tp_peek(&s.stage_now), 0);  // one answer for all lanes
        }
        ++in_flight;
        if (q == 0) {
            __syncwarp();  // a lane that fell a turn of the ring behind would wait for a parity that has come and gone: seen where lanes' answers differed
            tp_barrier_wait(empty + slot.at, slot.parity ^ 1);
        }
        if (lane == 0) tp_barrier_expect(full + (slot.at * kStreamPieces + q), bytes);
    };
    for (int i = args.first_product, next; i < args.n_stages; i = next) {
        const StreamExperts& experts = fetch_product(args.stages[i], s.streamed, next);
        const StreamProduct& p = experts.product;
        if (p.role == kExpertsEach) {
            tp_barrier_wait(&s.routed, routed.parity);
            routed.next();
            if (weighs) {
                tp_barrier_wait(&s.weighed, weighed.parity);
                weighed.next();
            }
            choose_experts();
            weighs = (int)blockIdx.x < p.n_tiles;
            if (!weighs) weigh_experts(experts.route, p);
        }
        early = !p.role;
        most_in_flight = p.role ? kInFlightExperts : kInFlight;
        const int halves = p.glu ? 2 : 1, step = p.rows / halves, n_planes = p.n_planes, n_tiles = p.n_tiles, piece_rows = 1 << p.piece_shift;
        u32 row_bytes = 0;  // of all copies
        for (int f = 0; f < n_planes; ++f) row_bytes += (u32)p.row_bytes[f];
        if (p.role == kExpertsSum) {
            const int n = (int)p.part[0].n, slots = p.slots;
            Copy copies[2];
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const int j = (lane + 32 * c) / n_planes, f = lane + 32 * c - j * n_planes;
                if (j >= slots) continue;
                copies[c].bytes = (u32)p.row_bytes[f];
                copies[c].from = p.part[0].plane[f] + (i64)s.experts[j] * n * copies[c].bytes;
                copies[c].to = (u32)(p.slot_offset[f] + j * step * p.row_bytes[f]);
            }
            for (int tile = blockIdx.x; tile < n_tiles; tile += gridDim.x) {
                const int row = tile * step, rows = n - row < step ? n - row : step;
#pragma unroll
                for (int q = 0; q < kStreamPieces; ++q) {
                    begin_piece(i, q, q ? 0u : (u32)(rows * slots) * row_bytes);
#pragma unroll
                    for (int c = 0; c < 2; ++c)
                        copies[c].issue(ring + slot.at * kStreamSlotBytes, full + slot.at * kStreamPieces, 0, row, q ? 0u : (u32)rows, once);
                }
                slot.next();
            }
            continue;
        }
        const int f = lane / halves, half = lane - f * halves, n_parts = p.glu ? 1 : p.n_parts;
        Copy copy;
        if (f < n_planes) copy.bytes = (u32)p.row_bytes[f], copy.to = (u32)(p.slot_offset[f] + half * step * p.row_bytes[f]);
        row_bytes *= (u32)halves;
        int tile = blockIdx.x;
        for (int part = 0; part < n_parts; ++part) {
            const int n = (int)p.part[part].n, tiles_each = (n + step - 1) / step, tiles = p.role == kExpertsEach ? n_tiles : tiles_each;
            copy.from = p.part[p.glu ? half : part].plane[f % 4];
            for (; tile < tiles; tile += gridDim.x) {
                const int j = tiles > tiles_each ? tile / tiles_each : 0, row = (tile - j * tiles_each) * step, rows = n - row < step ? n - row : step;
                const i64 from_row = p.role == kExpertsEach ? (i64)s.experts[j] * n + row : row;
#pragma unroll
                for (int q = 0; q < kStreamPieces; ++q) {
                    const int at = q * piece_rows, left = rows - at, of_piece = left < 0 ? 0 : left < piece_rows ? left : piece_rows;
                    begin_piece(i, q, (u32)of_piece * row_bytes);
                    copy.issue(ring + slot.at * kStreamSlotBytes, full + (slot.at * kStreamPieces + q), (u32)at, from_row + at, (u32)of_piece, once);
                }
                slot.next();
            }
            tile -= tiles;
        }
    }
}

/// This block has done its part of a stage.
TP_DEVICE void arrive(const StreamArgs& args) { tp_signal(&args.state->arrived); }

/// Where the inbox of a push begins, in words from the first inbox.
TP_DEVICE i64 inbox_of(const Shared& s, u32 push) { return push % 2 ? s.inbox_words : 0; }

TP_DEVICE float activated(int op, float x) {
    switch (op) {
        case (int)GluOp::kSwiglu: return x / (1.0f + expf(-x));
        case (int)GluOp::kGeglu: return 0.5f * x * (1.0f + tanhf(0.79788456080286535588f * x * (1.0f + 0.044715f * x * x)));
        default: return x > 0.0f ? x : 0.0f;
    }
}

// ---- the warp that stores
/// A tile of every slot's rows: products with the slots' weights, added up slot by slot. Returns the last sum of row `row` + lane.
TP_DEVICE float store_slots(const StreamExperts& experts, float* out, i64 row) {
    const StreamProduct& p = experts.product;
    const StreamSums& sums = experts.sums;
    const Shared& s = shared_of();
    const int lane = threadIdx.x % 32, rows = p.rows;
    const i64 n = p.part[0].n;
    for (int i = lane; i < rows * p.slots; i += 32) {
        const int slot = i / rows;
        const i64 at = row + i - slot * rows;
        const float v = out[i], product = v * s.weights[slot];
        out[i] = product;
        if (at >= n) continue;
        if (sums.y) sums.y[slot * (i64)p.y_stride + at] = v;
        if (sums.products) sums.products[slot * sums.products_stride + at] = product;
    }
    __syncwarp();
    float sum = lane < rows ? out[lane] : 0.0f;
    for (int slot = 1; slot < p.slots; ++slot) {
        if (lane < rows) sum += out[slot * rows + lane];
        if (slot + 1 < p.slots && sums.sum[slot - 1] && lane < rows && row + lane < n) sums.sum[slot - 1][row + lane] = sum;
    }
    return sum;
}
/// Where results of a part go: to y and its copies, or to every rank's inbox.
struct Destination {
    const StreamProduct& p;
    float *y, *copy, *raw;
    i32 n_push;
    TP_MEMBER Destination(const StreamProduct& of, const StreamPart& part) : p(of), y(part.y), copy(part.copy), raw(part.raw), n_push(of.n_push) {}
    TP_MEMBER void put(const Shared& s, i64 at, float v, float bias) const {
        if (n_push) {
            const u32 push = s.pushed_before + (u32)p.push;
            for (int r = 0; r < n_push; ++r) tp_store_tagged(p.inbox[r] + inbox_of(s, push) + at, v, push);
            return;
        }
        if (raw) raw[at] = v;
        y[at] = v + bias;
        if (copy) copy[at] = v + bias;
    }
};
/// Rows of one product or several. Where they go is known before they are there: what comes behind the wait is what the next stage waits for.
TP_DEVICE void store_rows(const StreamProduct& p, Shared& s, Turn<kOuts>& out) {
    const int lane = threadIdx.x % 32, rows = p.rows, groups = p.k_groups;
    for (int tile = blockIdx.x; tile < p.n_tiles; tile += gridDim.x) {
        i64 row;
        const StreamPart& part = p.part[part_of(p, tile, row)];
        const i64 at = row + lane;
        const bool inside = lane < rows && at < part.n;
        const Destination to(p, part);
        const float added = part.bias && inside ? part.bias[at] : 0.0f;  // on its way while the tile is multiplied
        tp_barrier_wait(TpBarrierAt(s.out_full) + out.at, out.parity);
        float v = 0;
        if (lane < rows)
            for (int g = 0; g < groups; ++g) v += s.out[out.at][g * rows + lane];
        tp_barrier_arrive(TpBarrierAt(s.out_empty) + out.at);
        out.next();
        if (inside) to.put(s, at, v, added);
    }
}
/// Gates and ups, of experts or not, and what the GLU makes of them.
TP_DEVICE void store_glu(const StreamProduct& p, Shared& s, Turn<kOuts>& out) {
    const int lane = threadIdx.x % 32, rows = p.rows, half = rows / 2, groups = p.k_groups, op = p.glu - 1;
    const int tiles_each = p.role ? p.n_tiles / p.slots : p.n_tiles;
    const i64 n = p.part[0].n;
    float *const gates = p.part[0].y, *const ups = p.part[1].y, *const glu_y = p.glu_y;
    for (int tile = blockIdx.x; tile < p.n_tiles; tile += gridDim.x) {
        const int slot = p.role ? tile / tiles_each : 0;
        const i64 row = (i64)(tile - slot * tiles_each) * half, at = row + lane, to = slot * (i64)p.y_stride + at;
        float* const copy = p.glu_copy ? p.glu_copy + (i64)slot * p.glu_k : nullptr;
        tp_barrier_wait(TpBarrierAt(s.out_full) + out.at, out.parity);
        float v = 0;
        if (lane < rows)
            for (int g = 0; g < groups; ++g) v += s.out[out.at][g * rows + lane];
        tp_barrier_arrive(TpBarrierAt(s.out_empty) + out.at);
        out.next();
        const float up = __shfl_sync(0xffffffffu, v, lane + half < 32 ? lane + half : lane);
        if (lane < half && at < n) {
            const float y = activated(op, v) * up;
            if (glu_y) glu_y[to] = y;
            if (copy) copy[p.glu_begin + at] = y;
            if (gates) gates[to] = v;
            if (ups) ups[to] = up;
        }
        if (copy && row == 0) {  // what a cut inside of a block leaves of its row
            for (i64 i = lane; i < p.glu_begin; i += 32) copy[i] = 0;
            for (i64 i = p.glu_begin + n + lane; i < p.glu_k; i += 32) copy[i] = 0;
        }
    }
}
TP_OUTLINE void store_sums(const StreamExperts& experts, Shared& s, Turn<kOuts>& out) {
    const StreamProduct& p = experts.product;
    const int lane = threadIdx.x % 32;
    for (int tile = blockIdx.x; tile < p.n_tiles; tile += gridDim.x) {
        const i64 row = (i64)tile * p.rows, at = row + lane;
        tp_barrier_wait(TpBarrierAt(s.out_full) + out.at, out.parity);
        const float v = store_slots(experts, s.out[out.at], row);
        tp_barrier_arrive(TpBarrierAt(s.out_empty) + out.at);
        out.next();
        const StreamPart& part = p.part[0];
        if (lane < p.rows && at < part.n) Destination(p, part).put(s, at, v, part.bias ? part.bias[at] : 0.0f);
    }
}
TP_OUTLINE void store_results(const StreamArgs& args) {
    Shared& s = shared_of();
    const int lane = threadIdx.x % 32;
    Turn<kOuts> out;
    for (int i = args.first_product, next; i < args.n_stages; i = next) {
        const StreamExperts& experts = fetch_product(args.stages[i], s.stored, next);
        const StreamProduct& p = experts.product;
        if ((int)blockIdx.x >= p.n_tiles) continue;
        if (p.role == kExpertsSum) store_sums(experts, s, out);
        else if (p.glu) store_glu(p, s, out);
        else store_rows(p, s, out);
        const bool weighs = p.role == kExpertsEach;
        if (weighs && experts.route.visible) weigh_experts(experts.route, p);
        __syncwarp();
        if (lane == 0) arrive(args);
        if (weighs && !experts.route.visible) weigh_experts(experts.route, p);
        if (weighs) tp_barrier_arrive(&s.weighed);
        if (lane == 0 && blockIdx.x == 0) args.cycles[i * kStreamTimes + kTimeStored] = tp_cycles();
    }
}

// ---- the multiplying warps
struct Walk {
    Turn<kStreamSlots> slot;
    Turn<kOuts> out;
    // In one register across calls.
    TP_MEMBER u32 packed() const { return (u32)(slot.at | slot.parity << 8 | out.at << 16 | out.parity << 24); }
    static TP_MEMBER Walk of(u32 v) { return {{(int)(v & 255), (int)(v >> 8 & 255)}, {(int)(v >> 16 & 255), (int)(v >> 24)}}; }
};

TP_DEVICE void load_eight(const float* from, bool inside, float (&v)[8]) {
    const TpInt4 a = tp_load_in_order(from, inside), b = tp_load_in_order(from + 4, inside);
    v[0] = __int_as_float(a.x), v[1] = __int_as_float(a.y), v[2] = __int_as_float(a.z), v[3] = __int_as_float(a.w);
    v[4] = __int_as_float(b.x), v[5] = __int_as_float(b.y), v[6] = __int_as_float(b.z), v[7] = __int_as_float(b.w);
}
TP_DEVICE void store_eight(float* to, const float (&v)[8]) {
    ((TpInt4*)to)[0] = {__float_as_int(v[0]), __float_as_int(v[1]), __float_as_int(v[2]), __float_as_int(v[3])};
    ((TpInt4*)to)[1] = {__float_as_int(v[4]), __float_as_int(v[5]), __float_as_int(v[6]), __float_as_int(v[7])};
}

constexpr int kStep = 8 * kMultiply;  // elements of a step: eight neighbours a thread (sixteen: more lines a load, and slower by a quarter)

/// Elements [first, first + kSteps * kStep) of a product's input; all loads go out before any is used. Of what is written for others every
/// block writes its share [from, to). Returns this thread's sum of squares.
template <int kSteps, bool kNorm>
TP_DEVICE float take_steps(const StreamProduct& p, Shared& s, int k, int first, i64 from, i64 to) {
    const int thread = threadIdx.x;
    float v[kSteps][8], more[kNorm ? kSteps : 1][8], weight[kNorm ? kSteps : 1][8], squares = 0;
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
        const int at = first + j * kStep + thread * 8;
        load_eight(p.a + at, at < k, v[j]);
        if constexpr (kNorm) load_eight(p.b + at, p.b && at < k, more[j]), load_eight(p.weight + at, p.weight && at < k, weight[j]);
    }
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
        const int at = first + j * kStep + thread * 8;
        if constexpr (kNorm) {
            for (int i = 0; i < 8; ++i) v[j][i] += more[j][i];
            if (at >= from && at < to && at < k) {
                if (p.sum) store_eight(p.sum + at, v[j]);
                if (p.sum_copy) store_eight(p.sum_copy + at, v[j]);
            }
            for (int i = 0; i < 8; ++i) squares += v[j][i] * v[j][i];
            if (p.weight)
                for (int i = 0; i < 8; ++i) v[j][i] *= weight[j][i];
        }
        float most = 0;
        for (int i = 0; i < 8; ++i) most = fmaxf(most, fabsf(v[j][i]));
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
        const Int8Scale scale(most);
        int words[2], sum = 0;
        for (int i = 0; i < 2; ++i) {
            const float* four = v[j] + 4 * i;
            words[i] = four_bytes(scale.bits(four[0]), scale.bits(four[1]), scale.bits(four[2]), scale.bits(four[3]));
            sum = tp_dp4a(words[i], 0x01010101, sum);
        }
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        if (at >= k) continue;
        *(int*)(s.x + at) = words[0];
        *(int*)(s.x + at + 4) = words[1];
        if (at % 32 == 0) {
            s.xd[at / 32 * 2] = scale.d;
            s.xd[at / 32 * 2 + 1] = scale.d * (float)sum;
        }
    }
    return squares;
}

/// The input of a product, as int8 in shared memory, without the norm's 1 / root mean square: that is returned, and scales the results.
TP_OUTLINE float take_input(int at) {
    const StreamProduct& p = *(const StreamProduct*)stage_at(at).body;
    Shared& s = shared_of();
    const int thread = threadIdx.x;
    const int k = p.role == kExpertsSum ? p.k * p.slots : p.k;
    const i64 share = ((k + gridDim.x - 1) / gridDim.x + 7) / 8 * 8, from = blockIdx.x * share, to = from + share;
    if (p.input != kInputNorm) {
        if (k <= 2 * kStep) take_steps<2, false>(p, s, k, 0, from, to);
        else
            for (int first = 0; first < k; first += 4 * kStep) take_steps<4, false>(p, s, k, first, from, to);
        sync_multiplying();
        return 1.0f;
    }
    float squares = 0;
    for (int first = 0; first < k; first += 2 * kStep) squares += take_steps<2, true>(p, s, k, first, from, to);
    squares = tp_warp_sum(squares);
    if (thread % 32 == 0) s.squares[thread / 32] = squares;
    sync_multiplying();
    float total = 0;
    for (int w = 0; w < kStreamWarps; ++w) total += s.squares[w];
    const float scale = 1.0f / sqrtf(total / (float)k + p.eps);
    // The norm itself, for whoever else may read it: the last warp's work, while the others begin to multiply.
    if (p.norm && thread / 32 == kStreamWarps - 1)
        for (i64 at = from + thread % 32; at < to && at < k; at += 32)
            p.norm[at] = (p.a[at] + (p.b ? p.b[at] : 0.0f)) * scale * (p.weight ? p.weight[at] : 1.0f);
    return scale;
}

/// All tiles of a product. A warp takes two rows at a time, so that their loads, products and sums overlap.
template <int kType, int kUnits>
TP_OUTLINE u32 multiply(int at_stage, u32 packed_walk, float scale) {
    using U = Unit<kType>;
    Walk walk = Walk::of(packed_walk);
    const StreamProduct& p = *(const StreamProduct*)stage_at(at_stage).body;
    Shared& s = shared_of();
    const char* ring = ring_of();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, units = p.k / U::kElems;
    const int row_groups = kStreamWarps / p.k_groups, group = warp / row_groups, first_row = warp % row_groups;
    TpInt4 x[kUnits][U::kWords];
    TpFloat2 d[kUnits][2];
#pragma unroll
    for (int j = 0; j < kUnits; ++j) {
        const int unit = (group * kUnits + j) * 32 + lane;
        const bool inside = unit < units;
#pragma unroll
        for (int w = 0; w < U::kWords; ++w) {
            const int at = inside ? U::word(unit, w) : 0;
            x[j][w] = *(const TpInt4*)(s.x + at);
            if (w % (U::kWords / 2) == 0)
                d[j][w / (U::kWords / 2)] = {inside ? s.xd[at / 32 * 2] * scale : 0.0f, inside ? s.xd[at / 32 * 2 + 1] * scale : 0.0f};
        }
    }
    const int rows = p.rows, n_tiles = p.n_tiles, last_of_half = (p.glu ? rows / 2 : rows) - 1, shift = p.piece_shift;
    int offset[4], stride[4];
#pragma unroll
    for (int f = 0; f < 4; ++f) offset[f] = p.slot_offset[f], stride[f] = p.row_bytes[f];
    const TpBarrierAt all_full(s.full), empty(s.empty), out_full(s.out_full), out_empty(s.out_empty);
    for (int tile = blockIdx.x; tile < n_tiles; tile += gridDim.x) {
        tp_barrier_wait(out_empty + walk.out.at, walk.out.parity ^ 1);
        const TpBarrierAt full = all_full + walk.slot.at * kStreamPieces;
        const char* slot = ring + walk.slot.at * kStreamSlotBytes;
        for (int row = first_row; row < rows; row += 2 * row_groups) {
            const bool two = row + row_groups < rows;
            const int other = two ? row + row_groups : row;
            tp_barrier_wait(full + ((row & last_of_half) >> shift), walk.slot.parity);
            tp_barrier_wait(full + ((other & last_of_half) >> shift), walk.slot.parity);
            const char *plane[4], *plane_of_other[4];
#pragma unroll
            for (int f = 0; f < 4; ++f) plane[f] = slot + offset[f] + row * stride[f], plane_of_other[f] = slot + offset[f] + other * stride[f];
            float sum = 0, sum_of_other = 0;
#pragma unroll
            for (int j = 0; j < kUnits; ++j) {
                // Beyond the end: any weights, times an input of zero. A branch here would keep the loads from going out together.
                const int at = (group * kUnits + j) * 32 + lane, unit = at < units ? at : units - 1;
                U w, w_of_other;
                w.load((const char* const*)plane, unit, LoadShared());
                w_of_other.load((const char* const*)plane_of_other, unit, LoadShared());
                sum += w.dot_unit(unit, x[j], d[j][0], d[j][1]);
                sum_of_other += w_of_other.dot_unit(unit, x[j], d[j][0], d[j][1]);
            }
            sum = tp_warp_sum(sum);
            sum_of_other = tp_warp_sum(sum_of_other);
            if (lane == 0) s.out[walk.out.at][group * rows + row] = sum;
            if (lane == 0 && two) s.out[walk.out.at][group * rows + other] = sum_of_other;
        }
        tp_barrier_arrive(empty + walk.slot.at);
        tp_barrier_arrive(out_full + walk.out.at);
        walk.slot.next();
        walk.out.next();
    }
    return walk.packed();
}

template <int kType>
TP_DEVICE u32 multiply(int units_each, int at, u32 walk, float scale) {
    static_assert(Unit<kType>::kElems == stream_unit(kType), "what stream_fit counts");
    if (units_each == 1) return multiply<kType, 1>(at, walk, scale);
    if constexpr (2 * Unit<kType>::kElems < kStreamMostElems)
        if (units_each > 2) return multiply<kType, 4>(at, walk, scale);
    return multiply<kType, 2>(at, walk, scale);
}

/// All tiles of the experts' last product: kLanes lanes have a row of a slot, each slot with its own part of the input, from shared memory: k is
/// short here, and what a warp reads of it changes from row to row. Two rows at a time, as above.
template <int kType>
TP_OUTLINE u32 multiply_slots(int at_stage, u32 packed_walk) {
    using U = Unit<kType>;
    Walk walk = Walk::of(packed_walk);
    const StreamProduct& p = *(const StreamProduct*)stage_at(at_stage).body;
    Shared& s = shared_of();
    const int lanes = p.lanes, lane = threadIdx.x % lanes, rows = p.rows, k = p.k, units = k / U::kElems, n_sums = rows * p.slots, n_tiles = p.n_tiles;
    const int step = kMultiply / lanes, first = threadIdx.x / lanes;
    int offset[4], stride[4];
#pragma unroll
    for (int f = 0; f < 4; ++f) offset[f] = p.slot_offset[f], stride[f] = p.row_bytes[f];
    for (int tile = blockIdx.x; tile < n_tiles; tile += gridDim.x) {
        tp_barrier_wait(TpBarrierAt(s.full) + walk.slot.at * kStreamPieces, walk.slot.parity);
        tp_barrier_wait(TpBarrierAt(s.out_empty) + walk.out.at, walk.out.parity ^ 1);
        const char* tile_at = ring_of() + walk.slot.at * kStreamSlotBytes;
        // The warp's first row: whole warps leave the loop together.
        for (int base = 0; base < n_sums; base += 2 * step) {
            int row[2];
            float sum[2] = {};
#pragma unroll
            for (int r = 0; r < 2; ++r) row[r] = base + r * step + first < n_sums ? base + r * step + first : n_sums - 1;
            for (int unit = lane; unit < units; unit += lanes) {
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const char* plane[4];
#pragma unroll
                    for (int f = 0; f < 4; ++f) plane[f] = tile_at + offset[f] + row[r] * stride[f];
                    U w;
                    w.load((const char* const*)plane, unit, LoadShared());
                    const int from = row[r] / rows * k;
                    TpInt4 x[U::kWords];
                    TpFloat2 d[2];
#pragma unroll
                    for (int v = 0; v < U::kWords; ++v) {
                        const int at = from + U::word(unit, v);
                        x[v] = *(const TpInt4*)(s.x + at);
                        if (v % (U::kWords / 2) == 0) d[v / (U::kWords / 2)] = {s.xd[at / 32 * 2], s.xd[at / 32 * 2 + 1]};
                    }
                    sum[r] += w.dot_unit(unit, x, d[0], d[1]);
                }
            }
            for (int o = lanes / 2; o; o /= 2) {
#pragma unroll
                for (int r = 0; r < 2; ++r) sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], o);
            }
#pragma unroll
            for (int r = 0; r < 2; ++r)
                if (lane == 0 && base + r * step + first < n_sums) s.out[walk.out.at][row[r]] = sum[r];
        }
        tp_barrier_arrive(TpBarrierAt(s.empty) + walk.slot.at);
        tp_barrier_arrive(TpBarrierAt(s.out_full) + walk.out.at);
        walk.slot.next();
        walk.out.next();
    }
    return walk.packed();
}

/// A product of floats, of few rows: a router's. A block has whole rows, and what it multiplies with them it computes as it reads it.
TP_OUTLINE void multiply_floats(int at) {
    const StreamFloats& f = *(const StreamFloats*)stage_at(at).body;
    float* met = (float*)shared_of().x;  // [kFloatRows + 1][kStreamWarps]
    const int thread = threadIdx.x, k = (int)f.k;
    const i64 share = ((k + gridDim.x - 1) / gridDim.x + 7) / 8 * 8, from = blockIdx.x * share, to = from + share;
    for (i64 row = blockIdx.x, round = 0; row < f.n || !round; row += (i64)gridDim.x * kFloatRows, ++round) {
        float squares = 0, sum[kFloatRows] = {};
        for (int i = thread * 8; i < k; i += kStep) {
            float v[8], more[8], weight[8], w[kFloatRows][8];
            load_eight(f.a + i, true, v);
            load_eight(f.b + i, f.b != nullptr, more);
            load_eight(f.weight + i, f.weight != nullptr, weight);
#pragma unroll
            for (int r = 0; r < kFloatRows; ++r) load_eight(f.w + (row + r * gridDim.x) * f.row_stride + i, row + r * gridDim.x < f.n, w[r]);
            for (int e = 0; e < 8; ++e) v[e] += more[e];
            if (!round && i >= from && i < to) {
                if (f.sum) store_eight(f.sum + i, v);
                if (f.sum_copy) store_eight(f.sum_copy + i, v);
            }
            for (int e = 0; e < 8; ++e) {
                squares += v[e] * v[e];
                if (f.weight) v[e] *= weight[e];
#pragma unroll
                for (int r = 0; r < kFloatRows; ++r) sum[r] += v[e] * w[r][e];
            }
        }
        squares = tp_warp_sum(squares);
#pragma unroll
        for (int r = 0; r < kFloatRows; ++r) sum[r] = tp_warp_sum(sum[r]);
        if (thread % 32 == 0) {
            met[thread / 32] = squares;
#pragma unroll
            for (int r = 0; r < kFloatRows; ++r) met[(r + 1) * kStreamWarps + thread / 32] = sum[r];
        }
        sync_multiplying();
        float total = 0;
        for (int w = 0; w < kStreamWarps; ++w) total += met[w];
        const float scale = f.has_norm ? 1.0f / sqrtf(total / (float)k + f.eps) : 1.0f;
        const i64 mine = row + thread * (i64)gridDim.x;
        if (thread < kFloatRows && mine < f.n) {
            float y = 0;
            for (int w = 0; w < kStreamWarps; ++w) y += met[(thread + 1) * kStreamWarps + w];
            if (f.y) f.y[mine] = y * scale;
            if (f.y_copy) f.y_copy[mine] = y * scale;
        }
        if (!round && f.has_norm && (f.norm || f.norm_copy) && thread >= kMultiply - 32) {
            for (i64 i = from + thread % 32; i < to && i < k; i += 32) {
                const float y = (f.a[i] + (f.b ? f.b[i] : 0.0f)) * scale * (f.weight ? f.weight[i] : 1.0f);
                if (f.norm) f.norm[i] = y;
                if (f.norm_copy) f.norm_copy[i] = y;
            }
        }
        sync_multiplying();  // before the next rows meet there
    }
}

/// The queries of a unit, as halves [heads.n][d] in shared memory, scaled; its own key and value go to the cache: see StreamOwnToken. What they
/// are made of comes by asynchronous copies, in one trip to the L2, and the loop over pairs is not unrolled: code that runs once a layer costs
/// five cycles an instruction.
struct QueriesShared {
    const StreamFlash& f;
    const UnitHeads& heads;
    int split, d;
    u16* queries;
    float* rows;                    // rows of d floats: the unit's query heads, key, value, the turns, and the weights of the heads' norms
    int row[2] = {}, high[2] = {};  // of the caches, for key and value; -1: outside

    TP_MEMBER const StreamOwnToken::Cache& cache(int i) const { return i ? f.own.v_cache : f.own.k_cache; }
    TP_MEMBER int row_of(int pair) const { return (int)((u64)(u32)pair * f.own.half_inverse >> 32); }
    TP_MEMBER TpInt4 eight(const UnitHeads&, int h, int at) const { return *(const TpInt4*)(queries + h * d + at); }

    TP_MEMBER void begin() {
        const StreamOwnToken& own = f.own;
        if (!own.table) return;
        const int key = heads.n, n = (key + 3 + (own.q_norm ? 2 : 0)) * d / 4;
#pragma unroll 1
        for (int i = threadIdx.x; i < n; i += kMultiply) {
            const int at = row_of(2 * i) - key;
            if (at < 0 && !heads.mine(at + key)) continue;
            const float* from = at < 0 ? own.q + (heads.first + at + key) * d : at == 0 ? own.k + heads.kv_head * d : own.v + heads.kv_head * d;
            if (at > 1) from = at == 2 ? own.table : at == 3 ? own.q_norm : own.k_norm;
            tp_copy_async(rows + 4 * i, from + (4 * i - (at + key) * d));
        }
#pragma unroll
        for (int i = 0; i < 2; ++i)
            row[i] = tp_load_word_in_order(cache(i).row, true), high[i] = tp_load_word_in_order(cache(i).row + 4, cache(i).row_type == kI64);
    }
    TP_MEMBER void prepare() {
        if (f.own.table) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                if (!high[i] && row[i] >= 0 && row[i] < (int)cache(i).n_rows) continue;
                row[i] = -1;
                if (threadIdx.x == 0) atomicExch(f.own.fault, (u32)kFaultKvCell);
            }
            tp_copy_wait();
            sync_multiplying();
            turn();
        } else {
            for (int i = 8 * (int)threadIdx.x; i < heads.n * d; i += 8 * kMultiply) {
                const int h = i / d;
                if (heads.mine(h)) *(TpInt4*)(queries + i) = QueriesInMemory{f.args.a, 0, 0}.eight(heads, h, i - h * d);
            }
        }
        sync_multiplying();
    }
    TP_MEMBER void turn() const {
        const StreamOwnToken& own = f.own;
        const int half = d / 2, key = heads.n, lane = threadIdx.x % 32;
        const float *const table = rows + (key + 2) * d, *const norms = table + d;
        float* const scales = rows + (key + 5) * d;
        const bool normed = own.q_norm;
        if (normed) {
#pragma unroll 1
            for (int h = threadIdx.x / 32; h <= key; h += kStreamWarps) {
                float squares = 0;
#pragma unroll 1
                for (int i = lane; i < d; i += 32) squares += rows[h * d + i] * rows[h * d + i];
                squares = tp_warp_sum(squares);
                if (lane == 0) scales[h] = 1.0f / sqrtf(squares / (float)d + (h < key ? own.q_eps : own.k_eps));
            }
            sync_multiplying();
        }
#pragma unroll 1
        for (int i = threadIdx.x; i < (key + 2) * half; i += kMultiply) {
            const int h = row_of(i), of_cache = h - key, pair = i - h * half, turned = pair - own.n_offs / 2;
            if (of_cache < 0 && !heads.mine(h)) continue;
            const bool turns = of_cache < 1 && turned >= 0 && turned < own.n_dims / 2;
            int at = 2 * pair, other = at + 1;
            if (turns && own.neox) at = own.n_offs + turned, other = at + own.n_dims / 2;
            float a = rows[h * d + at], b = rows[h * d + other];
            if (normed && of_cache < 1) {
                const float* const weight = norms + (of_cache == 0 ? d : 0);
                a *= scales[h] * weight[at], b *= scales[h] * weight[other];
            }
            if (turns) {
                const float cosine = table[2 * turned], sine = table[2 * turned + 1], before = a;
                a = before * cosine - b * sine, b = before * sine + b * cosine;
            }
            float* y = of_cache < 0 ? own.q_y : of_cache == 0 ? own.k_y : nullptr;
            if (y && split == 0) {
                y += (of_cache < 0 ? heads.first + h : heads.kv_head) * d;
                y[at] = a, y[other] = b;
            }
            if (of_cache < 0) a *= f.args.a.scale, b *= f.args.a.scale;
            const u16 first = tp_float_to_half(a), second = tp_float_to_half(b);
            if (of_cache < 0) {
                queries[h * d + at] = first, queries[h * d + other] = second;
                continue;
            }
            const int to_row = of_cache ? row[1] : row[0];  // registers, not an array
            if (to_row < 0) continue;
            // The piece that has the cell writes it; one that the attention does not see is the first piece's.
            const StreamOwnToken::Cache& to = cache(of_cache);
            const int cell = to_row - (int)to.first, piece = f.args.n_splits == 1 || cell < 0 ? 0 : cell / f.args.cells;
            if ((piece < f.args.n_splits ? piece : 0) != split) continue;
            u16* const there = (u16*)(to.data + (i64)to_row * to.row_bytes) + heads.kv_head * d;
            there[at] = first, there[other] = second;
        }
    }
};
/// What flash_combine will add up, or, where one piece has all cells, what it would say.
struct StreamResults {
    const StreamFlash& f;
    int split;
    TP_MEMBER void put(i64 head, int i, float most, float sum, TpFloat2 acc) const {
        const FlashAttnArgs& a = f.args.a;
        if (!f.y.data) {
            PieceResults{f.args, split, 0, 0}.put(head, i, most, sum, acc);
            return;
        }
        float scale = 1.0f;
        if (a.has_sinks) {
            const float sink = *(const float*)(a.sinks.data + (head + a.head_offset) * a.sinks.nb[0]), top = fmaxf(most, sink);
            scale = most > -INFINITY ? expf(most - top) : 0.0f;
            sum = sum * scale + expf(sink - top);
        }
        scale = sum > 0 ? scale / sum : 0.0f;
        *(TpFloat2*)(f.y.data + i * 4 + head * f.y.nb[1]) = {acc.x * scale, acc.y * scale};
    }
};

template <int kD>
TP_OUTLINE void attend(int at) {
    const StreamFlash& f = *(const StreamFlash*)stage_at(at).body;
    Shared& s = shared_of();
    const FlashSplitArgs& args = f.args;
    const int d = (int)args.a.q.ne[0], thread = threadIdx.x;
    u16* queries = (u16*)s.x;
    float* merged = (float*)(s.x + kStreamQueryBytes);
    for (u32 unit = blockIdx.x; unit < (u32)(f.n_units * args.n_splits); unit += gridDim.x) {
        const u32 head = unit / (u32)args.n_splits;
        const int split = (int)(unit - head * (u32)args.n_splits);
        const UnitHeads heads = heads_of_unit(args, head);
        const StreamResults to{f, split};
        flash_columns<kD, kStreamWarps, false>(args, heads, split, 0, 0, thread, merged, QueriesShared{f, heads, split, d, queries, merged}, to,
                                               sync_multiplying);
        sync_multiplying();  // the next unit writes there
    }
}

/// Until try_it, or the deadline: the results are not valid then.
template <class TryIt>
TP_DEVICE void wait_until(Shared& s, TryIt try_it) {
    const u64 begin = tp_nanoseconds();
    for (u32 polls = 1; !try_it(); ++polls) {
        tp_spin();
        if (polls % kPollsPerLook) continue;
        if (tp_peek(&s.late)) return;
        if (tp_nanoseconds() - begin <= s.deadline_ns) continue;
        tp_poke(&s.late, 1);
        atomicExch(s.fault, (u32)kFaultLatePeer);
    }
}

/// What a rank has pushed to here.
TP_DEVICE float sum_of(const u64* word, u32 push, Shared& s) {
    u64 now = 0;
    wait_until(s, [&] { return (u32)((now = tp_load_tagged(word)) >> 32) == push; });
    return __int_as_float((int)(u32)now);
}

/// A stage that is no product: elements, rows or units of all blocks' threads.
TP_OUTLINE void do_stage(int stage_slot) {
    const StreamStage& stage = stage_at(stage_slot);
    const char* body = stage.body;
    const int thread = threadIdx.x, lane = thread % 32;
    const i64 first = (i64)blockIdx.x * kMultiply + thread, step = (i64)gridDim.x * kMultiply;
    switch (stage.kind) {
        case kStreamReduce: {
            const StreamReduce& a = *(const StreamReduce*)body;
            Shared& s = shared_of();
            const u32 push = s.pushed_before + (u32)a.push;
            const u64* inbox = a.inbox + inbox_of(s, push);
            for (i64 i = first; i < a.n; i += step) {
                float sum = sum_of(inbox + i, push, s);
                for (int r = 1; r < a.n_ranks; ++r) sum += sum_of(inbox + r * a.n + i, push, s);
                a.y[i] = sum;
                if (a.copy) a.copy[i] = sum;
            }
            break;
        }
        case kStreamCopy: {
            const StreamCopy& a = *(const StreamCopy*)body;
            for (i64 i = first; i < a.n; i += step) a.to[i] = a.from[i];
            break;
        }
        case kStreamNormRows: {  // a warp a row
            const FusedNormArgs& a = ((const StreamNormRows*)body)->norm;
            const i64 rows = a.y.ne[1] * a.y.ne[2] * a.y.ne[3], n = a.y.ne[0];
            for (i64 row = first / 32; row < rows; row += step / 32) {
                const Index at = row_index((u32)row, a.y.ne);
                const float* x = (const float*)element_at(a.a, at);
                float squares = 0;
                const float* more = a.has_b ? (const float*)element_at(a.b, at) : nullptr;
                float* sum = a.has_b ? (float*)element_at(a.sum, at) : nullptr;
                float* y = (float*)element_at(a.y, at);
                for (i64 i = lane; i < n; i += 32) {
                    const float v = x[i] + (more ? more[i] : 0.0f);
                    if (sum) sum[i] = v;
                    squares += v * v;
                }
                const float scale = 1.0f / sqrtf(tp_warp_sum(squares) / (float)n + a.eps);
                for (i64 i = lane; i < n; i += 32) y[i] = (sum ? sum[i] : x[i]) * scale * (a.has_weight ? ((const float*)a.weight.data)[i] : 1.0f);
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
            const i64 d = ((const StreamFlash*)body)->args.a.q.ne[0];
            if (d <= 64) attend<64>(stage_slot);
            else if (d <= 128) attend<128>(stage_slot);
            else attend<256>(stage_slot);
            break;
        }
        case kStreamFloats: multiply_floats(stage_slot); break;
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

/// What a stage reads that no stage writes goes into the L2 while its block still waits: norms' weights, what the cache has of other tokens.
TP_DEVICE void fetch_ahead(const StreamStage& stage) {
    const int thread = threadIdx.x;
    if (stage.kind == kStreamProduct) {
        const StreamProduct& p = *(const StreamProduct*)stage.body;
        const int line = (int)blockIdx.x + (int)gridDim.x * (thread - 32);  // the first warp's other lanes would hold up the one that waits
        if (p.input == kInputNorm && p.weight && thread >= 32 && line < p.k / 32) tp_prefetch((const char*)p.weight + line * 128);
    } else if (stage.kind == kStreamFloats) {
        const StreamFloats& f = *(const StreamFloats*)stage.body;
        for (i64 row = blockIdx.x; row < f.n; row += gridDim.x)
            for (int i = thread - 32; i >= 0 && i < (int)f.k / 32; i += kMultiply - 32) tp_prefetch(f.w + row * f.row_stride + i * 32);
    } else if (stage.kind == kStreamFlash) {
        const StreamFlash& f = *(const StreamFlash*)stage.body;
        const FlashAttnArgs& a = f.args.a;
        if ((int)blockIdx.x >= f.n_units * f.args.n_splits) return;
        const u32 unit = blockIdx.x / (u32)f.args.n_splits, split = blockIdx.x - unit * (u32)f.args.n_splits;
        const i64 kv_head = unit / (u32)f.args.head_groups, first = (i64)split * f.args.cells;
        const int bytes = (int)a.q.ne[0] * 2;
        for (int i = thread; i < kAheadCells; i += kMultiply) {
            if (i >= f.args.cells || first + i >= a.k.ne[1]) break;
            for (int at = 0; at < bytes; at += 128) {
                tp_prefetch(a.k.data + kv_head * a.k.nb[2] + (first + i) * a.k.nb[1] + at);
                tp_prefetch(a.v.data + kv_head * a.v.nb[2] + (first + i) * a.v.nb[1] + at);
            }
        }
    }
}

TP_DEVICE void multiply_and_more(const StreamArgs& args) {
    Shared& s = shared_of();
    const int thread = threadIdx.x;
    constexpr int kWords = kStreamStageBytes / 16;
    u32 walk = Walk{}.packed();
    float scale = 1.0f;
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
        fetch_ahead(stage);
        if (thread == 0 && stage.wait) wait_until(s, [&] { return (i32)(tp_read_signal(&args.state->arrived) - (u32)i * gridDim.x) >= 0; });
        if (thread == 0 && stage.kind == kStreamProduct && ((const StreamProduct*)stage.body)->role == kExpertsEach) tp_barrier_arrive(&s.routed);
        tp_copy_wait();
        sync_multiplying();  // and nobody reads the stage before any more, and everybody sees the next
        fetch(i + 2);
        mark(i, kTimeWaited);
        if (stage.kind != kStreamProduct) {
            do_stage(i % 3);
            sync_multiplying();
            if (thread == 0) arrive(args);
            mark(i, kTimeInput);
            mark(i, kTimeDone);
            continue;
        }
        const StreamProduct& p = *(const StreamProduct*)stage.body;
        if (p.input != kInputKept) scale = take_input(i % 3);
        if (thread == 0) tp_poke(&s.stage_now, (u32)i);  // not before: tiles at full speed would hold up the input
        mark(i, kTimeInput);
        if (p.role == kExpertsSum) {
            if (p.type == kQ4_0) walk = multiply_slots<kQ4_0>(i % 3, walk);
            else if (p.type == kQ8_0) walk = multiply_slots<kQ8_0>(i % 3, walk);
            else if (p.type == kQ4_K) walk = multiply_slots<kQ4_K>(i % 3, walk);
            else walk = multiply_slots<kQ6_K>(i % 3, walk);
        } else if (p.type == kQ4_0) walk = multiply<kQ4_0>(p.units_each, i % 3, walk, scale);
        else if (p.type == kQ8_0) walk = multiply<kQ8_0>(p.units_each, i % 3, walk, scale);
        else if (p.type == kQ4_K) walk = multiply<kQ4_K>(p.units_each, i % 3, walk, scale);
        else walk = multiply<kQ6_K>(p.units_each, i % 3, walk, scale);
        mark(i, kTimeDone);
        if ((int)blockIdx.x >= p.n_tiles) {  // nothing for the storing warp; what take_input wrote counts all the same
            sync_multiplying();
            if (thread == 0) arrive(args);
        }
    }
}

}  // namespace
}  // namespace ggml_tp

TP_KERNEL_COOPERATIVE(stream, StreamArgs, 320) {
    using namespace ggml_tp;
    static_assert(kStreamThreads == 320, "the launch bound above");
    Shared& s = shared_of();
    const int thread = threadIdx.x;
    if (thread == 0) {
        for (int i = 0; i < kStreamSlots * kStreamPieces; ++i) tp_barrier_init(TpBarrierAt(s.full) + i, 1);
        for (int i = 0; i < kStreamSlots; ++i) tp_barrier_init(TpBarrierAt(s.empty) + i, kMultiply);
        for (int i = 0; i < kOuts; ++i) tp_barrier_init(TpBarrierAt(s.out_full) + i, kMultiply), tp_barrier_init(TpBarrierAt(s.out_empty) + i, 32);
        tp_barrier_init(&s.routed, 1), tp_barrier_init(&s.weighed, 32);
        s.late = 0, s.stage_now = 0;
        s.pushed_before = args.state->pushed_before, s.inbox_words = args.inbox_words, s.deadline_ns = args.deadline_ns, s.fault = args.fault;
        tp_barrier_init_fence();
    }
    __syncthreads();
    if (thread < kMultiply) multiply_and_more(args);
    else if (thread < kMultiply + 32) stream_weights(args);
    else store_results(args);
    __syncthreads();
    // The last block to end leaves the counters as the next launch wants them: nobody waits on them any more.
    if (thread == 0 && tp_count(&args.state->done) == gridDim.x - 1) {
        args.state->arrived = 0;
        args.state->done = 0;
        args.state->pushed_before += (u32)args.n_pushes;
    }
}

#endif
