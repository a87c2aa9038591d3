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

#include "activation.h"
#include "flash_columns.h"
#include "flash_wide.h"
#include "flash_look.h"
#include "get_row.h"
#include "quantize_group.h"
#include "rope_pair.h"
#include "sort_row.h"
#include "state_row.h"
#include "grid_piece.h"

#if TP_ARCH >= 900

namespace ggml_tp {
namespace {

constexpr int kMultiply = 32 * kStreamWarps;
constexpr int kLogWarps = 3;
static_assert(1 << kLogWarps == kStreamWarps);
constexpr int kOuts = 3;             // tiles whose sums may wait to be stored: what shared memory has left
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
    i32 experts[kVecSlots];          // that the last router chose
    i32 weighed_experts[kVecSlots];  // the same, until the storing warp weighs again
    float weights[kVecSlots];
    TpBarrier full[kStreamSlots * kStreamPieces], empty[kStreamSlots], out_full[kOuts], out_empty[kOuts];
    TpBarrier chosen;              // experts, by the multiplying warps
    TpBarrier taken;               // by the streaming warp and the storing warp
    u32 choices;                   // so far
    u8 groups[kStreamMostGroups];  // in their order, where the last router's experts are in groups
    u32 late, stage_now;
    u32 walk;  // a Progress's, while attention needs all registers
    u32 pushed_before;
    StreamArgs args;  // the kernel's: functions that are called would read them from local memory, which is in the L2 most of the time
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

/// A position in a ring, and the parity of its phase.
struct AnyTurn {
    int at = 0, parity = 0;
    TP_MEMBER void next(int n) {
        if (++at == n) at = 0, parity ^= 1;
    }
};
template <int n>
struct Turn : AnyTurn {
    TP_MEMBER void next() { AnyTurn::next(n); }
};
/// Weights in the ring.
struct LoadRing {
    TP_MEMBER TpInt4 operator()(const char* p) const { return *(const TpInt4*)p; }
    TP_MEMBER GridTables& grids() const { return *(GridTables*)(ring_of() + (kStreamSlots - 1) * kStreamSlotBytes); }
};
static_assert(sizeof(GridTables) <= kStreamSlotBytes, "the grids' slot");

TP_DEVICE void sync_multiplying() { tp_sync_some<kMultiply>(); }

/// The part and first row of a tile, of one slot's where experts' tiles are.
TP_DEVICE int part_of(const StreamProduct& p, int tile, i64& row) {
    const int part = (tile >= p.first_tile[1]) + (tile >= p.first_tile[2]);
    row = (i64)(tile - p.first_tile[part]) * (p.glu ? p.rows / 2 : p.rows);
    return part;
}

/// Brings a product, or what is streamed of a cache, into shared memory, by one warp: the table lies in memory that the weights keep pushing out of
/// the L2.
TP_DEVICE const StreamExperts& fetch_product(const StreamStage& stage, char* to, int& next, int& kind) {
    static_assert(sizeof(StreamExperts) % 16 == 0 && sizeof(StreamExperts) <= 1024, "two steps of a warp");
    next = stage.next_product, kind = stage.kind;
    __syncwarp();
    for (int i = threadIdx.x % 32; i < (int)sizeof(StreamExperts) / 16; i += 32) ((TpInt4*)to)[i] = ((const TpInt4*)stage.body)[i];
    __syncwarp();
    return *(const StreamExperts*)to;
}

// ---- a router's choice. Each block makes it for itself, which is cheaper than asking another. The multiplying warps choose, as the weights that they will
// multiply are those of who is chosen (one warp took 3,600 cycles); experts' weights are the storing warp's work, until the first tile is there.

template <bool kPlain>
TP_DEVICE float logit_of(const StreamRoute& r, const float* logits, int e, bool inside) {
    const float x = __int_as_float(tp_load_word_in_order(logits + e, inside));
    return !kPlain && r.logits_bias ? x + __int_as_float(tp_load_word_in_order(r.logits_bias + e, inside)) : x;
}
/// An expert's logit, or its sigmoid.
template <bool kPlain>
TP_DEVICE float gate_of(const StreamRoute& r, const float* logits, int e, bool inside) {
    const float x = logit_of<kPlain>(r, logits, e, inside);
    return !kPlain && r.gating == kGatingSigmoid ? sigmoid(x) : x;
}
/// The soft max of a router's logits, times scale_before: their largest and their sum. A lane takes every 32nd.
struct SoftMax {
    float scale, most = -INFINITY, inverse = 0;
    TP_MEMBER float power(float v) const { return most == -INFINITY ? 0.0f : expf(v * scale - most); }
    TP_MEMBER float of(float v) const { return power(v) * inverse; }
};
template <bool kPlain>
TP_DEVICE SoftMax soft_max_of_gates(const StreamRoute& r, const float* logits) {
    const int lane = threadIdx.x % 32, n = r.n_expert;
    SoftMax out{r.scale_before};
    float sum = 0;
#pragma unroll 4
    for (int e = lane; e - lane < n; e += 32) {
        const float v = logit_of<kPlain>(r, logits, e, e < n);
        if (e < n) out.most = fmaxf(out.most, v * out.scale);
    }
    out.most = tp_warp_max(out.most);
#pragma unroll 4
    for (int e = lane; e - lane < n; e += 32) {
        const float v = logit_of<kPlain>(r, logits, e, e < n);
        if (e < n) sum += out.power(v);
    }
    sum = tp_warp_sum(sum);
    out.inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
    return out;
}

TP_DEVICE float bias_of(const StreamRoute& r, int e) { return r.selection_bias ? r.selection_bias[e] : 0.0f; }
/// Groups of experts that count, a bit each.
TP_DEVICE u32 groups_that_count(const Shared& s, const StreamRoute& r) {
    const u32 lane = threadIdx.x % 32, mine = (int)lane < r.n_groups_used ? 1u << s.groups[lane] : 0u;
    u32 open = 0;
    for (int i = 0; i < r.n_groups_used; ++i) open |= __shfl_sync(0xffffffffu, mine, i);
    return open;
}
TP_OUTLINE void of_groups(SoftMax gates, u32 open, int n_writers, bool writes);

/// Their weights, into shared memory; arithmetic and order are those of chain.cu. And all that others may read. Of other numbers than the router's logits:
/// nothing but the time that the instructions take to come.
/// kPlain: a soft max of the logits, whose weights are divided by their sum, and nobody else reads anything of it. Code that runs once a layer comes from the L2
/// each time, so what few models have is not in the way of the others.
constexpr bool is_plain(const StreamRoute& r) { return r.gating == kGatingSoftMax && !r.logits_bias && !r.visible && (r.steps & ~kRouteClamp) == kRouteDivide; }
template <bool kPlain>
TP_OUTLINE void weigh_experts(const float* logits) {
    Shared& s = shared_of();
    const StreamExperts& experts = *(const StreamExperts*)s.stored;
    const StreamRoute& r = experts.route;
    const auto has = [&](StreamRouteSteps step) { return kPlain ? step == kRouteDivide || (step == kRouteClamp && r.steps & step) : (r.steps & step) != 0; };
    const bool visible = !kPlain && r.visible, soft_max = kPlain || r.gating == kGatingSoftMax;
    const StreamProduct& p = experts.product;
    const int lane = threadIdx.x % 32, n = r.n_expert, n_used = r.n_used, n_writers = p.n_tiles < (int)gridDim.x ? p.n_tiles : (int)gridDim.x;
    const bool used = lane < n_used, chosen = logits == r.logits,
               writes = visible && chosen && (int)blockIdx.x == n_writers - 1;  // that block has the fewest tiles
    const float gate = gate_of<kPlain>(r, logits, used && chosen ? s.experts[lane] : lane, used);
    const SoftMax gates = soft_max ? soft_max_of_gates<kPlain>(r, logits) : SoftMax{};
    auto gated_as = [&](float of) { return soft_max ? gates.of(of) : of; };
    auto gated = [&](int e) { return gated_as(gate_of<kPlain>(r, r.logits, e, true)); };
    float weight = used ? gated_as(gate) : 0.0f;
    auto give = [&](float* to, float v) {
        if (writes && to && used) to[lane] = v;
    };
    give(r.chosen, weight);
    if (has(kRouteSoftMax)) {
        SoftMax after{r.scale_after, tp_warp_max(used ? weight * r.scale_after : -INFINITY)};
        const float sum = tp_warp_sum(used ? after.power(weight) : 0.0f);
        after.inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
        weight = used ? after.of(weight) : 0.0f;
        give(r.after, weight);
    }
    if (has(kRouteDivide)) {
        float sum = tp_warp_sum(weight);
        if (writes && r.sum && lane == 0) *r.sum = sum;
        if (has(kRouteClamp)) sum = sum < r.least ? r.least : sum > r.most ? r.most : sum;
        if (writes && r.clamped_sum && lane == 0) *r.clamped_sum = sum;
        weight = weight / sum;
        give(r.norms, weight);
    }
    if (has(kRouteScale)) {
        weight = weight * r.factor + r.shift;
        give(r.scaled_weights, weight);
    }
    if (used && chosen) s.weights[lane] = weight, s.weighed_experts[lane] = s.experts[lane];
    if (chosen && visible && (int)blockIdx.x < n_writers) {
        for (int e = lane; e < n && writes; e += 32) {
            const float v = gated(e);
            if (r.biased) r.biased[e] = logit_of<kPlain>(r, r.logits, e, true);
            if (r.gated) r.gated[e] = v;
            if (r.selection) r.selection[e] = v + r.selection_bias[e];
        }
        const int of_group = r.n_groups ? n / r.n_groups : n;
        u32 open = ~0u;  // groups that count
        if (r.n_groups) open = groups_that_count(s, r), of_groups(gates, open, n_writers, writes);
        // The whole order: a block finds the places of some experts.
        auto key_of = [&](int e) {
            float by = r.selection_bias || r.n_groups ? gated(e) + bias_of(r, e)
                       : has(kRouteByLogits)          ? logit_of<kPlain>(r, r.logits, e, true)
                                                      : gate_of<kPlain>(r, r.logits, e, true);
            if (r.n_groups && !(open >> e / of_group & 1)) by = -INFINITY;
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
TP_DEVICE void weigh_experts(bool plain, const float* logits) {
    if (plain) weigh_experts<true>(logits);
    else weigh_experts<false>(logits);
}
/// Which groups of 16 cells have one that is not masked, of kStreamedStep cells from `base` on: a bit each, the same for all lanes.
TP_DEVICE u32 open_groups(const char* mask, int base, int end) {
    static_assert(kColumnsStep * 2 == 2 * sizeof(TpInt4) && kStreamedStep == 32 * kColumnsStep, "a group a lane, two words of its masks");
    const int cell = base + threadIdx.x % 32 * kColumnsStep;
    bool open = cell < end;
    if (open && mask) {
        const TpInt4 a = ((const TpInt4*)(mask + (i64)cell * 2))[0], b = ((const TpInt4*)(mask + (i64)cell * 2))[1];
        constexpr int kClosed = (int)0xfc00fc00u;
        open = ((a.x ^ kClosed) | (a.y ^ kClosed) | (a.z ^ kClosed) | (a.w ^ kClosed) | (b.x ^ kClosed) | (b.y ^ kClosed) | (b.z ^ kClosed) |
                (b.w ^ kClosed)) != 0;
    }
    return __ballot_sync(0xffffffffu, open);
}
/// a / b for inverse = 2^16 / b, rounded up: a division would be 25 instructions. a * b below 2^16.
TP_DEVICE int divided(int a, u32 inverse) { return (int)((u32)a * inverse >> 16); }
/// A unit of a streamed cache: its cells [begin, end) and KV heads [first, first + n).
struct CellsUnit {
    int split, begin, end, first, n;
    TP_MEMBER CellsUnit(const StreamCells& c, int unit)
        : split(divided(unit, c.units_inverse)), begin(split * c.split_cells), first(c.v ? (unit - split * c.n_units) * c.unit_heads : 0) {
        end = begin + c.split_cells < c.n_cells ? begin + c.split_cells : c.n_cells;
        n = c.n_heads - first < c.unit_heads ? c.n_heads - first : c.unit_heads;
    }
};

// ---- the warp that streams weights, and of a long cache K and V. A lane has a copy of each tile: one thread took 280 cycles for
// each, 6,700 for those of eight experts.
struct Copy {
    const char* from = nullptr;
    u32 bytes = 0, to = 0;  // of a row; within a slot
    /// Of rows [row, row + rows) of the matrix, into the slot from its row `at` on. Everything is known when it is made: what the streaming warp computes
    /// once there is room on the way, the memory waits for.
    struct Ready {
        TpSharedAt to;
        const char* from;
        u32 bytes;
        TpBarrierAt full;
        TP_MEMBER void issue(u64 once) const {
            if (bytes) tp_bulk_load_once(to, from, bytes, full, once);
        }
    };
    TP_MEMBER Ready ready(TpSharedAt slot, TpBarrierAt full, u32 at, i64 row, u32 rows) const {
        Ready out{slot + (to + at * bytes), from + row * bytes, rows * bytes, full};
        tp_keep(out.to), tp_keep(out.from), tp_keep(out.bytes), tp_keep(out.full);
        return out;
    }
};
TP_OUTLINE void stream_weights() {
    Shared& s = shared_of();
    const StreamArgs& args = s.args;
    const TpSharedAt ring(ring_of());
    const TpBarrierAt full(s.full), empty(s.empty);
    const int lane = threadIdx.x % 32;
    AnyTurn slot, ahead;
    const int ring_slots = args.slots, room = stream_most_in_flight(ring_slots);
    Turn<1> chosen;
    const u64 once = tp_read_once();
    int in_flight = 0, most_in_flight = kStreamInFlight, most_early = kStreamInFlightEarly;
    bool early = true;  // ahead of the stage that is multiplied
    // Piece q of the next tile has room in the ring, and its bytes are announced (a copy may land before: the phase waits for the announcement); `of` pieces
    // that come as one have their bytes in the first. All lanes wait: one that did so for the others cost 1,000 cycles a tile, in leaving and joining them
    // again.
    auto announce_piece = [&](int q, int of, u32 bytes) {
        if (q == 0) {
            __syncwarp();  // a lane that fell a turn of the ring behind would wait for a parity that has come and gone: seen where lanes' answers differed
            tp_barrier_wait(empty + slot.at, slot.parity ^ 1);
        }
        if (lane < of) tp_barrier_expect(full + (slot.at * kStreamPieces + q + lane), lane == 0 ? bytes : 0u);
    };
    // And so many pieces of product i have room on their way.
    auto wait_for_way = [&](int i, int of) {
        while (in_flight + of > (early ? most_early : most_in_flight)) {
            tp_barrier_wait(full + ahead.at, ahead.parity);
            ahead.next(ring_slots * kStreamPieces);
            --in_flight;
            if (early) early = i > __shfl_sync(0xffffffffu, (int)tp_peek(&s.stage_now), 0);  // one answer for all lanes
        }
        in_flight += of;
    };
    for (int i = args.first_product, next, kind; i < args.n_stages; i = next) {
        const StreamExperts& experts = fetch_product(args.stages[i], s.streamed, next, kind);
        if (kind == kStreamFlash) {
            const StreamCells& c = *(const StreamCells*)&experts;
            early = true, most_in_flight = c.most_in_flight < room ? c.most_in_flight : room, most_early = kStreamInFlightEarly * (c.v ? 1 : kStreamPieces);
            const int groups = c.groups, half = groups * kColumnsStep / 2, together = half < kColumnsStep ? half : kColumnsStep;  // rows of one group
            for (int unit = blockIdx.x; unit < c.n_units * c.n_splits; unit += gridDim.x) {
                const CellsUnit of(c, unit);
                const u32 row_bytes = (u32)(of.n * c.head_bytes);
                for (int base = of.begin; base < of.end; base += kStreamedStep) {
                    u32 open = open_groups(c.mask, base, of.end);
                    for (int cell = base; open; cell += 2 * half, open >>= groups) {
                        const u32 bits = open & ((1u << groups) - 1);
                        if (!bits) continue;
                        if (!c.v) {  // four rows one behind the other, where the cache has them so
                            const int run = c.k_row == c.head_bytes ? 4 : 1, at = lane * run;
                            const TpSharedAt to = ring + (slot.at * kStreamSlotBytes + at / 4 * c.k_stride + at % 4 * c.head_bytes);
                            const char* const from = c.k + (cell + at) * c.k_row;
                            announce_piece(0, kStreamPieces, kColumnsStep * row_bytes);
                            wait_for_way(i, kStreamPieces);
                            if (at < kColumnsStep) tp_bulk_load_once(to, from, (u32)run * row_bytes, full + slot.at * kStreamPieces, once);
                            slot.next(ring_slots);
                            continue;
                        }
#pragma unroll 1
                        for (int of_v = 0; of_v < 2; ++of_v) {
                            const char* const from = (of_v ? c.v : c.k) + (i64)of.first * c.head_bytes + cell * (of_v ? c.v_row : c.k_row);
                            const i64 row = of_v ? c.v_row : c.k_row;
                            const int stride = of_v ? c.v_stride : c.k_stride, run = row == stride ? together : 1;  // rows of a copy
#pragma unroll 1
                            for (int q = 0; q < kStreamPieces; ++q) {
                                u32 rows = 0;  // of the piece's groups
                                for (int at = q * half; at < q * half + half; at += together)
                                    if (bits >> at / kColumnsStep & 1) rows += (u32)together;
                                announce_piece(q, 1, rows * row_bytes);
                                wait_for_way(i, 1);
                                for (int at = q * half + lane * run; at < q * half + half; at += 32 * run)
                                    if (bits >> at / kColumnsStep & 1)
                                        tp_bulk_load_once(ring + (slot.at * kStreamSlotBytes + at * stride), from + at * row, (u32)run * row_bytes,
                                                          full + (slot.at * kStreamPieces + q), once);
                            }
                            slot.next(ring_slots);
                        }
                    }
                }
            }
            continue;
        }
        const StreamProduct& p = experts.product;
        if (p.input == kInputNorm)  // into the L2: a share of every block
            for (int line = (int)blockIdx.x + (int)gridDim.x * lane; line < p.k / 32; line += 32 * (int)gridDim.x) {
                if (p.weight) tp_prefetch(p.weight + line * 32);
                if (p.b_weight) tp_prefetch(p.b_weight + line * 32);
            }
        early = p.role != kExpertsEach;
        most_in_flight = p.in_flight < room ? p.in_flight : room, most_early = p.in_flight_early;
        const int halves = p.glu ? 2 : 1, step = p.rows / halves, n_tiles = p.n_tiles, piece_rows = 1 << p.piece_shift;
        const bool whole =
            piece_rows >= step;  // or in two pieces, unrolled: with a loop over one or two, 8B in Q6_K, two pieces, had 353 tokens/s where it has 391
        const u32 row_bytes = (u32)p.row_bytes;
        Copy copy;  // lanes of which no rows come have none
        if (stream_by_slots(p)) {
            const int n = (int)p.part[0].n, slots = p.slots;
            const bool heads = p.role == kHeads;
            if (lane < slots)
                copy = {p.part[0].w + (i64)(heads ? lane : s.experts[lane]) * p.expert_rows * row_bytes, row_bytes, (u32)(lane * step) * row_bytes};
            const int tiles_each = heads ? (n + step - 1) / step : n_tiles;
            i64 of_group = 0;  // its first matrix's rows
            int group_tile = 0;
            for (int tile = blockIdx.x; tile < n_tiles; tile += gridDim.x) {
                while (tile - group_tile >= tiles_each) group_tile += tiles_each, of_group += (i64)slots * p.expert_rows;
                const int row = (tile - group_tile) * step, rows = n - row < step ? n - row : step;
                const TpSharedAt to = ring + slot.at * kStreamSlotBytes;
                const TpBarrierAt there = full + slot.at * kStreamPieces;
                announce_piece(0, kStreamPieces, (u32)(rows * slots) * row_bytes);
                const Copy::Ready ready = copy.ready(to, there, 0, of_group + row, (u32)rows);
                wait_for_way(i, kStreamPieces);
                ready.issue(once);
                slot.next(ring_slots);
            }
            continue;
        }
        const int half = lane < halves ? lane : 0, n_parts = p.glu ? 1 : p.n_parts;
        const u32 rows_bytes = row_bytes * (u32)halves;
        if (lane < halves) copy.bytes = row_bytes, copy.to = (u32)(half * step) * row_bytes;
        if (p.role == kExpertsEach) {
            tp_barrier_wait(&s.chosen, chosen.parity);
            chosen.next();
            tp_barrier_arrive(&s.taken);
        }
        int tile = blockIdx.x;
        for (int part = 0; part < n_parts; ++part) {
            const int n = (int)p.part[part].n, tiles_each = (n + step - 1) / step, tiles = p.role == kExpertsEach ? n_tiles : tiles_each;
            copy.from = p.part[p.glu ? half : part].w;
            for (; tile < tiles; tile += gridDim.x) {
                const int j = tiles > tiles_each ? tile / tiles_each : 0, row = (tile - j * tiles_each) * step, rows = n - row < step ? n - row : step;
                const i64 from_row = p.role == kExpertsEach ? (i64)s.experts[j] * p.expert_rows + row : row;
                if (whole) {
                    announce_piece(0, kStreamPieces, (u32)rows * rows_bytes);
                    const Copy::Ready ready = copy.ready(ring + slot.at * kStreamSlotBytes, full + slot.at * kStreamPieces, 0, from_row, (u32)rows);
                    wait_for_way(i, kStreamPieces);
                    ready.issue(once);
                } else {
#pragma unroll
                    for (int q = 0; q < kStreamPieces; ++q) {
                        const int at = q * piece_rows, left = rows - at, of_piece = left < 0 ? 0 : left < piece_rows ? left : piece_rows;
                        announce_piece(q, 1, (u32)of_piece * rows_bytes);
                        const Copy::Ready ready =
                            copy.ready(ring + slot.at * kStreamSlotBytes, full + (slot.at * kStreamPieces + q), (u32)at, from_row + at, (u32)of_piece);
                        wait_for_way(i, 1);
                        ready.issue(once);
                    }
                }
                slot.next(ring_slots);
            }
            tile -= tiles;
        }
    }
}

/// This block has done its part of a stage.
TP_DEVICE void arrive() { tp_signal(&shared_of().args.state->arrived); }

/// Where the inbox of a push begins, in words from the first inbox.
TP_DEVICE i64 inbox_of(const Shared& s, u32 push) { return push % 2 ? s.args.inbox_words : 0; }

/// Element `at` of what a stage computes a part of, into every rank's inbox.
template <class Stage>
TP_DEVICE void push_to_all(const Stage& stage, const Shared& s, i64 at, float v) {
    const u32 push = s.pushed_before + (u32)stage.push;
#pragma unroll 1
    for (int r = 0; r < stage.n_push; ++r) tp_store_tagged(stage.inbox[r] + inbox_of(s, push) + at, v, push);
}

// ---- the warp that stores
/// What groups of warps have of this lane's row. Most products have one group, so the loop is as short as its code.
TP_DEVICE float sum_of_groups(const Shared& s, int at, int rows, int groups) {
    float v = 0;
#pragma unroll 1
    for (int i = threadIdx.x % 32; groups > 0; --groups, i += rows) v += s.out[at][i];
    return v;
}
/// Where results of a part go: to y and its copies, or to every rank's inbox.
struct Destination {
    const StreamProduct& p;
    float *y, *copy;
    i32 n_push;
    TP_MEMBER Destination(const StreamProduct& of, const StreamPart& part) : p(of), y(part.y), copy(part.copy), n_push(of.n_push) {}
    TP_MEMBER void put(const Shared& s, i64 at, float v) const {
        if (n_push) {
            push_to_all(p, s, at, v);
            return;
        }
        y[at] = v;
        if (copy) copy[at] = v;
    }
};
/// Rows of one product or several. Where they go is known before they are there: what comes behind the wait is what the next stage waits for.
TP_DEVICE void store_rows(const StreamProduct& p, Shared& s, Turn<kOuts>& out) {
    const int lane = threadIdx.x % 32, rows = p.rows, groups = 1 << p.k_shift;
    for (int tile = blockIdx.x; tile < p.n_tiles; tile += gridDim.x) {
        i64 row;
        const StreamPart& part = p.part[part_of(p, tile, row)];
        const i64 at = row + lane;
        const bool inside = lane < rows && at < part.n;
        const Destination to(p, part);
        float* const raw = part.raw;
        const float added = part.bias && inside ? part.bias[at] : 0.0f;  // on its way while the tile is multiplied
        tp_barrier_wait(TpBarrierAt(s.out_full) + out.at, out.parity);
        float v = 0;
        if (lane < rows) v = sum_of_groups(s, out.at, rows, groups);
        tp_barrier_arrive(TpBarrierAt(s.out_empty) + out.at);
        out.next();
        if (raw && inside) raw[at] = v;
        if (inside) to.put(s, at, v + added);
    }
}
/// One product's rows and what an earlier stage has left: of an expert that all tokens share, and the others. What is added comes when the first tile is there,
/// as then other blocks' results are.
TP_OUTLINE Turn<kOuts> store_onto(Turn<kOuts> out) {
    Shared& s = shared_of();
    const StreamExperts& experts = *(const StreamExperts*)s.stored;
    const StreamProduct& p = experts.product;
    const StreamOnto& onto = experts.onto;
    const int lane = threadIdx.x % 32, rows = p.rows, groups = 1 << p.k_shift;
    const StreamPart& part = p.part[0];
    const Destination to(p, part);
    for (int tile = blockIdx.x; tile < p.n_tiles; tile += gridDim.x) {
        const i64 at = (i64)tile * rows + lane;
        const bool inside = lane < rows && at < part.n;
        tp_barrier_wait(TpBarrierAt(s.out_full) + out.at, out.parity);
        const float added = inside ? onto.added[at] : 0.0f, gate = onto.gate ? *onto.gate : 0.0f;
        float v = 0;
        if (lane < rows) v = sum_of_groups(s, out.at, rows, groups);
        tp_barrier_arrive(TpBarrierAt(s.out_empty) + out.at);
        out.next();
        if (onto.gate) v = tp_mul_rounded(v, sigmoid(gate));
        if (inside) to.put(s, at, added + v);
    }
    return out;
}
// Code that runs once a layer comes from the L2 each time, so what few models have is not in the way of the others: biases (kBiased: a bias, or a product
// that somebody reads without its bias) and GLUs have copies of these loops of their own.
constexpr bool is_biased(const StreamPart& part) { return part.bias || part.raw; }
/// Into the L2, of all of the block's tiles: behind the weights on their way each load from memory would take a tile's time. A tile has `each` of them.
template <class At>
TP_DEVICE void prefetch_biases(int n_tiles, int each, int lane, const At& at) {
    for (int i = lane;; i += 32) {
        const int before = i / each, tile = (int)blockIdx.x + before * (int)gridDim.x;
        if (tile >= n_tiles) return;
        tp_prefetch(at(tile, i - before * each));
    }
}
/// What a cut inside of a block leaves of a row of glu_copy: by the warp that has the row's first results.
TP_DEVICE void clear_rest(const StreamProduct& p, float* copy, i64 row, i64 n) {
    if (row) return;
    const int lane = threadIdx.x % 32;
    for (i64 i = lane; i < p.glu_begin; i += 32) copy[i] = 0;
    for (i64 i = p.glu_begin + n + lane; i < p.glu_k; i += 32) copy[i] = 0;
}
/// Gates and ups, of experts or not, and what the GLU, kOp if that is one, makes of them. Half of the lanes have gates, the other half ups.
template <int kOp, bool kBiased>
TP_DEVICE void store_glu_as(const StreamProduct& p, Shared& s, Turn<kOuts>& out) {
    const int lane = threadIdx.x % 32, rows = p.rows, half = rows / 2, groups = 1 << p.k_shift;
    const int tiles_each = p.role ? p.n_tiles / p.slots : p.n_tiles;
    const StreamPart& part = p.part[lane >= half];
    const i64 n = part.n;
    float *const halves_y = part.y, *const raw = part.raw, *const glu_y = p.glu_y;
    const int n_tiles = p.n_tiles, apart = (int)gridDim.x;
    struct Place {  // of a tile; a division for each would be 30 instructions
        int tile, slot, of_slot;
        TP_MEMBER void next(int apart, int tiles_each) {
            tile += apart, of_slot += apart;
            while (of_slot >= tiles_each) of_slot -= tiles_each, ++slot;
        }
    };
    Place place{(int)blockIdx.x, (int)blockIdx.x / tiles_each, 0}, ahead;
    place.of_slot = place.tile - place.slot * tiles_each;
    ahead = place;
    const int in_half = lane >= half ? lane - half : lane;
    auto next_bias = [&] {
        float bias = 0;
        const i64 at = (i64)ahead.of_slot * half + in_half;
        if (ahead.tile < n_tiles && part.bias && lane < rows && at < n) bias = part.bias[(p.role ? s.experts[ahead.slot] * (i64)part.bias_row : 0) + at];
        ahead.next(apart, tiles_each);
        return bias;
    };
    auto store = [&](float added) {
        const i64 row = (i64)place.of_slot * half, at = row + in_half, to = place.slot * (i64)p.y_stride + at, glu_to = place.slot * (i64)p.glu_stride + at;
        const bool inside = lane < rows && at < n;
        const float weight = kBiased && p.weighed ? s.weights[place.slot] : 1.0f;
        float* const copy = p.glu_copy ? p.glu_copy + (i64)place.slot * p.glu_k : nullptr;
        place.next(apart, tiles_each);
        tp_barrier_wait(TpBarrierAt(s.out_full) + out.at, out.parity);
        float v = 0;
        if (lane < rows) v = sum_of_groups(s, out.at, rows, groups);
        tp_barrier_arrive(TpBarrierAt(s.out_empty) + out.at);
        out.next();
        if (kBiased && p.weighed) v *= weight;
        if (kBiased && raw && inside) raw[to] = v;
        if (kBiased) v += added;
        const float up = __shfl_sync(0xffffffffu, v, lane + half < 32 ? lane + half : lane);
        if (halves_y && inside) halves_y[to] = v;
        if (lane < half && inside) {
            const float y = glu_of((GluOp)(kOp < 0 ? p.glu - 1 : kOp), v, up, p.alpha, p.limit);
            if (glu_y) glu_y[glu_to] = y;
            if (copy) copy[p.glu_begin + at] = y;
        }
        if (copy) clear_rest(p, copy, row, n);
    };
    if constexpr (kBiased) {  // by turns, as a copy of a register that is being loaded would wait for it
        if (p.part[0].bias && p.part[1].bias)
            prefetch_biases(n_tiles, 2, lane, [&](int tile, int of) {
                const int slot = tile / tiles_each;
                return p.part[of].bias + (p.role ? s.experts[slot] * (i64)p.part[of].bias_row : 0) + (tile - slot * tiles_each) * half;
            });
        float added = next_bias();
        while (place.tile < n_tiles) {
            const float next = next_bias();
            store(added);
            if (place.tile >= n_tiles) break;
            added = next_bias();
            store(next);
        }
    } else {
        while (place.tile < n_tiles) store(0.0f);
    }
}
TP_DEVICE void store_glu(const StreamProduct& p, Shared& s, Turn<kOuts>& out) {
    constexpr int kSwiglu = (int)GluOp::kSwiglu, kSwigluOai = (int)GluOp::kSwigluOai;
    const bool more = is_biased(p.part[0]) || is_biased(p.part[1]) || p.weighed;
    if (p.glu == 1 + kSwiglu && !more) store_glu_as<kSwiglu, false>(p, s, out);
    else if (p.glu == 1 + kSwigluOai) store_glu_as<kSwigluOai, true>(p, s, out);
    else store_glu_as<-1, true>(p, s, out);
}
/// Every slot's rows with the slots' weights, added up slot by slot.
TP_DEVICE void store_sums_alone(const StreamProduct& p, Shared& s, Turn<kOuts>& out) {
    const int lane = threadIdx.x % 32, rows = p.rows, slots = p.slots, n = (int)p.part[0].n;
    const Destination to(p, p.part[0]);
    for (int tile = blockIdx.x; tile < p.n_tiles; tile += gridDim.x) {
        const int at = tile * rows + lane;
        const float* from = s.out[out.at] + (lane < rows ? lane : 0);
        tp_barrier_wait(TpBarrierAt(s.out_full) + out.at, out.parity);
        float sum = tp_mul_rounded(from[0], s.weights[0]);
#pragma unroll 4
        for (int i = 1; i < slots; ++i) sum += tp_mul_rounded(from[i * rows], s.weights[i]);
        tp_barrier_arrive(TpBarrierAt(s.out_empty) + out.at);
        out.next();
        if (lane < rows && at < n) to.put(s, at, sum);
    }
}
/// The same with biases, or what somebody reads besides the last sums. A lane has two of a tile's rows and slots, as the sums of them lie there: the same of
/// every tile.
TP_DEVICE void store_sums_and_more(const StreamExperts& experts, Shared& s, Turn<kOuts>& out) {
    static_assert(kStreamMostSums == 64, "two of each lane");
    const StreamProduct& p = experts.product;
    const StreamPart& part = p.part[0];
    const StreamSums& more = experts.sums;
    const int lane = threadIdx.x % 32, rows = p.rows, slots = p.slots, n = (int)part.n;
    const Destination to(p, part);
    int slot[2], row_of[2], shift = 0;
    float weight[2];
    while (1 << shift < rows) ++shift;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        const bool is = lane + 32 * j < rows * slots;
        slot[j] = is ? (lane + 32 * j) >> shift : 0, row_of[j] = is ? (lane + 32 * j) & (rows - 1) : n;
        weight[j] = p.weighed ? 1.0f : s.weights[slot[j]];
    }
    i64 of_expert[2] = {};
    if (part.bias) {
#pragma unroll
        for (int j = 0; j < 2; ++j) of_expert[j] = s.weighed_experts[slot[j]] * (i64)part.bias_row;
        prefetch_biases(p.n_tiles, slots, lane, [&](int tile, int of) { return part.bias + s.weighed_experts[of] * (i64)part.bias_row + tile * rows; });
    }
    const int n_tiles = p.n_tiles, apart = (int)gridDim.x;
    auto load_biases = [&](int tile, float(&added)[2]) {
#pragma unroll
        for (int j = 0; j < 2; ++j)
            added[j] = part.bias && tile < n_tiles && tile * rows + row_of[j] < n ? part.bias[of_expert[j] + tile * rows + row_of[j]] : 0.0f;
    };
    auto store = [&](int tile, const float(&added)[2]) {
        const int row = tile * rows;
        tp_barrier_wait(TpBarrierAt(s.out_full) + out.at, out.parity);
        float v[2], product[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) v[j] = s.out[out.at][lane + 32 * j];
        tp_barrier_arrive(TpBarrierAt(s.out_empty) + out.at);
        out.next();
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const float sum = v[j] + added[j];
            product[j] = tp_mul_rounded(sum, weight[j]);
            if (row + row_of[j] >= n) continue;
            const i64 at = slot[j] * (i64)p.y_stride + row + row_of[j];
            if (part.raw) part.raw[at] = v[j];
            if (more.y) more.y[at] = sum;
            if (more.products) more.products[slot[j] * more.products_stride + row + row_of[j]] = product[j];
        }
        const bool inside = lane < rows && row + lane < n;
        float sum = product[0];
#pragma unroll 1
        for (int i = 1, at = rows; i < slots; ++i, at += rows) {
            sum += __shfl_sync(0xffffffffu, at >= 32 ? product[1] : product[0], (at + lane) % 32);  // an index would put them into local memory
            if (i + 1 < slots && more.sum[i - 1] && inside) more.sum[i - 1][row + lane] = sum;
        }
        if (inside) to.put(s, row + lane, sum);
    };
    float added[2], next[2];  // by turns, as above
    load_biases((int)blockIdx.x, added);
    for (int tile = blockIdx.x; tile < n_tiles; tile += 2 * apart) {
        load_biases(tile + apart, next);
        store(tile, added);
        if (tile + apart >= n_tiles) break;
        load_biases(tile + 2 * apart, added);
        store(tile + apart, next);
    }
}
/// Each head's rows.
TP_OUTLINE Turn<kOuts> store_heads(Turn<kOuts> out) {
    Shared& s = shared_of();
    const StreamProduct& p = *(const StreamProduct*)s.stored;
    const StreamPart& part = p.part[0];
    const int lane = threadIdx.x % 32, rows = p.rows, slots = p.slots, tiles_each = (part.n + rows - 1) / rows;
    int group_tile = 0, first = 0;  // of the group: tile, head
    for (int tile = blockIdx.x; tile < p.n_tiles; tile += gridDim.x) {
        while (tile - group_tile >= tiles_each) group_tile += tiles_each, first += slots;
        const int row0 = (tile - group_tile) * rows;
        tp_barrier_wait(TpBarrierAt(s.out_full) + out.at, out.parity);
        float v[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) v[j] = lane + 32 * j < rows * slots ? s.out[out.at][lane + 32 * j] : 0.0f;
        tp_barrier_arrive(TpBarrierAt(s.out_empty) + out.at);
        out.next();
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int slot = (lane + 32 * j) / rows, row = row0 + lane + 32 * j - slot * rows;
            if (slot >= slots || row >= part.n) continue;
            const i64 at = (i64)(first + slot) * p.y_stride + row;
            part.y[at] = v[j];
            if (part.copy) part.copy[at] = v[j];
        }
    }
    return out;
}
/// Experts' first products where those have no gates: a slot's rows, after an op or two.
TP_OUTLINE Turn<kOuts> store_map(Turn<kOuts> out) {
    Shared& s = shared_of();
    const StreamProduct& p = *(const StreamProduct*)s.stored;
    const int lane = threadIdx.x % 32, rows = p.rows, groups = 1 << p.k_shift;
    const int tiles_each = p.n_tiles / p.slots;
    const StreamPart& part = p.part[0];
    for (int tile = blockIdx.x; tile < p.n_tiles; tile += gridDim.x) {
        const int slot = tile / tiles_each;
        const i64 row = (i64)(tile - slot * tiles_each) * rows, at = row + lane, to = slot * (i64)p.y_stride + at;
        const bool inside = lane < rows && at < part.n;
        const float added = part.bias && inside ? part.bias[s.experts[slot] * (i64)part.bias_row + at] : 0.0f;
        tp_barrier_wait(TpBarrierAt(s.out_full) + out.at, out.parity);
        float v = 0;
        if (lane < rows) v = sum_of_groups(s, out.at, rows, groups);
        tp_barrier_arrive(TpBarrierAt(s.out_empty) + out.at);
        out.next();
        if (inside && part.raw) part.raw[to] = v;
        v += added;
#pragma unroll 1
        for (int i = 0; i < 2; ++i)
            if (const int op = p.map[i]) v = unary_of((UnaryOp)(op - 1), v, 0, 0, 0, 0);
        if (inside && part.y) part.y[to] = v;
        float* const copy = p.glu_copy + (i64)slot * p.glu_k;
        if (inside) copy[p.glu_begin + at] = v;
        clear_rest(p, copy, row, part.n);
    }
    return out;
}
/// An input times its expert's weight, for whoever else reads it.
TP_OUTLINE void put_input() {
    const Shared& s = shared_of();
    const StreamProduct& p = *(const StreamProduct*)s.stored;
    for (int i = threadIdx.x % 32; i < p.k; i += 32) p.sum[i] = p.a[i] * s.weights[0];
}
TP_OUTLINE Turn<kOuts> store_sums(Turn<kOuts> out) {
    Shared& s = shared_of();
    const StreamExperts& experts = *(const StreamExperts*)s.stored;
    if (is_biased(experts.product.part[0]) || experts.sums.visible || experts.product.weighed) store_sums_and_more(experts, s, out);
    else store_sums_alone(experts.product, s, out);
    return out;
}
TP_OUTLINE void store_results() {
    Shared& s = shared_of();
    const StreamArgs& args = s.args;
    const int lane = threadIdx.x % 32;
    Turn<kOuts> out;
    Turn<1> chosen;
    for (int i = args.first_product, next, kind; i < args.n_stages; i = next) {
        const StreamExperts& experts = fetch_product(args.stages[i], s.stored, next, kind);
        if (kind == kStreamFlash) continue;
        const StreamProduct& p = experts.product;
        if (p.role == kExpertsEach) {  // of any numbers first, so that the instructions are there; then until the first tile is
            const bool plain = is_plain(experts.route);
            weigh_experts(plain, (const float*)p.part[0].w);
            tp_barrier_wait(&s.chosen, chosen.parity);
            chosen.next();
            weigh_experts(plain, experts.route.logits);
            if (p.weighed && p.sum && blockIdx.x == 0) put_input();
        }
        if ((int)blockIdx.x >= p.n_tiles) {
            if (p.role == kExpertsEach) tp_barrier_arrive(&s.taken);
            continue;
        }
        if (p.role == kExpertsSum) out = store_sums(out);
        else if (p.role == kHeads) out = store_heads(out);
        else if (p.glu) store_glu(p, s, out);
        else if (p.role == kExpertsEach) out = store_map(out);
        else if (experts.onto.added) out = store_onto(out);
        else store_rows(p, s, out);
        __syncwarp();
        if (lane == 0) arrive();
        if (p.role == kExpertsEach) tp_barrier_arrive(&s.taken);
        if (lane == 0 && blockIdx.x == 0) args.cycles[i * kStreamTimes + kTimeStored] = tp_cycles();
    }
}

// ---- the multiplying warps
struct Walk {
    AnyTurn slot;
    Turn<kOuts> out;
    // In one register across calls.
    TP_MEMBER u32 packed() const { return (u32)(slot.at | slot.parity << 8 | out.at << 16 | out.parity << 24); }
    static TP_MEMBER Walk of(u32 v) { return {{(int)(v & 255), (int)(v >> 8 & 255)}, {{(int)(v >> 16 & 255), (int)(v >> 24)}}}; }
};
/// Where the multiplying warps are. It goes from function to function in registers: what a caller keeps across a call lies in local memory, and each wait
/// for other blocks empties the L1 of that.
struct Progress {
    int stage;
    u32 walk;     // a Walk
    float scale;  // of the input that shared memory holds
};

TP_DEVICE void load_eight(const float* from, bool inside, float (&v)[8]) {
    const TpInt4 a = tp_load_in_order(from, inside), b = tp_load_in_order(from + 4, inside);
    v[0] = __int_as_float(a.x), v[1] = __int_as_float(a.y), v[2] = __int_as_float(a.z), v[3] = __int_as_float(a.w);
    v[4] = __int_as_float(b.x), v[5] = __int_as_float(b.y), v[6] = __int_as_float(b.z), v[7] = __int_as_float(b.w);
}
TP_DEVICE void load_eight(const float* from, float (&v)[8]) { load_eight(from, true, v); }
TP_DEVICE void store_eight(float* to, const float (&v)[8]) {
    ((TpInt4*)to)[0] = {__float_as_int(v[0]), __float_as_int(v[1]), __float_as_int(v[2]), __float_as_int(v[3])};
    ((TpInt4*)to)[1] = {__float_as_int(v[4]), __float_as_int(v[5]), __float_as_int(v[6]), __float_as_int(v[7])};
}

/// Until try_it, or the deadline: the results are not valid then.
template <class TryIt>
TP_DEVICE void wait_until(Shared& s, TryIt try_it) {
    const u64 begin = tp_nanoseconds();
    for (u32 polls = 1; !try_it(); ++polls) {
        tp_spin();
        if (polls % kPollsPerLook) continue;
        if (tp_peek(&s.late)) return;
        if (tp_nanoseconds() - begin <= s.args.deadline_ns) continue;
        tp_poke(&s.late, 1);
        atomicExch(s.args.fault, (u32)kFaultLatePeer);
    }
}

/// For whoever asks where a token's time goes; called by thread 0.
TP_DEVICE void mark_stage(int stage, StreamTime what) {
    if (blockIdx.x == 0) shared_of().args.cycles[stage * kStreamTimes + what] = tp_cycles();
}
/// Stages come into shared memory two ahead: see fetch_product.
TP_DEVICE void fetch_stage(int stage) {
    constexpr int kWords = kStreamStageBytes / 16;
    const int thread = threadIdx.x;
    const StreamArgs& args = shared_of().args;
    if (thread < kWords && stage < args.n_stages) tp_copy_async((TpInt4*)shared_of().stage[stage % 3] + thread, (const TpInt4*)(args.stages + stage) + thread);
}
/// What other blocks have done before stage i is seen by all threads, and nobody reads the stage before any more: fetch_stage(i + 2) may follow.
TP_DEVICE void wait_for_stage(int i) {
    Shared& s = shared_of();
    if (threadIdx.x == 0) {
        const StreamStage& stage = stage_at(i % 3);
        const StreamArgs& args = s.args;
        mark_stage(i, kTimeBegin);
        const u32 arrivals = (u32)i * gridDim.x;
        const u32* const arrived = &args.state->arrived;
        if (stage.wait) wait_until(s, [&] { return (i32)(tp_read_signal(arrived) - arrivals) >= 0; });
        mark_stage(i, kTimeWaited);
    }
    tp_copy_wait();
    sync_multiplying();
}
TP_OUTLINE void await_stage(int i) { wait_for_stage(i); }
TP_DEVICE void begin_stage(int i) {
    await_stage(i);
    fetch_stage(i + 2);
}

/// Which groups of experts count, a bit each. by, more: what chooses, of a thread's experts, which are 32 apart.
template <int kEach>
TP_OUTLINE u32 in_groups(int stage, float by, float more);
/// Begins a stage of experts' first products and chooses them: the first n_used in the order of sort_row.h. A warp puts 32 experts, or 64, in order, and sends
/// in the first of them; these are put in order by whoever has them. A soft max without a selection bias orders as its logits do.
template <int kEach, bool kByLogits>
TP_OUTLINE void choose_experts(int stage) {
    const StreamRoute& r = ((const StreamExperts*)stage_at(stage % 3).body)->route;
    constexpr u32 kLast = ~0u;  // no expert
    Shared& s = shared_of();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = warp * 32 * kEach + lane, n = r.n_expert, n_used = r.n_used;
    if (threadIdx.x == 0) tp_barrier_wait(&s.taken, (int)(s.choices++ & 1) ^ 1);
    wait_for_stage(stage);
    float by[kEach];
    u32 key[kEach];
#pragma unroll
    for (int j = 0; j < kEach; ++j) by[j] = logit_of<false>(r, r.logits, first + 32 * j, first + 32 * j < n);
    if constexpr (!kByLogits) {
        const SoftMax gates = r.gating == kGatingSoftMax ? soft_max_of_gates<false>(r, r.logits) : SoftMax{};
#pragma unroll
        for (int j = 0; j < kEach; ++j) {
            if (r.gating == kGatingSigmoid) by[j] = sigmoid(by[j]);
            if ((r.selection_bias || r.n_groups) && r.gating == kGatingSoftMax) by[j] = gates.of(by[j]);
            if (r.selection_bias) by[j] += __int_as_float(tp_load_word_in_order(r.selection_bias + first + 32 * j, first + 32 * j < n));
        }
        if (r.n_groups) {
            const u32 open = in_groups<kEach>(stage, by[0], by[kEach - 1]);
#pragma unroll
            for (int j = 0; j < kEach; ++j)
                if (const int e = first + 32 * j; e < n && !(open >> e / (n / r.n_groups) & 1)) by[j] = -INFINITY;
        }
    }
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
        const u32 of_it = sort_key(by[j], true);
        key[j] = first + 32 * j >= n ? kLast : of_it < kLast ? of_it : kLast - 1;
    }
    int before[kEach] = {};
#pragma unroll
    for (int of = 0; of < kEach; ++of)
#pragma unroll 4
        for (int i = 0; i < 32; ++i) {
            const u32 other = __shfl_sync(0xffffffffu, key[of], i);
#pragma unroll
            for (int j = 0; j < kEach; ++j) before[j] += other < key[j] || (other == key[j] && 32 * of + i < 32 * j + lane);
        }
    static_assert(kStreamWarps * kVecSlots * 4 <= kStreamStageBytes, "keys that are sent in");
    u32* const keys = (u32*)s.stage[(stage + 2) % 3];  // the stage before this one; the one that will be there is not fetched yet
#pragma unroll
    for (int j = 0; j < kEach; ++j)
        if (before[j] < n_used) keys[warp * n_used + before[j]] = key[j];
    sync_multiplying();
    const int n_keys = (n + 32 * kEach - 1) / (32 * kEach) * n_used;
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
        if (before[j] >= n_used || first + 32 * j >= n) continue;
        const int mine = warp * n_used + before[j];
        int place = 0;
#pragma unroll 4
        for (int i = 0; i < n_keys; ++i) place += keys[i] < key[j] || (keys[i] == key[j] && i < mine);
        if (place < n_used) s.experts[place] = first + 32 * j;
    }
    sync_multiplying();
    if (threadIdx.x == 0) tp_barrier_arrive(&s.chosen);
}
TP_DEVICE void choose_experts(const StreamRoute& r, int stage) {
    static_assert(kStreamMostExperts <= 2 * kMultiply);
    const bool by_logits = r.steps & kRouteByLogits || (r.gating != kGatingSigmoid && !r.selection_bias && !r.n_groups);
    if (r.n_expert <= kMultiply) by_logits ? choose_experts<1, true>(stage) : choose_experts<1, false>(stage);
    else by_logits ? choose_experts<2, true>(stage) : choose_experts<2, false>(stage);
}

