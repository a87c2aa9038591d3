// Checks of plugin/core that need no host and no device. usage: core_checks SEED; prints what is wrong, exits with the number of faults.
#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <random>

#include "memory.h"
#include "plan.h"
#include "rules.h"
#include "token.h"

using namespace ggml_tp;

int faults = 0;
void expect(bool ok, const char* what) {
    if (!ok) ++faults, std::printf("wrong: %s\n", what);
}

/// Every index belongs to exactly one rank, in order, in multiples of the grain.
void check_divide(std::mt19937& rng) {
    const int n = 1 + static_cast<int>(rng() % 16);
    const i64 grain = 1 + rng() % 300, total = static_cast<i64>(rng() % 5000);
    std::vector<double> split;
    if (rng() % 2)
        for (int r = 0; r < n; ++r) split.push_back(r == 0 ? 1 : rng() % 4);
    i64 at = 0;
    for (const Range& range : divide(total, grain, n, split)) {
        expect(range.begin == at && range.end >= range.begin, "divide leaves a gap or overlaps");
        expect(range.end % grain == 0 || range.end == total, "divide cuts inside a grain");
        at = range.end;
    }
    expect(at == total, "divide does not reach the end");
}

/// Whole heads, a KV head wherever one of its query heads is.
void check_heads(std::mt19937& rng) {
    const i64 kv = 1 + rng() % 9, group = 1 + rng() % 6;
    const int n = 1 + static_cast<int>(rng() % 16);
    const HeadPartition heads = divide_heads(kv * group, kv, n, {});
    i64 at = 0;
    for (int r = 0; r < n; ++r) {
        const Range &q = heads.q[r], &own = heads.kv[r];
        expect(q.begin == at, "query heads are not divided in order");
        at = q.end;
        if (q.size()) expect(own.begin <= q.begin / group && (q.end - 1) / group < own.end, "a query head's KV head is elsewhere");
    }
    expect(at == kv * group, "query heads are missing");
}

/// A sharding of a contiguous tensor and its extent say the same, seen through a permuted view too.
void check_views(std::mt19937& rng) {
    Strided root{{}, {}, 0, 4};
    i64 nb = 4;
    for (int d = 0; d < 4; ++d) root.ne[d] = 1 + rng() % 7, root.nb[d] = nb, nb *= root.ne[d];
    const int axis = static_cast<int>(rng() % 4), n = 1 + static_cast<int>(rng() % 4);
    if (root.ne[axis] == 1) return;
    const Sharding s = sharded(axis, divide(root.ne[axis], 1, n, {}));
    const auto extent = extent_of(s, root);
    expect(extent.has_value(), "a contiguous tensor has no extent");
    if (!extent) return;
    Strided view = root;
    int order[4] = {0, 1, 2, 3};
    std::shuffle(order, order + 4, rng);
    for (int d = 0; d < 4; ++d) view.ne[d] = root.ne[order[d]], view.nb[d] = root.nb[order[d]];
    const auto seen = sharding_of(*extent, view);
    expect(seen.has_value(), "a permuted view has no sharding");
    // Every element is the same rank's through either.
    for (i64 i = 0; seen && i < nb / 4; ++i) {
        i64 rest = i, of_root = 0, of_view = 0;
        for (int d = 0; d < 4; ++d) {
            const i64 at = rest % root.ne[d];
            rest /= root.ne[d];
            if (d == axis) of_root = at;
            for (int v = 0; v < 4; ++v)
                if (order[v] == d && v == seen->axis) of_view = at;
        }
        for (int r = 0; r < n; ++r) {
            const Range &a = s.ranges[r], &b = seen->ranges[r];
            expect((a.begin <= of_root && of_root < a.end) == (b.begin <= of_view && of_view < b.end), "a view gives an element to another rank");
        }
    }
}

