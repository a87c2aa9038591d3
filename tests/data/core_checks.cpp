// Checks of plugin/core that need no host and no device. usage: core_checks SEED; prints what is wrong, exits with the number of faults.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>

#include "memory.h"
#include "plan.h"
#include "rules.h"

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
        for (int f = 0; f < format.n_fields; ++f) expect(planes.plane_offset[f] % 256 == 0, "a plane is not aligned");
    }
}

/// c = rms_norm(a + b) with hand-written shardings.
Graph small_graph() {
    Graph graph;
    for (int id = 0; id < 4; ++id) {
        Tensor t;
        t.id = t.root = id;
        t.name = std::string(1, static_cast<char>('a' + id));
        t.bytes = 64;
        for (int d = 0; d < 4; ++d) t.ne[d] = d ? 1 : 16, t.nb[d] = d ? 64 : 4;
        for (int& source : t.src) source = -1;
        graph.tensors.push_back(t);
    }
    graph.tensors[2].op = abi::Op::ADD, graph.tensors[2].src[0] = 0, graph.tensors[2].src[1] = 1;
    graph.tensors[3].op = abi::Op::RMS_NORM, graph.tensors[3].src[0] = 2;
    for (int id : {2, 3}) graph.tensors[static_cast<size_t>(id)].is_node = true, graph.nodes.push_back(id);
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
    const PlanStep add = compute(2, {replicated(), replicated()}, replicated()), norm = compute(3, {replicated()}, replicated());
    expect(accepted(plan({add, norm}), graph), "a right plan is refused");
    expect(!accepted(plan({add, reduce(2), norm}), graph), "an all_reduce of what is whole is accepted");
    expect(!accepted(plan({compute(2, {partial(), replicated()}, partial()), reduce(2), norm}), graph), "an invented Partial is accepted");
    const PlanStep makes_partial = compute(2, {replicated(), replicated()}, partial());
    expect(accepted(plan({makes_partial, reduce(2), norm}), graph), "a reduced Partial is refused");
    expect(!accepted(plan({makes_partial, norm}), graph), "a norm of a Partial is accepted as if it were whole");
    expect(!accepted(plan({makes_partial, compute(3, {partial()}, partial())}), graph), "a norm passes a Partial on");
    expect(!accepted(plan({compute(2, {replicated(), replicated()}, sharded(0, {{0, 8}, {8, 17}})), norm}), graph), "a range outside the tensor is accepted");
    expect(!accepted(plan({compute(2, {replicated(), replicated()}, sharded(0, {{0, 16}})), norm}), graph), "ranges for too few ranks are accepted");
    const auto sum_of = [&](Ranges ranges) { return plan({compute(2, {sharded(0, ranges), sharded(0, ranges)}, partial()), reduce(2), norm}); };
    expect(accepted(sum_of({{0, 8}, {8, 16}}), graph), "a sum of shards is refused");
    expect(!accepted(sum_of({{0, 10}, {8, 16}}), graph), "a sum of shards that two ranks hold a part of is accepted");
    Plan left = plan({makes_partial});
    left.survivors.push_back({2, {}});
    expect(!accepted(left, graph), "a Partial that the host can read is accepted");
    left.survivors[0].part.extent.is_partial = true;
    expect(accepted(left, graph), "a Partial that reads will sum is refused");
    Graph product = graph;
    product.tensors[2].op = abi::Op::MUL;
    const PlanStep first = compute(0, {}, partial()), second = compute(1, {}, partial());
    expect(accepted(plan({first, compute(2, {partial(), replicated()}, partial()), reduce(2), norm}), product), "a scaled Partial is refused");
    expect(!accepted(plan({first, second, compute(2, {partial(), partial()}, partial()), reduce(2), norm}), product), "a product of Partials is accepted");
    expect(accepted(plan({first, compute(2, {partial(), replicated()}, partial()), reduce(2), norm}), graph), "a Partial to which one rank adds is refused");
    product.tensors[2].op = abi::Op::SUB;
    expect(!accepted(plan({first, compute(2, {partial(), replicated()}, partial()), reduce(2), norm}), product), "a Partial less a whole is accepted");
}

int main(int, char** argv) {
    std::mt19937 rng(static_cast<unsigned>(std::atoi(argv[1])));
    for (int i = 0; i < 2000; ++i) check_divide(rng), check_heads(rng), check_views(rng), check_segments(rng), check_planes(rng);
    check_verifier();
    return faults > 100 ? 100 : faults;
}