/// Where byte `at` of an input is in shared memory: words of 16 are swapped within their 128, each 128 otherwise, so that eight lanes whose words are 32 or 64
/// bytes apart find different banks. (As they come, 32 bytes apart: 512 cycles for eight warps' 4,096 elements instead of 256.)
TP_DEVICE int input_byte(int at) { return at ^ (at >> 3 & 0x70); }

constexpr int kStep = kStreamStep;  // (sixteen neighbours a thread: more lines a load, and slower by a quarter)

/// Elements of a norm that a thread writes for others, once the norm's scale is known: eight of its block's share, or none.
struct OwnEight {
    int at = -1;
    float v[8] = {};
    TP_MEMBER void keep(int where, const float (&from)[8]) {
        at = where;
        for (int i = 0; i < 8; ++i) v[i] = from[i];
    }
    TP_MEMBER void scale(float by) {
        for (int i = 0; i < 8; ++i) v[i] *= by;
    }
};

/// Where a thread's first elements of a product's input are, and of what is added to it and multiplied with it (null: nothing): read before the wait.
struct InputFrom {
    const float *a, *b, *weight;
    float b_scale = 1.0f, sum_factor = 1.0f;  // where b is normed first
    TP_MEMBER InputFrom(const StreamProduct& p) {
        const int at = 8 * (int)threadIdx.x;
        a = p.a + at, b = p.input == kInputNorm && p.b ? p.b + at : nullptr, weight = p.input == kInputNorm && p.weight ? p.weight + at : nullptr;
    }
    /// kInputHeads: eight elements from `at` on, counted through all heads.
    TP_MEMBER const float* of_heads(const StreamProduct& p, int at) const {
        const int head = divided(at / 8, p.heads_inverse);
        return p.a + head * p.a_stride + (at - head * p.k);
    }
};
/// Elements [first, first + kSteps * kStep) of a product's input, of which only the last may end early; all loads go out before any is used, and what needs
/// other lanes or a reciprocal is done for all steps at a time. Of what is written for others every block writes its share. Returns this thread's sum of squares.
template <int kSteps, bool kNorm, bool kNormedB, bool kHeads>
TP_DEVICE float take_steps(const StreamProduct& p, const InputFrom& in, Shared& s, int k, int first, OwnEight& own) {
    const int thread = threadIdx.x, from = (int)blockIdx.x * p.share;
    auto inside = [&](int j) { return j + 1 < kSteps || first + j * kStep + thread * 8 < k; };
    // What is not loaded has a value all the same: registers that are defined on some paths only were kept from the function's beginning on, in local memory.
    float v[kSteps][8] = {}, more[kNorm ? kSteps : 1][8] = {}, weight[kNorm ? kSteps : 1][8] = {}, squares = 0, most[kSteps];
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
        const int here = inside(j) ? first + j * kStep : -8 * thread;
        if constexpr (kHeads) load_eight(in.of_heads(p, here + 8 * thread), v[j]);
        else load_eight(in.a + here, v[j]);
        if constexpr (kNorm) {
            if (in.b) load_eight(in.b + here, more[j]);
            if constexpr (kNormedB) {
                float of_b[8];
                load_eight(p.b_weight + here + 8 * thread, of_b);
                for (int i = 0; i < 8; ++i) more[j][i] *= in.b_scale * of_b[i];
            }
            if (in.weight) load_eight(in.weight + here, weight[j]);
        }
    }
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
        const int at = first + j * kStep + thread * 8;
        if constexpr (kNorm) {
            const bool mine = at >= from && at < from + p.share && inside(j);
            if (in.b)
                for (int i = 0; i < 8; ++i) v[j][i] = kNormedB ? (v[j][i] + more[j][i]) * in.sum_factor : v[j][i] + more[j][i];
            if (mine) {
                if (p.sum) store_eight(p.sum + at, v[j]);
                if (p.sum_copy) store_eight(p.sum_copy + at, v[j]);
            }
            float of_eight = 0;
            for (int i = 0; i < 8; ++i) of_eight += v[j][i] * v[j][i];
            squares += inside(j) ? of_eight : 0.0f;
            if (in.weight)
                for (int i = 0; i < 8; ++i) v[j][i] *= weight[j][i];
            if (mine && p.norm) own.keep(at, v[j]);
        }
        most[j] = 0;
        for (int i = 0; i < 8; ++i) most[j] = fmaxf(most[j], fabsf(v[j][i]));
    }
