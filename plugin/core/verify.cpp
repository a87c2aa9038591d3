// The plan's verifier. It knows what each op reads of its sources for a given part of its result (one row per op below, apart from the rules that made
// the plan), and follows what every rank holds of every tensor from step to step: the one must lie within the other.
#include <algorithm>
#include <set>
#include <string>

#include "plan.h"
#include "recurrence.h"
#include "rules.h"

namespace ggml_tp {
namespace {

using abi::Op;

// ---- ranges

/// What one rank has, or all of them have together, in order; neighbours joined.
Ranges joined(Ranges ranges) {
    std::erase_if(ranges, [](const Range& range) { return range.size() <= 0; });
    std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
    Ranges out;
    for (const Range& range : ranges) {
        if (out.empty() || range.begin > out.back().end) out.push_back(range);
        else out.back().end = std::max(out.back().end, range.end);
    }
    return out;
}
template <class Divided>  // a Sharding or an Extent
const Ranges& segment_of(const Divided& divided, int i) {
    return i == 0 ? divided.ranges : divided.rest[static_cast<size_t>(i) - 1];
}
template <class Divided>
Ranges of_rank(const Divided& divided, int rank) {
    Ranges out;
    for (int i = 0; i < divided.n_segments(); ++i) out.push_back(segment_of(divided, i)[static_cast<size_t>(rank)]);
    return joined(out);
}
/// Whether each of n elements (or bytes) has an owner.
template <class Divided>
bool has_owners(const Divided& divided, i64 n) {
    Ranges all;
    for (int i = 0; i < divided.n_segments(); ++i) all.insert(all.end(), segment_of(divided, i).begin(), segment_of(divided, i).end());
    return n == 0 || joined(all) == Ranges{{0, n}};
}
/// A range for each rank in each segment, all within n.
template <class Divided>
bool lies_within(const Divided& divided, int n_ranks, i64 n) {
    for (int i = 0; i < divided.n_segments(); ++i) {
        const Ranges& ranges = segment_of(divided, i);
        if (static_cast<int>(ranges.size()) != n_ranks) return false;
        for (const Range& range : ranges)
            if (range.begin < 0 || range.end > n || range.begin > range.end) return false;
    }
    return true;
}

/// Divided in name only: every rank has all.
Sharding plainly(const Sharding& s, const Tensor& t) {
    return s.kind == Sharding::kSharded && s.rest.empty() && is_whole(s.ranges, t.ne[s.axis]) ? replicated() : s;
}
/// The same elements on each rank, from the same one on.
bool alike(const Sharding& a_in, const Sharding& b_in, const Tensor& t) {
    const Sharding a = plainly(a_in, t), b = plainly(b_in, t);
    if (a.kind != b.kind || a.kind != Sharding::kSharded) return a.kind == b.kind;
    if (a.axis != b.axis || a.n_segments() != b.n_segments()) return false;
    for (int i = 0; i < a.n_segments(); ++i)
        for (size_t r = 0; r < segment_of(a, i).size(); ++r) {
            const Range &x = segment_of(a, i)[r], &y = segment_of(b, i)[r];
            if (x != y && x.size() + y.size() > 0) return false;
        }
    return true;
}
/// Whether every rank that has `held` of t has `wanted` of it too.
bool covers(const Sharding& held, const Sharding& wanted, const Tensor& t, int n_ranks) {
    if (held.kind == Sharding::kReplicated) return true;
    for (int r = 0; r < n_ranks; ++r) {
        const Ranges has = of_rank(held, r);
        if (has == Ranges{{0, t.ne[held.axis]}}) continue;
        if (wanted.kind != Sharding::kSharded) return false;
        for (const Range& want : of_rank(wanted, r)) {
            const auto within = [&](const Range& range) { return range.begin <= want.begin && want.end <= range.end; };
            if (wanted.axis != held.axis || std::none_of(has.begin(), has.end(), within)) return false;
        }
    }
    return true;
}

// ---- what ops read

/// What a step's kernel reads of one source.
struct Reads {
    enum How {
        kNothing,   // where it goes, which the host calls a source
        kAligned,   // from where its view begins: the view must be exactly this
        kSome,      // by numbers that count from the tensor's first element: any view that has this
        kAsStored,  // whose rows of a cache a rank holds: the same fraction of each row
        kUnknown,   // no kernel computes that part of the result
    } how = kUnknown;
    Sharding what = {};
};
Reads all() { return {Reads::kAligned, replicated()}; }
Reads exactly(Sharding s) { return {Reads::kAligned, std::move(s)}; }

struct Site {
    const Graph& graph;
    const PlanStep& step;
    const Tensor& t;
    const Sharding& out;
    const Tensor& source(int i) const { return graph.tensors[static_cast<size_t>(t.src[i])]; }
};
using Row = Reads (*)(const Site& s, int i);

/// Of a result that is not divided (a Partial neither, but for products): everything.
bool is_divided(const Site& s) { return s.out.kind == Sharding::kSharded; }

/// The elements of the result, or the only one along the axis.
Reads element_wise(const Site& s, int i) {
    if (!is_divided(s)) return all();
    const i64 n = s.source(i).ne[s.out.axis];
    if (n == s.t.ne[s.out.axis]) return exactly(s.out);
    return n == 1 ? all() : Reads{};
}
/// Rows of the first source, which know no other rows; what belongs to all of them besides.
Reads rows(const Site& s, int i) {
    if (!is_divided(s) || s.out.axis > 0) return i == 0 ? element_wise(s, i) : all();
    return {};
}
/// Whose sums of squares are added up before.
Reads rms_norm(const Site& s, int i) { return is_divided(s) && s.out.axis == 0 ? exactly(s.out) : rows(s, i); }
Reads rope(const Site& s, int i) { return is_divided(s) && s.out.axis != 1 ? Reads{} : rows(s, i); }      // positions are those of axis 2
Reads soft_max(const Site& s, int i) { return is_divided(s) && s.out.axis != 2 ? Reads{} : rows(s, i); }  // masks are those of axis 1
Reads glu(const Site& s, int i) {
    if (!is_divided(s) || s.t.src[1] >= 0 || s.out.axis > 0) return element_wise(s, i);
    return exactly(sharded(0, s.out.ranges, {moved(s.out.ranges, s.t.ne[0])}));  // both halves in one row
}
Reads copies(const Site& s, int i) {
    if (i > 0) return {Reads::kNothing};
    const Tensor& x = s.source(0);
    if (!is_divided(s) || std::equal(x.ne, x.ne + 4, s.t.ne)) return element_wise(s, 0);
    // Axes are regrouped, elements keep their order.
    Strided from{{x.ne[0], x.ne[1], x.ne[2], x.ne[3]}, {}, 0, 1}, to{{s.t.ne[0], s.t.ne[1], s.t.ne[2], s.t.ne[3]}, {}, 0, 1};
    i64 a = 1, b = 1;
    for (int d = 0; d < 4; ++d) from.nb[d] = a, a *= from.ne[d], to.nb[d] = b, b *= to.ne[d];
    const auto extent = extent_of(s.out, to);
    const auto read = extent ? sharding_of(*extent, from) : std::nullopt;
    return read && extent_of(*read, from) == extent ? exactly(*read) : Reads{};
}
/// (k n, k m) -> (n m). A Partial is made of what is divided along k, each summand being some rank's and only its.
Reads product(const Site& s, int i) {
    if (i > 1) return all();  // the experts' numbers
    const Sharding& k = s.step.inputs[0];
    if (s.out.kind == Sharding::kPartial) {
        const bool divides = k.kind == Sharding::kSharded && k.axis == 0 && k.rest.empty() && !overlap(k) && has_owners(k, s.source(0).ne[0]);
        return divides ? exactly(k) : Reads{};
    }
    if (!is_divided(s)) return all();
    if (s.out.axis == 0) return i == 0 ? exactly(sharded(1, s.out.ranges, s.out.rest)) : all();
    if (s.t.op == Op::MUL_MAT_ID || s.out.axis == 3) return {};
    if (i == 1) return exactly(s.out);
    const i64 n = s.source(0).ne[2];
    if (s.out.axis == 1) return all();
    if (n == 0 || s.t.ne[2] % n) return {};
    Ranges shared = s.out.ranges;  // several matrices of x multiply the same one of w
    for (Range& range : shared)
        if (range.size()) range = {range.begin / (s.t.ne[2] / n), (range.end - 1) / (s.t.ne[2] / n) + 1};
    return {Reads::kSome, sharded(2, shared)};
}
Reads add_id(const Site& s, int i) { return i == 2 ? all() : is_divided(s) && s.out.axis > 0 ? Reads{} : element_wise(s, i); }
Reads flash_attn(const Site& s, int i) {
    if (!is_divided(s) || i > 2) return all();
    if (s.out.axis != 1) return {};
    if (i == 0) return exactly(sharded(2, s.out.ranges));
    const i64 n = s.source(i).ne[2], group = n && s.source(0).ne[2] % n == 0 ? s.source(0).ne[2] / n : 0;
    if (group == 0 || !alike(s.step.inputs[1], s.step.inputs[2], s.source(i))) return {};  // heads of K and of V are counted together
    Ranges heads = s.out.ranges;
    for (Range& range : heads)
        if (range.size()) range = {range.begin / group, (range.end - 1) / group + 1};
    return {Reads::kSome, sharded(2, heads)};
}
Reads concat(const Site& s, int i) { return is_divided(s) && s.out.axis == s.t.params[0] ? Reads{} : element_wise(s, i); }
Reads get_rows(const Site& s, int i) { return !is_divided(s) || i > 0 ? all() : s.out.axis == 0 ? exactly(s.out) : Reads{}; }
Reads set_rows(const Site& s, int i) {
    if (i > 1) return {Reads::kNothing};
    if (i == 1) return all();
    if (is_divided(s)) return s.out.axis == 0 ? exactly(s.out) : Reads{};
    return s.t.stored && s.t.stored->extent ? Reads{Reads::kAsStored} : all();
}
Reads ssm_conv(const Site& s, int) {
    if (!is_divided(s)) return all();
    return s.out.axis == 0 ? exactly(sharded(1, s.out.ranges, s.out.rest)) : Reads{};
}
/// Heads of a recurrent op's result, whose place in a row of y the plan says; nullopt: it says no whole heads.
std::optional<Ranges> heads_of(const Graph& graph, const Tensor& t, const Sharding& y) {
    const i64 row = graph.tensors[static_cast<size_t>(t.src[recurrence_of(t.op)->values])].ne[0];
    Ranges heads = y.ranges;
    for (Range& range : heads) range = {range.begin / row, range.end / row};
    return RecurrentHeads(graph, t).y(heads) == y ? std::optional(heads) : std::nullopt;
}
Reads recurrent(const Site& s, int i) {
    if (!is_divided(s)) return all();
    const auto heads = heads_of(s.graph, s.t, s.out);
    const auto needs = heads ? RecurrentHeads(s.graph, s.t).needs(i, *heads) : std::nullopt;
    return needs ? exactly(*needs) : Reads{};
}

struct OpRow {
    Op op;
    Row reads;
};
constexpr OpRow kRows[] = {
    {Op::ADD, element_wise},
    {Op::SUB, element_wise},
    {Op::MUL, element_wise},
    {Op::DIV, element_wise},
    {Op::SCALE, element_wise},
    {Op::UNARY, element_wise},
    {Op::CLAMP, element_wise},
    {Op::SQR, element_wise},
    {Op::SQRT, element_wise},
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
    {Op::NORM, rows},
    {Op::L2_NORM, rows},
    {Op::ARGSORT, rows},
    {Op::TOP_K, rows},
    {Op::SUM_ROWS, rows},
    {Op::ROPE, rope},
    {Op::ROPE_BACK, rope},
    {Op::SOFT_MAX, soft_max},
    {Op::MUL_MAT, product},
    {Op::MUL_MAT_ID, product},
    {Op::ADD_ID, add_id},
    {Op::FLASH_ATTN_EXT, flash_attn},
    {Op::CONCAT, concat},
    {Op::GET_ROWS, get_rows},
    {Op::SET_ROWS, set_rows},
    {Op::REPEAT, element_wise},
    {Op::SSM_CONV, ssm_conv},
    {Op::SSM_SCAN, recurrent},
    {Op::GATED_DELTA_NET, recurrent},
    {Op::GATED_LINEAR_ATTN, recurrent},
    {Op::RWKV_WKV6, recurrent},
    {Op::RWKV_WKV7, recurrent},
};
/// Of an op without a row every rank computes everything.
Reads reads_of(const Site& s, int i) {
    for (const OpRow& row : kRows)
        if (row.op == s.t.op) return row.reads(s, i);
    return is_divided(s) ? Reads{} : all();
}

// ---- what ranks hold

class Verifier {
  public:
    Verifier(const Plan& plan, const Graph& graph) : plan_(plan), graph_(graph), lies_(graph.tensors.size()) {
        for (const Tensor& t : graph.tensors) {
            check_stored(t);
            if (t.root != t.id || t.stored || !t.buffer || t.is_node) continue;
            if (const auto left = t.buffer->extent_at(static_cast<i64>(t.address - t.buffer->base), t.bytes))  // by an earlier graph
                lies_[static_cast<size_t>(t.id)] = left->is_partial ? Lies{true, {}} : Lies{false, {{{0, t.bytes}, *left}}};
        }
    }
    void run() {
        for (const PlanStep& step : plan_.steps) {
            if (step.kind == PlanStep::kAllReduce) reduce(step);
            else if (step.kind == PlanStep::kAllGather) gather(step);
            else if (step.kind == PlanStep::kSumSquares) sum_squares(step);
            else compute(step);
        }
        check_survivors();
    }

