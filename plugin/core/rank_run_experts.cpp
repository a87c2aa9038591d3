// Routers, and products of experts and of heads.
#include "rank_run.h"

#include <algorithm>
#include <limits>

#include "fuse.h"
#include "mul_vec.h"
#include "mul_vec_id.h"

namespace ggml_tp {

bool RankRun::add_one_row(const MulMatArgs& m) {
    return n_elements(m.y) == 1 && m.k_begin == 0 && m.k_end == m.w.k && m.x.type == kF32 && add_floats(mul_vec_args(m), false);
}
/// A product of a few rows of floats, of one token: what a router sees, or (of one row) how much of a shared expert counts. The norm in front of it is its
/// own work.
bool RankRun::add_floats(const MulVecArgs& m, bool is_router) {
    const Matrix& w = m.part[0].w;
    const i64 n = w.n;
    if (m.n_parts != 1 || m.x.ne[1] != 1 || w.k % 8 || w.k > kStreamMostK || stream_share(w.k, memory_->n_blocks) > kStreamStep || w.row_stride % 16 ||
        !is_vector(m.x, w.k) || m.part[0].y.nb[0] != 4 || reinterpret_cast<u64>(w.plane[0]) % 16 ||
        written(span_of(w.plane[0], (n - 1) * w.row_stride + w.k * 4)))
        return false;  // rows are read before the stage, in sixteens
    StreamFloats f{};
    f.w = reinterpret_cast<const float*>(w.plane[0]), f.row_stride = w.row_stride / 4, f.k = w.k, f.n = n;
    f.y = reinterpret_cast<float*>(m.part[0].y.data);
    Draft d;
    Recipe r;
    r.input = kInputPlain, r.a = reinterpret_cast<const float*>(m.x.data), r.k = w.k;
    if (still(last_norm_, r.a, w.k)) {
        r.a = last_norm_.copy;
    } else if (!stages.empty() && stages.back().kind == kStreamNormRows) {
        const StreamNormRows s = stages.back().get<StreamNormRows>();
        const FusedNormArgs& norm = s.norm;
        if (s.factor == 1.0f && norm.y.data == m.x.data && is_vector(norm.y, w.k) && is_vector(norm.a, w.k)) {
            r = recipe_of(norm);
            stages.pop_back();
        }
    }
    for (auto& [xq, of_int8] : recipes_)  // a norm that products will read as int8 too: they find it as floats, then
        if (r.input == kInputPlain && of_int8.input == kInputNorm && !of_int8.used && of_int8.norm == r.a) {
            r = of_int8;
            of_int8.input = kInputPlain, of_int8.a = of_int8.norm;
        }
    d.writes.push_back(span_of(f.y, n * 4));  // maybe where one of the norm's inputs is: then that is copied
    if (r.input == kInputNorm) {
        StreamProduct p{};  // as a product takes it
        p.k = static_cast<i32>(w.k);
        give_input(p, r, d, false);
        f.a = p.a, f.b = p.b, f.weight = p.weight, f.eps = p.eps, f.sum = p.sum, f.sum_copy = p.sum_copy, f.norm = p.norm, f.has_norm = 1;
        f.share = p.share;
        f.norm_copy = memory_->vectors[kNormed];
        last_norm_ = {f.norm, f.norm_copy};
        d.writes.push_back(span_of(f.norm_copy, w.k * 4));
    } else {
        f.a = r.a;
        d.reads.push_back(span_of(f.a, w.k * 4));
    }
    if (meet({span_of(f.y, n * 4)}, d.reads)) return false;
    if (is_router) {
        f.y_copy = memory_->vectors[kLogits];
        last_logits_ = {f.y, f.y_copy};
        d.writes.push_back(span_of(f.y_copy, n * 4));
    }
    Draft out = Draft::of(kStreamFloats, f);
    out.reads = d.reads, out.writes = d.writes;
    stages.push_back(std::move(out));
    kept_ = nullptr;  // its warps meet in the same shared memory
    return true;
}
/// In the order in which a host computes them: what comes later may take the memory of what came before.
std::vector<RankRun::Result> RankRun::results_of(StreamRoute& r) {
    auto result = [](auto*& p, i64 elems) { return Result{reinterpret_cast<void**>(&p), elems}; };
    return {result(r.biased, r.n_expert),
            result(r.gated, r.n_expert),
            result(r.selection, r.n_expert),
            result(r.group_order, r.n_expert),
            result(r.group_best, 2 * r.n_groups),
            result(r.group_sums, r.n_groups),
            result(r.groups, r.n_groups),
            result(r.group_rows, r.n_groups ? r.n_expert / r.n_groups * r.n_groups_used : 0),
            result(r.open, r.n_expert),
            result(r.order, r.n_order),
            result(r.chosen, r.n_used),
            result(r.after, r.n_used),
            result(r.sum, 1),
            result(r.clamped_sum, 1),
            result(r.norms, r.n_used),
            result(r.scaled_weights, r.n_used)};
}
/// The steps of a chain, from step `at` on, by which only experts of some groups count (llama.cpp, build_moe_ffn); by: what chooses. Where what is left to choose
/// from lies; null: it is not that.
const char* RankRun::take_groups(StreamRoute& r, const ChainArgs& c, int& at, const char* by) {
    constexpr ChainOp kOps[] = {ChainOp::kArgsort, ChainOp::kGetRows, ChainOp::kSumRows, ChainOp::kArgsort,
                                ChainOp::kGetRows, ChainOp::kFill,    ChainOp::kSetRows};
    constexpr int kSteps = std::size(kOps);
    const ChainStep* const s = c.step + at;
    if (at + kSteps > c.n_steps) return nullptr;
    for (int i = 0; i < kSteps; ++i)
        if (s[i].op != kOps[i]) return nullptr;
    const i64 groups = s[0].a.ne[1], each = s[0].a.ne[0], used = s[4].b.ne[0];
    if (groups > kStreamMostGroups || each < 2 || groups * each != r.n_expert || used > groups) return nullptr;
    auto has = [](const View& v, i64 n0, i64 n1, i64 n2 = 1) { return is_dense_words(v) && v.ne[0] == n0 && v.ne[1] == n1 && v.ne[2] == n2 && v.ne[3] == 1; };
    auto all = [&](const View& v, const char* data) { return v.data == data && has(v, each, groups); };
    auto first = [](const View& ids, const View& order, i64 n) {  // the first n of each row of an order
        return ids.data == order.data && ids.ne[0] == n && ids.nb[0] == 4 && ids.ne[1] == order.ne[1] && ids.nb[1] == order.nb[1] && ids.ne[2] * ids.ne[3] == 1;
    };
    const char* const rest = s[5].y.data;
    const bool known = all(s[0].a, by) && all(s[0].y, s[0].y.data) && s[0].p0 != 0 &&                                                 //
                       s[1].a.data == by && has(s[1].a, 1, each, groups) && first(s[1].b, s[0].y, 2) && has(s[1].y, 1, 2, groups) &&  //
                       s[2].a.data == s[1].y.data && has(s[2].a, 2, groups) && has(s[2].y, 1, groups) &&                              //
                       s[3].a.data == s[2].y.data && has(s[3].a, groups, 1) && has(s[3].y, groups, 1) && s[3].p0 != 0 &&              //
                       all(s[4].a, by) && first(s[4].b, s[3].y, used) && has(s[4].y, each, used) &&                                   //
                       all(s[5].y, rest) && s[5].p0 == -std::numeric_limits<float>::infinity() &&                                     //
                       s[6].a.data == s[4].y.data && has(s[6].a, each, used) && first(s[6].b, s[3].y, used) && all(s[6].y, rest);
    if (!known) return nullptr;
    r.n_groups = static_cast<i32>(groups), r.n_groups_used = static_cast<i32>(used);
    r.group_order = reinterpret_cast<i32*>(s[0].y.data), r.group_best = reinterpret_cast<float*>(s[1].y.data);
    r.group_sums = reinterpret_cast<float*>(s[2].y.data), r.groups = reinterpret_cast<i32*>(s[3].y.data);
    r.group_rows = reinterpret_cast<float*>(s[4].y.data), r.open = reinterpret_cast<float*>(s[6].y.data);
    at += kSteps;
    return rest;
}
/// A router's chain, if it is one that the kernel knows: see StreamRoute.
bool RankRun::add_router(const ChainArgs& c) {
    StreamRoute r{};
    const View& logits = c.step[0].a;
    r.n_expert = static_cast<i32>(logits.ne[0]);
    if (r.n_expert > kStreamMostExperts || !is_vector(logits, r.n_expert)) return false;
    if (!still(last_logits_, reinterpret_cast<const float*>(logits.data), r.n_expert)) return false;
    r.logits = last_logits_.copy;
    int at = 0;
    const char* now = logits.data;  // what the next step has to begin with
    auto next = [&](ChainOp op, i64 n) -> const ChainStep* {
        if (at == c.n_steps || c.step[at].op != op || c.step[at].a.data != now) return nullptr;
        const View& y = c.step[at].y;
        if (y.nb[0] != 4 || y.ne[0] * y.ne[1] != n || y.ne[2] * y.ne[3] != 1 || (y.ne[1] > 1 && y.ne[0] > 1)) return nullptr;
        if (y.ne[1] > 1 && y.nb[1] != 4) return nullptr;
        now = y.data;
        return &c.step[at++];
    };
    auto floats = [](const View& v) { return reinterpret_cast<float*>(v.data); };
    if (const ChainStep* s = next(ChainOp::kAdd, r.n_expert)) {
        if (!is_vector(s->b, r.n_expert)) return false;
        r.logits_bias = floats(s->b), r.biased = floats(s->y);
    }
    const char* const plain = now;
    if (const ChainStep* s = next(ChainOp::kSoftMax, r.n_expert)) {
        r.gating = kGatingSoftMax, r.scale_before = s->p0, r.gated = floats(s->y);
    } else if (const ChainStep* g = next(ChainOp::kSigmoid, r.n_expert)) {
        r.gating = kGatingSigmoid, r.gated = floats(g->y);
    }
    const char* const gated = now;
    if (const ChainStep* s = r.gating ? next(ChainOp::kAdd, r.n_expert) : nullptr) {
        if (!is_vector(s->b, r.n_expert)) return false;
        r.selection_bias = floats(s->b), r.selection = floats(s->y);
    }
    if (at < c.n_steps && c.step[at].op == ChainOp::kArgsort && c.step[at].a.ne[1] > 1) {
        now = take_groups(r, c, at, now);
        if (!now) return false;
    }
    if (at == c.n_steps || c.step[at].op != ChainOp::kArgsort) return false;
    if (c.step[at].a.data == plain && plain != now && now == gated) r.steps |= kRouteByLogits, now = plain;
    r.n_order = static_cast<i32>(c.step[at].y.ne[0]);
    const ChainStep* const sort = next(ChainOp::kArgsort, r.n_order);
    if (!sort || sort->p0 == 0 || r.n_order > r.n_expert) return false;
    r.order = reinterpret_cast<i32*>(sort->y.data);
    now = gated;
    if (at == c.n_steps || c.step[at].op != ChainOp::kGetRows) return false;
    const View &rows = c.step[at].a, &ids = c.step[at].b;
    r.n_used = static_cast<i32>(ids.ne[0]);
    const ChainStep* const chosen = next(ChainOp::kGetRows, r.n_used);
    if (!chosen || rows.ne[0] != 1 || rows.ne[1] != r.n_expert || rows.nb[1] != 4 || ids.data != sort->y.data || ids.nb[0] != 4 || ids.ne[1] != 1 ||
        r.n_used > r.n_order || r.n_used > kVecSlots)
        return false;
    r.chosen = floats(chosen->y);
    if (const ChainStep* s = next(ChainOp::kSoftMax, r.n_used)) {
        if (s->y.ne[0] != r.n_used) return false;
        r.steps |= kRouteSoftMax, r.scale_after = s->p0, r.after = floats(s->y);
    }
    const char* const weights = now;
    if (const ChainStep* s = next(ChainOp::kSumRows, 1)) {
        r.steps |= kRouteDivide, r.sum = floats(s->y);
        if (const ChainStep* clamp = next(ChainOp::kClamp, 1)) {
            r.steps |= kRouteClamp, r.least = clamp->p0, r.most = clamp->p1, r.clamped_sum = floats(clamp->y);
        }
        const char* const sum = now;
        now = weights;
        const ChainStep* const divide = next(ChainOp::kDiv, r.n_used);
        if (!divide || divide->b.data != sum) return false;
        r.norms = floats(divide->y);
    }
    if (const ChainStep* s = next(ChainOp::kScale, r.n_used)) {
        r.steps |= kRouteScale, r.factor = s->p0, r.shift = s->p1, r.scaled_weights = floats(s->y);
    }
    if (at != c.n_steps || pending) return false;
    if (c.quantize.xq && !add_quantize(c.quantize)) return false;
    route_ = r, ids_ = ids.data, weights_ = now, input_ = {};
    pending = true;
    return true;
}
/// Each head's own matrix and input.
bool RankRun::add_heads(const MulVecIdArgs& m) {
    const auto found = m.xq ? recipes_.find(m.xq) : recipes_.end();
    const View& y = m.part[0].y;
    const i64 heads = m.part[0].w.ne2, n = m.part[0].w.n, stride = y.nb[1];
    if (found == recipes_.end() || found->second.k != m.k * heads || found->second.input != kInputPlain || !stream_can_type(m.part[0].w.type)) return false;
    if (pending || m.n_parts != 1 || m.scaled || m.bias[0].y.data || m.ids.ne[0] * m.ids.ne[1] != heads || y.nb[0] != 4 || y.ne[0] != n) return false;
    if (stride % 4 || stride < n * 4 || (y.ne[2] > 1 && y.nb[2] != y.ne[1] * stride)) return false;
    StreamProduct p{};
    p.n_parts = 1, p.type = m.part[0].w.type, p.k = static_cast<i32>(m.k), p.role = kHeads, p.y_stride = static_cast<i32>(stride / 4);
    if (!set_rows_of(p, m.part[0].w, true)) return false;
    p.part[0].w = m.part[0].w.plane[0];
    p.part[0].y = reinterpret_cast<float*>(y.data), p.part[0].n = static_cast<i32>(n);
    bool fits = false;
    for (i64 slots = std::min<i64>(heads, kVecSlots); slots > 0 && !fits; --slots) {
        if (heads % slots) continue;
        p.slots = static_cast<i32>(slots), p.slot_groups = static_cast<i32>(heads / slots);
        fits = stream_fit(p, memory_->n_blocks);
    }
    if (!fits) return false;
    const Recipe r = found->second;
    found->second.used = true;
    Draft d = Draft::of(kStreamProduct, p);
    d.writes = {span_of(p.part[0].y, (slots_before(p) + n) * 4)};
    give_input(p, r, d, false);
    kept_ = nullptr;
    d.set(p);
    stages.push_back(std::move(d));
    return true;
}
bool RankRun::add_experts(const MulVecIdArgs& m) {
    if (!m.ids.data) return add_heads(m);
    const auto found = m.xq ? recipes_.find(m.xq) : recipes_.end();
    const i64 slots = m.ids.ne[0];
    if (found == recipes_.end() || found->second.used || !stream_can_type(m.part[0].w.type) || slots != route_.n_used || m.ids.ne[1] != 1) return false;
    if (m.ids.data != ids_ || m.ids.nb[0] != 4 || m.x.ne[2] * m.x.ne[3] != 1) return false;
    const bool after_weighed = input_.weighed && found->second.a == memory_->vectors[kGlu], sums = m.scaled != 0 || after_weighed;
    if (m.scaled && input_.weighed) return false;
    if (sums && m.n_sums < slots - 1) {
        summed_ = m;
        return !pending && (pending = true);
    }
    if (m.n_parts > (sums ? 1 : 2) || m.x.ne[1] != (sums ? slots : 1) || found->second.k != m.k * m.x.ne[1]) return false;
    StreamExperts e{};
    StreamProduct& p = e.product;
    p.n_parts = m.n_parts, p.type = m.part[0].w.type, p.k = static_cast<i32>(m.k), p.slots = static_cast<i32>(slots);
    p.weighed = after_weighed;
    p.role = sums ? kExpertsSum : kExpertsEach, p.y_stride = static_cast<i32>(m.part[0].y.nb[1] / 4);
    Draft d = Draft::of(kStreamProduct, e);
    for (int i = 0; i < m.n_parts; ++i) {
        const MulVecPart& part = m.part[i];
        const View& y = mul_vec_id_result(m, i);
        if (!set_rows_of(p, part.w, i == 0) || !is_slots(part.y, part.w.n, slots) || !is_slots(y, part.w.n, slots)) return false;
        if (part.y.nb[1] != m.part[0].y.nb[1] || y.nb[1] != part.y.nb[1]) return false;
        p.part[i].w = part.w.plane[0];
        p.part[i].y = reinterpret_cast<float*>(y.data);
        p.part[i].n = static_cast<i32>(part.w.n);
        d.writes.push_back(span_of(y));
        if (y.data != part.y.data) {
            p.part[i].raw = reinterpret_cast<float*>(part.y.data);
            d.writes.push_back(span_of(part.y));
        }
        const ExpertBias& bias = m.bias[i];
        if (!bias.rows) continue;
        if (bias.row_bytes % 4 || written(span_of(bias.rows, (part.w.ne2 - 1) * bias.row_bytes + part.w.n * 4))) return false;  // it is read before the stage
        p.part[i].bias = reinterpret_cast<const float*>(bias.rows), p.part[i].bias_row = static_cast<i32>(bias.row_bytes / 4);
    }
    if (!sums) {
        e.route = route_;
        for (const Result& result : results_of(e.route)) {
            if (*result.at) d.writes.push_back(result.span());
        }
        for (const float* read : {e.route.logits, e.route.logits_bias, e.route.selection_bias})
            if (read) d.reads.push_back(span_of(read, e.route.n_expert * 4));
    } else if (after_weighed) {
        if (pending || !stream_fit(p, memory_->n_blocks)) return false;
    } else {
        if (pending || m.weights.data != weights_ || m.n_sums != slots - 1 || !stream_fit(p, memory_->n_blocks)) return false;
        const View &y = mul_vec_id_result(m, 0), &products = m.products;
        e.sums.products = reinterpret_cast<float*>(products.data), e.sums.products_stride = products.nb[1] / 4;
        if (y.data != products.data) e.sums.y = p.part[0].y;
        if (p.part[0].raw && m.part[0].y.data == products.data) p.part[0].raw = nullptr;
        d.writes.push_back(span_of(products));
        p.part[0].y = e.sums.products;
        for (int i = 0; i < m.n_sums; ++i) {
            d.writes.push_back(span_of(m.sum[i]));
            p.part[0].y = reinterpret_cast<float*>(m.sum[i].data);
            if (i + 1 < m.n_sums) e.sums.sum[i] = p.part[0].y;
        }
        if (slots == 1) e.sums.products = nullptr;
    }
    const Recipe r = found->second;
    found->second.used = true;
    give_input(p, r, d, true);
    kept_ = m.xq;
    d.set(e);
    stages.push_back(std::move(d));
    pending = !sums;
    return true;
}
/// A launch behind a product of experts that has not all of its sums: where one lies over the experts' weights or numbers, it is a launch of its own, as blocks
/// of the kernel per step may still read those. A stage's blocks have them in shared memory.
bool RankRun::add_sum(const RankLaunch& l) {
    MulVecIdArgs m = *summed_;
    if (!is(l, "binary_add") || !take_sum(m, args_of<BinaryArgs>(l))) return false;
    summed_ = m;
    if (m.n_sums < m.ids.ne[0] - 1) return true;
    summed_.reset();
    pending = false;
    return add_experts(m);
}
/// Where a token has one expert, its input may be weighed instead of its result (Llama 4): a copy of the input, times the weight, as int8 of which the scale is
/// another. See StreamProduct::weighed.
bool RankRun::repeat_input(const MoveArgs& m) {
    if (route_.n_used != 1 || m.bytes != 4 || !is_dense(m.x) || !is_dense(m.y) || n_elements(m.x) != n_elements(m.y)) return false;
    input_ = {reinterpret_cast<const float*>(m.x.data), m.y.data, n_elements(m.x)};
    return true;
}
/// What follows: the weight, then int8. Anything else would read what nobody has written.
bool RankRun::add_weighed(const RankLaunch& l) {
    if (is(l, "quantize_x")) return bind_weighed(args_of<QuantizeArgs>(l));
    return is(l, "binary_mul") && weigh_input(args_of<BinaryArgs>(l));
}
bool RankRun::weigh_input(const BinaryArgs& b) {
    const bool one = b.b.data == weights_ && b.b.type == kF32 && n_elements(b.b) == 1;
    if (input_.weighed || !one || !same_view(b.a, b.y) || b.y.data != input_.y || !is_dense(b.y) || n_elements(b.y) != input_.k) return false;
    return input_.weighed = true;
}
bool RankRun::bind_weighed(const QuantizeArgs& q) {
    if (!input_.weighed || q.x.data != input_.y || q.k != input_.k || q.k_begin != 0 || q.k_end != q.k || !is_dense(q.x) || n_elements(q.x) != q.k)
        return false;
    Recipe r;
    r.input = kInputPlain, r.a = input_.x, r.k = q.k, r.sum = reinterpret_cast<float*>(input_.y), r.weighed = true;
    return input_.bound = bind(q.xq, r);
}
/// A row for each slot, at multiples of nb[1].
bool RankRun::is_slots(const View& v, i64 n, i64 slots) {
    return v.type == kF32 && v.nb[0] == 4 && v.ne[0] == n && v.ne[1] == slots && v.ne[2] * v.ne[3] == 1 && v.nb[1] % 4 == 0 && v.nb[1] >= n * 4;
}

}  // namespace ggml_tp