#pragma unroll
    for (int o = 1; o < 4; o *= 2)
#pragma unroll
        for (int j = 0; j < kSteps; ++j) most[j] = fmaxf(most[j], __shfl_xor_sync(0xffffffffu, most[j], o));
    int words[kSteps][2], sum[kSteps];
    float d[kSteps];
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
        const Int8Scale scale(most[j]);
        d[j] = scale.d, sum[j] = 0;
        for (int i = 0; i < 2; ++i) {
            const float* four = v[j] + 4 * i;
            words[j][i] = four_bytes(scale.bits(four[0]), scale.bits(four[1]), scale.bits(four[2]), scale.bits(four[3]));
            sum[j] = tp_dp4a(words[j][i], 0x01010101, sum[j]);
        }
    }
#pragma unroll
    for (int o = 1; o < 4; o *= 2)
#pragma unroll
        for (int j = 0; j < kSteps; ++j) sum[j] += __shfl_xor_sync(0xffffffffu, sum[j], o);
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
        const int at = first + j * kStep + thread * 8;
        if (!inside(j)) continue;
        int* const to = (int*)(s.x + input_byte(at));
        to[0] = words[j][0], to[1] = words[j][1];
        if (at % 32 == 0) *(TpFloat2*)(s.xd + at / 32 * 2) = {d[j], d[j] * (float)sum[j]};
    }
    return squares;
}
/// All of an input, kMost steps at a time: registers hold four without a norm, two with one (its weights, and what it adds).
template <int kMost, bool kNorm, bool kNormedB = false, bool kHeads = false>
TP_DEVICE float take_all(const StreamProduct& p, const InputFrom& in, Shared& s, int k, OwnEight& own) {
    float squares = 0;
#pragma unroll 1
    for (int first = 0; first < k; first += kMost * kStep) {
        const int left = k - first;
        if (kMost > 3 && left > 3 * kStep) squares += take_steps<4, kNorm, kNormedB, kHeads>(p, in, s, k, first, own);
        else if (kMost > 2 && left > 2 * kStep) squares += take_steps<3, kNorm, kNormedB, kHeads>(p, in, s, k, first, own);
        else if (left > kStep) squares += take_steps<2, kNorm, kNormedB, kHeads>(p, in, s, k, first, own);
        else squares += take_steps<1, kNorm, kNormedB, kHeads>(p, in, s, k, first, own);
    }
    return squares;
}

/// The sum over the multiplying warps, which have read the last such sum.
TP_DEVICE float sum_of_warps(Shared& s, float v) {
    v = tp_warp_sum(v);
    if (threadIdx.x % 32 == 0) s.squares[threadIdx.x / 32] = v;
    sync_multiplying();
    float total = 0;
    for (int w = 0; w < kStreamWarps; ++w) total += s.squares[w];
    return total;
}
/// 1 / root mean square of k elements, of which each thread has some, whose squares these are the sum of.
TP_DEVICE float norm_scale(Shared& s, float squares, int k, float eps) {
    return tp_quotient(1.0f, sqrtf(tp_quotient(sum_of_warps(s, squares), (float)k) + eps));
}
/// Of all of an input's b; a thread takes what it will take once more.
TP_DEVICE float scale_of_b(const StreamProduct& p, const InputFrom& in, Shared& s, int k) {
    constexpr int kMost = 4;
    float squares = 0;
#pragma unroll 1
    for (int first = 0; first < k; first += kMost * kStep) {
        float v[kMost][8] = {};
#pragma unroll
        for (int j = 0; j < kMost; ++j) {
            const int here = first + j * kStep;
            const bool inside = here + 8 * (int)threadIdx.x < k;
            load_eight(in.b + (inside ? here : -8 * (int)threadIdx.x), inside, v[j]);
        }
#pragma unroll
        for (int j = 0; j < kMost; ++j)
            for (int i = 0; i < 8; ++i) squares += v[j][i] * v[j][i];
    }
    const float scale = norm_scale(s, squares, k, p.eps);
    sync_multiplying();  // the sums of the second norm meet where these did
    return scale;
}
TP_DEVICE void input_taken(int stage) {
    if (threadIdx.x) return;
    tp_poke(&shared_of().stage_now, (u32)stage);  // not before: tiles at full speed would hold up the input
    mark_stage(stage, kTimeInput);
}
/// Begins a product (experts' first ones: choose_experts has) and takes its input, as int8 in shared memory, without the norm's 1 / root mean square: that
/// scales the results.
template <bool kNormedB>
TP_DEVICE Progress take_input_as(Progress at) {
    Shared& s = shared_of();
    const StreamProduct& p = *(const StreamProduct*)stage_at(at.stage % 3).body;
    InputFrom in(p);
    const int k = stream_input(p), input = p.input;
    if (p.role != kExpertsEach) wait_for_stage(at.stage);
    if (input == kInputNorm) {
        OwnEight own;
        if constexpr (kNormedB) {
            in.b_scale = scale_of_b(p, in, s, k);
            if (p.sum_factor) in.sum_factor = *p.sum_factor;
        }
        const float squares = take_all<2, true, kNormedB>(p, in, s, k, own);
        fetch_stage(at.stage + 2);
        at.scale = norm_scale(s, squares, k, p.eps);
        if (own.at >= 0) own.scale(at.scale), store_eight(p.norm + own.at, own.v);
    } else {
        if (input != kInputKept) {
            OwnEight nothing;
            take_all<4, false>(p, in, s, k, nothing);
            sync_multiplying();
            at.scale = 1.0f;
        }
        fetch_stage(at.stage + 2);
    }
    input_taken(at.stage);
    return at;
}
/// The same of an input of heads that lie apart.
TP_OUTLINE Progress take_rows(Progress at) {
    Shared& s = shared_of();
    const StreamProduct& p = *(const StreamProduct*)stage_at(at.stage % 3).body;
    const InputFrom in(p);
    OwnEight nothing;
    wait_for_stage(at.stage);
    take_all<4, false, false, true>(p, in, s, stream_input(p), nothing);
    sync_multiplying();
    fetch_stage(at.stage + 2);
    input_taken(at.stage);
    return {at.stage, at.walk, 1.0f};
}
// Models of two norms in a row have code of their own: the other one's registers are full.
TP_OUTLINE Progress take_both(Progress at) { return take_input_as<true>(at); }
TP_OUTLINE Progress take_input(Progress at) {
    const StreamProduct& p = *(const StreamProduct*)stage_at(at.stage % 3).body;
    if (p.b_weight) return take_both(at);
    if (p.input == kInputHeads) return take_rows(at);
    return take_input_as<false>(at);
}