/// Of a row of several segments, each divided for itself: a view of one is divided as that one, a view of the whole row as all of them, and a view
/// that begins within a segment by what it has of it.
void check_segments(std::mt19937& rng) {
    const int n = 1 + static_cast<int>(rng() % 5), n_segments = 2 + static_cast<int>(rng() % 3);
    const i64 unit = 1 + static_cast<i64>(rng() % 4), n_tokens = 1 + static_cast<i64>(rng() % 3);
    std::vector<i64> begins{0};
    Sharding s;
    for (int i = 0; i < n_segments; ++i) {
        const i64 size = unit * (1 + static_cast<i64>(rng() % 9));
        const Ranges ranges = moved(divide(size, unit, n, {}), begins.back());
        if (i == 0) s = sharded(0, ranges);
        else s.rest.push_back(ranges);
        begins.push_back(begins.back() + size);
    }
    const i64 row = begins.back();
    const Strided root{{row, n_tokens, 1, 1}, {4, 4 * row, 4 * row * n_tokens, 4 * row * n_tokens}, 0, 4};
    const auto extent = extent_of(s, root);
    expect(extent && sharding_of(*extent, root) == s, "a row in segments is not what it was");
    if (!extent) return;
    for (int i = 0; i < n_segments; ++i) {
        const i64 begin = begins[static_cast<size_t>(i)], size = begins[static_cast<size_t>(i) + 1] - begin;
        const Strided heads{{unit, size / unit, n_tokens, 1}, {4, 4 * unit, 4 * row, 4 * row * n_tokens}, 4 * begin, 4};
        const auto seen = sharding_of(*extent, heads);
        expect(seen && seen->n_segments() == 1, "a view of one segment has no sharding of one");
        if (!seen || seen->n_segments() != 1) continue;
        const i64 step = seen->axis == 0 ? 1 : unit;
        for (int r = 0; r < n; ++r) {
            const Range got = seen->ranges[static_cast<size_t>(r)], held = s.segment(i).ranges[static_cast<size_t>(r)];
            expect(got.size() * step == held.size() && (held.size() == 0 || begin + got.begin * step == held.begin), "a view of a segment gives elements away");
        }
    }
    Strided tail{{row - 1, n_tokens, 1, 1}, {4, 4 * row, 4 * row * n_tokens, 4 * row * n_tokens}, 4, 4};
    if (const auto seen = row > 1 ? sharding_of(*extent, tail) : std::nullopt) {
        std::vector<int> owners(static_cast<size_t>(row) - 1);
        for (int i = 0; i < seen->n_segments(); ++i)
            for (const Range& range : seen->segment(i).ranges)
                for (i64 at = range.begin; at < range.end; ++at) ++owners[static_cast<size_t>(at)];
        expect(std::all_of(owners.begin(), owners.end(), [](int n_owners) { return n_owners == 1; }), "an element of a view has no owner, or two");
    } else {
        expect(row == 1, "a view across segments has no sharding");
    }
}

/// Every block is stored by whom it belongs to.
void check_planes(std::mt19937& rng) {
    const WeightFormat& format = kWeightFormats[rng() % std::size(kWeightFormats)];
    const i64 ne[4] = {static_cast<i64>(format.block_elems * (1 + rng() % 9)), static_cast<i64>(1 + rng() % 40), 1, 1};
    const int axis = static_cast<int>(rng() % 2), n = 1 + static_cast<int>(rng() % 5);
    Sharding s = sharded(axis, divide(ne[axis], axis ? 1 : 16, n, {}));
    if (axis == 1 && ne[1] % 2 == 0) {  // two halves, each divided
        s.ranges = divide(ne[1] / 2, 1, n, {});
        s.rest = {moved(s.ranges, ne[1] / 2)};
    }
    for (int r = 0; r < n; ++r) {
        const PlaneLayout planes = plane_layout(format, ne, s, r);
        const i64 blocks = planes.block_end - planes.block_begin, rows = planes.n_rows();
        expect(planes.bytes >= blocks * rows * format.block_bytes, "planes are smaller than their blocks");
        if (axis == 0) {
            expect(planes.block_begin * format.block_elems <= s.ranges[r].begin, "a shard's first block is missing");
            expect(s.ranges[r].size() == 0 || planes.block_end * format.block_elems >= s.ranges[r].end, "a shard's last block is missing");
        }
        i64 end = 0;
        for (int f = 0; f < format.n_fields; ++f) {
            expect(format.n_fields == 1 || (planes.plane_offset[f] % 16 == 0 && planes.row_stride % 16 == 0), "a plane is not aligned");
            expect(planes.plane_offset[f] >= end, "planes lie over each other");
            end = planes.plane_offset[f] + blocks * format.field[f].bytes;
        }
        expect(end <= planes.row_stride, "a plane ends behind its row");
        expect(rows * planes.row_stride <= planes.bytes && planes.bytes % 256 == 0, "a row ends behind its shard");
        expect(planes.row_stride - blocks * format.block_bytes < 16 * format.n_fields, "more padding than what aligns planes");
    }
}

