#include "rules.h"

#include "recurrence.h"

#include <algorithm>
#include <cstring>

namespace ggml_tp {
namespace {

using abi::Op;

struct Decision {
    std::vector<Sharding> inputs;
    Sharding output;
    std::vector<Part> parts = {};  // of the result, where no Sharding of its shape says how it is divided
};
using Rule = Decision (*)(Propagation& p, const Tensor& t);

int n_sources(const Tensor& t) {
    int n = 0;
    for (int i = 0; i < 10; ++i)
        if (t.src[i] >= 0) n = i + 1;
    return n;
}

/// Everything whole on every rank, computed alike by all: right for any op.
Decision everywhere(Propagation& p, const Tensor& t) {
    Decision d;
    for (int i = 0; i < n_sources(t); ++i) {
        if (t.src[i] >= 0 && p.source(t, i).kind == Sharding::kSharded) p.gather(t, i, std::string(abi::op_name(t.op)) + " needs it whole");
        d.inputs.push_back(replicated());
    }
    return d;
}

/// The restriction of a source to the part that belongs to `wanted` of the output: whole along broadcast axes.
Sharding restricted(const Tensor& source, const Tensor& t, const Sharding& wanted) {
    return source.ne[wanted.axis] == t.ne[wanted.axis] ? wanted : replicated();
}

/// The decision for an op that is linear in its Partial sources while the others are whole; nullopt: there are none, or it is not.
std::optional<Decision> passes_partial(Propagation& p, const Tensor& t) {
    u32 partial_sources = 0;
    for (int i = 0; i < n_sources(t); ++i) partial_sources |= u32{p.is_partial(t, i)} << i;
    if (!partial_sources || !may_pass_partial(t, partial_sources)) return std::nullopt;
    if (t.op == Op::ADD && partial_sources != 3 && (!std::equal(t.ne, t.ne + 4, p.at(t.src[partial_sources - 1]).ne) || !p.meets_partial(t)))
        return std::nullopt;
    Decision d{{}, partial()};
    for (int i = 0; i < n_sources(t); ++i) {
        d.inputs.push_back(p.source(t, i, true));
        if (d.inputs.back().kind == Sharding::kSharded) return std::nullopt;
    }
    return d;
}

/// Element by element, sources broadcast over the output.
Decision element_wise(Propagation& p, const Tensor& t) {
    const int n = n_sources(t);
    if (auto linear = passes_partial(p, t)) return *linear;
    Sharding wanted;
    for (int i = 0; i < n; ++i) {
        const Sharding s = p.segmented_source(t, i);
        const Tensor& source = p.at(t.src[i]);
        if (s.kind != Sharding::kSharded || wanted.kind == Sharding::kSharded) continue;
        if (source.ne[s.axis] == t.ne[s.axis]) wanted = s;
    }
    if (wanted.kind != Sharding::kSharded) return everywhere(p, t);
    Decision d{{}, wanted};
    for (int i = 0; i < n; ++i) {
        const Sharding s = p.segmented_source(t, i);
        const Tensor& source = p.at(t.src[i]);
        const Sharding need = restricted(source, t, wanted);
        const bool repeats = source.ne[wanted.axis] != t.ne[wanted.axis] && source.ne[wanted.axis] != 1;
        if (s.kind == Sharding::kSharded && s != need) {
            if (source.stored && !source.stored->confirmed && need.kind == Sharding::kSharded && !source.stored->format) {
                p.want(source.stored, replicated(), extent_of(need, source.strided()));
                return d;
            }
            return everywhere(p, t);
        }
        if (repeats) return everywhere(p, t);
        d.inputs.push_back(need);
    }
    return d;
}

/// Shape-preserving copies; a copy that also regroups axes maps through the order of elements.
Decision copies(Propagation& p, const Tensor& t) {
    // Of a part (dt of Mamba-1, beside B and C) the rest has readers of its own: one all_reduce for all of them.
    if (t.op == Op::CONT && p.at(t.src[0]).elems() == p.at(p.at(t.src[0]).root).elems())
        if (auto linear = passes_partial(p, t)) return *linear;
    const Tensor& x = p.at(t.src[0]);
    Sharding s = p.segmented_source(t, 0);
    Decision d{{s, replicated()}, s};
    d.inputs.resize(static_cast<size_t>(n_sources(t)));
    if (s.kind == Sharding::kSharded && !std::equal(x.ne, x.ne + 4, t.ne)) {
        Strided from{{x.ne[0], x.ne[1], x.ne[2], x.ne[3]}, {}, 0, 1}, to{{t.ne[0], t.ne[1], t.ne[2], t.ne[3]}, {}, 0, 1};
        i64 a = 1, b = 1;
        for (int i = 0; i < 4; ++i) from.nb[i] = a, a *= from.ne[i], to.nb[i] = b, b *= to.ne[i];
        const auto extent = extent_of(s, from);
        const auto out = extent ? sharding_of(*extent, to) : std::nullopt;
        // The local elements, in order, must be the local output's elements: true exactly when the map exists both ways.
        if (!out || extent_of(*out, to) != extent) return everywhere(p, t);
        d.output = *out;
    }
    return d;
}

/// Ops along ne[0] that leave the other axes alone; `axis` is the only one that may stay divided (-1: any above 0).
Decision along_rows(Propagation& p, const Tensor& t, int axis) {
    const Sharding s = p.source(t, 0);
    if (s.kind != Sharding::kSharded || s.axis == 0 || (axis >= 0 && s.axis != axis)) return everywhere(p, t);
    Decision d{{s}, s};
    for (int i = 1; i < n_sources(t); ++i) {
        if (t.src[i] >= 0 && p.source(t, i).kind == Sharding::kSharded) p.gather(t, i, "a side input is needed whole");
        d.inputs.push_back(replicated());
    }
    return d;
}
Decision norm(Propagation& p, const Tensor& t) { return along_rows(p, t, -1); }
/// Of divided rows the mean is one of all ranks' sums: four bytes a row go from rank to rank instead of the row.
Decision rms_norm(Propagation& p, const Tensor& t) {
    const Sharding s = p.source(t, 0);
    if (s.kind != Sharding::kSharded || s.axis > 0 || p.is_by_name_alone(t, 0)) return norm(p, t);
    p.sum_squares(t, s);
    return {{s}, s};
}
Decision rope(Propagation& p, const Tensor& t) { return along_rows(p, t, 1); }
Decision soft_max(Propagation& p, const Tensor& t) { return along_rows(p, t, 2); }

Decision glu(Propagation& p, const Tensor& t) {
    if (t.src[1] >= 0) return element_wise(p, t);
    // Both halves in one row: the row is needed whole, or each half divided alike.
    const Sharding s = p.segmented_source(t, 0);
    if (s.kind == Sharding::kSharded && s.axis == 0 && s.n_segments() == 2 && s.rest[0] == moved(s.ranges, t.ne[0])) return {{s}, sharded(0, s.ranges)};
    return s.kind == Sharding::kSharded && s.axis > 0 && s.n_segments() == 1 ? Decision{{s}, s} : everywhere(p, t);
}

/// (k n, k m) -> (n m): a division of n passes on, a division of k makes the product Partial.
std::optional<Decision> product(Propagation& p, const Tensor& t) {
    const Tensor& w = p.at(t.src[0]);
    Sharding sw = p.segmented_source(t, 0), sx = p.source(t, 1);
    if (sw.kind == Sharding::kSharded && sw.axis == 1) {
        if (sx.kind == Sharding::kSharded) p.gather(t, 1, "a column-parallel product reads all of its input");
        return Decision{{sw, replicated()}, sharded(0, sw.ranges, sw.rest)};
    }
    int i = 0;
    for (Sharding* s : {&sw, &sx}) {
        if (s->kind == Sharding::kSharded && s->axis == 0 && overlap(*s)) {  // KV heads
            p.gather(t, i, "two ranks hold a part of it, which would be summed twice");
            *s = replicated();
        }
        ++i;
    }
    if (sx.kind == Sharding::kSharded && sx.axis == 0 && w.stored && w.stored->format) {
        if (sw != sx && !w.stored->confirmed) {
            p.want(w.stored, sx, std::nullopt);
            return Decision{{sw, sx}, partial()};
        }
        if (sw == sx) return Decision{{sw, sx}, partial()};
    }
    if (sw.kind == Sharding::kSharded && sw.axis == 0) {
        if (sx.kind == Sharding::kSharded && sx != sw) p.gather(t, 1, "its division differs from the weight's");
        return Decision{{sw, sw}, partial()};
    }
    return std::nullopt;
}

/// A product whose batches follow their heads.
Decision mul_mat(Propagation& p, const Tensor& t) {
    if (const auto d = product(p, t)) return *d;
    const Tensor &w = p.at(t.src[0]), &x = p.at(t.src[1]);
    const Sharding sw = p.source(t, 0), sx = p.source(t, 1);
    const i64 ratio = w.ne[2] ? x.ne[2] / w.ne[2] : 1;
    if (sx.kind == Sharding::kSharded && sx.axis == 2 && x.ne[3] == w.ne[3]) {
        bool held = true;
        if (sw.kind == Sharding::kSharded) {
            held = sw.axis == 2;
            for (size_t r = 0; held && r < sx.ranges.size(); ++r)
                if (sx.ranges[r].size()) held = sx.ranges[r].begin / ratio >= sw.ranges[r].begin && (sx.ranges[r].end - 1) / ratio < sw.ranges[r].end;
        }
        if (held) return {{sw, sx}, sharded(2, sx.ranges)};
    }
    if (sx.kind == Sharding::kSharded && (sx.axis == 1) && sw.kind == Sharding::kReplicated) return {{sw, sx}, sharded(1, sx.ranges)};
    return everywhere(p, t);
}

/// Experts: a product for each of a token's slots, whose experts every rank must know.
Decision mul_mat_id(Propagation& p, const Tensor& t) {
    if (p.source(t, 2).kind == Sharding::kSharded) p.gather(t, 2, "the experts' numbers are read whole");
    auto d = product(p, t);
    if (!d) return everywhere(p, t);
    d->inputs.push_back(replicated());
    return *d;
}

/// Biases of experts, b [n, n_expert]: divided as the sum is, or added to one summand of a Partial.
Decision add_id(Propagation& p, const Tensor& t) {
    if (const auto linear = passes_partial(p, t)) return *linear;
    if (p.source(t, 2).kind == Sharding::kSharded) p.gather(t, 2, "the experts' numbers are read whole");
    const Sharding s = p.source(t, 0), bias = p.source(t, 1);
    if (s.kind != Sharding::kSharded || s.axis != 0 || (bias.kind == Sharding::kSharded && bias != s)) return everywhere(p, t);
    return {{s, s, replicated()}, s};
}

Decision flash_attn(Propagation& p, const Tensor& t) {
    const Tensor &q = p.at(t.src[0]), &k = p.at(t.src[1]);
    const HeadPartition heads = divide_heads(q.ne[2], k.ne[2], p.n_ranks, p.split);
    const Sharding sk = p.source(t, 1), sv = p.source(t, 2);
    Sharding sq = p.source(t, 0);
    const Sharding want_q = sharded(2, heads.q), want_kv = sharded(2, heads.kv);
    const bool kv_fits = (sk == want_kv || sk.kind == Sharding::kReplicated) && (sv == want_kv || sv.kind == Sharding::kReplicated);
    const bool anything = sq.kind == Sharding::kSharded || sk.kind == Sharding::kSharded || sv.kind == Sharding::kSharded;
    if (!anything || !kv_fits || (sq.kind == Sharding::kSharded && sq != want_q)) return everywhere(p, t);
    Decision d{{want_q, sk.kind == Sharding::kSharded ? sk : want_kv, sv.kind == Sharding::kSharded ? sv : want_kv}, sharded(1, heads.q)};
    for (int i = 3; i < n_sources(t); ++i) {
        if (t.src[i] >= 0 && p.source(t, i).kind == Sharding::kSharded) p.gather(t, i, "the mask is read whole");
        d.inputs.push_back(replicated());
    }
    return d;
}

/// Side by side along one axis: a division of another one passes on, what is whole is cut to it.
Decision concat(Propagation& p, const Tensor& t) {
    const Sharding a = p.segmented_source(t, 0), b = p.segmented_source(t, 1);
    const Sharding& s = a.kind == Sharding::kSharded ? a : b;
    const bool alike = a == b || a.kind == Sharding::kReplicated || b.kind == Sharding::kReplicated;
    if (s.kind != Sharding::kSharded || !alike || s.axis == t.params[0]) return everywhere(p, t);
    return {{s, s}, s};
}

Decision get_rows(Propagation& p, const Tensor& t) {
    const Sharding s = p.segmented_source(t, 0);
    if (p.source(t, 1).kind == Sharding::kSharded) return everywhere(p, t);
    if (s.kind == Sharding::kSharded && s.axis == 0 && !(p.at(t.src[0]).stored && p.at(t.src[0]).stored->format)) return {{s, replicated()}, s};
    return everywhere(p, t);
}

/// Into a cache as it lies. In the transposed V cache every element is a row of its own: each rank writes the rows that it holds.
Decision set_rows(Propagation& p, const Tensor& t) {
    Stored* cache = t.stored;
    if (!cache || !cache->extent) return everywhere(p, t);
    if (p.source(t, 1).kind == Sharding::kSharded) p.gather(t, 1, "row numbers are read whole");
    if (const auto lies = sharding_of(*cache->extent, t.strided()); lies && lies->axis == 0) {
        const Sharding s = p.source(t, 0);
        if (s.kind == Sharding::kSharded && s != *lies) p.gather(t, 0, "its division differs from the cache's");
        return {{*lies, replicated()}, *lies};
    }
    // Rows are divided: sources are taken as they lie, a rank skips the rows of others.
    if (!p.in_proportion(t, 0, *cache->extent) && p.source(t, 0).kind == Sharding::kSharded) p.gather(t, 0, "rows of the cache are divided otherwise");
    return {{replicated(), replicated()}, replicated()};
}

/// Whether each rank has all of `part` (or none is asked of it) where the tensor is divided as `s`.
bool holds(const Sharding& s, const Sharding& part) {
    if (s.kind == Sharding::kReplicated) return true;
    if (s.kind != Sharding::kSharded || s.axis != part.axis || s.n_segments() != 1) return false;
    for (size_t r = 0; r < s.ranges.size(); ++r)
        if (part.ranges[r].size() && (part.ranges[r].begin < s.ranges[r].begin || part.ranges[r].end > s.ranges[r].end)) return false;
    return true;
}

/// Heads do not see each other: each rank computes those whose values it has.
Decision recurrent(Propagation& p, const Tensor& t) {
    const Recurrence& op = *recurrence_of(t.op);
    const RecurrentHeads heads(p.graph, t);
    const Sharding values = p.source(t, op.values);
    if (values.kind != Sharding::kSharded || values.axis != op.sources[op.values].axis) return everywhere(p, t);
    Decision d{{}, heads.y(values.ranges), heads.parts(values.ranges)};
    for (int i = 0; i < n_sources(t); ++i) {
        const auto need = heads.needs(i, values.ranges);
        if (!need) return everywhere(p, t);
        if (!holds(p.source(t, i), *need)) p.gather(t, i, "its heads are divided otherwise");
        d.inputs.push_back(*need);
    }
    return d;
}

/// Channels by channels: (taps + tokens, channels), (taps, channels) -> (channels, tokens).
Decision ssm_conv(Propagation& p, const Tensor& t) {
    const Sharding x = p.segmented_source(t, 0);
    if (x.kind != Sharding::kSharded || x.axis != 1) return everywhere(p, t);
    if (const Sharding w = p.segmented_source(t, 1); w.kind == Sharding::kSharded && w != x) return everywhere(p, t);
    return {{x, x}, sharded(0, x.ranges, x.rest)};
}

/// Heads that several others share, each as often as these are: a division of an axis that is not repeated passes on.
Decision repeat(Propagation& p, const Tensor& t) {
    const Sharding s = p.source(t, 0);
    if (s.kind != Sharding::kSharded || p.at(t.src[0]).ne[s.axis] != t.ne[s.axis]) return everywhere(p, t);
    return {{s}, s};
}

struct Row {
    Op op;
    Rule rule;
};
constexpr Row kRules[] = {
    {Op::ADD, element_wise},
    {Op::SUB, element_wise},
    {Op::MUL, element_wise},
    {Op::DIV, element_wise},
    {Op::SCALE, element_wise},
    {Op::UNARY, element_wise},
    {Op::CLAMP, element_wise},
    {Op::SQR, element_wise},
    {Op::SQRT, element_wise},
    {Op::ADD_ID, add_id},
    {Op::ADD1, element_wise},
    {Op::LOG, element_wise},
    {Op::SIN, element_wise},
    {Op::COS, element_wise},
    {Op::LEAKY_RELU, element_wise},
    {Op::GLU, glu},
    {Op::CPY, copies},
    {Op::CONT, copies},
    {Op::DUP, copies},
    {Op::RMS_NORM, rms_norm},
    {Op::NORM, norm},
    {Op::L2_NORM, norm},
    {Op::ROPE, rope},
    {Op::ROPE_BACK, rope},
    {Op::SOFT_MAX, soft_max},
    {Op::ARGSORT, norm},
    {Op::TOP_K, norm},
    {Op::SUM_ROWS, norm},
    {Op::MUL_MAT, mul_mat},
    {Op::MUL_MAT_ID, mul_mat_id},
    {Op::FLASH_ATTN_EXT, flash_attn},
    {Op::CONCAT, concat},
    {Op::GET_ROWS, get_rows},
    {Op::SET_ROWS, set_rows},
    {Op::REPEAT, repeat},
    {Op::SSM_CONV, ssm_conv},
    {Op::SSM_SCAN, recurrent},
    {Op::GATED_DELTA_NET, recurrent},
    {Op::GATED_LINEAR_ATTN, recurrent},
    {Op::RWKV_WKV6, recurrent},
    {Op::RWKV_WKV7, recurrent},
};

/// What every rank has whole is not divided.
Sharding as_it_lies(Sharding s, const Tensor& t) {
    if (s.kind != Sharding::kSharded || s.n_segments() != 1) return s;
    return is_whole(s.ranges, t.ne[s.axis]) ? replicated() : s;
}

Rule rule_of(Op op) {
    for (const Row& row : kRules)
        if (row.op == op) return row.rule;
    return everywhere;
}

}  // namespace

bool may_pass_partial(const Tensor& t, u32 partial_sources) {
    // Not GET_ROWS: the rows would be summed for their readers, and the Partial that they came from once more for the host, which may read
    // whatever nothing wrote over (seen: 5 all_reduces for 4 in a host that does not reuse that memory).
    switch (t.op) {
        case Op::SCALE: return t.param_f32(1) == 0.0f;
        case Op::CONT: return t.type == kF32;
        case Op::ADD: return partial_sources != 0;  // what is whole is added by one rank
        case Op::SUB: return partial_sources == 3;
        case Op::MUL: return partial_sources == 1 || partial_sources == 2;  // by a whole factor: the weights of experts
        case Op::ADD_ID: return partial_sources == 1;                       // one rank adds the bias
        default: return false;
    }
}

Propagation::Propagation(const Graph& graph_in, int n_ranks_in, const std::vector<double>& split_in, PlanResult& result)
    : graph(graph_in),
      n_ranks(n_ranks_in),
      split(split_in),
      result_(result),
      states_(graph_in.tensors.size()),
      passed_on_(graph_in.tensors.size()),
      computed_(graph_in.tensors.size()) {
    for (const Tensor& t : graph.tensors) {
        if (t.root != t.id || t.stored || !t.buffer || t.is_node) continue;
        for (const Residency& r : t.buffer->residency)
            if (static_cast<i64>(t.address - t.buffer->base) == r.offset && t.bytes == r.bytes)
                states_[t.id] = {r.extent.is_partial ? Sharding::kPartial : Sharding::kSharded, {{{0, t.bytes}, r.extent}}};
    }
}

bool Propagation::is_partial(const Tensor& t, int i) const {
    return t.src[i] >= 0 && !at(t.src[i]).stored && states_[at(t.src[i]).root].kind == Sharding::kPartial;
}

bool Propagation::will_be_partial(const Tensor& t) const {
    const Tensor& root = at(t.root);
    if (states_[root.id].kind == Sharding::kPartial) return true;
    if (computed_[root.id] || !root.is_node) return false;
    if (root.op == Op::ADD) return will_be_partial(at(root.src[0])) || will_be_partial(at(root.src[1]));  // with a bias
    if (root.op != Op::MUL_MAT && root.op != Op::MUL_MAT_ID) return false;
    const Stored* w = at(root.src[0]).stored;
    return w && w->sharding.kind == Sharding::kSharded && w->sharding.axis == 0;
}

bool Propagation::meets_partial(const Tensor& t) const {
    const Tensor* reader = nullptr;
    int n_readers = 0, other = -1;
    for (int id : graph.nodes)
        for (int i = 0; i < 10; ++i)
            if (at(id).src[i] >= 0 && at(at(id).src[i]).root == t.root) reader = &at(id), ++n_readers, other = 1 - i;
    if (n_readers != 1 || reader->op != Op::ADD || !std::equal(t.ne, t.ne + 4, reader->ne)) return false;
    return will_be_partial(at(reader->src[other])) || meets_partial(*reader);
}

bool Propagation::in_proportion(const Tensor& t, int i, const Extent& cache) const {
    const State& state = states_[at(t.src[i]).root];
    if (at(t.src[i]).stored || state.kind != Sharding::kSharded || state.parts.size() != 1 || !state.parts[0].extent.rest.empty()) return false;
    const Extent& extent = state.parts[0].extent;
    for (size_t r = 0; r < cache.ranges.size(); ++r)
        if (extent.ranges[r].begin * cache.period_bytes != cache.ranges[r].begin * extent.period_bytes ||
            extent.ranges[r].end * cache.period_bytes != cache.ranges[r].end * extent.period_bytes)
            return false;
    return true;
}

void Propagation::want(Stored* stored, const Sharding& sharding, const std::optional<Extent>& extent) { result_.wants.push_back({stored, sharding, extent}); }

void Propagation::reduce(int root, const std::string& reason) {
    result_.plan.steps.push_back({PlanStep::kAllReduce, root, {}, {}, {}, reason});
    states_[root] = {};
}

Sharding Propagation::source(const Tensor& t, int i, bool allow_partial) {
    if (is_partial(t, i)) {
        if (allow_partial) {
            passed_on_[at(t.src[i]).root] = 1;
            return partial();
        }
        reduce(at(t.src[i]).root, std::string(abi::op_name(t.op)) + " reads the sum");
    }
    const Sharding s = lies(t, i);
    if (s.n_segments() == 1) return s;
    gather(t, i, std::string(abi::op_name(t.op)) + " reads across segments");
    return replicated();
}

Sharding Propagation::segmented_source(const Tensor& t, int i) {
    if (is_partial(t, i)) return source(t, i);
    return lies(t, i);
}

Sharding Propagation::lies(const Tensor& t, int i) {
    const Tensor& s = at(t.src[i]);
    if (s.stored) {
        if (s.stored->format) return s.stored->sharding;
        if (!s.stored->extent) return replicated();
        const auto lies = sharding_of(*s.stored->extent, s.strided());
        if (!lies) want(s.stored, replicated(), std::nullopt);
        return lies ? as_it_lies(*lies, s) : replicated();
    }
    const State& state = states_[s.root];
    if (state.kind == Sharding::kReplicated) return replicated();
    for (const Part& part : state.parts) {
        if (s.offset < part.bytes.begin || s.offset + s.bytes > part.bytes.end) continue;
        Strided within = s.strided();
        within.offset -= part.bytes.begin;
        if (const auto lies = sharding_of(part.extent, within)) return as_it_lies(*lies, s);
    }
    gather(t, i, "a view cuts across its division");
    return replicated();
}

Stored* Propagation::weight_of(const Tensor& t, int i) const {
    const Tensor& root = at(at(t.src[i]).root);
    return root.op == Op::MUL_MAT || root.op == Op::MUL_MAT_ID ? at(root.src[0]).stored : nullptr;
}

bool Propagation::is_by_name_alone(const Tensor& t, int i) const {
    const Stored* weight = weight_of(t, i);
    return weight && (weight->role == Role::kSegments || weight->role == Role::kMixer) && !weight->confirmed;
}

void Propagation::sum_squares(const Tensor& t, const Sharding& lies) {
    result_.plan.steps.push_back({PlanStep::kSumSquares, t.id, {lies}, {}, {}, std::string(abi::op_name(t.op)) + " of divided rows", {t.id}});
}

void Propagation::gather(const Tensor& t, int i, const std::string& reason) {
    const Tensor& s = at(t.src[i]);
    if (s.stored) return want(s.stored, replicated(), std::nullopt);
    State& state = states_[s.root];
    if (state.kind != Sharding::kSharded) return;
    // Segments or heads that are not those of the graph: whole on every rank, nothing is to be gathered.
    if (is_by_name_alone(t, i)) return want(weight_of(t, i), replicated(), std::nullopt);
    gather_parts(s.root, reason);
}

void Propagation::gather_parts(int root, const std::string& reason) {
    for (const Part& part : states_[root].parts) result_.plan.steps.push_back({PlanStep::kAllGather, root, {}, {}, part, reason});
    states_[root] = {};
}

void Propagation::step(int node) {
    const Tensor& t = at(node);
    Decision d;
    if (n_ranks == 1) {
        d.inputs.assign(static_cast<size_t>(n_sources(t)), replicated());
    } else if (t.stored && !t.stored->extent) {
        d = everywhere(*this, t);  // a tensor that every rank stores whole is written whole
    } else {
        d = rule_of(t.op)(*this, t);
    }
    if (n_ranks > 1 && t.stored && t.stored->extent && t.op != Op::SET_ROWS) {
        // The storage says how it is written: a whole result is cut to it, another division is gathered first.
        const auto lies = sharding_of(*t.stored->extent, t.strided());
        if (!lies) return want(t.stored, replicated(), std::nullopt);
        if (d.output != as_it_lies(*lies, t)) {
            const bool copied = (t.op == Op::CPY || t.op == Op::DUP || t.op == Op::CONT) && std::equal(t.ne, t.ne + 4, at(t.src[0]).ne);
            if (d.output.kind != Sharding::kReplicated || !copied) return want(t.stored, replicated(), std::nullopt);
            d.output = *lies;
            d.inputs[0] = *lies;
        }
    }
    const Tensor& root = at(t.root);
    if (!t.stored) {
        State& state = states_[t.root];
        State next{d.output.kind, d.parts};
        if (d.output.kind == Sharding::kSharded && d.parts.empty()) {
            const auto extent = extent_of(d.output, t.strided());
            if (!extent || root.bytes % extent->period_bytes) {
                d = everywhere(*this, t);
                next = {};
            } else if (is_whole(extent->ranges, extent->period_bytes)) {  // the only KV head, which every rank has
                d.output = replicated();
                next = {};
            } else {
                next.parts = {{{0, root.bytes}, *extent}};
            }
        }
        // Writing into a view leaves the rest of its root as it was: both must lie alike.
        if (t.root != t.id && t.bytes != root.bytes && state != next) {
            d = everywhere(*this, t);
            if (state.kind == Sharding::kPartial) reduce(t.root, "part of it is overwritten");
            if (state.kind == Sharding::kSharded) gather_parts(t.root, "part of it is overwritten");
            next = {};
        }
        states_[t.root] = next;
    }
    computed_[t.root] = 1;
    result_.plan.steps.push_back({PlanStep::kCompute, node, d.inputs, d.output, {}, {}});
}

void Propagation::finish() {
    // Memory is reused within a graph: only what nobody wrote over later survives.
    std::vector<int> order;
    for (const PlanStep& step : result_.plan.steps)
        if (step.kind == PlanStep::kCompute && !at(step.tensor).stored) order.push_back(at(step.tensor).root);
    std::vector<int> alive;
    for (int root : order) {
        const Tensor& t = at(root);
        std::erase_if(alive, [&](int other) {
            const Tensor& o = at(other);
            return o.buffer == t.buffer && o.address < t.address + static_cast<u64>(t.bytes) && t.address < o.address + static_cast<u64>(o.bytes);
        });
        alive.push_back(root);
    }
    for (int root : alive) {
        // What was passed on lives on in a sum; a host that reads it all the same gets the summands added up then.
        if (states_[root].kind == Sharding::kPartial && passed_on_[root]) {
            result_.plan.survivors.push_back({root, {{0, at(root).bytes}, {0, {}, true}}});
            continue;
        }
        if (states_[root].kind == Sharding::kPartial) reduce(root, "the host may read it");
        for (const Part& part : states_[root].parts) result_.plan.survivors.push_back({root, part});
    }
}

}  // namespace ggml_tp