/// The sums over groups of 8, 16 or 32 lanes of what their lanes have of kRows rows, each where the shuffles of one row alone would add it up to. A lane gets one
/// row's: the rows' lanes lie side by side.
template <int kRows>
TP_DEVICE float sum_of_lanes(const float (&v)[kRows], int lanes) {
    static_assert(kRows == 2 || kRows == 4);
    const int lane = threadIdx.x;
    int o = lanes / 2;
    float sum;
    auto one_of = [&](float low, float high) {  // the halves of the lanes have a row each from here on
        const bool upper = lane & o;
        return (upper ? high : low) + __shfl_xor_sync(0xffffffffu, upper ? low : high, o);
    };
    if constexpr (kRows == 4) {
        const float low = one_of(v[0], v[2]), high = one_of(v[1], v[3]);
        o /= 2;
        sum = one_of(low, high);
    } else {
        sum = one_of(v[0], v[1]);
    }
    for (o /= 2; o; o /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, o);
    return sum;
}

/// All tiles of a product. A warp takes kRows rows at a time, so that their loads, products and sums overlap; of four it has four, or eight.
template <int kType, int kUnits, int kRows>
TP_OUTLINE Progress multiply(Progress now) {
    using U = Unit<kType>;
    Walk walk = Walk::of(now.walk);
    const float scale = now.scale;
    const StreamProduct& p = *(const StreamProduct*)stage_at(now.stage % 3).body;
    Shared& s = shared_of();
    const char* ring = ring_of();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, units = p.k / U::kElems;
    const int row_shift = kLogWarps - p.k_shift, row_groups = 1 << row_shift, group = warp >> row_shift, first_row = warp & (row_groups - 1);
    TpInt4 x[kUnits][U::kWords];
    TpFloat2 d[kUnits][U::kBlocks];
    constexpr int kOfBlock = U::kWords / U::kBlocks;
    static_assert(32 * U::kElems % 1024 == 0, "a warp's units lie alike in theirs, also where words are swapped");
#pragma unroll
    for (int j = 0; j < kUnits; ++j) {
        const int first = (group * kUnits + j) * 32;
        const bool inside = first + lane < units;
        const int begin = inside ? first * U::kElems : 0;
#pragma unroll
        for (int w = 0; w < U::kWords; ++w) {
            const int word = U::word(lane, w);
            x[j][w] = *(const TpInt4*)(s.x + (begin + input_byte(word)));
            if (w % kOfBlock) continue;
            const TpFloat2 of = *(const TpFloat2*)(s.xd + (begin + word) / 32 * 2);
            d[j][w / kOfBlock] = {inside ? of.x * scale : 0.0f, inside ? of.y * scale : 0.0f};
        }
        U::arrange(x[j]);
    }
    const int rows = p.rows, n_tiles = p.n_tiles, ring_slots = s.args.slots, last_of_half = (p.glu ? rows / 2 : rows) - 1, shift = p.piece_shift;
    const int row_of_lane = lane / (32 / kRows) << row_shift;
    const int row_bytes = p.row_bytes;
    int plane_at[4];
#pragma unroll
    for (int f = 0; f < 4; ++f) plane_at[f] = p.plane_at[f];
    const TpBarrierAt all_full(s.full), empty(s.empty), out_full(s.out_full), out_empty(s.out_empty);
    for (int tile = blockIdx.x; tile < n_tiles; tile += gridDim.x) {
        tp_barrier_wait(out_empty + walk.out.at, walk.out.parity ^ 1);
        const TpBarrierAt full = all_full + walk.slot.at * kStreamPieces;
        const char* slot = ring + walk.slot.at * kStreamSlotBytes;
        for (int row = first_row; row < rows; row += kRows << row_shift) {
            const int last = row + ((kRows - 1) << row_shift), there = last < rows ? last : row;  // of two rows there may be one
            tp_barrier_wait(full + ((row & last_of_half) >> shift), walk.slot.parity);
            tp_barrier_wait(full + ((there & last_of_half) >> shift), walk.slot.parity);
            const char* plane[kRows][4];
#pragma unroll
            for (int r = 0; r < kRows; ++r)
#pragma unroll
                for (int f = 0; f < 4; ++f) plane[r][f] = slot + plane_at[f] + (r == kRows - 1 ? there : row + (r << row_shift)) * row_bytes;
            float sum[kRows] = {};
#pragma unroll
            for (int j = 0; j < kUnits; ++j) {
                // Beyond the end: any weights, times an input of zero. A branch here would keep the loads from going out together.
                const int at = (group * kUnits + j) * 32 + lane, unit = at < units ? at : units - 1;
                U w[kRows];
#pragma unroll
                for (int r = 0; r < kRows; ++r) w[r].load((const char* const*)plane[r], unit, LoadRing());
#pragma unroll
                for (int r = 0; r < kRows; ++r) sum[r] += w[r].dot_unit(unit, x[j], d[j]);
            }
            const float one = sum_of_lanes(sum, 32);
            if (lane % (32 / kRows) == 0 && row + row_of_lane < rows) s.out[walk.out.at][group * rows + row + row_of_lane] = one;
        }
        tp_barrier_arrive(empty + walk.slot.at);
        tp_barrier_arrive(out_full + walk.out.at);
        walk.slot.next(ring_slots);
        walk.out.next();
    }
    now.walk = walk.packed();
    return now;
}

/// All tiles of the experts' last product: groups of p.lanes lanes have rows of one slot each, so that a lane's pieces of that slot's part of the input are the
/// same for all of them; 1 << k_shift groups share a slot. kRows rows at a time, as above. Where a lane has more than kUnits units, or a group several slots, it
/// takes its input again for each kRows rows.
template <int kType, int kUnits, int kRows>
TP_OUTLINE Progress multiply_slots(Progress now) {
    using U = Unit<kType>;
    Walk walk = Walk::of(now.walk);
    const StreamProduct& p = *(const StreamProduct*)stage_at(now.stage % 3).body;
    Shared& s = shared_of();
    const int lanes = p.lanes, lane = threadIdx.x % lanes, rows = p.rows, slots = p.slots, k = p.k, units = k / U::kElems, n_tiles = p.n_tiles;
    const int shift = p.k_shift, group = threadIdx.x / lanes, at_once = kMultiply / lanes >> shift, ring_slots = s.args.slots;  // slots at once
    const int first_row = group & ((1 << shift) - 1), row_of_lane = lane / (lanes / kRows) << shift;
    const int row_bytes = p.row_bytes;
    int plane_at[4];
#pragma unroll
    for (int f = 0; f < 4; ++f) plane_at[f] = p.plane_at[f];
    TpInt4 x[kUnits][U::kWords] = {};  // defined on all paths, as above: 107 registers were kept from all functions otherwise
    TpFloat2 d[kUnits][U::kBlocks] = {};
    constexpr int kOfBlock = U::kWords / U::kBlocks;
    const int first_slot = group >> shift;
    const bool heads = p.role == kHeads, once = units <= kUnits * lanes && slots <= at_once && !heads;
    const int tiles_each = heads ? (p.part[0].n + rows - 1) / rows : n_tiles;
    int group_tile = 0, of_group = 0;  // of the heads of a tile: their first tile, the first one's input
    bool taken = false;
    for (int tile = blockIdx.x; tile < n_tiles; tile += gridDim.x) {
        while (tile - group_tile >= tiles_each) group_tile += tiles_each, of_group += slots * k;
        tp_barrier_wait(TpBarrierAt(s.full) + walk.slot.at * kStreamPieces, walk.slot.parity);
        tp_barrier_wait(TpBarrierAt(s.out_empty) + walk.out.at, walk.out.parity ^ 1);
        const char* tile_at = ring_of() + walk.slot.at * kStreamSlotBytes;
        // Whole warps leave the loops together, also where a group has no slot, or fewer rows.
        for (int base = 0; base < slots; base += at_once) {
            const bool some = base + first_slot < slots;
            const int slot = some ? base + first_slot : slots - 1;
            for (int row = 0; row < rows; row += kRows << shift) {
                const char* plane[kRows][4];
#pragma unroll
                for (int r = 0; r < kRows; ++r) {
                    const int at = row + first_row + (r << shift), of = slot * rows + (at < rows ? at : rows - 1);
#pragma unroll
                    for (int f = 0; f < 4; ++f) plane[r][f] = tile_at + plane_at[f] + of * row_bytes;
                }
                float sum[kRows] = {};
                for (int first = 0; first < units; first += kUnits * lanes) {
                    if (!once || !taken) {
#pragma unroll
                        for (int j = 0; j < kUnits; ++j) {
                            const int unit = first + j * lanes + lane;
                            const bool inside = unit < units;
#pragma unroll
                            for (int w = 0; w < U::kWords; ++w) {
                                const int at = of_group + slot * k + U::word(inside ? unit : 0, w);
                                x[j][w] = *(const TpInt4*)(s.x + input_byte(at));
                                if (w % kOfBlock) continue;
                                const TpFloat2 of = *(const TpFloat2*)(s.xd + at / 32 * 2);
                                d[j][w / kOfBlock] = {inside ? of.x : 0.0f, inside ? of.y : 0.0f};
                            }
                            U::arrange(x[j]);
                        }
                        taken = true;
                    }
#pragma unroll
                    for (int j = 0; j < kUnits; ++j) {
                        const int at = first + j * lanes + lane, unit = at < units ? at : units - 1;
                        U w[kRows];
#pragma unroll
                        for (int r = 0; r < kRows; ++r) w[r].load((const char* const*)plane[r], unit, LoadRing());
#pragma unroll
                        for (int r = 0; r < kRows; ++r) sum[r] += w[r].dot_unit(unit, x[j], d[j]);
                    }
                }
                const float one = sum_of_lanes(sum, lanes);
                const int at = row + first_row + row_of_lane;
                if (lane % (lanes / kRows) == 0 && some && at < rows) s.out[walk.out.at][slot * rows + at] = one;
            }
        }
        tp_barrier_arrive(TpBarrierAt(s.empty) + walk.slot.at);
        tp_barrier_arrive(TpBarrierAt(s.out_full) + walk.out.at);
        walk.slot.next(ring_slots);
        walk.out.next();
    }
    now.walk = walk.packed();
    return now;
}

template <int kType>
TP_DEVICE Progress multiply(const StreamProduct& p, Progress now) {
    static_assert(Unit<kType>::kElems == stream_unit(kType), "what stream_fit counts");
    constexpr int kElems = Unit<kType>::kElems, kMostUnits = kStreamMostElems / kElems;
    static_assert(kMostUnits == 2 || kMostUnits == 4);
    if (stream_by_slots(p)) {
        constexpr int kFew = kMostUnits == 4 ? 3 : 1;  // units, where two rows are taken at a time: gpt-oss's 2,880 weights are three
        const bool four = p.rows >> p.k_shift >= 4 && (kFew == 1 || p.units_each == 1);
        return four ? multiply_slots<kType, 1, 4>(now) : multiply_slots<kType, kFew, 2>(now);
    }
    const bool four = p.rows << p.k_shift >= 4 * kStreamWarps;  // rows of each warp
    if constexpr (kMostUnits == 4) {
        if (p.units_each > 3) return multiply<kType, 4, 2>(now);
        if (p.units_each == 3) return multiply<kType, 3, 2>(now);
        if (p.units_each == 2) return four ? multiply<kType, 2, 4>(now) : multiply<kType, 2, 2>(now);
        return multiply<kType, 1, 2>(now);
    } else {
        if (p.units_each == 2) return multiply<kType, 2, 2>(now);
        return four ? multiply<kType, 1, 4>(now) : multiply<kType, 1, 2>(now);
    }
}

/// By weights of the one of these types that they are.
template <int kType, int... kOthers>
TP_DEVICE Progress multiply_one_of(const StreamProduct& p, Progress now) {
    static_assert(stream_can_type(kType));
    if constexpr (sizeof...(kOthers) > 0)
        if (p.type != kType) return multiply_one_of<kOthers...>(p, now);
    return multiply<kType>(p, now);
}
constexpr int stream_types() {
    int n = 0;
    for (const WeightFormat& format : kWeightFormats) n += stream_can_type(format.type);
    return n;
}
template <int... kTypes>
TP_DEVICE Progress multiply_any_of(const StreamProduct& p, Progress now) {
    static_assert((int)sizeof...(kTypes) == stream_types(), "a type that stream_fit takes would be read as the last of these");
    return multiply_one_of<kTypes...>(p, now);
}

/// A product of floats, of few rows: a router's. A block has whole rows, kRows at once, and what it multiplies with them it computes as it reads it.
template <int kRows>
TP_OUTLINE void multiply_floats(int at) {
    const StreamFloats& f = *(const StreamFloats*)stage_at(at).body;
    float* met = (float*)shared_of().x;  // [kRows + 1][kStreamWarps]
    const int thread = threadIdx.x, k = (int)f.k, from = (int)blockIdx.x * f.share, n = (int)f.n + (f.more_w ? 1 : 0), blocks = (int)gridDim.x;
    auto row_of = [&](int i) { return i == (int)f.n ? f.more_w : f.w + i * f.row_stride; };
    OwnEight own;
    for (int row = blockIdx.x, round = 0; row < n || !round; row += blocks * kRows, ++round) {
        float squares = 0, sum[kRows] = {};
        for (int i = thread * 8; i < k; i += kStep) {
            float v[8], more[8] = {}, weight[8] = {}, w[kRows][8];
            load_eight(f.a + i, v);
            if (f.b) load_eight(f.b + i, more);
            if (f.weight) load_eight(f.weight + i, weight);
#pragma unroll
            for (int r = 0; r < kRows; ++r) load_eight(row_of(row + r * blocks) + i, row + r * blocks < n, w[r]);
            if (f.b)
                for (int e = 0; e < 8; ++e) v[e] += more[e];
            const bool mine = !round && i >= from && i < from + f.share;
            if (mine) {
                if (f.sum) store_eight(f.sum + i, v);
                if (f.sum_copy) store_eight(f.sum_copy + i, v);
            }
            for (int e = 0; e < 8; ++e) squares += v[e] * v[e];
            if (f.weight)
                for (int e = 0; e < 8; ++e) v[e] *= weight[e];
            if (mine) own.keep(i, v);
            for (int e = 0; e < 8; ++e)
#pragma unroll
                for (int r = 0; r < kRows; ++r) sum[r] += v[e] * w[r][e];
        }
        squares = tp_warp_sum(squares);
#pragma unroll
        for (int r = 0; r < kRows; ++r) sum[r] = tp_warp_sum(sum[r]);
        if (round) sync_multiplying();  // the last rows met there
        if (thread % 32 == 0) {
            met[thread / 32] = squares;
#pragma unroll
            for (int r = 0; r < kRows; ++r) met[(r + 1) * kStreamWarps + thread / 32] = sum[r];
        }
        sync_multiplying();
        const int mine = row + thread * blocks;
        const bool writes = thread < kRows && mine < n;
        if (!writes && (round || own.at < 0)) continue;
        float total = 0;
        for (int w = 0; w < kStreamWarps; ++w) total += met[w];
        const float scale = f.has_norm ? tp_quotient(1.0f, sqrtf(tp_quotient(total, (float)k) + f.eps)) : 1.0f;
        if (writes) {
            float y = 0;
            for (int w = 0; w < kStreamWarps; ++w) y += met[(thread + 1) * kStreamWarps + w];
            if (mine == (int)f.n) *f.more_y = y * scale;
            else if (f.y) f.y[mine] = y * scale;
            if (f.y_copy && mine < (int)f.n) f.y_copy[mine] = y * scale;
        }
        if (!round && own.at >= 0 && f.has_norm) {
            own.scale(scale);
            if (f.norm) store_eight(f.norm + own.at, own.v);
            if (f.norm_copy) store_eight(f.norm_copy + own.at, own.v);
        }
    }
}

/// The queries of a unit of n_kv KV heads from heads.kv_head on, as halves [heads.n][d] in shared memory, scaled; its own keys and values go to the
/// cache: see StreamOwnToken. What they are made of comes by asynchronous copies, `batch` heads in one trip to the L2, and loops over heads are not unrolled:
/// code that runs once a layer costs five cycles an instruction. kOwnRows: own_rows gets the piece's own keys and values as well, [2][n_kv][d] halves, as this
/// block must not read them in the cache, which is streamed, or to which another unit's block writes them. Queries that are turned already stay in memory.
template <bool kOwnRows>
struct QueriesShared {
    static constexpr bool kOwnCell = kOwnRows;
    int stage;  // to begin, or -1
    const StreamFlash& f;
    const UnitHeads& heads;
    int split, d;
    u16* queries;
    float* rows;  // of d floats: the turns, the weights of the heads' norms, a batch of query heads, keys and values
    int n_kv, batch;
    u16* own_rows;                        // where kOwnRows
    bool keeps;                           // own keys and values in the cache: of several units that have the same, one does
    int row[2] = {-1, -1}, high[2] = {};  // of the caches, for key and value; -1: outside
    int own[2] = {-1, -1};                // cells of which own_rows has them

