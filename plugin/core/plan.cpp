#include "plan.h"

#include <algorithm>
#include <cstring>
#include <set>

#include "rules.h"

namespace ggml_tp {
namespace {

using abi::Op;

/// Walks backwards from each attention to the weights, biases and caches that feed it, and asks for whole heads.
class Demands {
  public:
    Demands(const Graph& graph, int n_ranks, const std::vector<double>& split) : graph_(graph), n_ranks_(n_ranks), split_(split) {
        for (int id : graph.nodes) {
            const Tensor& t = graph.tensors[id];
            if (t.op == Op::FLASH_ATTN_EXT) attention(t.src[0], t.src[1], t.src[2]);
            if (t.op == Op::SOFT_MAX) unfused(t);
            if (t.op == Op::GLU) gate_and_up(t);
        }
        for (auto& [root, parts] : parts_) side_by_side(at(root), parts);
    }
    std::vector<Want> wants;

  private:
    struct Part {
        Ranges ranges;
        i64 size;
    };
    const Tensor& at(int id) const { return graph_.tensors[id]; }

    void attention(int q, int k, int v) {
        const HeadPartition heads = divide_heads(at(q).ne[2], at(k).ne[2], n_ranks_, split_);
        demand(q, sharded(2, heads.q));
        demand(k, sharded(2, heads.kv));
        demand(v, sharded(2, heads.kv));
    }

    // softmax(K·Q) · V as separate products: the soft max's input comes from K·Q, its only product reader is V.
    void unfused(const Tensor& soft_max) {
        int product = soft_max.src[0];
        for (int steps = 0; steps < 4 && product >= 0 && at(product).op != Op::MUL_MAT; ++steps) product = at(product).src[0];
        if (product < 0 || at(product).op != Op::MUL_MAT) return;
        for (int id : graph_.nodes) {
            const Tensor& t = at(id);
            if (t.op == Op::MUL_MAT && t.src[1] >= 0 && at(t.src[1]).root == soft_max.id) return attention(at(product).src[1], at(product).src[0], t.src[0]);
        }
    }

    // Both of a GLU in one product's row, in halves or as views: each half is divided as the product that reads the GLU is.
    void gate_and_up(const Tensor& glu) {
        const Tensor& first = at(at(glu.src[0]).root);
        if (glu.src[1] >= 0 && at(glu.src[1]).root != first.id) return;
        for (int id : graph_.nodes) {
            const Tensor& t = at(id);
            if ((t.op != Op::MUL_MAT && t.op != Op::MUL_MAT_ID) || at(t.src[1]).root != glu.id) continue;
            const Stored* w = at(t.src[0]).stored;
            if (!w || w->sharding.kind != Sharding::kSharded || w->sharding.axis != 0) continue;
            if (glu.src[1] < 0) {
                part(first, w->sharding.ranges, glu.ne[0]);
                part(first, moved(w->sharding.ranges, glu.ne[0]), glu.ne[0]);
            } else {
                demand(glu.src[0], sharded(0, w->sharding.ranges));
                demand(glu.src[1], sharded(0, w->sharding.ranges));
            }
            return;
        }
    }

    // `ranges` of `size` elements of each row of `root`, which the rest of the row is divided apart from. Kept until all parts are known.
    void part(const Tensor& root, const Ranges& ranges, i64 size) {
        if (!root.is_node || root.stored) return;
        switch (root.op) {
            case Op::MUL_MAT:
            case Op::MUL_MAT_ID: {
                std::vector<Part>& parts = parts_[root.id];
                const auto same = [&](const Part& other) { return other.ranges == ranges; };
                if (std::none_of(parts.begin(), parts.end(), same)) parts.push_back({ranges, size});
                break;
            }
            case Op::ADD:
            case Op::MUL:
            case Op::CLAMP:
            case Op::SCALE:
            case Op::CONT: {
                const Tensor& source = at(root.src[0]);
                if (source.root == source.id && std::equal(root.ne, root.ne + 4, source.ne)) part(source, ranges, size);
                break;
            }
            default: break;
        }
    }

    void side_by_side(const Tensor& product, std::vector<Part>& parts) {
        const Tensor& weight = at(product.src[0]);
        Stored* w = weight.stored;
        if (!w || !w->format || weight.offset != 0 || w->confirmed) return;
        auto begin = [](const Part& part) { return part.ranges.front().begin; };
        std::sort(parts.begin(), parts.end(), [&](const Part& a, const Part& b) { return begin(a) < begin(b); });
        i64 next = 0;
        for (const Part& part : parts) {
            if (begin(part) != next) return;
            next += part.size;
        }
        if (next != product.ne[0]) return;
        Sharding wanted = sharded(1, parts.front().ranges);
        for (size_t i = 1; i < parts.size(); ++i) wanted.rest.push_back(parts[i].ranges);
        if (w->sharding != wanted) wants.push_back({w, wanted, std::nullopt});
    }