  private:
    /// Of a root in a compute buffer: bytes in no part are whole on every rank.
    struct Lies {
        bool is_partial = false;
        std::vector<Part> parts;
        bool operator==(const Lies&) const = default;
    };

    [[noreturn]] void refuse(const Tensor& t, const std::string& why) const {
        throw Error("the plan is wrong at " + t.name + ": " + why + " (a bug; please report the graph)");
    }
    const Tensor& at(int id) const { return graph_.tensors[static_cast<size_t>(id)]; }
    Lies& lies(const Tensor& t) { return lies_[static_cast<size_t>(t.root)]; }

    /// Shards are allocated by these numbers.
    void check_stored(const Tensor& t) const {
        if (!t.stored) return;
        const Stored& s = *t.stored;
        if (s.format && s.sharding.kind != Sharding::kReplicated &&
            (s.sharding.kind != Sharding::kSharded || s.sharding.axis > 1 || !lies_within(s.sharding, plan_.n_ranks, s.ne[s.sharding.axis])))
            refuse(t, "its weight is divided beyond its shape");
        if (!s.format && s.extent && !divides(*s.extent, s.bytes)) refuse(t, "what is stored is divided beyond its bytes");
    }
    bool divides(const Extent& extent, i64 bytes) const {
        return extent.period_bytes > 0 && bytes % extent.period_bytes == 0 && lies_within(extent, plan_.n_ranks, extent.period_bytes);
    }