    TP_MEMBER const StreamOwnToken::Cache& cache(int i) const { return i ? f.own.v_cache : f.own.k_cache; }
    TP_MEMBER TpInt4 eight(const UnitHeads&, int h, int at) const { return *(const TpInt4*)(queries + h * d + at); }
    TP_MEMBER int own_cell(int i) const { return i ? own[1] : own[0]; }  // registers, not an array
    TP_MEMBER const u16* own_row(int i) const { return own_rows + i * n_kv * d; }
    /// Whether this piece has the token's cell; one that the attention does not see is the first piece's.
    TP_MEMBER bool has(int i) const {
        const int cell = (i ? row[1] : row[0]) - (int)cache(i).first, begin = split * f.args.cells, cells = (int)f.args.a.k.ne[1];
        return (i ? row[1] : row[0]) >= 0 && (cell < 0 || cell >= cells ? split == 0 : cell >= begin && cell < begin + f.args.cells);
    }
    TP_MEMBER int n_heads() const { return heads.n + 2 * n_kv; }
    TP_MEMBER void copy_row(const float* from, int to) const {
#pragma unroll 1
        for (int i = threadIdx.x % 32 * 4; i < d; i += 128) tp_copy_async(rows + to * d + i, from + i);
    }
    /// Heads [first, first + batch), of queries, keys and values one behind the other: a thread four elements of each head that it takes, as in turn(). A thread's
    /// first head is found where this is made, the others as they are sent for.
    struct HeadCopies {
        const QueriesShared& of;
        int at, step, h, end;
        float* to;
        const float* from;  // of head h; null: not here
        TP_MEMBER HeadCopies(const QueriesShared& queries, int first) : of(queries) {
            const StreamOwnToken& own = of.f.own;
            const int begin = divided((int)threadIdx.x, own.width_inverse);
            step = divided(kMultiply, own.width_inverse), h = first + begin, at = 4 * ((int)threadIdx.x - begin * (of.d / 4));
            end = first + of.batch < of.n_heads() ? first + of.batch : of.n_heads();
            if (begin >= step) end = 0;
            to = of.rows + (3 + begin) * of.d + at;
            place();
        }
        TP_MEMBER void place() {
            const StreamOwnToken& own = of.f.own;
            const int of_cache = h - of.heads.n, kv = of.heads.kv_head + of_cache;
            from = (of_cache < 0 ? own.q + (of.heads.first + h) * own.q_stride : of_cache < of.n_kv ? own.k + kv * of.d : own.v + (kv - of.n_kv) * of.d) + at;
            if (of_cache < 0 && !of.heads.mine(h)) from = nullptr;
        }
        TP_MEMBER void send() {
#pragma unroll 1
            while (h < end) {
                if (from) tp_copy_async(to, from);
                h += step, to += step * of.d;
                if (h < end) place();
            }
        }
    };
    /// Which rows, the host has written before the launch; all else, stages before this one. Where a thread's first copies go from and to is found before the
    /// wait: of what was between it and them, each line took some 300 cycles. The next stages come behind the queries, which would wait for them too.
    TP_MEMBER void begin() {
        if (f.own.k_cache.row)
#pragma unroll
            for (int i = 0; i < 2; ++i)
                row[i] = tp_load_word_in_order(cache(i).row, true), high[i] = tp_load_word_in_order(cache(i).row + 4, cache(i).row_type == kI64);
        const int warp = threadIdx.x / 32;
        HeadCopies heads_of(*this, 0);
        const float* weights = nullptr;
        if (f.own.table && warp < 3) weights = warp == 0 ? f.own.table : warp == 1 ? f.own.q_norm : f.own.k_norm;
        if (!f.own.table) heads_of.end = 0;
        if (stage >= 0) await_stage(stage);
        heads_of.send();
        if (weights) copy_row(weights, warp);
        if (f.own.k_cache.row)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                if (!high[i] && row[i] >= 0 && row[i] < (int)cache(i).n_rows) continue;
                row[i] = -1;
                if (threadIdx.x == 0) atomicExch(f.own.fault, (u32)kFaultKvCell);
            }
        if constexpr (kOwnRows)
            if (f.own.k_cache.row)
#pragma unroll
                for (int i = 0; i < 2; ++i) own[i] = has(i) ? row[i] - (int)cache(i).first : -1;
    }
    TP_MEMBER void prepare() {
        if (f.own.table) {
#pragma unroll 1
            for (int first = 0; first < n_heads(); first += batch) {
                if (first) sync_multiplying(), HeadCopies(*this, first).send();
                tp_copy_wait();
                sync_multiplying();
                turn(first);
            }
        } else {
            if constexpr (kOwnRows) take_own_rows();
#pragma unroll 1
            for (int h = threadIdx.x / 32; h < heads.n; h += kStreamWarps)
                for (int i = threadIdx.x % 32 * 8; i < d && heads.mine(h); i += 256)
                    *(TpInt4*)(queries + h * d + i) = QueriesInMemory{f.args.a, 0, 0}.eight(heads, h, i);
        }
        if (stage >= 0) fetch_stage(stage + 2);
        sync_multiplying();
    }
    /// What a stage before this one has written of the token's cell.
    TP_MEMBER void take_own_rows() const {
#pragma unroll 1
        for (int i = 0; i < 2; ++i) {
            if (!has(i)) continue;
            const char* const from = cache(i).data + (i64)(i ? row[1] : row[0]) * cache(i).row_bytes + heads.kv_head * d * 2;
            for (int at = 8 * (int)threadIdx.x; at < n_kv * d; at += 8 * kMultiply) tp_copy_async(own_rows + i * n_kv * d + at, from + at * 2);
        }
        tp_copy_wait();
    }
    /// Of a batch, a thread two pairs of each head that it takes.
    TP_MEMBER void turn(int batch_first) const {
        const StreamOwnToken& own = f.own;
        const int width = d / 4, step = divided(kMultiply, own.width_inverse), first = divided((int)threadIdx.x, own.width_inverse);
        const int at = (int)threadIdx.x - first * width, half = own.n_dims / 2, pair = 2 * at - own.n_offs / 2;
        const bool turned = pair >= 0 && pair < half, apart = turned && own.neox, normed = own.q_norm;
        const int place[2] = {apart ? own.n_offs + pair : 4 * at, apart ? own.n_offs + pair + half : 4 * at + 2};
        const int end = batch_first + batch < n_heads() ? batch_first + batch : n_heads();
        float* const scales = rows + (3 + batch) * d - batch_first;  // of a head's norm
        if (normed) {
            const int lane = threadIdx.x % 16;  // half a warp a head
#pragma unroll 1
            for (int first_of_warp = batch_first + (int)threadIdx.x / 32 * 2; first_of_warp < end; first_of_warp += 2 * kStreamWarps) {
                const int h = first_of_warp + (int)threadIdx.x / 16 % 2;
                float squares = 0;
#pragma unroll 1
                for (int i = 4 * lane; i < d && h < end; i += 64) {
                    const TpInt4 four = *(const TpInt4*)(rows + (3 + h - batch_first) * d + i);
                    const float x = __int_as_float(four.x), y = __int_as_float(four.y), z = __int_as_float(four.z), w = __int_as_float(four.w);
                    squares += x * x + y * y + (z * z + w * w);
                }
#pragma unroll
                for (int o = 8; o; o /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, o);
                if (lane == 0 && h < end) scales[h] = tp_quotient(1.0f, sqrtf(tp_quotient(squares, (float)d) + (h < heads.n ? own.q_eps : own.k_eps)));
            }
            sync_multiplying();
        }
        const TpInt4 turns = *(const TpInt4*)(rows + (turned ? 2 * pair : 0));
#pragma unroll 1
        for (int h = batch_first + first; h < end && first < step; h += step) {
            const int of_cache = h - heads.n;
            const bool of_v = of_cache >= n_kv;
            if (of_cache < 0 && !heads.mine(h)) continue;
            const float* const from = rows + (3 + h - batch_first) * d;
            TpFloat2 x[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) x[i] = *(const TpFloat2*)(from + place[i]);
            if (normed && (!of_v || own.v_normed)) {
                const float* const weights = rows + (of_cache < 0 ? 1 : 2) * d;
                const float scale = scales[h];
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const TpFloat2 weight = of_v ? TpFloat2{1.0f, 1.0f} : *(const TpFloat2*)(weights + place[i]);
                    x[i].x *= scale * weight.x, x[i].y *= scale * weight.y;
                }
            }
            if (turned && !of_v) {
                const float cosine[2] = {__int_as_float(turns.x), __int_as_float(turns.z)}, sine[2] = {__int_as_float(turns.y), __int_as_float(turns.w)};
                // Pairs are {x[0].x, x[1].x}, {x[0].y, x[1].y}, or x[0], x[1].
                const float swapped = x[0].y;
                if (!apart) x[0].y = x[1].x, x[1].x = swapped;
                const TpFloat2 before = x[0];
                x[0].x = before.x * cosine[0] - x[1].x * sine[0], x[0].y = before.y * cosine[1] - x[1].y * sine[1];
                x[1].x = before.x * sine[0] + x[1].x * cosine[0], x[1].y = before.y * sine[1] + x[1].y * cosine[1];
                const float back = x[0].y;
                if (!apart) x[0].y = x[1].x, x[1].x = back;
            }
            float* const y = of_cache < 0 ? own.q_y : of_v ? nullptr : own.k_y;
            const int head = of_cache < 0 ? heads.first + h : heads.kv_head + of_cache - (of_v ? n_kv : 0);
            if (y && split == 0 && (keeps || of_cache < 0))
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const float factor = of_cache < 0 ? f.q_factor : 1.0f;
                    *(TpFloat2*)(y + head * d + place[i]) = {x[i].x * factor, x[i].y * factor};
                }
            const float scale = of_cache < 0 ? f.args.a.scale : 1.0f;
            const u32 halves[2] = {half2_of(x[0].x * scale, x[0].y * scale), half2_of(x[1].x * scale, x[1].y * scale)};
            auto put = [&](u16* to) {
#pragma unroll
                for (int i = 0; i < 2; ++i) *(u32*)(to + place[i]) = halves[i];
            };
            if (of_cache < 0) {
                put(queries + h * d);
            } else if (has(of_v)) {
                const StreamOwnToken::Cache& to = cache(of_v);
                if (keeps) put((u16*)(to.data + (i64)(of_v ? row[1] : row[0]) * to.row_bytes) + head * d);
                if constexpr (kOwnRows) put(own_rows + of_cache * d);
            }
        }
    }
};
/// What flash_combine will add up, or, where one piece has all cells, what it would say.
struct StreamResults {
    const StreamFlash& f;
    int split;
    TP_MEMBER void put(i64 head, int i, bool inside, float most, float sum, TpFloat2 acc) const {
        if (!inside) return;
        const FlashAttnArgs& a = f.args.a;
        if (!f.y.data) {
            const PieceResults piece{f.args, split, 0, 0};
            *(TpFloat2*)(piece.acc_of(head) + i) = acc;
            if (i == 0) piece.put_counts(head, most, sum);
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

/// What the cache has of other tokens goes into the L2 while the block still waits.
TP_DEVICE void fetch_ahead(const StreamFlash& f, i64 kv_head, int split) {
    const FlashAttnArgs& a = f.args.a;
    const i64 first = (i64)split * f.args.cells;
    const int bytes = (int)a.q.ne[0] * 2;
#pragma unroll 1
    for (int i = threadIdx.x; i < kAheadCells; i += kMultiply) {
        if (i >= f.args.cells || first + i >= a.k.ne[1]) break;
#pragma unroll 1
        for (int at = 0; at < bytes; at += 128) {
            tp_prefetch(a.k.data + kv_head * a.k.nb[2] + (first + i) * a.k.nb[1] + at);
            tp_prefetch(a.v.data + kv_head * a.v.nb[2] + (first + i) * a.v.nb[1] + at);
        }
    }
}

/// kShared: units share a KV head, and one of them keeps its own token: the others have it in shared memory only.
template <int kD, bool kShared>
TP_OUTLINE Progress attend(Progress now) {
    const int stage = now.stage;
    const StreamFlash& f = *(const StreamFlash*)stage_at(stage % 3).body;
    Shared& s = shared_of();
    const FlashSplitArgs& args = f.args;
    const int d = (int)args.a.q.ne[0], thread = threadIdx.x;
    if (thread == 0) s.walk = now.walk;
    u16* queries = (u16*)s.x;
    float* merged = (float*)(s.x + kStreamQueryBytes);
    const u32 n_units = (u32)(f.n_units * args.n_splits);
    if (blockIdx.x >= n_units) begin_stage(stage);
    for (u32 unit = blockIdx.x; unit < n_units; unit += gridDim.x) {
        const u32 head = unit / (u32)args.n_splits;
        const int split = (int)(unit - head * (u32)args.n_splits);
        const UnitHeads heads = heads_of_unit(args, head);
        const StreamResults to{f, split};
        const int begins = unit == blockIdx.x ? stage : -1;
        if (begins >= 0) fetch_ahead(f, heads.kv_head, split);
        flash_columns<kD, kStreamWarps, false>(args, heads, split, 0, 0, thread, merged,
                                               QueriesShared<kShared>{begins, f, heads, split, d, queries, merged, 1, kFlashHeads + 2,
                                                                      queries + kFlashHeads * 256, !kShared || head % (u32)args.head_groups == 0},
                                               to, sync_multiplying);
        sync_multiplying();  // the next unit writes there
    }
    return {stage, s.walk, 1.0f};
}

template <bool kShared>
TP_DEVICE Progress attend_any(Progress now, int d) {
    if (d <= 64) return attend<64, kShared>(now);
    if (d <= 128) return attend<128, kShared>(now);
    return attend<256, kShared>(now);
}

/// PieceResults of one token.
struct StreamPieces {
    float *acc, *meta;
    int n_splits, split, d;
    TP_MEMBER int piece(int head) const { return head * n_splits + split; }
    TP_MEMBER void put_counts(int head, float most, float sum) const { *(TpFloat2*)(meta + 2 * piece(head)) = {most, sum}; }
    TP_MEMBER float* acc_of(int head) const { return acc + piece(head) * d; }
};

/// An attention whose cells come through the ring: see StreamCells. A warp has the query heads of one KV head and one of a tile's groups of 16 cells.
/// Begins the stage itself: what no stage writes is looked at before.
template <int kD>
TP_OUTLINE Progress attend_streamed(Progress now) {
    constexpr int kChunks = kD / 32, kBlocks = kD / 64;
    const int stage = now.stage;
    Walk walk = Walk::of(now.walk);
    const StreamFlash& f = *(const StreamFlash*)stage_at(stage % 3).body;
    const StreamCells& c = f.cells;
    const FlashSplitArgs& args = f.args;
    const FlashAttnArgs& a = args.a;
    Shared& s = shared_of();
    const char* const ring = ring_of();
    const TpBarrierAt full(s.full), empty(s.empty);
    const int d = c.head_bytes / 2, lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4, groups = c.groups;
    const int sets = c.unit_heads * args.head_groups, group = divided(warp, c.sets_inverse), set = warp - group * sets;
    const int kv = divided(set, c.head_groups_inverse), of_group = (set - kv * args.head_groups) * args.group_heads;
    u16* const own_rows = (u16*)s.x;
    const int n_units = c.n_units * c.n_splits;
#pragma unroll 1
    for (int unit = blockIdx.x, first_unit = 1; unit < n_units || first_unit; unit += gridDim.x, first_unit = 0) {
        const bool some = unit < n_units;
        const CellsUnit of(c, some ? unit : 0);
        u32 open = some ? open_groups(c.mask, of.begin, of.end) : 0u;
        const UnitHeads all = {of.n * a.gqa_ratio, of.first, (of.first + a.kv_head_offset) * a.gqa_ratio - a.head_offset, (int)a.q.ne[2]};
        UnitHeads heads = {a.gqa_ratio - of_group < args.group_heads ? a.gqa_ratio - of_group : args.group_heads, of.first + kv,
                           all.first + kv * a.gqa_ratio + of_group, all.n_local};
        const bool works = group < groups && kv < of.n;
        if (!works) heads.n = 0;
        u16* const queries = own_rows + 2 * of.n * d;
        float* const rows = (float*)(queries + all.n * d);
        QueriesShared<true> own{first_unit ? stage : -1, f, all, of.split, d, queries, rows, of.n, stream_head_batch(of.n, all.n, d), own_rows, true};
        const float slope = alibi_slope(a.max_bias, heads.first + g + a.head_offset, a.n_head_global);
        const StreamPieces pieces{args.acc, args.meta, args.n_splits, of.split, d};
        if (!some) {
            begin_stage(stage);
            break;
        }
        own.begin();
        own.prepare();
        const int own_k = own.own_cell(0), own_v = own.own_cell(1);
        TpInt4 q[kChunks];
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk) {
            const int at = chunk * 32 + t * 8;
            q[chunk] = heads.mine(g) && at < d ? own.eight(heads, heads.first - all.first + g, at) : TpInt4{0, 0, 0, 0};
        }
        if (threadIdx.x == 0) {
            tp_poke(&s.stage_now, (u32)stage);  // not before: tiles at full speed would hold up the queries
            mark_stage(stage, kTimeInput);
        }
        sync_multiplying();  // sums will lie over the queries
        ColumnSums<kBlocks> sums;
        for (int base = of.begin; base < of.end; base += kStreamedStep) {
            if (base != of.begin) open = open_groups(c.mask, base, of.end);
            for (int first = base; open; first += groups * kColumnsStep, open >>= groups) {
                const u32 bits = open & ((1u << groups) - 1);
                if (!bits) continue;
                const bool mine = works && bits >> group & 1;
                const int row = group * kColumnsStep, cell = first + row;
                u32 pairs[2] = {};
                if (mine && c.mask)
#pragma unroll
                    for (int j = 0; j < 2; ++j) pairs[j] = *(const u32*)(c.mask + (i64)(cell + 2 * t + 8 * j) * 2);
                // Every warp waits for what it does not read too: a parity says nothing about the phase after the next.
                auto wait = [&] {
#pragma unroll
                    for (int piece = 0; piece < kStreamPieces; ++piece) tp_barrier_wait(full + (walk.slot.at * kStreamPieces + piece), walk.slot.parity);
                    return ring + walk.slot.at * kStreamSlotBytes;
                };
                auto leave = [&] {
                    tp_barrier_arrive(empty + walk.slot.at);
                    walk.slot.next(s.args.slots);
                };
                ColumnScores scores;
                const char* slot = wait();
                if (mine) {
                    const char* from[2];
#pragma unroll
                    for (int j = 0; j < 2; ++j)
                        from[j] = cell + 8 * j + g == own_k ? (const char*)(own_rows + kv * d) : slot + (row + 8 * j + g) * c.k_stride + kv * c.head_bytes;
#pragma unroll
                    for (int chunk = 0; chunk < kChunks; ++chunk) {
                        const int at = chunk * 32 + t * 8 < d ? chunk * 64 + t * 16 : 0;  // beyond the head: it meets a query of zero
                        const TpInt4 k[2] = {*(const TpInt4*)(from[0] + at), *(const TpInt4*)(from[1] + at)};
                        scores.add(q[chunk], k);
                    }
                }
                leave();
                ColumnWeights weights{};
                if (mine) weights = sums.weigh(scores, pairs, slope, a.logit_softcap);
                slot = wait();
                if (mine) {
                    const char* from[4];
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const int r = 2 * t + i % 2 + i / 2 * 8;
                        from[i] = cell + r == own_v ? (const char*)(own_rows + (of.n + kv) * d) : slot + (row + r) * c.v_stride + kv * c.head_bytes;
                    }
#pragma unroll
                    for (int b = 0; b < kBlocks; ++b) {
                        const int at = b * 64 + g * 8 < d ? b * 128 + g * 16 : 0;  // beyond the head: not stored
                        const TpInt4 v[4] = {*(const TpInt4*)(from[0] + at), *(const TpInt4*)(from[1] + at), *(const TpInt4*)(from[2] + at),
                                             *(const TpInt4*)(from[3] + at)};
                        sums.add(b, v, weights);
                    }
                }
                leave();
            }
        }
        if (threadIdx.x == 0) mark_stage(stage, kTimeDone);
        sums.fold(group, groups, set, sets, (float*)(own_rows + 2 * c.unit_heads * d), sync_multiplying);
        if (group == 0) sums.store(heads, d, pieces);
        sync_multiplying();  // the next unit writes there
    }
    now.walk = walk.packed();
    return now;
}

// ---- latent attention of one token: one row of keys a cell for all heads, whose beginning is its values. 16 heads are a unit, the rows of both products, and a
// step is two tiles of 16 cells that the ring brings. For Q·K a warp has eight of the cells and half of their elements, for P·V 64 elements of all of them (16
// times 512 sums are more than one warp's registers), and in between the soft max of two heads: what goes from one to the next goes through shared memory. (With
// all heads' soft maxes in every warp a step was 780 instructions and 4,100 cycles.)
// Which cell is which column of Q·K and which step of P·V is chosen by where rows lie (stream_latent_fit), so that lanes that read together find different banks:
// lane 4 * g + t has 16 bytes of a cell from element 8 * t of each 32 on, and of cells 4t to 4t + 3 of a tile those from element 8 * g on.
struct LatentShared {
    static constexpr int kQuery = kLatentKeys + 32, kScores = kStreamLatentCells + 16,
                         kWeights = kStreamLatentCells + 8;  // between rows: lanes meet in no bank
    u16 queries[kStreamLatentHeads][kQuery];
    u16 own[kLatentKeys];                          // the token's own cell
    u16 weights[2][kStreamLatentHeads][kWeights];  // a step's probabilities, as two halves that add up to them (flash_columns.h, ColumnWeights)
    float scores[2][kStreamLatentHeads][kScores];  // its scores, by halves of the elements
    float keep[kStreamLatentHeads];                // what becomes of earlier steps' sums
    float counts[kStreamLatentHeads][2];           // the topmost score of all steps, and the sum
};
static_assert(sizeof(LatentShared) <= kStreamInputBytes && kLatentValues == 64 * kStreamWarps && kLatentValues == 2 * kMultiply, "");

/// Where the two elements of pair `i` of what turns are, and how: of one thread for each pair, none for others.
struct LatentPair {
    int low, high;
    bool turns;
    float first = 0, second = 0;
    TpFloat2 turn{1.0f, 0.0f};
    TP_MEMBER LatentPair(const StreamLatent& l, int i, bool there) {
        const int half = l.n_turned / 2;
        turns = l.table && there && i < half;
        low = l.neox ? i : 2 * i, high = l.neox ? i + half : 2 * i + 1;
    }
    TP_MEMBER void load(const StreamLatent& l, const float* from, int i) {
        if (turns) first = from[low], second = from[high], turn = ((const TpFloat2*)l.table)[i];
    }
    TP_MEMBER void put(u16* to, u16* copy) const {
        if (!turns) return;
        const u16 halves[2] = {tp_float_to_half(first * turn.x - second * turn.y), tp_float_to_half(first * turn.y + second * turn.x)};
        to[low] = halves[0], to[high] = halves[1];
        if (copy) copy[low] = halves[0], copy[high] = halves[1];
    }
};
/// The queries of 16 heads from `first_head` on, a warp two of them, and the token's own cell, if `has_own`, two neighbours a thread: all that memory has of them
/// comes in one trip. kept: the own cell's row of the cache, which this unit writes, or null.
TP_DEVICE void take_latent(const StreamFlash& f, int first_head, bool has_own, int own_row, u16* kept) {
    LatentShared& to = *(LatentShared*)shared_of().x;
    const StreamLatent& l = f.latent;
    const int thread = threadIdx.x, lane = thread % 32, row = thread / 32 * 2, head = first_head + row, n_heads = (int)f.args.a.q.ne[2], n = l.n_plain;
    const bool there[2] = {head < n_heads, head + 1 < n_heads}, makes = has_own && l.table, inside = makes && 2 * thread < n;
    TpFloat2 x{}, weight{};
    if (inside) x = *(const TpFloat2*)(l.kv + 2 * thread), weight = *(const TpFloat2*)(l.weight + 2 * thread);
    LatentPair own(l, thread, makes), pairs[2] = {LatentPair(l, lane, there[0]), LatentPair(l, lane, there[1])};
    own.load(l, l.k_pe, thread);
#pragma unroll
    for (int r = 0; r < 2; ++r) pairs[r].load(l, l.q_pe + (head + r) * l.q_pe_stride, lane);
#pragma unroll 1
    for (int base = 0; base < kLatentKeys; base += 512) {
        if (base >= n && (int)f.args.a.q.ne[0] == kLatentKeys) break;  // else what lies behind the last element is 0
        float v[2][2][8];
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int at = base + (i * 32 + lane) * 8;
                load_eight(l.q + (head + r) * l.q_stride + at, there[r] && at < n, v[r][i]);
            }
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int at = base + (i * 32 + lane) * 8;
                const float(&e)[8] = v[r][i];
                if (at < kLatentKeys)
                    *(TpInt4*)(to.queries[row + r] + at) = {(int)half2_of(e[0], e[1]), (int)half2_of(e[2], e[3]), (int)half2_of(e[4], e[5]),
                                                            (int)half2_of(e[6], e[7])};
            }
    }
    __syncwarp();  // zeros of other lanes may lie where these go
