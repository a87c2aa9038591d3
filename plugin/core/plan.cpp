#include "plan.h"

#include <algorithm>
#include <cstring>
#include <set>

#include "recurrence.h"
#include "rules.h"

namespace ggml_tp {
namespace {

using abi::Op;

/// Walks backwards from each attention and each recurrent op to the weights, biases and caches that feed it, and asks for whole heads.
class Demands {
  public:
    Demands(const Graph& graph, int n_ranks, const std::vector<double>& split) : graph_(graph), n_ranks_(n_ranks), split_(split) {
        bool has_states = false;
        for (int id : graph.nodes) {
            const Tensor& t = graph.tensors[id];
            if (t.op == Op::FLASH_ATTN_EXT) attention(t.src[0], t.src[1], t.src[2]);
            if (t.op == Op::SOFT_MAX) unfused(t);
            if (t.op == Op::GLU) gate_and_up(t);
            if (recurrence_of(t.op)) recurrent(t);
            has_states |= recurrence_of(t.op) != nullptr;
        }
        for (int id : graph.nodes)  // the only thing between two products: LFM2
            if (at(id).op == Op::SSM_CONV && !has_states) convolution(at(id));
        for (auto& [conv, parts] : channels_) states_of(at(conv), parts);
        for (auto& [root, parts] : parts_) side_by_side(at(root), parts);
    }
    std::vector<Want> wants;

  private:
    struct RowPart {
        Ranges ranges;
        i64 size;
    };
    const Tensor& at(int id) const { return graph_.tensors[id]; }

    /// Several readers may ask for the same.
    void want(Stored* stored, const Sharding& sharding, const std::optional<Extent>& extent) {
        const auto same = [&](const Want& w) { return w.stored == stored && w.sharding == sharding && w.extent == extent; };
        if (std::none_of(wants.begin(), wants.end(), same)) wants.push_back({stored, sharding, extent});
    }

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

    // Heads with a state: what comes in, the state, and what their results meet on the way out (gates).
    void recurrent(const Tensor& t) {
        const RecurrentHeads heads(graph_, t);
        const Ranges ranges = heads.divide(n_ranks_, split_);
        for (int i = 0; i < 7 && t.src[i] >= 0; ++i)
            if (const auto need = heads.needs(i, ranges); need && need->kind == Sharding::kSharded) demand(t.src[i], *need);
        follow(t.id, heads.parts(ranges).front());
    }

    void convolution(const Tensor& t) {
        const Sharding channels = sharded(0, divide_channels(t.ne[0], n_ranks_, split_));
        demand(t.id, channels);
        if (const auto extent = extent_of(channels, t.strided())) follow(t.id, {{0, t.bytes}, *extent});
    }

    /// From a divided result on to its readers: what is combined with it element by element is wanted as it is divided.
    void follow(int id, const Part& part) {
        for (const auto& [node, i] : readers_of(id)) {
            const Tensor &t = at(node), &s = at(t.src[i]);
            if (s.offset < part.bytes.begin || s.offset + s.bytes > part.bytes.end) continue;
            const auto lies = sharding_of(part.extent, s.strided());
            if (!lies || !std::equal(t.ne, t.ne + 4, s.ne) || t.stored || t.root != t.id) continue;
            switch (t.op) {
                case Op::RMS_NORM:
                case Op::NORM:
                case Op::L2_NORM:
                    if (lies->axis == 0) continue;
                    break;
                case Op::ADD:
                case Op::SUB:
                case Op::MUL:
                case Op::GLU:
                    if (const int other = t.src[1 - i]; other >= 0 && std::equal(t.ne, t.ne + 4, at(other).ne)) demand(other, *lies);
                    break;
                case Op::UNARY:
                case Op::SCALE:
                case Op::CONT: break;
                default: continue;
            }
            if (const auto extent = extent_of(*lies, t.strided())) follow(t.id, {{0, t.bytes}, *extent});
        }
    }
    /// Nodes that read a root, and as which source; of all roots once, when the first is asked for.
    const std::vector<std::pair<int, int>>& readers_of(int root) {
        if (readers_.empty()) {
            readers_.resize(graph_.tensors.size());
            for (int id : graph_.nodes)
                for (int i = 0; i < 10; ++i)
                    if (at(id).src[i] >= 0) readers_[static_cast<size_t>(at(at(id).src[i]).root)].push_back({id, i});
        }
        return readers_[static_cast<size_t>(root)];
    }