    /// What every rank has of a tensor that is no Partial; nullopt: a rank's part is no range of an axis.
    std::optional<Sharding> held(const Tensor& t) {
        if (t.stored) {
            if (t.stored->format) return t.stored->sharding;
            return t.stored->extent ? sharding_of(*t.stored->extent, t.strided()) : replicated();
        }
        for (const Part& part : lies(t).parts) {
            if (t.offset >= part.bytes.end || t.offset + t.bytes <= part.bytes.begin) continue;
            if (t.offset < part.bytes.begin || t.offset + t.bytes > part.bytes.end) return std::nullopt;
            Strided within = t.strided();
            within.offset -= part.bytes.begin;
            return sharding_of(part.extent, within);
        }
        return replicated();
    }

    /// Values of which each rank stores what fits its part of a cache's row: it must have that part of theirs.
    bool held_as_stored(const Tensor& values, const Extent& cache) {
        if (values.stored || lies(values).parts.empty()) return !values.stored || held(values) == replicated();
        if (lies(values).parts.size() != 1 || !cache.rest.empty()) return false;
        const Extent& own = lies(values).parts[0].extent;
        for (size_t r = 0; r < cache.ranges.size(); ++r)
            if (const Range& stores = cache.ranges[r];
                own.rest.size() || (stores.size() && (own.ranges[r].begin * cache.period_bytes > stores.begin * own.period_bytes ||
                                                      own.ranges[r].end * cache.period_bytes < stores.end * own.period_bytes)))
                return false;
        return true;
    }