#pragma unroll
    for (int r = 0; r < 2; ++r) pairs[r].put(to.queries[row + r] + n, nullptr);
    if (makes) {
        const float scale = norm_scale(shared_of(), x.x * x.x + x.y * x.y, n, l.eps);
        const u32 two = half2_of(x.x * scale * weight.x, x.y * scale * weight.y);
        if (inside) *(u32*)(to.own + 2 * thread) = two;
        if (inside && kept) *(u32*)(kept + 2 * thread) = two;
        own.put(to.own + n, kept ? kept + n : nullptr);
    } else if (has_own && thread * 8 < (int)f.args.a.q.ne[0]) {  // an earlier stage has written it
        *(TpInt4*)(to.own + thread * 8) = *(const TpInt4*)(l.cache.data + own_row * l.cache.row_bytes + thread * 16);
    }
    sync_multiplying();
}

TP_OUTLINE Progress do_latent(Progress now) {
    constexpr int kChunks = kLatentKeys / 32 / 2, kBlocks = 8, kTiles = kStreamLatentCells / kColumnsStep;
    static_assert(kTiles == 2 && 2 * kStreamWarps == kStreamLatentHeads, "half a warp a head, two cells a lane");
    const StreamFlash& f = *(const StreamFlash*)stage_at(now.stage % 3).body;
    const StreamLatent& l = f.latent;
    const StreamCells& c = f.cells;
    Shared& s = shared_of();
    LatentShared& met = *(LatentShared*)s.x;
    const char* const ring = ring_of();
    const TpBarrierAt full(s.full), empty(s.empty);
    Walk walk = Walk::of(now.walk);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int half = warp / 4, of_tile = warp % 4 / 2, fours = warp % 2;  // of Q·K; its column g is row g / 2 of the tile's fours `fours` + g % 2 * 2
    const int key_at = (fours + g % 2 * 2) * c.k_stride + g / 2 * c.head_bytes + half * kChunks * 64 + t * 16;
    const int n_chunks = c.head_bytes / 64 - half * kChunks, dv = (int)f.args.a.v.ne[0], n_units = c.n_units * c.n_splits;
    const int value_at = t * c.k_stride + 2 * (64 * warp + 8 * g < dv ? 64 * warp + 8 * g : 0);  // beyond the last: not stored
    const int row = 2 * warp + lane / 16, of_row = lane % 16;                                    // of the soft max: a cell of each tile
    const int step_of_row = of_row / 4 * 2 + of_row % 2 + of_row % 4 / 2 * 8;                    // of P·V, where that is a lane's four
    const float scale = f.args.a.scale * kLog2E;                                                 // scores are powers of 2
    if ((int)blockIdx.x >= n_units) begin_stage(now.stage);
#pragma unroll 1
    for (int unit = blockIdx.x; unit < n_units; unit += gridDim.x) {
        const CellsUnit of(c, unit);
        const int group = unit - of.split * c.n_units, first_head = group * kStreamLatentHeads;
        int own_row = -1;
        if (l.cache.row) {
            own_row = tp_load_word_in_order(l.cache.row, true);
            if (tp_load_word_in_order(l.cache.row + 4, l.cache.row_type == kI64) || own_row < 0 || own_row >= (int)l.cache.n_rows) {
                own_row = -1;
                if (threadIdx.x == 0) atomicExch(l.fault, (u32)kFaultKvCell);
            }
        }
        u32 open = open_groups(c.mask, of.begin, of.end);
        if (unit == (int)blockIdx.x) wait_for_stage(now.stage);
        int own_cell = own_row < 0 ? -1 : own_row - (int)l.cache.first;
        // A piece has its cell; one that the attention does not see is the first piece's.
        const bool seen = own_row >= 0 && own_cell >= of.begin && own_cell < of.end;
        const bool has_own = seen || (own_row >= 0 && of.split == 0 && (own_cell < 0 || own_cell >= c.n_cells));
        if (!seen) own_cell = -kStreamLatentCells;
        take_latent(f, first_head, has_own, own_row, group == 0 ? (u16*)(l.cache.data + own_row * l.cache.row_bytes) : nullptr);
        if (unit == (int)blockIdx.x) {
            fetch_stage(now.stage + 2);
            input_taken(now.stage);
        }
        TpInt4 q[kChunks][2];
#pragma unroll
        for (int i = 0; i < kChunks; ++i)
#pragma unroll
            for (int h = 0; h < 2; ++h) q[i][h] = *(const TpInt4*)(met.queries[g + 8 * h] + (half * kChunks + i) * 32 + t * 8);
        float out[kBlocks][4] = {}, most = -INFINITY, sum = 0;
#pragma unroll 1
        for (int base = of.begin; base < of.end; base += kStreamedStep) {
            if (base != of.begin) open = open_groups(c.mask, base, of.end);
#pragma unroll 1
            while (open) {
                const int first = base + (__ffs((int)open) - 1) * kColumnsStep;
                open &= open - 1;
                const bool both = open;
                const int second = both ? base + (__ffs((int)open) - 1) * kColumnsStep : first;
                open &= open - 1;
                u16 masks[kTiles] = {0, 0};  // halves until they are wanted, so that both are on their way meanwhile
                if (c.mask) masks[0] = *(const u16*)(c.mask + (i64)(first + of_row) * 2), masks[1] = *(const u16*)(c.mask + (i64)(second + of_row) * 2);
                if (!both) masks[1] = kClosed;
                // Every warp waits for what it does not read too: a parity says nothing about the phase after the next.
                AnyTurn slot = walk.slot;
                if (both) slot.next(s.args.slots);
                const char *const tile = ring + walk.slot.at * kStreamSlotBytes, *const next_tile = ring + slot.at * kStreamSlotBytes;
#pragma unroll
                for (int piece = 0; piece < kStreamPieces; ++piece) {
                    tp_barrier_wait(full + (walk.slot.at * kStreamPieces + piece), walk.slot.parity);
                    if (both) tp_barrier_wait(full + (slot.at * kStreamPieces + piece), slot.parity);
                }
                // The token's own cell takes the place of what the cache had there.
                if ((u32)(own_cell - first) < (u32)kColumnsStep || (u32)(own_cell - second) < (u32)kColumnsStep) {
                    const bool in_first = (u32)(own_cell - first) < (u32)kColumnsStep;
                    const int r = own_cell - (in_first ? first : second), at = (int)threadIdx.x * 16;
                    char* const to = (char*)(in_first ? tile : next_tile) + r / 4 * c.k_stride + r % 4 * c.head_bytes;
                    if (at < c.head_bytes) *(TpInt4*)(to + at) = *(const TpInt4*)((const char*)met.own + at);
                    tp_async_fence();  // before the slot is filled again
                    sync_multiplying();
                }
                {
                    float even[4] = {}, odd[4] = {};  // sums by turns: each product would wait for the one before
                    const char* const from = (of_tile ? next_tile : tile) + key_at;
                    auto add = [&](int i, const TpInt4& k) {
                        const u32 first_k[2] = {(u32)k.x, (u32)k.y}, second_k[2] = {(u32)k.z, (u32)k.w};
                        const TpInt4 &low = q[i][0], &high = q[i][1];
                        const u32 a[4] = {(u32)low.x, (u32)high.x, (u32)low.y, (u32)high.y}, b[4] = {(u32)low.z, (u32)high.z, (u32)low.w, (u32)high.w};
                        tp_mma_f16(even, a, first_k);
                        tp_mma_f16(odd, b, second_k);
                    };
                    if (n_chunks >= kChunks) {
#pragma unroll
                        for (int i = 0; i < kChunks; ++i) add(i, *(const TpInt4*)(from + i * 64));
                    } else {
#pragma unroll
                        for (int i = 0; i < kChunks; ++i)
                            if (i < n_chunks) add(i, *(const TpInt4*)(from + i * 64));
                    }
#pragma unroll
                    for (int h = 0; h < 2; ++h)
#pragma unroll
                        for (int n = 0; n < 2; ++n) met.scores[half][g + 8 * h][16 * of_tile + 4 * (fours + 2 * n) + t] = even[2 * h + n] + odd[2 * h + n];
                }
                sync_multiplying();
                {
                    float score[kTiles];
#pragma unroll
                    for (int i = 0; i < kTiles; ++i)
                        score[i] = (met.scores[0][row][16 * i + of_row] + met.scores[1][row][16 * i + of_row]) * scale + kLog2E * tp_half_to_float(masks[i]);
                    float top = fmaxf(most, fmaxf(score[0], score[1]));
#pragma unroll
                    for (int o = 8; o; o /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, o));
                    const float floor = top == -INFINITY ? 0.0f : top, keep = most == -INFINITY ? 1.0f : tp_exp2(most - floor);
                    most = top, sum *= keep;
#pragma unroll
                    for (int i = 0; i < kTiles; ++i) {
                        const float p = tp_exp2(score[i] - floor);
                        sum += p;
                        const u16 most_of_it = tp_float_to_half(p);
                        met.weights[0][row][16 * i + step_of_row] = most_of_it;
                        met.weights[1][row][16 * i + step_of_row] = tp_float_to_half(p - tp_half_to_float(most_of_it));
                    }
                    if (of_row == 0) met.keep[row] = keep;
                }
                sync_multiplying();
                const float keep[2] = {met.keep[g], met.keep[g + 8]};
                if (__ballot_sync(0xffffffffu, keep[0] != 1.0f || keep[1] != 1.0f))
#pragma unroll
                    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
                        for (int i = 0; i < 4; ++i) out[b][i] *= keep[i / 2];
                auto add_values = [&](int i, const char* from) {
                    u32 p[2][4];
#pragma unroll
                    for (int part = 0; part < 2; ++part) tp_ldmatrix_x4(p[part], met.weights[part][lane % 16] + 16 * i + lane / 16 * 8);
                    int words[4][4];
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        const TpInt4 v = *(const TpInt4*)(from + j * c.head_bytes);
                        words[j][0] = v.x, words[j][1] = v.y, words[j][2] = v.z, words[j][3] = v.w;
                    }
#pragma unroll
                    for (int b = 0; b < kBlocks; ++b) {
                        const u32 which = b % 2 ? 0x7632 : 0x5410;
                        const u32 two[2] = {tp_byte_perm((u32)words[0][b / 2], (u32)words[1][b / 2], which),
                                            tp_byte_perm((u32)words[2][b / 2], (u32)words[3][b / 2], which)};
                        tp_mma_f16(out[b], p[0], two);
                        tp_mma_f16(out[b], p[1], two);
                    }
                };
                add_values(0, tile + value_at);
                if (both) add_values(1, next_tile + value_at);
                tp_barrier_arrive(empty + walk.slot.at);
                if (both) tp_barrier_arrive(empty + slot.at);
                walk.slot = slot;
                walk.slot.next(s.args.slots);
            }
        }
#pragma unroll
        for (int o = 8; o; o /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, o);
        if (of_row == 0) met.counts[row][0] = most, met.counts[row][1] = sum;
        sync_multiplying();
        const StreamPieces pieces{f.args.acc, f.args.meta, c.n_splits, of.split, dv};
        const bool whole = f.y.data;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int head = first_head + g + 8 * h;
            if (head >= (int)f.args.a.q.ne[2]) continue;
            const float total = met.counts[g + 8 * h][1];
            float* const y = whole ? (float*)(f.y.data + head * f.y.nb[1]) : pieces.acc_of(head);
            const float by = !whole ? 1.0f : total > 0 ? tp_quotient(1.0f, total) : 0.0f;
            if (!whole && warp == 0 && t == 0) pieces.put_counts(head, met.counts[g + 8 * h][0] / kLog2E, total);  // e to the first, as a combination wants it
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int at = 64 * warp + 8 * (2 * t + i);
                float eight[8];
#pragma unroll
                for (int b = 0; b < kBlocks; ++b) eight[b] = out[b][2 * h + i] * by;
                if (at < dv) store_eight(y + at, eight);
            }
        }
        sync_multiplying();  // the next unit writes there
    }
    now.walk = walk.packed();
    return now;
}

/// The sum of every head's pieces: a block has 32 elements of a head, and as many of such chunks at once as come in one trip to the L2; its warps have every
/// eighth piece of them.
TP_OUTLINE void combine_pieces(const StreamCombine& stage) {
    const FlashCombineArgs& c = stage.args;
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, n = c.n_splits, d = (int)c.y.ne[0], chunks = (d + 31) / 32;
    const int n_chunks = chunks * (int)c.y.ne[1], floats = (int)(stream_combine_bytes(n) + 15) / 16 * 4, room = kStreamInputBytes / 4 / floats;
    const int batch = room < kStreamWarps ? room : kStreamWarps;
    struct Chunk {
        float* acc;        // [n][32]
        TpFloat2* counts;  // [n]
        float* met;        // [kStreamWarps][32], and the sums of the warps
        int head, begin;
    };
    auto chunk_of = [&](int first, int i) {
        const int chunk = first + i * (int)gridDim.x, head = divided(chunk, stage.chunks_inverse);
        float* const acc = (float*)shared_of().x + i * floats;
        return Chunk{acc, (TpFloat2*)(acc + n * 32), acc + n * 34, head, (chunk - head * chunks) * 32};
    };
    auto sink_of = [&](int head) { return c.has_sinks ? *(const float*)(c.sinks.data + (head + c.head_offset) * c.sinks.nb[0]) : -INFINITY; };
    auto most_of = [&](const Chunk& of) {
        float most = sink_of(of.head);
#pragma unroll 1
        for (int i = lane; i < n; i += 32) most = fmaxf(most, of.counts[i].x);
        most = tp_warp_max(most);
        return most > -INFINITY ? most : 0.0f;
    };
#pragma unroll 1
    for (int first = blockIdx.x; first < n_chunks; first += batch * (int)gridDim.x) {
        const int left = (n_chunks - first + (int)gridDim.x - 1) / (int)gridDim.x, here = left < batch ? left : batch;
#pragma unroll 1
        for (int b = 0; b < here; ++b) {
            const Chunk of = chunk_of(first, b);
            const float* const from = c.acc + (i64)of.head * n * d + of.begin;
#pragma unroll 1
            for (int i = thread; i < n * 8; i += kMultiply)
                if (of.begin + i % 8 * 4 < d) tp_copy_async(of.acc + i * 4, from + i / 8 * d + i % 8 * 4);
        }
        if (warp < here) {
            const Chunk of = chunk_of(first, warp);
            const TpFloat2* const meta = (const TpFloat2*)c.meta + (i64)of.head * n;
#pragma unroll 1
            for (int i = lane; i < n; i += 32) of.counts[i] = meta[i];
        }
        tp_copy_wait();
        sync_multiplying();
#pragma unroll 1
        for (int b = 0; b < here; ++b) {
            const Chunk of = chunk_of(first, b);
            const float base = most_of(of);
            float sum = 0, total = 0;
#pragma unroll 1
            for (int i = warp; i < n; i += kStreamWarps) {
                const float share = expf(of.counts[i].x - base);
                sum += of.counts[i].y * share;
                if (share > 0) total += of.acc[i * 32 + lane] * share;
            }
            of.met[warp * 32 + lane] = total;
            if (lane == 0) of.met[kStreamWarps * 32 + warp] = sum;
        }
        sync_multiplying();
        if (warp < here) {
            const Chunk of = chunk_of(first, warp);
            float all = 0, all_sum = c.has_sinks ? expf(sink_of(of.head) - most_of(of)) : 0.0f;
#pragma unroll 1
            for (int w = 0; w < kStreamWarps; ++w) all += of.met[w * 32 + lane], all_sum += of.met[kStreamWarps * 32 + w];
            if (of.begin + lane < d) *(float*)(c.y.data + (of.begin + lane) * 4 + of.head * c.y.nb[1]) = all_sum > 0 ? all / all_sum : 0.0f;
        }
        sync_multiplying();  // the next chunks come to lie there
    }
}

/// What a rank has pushed to here.
TP_DEVICE float sum_of(const u64* word, u32 push, Shared& s) {
    u64 now = 0;
    wait_until(s, [&] { return (u32)((now = tp_load_tagged(word)) >> 32) == push; });
    return __int_as_float((int)(u32)now);
}

/// What a stage reads that no stage writes goes into the L2 while its block still waits: here a router's weights.
TP_DEVICE void fetch_ahead(const StreamFloats& f) {
    const int thread = threadIdx.x, lines = (int)f.k / 32;
    for (i64 row = blockIdx.x; row < f.n + (f.more_w ? 1 : 0); row += gridDim.x)  // the first warp's other lanes would hold up the one that waits
        for (int i = thread - 32; i >= 0 && i < lines; i += kMultiply - 32) tp_prefetch((row == f.n ? f.more_w : f.w + row * f.row_stride) + i * 32);
}