/// p = w * x, s = p + b, n = rms_norm(s), whose shardings are written by hand.
enum { kW, kX, kB, kP, kS, kN };
Graph small_graph() {
    Graph graph;
    for (int id = kW; id <= kN; ++id) {
        Tensor t;
        t.id = t.root = id;
        t.name = std::string(1, "wxbpsn"[id]);
        t.type = kF32;
        for (int d = 0; d < 4; ++d) t.ne[d] = d == 0 || (d == 1 && id == kW) ? 16 : 1, t.nb[d] = d == 0 ? 4 : t.nb[d - 1] * t.ne[d - 1];
        t.bytes = t.nb[3];
        t.address = static_cast<u64>(4096 * (1 + id));
        for (int& source : t.src) source = -1;
        graph.tensors.push_back(t);
    }
    auto node = [&](int id, abi::Op op, std::initializer_list<int> sources) {
        Tensor& t = graph.tensors[static_cast<size_t>(id)];
        t.op = op, t.is_node = true;
        std::copy(sources.begin(), sources.end(), t.src);
        graph.nodes.push_back(id);
    };
    node(kP, abi::Op::MUL_MAT, {kW, kX}), node(kS, abi::Op::ADD, {kP, kB}), node(kN, abi::Op::RMS_NORM, {kS});
    return graph;
}
bool accepted(const Plan& plan, const Graph& graph) {
    try {
        verify(plan, graph);
        return true;
    } catch (const Error&) {
        return false;
    }
}
PlanStep compute(int tensor, std::vector<Sharding> inputs, Sharding output) {
    PlanStep step;
    step.tensor = tensor, step.inputs = std::move(inputs), step.output = std::move(output);
    return step;
}
PlanStep reduce(int tensor) {
    PlanStep step;
    step.kind = PlanStep::kAllReduce, step.tensor = tensor;
    return step;
}
void check_verifier() {
    const Graph graph = small_graph();
    auto plan = [](std::vector<PlanStep> steps) {
        Plan out;
        out.n_ranks = 2, out.steps = std::move(steps);
        return out;
    };
    const Part in_halves{{0, 64}, {64, {{0, 32}, {32, 64}}}}, as_summands{{0, 64}, {0, {}, true}};
    const Ranges halves{{0, 8}, {8, 16}};
    const Sharding whole = replicated(), half = sharded(0, halves), half_rows = sharded(1, halves);
    const PlanStep multiply = compute(kP, {whole, whole}, whole), add = compute(kS, {whole, whole}, whole), norm = compute(kN, {whole}, whole);
    expect(accepted(plan({multiply, add, norm}), graph), "a right plan is refused");
    expect(!accepted(plan({multiply, reduce(kP), add, norm}), graph), "an all_reduce of what is whole is accepted");
    expect(!accepted(plan({multiply, compute(kS, {partial(), whole}, partial()), reduce(kS), norm}), graph), "an invented Partial is accepted");
    const PlanStep summands = compute(kP, {half, half}, partial());
    expect(accepted(plan({summands, reduce(kP), add, norm}), graph), "a reduced Partial is refused");
    expect(!accepted(plan({summands, add, norm}), graph), "a Partial is read as if it were whole");
    expect(!accepted(plan({summands, compute(kS, {partial(), whole}, whole), norm}), graph), "a sum with a Partial is accepted as if it were whole");
    expect(!accepted(plan({multiply, compute(kS, {whole, whole}, partial()), reduce(kS), norm}), graph), "what is whole is summed");
    expect(!accepted(plan({compute(kP, {whole, whole}, partial()), reduce(kP), add, norm}), graph), "whole products are summed");
    const PlanStep passed = compute(kS, {partial(), whole}, partial());
    Plan passes = plan({summands, passed, reduce(kS), norm});
    expect(!accepted(passes, graph), "a Partial that the host would not know of is accepted");
    passes.survivors.push_back({kP, as_summands});
    expect(accepted(passes, graph), "a Partial to which one rank adds is refused");
    expect(!accepted(plan({summands, passed, compute(kN, {partial()}, partial()), reduce(kN)}), graph), "a norm passes a Partial on");
    const auto sum_of = [&](Ranges ranges) { return plan({compute(kP, {sharded(0, ranges), sharded(0, ranges)}, partial()), reduce(kP), add, norm}); };
    expect(accepted(sum_of({{0, 5}, {5, 16}}), graph), "a sum of shards is refused");
    expect(!accepted(sum_of({{0, 10}, {8, 16}}), graph), "a sum of shards that two ranks hold a part of is accepted");
    expect(!accepted(sum_of({{0, 8}, {9, 16}}), graph), "a sum without a summand is accepted");
    expect(!accepted(plan({compute(kP, {half, sharded(0, {{0, 7}, {7, 16}})}, partial()), reduce(kP), add, norm}), graph), "rows and columns do not meet");

    // Rows of the product divided: a rank has its own only, until they are gathered.
    const PlanStep rows = compute(kP, {half_rows, whole}, half), add_half = compute(kS, {half, half}, half);
    PlanStep gather;
    gather.kind = PlanStep::kAllGather, gather.tensor = kS, gather.part = in_halves;
    const auto by_rows = [&](std::vector<PlanStep> steps, std::initializer_list<int> left) {
        Plan out = plan(std::move(steps));
        for (int root : left) out.survivors.push_back({root, in_halves});
        return out;
    };
    expect(accepted(by_rows({rows, add_half, gather, norm}, {kP}), graph), "a gathered sum is refused");
    expect(!accepted(by_rows({rows, add_half, gather, norm}, {}), graph), "a divided result that the host would not know of is accepted");
    expect(!accepted(by_rows({rows, add_half, norm}, {kP, kS}), graph), "a norm reads what its rank has not");
    expect(!accepted(by_rows({rows, add_half, compute(kN, {half}, half)}, {kP, kS, kN}), graph), "a norm of a half row is accepted");
    expect(!accepted(by_rows({rows, add, norm}, {kP}), graph), "a sum reads what its rank has not");

    // Or their squares are added up.
    const auto squares = [](Ranges ranges) {
        PlanStep step;
        step.kind = PlanStep::kSumSquares, step.tensor = kN, step.norms = {kN}, step.inputs = {sharded(0, std::move(ranges))};
        return step;
    };
    const PlanStep half_norm = compute(kN, {half}, half);
    expect(accepted(by_rows({rows, add_half, squares(halves), half_norm}, {kP, kS, kN}), graph), "a norm by all ranks' sums of squares is refused");
    expect(!accepted(by_rows({rows, squares(halves), add_half, half_norm}, {kP, kS, kN}), graph), "squares of what is not there yet are accepted");
    expect(!accepted(by_rows({rows, add_half, squares({{0, 8}, {9, 16}}), half_norm}, {kP, kS, kN}), graph), "squares that no rank adds are accepted");
    expect(!accepted(by_rows({rows, add_half, squares({{0, 9}, {9, 16}}), half_norm}, {kP, kS, kN}), graph), "squares of another rank's elements are accepted");
    PlanStep none = squares(halves);
    none.norms.clear();
    expect(!accepted(by_rows({rows, add_half, none, half_norm}, {kP, kS, kN}), graph), "sums of squares of nothing are accepted");
    expect(!accepted(by_rows({summands, passed, squares(halves), reduce(kS), norm}, {}), graph), "squares of summands are accepted");
    expect(!accepted(by_rows({rows, compute(kS, {half, whole}, half), gather, norm}, {kP}), graph), "a rank adds the first half of what is whole to its own");
    expect(!accepted(by_rows({compute(kP, {whole, whole}, half), add_half, gather, norm}, {kP}), graph), "a rank multiplies the first rows for its own");
    PlanStep otherwise = gather;
    otherwise.part.extent.ranges = {{0, 28}, {28, 64}};
    expect(!accepted(by_rows({rows, add_half, otherwise, norm}, {kP}), graph), "an all_gather of other ranges is accepted");
    const auto divided = [&](Ranges ranges) { return by_rows({compute(kP, {sharded(1, ranges), whole}, sharded(0, ranges)), add_half, gather, norm}, {kP}); };
    expect(accepted(divided(halves), graph), "a product by rows is refused");
    expect(!accepted(divided({{0, 8}, {8, 17}}), graph), "a range outside the tensor is accepted");
    expect(!accepted(divided({{0, 16}}), graph), "ranges for too few ranks are accepted");
    expect(!accepted(divided({{0, 8}, {9, 16}}), graph), "an element that no rank computes is accepted");

    Plan left = plan({summands, passed});
    left.survivors.push_back({kS, {}});
    expect(!accepted(left, graph), "a Partial that the host can read is accepted");
    left.survivors = {{kS, as_summands}, {kP, as_summands}};
    expect(accepted(left, graph), "a Partial that reads will sum is refused");
    Graph product = graph;
    product.tensors[kS].op = abi::Op::MUL;
    expect(accepted(plan({summands, passed, reduce(kP), reduce(kS), norm}), product), "a scaled Partial is refused");
    product.tensors[kS].src[1] = kP;
    expect(!accepted(plan({summands, compute(kS, {partial(), partial()}, partial()), reduce(kP), reduce(kS), norm}), product),
           "a product of Partials is accepted");
    product = graph;
    product.tensors[kS].op = abi::Op::SUB;
    expect(!accepted(plan({summands, passed, reduce(kP), reduce(kS), norm}), product), "a Partial less a whole is accepted");

    // What is stored: no rank writes where it has no memory, none leaves out what it has.
    Stored cache;
    cache.name = "cache", cache.type = kF32, cache.ne[0] = 16, cache.bytes = 64, cache.extent = Extent{64, {{0, 32}, {32, 64}}};
    Graph stores = graph;
    stores.tensors[kS].stored = &cache;
    const PlanStep norm_half = compute(kN, {whole}, whole);
    stores.nodes.pop_back();
    expect(accepted(plan({multiply, compute(kS, {half, half}, half)}), stores), "what is written as it is stored is refused");
    expect(!accepted(plan({multiply, add}), stores), "a rank writes more than it stores");
    const Sharding other = sharded(0, {{0, 7}, {7, 16}});
    expect(!accepted(plan({multiply, compute(kS, {other, other}, other)}), stores), "a rank writes beyond what it stores");
    expect(!accepted(plan({multiply, compute(kS, {half, half}, half), norm_half}), stores), "a rank reads what it does not store");
    cache.extent->ranges[1].end = 68;
    expect(!accepted(plan({multiply, compute(kS, {half, half}, half)}), stores), "a shard beyond its tensor is accepted");
}