    /// Where a view of less than a row of its root lies within that row.
    std::optional<Ranges> within_row(const Tensor& t, const Sharding& sharding) const {
        const Tensor& root = at(t.root);
        const i64 unit = t.nb[sharding.axis], row = root.nb[1], start = t.offset % row;
        if (t.root == t.id || root.nb[0] != 4 || unit % 4 || t.offset % 4 || start + unit * t.ne[sharding.axis] > row) return std::nullopt;
        if (unit * t.ne[sharding.axis] == row) return std::nullopt;
        for (int d = 0; d < 4; ++d) {
            if (d == sharding.axis || t.ne[d] == 1) continue;
            if (t.nb[d] < unit ? t.nb[d] * t.ne[d] > unit : t.nb[d] % row != 0) return std::nullopt;
        }
        return moved(scaled(sharding.ranges, unit / 4), start / 4);
    }

    void demand(int id, const Sharding& sharding) {
        const Tensor& t = at(id);
        if (!t.stored)
            if (const auto ranges = within_row(t, sharding)) return part(at(t.root), *ranges, t.ne[sharding.axis] * t.nb[sharding.axis] / 4);
        const auto extent = extent_of(sharding, t.strided());
        if (!extent) return;
        if (t.stored) return demand_stored(t, *extent);
        const Tensor& root = at(t.root);
        const auto on_root = sharding_of(*extent, root.strided());
        if (!on_root || !root.is_node) return;
        switch (root.op) {
            case Op::MUL_MAT:
                if (on_root->axis == 2) demand(root.src[1], *on_root);  // a matrix for each head
                if (on_root->axis == 0 && root.src[0] >= 0)
                    if (Stored* w = at(root.src[0]).stored; w && w->format && at(root.src[0]).offset == 0 && !w->confirmed)
                        if (w->sharding != sharded(1, on_root->ranges)) wants.push_back({w, sharded(1, on_root->ranges), std::nullopt});
                break;
            case Op::ADD:
            case Op::MUL:
                demand(root.src[0], *on_root);
                if (at(root.src[1]).ne[on_root->axis] == root.ne[on_root->axis]) demand(root.src[1], *on_root);
                break;
            case Op::CONCAT:
                if (on_root->axis == root.params[0]) break;
                demand(root.src[0], *on_root);
                demand(root.src[1], *on_root);
                break;
            case Op::ROPE:
            case Op::RMS_NORM:
            case Op::NORM:
            case Op::SCALE: demand(root.src[0], *on_root); break;
            case Op::CONT:
            case Op::CPY:
            case Op::DUP:
                if (std::equal(root.ne, root.ne + 4, at(root.src[0]).ne)) demand(root.src[0], *on_root);
                break;
            default: break;
        }
    }

    void demand_stored(const Tensor& t, const Extent& extent) {
        Stored* stored = t.stored;
        if (!stored->format && !stored->confirmed && stored->extent != extent && stored->bytes % extent.period_bytes == 0)
            wants.push_back({stored, replicated(), extent});
        // What is written into a cache is divided in the same proportion.
        for (int id : graph_.nodes) {
            const Tensor& writer = at(id);
            if (writer.stored != stored || (writer.op != Op::SET_ROWS && writer.op != Op::CPY)) continue;
            const Tensor& written = at(writer.src[0]);
            const bool whole_rows = written.ne[0] == stored->ne[0];  // else the transposed V cache's single elements
            const Tensor& values = whole_rows ? written : at(written.root);
            if (values.stored || !at(written.root).is_node) continue;
            const i64 row = row_bytes_of(values, *stored);
            Extent same{row, extent.ranges};
            for (Range& range : same.ranges) {
                if (range.begin * row % extent.period_bytes || range.end * row % extent.period_bytes) return;
                range = {range.begin * row / extent.period_bytes, range.end * row / extent.period_bytes};
            }
            Strided side_by_side = values.strided();  // the rows may lie apart, in a row of Q, K and V
            side_by_side.offset = 0;
            for (int d = 1; d < 4; ++d) side_by_side.nb[d] = side_by_side.nb[d - 1] * side_by_side.ne[d - 1];
            if (const auto on_values = sharding_of(same, side_by_side)) demand(values.id, *on_values);
        }
    }

    // Bytes of one token's row of the values: as many elements as one cell of the cache has.
    static i64 row_bytes_of(const Tensor& values, const Stored& cache) {
        const WeightFormat* format = find_weight_format(values.type);
        return cache.ne[0] * (format ? format->block_bytes : 4);
    }