// ---- what only some models have. Functions lie in the order of their mangled names, which begin with their lengths: nine letters put these behind the products,
// so that what all models run lies as it did before there were these (docs/decisions.md).
/// The two largest numbers of a group of experts, or of a part of it.
struct BestOfGroup {
    float first = -INFINITY, second = -INFINITY;
    TP_MEMBER void take(float v) {
        if (v > first) second = first, first = v;
        else if (v > second) second = v;
    }
};
/// A warp finds the best of its part of each group; of what they have found every warp puts all groups in order, a lane a group.
template <int kEach>
TP_OUTLINE u32 in_groups(int stage, float by, float more) {
    Shared& s = shared_of();
    const StreamRoute& r = ((const StreamExperts*)stage_at(stage % 3).body)->route;
    BestOfGroup* const parts = (BestOfGroup*)(s.stage[(stage + 2) % 3] + kStreamWarps * kVecSlots * 4);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, of_warp = 32 * kEach, begin = warp * of_warp, n = r.n_expert, of_group = n / r.n_groups;
    const int end = begin + of_warp < n ? begin + of_warp : n;
    for (int group = begin / of_group; group * of_group < end; ++group) {
        BestOfGroup best;
#pragma unroll
        for (int j = 0; j < kEach; ++j) {
            const int e = begin + lane + 32 * j;
            if (e >= group * of_group && e < (group + 1) * of_group) best.take(j ? more : by);
        }
#pragma unroll 1
        for (int o = 16; o; o /= 2) {
            const float first = __shfl_xor_sync(0xffffffffu, best.first, o), second = __shfl_xor_sync(0xffffffffu, best.second, o);
            best.take(first), best.take(second);
        }
        if (lane == 0) parts[group + warp] = best;  // no other part has that place: of those behind it one of the two is larger
    }
    static_assert(kStreamWarps * kVecSlots * 4 + (kStreamMostGroups + kStreamWarps) * sizeof(BestOfGroup) <= kStreamStageBytes, "beside the keys");
    sync_multiplying();
    BestOfGroup best;
    for (int part = lane * of_group / of_warp; lane < r.n_groups && part * of_warp < (lane + 1) * of_group; ++part)
        best.take(parts[lane + part].first), best.take(parts[lane + part].second);
    const u32 key = lane < r.n_groups ? sort_key(best.first + best.second, true) : ~0u;
    int place = 0;
#pragma unroll 1
    for (int other = 0; other < r.n_groups; ++other) {
        const u32 of_other = __shfl_sync(0xffffffffu, key, other);
        place += of_other < key || (of_other == key && other < lane);
    }
    const u32 open = __ballot_sync(0xffffffffu, lane < r.n_groups && place < r.n_groups_used);
    if (warp == 0 && lane < r.n_groups) s.groups[place] = (u8)lane;
    return open;
}
/// What others may read of a choice among groups of experts, for weigh_experts. By one warp; every block finds the order within some groups.
TP_OUTLINE void of_groups(SoftMax gates, u32 open, int n_writers, bool writes) {
    Shared& s = shared_of();
    const StreamRoute& r = ((const StreamExperts*)s.stored)->route;
    const int lane = threadIdx.x % 32, of_group = r.n_expert / r.n_groups;
    auto by = [&](int e) {
        const float gate = gate_of<false>(r, r.logits, e, true);
        return (r.gating == kGatingSoftMax ? gates.of(gate) : gate) + bias_of(r, e);
    };
    for (int group = blockIdx.x; group < r.n_groups; group += n_writers) {
        const int first = group * of_group;
        float best = 0, second = 0;  // where this lane has them
        for (int i = lane; i < of_group; i += 32) {
            const float v = by(first + i);
            const u32 key = sort_key(v, true);
            int place = 0;
            for (int other = 0; other < of_group; ++other) {
                const u32 of_other = sort_key(by(first + other), true);
                place += of_other < key || (of_other == key && other < i);
            }
            if (r.group_order) r.group_order[first + place] = i;
            if (place == 0) best = v;
            if (place == 1) second = v;
            if (place < 2 && r.group_best) r.group_best[2 * group + place] = v;
        }
        const float sum = tp_warp_sum(best) + tp_warp_sum(second);
        if (lane == 0 && r.group_sums) r.group_sums[group] = sum;
    }
    if (!writes) return;
    if (r.groups && lane < r.n_groups) r.groups[lane] = s.groups[lane];
    for (int i = 0; i < r.n_groups_used && r.group_rows; ++i)
        for (int at = lane; at < of_group; at += 32) r.group_rows[i * of_group + at] = by(s.groups[i] * of_group + at);
    for (int e = lane; e < r.n_expert && r.open; e += 32) r.open[e] = open >> e / of_group & 1 ? by(e) : -INFINITY;
}

/// Norms of long rows, which are few: a block a row, four elements a thread at once. (By a warp a row of 4,096 would be 128 trips to the L2 in a row.)
TP_OUTLINE void norm_rows(const FusedNormArgs& a, float factor, float* copy) {
    Shared& s = shared_of();
    const int n = (int)a.y.ne[0], thread = threadIdx.x;
    const i64 rows = a.y.ne[1] * a.y.ne[2] * a.y.ne[3];
    for (i64 row = blockIdx.x; row < rows; row += gridDim.x) {
        const Index at = row_index((u32)row, a.y.ne);
        const char *x = element_at(a.a, at), *more = a.has_b ? element_at(a.b, at) : nullptr;
        char *const sum = a.has_b ? element_at(a.sum, at) : nullptr, *const y = element_at(a.y, at);
        float squares = 0;
#pragma unroll 4
        for (int i = 4 * thread; i < n; i += 4 * kMultiply) {
            float v[4], added[4] = {};
            load_four(x + i * 4, v);
            if (more) load_four(more + i * 4, added);
            for (int e = 0; e < 4; ++e) v[e] += added[e], squares += v[e] * v[e];
            if (sum) store_four(sum + i * 4, v);
        }
        const float scale = norm_scale(s, squares, n, a.eps) * factor;
#pragma unroll 4
        for (int i = 4 * thread; i < n; i += 4 * kMultiply) {
            float v[4], weight[4] = {1, 1, 1, 1};
            load_four((sum ? sum : x) + i * 4, v);
            if (a.has_weight) load_four(a.weight.data + i * 4, weight);
            for (int e = 0; e < 4; ++e) v[e] *= scale * weight[e];
            store_four(y + i * 4, v);
            if (copy) store_four((char*)(copy + i), v);
        }
        sync_multiplying();  // the next row's sums meet where these did
    }
}

/// A row of at most 512 elements without a residual, whose lanes have four neighbours at a time: all of it, and of its weights, comes in one trip.
TP_OUTLINE void norm_head(const FusedNormArgs& a, float factor, u32 row) {
    constexpr int kFours = (int)kStreamLongRow / 128;
    const int lane = threadIdx.x % 32, n = (int)a.y.ne[0];
    const Index at = row_index(row, a.y.ne);
    const char* const x = element_at(a.a, at);
    char* const y = element_at(a.y, at);
    float v[kFours][4] = {}, weight[kFours][4], squares = 0;
#pragma unroll
    for (int j = 0; j < kFours; ++j) {
        const int i = j * 128 + 4 * lane;
        for (int e = 0; e < 4; ++e) weight[j][e] = 1.0f;
        if (i >= n) continue;
        load_four(x + i * 4, v[j]);
        if (a.has_weight) load_four(a.weight.data + i * 4, weight[j]);
    }
#pragma unroll
    for (int j = 0; j < kFours; ++j)
        for (int e = 0; e < 4; ++e) squares += v[j][e] * v[j][e];
    const float scale = factor / sqrtf(tp_warp_sum(squares) / (float)n + a.eps);
#pragma unroll
    for (int j = 0; j < kFours; ++j) {
        const int i = j * 128 + 4 * lane;
        for (int e = 0; e < 4; ++e) v[j][e] *= scale * weight[j][e];
        if (i < n) store_four(y + i * 4, v[j]);
    }
}
/// A block a row: of this rank's part, pushed to all ranks.
TP_OUTLINE void squaresum(const StreamSquares& a, u32 block) {
    Shared& s = shared_of();
    for (u32 part = block; part < (u32)a.n_parts; part += gridDim.x) {
        const float* const x = a.x[part];
        float squares = 0;
#pragma unroll 4
        for (i64 i = 4 * threadIdx.x; i < a.n[part]; i += 4 * kMultiply) {
            float v[4];
            load_four((const char*)(x + i), v);
            for (int e = 0; e < 4; ++e) squares += v[e] * v[e];
        }
        sync_multiplying();
        const float sum = sum_of_warps(s, squares);
        if (threadIdx.x != 0) continue;
        if (a.n_push) push_to_all(a, s, part, sum);
        else a.sums[part] = sum;
    }
}
TP_OUTLINE void normed_by(const StreamNormBySquares& a, i64 first, i64 step) {
    const float scale = 1.0f / sqrtf(a.squares[0] / (float)a.whole + a.eps);
#pragma unroll 1
    for (i64 i = 4 * first; i < a.n; i += 4 * step) {
        float v[4], weight[4] = {1, 1, 1, 1};
        load_four((const char*)(a.x + i), v);
        if (a.weight) load_four((const char*)(a.weight + i), weight);
        for (int e = 0; e < 4; ++e) v[e] *= scale * weight[e];
        store_four((char*)(a.y + i), v);
        if (a.copy) store_four((char*)(a.copy + i), v);
    }
}
/// Rows about their means: a warp a row, of long ones a block. In three passes, as the formula of one cancels where means are large (norm.cu).
TP_OUTLINE void layernorm(const StreamLayerNorm& a, i64 first, i64 step) {
    Shared& s = shared_of();
    const int n = (int)a.y.ne[0];
    const bool wide = n >= (int)kStreamLongRow;
    const int width = wide ? kMultiply : 32, begin = wide ? (int)threadIdx.x : (int)threadIdx.x % 32;
    const i64 rows = a.y.ne[1] * a.y.ne[2] * a.y.ne[3], rows_apart = wide ? gridDim.x : step / 32;
    auto mean_of = [&](float v) {
        if (!wide) return tp_warp_sum(v) / (float)n;
        sync_multiplying();
        return sum_of_warps(s, v) / (float)n;
    };
    for (i64 row = wide ? blockIdx.x : first / 32; row < rows; row += rows_apart) {
        const Index at = row_index((u32)row, a.y.ne);
        const float* x = (const float*)element_at(a.x, at);
        float* const y = (float*)element_at(a.y, at);
        float sum = 0, squares = 0;
        // In registers: all of it in one trip to the memory, with what it is multiplied by. (Read three times, element by element, 4,608 elements took 19,500
        // cycles of one H200.)
        constexpr int kFours = 8;
        const bool fours = n % 4 == 0 && ((u64)x | (u64)y | (u64)a.weight | (u64)a.bias | (u64)a.added | (u64)a.sum) % 16 == 0;
        if (wide && n <= 4 * kFours * kMultiply && fours) {
            float v[kFours][4], weight[kFours][4], bias[kFours][4];
#pragma unroll
            for (int j = 0; j < kFours; ++j) {
                const int i = 4 * ((int)threadIdx.x + j * kMultiply);
                float added[4] = {};
                for (int e = 0; e < 4; ++e) v[j][e] = bias[j][e] = 0.0f, weight[j][e] = 1.0f;
                if (i >= n) continue;
                load_four((const char*)(x + i), v[j]);
                if (a.added) load_four((const char*)(a.added + i), added);
                if (a.weight) load_four((const char*)(a.weight + i), weight[j]);
                if (a.bias) load_four((const char*)(a.bias + i), bias[j]);
                for (int e = 0; e < 4; ++e) v[j][e] += added[e];
            }
#pragma unroll
            for (int j = 0; j < kFours; ++j)
                for (int e = 0; e < 4; ++e) sum += v[j][e];
            const float mean = mean_of(sum);
#pragma unroll
            for (int j = 0; j < kFours; ++j) {
                const bool inside = 4 * ((int)threadIdx.x + j * kMultiply) < n;
                for (int e = 0; e < 4; ++e) squares += inside ? (v[j][e] - mean) * (v[j][e] - mean) : 0.0f;
            }
            const float scale = 1.0f / sqrtf(mean_of(squares) + a.eps);
#pragma unroll
            for (int j = 0; j < kFours; ++j) {
                const int i = 4 * ((int)threadIdx.x + j * kMultiply);
                if (i >= n) continue;
                if (a.added) store_four((char*)(a.sum + i), v[j]);
                for (int e = 0; e < 4; ++e) v[j][e] = (v[j][e] - mean) * scale * weight[j][e] + bias[j][e];
                store_four((char*)(y + i), v[j]);
            }
            continue;
        }
#pragma unroll 4
        for (int i = begin; i < n; i += width) {
            float v = x[i];
            if (a.added) v += a.added[i], a.sum[i] = v;
            sum += v;
        }
        if (a.added) x = a.sum;  // a thread reads what it has written
        const float mean = mean_of(sum);
#pragma unroll 4
        for (int i = begin; i < n; i += width) {
            const float v = x[i] - mean;
            squares += v * v;
        }
        const float scale = 1.0f / sqrtf(mean_of(squares) + a.eps);
#pragma unroll 4
        for (int i = begin; i < n; i += width) {
            float v = (x[i] - mean) * scale;
            if (a.weight) v *= a.weight[i];
            if (a.bias) v += a.bias[i];
            y[i] = v;
        }
    }
}
TP_OUTLINE void map_elems(const StreamElements& e, i64 first, i64 step) {
    const int n = (int)tp_elems(e.y), n0 = (int)e.y.ne[0];
    for (int i = (int)first; i < n; i += (int)step) {
        Index here = {i, 0, 0, 0};
        if (!e.packed) {
            const u32 row = (u32)i / (u32)n0;
            here = row_index(row, e.y.ne);
            here.i0 = i - (int)row * n0;
        }
        float v = e.w.data ? windowed(e.x, e.w, here) : e.packed ? ((const float*)e.x.data)[i] : *(const float*)element_at(e.x, here);
#pragma unroll 1
        for (int s = 0; s < e.n_steps; ++s) {
            const StreamElements::Step& op = e.step[s];
            if (op.op >= kStreamWithOther) {
                const float other = e.packed ? ((const float*)op.b.data)[i] : *(const float*)element_at(op.b, wrap(here, op.b.ne));
                v = binary_of((BinaryOp)(op.op - kStreamWithOther), v, other);
            } else {
                v = unary_of((UnaryOp)op.op, v, op.p[0], op.p[1], op.p[2], op.p[3]);
            }
        }
        if (e.packed) ((float*)e.y.data)[i] = v;
        else *(float*)element_at(e.y, here) = v;
    }
}
/// Of words of four bytes.
TP_OUTLINE void do_concat(const MoveArgs& args, i64 first, i64 step) {
    for (i64 i = first; i < tp_elems(args.y); i += step) {
        Index4 at = tp_index(args.y.ne, i);
        i32* const to = (i32*)tp_at(args.y, at);
        const int d = args.p[0];
        const bool second = at.i[d] >= args.x.ne[d];
        if (second) at.i[d] -= args.x.ne[d];
        *to = *(const i32*)tp_at(second ? args.b : args.x, at);
    }
}
/// A warp a few rows of a state, which come in one trip to the memory.
TP_OUTLINE void run_delta(const RecurrentArgs& args, i64 first, i64 step) {
    const u32 rows = (u32)args.rows / kDeltaRows;
    for (i64 i = first / 32; i < rows * args.n_head; i += step / 32) {
        const u32 head = (u32)i / rows, row = (u32)i - head * rows;
        gated_delta_rows(args, (int)row * kDeltaRows, (int)head);
    }
}
TP_OUTLINE void run_scans(const RecurrentArgs& args, i64 first, i64 step) {
    const u32 at_once = (u32)scan_at_once(args), rows = (u32)(args.rows * args.n_head);
#pragma unroll 1
    for (u32 row = (u32)(first / 32) * at_once; row < rows; row += (u32)(step / 32) * at_once) scan_rows(args, row);
}
/// The windows of an earlier stage, which all blocks have read, take in their token: a thread a channel, as old and new may be the same row.
TP_OUTLINE void shift_all(const StreamHeads& a, i64 first, i64 step) {
    const int rest = a.shift_row.taps - 1;
    const i64 row = *a.shift_row.row;
    if (row < 0 || row >= a.shift_row.n_rows) return;  // whose token it was has said so
    for (int i = 0; i < a.n_shift; ++i) {
        const StreamWindow& w = a.shift[i];
        for (i64 channel = first; channel < w.n_channels; channel += step) {
            const float* const old = (const float*)(w.old + row * a.shift_row.row_bytes) + channel * rest;
            float v[kStreamMostTaps - 1];
#pragma unroll
            for (int t = 0; t < kStreamMostTaps - 1; ++t)
                if (t < rest) v[t] = t + 1 < rest ? old[t + 1] : w.x[channel];
#pragma unroll
            for (int t = 0; t < kStreamMostTaps - 1; ++t)
                if (t < rest) w.to[channel * rest + t] = v[t];
        }
    }
}
/// What a channel's window sums up, but for this token's element.
struct WindowSum {
    float old[kStreamMostTaps - 1] = {}, w[kStreamMostTaps] = {};
    TP_MEMBER void fetch(const StreamWindow& window, i64 channel, int taps, i64 row) {  // row: bytes from the cache's first
#pragma unroll
        for (int t = 0; t < kStreamMostTaps; ++t) {
            if (t < taps) w[t] = window.w[channel * taps + t];
            if (t + 1 < taps) old[t] = ((const float*)(window.old + row))[channel * (taps - 1) + t];
        }
    }
    TP_MEMBER float of(float x, int taps) const {
        float sum = 0;
#pragma unroll
        for (int t = 0; t < kStreamMostTaps; ++t)
            if (t < taps) sum += (t + 1 < taps ? old[t < kStreamMostTaps - 1 ? t : 0] : x) * w[t];
        return sum;
    }
};
TP_DEVICE float head_op(i32 op, float x) {
    if ((UnaryOp)op == UnaryOp::kSoftplus) return softplus(x);
    const float s = sigmoid(x);
    return (UnaryOp)op == UnaryOp::kSilu ? x * s : s;
}
TP_DEVICE float head_float(const StreamHeadFloat& f, int head) {
    float v = f.x[head / f.inner * f.outer + head % f.inner * f.stride];
#pragma unroll 1
    for (int i = 0; i < f.n_steps; ++i) {
        const StreamHeadStep& step = f.step[i];
        if (!step.b) v = head_op(step.op, v);
        else v = step.op == kStreamWithOther + (i32)BinaryOp::kAdd ? v + step.b[head] : v * step.b[head];
    }
    return v;
}
TP_DEVICE int row_of_head(const StreamHeadGroup& g, int head) { return head / g.repeat % g.groups - g.first; }

