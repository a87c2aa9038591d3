#include "shared_expert.h"

#include "elementwise.h"
#include "rows_grid.h"

namespace ggml_tp {
namespace {

/// An F32 vector, however its one row is called.
bool is_row(const View& v, i64 n) { return v.type == kF32 && v.ne[0] == n && n_elements(v) == n && v.nb[0] == 4; }

std::optional<Join> glu_join(const std::vector<Draft>& stages, size_t i, float* shared, u32 n_blocks) {
    const StreamGlu g = stages[i].get<StreamGlu>();
    const i64 n = g.args.y.ne[0];
    if (!is_row(g.args.a, n) || !is_row(g.args.b, n) || !is_row(g.args.y, n) || n > kStreamMostK) return std::nullopt;
    const size_t at = writer_of(stages, span_of(g.args.a), i);
    auto p = body_of<StreamProduct>(stages, at, kStreamProduct);
    if (!p || p->role || p->glu || p->n_push || p->n_parts != 2 || writer_of(stages, span_of(g.args.b), i) != at) return std::nullopt;
    const auto *gate = reinterpret_cast<const float*>(g.args.a.data), *up = reinterpret_cast<const float*>(g.args.b.data);
    if (p->part[0].y == up) std::swap(p->part[0], p->part[1]);
    if (p->part[0].y != gate || p->part[1].y != up || p->part[0].n != n || p->part[1].n != n || p->part[0].copy || p->part[1].copy) return std::nullopt;
    const auto* const y = reinterpret_cast<const float*>(g.args.y.data);
    size_t reader = i + 1;
    while (reader < stages.size() && !meet({span_of(y, n * 4)}, stages[reader].reads)) ++reader;
    auto taker = body_of<StreamProduct>(stages, reader, kStreamProduct);
    if (!taker || writer_of(stages, span_of(y, n * 4), reader) != i || taker->a != y || taker->b || taker->input != kInputPlain || stream_input(*taker) != n)
        return std::nullopt;
    // The vector is one for all layers: from the product that fills it to the one that takes it nobody else may have to do with it.
    const Span own = span_of(shared, kStreamMostK * 4);
    for (size_t j = at; j <= reader; ++j)
        if (meet({own}, stages[j].writes) || meet({own}, stages[j].reads)) return std::nullopt;
    p->glu = 1 + g.op, p->alpha = g.args.alpha, p->limit = g.args.limit, p->glu_y = shared, p->glu_stride = static_cast<i32>(n);
    if (!stream_fit(*p, n_blocks)) return std::nullopt;
    Join out;
    Draft product = stages[at], reads = stages[reader];
    product.set(*p);
    product.writes.push_back(span_of(shared, n * 4));
    taker->a = shared;
    reads.set(*taker);
    for (Span& read : reads.reads)
        if (read.begin == span_of(y, 4).begin) read = span_of(shared, n * 4);
    out.changed = {{at, product}, {reader, reads}};
    out.taken = {i};
    out.left = {{i, span_of(y, n * 4)}};
    return out;
}

std::optional<Join> sum_join(const std::vector<Draft>& stages, size_t i) {
    StreamProduct p = stages[i].get<StreamProduct>();
    StreamPart& part = p.part[0];
    if (p.role || p.glu || p.n_push || p.n_parts != 1 || part.copy || part.bias || part.raw ||
        (stages[i].body.size() >= sizeof(StreamExperts) && stages[i].get<StreamExperts>().onto.added))
        return std::nullopt;
    const i64 n = part.n;
    const auto* from = reinterpret_cast<const char*>(part.y);
    Join out;
    out.left = {{i, span_of(part.y, n * 4)}};
    size_t at = i + 1;
    StreamExperts e{};
    StreamOnto& onto = e.onto;
    onto = {};
    std::vector<Span> reads = stages[i].reads, writes = stages[i].writes;
    // The sigmoid of one number, and the product with it.
    if (const auto s = body_of<StreamElements>(stages, at, kStreamElements)) {
        const auto m = body_of<StreamBinary>(stages, at + 1, kStreamBinary);
        if (!m || s->w.data || s->n_steps != 1 || s->step[0].op != static_cast<i32>(UnaryOp::kSigmoid) || !is_row(s->x, 1) || !is_row(s->y, 1))
            return std::nullopt;
        const BinaryArgs& a = m->args;
        if (m->op != static_cast<i32>(BinaryOp::kMul) || m->copy || m->n_push || a.a.data != from || a.b.data != s->y.data || !is_row(a.a, n) ||
            !is_row(a.b, 1) || !is_row(a.y, n))
            return std::nullopt;
        onto.gate = reinterpret_cast<const float*>(s->x.data);
        reads.push_back(span_of(s->x));
        out.left.push_back({at, span_of(s->y)}), out.left.push_back({at + 1, span_of(a.y)});
        out.taken = {at, at + 1};
        from = a.y.data;
        at += 2;
    }
    const auto sum = body_of<StreamBinary>(stages, at, kStreamBinary);
    if (!sum || sum->op != static_cast<i32>(BinaryOp::kAdd)) return std::nullopt;
    const BinaryArgs& a = sum->args;
    const View& other = a.a.data == from ? a.b : a.a;
    if ((a.a.data != from && a.b.data != from) || other.data == from || !is_row(a.a, n) || !is_row(a.b, n) || !is_row(a.y, n)) return std::nullopt;
    onto.added = reinterpret_cast<const float*>(other.data);
    const Span y = span_of(part.y, n * 4);
    writes.erase(std::remove_if(writes.begin(), writes.end(), [&](const Span& s) { return s.begin == y.begin && s.end == y.end; }), writes.end());
    reads.push_back(span_of(other));
    part.y = reinterpret_cast<float*>(a.y.data), part.copy = sum->copy;
    p.n_push = sum->n_push, p.push = sum->push;
    std::copy(std::begin(sum->inbox), std::end(sum->inbox), p.inbox);
    // Where it is written, blocks still read their input; of what is added a block reads what it writes, and nothing that this stage writes elsewhere.
    std::vector<Span> input = stages[i].reads, own = {span_of(other)};
    if (onto.gate) own.push_back(span_of(onto.gate, 4));
    if (meet(own, stages[i].writes)) return std::nullopt;
    if (meet(stages[at].writes, input) || (part.y != onto.added && meet({span_of(a.y)}, {span_of(other)}))) return std::nullopt;
    writes.insert(writes.end(), stages[at].writes.begin(), stages[at].writes.end());
    e.product = p;
    Draft d = Draft::of(kStreamProduct, e);
    d.reads = reads, d.writes = writes;
    out.taken.push_back(at);
    out.changed = {{i, d}};
    return out;
}

std::optional<Join> row_join(const std::vector<Draft>& stages, size_t i) {
    StreamFloats f = stages[i].get<StreamFloats>();
    const auto more = body_of<StreamFloats>(stages, i + 1, kStreamFloats);
    if (!more || f.more_w || more->more_w || more->n != 1 || more->k != f.k || more->has_norm || more->b || more->weight || !f.y_copy || more->y_copy)
        return std::nullopt;
    const float* const input = f.has_norm ? f.norm_copy : f.a;
    if (more->a != input && !(f.has_norm && more->a == f.norm)) return std::nullopt;
    const Span y = span_of(more->y, 4);
    if (meet({y}, stages[i].reads) || meet({y}, stages[i].writes)) return std::nullopt;
    f.more_w = more->w, f.more_y = more->y;
    Draft d = stages[i];
    d.set(f);
    d.writes.push_back(y);
    Join out;
    out.changed = {{i, d}};
    out.taken = {i + 1};
    return out;
}

}  // namespace

std::optional<Join> shared_expert(const std::vector<Draft>& stages, size_t i, float* shared, u32 n_blocks) {
    switch (stages[i].kind) {
        case kStreamGlu: return glu_join(stages, i, shared, n_blocks);
        case kStreamProduct: return sum_join(stages, i);
        case kStreamFloats: return row_join(stages, i);
        default: return std::nullopt;
    }
}

}  // namespace ggml_tp