    /// What a convolution over tokens reads: the states of before and, behind them, values whose axes are exchanged. Both null: unknown.
    struct Conv {
        const Tensor *states = nullptr, *values = nullptr;
    };
    Conv conv_of(const Tensor& t) const {
        const Tensor& window = at(at(t.src[0]).root);
        if (window.id != t.src[0] || window.op != Op::CONCAT || window.params[0] != 0) return {};
        return {&at(window.src[0]), &at(window.src[1])};
    }
    // The states of a convolution are divided as its channels are, in segments where these are.
    void states_of(const Tensor& conv, std::vector<RowPart>& parts) {
        if (const auto ranges = whole_row(parts, conv.ne[0]))
            demand(conv_of(conv).states->id, sharded(1, ranges->front(), {ranges->begin() + 1, ranges->end()}));
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
            case Op::SSM_CONV: {
                const Tensor* values = conv_of(root).values;
                if (!values || values->nb[1] != 4 || at(values->root).nb[0] != 4) break;
                keep(channels_[root.id], ranges, size);
                part(at(values->root), moved(ranges, values->offset % at(values->root).nb[1] / 4), size);
                break;
            }
            case Op::MUL_MAT:
            case Op::MUL_MAT_ID:
            case Op::GET_ROWS: keep(parts_[root.id], ranges, size); break;
            case Op::UNARY:
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

    static void keep(std::vector<RowPart>& parts, const Ranges& ranges, i64 size) {
        const auto same = [&](const RowPart& other) { return other.ranges == ranges; };
        if (std::none_of(parts.begin(), parts.end(), same)) parts.push_back({ranges, size});
    }
    /// The ranges of parts in their order, when they are all of a row of n elements.
    static std::optional<std::vector<Ranges>> whole_row(std::vector<RowPart>& parts, i64 n) {
        auto begin = [](const RowPart& part) { return part.ranges.front().begin; };
        std::sort(parts.begin(), parts.end(), [&](const RowPart& a, const RowPart& b) { return begin(a) < begin(b); });
        std::vector<Ranges> out;
        i64 next = 0;
        for (const RowPart& part : parts) {
            if (begin(part) != next) return std::nullopt;
            next += part.size;
            out.push_back(part.ranges);
        }
        return next == n ? std::optional(out) : std::nullopt;
    }

    /// A weight whose product's row has several things, or a cache whose row has the states of several convolutions.
    void side_by_side(const Tensor& root, std::vector<RowPart>& parts) {
        const Tensor& weight = at(root.src[0]);
        Stored* w = weight.stored;
        const auto ranges = whole_row(parts, root.ne[0]);
        if (!w || !ranges) return;
        if (root.op == Op::GET_ROWS) return demand(weight.id, sharded(0, ranges->front(), {ranges->begin() + 1, ranges->end()}));
        if (!w->format || weight.offset != 0 || w->confirmed) return;
        const Sharding wanted = sharded(1, ranges->front(), {ranges->begin() + 1, ranges->end()});
        if (w->sharding != wanted) want(w, wanted, std::nullopt);
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
                        if (w->sharding != sharded(1, on_root->ranges, on_root->rest)) want(w, sharded(1, on_root->ranges, on_root->rest), std::nullopt);
                break;
            case Op::ADD:
            case Op::SUB:
            case Op::MUL:
                demand(root.src[0], *on_root);
                if (at(root.src[1]).ne[on_root->axis] == root.ne[on_root->axis]) demand(root.src[1], *on_root);
                break;
            case Op::CONCAT:
                if (on_root->axis == root.params[0]) break;
                demand(root.src[0], *on_root);
                demand(root.src[1], *on_root);
                break;
            case Op::RMS_NORM: demand(root.src[0], *on_root); break;
            case Op::ROPE:
            case Op::NORM:
            case Op::L2_NORM:
                if (on_root->axis > 0 || is_whole(on_root->ranges, root.ne[0])) demand(root.src[0], *on_root);  // else along what must be whole
                break;
            case Op::UNARY:
            case Op::SCALE: demand(root.src[0], *on_root); break;
            case Op::REPEAT:
                if (at(root.src[0]).ne[on_root->axis] == root.ne[on_root->axis]) demand(root.src[0], *on_root);
                break;
            case Op::GET_ROWS:
                if (on_root->axis == 0 && at(root.src[0]).stored) demand(root.src[0], *on_root);
                break;
            case Op::SSM_CONV:
                if (const Conv conv = conv_of(root); conv.values && on_root->axis == 0) {
                    demand(conv.values->id, sharded(1, on_root->ranges, on_root->rest));
                    demand(conv.states->id, sharded(1, on_root->ranges, on_root->rest));
                }
                break;
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
        if (!stored->format && !stored->confirmed && stored->extent != extent && stored->bytes % extent.period_bytes == 0) want(stored, replicated(), extent);
        // What is written into a cache is divided in the same proportion.
        if (stored->role != Role::kKvCache) return;
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
    std::map<int, std::vector<RowPart>> parts_;     // by root, a product or rows of a cache: several things side by side in a row
    std::map<int, std::vector<RowPart>> channels_;  // by convolution
    std::vector<std::vector<std::pair<int, int>>> readers_;
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

i64 PlanStep::bytes(const Graph& graph) const {
    const Tensor& t = graph.tensors[static_cast<size_t>(tensor)];
    switch (kind) {
        case kCompute: return 0;
        case kAllReduce: return t.bytes;
        case kAllGather: return part.bytes.size();
        case kSumSquares: return static_cast<i64>(norms.size()) * (t.elems() / t.ne[0]) * 4;
    }
    return 0;
}

std::string PlanStep::names(const Graph& graph) const {
    if (kind != kSumSquares) return graph.tensors[static_cast<size_t>(tensor)].name;
    std::string out;
    for (int norm : norms) out += (out.empty() ? "" : ", ") + graph.tensors[static_cast<size_t>(graph.tensors[static_cast<size_t>(norm)].src[0])].name;
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
            out += step.kind == PlanStep::kAllReduce ? "  all_reduce " : step.kind == PlanStep::kAllGather ? "  all_gather " : "  all_reduce of squares ";
            out += step.names(graph) + " (" + std::to_string(step.bytes(graph)) + " bytes, f32): " + step.reason + "\n";
        }
    }
    for (const Survivor& s : survivors)
        out += std::string(s.part.extent.is_partial ? "  stays partial: " : "  stays sharded: ") + graph.tensors[s.root].name + "\n";
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

}  // namespace ggml_tp