/// Whether the caches have these rows; if not, that is said.
TP_DEVICE bool has_rows(const StreamHeads& a, i64 window_row, i64 state_row) {
    if (window_row >= 0 && window_row < a.row.n_rows && state_row >= 0 && state_row < a.n_state_rows) return true;
    if (threadIdx.x == 0) atomicExch(a.fault, (u32)kFaultRowIndex);
    return false;
}
/// What run_heads does, of a state space: sixteen bytes of eight rows a lane are a piece of the state, of which two come while the block waits.
TP_OUTLINE Progress scanheads(Progress now) {
    constexpr int kRows = 8, kMostChannels = (kStreamScanRows + 2 * kStreamScanElems + kMultiply - 1) / kMultiply;
    struct Meet {
        float of[2][kStreamScanElems], x[kStreamScanRows], z[kStreamScanRows];  // of C and B
    };
    static_assert(sizeof(Meet) <= kStreamMostK, "where inputs lie");
    Shared& s = shared_of();
    Meet& meet = *(Meet*)s.x;
    const StreamStage& stage = stage_at(now.stage % 3);
    const StreamHeads& a = *(const StreamHeads*)stage.body;
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, blocks = (int)gridDim.x;
    const int turned = (int)blockIdx.x + stage.turn, block_here = turned < blocks ? turned : turned - blocks;
    if (a.n_shift) shift_all(a, (i64)block_here * kMultiply + thread, (i64)blocks * kMultiply);
    const int taps = a.row.taps, rows_each = a.rows / kStreamWarps, across = a.n > 128 ? 2 : 1, pieces = (rows_each + kRows - 1) / kRows * across;
    bool begun = false;
    for (int head = block_here; head < a.n_head; head += blocks) {
        const i64 window_row = *a.row.row, state_row = *a.state_row;
        if (!has_rows(a, window_row, state_row)) break;
        const i64 at_state = ((i64)head * a.rows + warp * rows_each) * a.n;
        const float* const from = (const float*)(a.state + state_row * a.state_row_bytes) + at_state;
        auto fetch = [&](int piece, float(&v)[kRows][4]) {
            const int first = piece / across * kRows, column = piece % across * 128 + 4 * lane;
#pragma unroll
            for (int r = 0; r < kRows; ++r)
                if (column < a.n && first + r < rows_each) load_four((const char*)(from + (first + r) * a.n + column), v[r]);
        };
        float state[kRows][4] = {}, next[kRows][4] = {};
        fetch(0, state);
        if (pieces > 1) fetch(1, next);
        // Channels of C, then of B, then of x.
        auto which_of = [&](int i) { return i < a.n ? 0 : i < 2 * a.n ? 1 : 2; };
        auto channel_of = [&](int i, int which) {
            return which < 2 ? (i64)row_of_head(a.group[which], a.head_begin + head) * a.n + i - which * a.n : (i64)head * a.rows + i - 2 * a.n;
        };
        const int n_channels = 2 * a.n + a.rows;
        WindowSum sum[kMostChannels];
        float bias[kMostChannels] = {};
#pragma unroll
        for (int j = 0; j < kMostChannels; ++j) {
            const int i = j * kMultiply + thread, which = which_of(i);
            if (i >= n_channels) continue;
            const i64 channel = channel_of(i, which);
            sum[j].fetch(a.window[which], channel, taps, window_row * a.row.row_bytes);
            if (a.bias[which]) bias[j] = a.bias[which][channel];
        }
        const float rate = a.a[head], skip = a.d[head];
        if (!begun) begin_stage(now.stage);
        else sync_multiplying();  // before meet is written again
        begun = true;
        const float z = thread < a.rows ? a.z[(i64)head * a.z_stride + thread] : 0.0f;
        const float dt = softplus(head_float(a.gate, head)), decay = expf(dt * rate);
        float fresh[kMostChannels] = {};
#pragma unroll
        for (int j = 0; j < kMostChannels; ++j)
            if (const int i = j * kMultiply + thread; i < n_channels) fresh[j] = a.window[which_of(i)].x[channel_of(i, which_of(i))];
#pragma unroll
        for (int j = 0; j < kMostChannels; ++j) {
            const int i = j * kMultiply + thread, which = which_of(i);
            if (i >= n_channels) continue;
            const float v = silu(sum[j].of(fresh[j], taps) + bias[j]);
            if (which < 2) meet.of[which][i - which * a.n] = v;
            else meet.x[i - 2 * a.n] = v;
        }
        if (thread < a.rows) meet.z[thread] = silu(z);
        sync_multiplying();
        float y[kRows] = {};
#pragma unroll 1
        for (int piece = 0; piece < pieces; ++piece) {
            const int first = piece / across * kRows, column = piece % across * 128 + 4 * lane, row = warp * rows_each + first;
            float b[4] = {}, c[4] = {};
            if (column < a.n)
                for (int e = 0; e < 4; ++e) c[e] = meet.of[0][column + e], b[e] = meet.of[1][column + e];
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                if (first + r >= rows_each) continue;
                const float push = meet.x[row + r] * dt;
                for (int e = 0; e < 4; ++e) state[r][e] = state[r][e] * decay + b[e] * push, y[r] += state[r][e] * c[e];
                if (column < a.n) store_four((char*)(a.state_to + at_state + (first + r) * a.n + column), state[r]);
            }
            if (piece % across == across - 1) {
                float own = 0;  // of row + lane
#pragma unroll
                for (int r = 0; r < kRows; ++r) {
                    const float all = tp_warp_sum(y[r]);
                    own = lane == r ? all : own, y[r] = 0;
                }
                if (lane < kRows && first + lane < rows_each) a.y[(i64)head * a.rows + row + lane] = (own + skip * meet.x[row + lane]) * meet.z[row + lane];
            }
#pragma unroll
            for (int r = 0; r < kRows; ++r)
                for (int e = 0; e < 4; ++e) state[r][e] = next[r][e];
            if (piece + 2 < pieces) fetch(piece + 2, next);
        }
    }
    if (!begun) begin_stage(now.stage);
    return now;
}
/// A block a head. What no stage of the launch writes, its state above all, comes while the block still waits: sixteen rows a warp, four neighbours a lane. Eight
/// rows at a time: the code, which comes from the L2 once a layer, is half as long, and the second half finds it.
TP_OUTLINE Progress run_heads(Progress now) {
    constexpr int kMost = 128, kRows = kMost / kStreamWarps / 2;  // of a half
    struct Meet {
        float qk[2][kMost], v[kMost], y[kMost];
        float sums[2][kStreamWarps / 2], squares[kStreamWarps];
    };
    static_assert(sizeof(Meet) <= kStreamMostK, "where inputs lie");
    Shared& s = shared_of();
    Meet& meet = *(Meet*)s.x;
    const StreamStage& stage = stage_at(now.stage % 3);
    const StreamHeads& a = *(const StreamHeads*)stage.body;
    if (a.a) return scanheads(now);
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, blocks = (int)gridDim.x;
    const int turned = (int)blockIdx.x + stage.turn, block_here = turned < blocks ? turned : turned - blocks;
    if (a.n_shift) shift_all(a, (i64)block_here * kMultiply + thread, (i64)blocks * kMultiply);
    const int of_k = thread >= kMost, channel = thread % kMost;  // whose of Q and K this thread has
    const int taps = a.row.taps, rows_each = a.rows / kStreamWarps;
    bool begun = false;
    for (int head = block_here; head < a.n_head; head += blocks) {
        const i64 window_row = *a.row.row, state_row = *a.state_row;
        if (!has_rows(a, window_row, state_row)) break;
        const i64 window_at = window_row * a.row.row_bytes;
        const i64 at_state = ((i64)head * a.rows + warp * rows_each) * a.n + 4 * lane;
        const char* const from = a.state + state_row * a.state_row_bytes + at_state * 4;
        const bool inside = 4 * lane < a.n, has_row = thread < a.rows, has_channel = channel < a.n;
        float state[kRows][4] = {}, second[kRows][4] = {};
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            if (inside && r < rows_each) load_four(from + (i64)r * a.n * 4, state[r]);
            if (inside && r + kRows < rows_each) load_four(from + (i64)(r + kRows) * a.n * 4, second[r]);
        }
        const i64 at_qk = (i64)row_of_head(a.group[of_k], a.head_begin + head) * a.n + channel, at_v = (i64)head * a.rows + thread;
        WindowSum of_qk, of_v;
        if (has_channel) of_qk.fetch(a.window[of_k], at_qk, taps, window_at);
        if (has_row) of_v.fetch(a.window[2], at_v, taps, window_at);
        const float weight = has_row ? a.weight[thread] : 0.0f;
        if (!begun) begin_stage(now.stage);
        else sync_multiplying();  // before meet is written again
        begun = true;
        const float x_qk = has_channel ? a.window[of_k].x[at_qk] : 0.0f, x_v = has_row ? a.window[2].x[at_v] : 0.0f;
        const float z = has_row ? a.z[(i64)head * a.z_stride + thread] : 0.0f;
        const float decay = expf(head_float(a.gate, head)), beta = head_float(a.beta, head);
        const float own = has_channel ? silu(of_qk.of(x_qk, taps)) : 0.0f;
        meet.qk[of_k][channel] = own;
        if (thread < kMost) meet.v[thread] = has_row ? silu(of_v.of(x_v, taps)) : 0.0f;
        const float squares = tp_warp_sum(own * own);
        if (lane == 0) meet.sums[of_k][warp % (kStreamWarps / 2)] = squares;
        sync_multiplying();
        float k[4], q[4], scale[2] = {};
#pragma unroll 1
        for (int i = 0; i < 2; ++i) {
            const float* const sums = meet.sums[i];
            const float of_all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
            const float here = tp_quotient(a.group[i].factor, sqrtf(tp_quotient(of_all, (float)a.n) + a.group[i].eps));
            scale[0] = i ? scale[0] : here, scale[1] = here;
        }
        for (int i = 0; i < 4; ++i) q[i] = meet.qk[0][4 * lane + i] * scale[0], k[i] = meet.qk[1][4 * lane + i] * scale[1];
        // A lane gets the sum of row 4 * j + lane / 8.
        auto sums_of = [&](const float(&v)[kRows], float(&to)[kRows / 4]) {
#pragma unroll
            for (int j = 0; j < kRows / 4; ++j) {
                const float four[4] = {v[4 * j], v[4 * j + 1], v[4 * j + 2], v[4 * j + 3]};
                to[j] = sum_of_lanes<4>(four, 32);
            }
        };
        float y_squares = 0;
#pragma unroll 1
        for (int first = 0; first < rows_each; first += kRows) {
            float sums[kRows], delta[kRows / 4], y[kRows / 4];
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                sums[r] = 0;
                for (int i = 0; i < 4; ++i) state[r][i] *= decay, sums[r] += state[r][i] * k[i];
            }
            sums_of(sums, delta);
            const int row = warp * rows_each + first + lane / 8;  // and four further on
#pragma unroll
            for (int j = 0; j < kRows / 4; ++j) delta[j] = first + 4 * j < rows_each ? (meet.v[row + 4 * j] - delta[j]) * beta : 0.0f;
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                const float d = __shfl_sync(0xffffffffu, delta[r / 4], r % 4 * 8);
                sums[r] = 0;
                for (int i = 0; i < 4; ++i) state[r][i] += k[i] * d, sums[r] += state[r][i] * q[i];
                if (inside && first + r < rows_each) store_four((char*)(a.state_to + at_state + (first + r) * a.n), state[r]);
            }
            sums_of(sums, y);
#pragma unroll
            for (int j = 0; j < kRows / 4; ++j)
                if (lane % 8 == 0 && first + 4 * j < rows_each) {
                    y[j] *= a.scale;
                    meet.y[row + 4 * j] = y[j], y_squares += y[j] * y[j];
                }
#pragma unroll
            for (int r = 0; r < kRows; ++r)
                for (int i = 0; i < 4; ++i) state[r][i] = second[r][i];
        }
        y_squares = tp_warp_sum(y_squares);
        if (lane == 0) meet.squares[warp] = y_squares;
        sync_multiplying();
        float total = 0;
        for (int w = 0; w < kStreamWarps; ++w) total += meet.squares[w];
        const float norm = tp_quotient(1.0f, sqrtf(tp_quotient(total, (float)a.rows) + a.eps));
        if (has_row) a.y[(i64)head * a.rows + thread] = meet.y[thread] * norm * weight * head_op(a.z_op, z);
    }
    if (!begun) begin_stage(now.stage);
    return now;
}
TP_OUTLINE void glu_elems(const StreamGlu& g, i64 first, i64 step) {
    for (i64 i = first; i < tp_elems(g.args.y); i += step) {
        const Index4 at4 = tp_index(g.args.y.ne, i);
        const Index at = {at4.i[0], at4.i[1], at4.i[2], at4.i[3]};
        store(g.args.y, at, glu_of((GluOp)g.op, load(g.args.a, at), load(g.args.b, at), g.args.alpha, g.args.limit));
    }
}
TP_OUTLINE void turn_pair(const StreamTurns& a, i64 first, i64 step) {
    for (i64 i = first; i < a.rope.n_dims / 2; i += step) {
        const Angle angle = angle_of(a.rope, i);
        const i32 pos = *(const i32*)(a.rope.pos.data + angle.row * a.rope.pos.nb[0]);
        rotation(a.rope, (float)pos, i, angle.power, a.table + 2 * i, a.table + 2 * i + 1);
    }
}
/// Sixteen bytes a thread where they lie side by side.
TP_OUTLINE void copy_flat(const float* from, float* to, i64 n, i64 first, i64 step) {
    if (((u64)from | (u64)to | (u64)n * 4) % 16) {
        for (i64 i = first; i < n; i += step) to[i] = from[i];
        return;
    }
#pragma unroll 4
    for (i64 i = first; i < n / 4; i += step) ((TpInt4*)to)[i] = ((const TpInt4*)from)[i];
}
/// Rows of floats, as they are.
TP_OUTLINE void copy_rows(const GetRowsArgs& a, i64 first, i64 step) {
    for (i64 row = 0; row < a.y.ne[1]; ++row) {
        const i64 of = row_number(a.idx, row, 0, 0);
        if (of < 0 || of >= a.w.n) {
            atomicExch(a.fault, (u32)kFaultRowIndex);
            continue;
        }
        copy_flat((const float*)(a.w_view.data + of * a.w_view.nb[1]), (float*)(a.y.data + row * a.y.nb[1]), a.y.ne[0], first, step);
    }
}

/// A stage that is no product: elements, rows or units of all blocks' threads.
TP_OUTLINE Progress one_stage(Progress now) {
    const StreamStage& stage = stage_at(now.stage % 3);
    const char* body = stage.body;
    const int thread = threadIdx.x, lane = thread % 32;
    if (stage.kind == kStreamFloats) fetch_ahead(*(const StreamFloats*)body);
    begin_stage(now.stage);
    const i64 step = (i64)gridDim.x * kMultiply;
    // Stages of little work that do not wait for each other begin at other blocks: they take the time of one.
    const u32 turned = blockIdx.x + stage.turn, block_here = turned < gridDim.x ? turned : turned - gridDim.x;
    const i64 first = (i64)block_here * kMultiply + thread;
    switch (stage.kind) {
        case kStreamReduce: {
            const StreamReduce& a = *(const StreamReduce*)body;
            Shared& s = shared_of();
            const u32 push = s.pushed_before + (u32)a.push;
            const u64* inbox = a.inbox + inbox_of(s, push);
            for (i64 i = first; i < a.n; i += step) {
                const float added = a.bias ? a.bias[i] : 0.0f;
                float sum = sum_of(inbox + i, push, s);
                for (int r = 1; r < a.n_ranks; ++r) sum += sum_of(inbox + r * a.n + i, push, s);
                sum *= a.factor;
                if (a.raw) a.raw[i] = sum;
                sum += added;
                a.y[i] = sum;
                if (a.copy) a.copy[i] = sum;
            }
            break;
        }
        case kStreamCopy: {
            const StreamCopy& a = *(const StreamCopy*)body;
            copy_flat(a.from, a.to, a.n, first, step);
            break;
        }
        case kStreamLayerNorm: layernorm(*(const StreamLayerNorm*)body, first, step); break;
        case kStreamSquares: squaresum(*(const StreamSquares*)body, block_here); break;
        case kStreamNormBySquares: normed_by(*(const StreamNormBySquares*)body, first, step); break;
        case kStreamNormRows: {  // a warp a row
            const FusedNormArgs& a = ((const StreamNormRows*)body)->norm;
            const float factor = ((const StreamNormRows*)body)->factor;
            if (a.y.ne[0] >= kStreamLongRow) {
                norm_rows(a, factor, ((const StreamNormRows*)body)->copy);
                break;
            }
            const i64 rows = a.y.ne[1] * a.y.ne[2] * a.y.ne[3], n = a.y.ne[0];
            if (stage.count) {
                for (i64 row = first / 32; row < rows; row += step / 32) norm_head(a, factor, (u32)row);
                break;
            }
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
                const float scale = factor / sqrtf(tp_warp_sum(squares) / (float)n + a.eps);
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
                const float out = binary_of((BinaryOp)b.op, x, y);
                if (b.n_push) {
                    push_to_all(b, shared_of(), i, out);
                    continue;
                }
                store(b.args.y, at, out);
                if (b.copy) b.copy[i] = out;
            }
            break;
        }
        case kStreamGlu: glu_elems(*(const StreamGlu*)body, first, step); break;
        case kStreamTurns: turn_pair(*(const StreamTurns*)body, first, step); break;
        case kStreamRopeStore: {  // blocks of 256 threads
            const StreamRope& a = *(const StreamRope*)body;
            for (i64 block = first / 256; block < stage.count; block += step / 256) rope_store_one<true>(a.args, block, thread % 256, a.table, NoPieces{});
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
            if (stage.count) {
                copy_rows(a, first, step);
                break;
            }
            for (i64 i = first; i < tp_elems(a.y); i += step) get_row_element(a, i);
            break;
        }
        case kStreamFloats:
            if (((const StreamFloats*)body)->n + (((const StreamFloats*)body)->more_w != nullptr) <= gridDim.x) multiply_floats<1>(now.stage % 3);
            else multiply_floats<kFloatRows>(now.stage % 3);
            break;
        case kStreamElements: map_elems(*(const StreamElements*)body, first, step); break;
        case kStreamConcat: do_concat(((const StreamConcat*)body)->args, first, step); break;
        case kStreamDelta: run_delta(((const StreamDelta*)body)->args, first, step); break;
        case kStreamScan: run_scans(((const StreamDelta*)body)->args, first, step); break;
        case kStreamCombine: combine_pieces(*(const StreamCombine*)body); break;
        default: break;
    }
    return now;
}

/// All stages, by the multiplying warps.
TP_DEVICE void do_stages() {
    Shared& s = shared_of();
    fetch_stage(0);
    fetch_stage(1);
    if (s.args.slots < kStreamSlots)
        for (int i = threadIdx.x; i < (int)sizeof(GridTables) / 16; i += kMultiply)
            tp_copy_async((TpInt4*)&LoadRing().grids() + i, (const TpInt4*)&kGridTables + i);
    tp_copy_wait();
    sync_multiplying();
    for (Progress now = {0, Walk{}.packed(), 1.0f}; now.stage < s.args.n_stages; ++now.stage) {
        const StreamStage& stage = stage_at(now.stage % 3);
        if (stage.kind == kStreamProduct) {
            if (((const StreamProduct*)stage.body)->role == kExpertsEach) choose_experts(((const StreamExperts*)stage.body)->route, now.stage);
            now = take_input(now);
            const StreamProduct& p = *(const StreamProduct*)stage_at(now.stage % 3).body;
            now = multiply_any_of<kQ4_0, kQ8_0, kQ4_K, kQ6_K, kQ5_K, kIQ4_XS, kIQ4_NL, kMXFP4, kQ3_K, kQ2_K, kQ5_0, kQ5_1, kQ4_1, kNVFP4, kTQ2_0, kIQ3_S,
                                  kIQ3_XXS, kIQ2_S, kIQ2_XS, kIQ2_XXS, kIQ1_M, kIQ1_S>(p, now);
            const bool nothing = (int)blockIdx.x >= ((const StreamProduct*)stage_at(now.stage % 3).body)->n_tiles;
            if (nothing) sync_multiplying();  // nothing for the storing warp; what take_input wrote counts all the same
            if (threadIdx.x == 0) {
                mark_stage(now.stage, kTimeDone);
                if (nothing) arrive();
            }
            continue;
        }
        if (stage.kind == kStreamFlash) {  // begins by itself
            const StreamFlash& f = *(const StreamFlash*)stage.body;
            const int d = (int)f.args.a.q.ne[0];
            if (f.latent.used) {
                now = do_latent(now);
                if (threadIdx.x == 0) mark_stage(now.stage, kTimeDone);
            } else if (f.cells.groups) {
                if (d <= 64) now = attend_streamed<64>(now);
                else if (d <= 128) now = attend_streamed<128>(now);
                else now = attend_streamed<256>(now);
            } else {
                if (f.own.table && f.args.head_groups > 1) now = attend_any<true>(now, d);
                else now = attend_any<false>(now, d);
                if (threadIdx.x == 0) mark_stage(now.stage, kTimeInput), mark_stage(now.stage, kTimeDone);
            }
        } else {
            now = stage.kind == kStreamHeads ? run_heads(now) : one_stage(now);
            sync_multiplying();
            if (threadIdx.x == 0) mark_stage(now.stage, kTimeInput), mark_stage(now.stage, kTimeDone);
        }
        if (threadIdx.x == 0) arrive(), mark_stage(now.stage, kTimeStored);
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
        tp_barrier_init(&s.chosen, 1), tp_barrier_init(&s.taken, 64);
        s.late = 0, s.stage_now = 0, s.choices = 0;
        s.pushed_before = args.state->pushed_before, s.args = args;
        tp_barrier_init_fence();
    }
    __syncthreads();
    if (thread < kMultiply) do_stages();
    else if (thread < kMultiply + 32) stream_weights();
    else store_results();
    __syncthreads();
    // The last block to end leaves the counters as the next launch wants them: nobody waits on them any more.
    if (thread == 0 && tp_count(&args.state->done) == gridDim.x - 1) {
        args.state->arrived = 0;
        args.state->done = 0;
        args.state->pushed_before += (u32)args.n_pushes;
    }
}

#endif
