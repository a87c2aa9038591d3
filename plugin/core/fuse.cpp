#include "fuse.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "chain.h"
#include "elementwise.h"
#include "experts.h"
#include "flash_attn.h"
#include "mul_few.h"
#include "mul_vec.h"
#include "mul_vec_id.h"
#include "mul_wgmma.h"
#include "norm.h"
#include "rope.h"

namespace ggml_tp {
namespace {

// ---- schedule

/// Whether two steps may change places.
bool independent(const PlanStep& a, const PlanStep& b, const Graph& graph) {
    auto written = [&](const PlanStep& step) { return step.kind == PlanStep::kSumSquares ? nullptr : &graph.tensors[step.tensor]; };
    auto reads = [&](const PlanStep& step, const Tensor* of) {
        if (!of || step.kind == PlanStep::kAllReduce || step.kind == PlanStep::kAllGather) return false;
        auto is_source = [&](int node) {
            const Tensor& t = graph.tensors[node];
            return std::any_of(std::begin(t.src), std::end(t.src), [&](int s) { return s >= 0 && overlap(graph.tensors[s], *of); });
        };
        return step.kind == PlanStep::kCompute ? is_source(step.tensor) : std::any_of(step.norms.begin(), step.norms.end(), is_source);
    };
    const Tensor *x = written(a), *y = written(b);
    return !(x && y && overlap(*x, *y)) && !reads(a, y) && !reads(b, x);
}

constexpr size_t kLookAhead = 24;  // steps; Q, K and V lie at most a dozen apart, with biases and head norms between

}  // namespace

void schedule(Plan& plan, const Graph& graph) {
    std::vector<PlanStep>& steps = plan.steps;
    auto product = [&](const PlanStep& step) {
        const abi::Op op = graph.tensors[step.tensor].op;
        return step.kind == PlanStep::kCompute && (op == abi::Op::MUL_MAT || op == abi::Op::MUL_MAT_ID);
    };
    auto source = [&](const PlanStep& step, int i) -> const Tensor& { return graph.tensors[graph.tensors[step.tensor].src[i]]; };
    /// Step j, to place `to` in front of it; false: it depends on what lies between.
    auto bring = [&](size_t j, size_t to) {
        const auto first = steps.begin() + static_cast<long>(to), step = steps.begin() + static_cast<long>(j);
        if (!std::all_of(first, step, [&](const PlanStep& between) { return independent(between, *step, graph); })) return false;
        std::rotate(first, step, step + 1);
        return true;
    };
    for (size_t i = 0; i < steps.size(); ++i) {
        if (!product(steps[i])) continue;
        size_t to = i + 1;
        // Weights of the same type first: those become one launch.
        for (const bool same_type : {true, false})
            for (size_t j = to; j < std::min(steps.size(), i + kLookAhead); ++j) {
                if (!product(steps[j]) || (source(steps[j], 0).type == source(steps[i], 0).type) != same_type) continue;
                const Tensor &x = source(steps[i], 1), &other = source(steps[j], 1);
                if (graph.tensors[steps[i].tensor].op != graph.tensors[steps[j].tensor].op) continue;
                if (x.address != other.address || x.bytes != other.bytes || !std::equal(x.ne, x.ne + 4, other.ne)) continue;
                to += bring(j, to);
            }
        // Then what is added to them: between ropes and stores it would keep these apart.
        const size_t products_end = to;
        auto adds_bias = [&](const PlanStep& step) {
            const Tensor& t = graph.tensors[step.tensor];
            if (step.kind != PlanStep::kCompute || (t.op != abi::Op::ADD && t.op != abi::Op::ADD_ID) || graph.tensors[t.src[1]].is_node) return false;
            return std::any_of(steps.begin() + static_cast<long>(i), steps.begin() + static_cast<long>(products_end),
                               [&](const PlanStep& of) { return of.tensor == t.src[0]; });
        };
        for (size_t j = to; j < std::min(steps.size(), i + kLookAhead); ++j)
            if (adds_bias(steps[j])) to += bring(j, to);
        i = to - 1;
    }
    // Rows that are divided, as Q's and K's are where all heads together are normed, have one all_reduce of their sums of squares.
    auto n_rows = [&](const PlanStep& step) { return graph.tensors[step.tensor].elems() / graph.tensors[step.tensor].ne[0]; };
    for (size_t i = 0; i < steps.size(); ++i) {
        if (steps[i].kind != PlanStep::kSumSquares) continue;
        for (size_t j = i + 1; j < std::min(steps.size(), i + kLookAhead); ++j) {
            if (steps[j].kind != PlanStep::kSumSquares || n_rows(steps[j]) != n_rows(steps[i])) continue;
            if (steps[i].norms.size() + steps[j].norms.size() > kMostSquares || !bring(j, i + 1)) continue;
            PlanStep &first = steps[i], &second = steps[i + 1];
            first.norms.insert(first.norms.end(), second.norms.begin(), second.norms.end());
            first.inputs.insert(first.inputs.end(), second.inputs.begin(), second.inputs.end());
            steps.erase(steps.begin() + static_cast<long>(i) + 1);
        }
    }
}

// ---- fuse
namespace {

bool apart(const View& a, const View& b) {
    auto element = [](const View& v) { return v.type == kF16 || v.type == kBF16 ? 2 : v.type == kI64 ? 8 : 4; };
    const i64 of_a = element(a), of_b = element(b);
    i64 a_bytes = of_a, b_bytes = of_b;
    for (int d = 0; d < 4; ++d) a_bytes += (a.ne[d] - 1) * a.nb[d], b_bytes += (b.ne[d] - 1) * b.nb[d];
    if (a.data + a_bytes <= b.data || b.data + b_bytes <= a.data) return true;
    // Parts of the same rows, side by side.
    const i64 row = a.nb[1], from = b.data - a.data;
    if (a.nb[0] != of_a || b.nb[0] != of_b || row <= 0 || !std::equal(a.nb + 1, a.nb + 4, b.nb + 1) || a.nb[2] % row || a.nb[3] % row) return false;
    return from >= 0 ? a.ne[0] * of_a <= from && from + b.ne[0] * of_b <= row : b.ne[0] * of_b <= -from && a.ne[0] * of_a - from <= row;
}
bool same_or_apart(const View& a, const View& b) { return same_view(a, b) || apart(a, b); }

const MulVecArgs& parts_of(const MulVecArgs& a) { return a; }
const MulWideArgs& parts_of(const MulPiecesArgs& a) { return a.wide; }
/// Products of the same activations side by side: join(args, more) adds the second's, launch(args, arch) is both's.
template <class Args, bool (*join)(Args&, const Args&), Launch (*launch)(const Args&, Arch)>
bool join_products(RankLaunch& a, const RankLaunch& b, Arch arch) {
    Args args = args_of<Args>(a);
    const Args more = args_of<Args>(b);
    for (int i = 0; i < parts_of(args).n_parts; ++i)
        for (int j = 0; j < parts_of(more).n_parts; ++j)
            if (!apart(parts_of(args).part[i].y, parts_of(more).part[j].y)) return false;
    return join(args, more) && replace(a, launch(args, arch), args);
}

/// Norms: a row of the residual stream is summed, normalised, weighted and quantised in one go.
FusedNormArgs fused(const NormArgs& n) {
    FusedNormArgs f{};
    f.a = n.x;
    f.y = n.y;
    f.weight = n.weight;
    f.has_weight = n.has_weight;
    f.eps = n.eps;
    return f;
}
FusedNormArgs norm_of(const RankLaunch& l) { return std::strcmp(l.launch.kernel, "rms_norm") == 0 ? fused(args_of<NormArgs>(l)) : args_of<FusedNormArgs>(l); }
bool sum_then_norm(RankLaunch& a, const RankLaunch& b, Arch arch) {
    const BinaryArgs sum = args_of<BinaryArgs>(a);
    FusedNormArgs norm = norm_of(b);
    if (norm.has_b || !same_view(sum.y, norm.a) || !same_or_apart(norm.y, sum.a) || !same_or_apart(norm.y, sum.b)) return false;
    norm.a = sum.a;
    norm.b = sum.b;
    norm.sum = sum.y;
    norm.has_b = 1;
    return replace(a, fused_norm_launch(norm, arch), norm);
}
/// A row's weights, where the product takes the norm's place: otherwise both results would have to be written.
template <class Norm>
bool take_weight(Norm& norm, const BinaryArgs& scale) {
    if (norm.has_weight || !same_view(scale.a, norm.y) || !same_view(scale.y, norm.y) || scale.b.ne[0] != norm.y.ne[0]) return false;
    if (scale.b.ne[1] * scale.b.ne[2] * scale.b.ne[3] != 1 || scale.b.type != kF32 || scale.b.nb[0] != 4) return false;
    norm.weight = scale.b;
    norm.has_weight = 1;
    return true;
}
bool norm_then_weight(RankLaunch& a, const RankLaunch& b, Arch arch) {
    FusedNormArgs norm = norm_of(a);
    return !norm.xq && take_weight(norm, args_of<BinaryArgs>(b)) && replace(a, fused_norm_launch(norm, arch), norm);
}
bool squares_then_weight(RankLaunch& a, const RankLaunch& b, Arch arch) {
    NormBySquaresArgs norm = args_of<NormBySquaresArgs>(a);
    return take_weight(norm, args_of<BinaryArgs>(b)) && replace(a, norm_by_squares_launch(norm, arch), norm);
}
/// The form that a kernel brings activations into; -1: it is no such kernel.
int form_of(const char* kernel) {
    static constexpr std::pair<const char*, ActivationForm> kForms[] = {{"quantize_x", kInt8Rows}, {"half_panels", kHalfPanels}, {"bf16_panels", kBf16Panels}};
    for (const auto& [name, form] : kForms)
        if (std::strcmp(kernel, name) == 0) return form;
    return -1;
}
/// A panel's rows end in whole steps of 64; what lies beyond k is zero, which only half_panels writes.
bool can_leave(const RankLaunch& quantize, i64 k) { return form_of(quantize.launch.kernel) == kInt8Rows || k % 64 == 0; }

/// What a kernel that ends in int8 activations, or panels, needs: the whole of k, rows in the quantised order.
bool quantizes(const QuantizeArgs& q, const View& y, i64 k, i64 rows) {
    return q.x.data == y.data && q.k_begin == 0 && q.k_end == q.k && q.k == k && q.x.ne[0] == k && q.x.ne[1] * q.x.ne[2] * q.x.ne[3] == rows &&
           q.x.nb[0] == 4 && (rows == 1 || q.x.nb[1] == k * 4);
}
bool norm_then_quantize(RankLaunch& a, const RankLaunch& b, Arch arch) {
    FusedNormArgs norm = norm_of(a);
    const QuantizeArgs q = args_of<QuantizeArgs>(b);
    if (norm.xq || !can_leave(b, q.k) || !quantizes(q, norm.y, norm.y.ne[0], norm.y.ne[1] * norm.y.ne[2] * norm.y.ne[3])) return false;
    norm.form = static_cast<ActivationForm>(form_of(b.launch.kernel));
    norm.xq = q.xq;
    norm.xd = q.xd;
    return replace(a, fused_norm_launch(norm, arch), norm);
}
bool glu_then_quantize(RankLaunch& a, const RankLaunch& b, Arch arch) {
    FusedGluArgs glu{};
    glu.glu = args_of<GluArgs>(a);
    const QuantizeArgs q = args_of<QuantizeArgs>(b);
    const View& y = glu.glu.y;
    // A row for each of a token's experts, or one for each token; the shard's part of a row of blocks.
    if (!same_view(q.x, y) && !quantizes(q, y, y.ne[0], y.ne[1] * y.ne[2] * y.ne[3])) return false;
    if (q.k_end - q.k_begin != y.ne[0] || !can_leave(b, q.k)) return false;
    glu.form = static_cast<ActivationForm>(form_of(b.launch.kernel));
    glu.k = q.k;
    glu.k_begin = q.k_begin;
    glu.xq = q.xq;
    glu.xd = q.xd;
    return replace(a, fused_glu_launch(a.launch.kernel, glu, arch), glu);
}
/// Of one token they are stages of the persistent kernel.
bool columns_then_combine(RankLaunch& a, const RankLaunch& b, Arch arch) {
    FlashSplitArgs args = args_of<FlashSplitArgs>(a);
    const FlashCombineArgs c = args_of<FlashCombineArgs>(b);
    if (args.whole || args.n_splits != 1 || args.a.q.ne[1] * args.a.q.ne[3] == 1 || c.acc != args.acc || !same_view(c.y, args.a.y)) return false;
    args.whole = 1;
    args.form = c.form, args.xq = c.xq, args.xd = c.xd;
    return replace(a, flash_split_launch(args, arch), args);
}
bool columns_then_quantize(RankLaunch& a, const RankLaunch& b, Arch arch) {
    FlashSplitArgs args = args_of<FlashSplitArgs>(a);
    const QuantizeArgs q = args_of<QuantizeArgs>(b);
    const View& y = args.a.y;
    if (!args.whole || args.xq || y.ne[0] % 32 || !quantizes(q, y, y.ne[0] * y.ne[1], y.ne[2] * y.ne[3]) || !can_leave(b, q.k)) return false;
    args.form = static_cast<ActivationForm>(form_of(b.launch.kernel));
    args.xq = q.xq, args.xd = q.xd;
    return replace(a, flash_split_launch(args, arch), args);
}
bool attention_then_quantize(RankLaunch& a, const RankLaunch& b, Arch arch) {
    FlashCombineArgs args = args_of<FlashCombineArgs>(a);
    const QuantizeArgs q = args_of<QuantizeArgs>(b);
    if (args.xq || !quantizes(q, args.y, args.y.ne[0] * args.y.ne[1], args.y.ne[2] * args.y.ne[3]) || !can_leave(b, q.k)) return false;
    args.form = static_cast<ActivationForm>(form_of(b.launch.kernel));
    args.xq = q.xq;
    args.xd = q.xd;
    return replace(a, flash_combine_launch(args, arch), args);
}

/// Rope of Q and of K, and the cache's new rows.
PiecesRopeArgs rope_of(const RankLaunch& l) {
    if (std::strcmp(l.launch.kernel, "rope_store_pieces") == 0) return args_of<PiecesRopeArgs>(l);
    PiecesRopeArgs out{};
    if (std::strcmp(l.launch.kernel, "rope_store") == 0) {
        out.args = args_of<RopeStoreArgs>(l);
    } else {
        out.args.rope[0] = args_of<RopeArgs>(l);
        out.args.n_ropes = 1;
        out.args.stored_rope = -1;
    }
    return out;
}
/// In one launch nothing may be read that it writes; what comes in pieces is not read where its view says, so a host's allocator may have put results there:
/// what other steps would have written over is not kept.
bool settle(PiecesRopeArgs& p) {
    const RopeStoreArgs& a = p.args;
    struct Source {
        const View &x, *own;  // own: the rope's result, which may take its place
        Pieces& pieces;
    };
    std::vector<Source> sources;
    for (int i = 0; i < a.n_ropes; ++i) sources.push_back({a.rope[i].x, &a.rope[i].y, p.rope[i]});
    for (int i = a.stored_rope >= 0 ? 1 : 0; i < a.n_stores; ++i) sources.push_back({a.store[i].x, nullptr, p.store[i]});
    std::vector<const View*> results;
    for (int i = 0; i < a.n_ropes; ++i) results.push_back(&a.rope[i].y);
    for (int i = 0; i < a.n_stores; ++i) results.push_back(&a.store[i].y);
    for (size_t i = 0; i < results.size(); ++i)
        for (size_t j = 0; j < i; ++j)
            if (!apart(*results[i], *results[j])) return false;
    for (Source& s : sources)
        for (const View* y : results) {
            if (s.pieces.n && !apart(s.x, *y)) s.pieces.kept = 0;
            if (!s.pieces.n && !apart(s.x, *y) && !(y == s.own && same_view(s.x, *y))) return false;
        }
    for (const Source& kept : sources)
        for (const Source& s : sources)
            if (kept.pieces.n && kept.pieces.kept && !s.pieces.n && !apart(kept.x, s.x)) return false;
    return true;
}
bool replace_rope(RankLaunch& l, PiecesRopeArgs& p, Arch arch) {
    if (!settle(p)) return false;
    const bool pieces = p.rope[0].n || p.rope[1].n || p.store[0].n || p.store[1].n;
    return pieces ? replace(l, rope_store_pieces_launch(p, arch), p) : replace(l, rope_store_launch(p.args, arch), p.args);
}
bool rope_then_rope(RankLaunch& a, const RankLaunch& b, Arch arch) {
    PiecesRopeArgs p = rope_of(a);
    const PiecesRopeArgs more = rope_of(b);
    if (p.args.n_ropes != 1 || p.args.n_stores || more.args.n_ropes != 1) return false;
    p.args.rope[p.args.n_ropes++] = more.args.rope[0];
    p.rope[1] = more.rope[0];
    for (int i = 0; i < more.args.n_stores; ++i) p.args.store[i] = more.args.store[i], p.store[i] = more.store[i];
    p.args.n_stores = more.args.n_stores;
    p.args.stored_rope = more.args.stored_rope < 0 ? -1 : 1;
    return replace_rope(a, p, arch);
}
/// Queries that are scaled before their attention: where the result takes the place of what was turned, so that nobody else can want that.
bool rope_then_scale(RankLaunch& a, const RankLaunch& b, Arch arch) {
    RopeArgs rope = args_of<RopeArgs>(a);
    const UnaryArgs scale = args_of<UnaryArgs>(b);
    if (scale.p1 != 0 || !same_view(scale.x, rope.y) || !same_view(scale.y, rope.y)) return false;
    rope.factor *= scale.p0;
    return replace(a, rope_launch(rope, arch), rope);
}
bool rope_then_store(RankLaunch& a, const RankLaunch& b, Arch arch) {
    PiecesRopeArgs p = rope_of(a);
    RopeStoreArgs& args = p.args;
    const SetRowsArgs store = args_of<SetRowsArgs>(b);
    if (args.n_stores == 2) return false;
    bool reads_rope = false;
    for (int i = 0; i < args.n_ropes; ++i) {
        const View &y = args.rope[i].y, &x = store.x;
        if (apart(x, y)) continue;
        // The same elements, heads side by side in a token's row.
        const bool same = x.data == y.data && x.type == kF32 && y.type == kF32 && x.ne[0] == y.ne[0] * y.ne[1] && x.ne[1] == y.ne[2] && y.ne[3] == 1 &&
                          x.ne[2] * x.ne[3] == 1 && y.nb[0] == 4 && y.nb[1] == y.ne[0] * 4 && x.nb[0] == 4 && x.nb[1] == y.nb[2];
        if (!same || args.stored_rope >= 0 || store.row_period) return false;
        args.stored_rope = i;
        reads_rope = true;
    }
    if (reads_rope && args.n_stores) return false;  // the rope's own row goes first
    args.store[args.n_stores++] = store;
    return replace_rope(a, p, arch);
}

/// Whether y lies where nothing is written of part i, without its bias or with it.
bool apart_from_part(const MulVecIdArgs& a, int i, const View& y) { return apart(y, a.part[i].y) && (!a.bias[i].y.data || apart(y, a.bias[i].y)); }
/// Experts: gate and up.
bool join_experts(RankLaunch& a, const RankLaunch& b, Arch arch) {
    MulVecIdArgs args = args_of<MulVecIdArgs>(a);
    const MulVecIdArgs more = args_of<MulVecIdArgs>(b);
    if (args.n_parts + more.n_parts > 2 || args.scaled || more.scaled || !same_view(args.x, more.x) || !same_view(args.ids, more.ids)) return false;
    if (args.xq != more.xq || args.k != more.k || args.part[0].w.type != more.part[0].w.type) return false;
    if (args.part[0].w.ne2 != more.part[0].w.ne2 || !apart_from_part(args, 0, more.part[0].y) || !apart_from_part(args, 0, mul_vec_id_result(more, 0)))
        return false;
    args.bias[args.n_parts] = more.bias[0];
    args.part[args.n_parts++] = more.part[0];
    return replace(a, mul_vec_id_launch(args, arch), args);
}
/// What other blocks of the launch may still read must not be written.
bool touches_sources(const MulVecIdArgs& a, const View& y) { return (!a.xq && !apart(y, a.x)) || !apart(y, a.ids) || (a.scaled && !apart(y, a.weights)); }
/// Their biases: rows of the same experts.
bool experts_then_bias(RankLaunch& a, const RankLaunch& b, Arch arch) {
    MulVecIdArgs args = args_of<MulVecIdArgs>(a);
    const AddIdArgs add = args_of<AddIdArgs>(b);
    if (args.scaled || !same_view(add.ids, args.ids) || add.y.nb[0] != 4 || touches_sources(args, add.y)) return false;
    for (int i = 0; i < args.n_parts; ++i) {
        const MulVecPart& part = args.part[i];
        if (args.bias[i].y.data || !same_view(add.a, part.y)) continue;
        if (!same_or_apart(add.y, part.y) || add.b.nb[0] != 4 || add.b.ne[0] != part.w.n || add.b.ne[1] != part.w.ne2) return false;
        for (int j = 0; j < args.n_parts; ++j)
            if ((j != i && !apart_from_part(args, j, add.y)) || !apart_from_part(args, j, add.b)) return false;
        args.bias[i] = {add.y, add.has_b ? add.b.data : nullptr, add.b.nb[1]};
        return apart(add.y, add.b) && replace(a, mul_vec_id_launch(args, arch), args);
    }
    return false;
}
/// Down, times the weights of the experts ...
bool experts_then_weights(RankLaunch& a, const RankLaunch& b, Arch arch) {
    MulVecIdArgs args = args_of<MulVecIdArgs>(a);
    const BinaryArgs scale = args_of<BinaryArgs>(b);
    const View& y = mul_vec_id_result(args, 0);
    if (args.n_parts != 1 || args.scaled || !same_view(scale.a, y) || scale.y.type != kF32 || scale.y.nb[0] != 4 || !same_or_apart(scale.y, y)) return false;
    if (!same_or_apart(scale.y, args.part[0].y) || !apart(scale.b, args.part[0].y)) return false;
    if (scale.b.type != kF32 || scale.b.ne[0] != 1 || scale.b.ne[1] != y.ne[1] || scale.b.ne[2] != y.ne[2] || !apart(scale.b, y)) return false;
    args.weights = scale.b;
    args.products = scale.y;
    args.scaled = 1;
    return !touches_sources(args, scale.y) && replace(a, mul_vec_id_launch(args, arch), args);
}
/// ... summed slot by slot: whether `sum` is the next one of args.products.
template <class Args>
bool next_sum(Args& args, const BinaryArgs& sum) {
    const View& p = args.products;
    if (args.n_sums + 1 >= p.ne[1] || sum.y.type != kF32 || sum.y.nb[0] != 4 || sum.y.ne[0] != p.ne[0] || sum.y.ne[1] != p.ne[2]) return false;
    auto is_slot = [&](const View& v, i64 slot) {
        return v.data == p.data + slot * p.nb[1] && same_shape(v, sum.y) && v.type == kF32 && v.nb[0] == 4 && (v.ne[1] == 1 || v.nb[1] == p.nb[2]);
    };
    if (!(args.n_sums ? same_view(sum.a, args.sum[args.n_sums - 1]) : is_slot(sum.a, 0)) || !is_slot(sum.b, args.n_sums + 1) || !apart(sum.y, p)) return false;
    for (int i = 0; i < args.n_sums; ++i)
        if (!same_or_apart(sum.y, args.sum[i])) return false;
    args.sum[args.n_sums++] = sum.y;
    return true;
}
bool experts_then_sum(RankLaunch& a, const RankLaunch& b, Arch arch) {
    MulVecIdArgs args = args_of<MulVecIdArgs>(a);
    const BinaryArgs sum = args_of<BinaryArgs>(b);
    return !touches_sources(args, sum.y) && take_sum(args, sum) && replace(a, mul_vec_id_launch(args, arch), args);
}
/// The same of many tokens, whose products are a launch of their own: weights and sums.
bool weights_then_sum(RankLaunch& a, const RankLaunch& b, Arch arch) {
    WeightedSumArgs args{};
    if (std::strcmp(a.launch.kernel, "weighted_sum") == 0) {
        args = args_of<WeightedSumArgs>(a);
    } else {
        const BinaryArgs scale = args_of<BinaryArgs>(a);
        args.x = scale.a, args.weights = scale.b, args.products = scale.y;
        if (args.weights.type != kF32 || args.weights.ne[0] != 1 || args.weights.ne[1] != args.x.ne[1] || args.weights.ne[2] != args.x.ne[2]) return false;
        if (!same_or_apart(args.products, args.x) || !apart(args.products, args.weights)) return false;
    }
    const BinaryArgs sum = args_of<BinaryArgs>(b);
    if (!apart(sum.y, args.x) || !apart(sum.y, args.weights)) return false;
    return next_sum(args, sum) && replace(a, weighted_sum_launch(args, arch), args);
}

/// Routers: a launch as steps of a chain; none when it cannot be.
struct ChainRow {
    const char* kernel;
    ChainStep (*step)(const RankLaunch&, u32*& fault);
    bool starts;  // an op that routers have and nearly nothing else: a chain begins where there is one
};
template <ChainOp op>
ChainStep binary_step(const RankLaunch& l, u32*&) {
    const BinaryArgs a = args_of<BinaryArgs>(l);
    return {op, 0, a.a, a.b, a.y, 0, 0};
}
template <ChainOp op>
ChainStep unary_step(const RankLaunch& l, u32*&) {
    const UnaryArgs a = args_of<UnaryArgs>(l);
    return {op, 0, a.x, {}, a.y, a.p0, a.p1};
}
ChainStep soft_max_step(const RankLaunch& l, u32*&) {
    const SoftMaxArgs a = args_of<SoftMaxArgs>(l);
    ChainStep s{ChainOp::kSoftMax, 0, a.x, {}, a.y, a.scale, 0};
    if (a.has_mask || a.has_sinks) s.y.type = -1;  // of attention
    return s;
}
ChainStep argsort_step(const RankLaunch& l, u32*&) {
    const ArgsortArgs a = args_of<ArgsortArgs>(l);
    return {ChainOp::kArgsort, 0, a.x, {}, a.y, a.descending ? 1.0f : 0.0f, 0};
}
ChainStep get_rows_step(const RankLaunch& l, u32*& fault) {
    const GetRowsArgs a = args_of<GetRowsArgs>(l);
    fault = a.fault;
    ChainStep s{ChainOp::kGetRows, 0, a.w_view, a.idx, a.y, 0, 0};
    if (a.w.repacked) s.y.type = -1;  // of a matrix in planes
    return s;
}
ChainStep fill_step(const RankLaunch& l, u32*&) {
    const FillArgs a = args_of<FillArgs>(l);
    return {ChainOp::kFill, 0, a.y, {}, a.y, a.value, 0};
}
ChainStep set_rows_step(const RankLaunch& l, u32*& fault) {
    const SetRowsArgs a = args_of<SetRowsArgs>(l);
    fault = a.fault;
    ChainStep s{ChainOp::kSetRows, 0, a.x, a.idx, a.y, 0, 0};
    if (a.row_period || a.block_elems != 1 || a.n_rows != a.y.ne[1]) s.y.type = -1;  // of a cache
    return s;
}
constexpr ChainRow kChainRows[] = {
    {"soft_max", soft_max_step, true},
    {"argsort", argsort_step, true},
    {"sum_rows", unary_step<ChainOp::kSumRows>, true},
    {"get_rows", get_rows_step, false},
    {"fill", fill_step, false},
    {"set_rows", set_rows_step, false},
    {"binary_add", binary_step<ChainOp::kAdd>, false},
    {"binary_sub", binary_step<ChainOp::kSub>, false},
    {"binary_mul", binary_step<ChainOp::kMul>, false},
    {"binary_div", binary_step<ChainOp::kDiv>, false},
    {"unary_scale", unary_step<ChainOp::kScale>, false},
    {"unary_clamp", unary_step<ChainOp::kClamp>, false},
    {"unary_sigmoid", unary_step<ChainOp::kSigmoid>, false},
};
const ChainRow* chain_row(const char* kernel) {
    for (const ChainRow& row : kChainRows)
        if (!std::strcmp(row.kernel, kernel)) return &row;
    return nullptr;
}
bool is_chain(const char* kernel) { return std::strcmp(kernel, "chain") == 0; }
bool is_link(const char* kernel) { return is_chain(kernel) || chain_row(kernel); }
bool append(ChainArgs& chain, const RankLaunch& l) {
    if (chain.n_steps == kChainMost) return false;
    const ChainStep step = chain_row(l.launch.kernel)->step(l, chain.fault);
    chain.step[chain.n_steps++] = step;
    return chain_can(step);
}
bool chain_links(RankLaunch& a, const RankLaunch& b, Arch arch) {
    ChainArgs chain{};
    if (is_chain(b.launch.kernel)) {  // what it begins with was no chain yet: a router's sigmoids, to which a bias is added
        const ChainArgs more = args_of<ChainArgs>(b);
        if (is_chain(a.launch.kernel) || more.n_steps == kChainMost || !append(chain, a) || !same_view(chain.step[0].y, more.step[0].a)) return false;
        std::copy(more.step, more.step + more.n_steps, chain.step + 1);
        chain.n_steps += more.n_steps, chain.fault = more.fault ? more.fault : chain.fault, chain.quantize = more.quantize;
        return replace(a, chain_launch(chain, arch), chain);
    }
    if (is_chain(a.launch.kernel)) chain = args_of<ChainArgs>(a);
    else if ((!chain_row(a.launch.kernel)->starts && !chain_row(b.launch.kernel)->starts) || !append(chain, a)) return false;
    return !chain.quantize.xq && append(chain, b) && replace(a, chain_launch(chain, arch), chain);
}
bool chain_then_quantize(RankLaunch& a, const RankLaunch& b, Arch arch) {
    ChainArgs chain = args_of<ChainArgs>(a);
    if (chain.quantize.xq) return false;
    chain.quantize = args_of<QuantizeArgs>(b);
    for (int i = 0; i < chain.n_steps; ++i)
        if (!apart(chain.quantize.x, chain.step[i].y)) return false;
    return chain_can_quantize(chain.quantize) && replace(a, chain_launch(chain, arch), chain);
}

bool is_mul_vec_id(const char* kernel) { return std::strncmp(kernel, "mul_vec_id_", 11) == 0; }
bool is_mul_vec(const char* kernel) { return std::strncmp(kernel, "mul_vec_", 8) == 0 && !is_mul_vec_id(kernel); }
bool is_mul_few(const char* kernel) { return std::strncmp(kernel, "mul_few_", 8) == 0 && std::strncmp(kernel, "mul_few_id_", 11) != 0; }
bool is_mul_wgmma(const char* kernel) { return std::strncmp(kernel, "mul_wgmma_", 10) == 0 && std::strncmp(kernel, "mul_wgmma_id_", 13) != 0; }
bool is_add(const char* kernel) { return std::strcmp(kernel, "binary_add") == 0; }
bool is_add_id(const char* kernel) { return std::strcmp(kernel, "add_id") == 0; }
bool is_norm_by_squares(const char* kernel) { return std::strcmp(kernel, "norm_by_squares") == 0; }
bool is_mul(const char* kernel) { return std::strcmp(kernel, "binary_mul") == 0; }
bool weighs(const char* kernel) { return is_mul(kernel) || std::strcmp(kernel, "weighted_sum") == 0; }
bool is_norm(const char* kernel) { return std::strcmp(kernel, "rms_norm") == 0 || std::strcmp(kernel, "fused_norm") == 0; }
bool is_glu(const char* kernel) { return std::strncmp(kernel, "glu_", 4) == 0; }
bool is_fused_glu(const char* kernel) { return std::strncmp(kernel, "fused_glu_", 10) == 0; }
bool makes_form(const char* kernel) { return form_of(kernel) >= 0; }
bool is_quantize(const char* kernel) { return std::strcmp(kernel, "quantize_x") == 0; }
bool is_columns(const char* kernel) { return std::strncmp(kernel, "flash_columns_", 14) == 0; }
bool is_combine(const char* kernel) { return std::strcmp(kernel, "flash_combine") == 0; }
bool is_rope(const char* kernel) { return std::strncmp(kernel, "rope_", 5) == 0; }
bool is_lone_rope(const char* kernel) { return std::strcmp(kernel, "rope_neox") == 0 || std::strcmp(kernel, "rope_normal") == 0; }
bool is_scale(const char* kernel) { return std::strcmp(kernel, "unary_scale") == 0; }
bool is_set_rows(const char* kernel) { return std::strcmp(kernel, "set_rows") == 0; }

struct Merge {
    bool (*first)(const char*);
    bool (*second)(const char*);
    bool (*join)(RankLaunch& a, const RankLaunch& b, Arch arch);  // false: a may be changed and is thrown away
};
constexpr Merge kMerges[] = {
    {is_mul_vec, is_mul_vec, join_products<MulVecArgs, mul_vec_join, mul_vec_launch>},
    {is_mul_few, is_mul_few, join_products<MulPiecesArgs, mul_pieces_join, mul_few_launch>},
    {is_mul_wgmma, is_mul_wgmma, join_products<MulPiecesArgs, mul_pieces_join, mul_wgmma_launch>},
    {is_add, is_norm, sum_then_norm},
    {is_norm, is_mul, norm_then_weight},
    {is_norm_by_squares, is_mul, squares_then_weight},
    {is_norm, makes_form, norm_then_quantize},
    {is_glu, makes_form, glu_then_quantize},
    {is_columns, is_combine, columns_then_combine},
    {is_columns, makes_form, columns_then_quantize},
    {is_combine, makes_form, attention_then_quantize},
    {is_rope, is_rope, rope_then_rope},
    {is_rope, is_set_rows, rope_then_store},
    {is_lone_rope, is_scale, rope_then_scale},
    {is_mul_vec_id, is_mul_vec_id, join_experts},
    {is_mul_vec_id, is_add_id, experts_then_bias},
    {is_mul_vec_id, is_mul, experts_then_weights},
    {is_mul_vec_id, is_add, experts_then_sum},
    {weighs, is_add, weights_then_sum},
    {is_link, is_link, chain_links},
    {is_chain, is_quantize, chain_then_quantize},
};

bool try_merge(ProgramStep& a, const ProgramStep& b, const std::vector<Arch>& archs) {
    if (a.kind != ProgramStep::kLaunch || b.kind != ProgramStep::kLaunch) return false;
    for (const Merge& merge : kMerges) {
        bool any = false, all = true;
        for (size_t r = 0; all && r < a.launches.size(); ++r) {
            const char *first = a.launches[r].launch.kernel, *second = b.launches[r].launch.kernel;
            if (!first && !second) continue;
            any = true;
            all = first && second && merge.first(first) && merge.second(second);
        }
        if (!any || !all) continue;
        std::vector<RankLaunch> joined = a.launches;
        for (size_t r = 0; all && r < joined.size(); ++r) all = !joined[r].launch.kernel || merge.join(joined[r], b.launches[r], archs[r]);
        if (!all) continue;
        a.launches = std::move(joined);
        a.label += ", " + b.label;
        a.tensors.insert(a.tensors.end(), b.tensors.begin(), b.tensors.end());
        return true;
    }
    return false;
}

// ---- pieces that are added up where they are read: a launch less, and sums that do not go to memory and back

/// Of the part whose rows begin there.
Pieces pieces_of(const MulPiecesArgs& a, i64 rows_before) { return {a.sums + rows_before, a.n_rows, a.n_rows * a.wide.m, a.n_pieces, 1}; }

/// Whether x is a part's result, one way or the other: heads (any number) side by side in a column, columns one behind the other.
bool is_part(const View& x, int heads_dim, const MulVecPart& part, i64 m) {
    const View& y = part.y;
    if (x.data != y.data || x.type != kF32 || x.nb[0] != 4 || x.ne[3] != 1) return false;
    return heads_dim ? x.ne[0] * x.ne[1] == part.w.n && x.nb[1] == x.ne[0] * 4 && x.ne[2] == m && (m == 1 || x.nb[2] == y.nb[1])
                     : x.ne[0] == part.w.n && x.ne[1] == m && x.ne[2] == 1 && (m == 1 || x.nb[1] == y.nb[1]);
}
/// The parts of a divided product that a launch reads become pieces there: a bit each. 0: it reads none, or cannot.
u32 take_in_norm(RankLaunch& l, const MulPiecesArgs& a, Arch arch) {
    if (a.wide.n_parts != 1) return 0;
    PiecesNormArgs p{norm_of(l), pieces_of(a, 0)};
    FusedNormArgs& norm = p.norm;
    const View& y = a.wide.part[0].y;
    if (norm.has_b && same_view(norm.b, y)) std::swap(norm.a, norm.b);
    if (!same_view(norm.a, y) || (norm.has_b && !apart(norm.b, y))) return 0;
    p.a.kept = apart(norm.y, y) && (!norm.has_b || apart(norm.sum, y));
    return replace(l, fused_norm_pieces_launch(p, arch), p) ? 1 : 0;
}
u32 take_in_glu(RankLaunch& l, const MulPiecesArgs& a, Arch arch) {
    FusedGluArgs args = args_of<FusedGluArgs>(l);
    const View &y = args.glu.y, &gate = args.glu.a, &up = args.glu.b;
    if (args.a.n || args.b.n || a.wide.n_parts != 2) return 0;
    for (int i = 0; i < 2; ++i) {
        const MulVecPart &of_gate = a.wide.part[i], &of_up = a.wide.part[1 - i];
        if (!is_part(gate, 0, of_gate, a.wide.m) || !is_part(up, 0, of_up, a.wide.m)) continue;
        args.a = pieces_of(a, i ? of_up.w.n : 0), args.b = pieces_of(a, i ? 0 : of_gate.w.n);
        args.a.kept = apart(y, gate), args.b.kept = apart(y, up);
        return replace(l, fused_glu_launch(l.launch.kernel + 6, args, arch), args) ? 3 : 0;  // behind "fused_"
    }
    return 0;
}
u32 take_in_rope(RankLaunch& l, const MulPiecesArgs& a, Arch arch) {
    PiecesRopeArgs p = rope_of(l);
    u32 taken = 0;
    i64 before = 0;
    for (int i = 0; i < a.wide.n_parts; ++i) {
        const MulVecPart& part = a.wide.part[i];
        auto take = [&](Pieces& pieces) { pieces = pieces_of(a, before), taken |= 1u << i; };
        for (int r = 0; r < p.args.n_ropes; ++r)
            if (is_part(p.args.rope[r].x, 1, part, a.wide.m)) take(p.rope[r]);
        for (int s = p.args.stored_rope >= 0 ? 1 : 0; s < p.args.n_stores; ++s)
            if (is_part(p.args.store[s].x, 0, part, a.wide.m)) take(p.store[s]);
        before += part.w.n;
    }
    return taken && replace_rope(l, p, arch) ? taken : 0;
}
struct Taker {
    bool (*is)(const char*);
    u32 (*take)(RankLaunch&, const MulPiecesArgs&, Arch);
};
constexpr Taker kTakers[] = {{is_norm, take_in_norm}, {is_fused_glu, take_in_glu}, {is_rope, take_in_rope}};

/// One rank's sums of pieces, if the steps from `begin` on that follow them read all of them: they lie where no kernel of those steps writes. Changes the steps;
/// returns where those end, or `begin`.
size_t hand_over(RankLaunch& sums, std::vector<ProgramStep>& steps, size_t begin, size_t rank, Arch arch) {
    const MulPiecesArgs a = args_of<MulPiecesArgs>(sums);
    const u32 all = (1u << a.wide.n_parts) - 1;
    std::vector<RankLaunch> changed;
    u32 taken = 0;
    size_t end = begin;
    for (; taken != all && end < steps.size() && steps[end].kind == ProgramStep::kLaunch; ++end) {
        RankLaunch l = steps[end].launches[rank];
        u32 here = 0;
        for (const Taker& taker : kTakers)
            if (l.launch.kernel && taker.is(l.launch.kernel)) here = taker.take(l, a, arch);
        if (!here) break;
        taken |= here;
        changed.push_back(std::move(l));
    }
    if (taken != all) return begin;
    for (size_t i = begin; i < end; ++i) steps[i].launches[rank] = std::move(changed[i - begin]);
    sums = RankLaunch{};
    return end;
}

/// Products are divided along k when it is known what shares their launch; the sums of the pieces are a step behind it.
bool divide_products(ProgramStep& step, ProgramStep& sums, const std::vector<Arch>& archs) {
    bool any = false;
    if (step.kind != ProgramStep::kLaunch) return false;
    sums.kind = ProgramStep::kLaunch;
    sums.label = "sum of " + step.label;
    sums.tensors = step.tensors;
    sums.launches.resize(step.launches.size());
    for (size_t r = 0; r < step.launches.size(); ++r) {
        RankLaunch& launch = step.launches[r];
        const char* kernel = launch.launch.kernel;
        const bool few = kernel && is_mul_few(kernel);
        if (!few && !(kernel && is_mul_wgmma(kernel))) continue;
        MulPiecesArgs args = args_of<MulPiecesArgs>(launch);
        few ? few_divide(args, archs[r]) : wide_divide(args, archs[r]);
        replace(launch, few ? mul_few_launch(args, archs[r]) : mul_wgmma_launch(args, archs[r]), args);
        if (args.n_pieces > 1) any |= replace(sums.launches[r], sum_pieces_launch(args, archs[r]), args);
    }
    return any;
}

}  // namespace

bool take_sum(MulVecIdArgs& product, const BinaryArgs& sum) { return product.scaled && apart_from_part(product, 0, sum.y) && next_sum(product, sum); }

void fuse(std::vector<ProgramStep>& steps, const std::vector<Arch>& archs) {
    std::vector<ProgramStep> out;
    for (ProgramStep& step : steps) {
        out.push_back(std::move(step));
        while (out.size() > 1 && try_merge(out[out.size() - 2], out.back(), archs)) out.pop_back();
    }
    steps.clear();
    size_t takers_end = 0;  // of steps that read pieces
    for (size_t i = 0; i < out.size(); ++i) {
        ProgramStep sums;
        const bool divided = divide_products(out[i], sums, archs);
        const bool takes = i < takers_end;
        steps.push_back(std::move(out[i]));
        if (takes && steps.size() > 1 && try_merge(steps[steps.size() - 2], steps.back(), archs)) steps.pop_back();
        if (!divided) continue;
        bool any = false;
        for (size_t r = 0; r < sums.launches.size(); ++r) {
            if (!sums.launches[r].launch.kernel) continue;
            takers_end = std::max(takers_end, hand_over(sums.launches[r], out, i + 1, r, archs[r]));
            any |= sums.launches[r].launch.kernel != nullptr;
        }
        if (takers_end > i + 1) out[i + 1].label = sums.label + ", " + out[i + 1].label;
        if (any) steps.push_back(std::move(sums));
    }
}

}  // namespace ggml_tp
