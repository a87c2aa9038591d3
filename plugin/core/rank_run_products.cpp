// Products, and how their inputs come about.
#include "rank_run.h"

#include <algorithm>
#include <cstring>

#include "elementwise.h"

namespace ggml_tp {

bool RankRun::add_norm(const FusedNormArgs& n) {
    const i64 k = n.y.ne[0];
    if (!n.xq) {
        Draft d = Draft::of(kStreamNormRows, StreamNormRows{n, nullptr, 1.0f, 0});
        auto fours = [](const View& v) { return v.nb[0] == 4 && (reinterpret_cast<u64>(v.data) | static_cast<u64>(v.nb[1] | v.nb[2] | v.nb[3])) % 16 == 0; };
        d.count = k < kStreamLongRow && k % 4 == 0 && !n.has_b && fours(n.a) && fours(n.y) && (!n.has_weight || fours(n.weight));
        d.reads = {span_of(n.a)};
        d.writes = {span_of(n.y)};
        if (n.has_b) d.reads.push_back(span_of(n.b)), d.writes.push_back(span_of(n.sum));
        if (norm_before_rope(n)) return true;
        insert_norm(std::move(d));
        return true;
    }
    if (!is_vector(n.y, k) || !is_vector(n.a, k) || (n.has_b && (!is_vector(n.b, k) || !is_vector(n.sum, k)))) return false;
    return bind(n.xq, recipe_of(n));
}
bool RankRun::add_quantize(const QuantizeArgs& q) {
    const i64 n = n_elements(q.x);
    if (pending && bind_experts(q)) return true;
    if (q.k_begin != 0 || q.k_end != q.k || q.x.type != kF32 || n > kStreamMostK) return false;
    Recipe r;
    r.input = kInputPlain, r.a = reinterpret_cast<const float*>(q.x.data), r.k = n;
    if (!is_vector(q.x, q.k)) {  // heads' parts, one behind the other
        if (!is_dense(q.x)) {
            if (pending) return false;
            r.a = memory_->vectors[kPacked];
            StreamElements e{};
            e.x = e.y = q.x;
            e.y.data = reinterpret_cast<char*>(memory_->vectors[kPacked]);
            reshape(e.y, e.x);
            Draft d = Draft::of(kStreamElements, e);
            d.reads = {span_of(e.x)}, d.writes = {span_of(e.y)};
            stages.push_back(std::move(d));
        }
        return bind(q.xq, r);
    }
    if (const std::optional<size_t> at = lone_norm(r.a, r.k)) {  // the product norms for itself, and leaves the result for others
        r = recipe_of(stages[*at].get<StreamNormRows>().norm);
        stages.erase(stages.begin() + static_cast<std::ptrdiff_t>(*at));
    }
    return bind(q.xq, r);
}
/// The last stage, or one shortly before it, that norms one row into y, where that might as well happen now.
std::optional<size_t> RankRun::lone_norm(const float* y, i64 k) const {
    constexpr size_t kNear = 4;
    for (size_t i = stages.size(); i-- > 0 && stages.size() - i <= kNear && !cautious;) {
        if (!meet({span_of(y, k * 4)}, stages[i].writes)) continue;
        if (stages[i].kind != kStreamNormRows) break;
        const StreamNormRows s = stages[i].get<StreamNormRows>();
        const FusedNormArgs& n = s.norm;
        if (reinterpret_cast<const float*>(n.y.data) != y || s.factor != 1.0f || !is_vector(n.y, k) || !is_vector(n.a, k)) break;
        if (n.has_b && (!is_vector(n.b, k) || !is_vector(n.sum, k))) break;
        if (stream_share(k, memory_->n_blocks) > kStreamStep || k % 32 || k > kStreamMostK) break;
        for (size_t j = i + 1; j < stages.size(); ++j)
            if (!independent(stages[i], stages[j])) return std::nullopt;
        return i;
    }
    return std::nullopt;
}
bool RankRun::bind(const char* xq, const Recipe& recipe) {
    if (recipe.k % 32 || recipe.k > kStreamMostK) return false;
    if (recipe.input == kInputNorm && stream_share(recipe.k, memory_->n_blocks) > kStreamStep) return false;
    recipes_[xq] = recipe;
    if (kept_ == xq) kept_ = nullptr;
    return true;
}
bool RankRun::independent(const Draft& a, const Draft& b) { return !meet(a.reads, b.writes) && !meet(a.writes, b.writes) && !meet(a.writes, b.reads); }
Recipe RankRun::recipe_of(const FusedNormArgs& n) {
    Recipe r{kInputNorm, reinterpret_cast<const float*>(n.a.data), nullptr, nullptr, nullptr, reinterpret_cast<float*>(n.y.data), n.eps, n.y.ne[0]};
    if (n.has_b) r.b = reinterpret_cast<const float*>(n.b.data), r.sum = reinterpret_cast<float*>(n.sum.data);
    if (n.has_weight) r.weight = reinterpret_cast<const float*>(n.weight.data);
    return r;
}
bool RankRun::add_glu(const RankLaunch& l) {
    const FusedGluArgs g = args_of<FusedGluArgs>(l);
    if (g.a.n || g.b.n || !g.xq) return false;
    return (!cautious && join_glu(l, g)) || add_lone_glu(l, g);
}
i32 RankRun::glu_op(const RankLaunch& l) {
    for (size_t op = 0; op < std::size(kFusedGluKernels); ++op)
        if (!std::strcmp(l.launch.kernel, kFusedGluKernels[op])) return static_cast<i32>(op);
    return -1;
}
/// Of results of stages that lie further back: of an expert that all tokens share, whose products came before the others'.
bool RankRun::add_lone_glu(const RankLaunch& l, const FusedGluArgs& g) {
    const i64 n = g.glu.y.ne[0];
    const StreamGlu stage{g.glu, glu_op(l), 0};
    if (pending || stage.op < 0 || g.k_begin != 0 || g.k != n || !is_vector(g.glu.a, n) || !is_vector(g.glu.b, n) || !is_vector(g.glu.y, n)) return false;
    Recipe r;
    r.input = kInputPlain, r.a = reinterpret_cast<const float*>(g.glu.y.data), r.k = n;
    if (!bind(g.xq, r)) return false;
    Draft d = Draft::of(kStreamGlu, stage);
    d.reads = {span_of(g.glu.a), span_of(g.glu.b)};
    d.writes = {span_of(g.glu.y)};
    stages.push_back(std::move(d));
    return true;
}
/// An op of what experts without gates leave, in its place: their stage does it. (Dense products' ops are stages: a warp stores, and with GELU in its loop
/// StarCoder 2's took 33,000 cycles where product and op take 26,000; docs/decisions.md.)
bool RankRun::map_experts(const View& x, i32 op) {
    if (stages.empty() || stages.back().kind != kStreamProduct) return false;
    Draft& d = stages.back();
    StreamProduct p = d.get<StreamProduct>();
    if (p.role != kExpertsEach || p.glu || p.n_parts != 1 || reinterpret_cast<char*>(p.part[0].y) != x.data) return false;
    if (!is_slots(x, p.part[0].n, p.slots) || x.nb[1] != p.y_stride * i64{4}) return false;
    u8* const to = std::find(std::begin(p.map), std::end(p.map), 0);
    if (to == std::end(p.map)) return false;
    *to = static_cast<u8>(1 + op);
    d.set(p);
    return true;
}
/// What experts without gates leave, the next product of experts reads: the host may have given the sums behind that this memory, so a copy.
bool RankRun::bind_experts(const QuantizeArgs& q) {
    if (stages.empty() || stages.back().kind != kStreamProduct) return false;
    Draft& d = stages.back();
    StreamProduct p = d.get<StreamProduct>();
    if (p.role != kExpertsEach || p.glu || !p.map[0] || p.n_parts != 1 || reinterpret_cast<char*>(p.part[0].y) != q.x.data) return false;
    if (!is_slots(q.x, p.part[0].n, p.slots) || q.x.nb[1] != p.y_stride * i64{4} || q.k * p.slots > kStreamMostK || !stream_fit(p, memory_->n_blocks))
        return false;
    p.glu_copy = memory_->vectors[kGlu], p.glu_k = static_cast<i32>(q.k), p.glu_begin = static_cast<i32>(q.k_begin);
    Recipe r;
    r.input = kInputPlain, r.a = p.glu_copy, r.k = q.k * p.slots;
    if (!bind(q.xq, r)) return false;
    d.writes.push_back(span_of(p.glu_copy, r.k * 4));
    d.set(p);
    pending = false;
    return true;
}
/// Two products of the stage before become one whose tiles hold rows of both.
bool RankRun::join_glu(const RankLaunch& l, const FusedGluArgs& g) {
    if (stages.empty() || stages.back().kind != kStreamProduct) return false;
    StreamProduct p = stages.back().get<StreamProduct>();
    const i64 n = g.glu.y.ne[0], slots = p.role == kExpertsEach ? p.slots : 1;
    if (p.role != kExpertsSum && p.n_parts == 1) split_part(p, 0, n);
    if (p.n_parts != 2 || p.glu || p.part[0].n != n || p.part[1].n != n) return false;
    if (!p.role && (g.k_begin != 0 || g.k != n || !is_vector(g.glu.y, n))) return false;
    if (p.role && (!is_slots(g.glu.y, n, slots) || g.k * slots > kStreamMostK)) return false;
    p.glu_stride = static_cast<i32>(g.glu.y.nb[1] / 4);
    if (g.glu.a.data != reinterpret_cast<char*>(p.part[0].y) || g.glu.b.data != reinterpret_cast<char*>(p.part[1].y)) {
        if (g.glu.b.data != reinterpret_cast<char*>(p.part[0].y) || g.glu.a.data != reinterpret_cast<char*>(p.part[1].y)) return false;
        std::swap(p.part[0], p.part[1]);
    }
    p.glu = 1 + glu_op(l);
    p.alpha = g.glu.alpha, p.limit = g.glu.limit;
    p.glu_y = reinterpret_cast<float*>(g.glu.y.data);
    if (!p.glu || !stream_fit(p, memory_->n_blocks)) return false;
    Draft& d = stages.back();
    if (p.role) {  // the host may have given the sums behind the next product this memory
        p.glu_copy = memory_->vectors[kGlu], p.glu_k = static_cast<i32>(g.k), p.glu_begin = static_cast<i32>(g.k_begin);
        d.writes.push_back(span_of(p.glu_copy, g.k * slots * 4));
        pending = false;
    }
    Recipe r;
    r.input = kInputPlain, r.a = p.glu_copy ? p.glu_copy : p.glu_y, r.k = g.k * slots;
    const Span y = span_of(g.glu.y);
    if (!bind(g.xq, r) || meet({y}, d.reads)) return false;
    d.set(p);
    d.writes.push_back(y);
    return true;
}
bool RankRun::add_product(const MulVecArgs& m) {
    if (m.x.ne[1] != 1 || !m.xq || !stream_can_type(m.part[0].w.type)) return false;
    const auto found = recipes_.find(m.xq);
    if (found == recipes_.end() || found->second.k != m.k) return false;
    const Recipe r = found->second;
    StreamProduct p{};
    p.n_parts = m.n_parts;
    p.type = m.part[0].w.type;
    p.k = static_cast<i32>(m.k);
    for (int i = 0; i < m.n_parts; ++i) {
        const MulVecPart& part = m.part[i];
        if (part.y.nb[0] != 4 || part.y.type != kF32 || !set_rows_of(p, part.w, i == 0)) return false;
        p.part[i].w = part.w.plane[0];
        p.part[i].y = reinterpret_cast<float*>(part.y.data);
        p.part[i].n = static_cast<i32>(part.w.n);
    }
    if (!stream_fit(p, memory_->n_blocks)) return false;
    Draft d = Draft::of(kStreamProduct, p);
    for (int i = 0; i < m.n_parts; ++i) d.writes.push_back(span_of(p.part[i].y, p.part[i].n * 4));
    if (kept_ != m.xq) {
        if (r.used) return false;
        found->second.used = true;
        give_input(p, r, d, true);
    }
    kept_ = m.xq;
    d.set(p);
    stages.push_back(std::move(d));
    return true;
}
/// The recipe becomes the product's input. Copies that only this kernel knows take the place of memory that the host may reuse.
/// norms_b: what takes it can norm what is added, too.
void RankRun::give_input(StreamProduct& p, const Recipe& of, Draft& d, bool norms_b) {
    Recipe r = of;
    p.input = r.input;
    if (const std::vector<Draft> factor = norms_b ? take_factor(r) : std::vector<Draft>{}; !factor.empty()) {
        p.a = r.a, p.b = r.b, p.eps = r.eps, p.sum = r.sum;
        take_norm_of_b(p, r.k);
        if (p.b_weight) r.a = p.a, r.b = p.b, p.sum_factor = r.sum_factor;
        else r = of, stages.insert(stages.end(), factor.begin(), factor.end());
    }
    p.a = r.a, p.b = r.b, p.weight = r.weight, p.eps = r.eps, p.sum = r.sum, p.norm = r.norm;
    p.share = stream_share(r.k, memory_->n_blocks);
    if (r.weighed) p.weighed = 1, d.writes.push_back(span_of(p.sum, r.k * 4));
    bool own_a = false, own_b = false;
    if (p.input == kInputPlain && still(last_norm_, p.a, r.k)) p.a = last_norm_.copy, own_a = true;
    if (p.input == kInputNorm) {
        if (norms_b && !p.b_weight) take_norm_of_b(p, r.k);
        own_a = take_copy(p.a, r.k);
        own_b = take_copy(p.b, r.k);
        if (r.sum) {
            next_sum_ ^= 1;
            p.sum_copy = memory_->vectors[kSum0 + next_sum_];
            last_sum_ = {r.sum, p.sum_copy};
            d.writes.push_back(span_of(p.sum, r.k * 4));
            d.writes.push_back(span_of(p.sum_copy, r.k * 4));
        }
        if (r.norm) d.writes.push_back(span_of(r.norm, r.k * 4));
    }
    auto import = [&](const float*& from, int vector) {
        if (!from || (!cautious && !meet({span_of(from, r.k * 4)}, d.writes))) return;
        const StreamCopy copy{from, memory_->vectors[vector], r.k};
        Draft c = Draft::of(kStreamCopy, copy);
        c.reads = {span_of(from, r.k * 4)};
        c.writes = {span_of(copy.to, r.k * 4)};
        stages.push_back(std::move(c));
        from = copy.to;
    };
    if (!own_a) import(p.a, kImportA);
    if (!own_b) import(p.b, kImportB);
    d.reads.push_back(span_of(p.a, r.k * 4));
    if (p.b) d.reads.push_back(span_of(p.b, r.k * 4));
}
/// A sum that is multiplied by one number in its place (Gemma 4's layers): the last two stages, which go; none, where they are something else.
std::vector<Draft> RankRun::take_factor(Recipe& r) {
    if (cautious || r.input != kInputNorm || r.b || stages.size() < 2) return {};
    const auto product = body_of<StreamBinary>(stages, stages.size() - 1, kStreamBinary), sum = body_of<StreamBinary>(stages, stages.size() - 2, kStreamBinary);
    if (!product || !sum || product->op != static_cast<i32>(BinaryOp::kMul) || sum->op != static_cast<i32>(BinaryOp::kAdd)) return {};
    for (const StreamBinary& b : {*product, *sum})
        if (b.copy || b.n_push || reinterpret_cast<const float*>(b.args.y.data) != r.a || !is_vector(b.args.y, r.k) || !is_vector(b.args.a, r.k)) return {};
    const View& factor = product->args.b;
    if (!same_view(product->args.a, product->args.y) || factor.type != kF32 || n_elements(factor) != 1 || !is_vector(sum->args.b, r.k)) return {};
    if (written(span_of(factor))) return {};
    r.a = reinterpret_cast<const float*>(sum->args.a.data), r.b = reinterpret_cast<const float*>(sum->args.b.data);
    r.sum = reinterpret_cast<float*>(product->args.y.data), r.sum_factor = reinterpret_cast<const float*>(factor.data);
    std::vector<Draft> taken(stages.end() - 2, stages.end());
    stages.erase(stages.end() - 2, stages.end());
    return taken;
}
/// What is added to a residual may come out of a norm of its own, which blocks do for themselves then: a stage less. Its result must be nobody else's: the sum
/// takes its place.
void RankRun::take_norm_of_b(StreamProduct& p, i64 k) {
    constexpr size_t kNear = 4;  // stages: rows that are wanted of the last layer may be taken in between
    for (size_t i = stages.size(); i-- > 0 && stages.size() - i <= kNear && p.b && !cautious;) {
        if (stages[i].kind != kStreamNormRows) continue;
        const StreamNormRows s = stages[i].get<StreamNormRows>();
        const FusedNormArgs& n = s.norm;
        const float* const y = reinterpret_cast<const float*>(n.y.data);
        if (y != p.a && y != p.b) continue;
        const std::vector<Span> from = {span_of(n.a)}, to = {span_of(n.y)};
        if (y != p.sum || s.factor != 1.0f || n.has_b || !n.has_weight || n.eps != p.eps || !is_vector(n.a, k) || !is_vector(n.y, k) || !is_vector(n.weight, k))
            return;
        for (size_t j = i + 1; j < stages.size(); ++j)
            if (meet(from, stages[j].writes) || meet(to, stages[j].writes) || meet(to, stages[j].reads)) return;
        if (y == p.a) p.a = p.b;
        p.b = reinterpret_cast<const float*>(n.a.data), p.b_weight = reinterpret_cast<const float*>(n.weight.data);
        stages.erase(stages.begin() + static_cast<std::ptrdiff_t>(i));
        return;
    }
}
/// Whether c is the copy of what now lies at `from`: its stage is the last that wrote there.
bool RankRun::still(const Copy& c, const float* from, i64 n) const {
    if (!from || c.host != from) return false;
    for (size_t i = stages.size(); i-- > 0;)
        if (meet({span_of(from, n * 4)}, stages[i].writes)) return meet({span_of(c.copy, n * 4)}, stages[i].writes);
    return false;
}
/// Reads the copy of a residual or of a product's result instead, where there is one. Hosts add them in either order.
bool RankRun::take_copy(const float*& from, i64 k) {
    if (!from) return false;
    const float* copy = still(last_sum_, from, k) ? last_sum_.copy : copy_of_output(from, k, next_added_, kAdded0, 3);
    if (copy) from = copy;
    return copy != nullptr;
}
/// One of n_vectors, from `turn` on, that nobody has read or written since stage i began: that stage's slow blocks may still read their input where its
/// fast ones store. Null: there is none.
float* RankRun::free_vector(size_t i, i64 n, int turn, int vectors, int n_vectors) const {
    for (int k = 0; k < n_vectors; ++k) {
        float* const vector = memory_->vectors[vectors + (turn + k) % n_vectors];
        const std::vector<Span> span = {span_of(vector, n * 4)};
        if (std::none_of(stages.begin() + static_cast<std::ptrdiff_t>(i), stages.end(),
                         [&](const Draft& d) { return meet(span, d.reads) || meet(span, d.writes); }))
            return vector;
    }
    return nullptr;
}
/// A copy of what the last product or all_reduce before stage `end` wrote to y, made by its stage in one of n_vectors by turns; null when
/// some other stage wrote it, or all of them are in use.
float* RankRun::copy_of_output(const float* y, i64 n, int& turn, int vectors, int n_vectors, size_t end) {
    const Span wanted = span_of(y, n * 4);
    for (size_t i = std::min(end, stages.size()); i-- > 0;) {
        Draft& d = stages[i];
        if (!meet({wanted}, d.writes)) continue;
        float* const copy = free_vector(i, n, turn, vectors, n_vectors);
        if (!copy) return nullptr;
        bool made = false;
        if (d.kind == kStreamProduct) {
            StreamProduct p = d.get<StreamProduct>();
            for (int j = 0; j < p.n_parts && !p.role && !p.glu && !p.n_push; ++j) {
                const i64 before = y - p.part[j].y;
                if (before <= 0 || before + n > p.part[j].n || p.part[j].copy) continue;
                split_part(p, j, before);
            }
            for (int j = 0; j < p.n_parts && !p.role && !p.glu && !p.n_push; ++j)
                if (p.part[j].y == y && p.part[j].n > n && !p.part[j].copy) split_part(p, j, n);
            for (StreamPart& part : p.part) {
                if (part.y != y || part.n != n || part.copy || p.n_push || p.glu || p.role == kHeads) continue;
                part.copy = copy;
                made = true;
            }
            if (made && p.n_parts != d.get<StreamProduct>().n_parts && !stream_fit(p, memory_->n_blocks)) return nullptr;
            if (made) d.set(p);
        } else if (d.kind == kStreamReduce) {
            StreamReduce r = d.get<StreamReduce>();
            made = r.y == y && r.n == n && !r.copy;
            if (made) r.copy = copy;
            d.set(r);
        } else if (d.kind == kStreamBinary) {
            StreamBinary b = d.get<StreamBinary>();
            made = reinterpret_cast<float*>(b.args.y.data) == y && is_vector(b.args.y, n) && !b.copy && !b.n_push;
            if (made) b.copy = copy;
            d.set(b);
        } else if (d.kind == kStreamNormRows) {
            StreamNormRows s = d.get<StreamNormRows>();
            made = reinterpret_cast<float*>(s.norm.y.data) == y && is_vector(s.norm.y, n) && n >= kStreamLongRow && !s.copy;
            if (made) s.copy = copy;
            d.set(s);
        } else if (d.kind == kStreamNormBySquares) {
            StreamNormBySquares s = d.get<StreamNormBySquares>();
            made = s.y == y && s.n == n && !s.copy;
            if (made) s.copy = copy;
            d.set(s);
        }
        if (!made) return nullptr;
        d.writes.push_back(span_of(copy, n * 4));
        turn = (turn + 1) % n_vectors;
        return copy;
    }
    return nullptr;
}
/// Rows of every part are as long as the first one's, with their planes where its are, and so are matrices of experts.
bool RankRun::set_rows_of(StreamProduct& p, const Matrix& w, bool first) {
    const WeightFormat* format = find_weight_format(w.type);
    if (first) {
        p.row_bytes = static_cast<i32>(w.row_stride);
        for (int f = 0; format && f < format->n_fields; ++f) p.plane_at[f] = static_cast<i32>(w.plane[f] - w.plane[0]);
        if (p.role) p.expert_rows = static_cast<i32>(w.nb2 / w.row_stride);
    }
    for (int f = 0; format && f < format->n_fields; ++f)
        if (w.plane[f] - w.plane[0] != p.plane_at[f]) return false;
    if (w.row_stride != p.row_bytes || (p.role && w.nb2 != p.expert_rows * w.row_stride)) return false;
    return format && w.ne3 == 1;
}
/// The sum of a product's part, or of all ranks' products, and a vector: the stage stores it. 72B shape of Qwen2, one H100: three stages of a layer's
/// thirteen less.
bool RankRun::add_bias(const BinaryArgs& sum) {
    const i64 n = sum.y.ne[0];
    if (!is_vector(sum.y, n) || !is_vector(sum.a, n) || !is_vector(sum.b, n)) return false;
    float* const y = reinterpret_cast<float*>(sum.y.data);
    const Span from = span_of(sum.a), to = span_of(sum.y);
    if (written(span_of(sum.b))) return false;  // it is read before the stage
    for (size_t i = stages.size(); i-- > 0;) {
        Draft& d = stages[i];
        if (meet({to}, d.reads)) return false;
        if (!meet({from}, d.writes)) {
            if (meet({to}, d.writes)) return false;
            continue;
        }
        auto take = [&](auto& result) {  // a StreamPart or a StreamReduce
            if (reinterpret_cast<char*>(result.y) != sum.a.data || result.n != n || result.copy || result.bias) return false;
            if (result.y != y) {
                if (meet({to}, d.writes)) return false;
                result.raw = result.y;
                result.y = y;
                d.writes.push_back(to);
            }
            result.bias = reinterpret_cast<const float*>(sum.b.data);
            return true;
        };
        if (d.kind == kStreamReduce) {
            StreamReduce r = d.get<StreamReduce>();
            const bool taken = take(r);
            d.set(r);
            return taken;
        }
        if (d.kind != kStreamProduct) return false;
        StreamProduct p = d.get<StreamProduct>();
        if (p.glu || p.role || p.n_push) return false;
        const bool taken = std::any_of(std::begin(p.part), std::end(p.part), take);
        d.set(p);
        return taken;
    }
    return false;
}

}  // namespace ggml_tp