    void check_source(const PlanStep& step, int i) {
        const Tensor &t = at(step.tensor), &source = at(t.src[i]);
        const Sharding read = static_cast<size_t>(i) < step.inputs.size() ? step.inputs[static_cast<size_t>(i)] : replicated();
        const bool is_partial = !source.stored && lies(source).is_partial;
        const Reads reads = reads_of({graph_, step, t, step.output}, i);
        if (reads.how == Reads::kNothing) return;
        if (reads.how == Reads::kUnknown) refuse(t, "that part of it cannot be computed of what is read");
        if (is_partial != (read.kind == Sharding::kPartial)) refuse(t, "a source's Partial is not accounted for");
        if (is_partial) return;
        if (read.kind == Sharding::kSharded && !lies_within(read, plan_.n_ranks, source.ne[read.axis])) refuse(t, "more is read than " + source.name + " has");
        if (reads.how == Reads::kAligned && !alike(read, reads.what, source))
            refuse(t, source.name + " is read from elsewhere than the result's part asks for");
        if (reads.how == Reads::kSome && !covers(read, reads.what, source, plan_.n_ranks)) refuse(t, "less of " + source.name + " is read than is needed");
        if (reads.how == Reads::kAsStored) {
            if (read.kind != Sharding::kReplicated || !held_as_stored(source, *t.stored->extent)) refuse(t, "a rank stores what it has not of " + source.name);
            return;
        }
        const auto has = held(source);
        const bool by_shard = source.stored && source.stored->format;  // read from a shard's first element on
        if (!has || (by_shard ? !alike(*has, read, source) : !covers(*has, read, source, plan_.n_ranks)))
            refuse(t, "a rank has not what it reads of " + source.name);
    }