/// Two layers of 8 heads, 4 of K and V: with experts, or Q, K and V in one weight and gate and up in one, or states instead of attention.
enum class Kind { kPlain, kExperts, kFused, kStates };
ModelShape small_model(Kind kind) {
    ModelShape m;
    m.n_embd = 256, m.n_expert_used = 3, m.type_k = m.type_v = kF16;
    auto add = [&](const std::string& name, int type, i64 n0, i64 n1 = 1, i64 n2 = 1) { m.tensors.push_back({name, type, {n0, n1, n2, 1}}); };
    for (int i = 0; i < 2; ++i) {
        const std::string p = "blk." + std::to_string(i) + ".";
        add(p + "attn_norm.weight", kF32, 256);
        if (kind == Kind::kStates) {
            add(p + "ssm_in.weight", kF16, 256, 1168), add(p + "ssm_conv1d.weight", kF32, 4, 640), add(p + "ssm_conv1d.bias", kF32, 640);
            add(p + "ssm_dt.bias", kF32, 16), add(p + "ssm_a", kF32, 1, 16), add(p + "ssm_d", kF32, 1, 16);
            add(p + "ssm_norm.weight", kF32, 256, 2), add(p + "ssm_out.weight", kF16, 512, 256);
            m.layers.push_back({});
            continue;
        }
        if (kind == Kind::kFused) add(p + "attn_qkv.weight", kF16, 256, 512);
        else add(p + "attn_q.weight", kF16, 256, 256), add(p + "attn_k.weight", kF16, 256, 128), add(p + "attn_v.weight", kF16, 256, 128);
        add(p + "attn_output.weight", kF16, 256, 256), add(p + "ffn_norm.weight", kF32, 256);
        if (kind == Kind::kExperts) {
            add(p + "ffn_gate_inp.weight", kF32, 256, 6), add(p + "ffn_gate_exps.weight", kF16, 256, 192, 6);
            add(p + "ffn_up_exps.weight", kF16, 256, 192, 6), add(p + "ffn_down_exps.weight", kF16, 192, 256, 6);
        } else {
            if (kind == Kind::kPlain) add(p + "ffn_gate.weight", kF16, 256, 768);
            add(p + "ffn_up.weight", kF16, 256, kind == Kind::kPlain ? 768 : 1536), add(p + "ffn_down.weight", kF16, 768, 256);
        }
        m.layers.push_back({8, 4, 32, 32, 256});
    }
    add("output_norm.weight", kF32, 256), add("output.weight", kF16, 256, 320);
    return m;
}