    const Graph& graph_;
    int n_ranks_;
    const std::vector<double>& split_;
    std::map<int, std::vector<Part>> parts_;  // by root: a product whose row has several things side by side
};

}  // namespace

HeadPartition divide_heads(i64 n_head, i64 n_head_kv, int n_ranks, const std::vector<double>& split) {
    HeadPartition out;
    const i64 group = n_head_kv > 0 && n_head % n_head_kv == 0 ? n_head / n_head_kv : 1;
    if (n_ranks <= n_head_kv) {
        out.kv = divide(n_head_kv, 1, n_ranks, split);
        out.q = scaled(out.kv, group);
        return out;
    }
    out.q = divide(n_head, 1, n_ranks, split);
    for (const Range& q : out.q) out.kv.push_back(q.size() ? Range{q.begin / group, (q.end + group - 1) / group} : Range{q.begin / group, q.begin / group});
    return out;
}

int Plan::count(PlanStep::Kind kind) const {
    return static_cast<int>(std::count_if(steps.begin(), steps.end(), [&](const PlanStep& s) { return s.kind == kind; }));
}

std::string Plan::to_text(const Graph& graph) const {
    std::string out = "plan for " + std::to_string(n_ranks) + " ranks\n";
    std::set<const Stored*> said;
    for (const Tensor& t : graph.tensors)
        if (t.stored && said.insert(t.stored).second) out += "stored " + t.stored->name + ": " + t.stored->to_text(n_ranks) + "\n";
    for (const PlanStep& step : steps) {
        const Tensor& t = graph.tensors[step.tensor];
        if (step.kind == PlanStep::kCompute) {
            out += abi::op_name(t.op);
            out += " " + t.name + ": " + step.output.to_text() + "\n";
        } else {
            out += step.kind == PlanStep::kAllReduce ? "  all_reduce " : "  all_gather ";
            out += t.name + " (" + std::to_string(t.bytes) + " bytes, f32): " + step.reason + "\n";
        }
    }
    for (const Survivor& s : survivors) out += std::string(s.extent.is_partial ? "  stays partial: " : "  stays sharded: ") + graph.tensors[s.root].name + "\n";
    return out;
}

PlanResult make_plan(const Graph& graph, int n_ranks, const std::vector<double>& split) {
    PlanResult result;
    result.plan.n_ranks = n_ranks;
    if (n_ranks > 1) {
        Demands demands(graph, n_ranks, split);
        result.wants = std::move(demands.wants);
        if (!result.wants.empty()) return result;
    }
    Propagation propagation(graph, n_ranks, split, result);
    for (int id : graph.nodes) {
        propagation.step(id);
        if (!result.wants.empty()) return result;
    }
    propagation.finish();
    return result;
}

Plan settle(const Graph& graph, int n_ranks, const std::vector<double>& split, const LayOut& lay_out) {
    // Each round settles at least one tensor, and an odd cut of heads takes a round per layer (8 rounds refused 3 ranks from 8 layers on).
    const size_t most_rounds = graph.tensors.size();
    for (size_t round = 0;; ++round) {
        PlanResult result = make_plan(graph, n_ranks, split);
        if (result.wants.empty()) return std::move(result.plan);
        if (round == most_rounds) throw Error("the graph's wishes for its weights contradict each other (a bug; please report the graph)");
        for (const Want& want : result.wants) {
            if (want.stored->confirmed) lay_out(*want.stored, replicated(), std::nullopt);  // asked twice in two ways: whole is right for both
            else lay_out(*want.stored, want.sharding, want.extent);
            want.stored->confirmed = true;
        }
    }
}

void verify(const Plan& plan, const Graph& graph) {
    std::vector<char> is_partial(graph.tensors.size(), 0);
    auto refuse = [&](const PlanStep& step, const char* why) {
        throw Error("the plan is wrong at " + graph.tensors[step.tensor].name + ": " + why + " (a bug; please report the graph)");
    };
    for (const PlanStep& step : plan.steps) {
        if (step.kind != PlanStep::kCompute) {
            if (step.kind == PlanStep::kAllReduce && !is_partial[step.tensor]) refuse(step, "all_reduce of what is no Partial");
            is_partial[step.tensor] = 0;
            continue;
        }
        const Tensor& t = graph.tensors[step.tensor];
        u32 partial_sources = 0;
        for (size_t i = 0; i < step.inputs.size(); ++i) {
            if (t.src[i] < 0) continue;
            const bool p = is_partial[graph.tensors[t.src[i]].root];
            if (p != (step.inputs[i].kind == Sharding::kPartial)) refuse(step, "a source's Partial is not accounted for");
            partial_sources |= u32{p} << i;
        }
        if (partial_sources && step.output.kind != Sharding::kPartial) refuse(step, "a Partial is read before its all_reduce");
        if (partial_sources && !may_pass_partial(t, partial_sources)) refuse(step, "an op that is not linear reads a Partial");
        if (step.output.kind == Sharding::kPartial && t.stored) refuse(step, "a Partial would be stored");
        if (step.output.kind == Sharding::kSharded) {
            if (static_cast<int>(step.output.ranges.size()) != plan.n_ranks) refuse(step, "ranges are missing");
            for (int s = 0; s < step.output.n_segments(); ++s)
                for (const Range& range : step.output.segment(s).ranges)
                    if (range.begin < 0 || range.end > t.ne[step.output.axis] || range.begin > range.end) refuse(step, "a range lies outside the tensor");
        }
        is_partial[t.root] = step.output.kind == Sharding::kPartial;
    }
    // A Partial that a later node of the graph wrote over is nobody's; what the host can still read must be settled, or known for what it is.
    for (const Plan::Survivor& s : plan.survivors)
        if (is_partial[s.root] != s.extent.is_partial)
            throw Error("the plan leaves " + graph.tensors[s.root].name + " as a Partial (a bug; please report the graph)");
}

}  // namespace ggml_tp