    void compute(const PlanStep& step) {
        const Tensor& t = at(step.tensor);
        const Sharding& out = step.output;
        u32 partial_sources = 0;
        for (int i = 0; i < 10; ++i)
            if (t.src[i] >= 0 && !at(t.src[i]).stored && lies(at(t.src[i])).is_partial && reads_of({graph_, step, t, out}, i).how != Reads::kNothing)
                partial_sources |= u32{1} << i;
        if (partial_sources && out.kind != Sharding::kPartial) refuse(t, "a Partial is read before its all_reduce");
        if (partial_sources && !may_pass_partial(t, partial_sources)) refuse(t, "an op that is not linear reads a Partial");
        if (out.kind == Sharding::kPartial && !partial_sources && t.op != Op::MUL_MAT && t.op != Op::MUL_MAT_ID) refuse(t, "what is whole would be summed");
        for (int i = 0; i < 10; ++i)
            if (t.src[i] >= 0) check_source(step, i);
        if (out.kind == Sharding::kSharded && !lies_within(out, plan_.n_ranks, t.ne[out.axis])) refuse(t, "a range lies outside of it");
        if (t.op == Op::RMS_NORM && out.kind == Sharding::kSharded && out.axis == 0 && !summed_.count(t.id))
            refuse(t, "its rows' sums of squares are no rank's");
        std::erase_if(summed_, [&](int norm) { return overlap(t, at(at(norm).src[0])); });  // they are another row's now
        if (t.stored) check_written(t, out);
        else lies(t) = left_by(t, out);
    }

    /// Each rank writes what it stores: no more, since there is no memory for it, and no less.
    void check_written(const Tensor& t, const Sharding& out) {
        if (out.kind == Sharding::kPartial) refuse(t, "a Partial would be stored");
        if (t.stored->format) refuse(t, "a weight that lies repacked would be written");
        const bool skips_rows = t.op == Op::SET_ROWS && t.stored->extent && out.kind == Sharding::kReplicated;
        const auto has = held(t);
        if (!skips_rows && (!has || !alike(*has, out, t))) refuse(t, "it is not written as it is stored");
    }

    /// How its root lies when the op is done.
    Lies left_by(const Tensor& t, const Sharding& out) {
        const Tensor& root = at(t.root);
        Lies after{out.kind == Sharding::kPartial, {}};
        if (out.kind == Sharding::kSharded && recurrence_of(t.op)) {
            after.parts = RecurrentHeads(graph_, t).parts(*heads_of(graph_, t, out));
        } else if (out.kind == Sharding::kSharded) {
            const auto extent = extent_of(out, t.strided());
            if (!extent || !divides(*extent, root.bytes)) refuse(t, "its division is none of its memory's");
            after.parts = {{{0, root.bytes}, *extent}};
        }
        for (const Part& part : after.parts)
            if (!divides(part.extent, part.bytes.size()) || !has_owners(part.extent, part.extent.period_bytes))
                refuse(t, "a part of it is computed by no rank");
        std::erase_if(after.parts, [](const Part& part) { return part.extent.rest.empty() && is_whole(part.extent.ranges, part.extent.period_bytes); });
        // What is not written stays as it was.
        const bool writes_all = t.bytes == root.bytes && t.op != Op::SET_ROWS;
        if (t.root != t.id && !writes_all && after != lies(t)) refuse(t, "a part of " + root.name + " is written otherwise than the rest lies");
        return after;
    }