/// Every way in which one number of a right plan can be wrong, for each of its steps: none may be accepted.
void check_broken_plans(Kind kind, int n_ranks) {
    TokenGraph token = token_graph(small_model(kind), n_ranks, {});
    const Graph& graph = token.graph;
    const Plan right = settle(graph, n_ranks, {}, [&](Stored& tensor, const Sharding& sharding, const std::optional<Extent>& extent) {
        tensor.sharding = sharding;
        tensor.extent = extent;
        lay_out_planes(tensor, n_ranks);
    });
    expect(token.notes.empty() && accepted(right, graph), "the plan of a model is refused");
    int n_broken = 0;
    const auto refused = [&](const Plan& plan, const PlanStep& step, const char* how) {
        ++n_broken;
        if (!accepted(plan, graph)) return;
        ++faults;
        std::printf("wrong: model %d, %d ranks, accepted at %s: %s\n", static_cast<int>(kind), n_ranks,
                    graph.tensors[static_cast<size_t>(step.tensor)].name.c_str(), how);
    };
    const auto is_cut = [](const Sharding& s) {
        return s.kind == Sharding::kSharded && std::any_of(s.ranges.begin(), s.ranges.end(), [&](const Range& r) { return r != s.ranges[0]; });
    };
    const auto turn = [&](Sharding& s) {  // each rank has another's part
        if (!is_cut(s)) return false;
        std::rotate(s.ranges.begin(), s.ranges.begin() + 1, s.ranges.end());
        for (Ranges& ranges : s.rest) std::rotate(ranges.begin(), ranges.begin() + 1, ranges.end());
        return true;
    };
    const auto later = [](Sharding& s) {  // the first rank that has something has it from the next element on
        for (Range& range : s.ranges)
            if (range.size()) return ++range.begin, true;
        return false;
    };
    for (size_t i = 0; i < right.steps.size(); ++i) {
        const PlanStep& step = right.steps[i];
        Plan plan = right;
        if (step.kind != PlanStep::kCompute) {
            plan.steps.erase(plan.steps.begin() + static_cast<std::ptrdiff_t>(i));
            refused(plan, step, "it is not reduced or gathered");
            continue;
        }
        const Tensor& t = graph.tensors[static_cast<size_t>(step.tensor)];
        PlanStep& broken = plan.steps[i];
        bool turned = turn(broken.output);
        for (Sharding& input : broken.inputs) turned |= turn(input);
        if (turned) refused(plan, step, "ranks have each other's part");
        const auto with_output = [&](const Sharding& output, const char* how) {
            broken = step;
            broken.output = output;
            refused(plan, step, how);
        };
        if (step.output.kind != Sharding::kReplicated) with_output(replicated(), "its result is called whole");
        if (step.output.kind != Sharding::kPartial) with_output(partial(), "its result is called a Partial");
        if (Sharding output = step.output; later(output)) with_output(output, "an element is nobody's");
        for (int axis = 0; axis < 4 && step.output.kind != Sharding::kSharded; ++axis)
            if (t.ne[axis] > 1) with_output(sharded(axis, divide(t.ne[axis], 1, n_ranks, {})), "its result is called divided");
        for (size_t k = 0; k < step.inputs.size(); ++k) {
            if ((t.op == abi::Op::CPY || t.op == abi::Op::SET_ROWS) && k == (t.op == abi::Op::CPY ? 1 : 2)) continue;  // where it goes
            const Tensor& source = graph.tensors[static_cast<size_t>(t.src[k])];
            const auto with_input = [&](const Sharding& input, const char* how) {
                broken = step;
                broken.inputs[k] = input;
                refused(plan, step, how);
            };
            if (step.inputs[k].kind == Sharding::kPartial || is_cut(step.inputs[k])) with_input(replicated(), "a source is called whole");
            if (step.inputs[k].kind != Sharding::kPartial) with_input(partial(), "a source is called a Partial");
            if (Sharding input = step.inputs[k]; later(input)) with_input(input, "an element of a source is not read");
            for (int axis = 0; axis < 4 && step.inputs[k].kind == Sharding::kReplicated; ++axis)
                if (source.ne[axis] > 1) with_input(sharded(axis, divide(source.ne[axis], 1, n_ranks, {})), "a whole source is called divided");
        }
    }
    if (!right.survivors.empty()) {
        Plan plan = right;
        plan.survivors.pop_back();
        refused(plan, right.steps.back(), "what stays divided is not said");
    }
    // And the plan is that of weights and caches that lie so.
    for (std::deque<Stored>* list : {&token.weights, &token.caches})
        for (Stored& s : *list) {
            if (!s.is_sharded()) continue;
            const Stored before = s;
            Ranges& ranges = s.format ? s.sharding.ranges : s.extent->ranges;
            std::rotate(ranges.begin(), ranges.begin() + 1, ranges.end());
            refused(right, right.steps[0], (s.name + " lies otherwise").c_str());
            s = before;
            (s.format ? s.sharding.ranges : s.extent->ranges).back().end = s.bytes + 1;
            refused(right, right.steps[0], (s.name + " is larger than itself").c_str());
            s = before;
        }
    expect(n_broken > 100, "hardly a plan was broken");
}

int main(int, char** argv) {
    std::mt19937 rng(static_cast<unsigned>(std::atoi(argv[1])));
    for (int i = 0; i < 2000; ++i) check_divide(rng), check_heads(rng), check_views(rng), check_segments(rng), check_planes(rng);
    check_verifier();
    for (const Kind kind : {Kind::kPlain, Kind::kExperts, Kind::kFused, Kind::kStates}) check_broken_plans(kind, std::array{2, 3, 5, 7, 16}[rng() % 5]);
    return faults > 100 ? 100 : faults;
}
