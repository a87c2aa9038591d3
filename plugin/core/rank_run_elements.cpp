// What is done element by element or row by row, and what linear attention and other states are made of.
#include "rank_run.h"

#include <algorithm>
#include <cstring>
#include <string_view>
#include <utility>

#include "elementwise.h"
#include "recurrent.h"

namespace ggml_tp {
namespace {

constexpr i64 kMostCopied = 1 << 22;  // of one that copies what lies side by side: a sequence's states

}  // namespace

bool RankRun::add_set_rows(const SetRowsArgs& a) {
    if (n_elements(a.x) > kMostElems) return false;
    if (store_with_rope(a)) return true;
    Draft d = Draft::of(kStreamSetRows, a);
    d.reads = {span_of(a.x)};
    d.writes = {span_of(a.y)};
    stages.push_back(std::move(d));
    return true;
}
bool RankRun::add_get_rows(const GetRowsArgs& a) {
    if (a.w.repacked) return false;
    const bool whole = a.w_view.type == kF32 && a.y.type == kF32 && a.w_view.nb[0] == 4 && a.y.nb[0] == 4 && a.y.ne[2] * a.y.ne[3] == 1 &&
                       a.w_view.ne[2] * a.w_view.ne[3] == 1 && a.w_view.ne[0] == a.y.ne[0] && a.w.type == kF32;
    if (n_elements(a.y) > (whole ? kMostCopied : kMostElems)) return false;
    Draft d = Draft::of(kStreamGetRows, a);
    d.count = whole;
    d.reads = {span_of(a.w_view), span_of(a.idx)};
    d.writes = {span_of(a.y)};
    stages.push_back(std::move(d));
    return true;
}
bool RankRun::add_binary(const RankLaunch& l) {
    StreamBinary b{};
    b.args = args_of<BinaryArgs>(l), b.op = -1;

    if (n_elements(b.args.y) > kMostElems) return false;
    for (int op = 0; op < 4; ++op)
        if (!std::strcmp(l.launch.kernel, kBinaryKernels[op])) b.op = op;
    if (!cautious && ((b.op == 0 && add_bias(b.args)) || join_layer_norm(b.args, b.op))) return true;
    if (!cautious && b.op >= 0 && !stages.empty() && stages.back().kind == kStreamElements && same_view(stages.back().get<StreamElements>().y, b.args.a) &&
        same_view(b.args.a, b.args.y) && !meet({span_of(b.args.b)}, stages.back().writes) && stages.back().get<StreamElements>().n_steps < kStreamElementSteps)
        return add_element_op(b.args.a, b.args.y, {b.args.b}, [&](StreamElements::Step& step) { step.op = kStreamWithOther + b.op, step.b = b.args.b; });
    Draft d = Draft::of(kStreamBinary, b);
    d.reads = {span_of(b.args.a), span_of(b.args.b)};
    d.writes = {span_of(b.args.y)};
    stages.push_back(std::move(d));
    return b.op >= 0;
}
/// Into the stage before, where that leaves what this one takes, in the same place: nobody else can want it.
template <class Add>
bool RankRun::add_element_op(const View& x, const View& y, const std::vector<View>& others, const Add& add) {
    if (n_elements(y) > kMostElems || x.type != kF32 || y.type != kF32 || pending) return false;
    if (!same_view(x, y) && meet({span_of(x)}, {span_of(y)})) return false;
    if (!cautious && !stages.empty() && same_view(x, y)) make_elements(stages.back(), x);
    std::vector<Span> more;
    for (const View& other : others) more.push_back(span_of(other));
    if (!cautious && !stages.empty() && stages.back().kind == kStreamElements) {
        Draft& last = stages.back();
        StreamElements e = last.get<StreamElements>();
        const bool reshaped = others.empty() && is_dense(e.y) && is_dense(x) && e.y.data == x.data && n_elements(e.y) == n_elements(x);
        if (e.n_steps < kStreamElementSteps && (same_view(e.y, x) || reshaped) && same_view(x, y) && !meet(more, last.writes)) {
            add(e.step[e.n_steps++]);
            last.reads.insert(last.reads.end(), more.begin(), more.end());
            last.set(e);
            return true;
        }
    }
    StreamElements e{};
    e.x = x, e.y = y;
    add(e.step[e.n_steps++]);
    Draft d = Draft::of(kStreamElements, e);
    d.reads = more;
    d.reads.push_back(span_of(x));
    d.writes = {span_of(y)};
    stages.push_back(std::move(d));
    return true;
}
/// A sum, a product, ... of two that x is, as ops that another can follow.
void RankRun::make_elements(Draft& d, const View& x) {
    if (d.kind != kStreamBinary) return;
    const StreamBinary b = d.get<StreamBinary>();
    if (!same_view(b.args.y, x) || b.copy || b.n_push || b.args.a.type != kF32 || b.args.b.type != kF32 || b.args.y.type != kF32) return;
    StreamElements e{};
    e.x = b.args.a, e.y = b.args.y, e.n_steps = 1;
    e.step[0].b = b.args.b, e.step[0].op = kStreamWithOther + b.op;
    Draft out = Draft::of(kStreamElements, e);
    out.reads = d.reads, out.writes = d.writes;
    d = std::move(out);
}
bool RankRun::add_unary(const RankLaunch& l) {
    const UnaryArgs u = args_of<UnaryArgs>(l);
    i32 op = -1;
    for (size_t i = 0; i < std::size(kUnaryKernels); ++i)
        if (is(l, kUnaryKernels[i])) op = static_cast<i32>(i);
    if (op < 0) return false;
    const bool plain = u.p0 == 0 && u.p1 == 0 && u.p2 == 0 && u.p3 == 0;
    if (pending) return plain && same_view(u.x, u.y) && map_experts(u.x, op);
    if (!cautious && op == static_cast<i32>(UnaryOp::kScale) && u.p1 == 0 && !stages.empty() && stages.back().kind == kStreamNormRows) {
        StreamNormRows n = stages.back().get<StreamNormRows>();
        if (same_view(n.norm.y, u.x) && same_view(u.x, u.y)) {
            n.factor *= u.p0;
            stages.back().set(n);
            return true;
        }
    }
    return add_element_op(u.x, u.y, {}, [&](StreamElements::Step& step) {
        step.op = op;
        step.p[0] = u.p0, step.p[1] = u.p1, step.p[2] = u.p2, step.p[3] = u.p3;
    });
}
bool RankRun::add_rms_norm(const NormArgs& n) {
    const i64 k = n.y.ne[0];
    auto rows = [k](const View& v) {
        const bool fours = (reinterpret_cast<u64>(v.data) | static_cast<u64>(v.nb[1] | v.nb[2] | v.nb[3])) % 16 == 0;
        return v.type == kF32 && v.nb[0] == 4 && (k < kStreamLongRow || fours);
    };
    if (!rows(n.x) || !rows(n.y) || k % 4 || n_elements(n.y) > kMostElems || pending) return false;
    if (n.has_weight && (!is_vector(n.weight, k))) return false;
    FusedNormArgs f{};
    f.a = n.x, f.y = n.y, f.weight = n.weight, f.has_weight = n.has_weight, f.eps = n.eps;
    return add_norm(f);
}
/// Before a rope that it has nothing to do with: Q's norm, rope, K's norm, rope become norms and ropes.
void RankRun::insert_norm(Draft d) {
    const auto at = !cautious && !stages.empty() && independent(d, stages.back()) && stages.back().kind == kStreamRopeStore ? stages.end() - 1 : stages.end();
    stages.insert(at, std::move(d));
}
bool RankRun::add_squares(const RowSquaresArgs& a) {
    if (a.rows != 1 || pending) return false;
    StreamSquares s{};
    s.sums = a.sums, s.n_parts = a.n_parts;
    Draft d;
    for (int i = 0; i < a.n_parts; ++i) {
        s.n[i] = a.x[i].ne[0], s.x[i] = reinterpret_cast<const float*>(a.x[i].data);
        if (s.n[i] % 4 || !is_vector(a.x[i], s.n[i])) return false;
        d.reads.push_back(span_of(s.x[i], s.n[i] * 4));
    }
    std::vector<Span> reads = std::move(d.reads);
    d = Draft::of(kStreamSquares, s);
    d.reads = std::move(reads), d.writes = {span_of(s.sums, s.n_parts * 4)};
    stages.push_back(std::move(d));
    return true;
}
bool RankRun::add_norm_by_squares(const NormBySquaresArgs& n) {
    const i64 k = n.y.ne[0];
    if (k % 4 || !is_vector(n.x, k) || !is_vector(n.y, k) || (n.has_weight && !is_vector(n.weight, k)) || pending) return false;
    if (!same_view(n.x, n.y) && meet({span_of(n.x)}, {span_of(n.y)})) return false;
    const StreamNormBySquares s{reinterpret_cast<const float*>(n.x.data),
                                n.has_weight ? reinterpret_cast<const float*>(n.weight.data) : nullptr,
                                n.squares,
                                reinterpret_cast<float*>(n.y.data),
                                nullptr,
                                k,
                                n.n,
                                n.eps,
                                0};
    Draft d = Draft::of(kStreamNormBySquares, s);
    d.reads = {span_of(n.x), span_of(n.squares, 4)};
    if (s.weight) d.reads.push_back(span_of(n.weight));
    d.writes = {span_of(n.y)};
    insert_norm(std::move(d));
    return true;
}
bool RankRun::add_layer_norm(const NormArgs& n) {
    auto rows = [](const View& v) { return v.type == kF32 && v.nb[0] == 4; };
    if (!rows(n.x) || !rows(n.y) || n_elements(n.y) > kMostElems || pending || (n.has_weight && !is_vector(n.weight, n.y.ne[0]))) return false;
    if (!same_view(n.x, n.y) && meet({span_of(n.x)}, {span_of(n.y)})) return false;
    StreamLayerNorm s{n.x, n.y, n.has_weight ? reinterpret_cast<const float*>(n.weight.data) : nullptr, nullptr, nullptr, nullptr, n.eps, 0};
    Draft d = Draft::of(kStreamLayerNorm, s);
    d.reads = {span_of(n.x)};
    d.writes = {span_of(n.y)};
    const i64 k = n.y.ne[0];
    const auto sum = cautious || stages.empty() ? std::nullopt : body_of<StreamBinary>(stages, stages.size() - 1, kStreamBinary);
    auto row = [&](const View& v) { return is_vector(v, k) && (v.data == n.x.data || !meet({span_of(v)}, {span_of(n.x)})); };
    if (sum && sum->op == 0 && !sum->n_push && same_view(sum->args.y, n.x) && row(n.x) && row(sum->args.a) && row(sum->args.b)) {  // a residual
        s.x = sum->args.a, s.added = reinterpret_cast<const float*>(sum->args.b.data), s.sum = reinterpret_cast<float*>(n.x.data);
        d.set(s);
        d.reads = stages.back().reads;
        d.writes.push_back(span_of(n.x));
        stages.pop_back();
    }
    stages.push_back(std::move(d));
    return true;
}
/// The weight and the bias of the norm that is the last stage, where their results take the place of its own.
bool RankRun::join_layer_norm(const BinaryArgs& b, int op) {
    if (stages.empty() || stages.back().kind != kStreamLayerNorm || op < 0 || !same_view(b.a, b.y) || !is_vector(b.b, b.y.ne[0])) return false;
    Draft& d = stages.back();
    StreamLayerNorm s = d.get<StreamLayerNorm>();
    const std::string_view kernel = kBinaryKernels[op];
    const bool weighs = kernel == "binary_mul" && !s.weight && !s.bias, adds = kernel == "binary_add" && !s.bias;
    if (!same_view(s.y, b.a) || meet({span_of(b.b)}, d.writes) || (!weighs && !adds)) return false;
    (weighs ? s.weight : s.bias) = reinterpret_cast<const float*>(b.b.data);
    d.set(s);
    d.reads.push_back(span_of(b.b));
    return true;
}
bool RankRun::add_copy(const CopyArgs& c) {
    const i64 n = n_elements(c.x);
    if (c.x.type != kF32 || c.y.type != kF32 || pending) return false;
    if (!cautious && !stages.empty() && is_dense(c.x) && is_dense(c.y) && move_experts(c.x.data, c.y.data, n)) return true;
    if ((!cautious || n > kMostElems) && is_dense(c.x) && is_dense(c.y) && n <= kMostCopied && !meet({span_of(c.x)}, {span_of(c.y)})) {
        Draft d = Draft::of(kStreamCopy, StreamCopy{reinterpret_cast<const float*>(c.x.data), reinterpret_cast<float*>(c.y.data), n});
        d.reads = {span_of(c.x)}, d.writes = {span_of(c.y)};
        stages.push_back(std::move(d));
        return true;
    }
    // Elements in the order of their indices: those of one are those of the other.
    View x = c.x, y = c.y;
    if (!std::equal(x.ne, x.ne + 4, y.ne)) {
        if (is_dense(y)) reshape(y, x);
        else if (is_dense(x)) reshape(x, y);
        else return false;
    }
    if (n > kMostElems || meet({span_of(x)}, {span_of(y)})) return false;
    StreamElements e{};
    e.x = x, e.y = y;
    Draft d = Draft::of(kStreamElements, e);
    d.reads = {span_of(x)}, d.writes = {span_of(y)};
    stages.push_back(std::move(d));
    return true;
}
/// Where the one expert of a token leaves its result.
bool RankRun::move_experts(const char* from, char* to, i64 n) {
    Draft& d = stages.back();
    if (d.kind != kStreamProduct) return false;
    StreamProduct p = d.get<StreamProduct>();
    StreamPart& part = p.part[0];
    const Span y = span_of(to, n * 4);
    if (p.role != kExpertsSum || !p.weighed || p.n_push || part.raw || part.bias || reinterpret_cast<const char*>(part.y) != from || part.n != n) return false;
    if (meet({y}, d.reads) || meet({y}, d.writes)) return false;
    part.raw = std::exchange(part.y, reinterpret_cast<float*>(to));
    d.writes.push_back(y);
    d.set(p);
    return true;
}
void RankRun::reshape(View& packed, const View& as) {
    i64 next = 4;  // bytes
    for (int d = 0; d < 4; ++d) packed.ne[d] = as.ne[d], packed.nb[d] = next, next *= as.ne[d];
}
bool RankRun::add_concat(const MoveArgs& m) {
    if (m.bytes != 4 || n_elements(m.y) > kMostElems || pending) return false;
    Draft d = Draft::of(kStreamConcat, StreamConcat{m});
    d.reads = {span_of(m.x), span_of(m.b)}, d.writes = {span_of(m.y)};
    if (meet(d.reads, d.writes)) return false;
    stages.push_back(std::move(d));
    return true;
}
/// Of dimensions of one element, many times.
bool RankRun::add_repeat(const MoveArgs& m) {
    if (pending) return repeat_input(m);
    View x = m.x;
    for (int d = 0; d < 4; ++d) {
        if (x.ne[d] != m.y.ne[d] && x.ne[d] != 1) return false;
        if (x.ne[d] == 1) x.nb[d] = 0;
        x.ne[d] = m.y.ne[d];
    }
    if (x.type != kF32 || n_elements(m.y) > kMostElems || meet({span_of(m.x)}, {span_of(m.y)})) return false;
    StreamElements e{};
    e.x = x, e.y = m.y;
    Draft d = Draft::of(kStreamElements, e);
    d.reads = {span_of(m.x)}, d.writes = {span_of(m.y)};
    stages.push_back(std::move(d));
    return true;
}
bool RankRun::add_conv(const BinaryArgs& c) {
    if (n_elements(c.y) > kMostElems || pending) return false;
    StreamElements e{};
    e.x = c.a, e.y = c.y, e.w = c.b;
    Draft d = Draft::of(kStreamElements, e);
    d.reads = {span_of(c.a), span_of(c.b)}, d.writes = {span_of(c.y)};
    if (meet(d.reads, d.writes)) return false;
    stages.push_back(std::move(d));
    return true;
}
bool RankRun::add_delta(const RecurrentArgs& r) {
    if (!delta_in_fours(r) || pending) return false;
    Draft d = Draft::of(kStreamDelta, StreamDelta{r});
    for (int i = 0; i < 6; ++i) d.reads.push_back(i == 5 ? span_of(r.src[5].data, r.rows * r.n * r.n_head * 4) : span_of(r.src[i]));
    d.writes = {span_of(r.y, r.rows * r.n_head * 4)};
    if (r.snapshots > 0) d.writes.push_back(span_of(r.state, r.rows * r.n * r.n_head * 4));
    stages.push_back(std::move(d));
    return true;
}

bool RankRun::add_scan(const RecurrentArgs& r) {
    if (!scan_in_fours(r) || pending) return false;
    Draft d = Draft::of(kStreamScan, StreamDelta{r});
    for (const View& source : r.src) d.reads.push_back(span_of(source));
    d.writes = {span_of(r.y, r.rows * r.n_head * 4), span_of(r.state, r.rows * r.n * r.n_head * 4)};
    stages.push_back(std::move(d));
    return true;
}
/// Whose result is no product's input, or not as it is.
bool RankRun::add_plain_glu(const RankLaunch& l) {
    const GluArgs g = args_of<GluArgs>(l);
    StreamGlu stage{g, -1, 0};
    for (size_t op = 0; op < std::size(kGluKernels); ++op)
        if (is(l, kGluKernels[op])) stage.op = static_cast<i32>(op);
    if (stage.op < 0 || n_elements(g.y) > kMostElems || pending) return false;
    for (const View* source : {&g.a, &g.b})
        if (!same_view(*source, g.y) && meet({span_of(*source)}, {span_of(g.y)})) return false;
    Draft d = Draft::of(kStreamGlu, stage);
    d.reads = {span_of(g.a), span_of(g.b)}, d.writes = {span_of(g.y)};
    stages.push_back(std::move(d));
    return true;
}

}  // namespace ggml_tp