    void reduce(const PlanStep& step) {
        const Tensor& root = at(step.tensor);
        if (root.stored || root.root != root.id || !lies(root).is_partial) refuse(root, "all_reduce of what is no Partial");
        lies(root) = {};
    }
    void gather(const PlanStep& step) {
        const Tensor& root = at(step.tensor);
        auto& parts = lies(root).parts;
        const auto found = std::find(parts.begin(), parts.end(), step.part);
        if (root.stored || root.root != root.id || found == parts.end()) refuse(root, "all_gather of what is not divided so");
        if (!has_owners(step.part.extent, step.part.extent.period_bytes)) refuse(root, "all_gather of what some of has no owner");
        parts.erase(found);
    }

    void sum_squares(const PlanStep& step) {
        if (step.norms.empty() || step.norms.size() != step.inputs.size()) refuse(at(step.tensor), "sums of squares of nothing");
        for (size_t i = 0; i < step.norms.size(); ++i) {
            const Tensor &t = at(step.norms[i]), &source = at(t.src[0]);
            const Sharding& read = step.inputs[i];
            if (t.op != Op::RMS_NORM || source.ne[0] == 0 || t.elems() / t.ne[0] != at(step.tensor).elems() / at(step.tensor).ne[0])
                refuse(t, "sums of squares of what has no such rows");
            if (read.kind != Sharding::kSharded || read.axis > 0 || !read.rest.empty() || !lies_within(read, plan_.n_ranks, source.ne[0]) ||
                !has_owners(read, source.ne[0]))
                refuse(t, "squares of a row that is divided otherwise are added up");
            if (!source.stored && lies(source).is_partial) refuse(t, "squares of summands are added up");
            const auto has = held(source);
            if (!has || !covers(*has, read, source, plan_.n_ranks)) refuse(t, "a rank has not what it squares of " + source.name);
            summed_.insert(t.id);
        }
    }

    /// The host reads what no later step wrote over: what is not whole there must be known for what it is.
    void check_survivors() {
        std::vector<int> alive;
        for (const PlanStep& step : plan_.steps) {
            if (step.kind != PlanStep::kCompute || at(step.tensor).stored) continue;
            const Tensor& t = at(at(step.tensor).root);
            std::erase_if(alive, [&](int other) {
                const Tensor& o = at(other);
                return o.id == t.id ||
                       (o.buffer == t.buffer && o.address < t.address + static_cast<u64>(t.bytes) && t.address < o.address + static_cast<u64>(o.bytes));
            });
            alive.push_back(t.id);
        }
        std::vector<size_t> known(graph_.tensors.size());
        for (const Plan::Survivor& s : plan_.survivors) {
            const Lies& left = lies_[static_cast<size_t>(s.root)];
            const bool is_it = s.part.extent.is_partial ? left.is_partial : std::find(left.parts.begin(), left.parts.end(), s.part) != left.parts.end();
            if (!is_it) refuse(at(s.root), "it is left otherwise than the plan says");
            ++known[static_cast<size_t>(s.root)];
        }
        for (int id : alive)
            if (const Lies& left = lies_[static_cast<size_t>(id)]; known[static_cast<size_t>(id)] != left.parts.size() + left.is_partial)
                refuse(at(id), left.is_partial ? "it is left as a Partial" : "it is left divided, which the host would not know");
    }

    const Plan& plan_;
    const Graph& graph_;
    std::vector<Lies> lies_;  // by root
    std::set<int> summed_;    // norms whose sums of squares every rank has
};

}  // namespace

void verify(const Plan& plan, const Graph& graph) { Verifier(plan, graph).run(); }

}  // namespace ggml_tp
