#include "rank_run.h"

#include <algorithm>
#include <cstring>

#include "elementwise.h"
#include "flash_attn.h"

namespace ggml_tp {

bool RankRun::add(const RankLaunch& l) {
    if (!l.launch.kernel) return true;  // another rank's bias, of what is a Partial
    if (summed_) return add_sum(l);
    if (input_.x && !input_.bound) return add_weighed(l);
    // Pieces are of products of several columns. By their whole names, where there is one kernel: another may begin like it.
    if (is(l, "rope_store_pieces")) return false;
    if (is(l, "fused_norm")) return add_norm(args_of<FusedNormArgs>(l));
    if (is(l, "quantize_x")) return add_quantize(args_of<QuantizeArgs>(l));
    if (named(l, "fused_glu_")) return add_glu(l);
    if (named(l, "glu_")) return add_plain_glu(l);
    if (named(l, "mul_vec_id_")) return add_experts(args_of<MulVecIdArgs>(l));
    if (named(l, "mul_vec_f32_")) return add_floats(args_of<MulVecArgs>(l), true);
    if (is(l, "mul_mat_f32_1")) return add_one_row(args_of<MulMatArgs>(l));
    if (named(l, "mul_vec_") && l.args.size() == sizeof(MulVecArgs)) return add_product(args_of<MulVecArgs>(l));
    if (is(l, "chain")) return add_router(args_of<ChainArgs>(l));
    if (named(l, "flash_columns_")) return add_flash(args_of<FlashSplitArgs>(l));
    if (named(l, "flash_latent_")) return add_latent(args_of<FlashSplitArgs>(l));
    if (is(l, "flash_combine")) return add_combine(args_of<FlashCombineArgs>(l));
    if (named(l, "rope_")) return add_rope(l);
    if (is(l, "set_rows")) return add_set_rows(args_of<SetRowsArgs>(l));
    if (is(l, "get_rows")) return add_get_rows(args_of<GetRowsArgs>(l));
    if (named(l, "binary_")) return add_binary(l);
    if (named(l, "unary_")) return add_unary(l);
    if (is(l, "rms_norm")) return add_rms_norm(args_of<NormArgs>(l));
    if (is(l, "row_squares")) return add_squares(args_of<RowSquaresArgs>(l));
    if (is(l, "norm_by_squares")) return add_norm_by_squares(args_of<NormBySquaresArgs>(l));
    if (is(l, "layer_norm")) return add_layer_norm(args_of<NormArgs>(l));
    if (is(l, "copy")) return add_copy(args_of<CopyArgs>(l));
    if (is(l, "repeat")) return add_repeat(args_of<MoveArgs>(l));
    if (is(l, "concat")) return add_concat(args_of<MoveArgs>(l));
    if (is(l, "ssm_conv")) return add_conv(args_of<BinaryArgs>(l));
    if (is(l, "gated_delta_net")) return add_delta(args_of<RecurrentArgs>(l));
    if (is(l, "ssm_scan")) return add_scan(args_of<RecurrentArgs>(l));
    return false;
}
std::optional<size_t> RankRun::summand_of(DevicePtr y, i64 elems) const {
    if (elems > kStreamMostK) return std::nullopt;
    const Span span{y, y + static_cast<u64>(elems) * 4};
    for (size_t i = stages.size(); i-- > 0;) {
        const Draft& d = stages[i];
        if (!meet({span}, d.writes)) {
            if (meet({span}, d.reads)) return std::nullopt;
            continue;
        }
        if (d.kind == kStreamProduct) {
            const StreamProduct p = d.get<StreamProduct>();
            if (p.n_parts == 1 && !p.glu && !p.n_push && p.part[0].n == elems && reinterpret_cast<DevicePtr>(p.part[0].y) == y) return i;
        } else if (d.kind == kStreamBinary) {  // of experts and the one that all tokens share
            const StreamBinary b = d.get<StreamBinary>();
            if (!b.n_push && is_vector(b.args.y, elems) && reinterpret_cast<DevicePtr>(b.args.y.data) == y) return i;
        } else if (d.kind == kStreamSquares) {
            const StreamSquares s = d.get<StreamSquares>();
            if (!s.n_push && s.n_parts == elems && reinterpret_cast<DevicePtr>(s.sums) == y) return i;
        }
        return std::nullopt;
    }
    return std::nullopt;
}
bool RankRun::is_scaled(DevicePtr y, i64 elems) const {
    const auto e = stages.empty() ? std::nullopt : body_of<StreamElements>(stages, stages.size() - 1, kStreamElements);
    if (!e || e->n_steps != 1 || e->w.data || e->step[0].op != static_cast<i32>(UnaryOp::kScale) || e->step[0].p[1] != 0) return false;
    return same_view(e->x, e->y) && is_vector(e->y, elems) && reinterpret_cast<DevicePtr>(e->y.data) == y;
}
void RankRun::take_scale() {
    scale_ = stages.back().get<StreamElements>().step[0].p[0];
    stages.pop_back();
}
bool RankRun::add_reduce(DevicePtr y, i64 elems, const std::vector<u64*>& inboxes, int rank, size_t at) {
    const std::optional<size_t> summand = summand_of(y, elems);
    if (!summand || *summand >= at || at > stages.size()) return false;
    for (size_t i = *summand; i < at; ++i)
        if (pushes(stages[i])) return false;
    Draft& d = stages[*summand];
    auto push = [&](auto stage) {
        stage.n_push = n_ranks_;
        for (int r = 0; r < n_ranks_; ++r) stage.inbox[r] = inboxes[static_cast<size_t>(r)] + rank * elems;
        d.set(stage);
    };
    if (d.kind == kStreamProduct) push(d.get<StreamProduct>());
    else if (d.kind == kStreamBinary) push(d.get<StreamBinary>());
    else push(d.get<StreamSquares>());
    std::erase_if(d.writes, [&](const Span& s) { return s.begin == y; });
    const StreamReduce reduce{
        inboxes[static_cast<size_t>(rank)], reinterpret_cast<float*>(y), nullptr, nullptr, nullptr, elems, n_ranks_, 0, std::exchange(scale_, 1.0f), 0};
    Draft sum = Draft::of(kStreamReduce, reduce);
    sum.writes = {span_of(reduce.y, elems * 4)};
    stages.insert(stages.begin() + static_cast<std::ptrdiff_t>(at), std::move(sum));
    return true;
}
bool RankRun::pushes(const Draft& d) {
    if (d.kind == kStreamProduct) return d.get<StreamProduct>().n_push;
    if (d.kind == kStreamBinary) return d.get<StreamBinary>().n_push;
    return d.kind == kStreamSquares && d.get<StreamSquares>().n_push;
}
void RankRun::number_pushes() {
    i32 n = 0;
    for (Draft& d : stages) {
        auto number = [&](auto stage, i32 push) {
            stage.push = push;
            d.set(stage);
        };
        if (d.kind == kStreamReduce) number(d.get<StreamReduce>(), n);
        if (!pushes(d)) continue;
        ++n;
        if (d.kind == kStreamProduct) number(d.get<StreamProduct>(), n);
        else if (d.kind == kStreamBinary) number(d.get<StreamBinary>(), n);
        else number(d.get<StreamSquares>(), n);
    }
}
bool RankRun::idle(i32 kind) {
    if (kind != kStreamBinary) return false;
    stages.push_back(Draft::of(kind, StreamBinary{}));
    return true;
}
void RankRun::leave_out_dead() {
    for (Draft& d : stages) {
        if (d.kind != kStreamProduct) continue;
        StreamProduct p = d.get<StreamProduct>();
        std::vector<Span> results;
        const i64 before = p.role == kExpertsSum ? 0 : slots_before(p);  // of other slots
        for (int i = 0; i < p.n_parts; ++i) results.push_back(span_of(p.part[i].y, (before + p.part[i].n) * 4));
        const i64 glu_before = p.role == kExpertsEach ? (p.slots - 1) * p.glu_stride : 0;
        if (p.glu) results.push_back(span_of(p.glu_y, (glu_before + p.part[0].n) * 4));
        for (StreamPart& part : p.part) {
            if (!part.raw) continue;
            const Span raw = span_of(part.raw, (before + part.n) * 4);
            if (meet({raw}, results)) part.raw = nullptr;
            else results.push_back(raw);
        }
        for (float** written : {&p.sum, &p.norm})
            if (*written && meet({span_of(*written, static_cast<i64>(p.k) * 4)}, results)) *written = nullptr;
        d.set(p);
        if (p.role == kExpertsSum) {
            StreamExperts experts = d.get<StreamExperts>();
            Span after = span_of(p.part[0].y, p.part[0].n * 4);
            for (size_t i = std::size(experts.sums.sum); i-- > 0;) {
                float*& sum = experts.sums.sum[i];
                if (!sum) continue;
                const Span here = span_of(sum, p.part[0].n * 4);
                if (here.meets(after)) sum = nullptr;
                else after = here;
            }
            d.set(experts);
        }
        if (p.role == kExpertsEach) {
            StreamExperts experts = d.get<StreamExperts>();
            std::vector<Result> routed = results_of(experts.route);
            for (size_t i = 0; i < routed.size(); ++i) {
                bool dead = meet({routed[i].span()}, results);
                for (size_t j = i + 1; j < routed.size(); ++j) dead |= routed[i].span().meets(routed[j].span());
                if (dead) *routed[i].at = nullptr;
            }
            d.set(experts);
        }
    }
}
void RankRun::leave_out_unread() {
    std::vector<std::vector<Span>> written(stages.size());  // what is left out of a stage is only looked for in those behind it
    for (size_t i = 0; i < stages.size(); ++i) written[i] = written_whole(stages[i]);
    for (size_t i = 0; i < stages.size(); ++i) {
        for (const Result& result : optional_results(i)) {
            const Span span = span_of(*result.at, result.elems * 4);
            const auto reads = [&](const Draft& d) { return std::any_of(d.reads.begin(), d.reads.end(), [&](const Span& s) { return s.meets(span); }); };
            for (size_t j = i + 1; j < stages.size() && !reads(stages[j]); ++j) {
                if (std::none_of(written[j].begin(), written[j].end(), [&](const Span& s) { return s.begin <= span.begin && span.end <= s.end; })) continue;
                forget(i, result);
                break;
            }
        }
    }
}
bool RankRun::is_own(const Join& join) const {
    return std::all_of(join.left.begin(), join.left.end(), [&](const std::pair<size_t, Span>& result) {
        std::vector<Span> rest = {result.second};
        for (size_t i = result.first + 1; i < stages.size() && !rest.empty(); ++i) {
            if (join.takes(i)) continue;
            const Draft* const change = join.change_of(i);
            if (!change && meet(rest, stages[i].reads)) return false;
            for (const Span& written : written_whole(change ? *change : stages[i])) rest = without(rest, written);
        }
        return rest.empty();
    });
}
void RankRun::apply(const Join& join) {
    for (const auto& [i, draft] : join.changed) stages[i] = draft;
    for (size_t j = join.taken.size(); j-- > 0;) stages.erase(stages.begin() + static_cast<std::ptrdiff_t>(join.taken[j]));
}
std::optional<DeltaHeads> RankRun::heads_of(size_t delta, bool keep_rows, int turn) const {
    return delta_heads(stages, delta, keep_rows, memory_->vectors[kWindow0 + turn], memory_->vectors[kAttended], memory_->n_blocks);
}
std::optional<Join> RankRun::latent_heads_of(size_t i) const { return latent_heads(stages, i, memory_->vectors[kPacked], memory_->vectors[kAttended]); }
std::optional<Join> RankRun::shared_expert_of(size_t i) const { return shared_expert(stages, i, memory_->vectors[kShared], memory_->n_blocks); }
void RankRun::mark_visible() {
    for (Draft& d : stages) {
        if (d.kind == kStreamElements) {
            StreamElements e = d.get<StreamElements>();
            e.packed = !e.w.data && is_dense(e.x) && is_dense(e.y);
            for (int i = 0; i < e.n_steps; ++i)
                if (e.step[i].op >= kStreamWithOther) e.packed &= is_dense(e.step[i].b) && std::equal(e.y.ne, e.y.ne + 4, e.step[i].b.ne);
            d.set(e);
            continue;
        }
        if (d.kind != kStreamProduct) continue;
        if (const i32 role = d.get<StreamProduct>().role; role != kExpertsEach && role != kExpertsSum) continue;
        StreamExperts experts = d.get<StreamExperts>();
        if (experts.product.role == kExpertsEach) {
            for (const Result& result : results_of(experts.route)) experts.route.visible |= *result.at != nullptr;
        } else {
            StreamSums& sums = experts.sums;
            sums.visible = sums.y || sums.products || std::any_of(std::begin(sums.sum), std::end(sums.sum), [](const float* sum) { return sum != nullptr; });
        }
        d.set(experts);
    }
}
void RankRun::set_scratch(DevicePtr base) {
    for (Draft& d : stages) {
        auto move = [&](const float*& p) { p = reinterpret_cast<const float*>(base + reinterpret_cast<u64>(p)); };
        if (d.kind == kStreamFlash) {
            StreamFlash f = d.get<StreamFlash>();
            const float *acc = f.args.acc, *meta = f.args.meta;
            move(acc), move(meta);
            f.args.acc = const_cast<float*>(acc), f.args.meta = const_cast<float*>(meta);
            d.set(f);
            d.writes.push_back(span_of(acc, flash_split_acc(f.args) * 4));
            d.writes.push_back(span_of(meta, flash_split_meta(f.args) * 4));
        } else if (d.kind == kStreamCombine) {
            StreamCombine c = d.get<StreamCombine>();
            move(c.args.acc), move(c.args.meta);
            d.set(c);
            const i64 heads = c.args.y.ne[1] * c.args.n_splits;
            d.reads.push_back(span_of(c.args.acc, heads * c.args.y.ne[0] * 4));
            d.reads.push_back(span_of(c.args.meta, heads * 8));
        }
    }
}
/// Elements of a product's results before the last slot's.
i64 RankRun::slots_before(const StreamProduct& p) { return p.role ? (p.slots * std::max<i64>(p.slot_groups, 1) - 1) * p.y_stride : 0; }
/// Pointers that a stage may do without; into its body.
std::vector<RankRun::Result> RankRun::optional_results(size_t i) {
    std::vector<Result> out;
    auto add = [&](auto*& p, i64 elems) {
        if (p) out.push_back({reinterpret_cast<void**>(&p), elems});
    };
    if (stages[i].kind == kStreamProduct) {
        auto& p = *reinterpret_cast<StreamProduct*>(stages[i].body.data());
        const i64 before = slots_before(p);
        add(p.sum, p.k), add(p.norm, p.k);
        for (StreamPart& part : p.part) add(part.raw, before + part.n);
        if (p.glu) {
            for (int part = 0; part < 2; ++part) add(p.part[part].y, before + p.part[part].n);
            if (p.glu_copy) add(p.glu_y, (p.slots - 1) * static_cast<i64>(p.glu_stride) + p.part[0].n);
        } else if (p.glu_copy) {
            add(p.part[0].y, before + p.part[0].n);
        }
        if (p.role == kExpertsEach)
            for (const Result& result : results_of(reinterpret_cast<StreamExperts*>(stages[i].body.data())->route))
                if (*result.at) out.push_back(result);
        if (p.role == kExpertsSum) {
            StreamSums& sums = reinterpret_cast<StreamExperts*>(stages[i].body.data())->sums;
            add(sums.y, before + p.part[0].n);
            add(sums.products, (p.slots - 1) * sums.products_stride + p.part[0].n);
            for (float*& sum : sums.sum) add(sum, p.part[0].n);
        }
    } else if (stages[i].kind == kStreamReduce) {
        auto& r = *reinterpret_cast<StreamReduce*>(stages[i].body.data());
        add(r.raw, r.n);
    } else if (stages[i].kind == kStreamFloats) {
        auto& f = *reinterpret_cast<StreamFloats*>(stages[i].body.data());
        add(f.sum, f.k), add(f.norm, f.k);
        if (f.y_copy) add(f.y, f.n);
    } else if (stages[i].kind == kStreamFlash) {
        auto& f = *reinterpret_cast<StreamFlash*>(stages[i].body.data());
        const i64 d = f.args.a.q.ne[0];
        add(f.own.q_y, d * f.args.a.q.ne[2]), add(f.own.k_y, d * f.args.a.k.ne[2]);
    }
    return out;
}
/// Memory of which a stage writes every byte.
std::vector<Span> RankRun::written_whole(const Draft& d) {
    std::vector<Span> out;
    auto add = [&](const void* p, i64 elems) {
        if (p) out.push_back(span_of(p, elems * 4));
    };
    auto add_view = [&](const View& y) {
        if (is_dense(y)) add(y.data, n_elements(y));
    };
    if (d.kind == kStreamProduct) {
        const StreamProduct p = d.get<StreamProduct>();
        add(p.sum, p.k), add(p.norm, p.k);
        const bool slots = p.role == kExpertsEach, dense = (!slots && p.role != kHeads) || p.y_stride == p.part[0].n;
        const i64 all = slots ? p.slots : p.role == kHeads ? p.slots * p.slot_groups : 1;
        for (int i = 0; i < p.n_parts && dense && !p.n_push; ++i) add(p.part[i].y, p.part[i].n * all);
        if (p.glu && (!slots || p.glu_stride == p.part[0].n)) add(p.glu_y, p.part[0].n * (slots ? p.slots : 1));
        if (slots) {
            StreamRoute route = d.get<StreamExperts>().route;
            for (const Result& result : results_of(route)) add(*result.at, result.elems);
        }
        if (p.role == kExpertsSum) {
            const StreamSums sums = d.get<StreamExperts>().sums;
            const i64 n = p.part[0].n;
            if (p.y_stride == n) add(sums.y, n * p.slots);
            if (sums.products_stride == n) add(sums.products, n * p.slots);
            for (const float* sum : sums.sum) add(sum, n);
        }
    } else if (d.kind == kStreamReduce) {
        const StreamReduce r = d.get<StreamReduce>();
        add(r.y, r.n);
    } else if (d.kind == kStreamFloats) {
        const StreamFloats f = d.get<StreamFloats>();
        add(f.sum, f.k), add(f.norm, f.k), add(f.y, f.n), add(f.more_y, 1);
    } else if (d.kind == kStreamFlash) {
        const StreamFlash f = d.get<StreamFlash>();
        if (f.y.data && is_packed(f.y, f.y.ne[0] * f.y.ne[1])) add(f.y.data, f.y.ne[0] * f.y.ne[1]);
    } else if (d.kind == kStreamCombine) {
        add_view(d.get<StreamCombine>().args.y);
    } else if (d.kind == kStreamCopy) {
        const StreamCopy c = d.get<StreamCopy>();
        add(c.to, c.n);
    } else if (d.kind == kStreamNormRows) {
        add_view(d.get<StreamNormRows>().norm.y);
    } else if (d.kind == kStreamLayerNorm) {
        const StreamLayerNorm s = d.get<StreamLayerNorm>();
        add_view(s.y);
        add(s.sum, s.y.ne[0]);
    } else if (d.kind == kStreamSquares) {
        const StreamSquares s = d.get<StreamSquares>();
        if (!s.n_push) add(s.sums, s.n_parts);
    } else if (d.kind == kStreamNormBySquares) {
        const StreamNormBySquares s = d.get<StreamNormBySquares>();
        add(s.y, s.n);
    } else if (d.kind == kStreamRopeStore) {
        const RopeStoreArgs r = d.get<StreamRope>().args;
        for (int i = 0; i < r.n_ropes; ++i) add_view(r.rope[i].y);
    } else if (d.kind == kStreamBinary) {
        const StreamBinary b = d.get<StreamBinary>();
        if (!b.n_push) add_view(b.args.y);
    } else if (d.kind == kStreamGlu) {
        add_view(d.get<StreamGlu>().args.y);
    } else if (d.kind == kStreamGetRows && d.count) {
        add_view(d.get<GetRowsArgs>().y);
    } else if (d.kind == kStreamElements) {
        add_view(d.get<StreamElements>().y);
    } else if (d.kind == kStreamConcat) {
        add_view(d.get<StreamConcat>().args.y);
    } else if (d.kind == kStreamDelta || d.kind == kStreamScan) {
        const RecurrentArgs r = d.get<StreamDelta>().args;
        add(r.y, r.rows * r.n_head);
        if (r.snapshots > 0) add(r.state, r.rows * r.n * r.n_head);
    }
    return out;
}
std::vector<Span> RankRun::without(const std::vector<Span>& spans, const Span& cut) {
    std::vector<Span> out;
    for (const Span& s : spans) {
        if (!s.meets(cut)) {
            out.push_back(s);
            continue;
        }
        if (s.begin < cut.begin) out.push_back({s.begin, cut.begin});
        if (cut.end < s.end) out.push_back({cut.end, s.end});
    }
    return out;
}
/// The stage no longer writes it.
void RankRun::forget(size_t i, const Result& result) {
    const Span span = result.span();
    *result.at = nullptr;
    std::vector<Span>& writes = stages[i].writes;
    // Not if another result of the stage lies there.
    for (const Result& other : optional_results(i))
        if (other.span().meets(span)) return;
    writes.erase(std::remove_if(writes.begin(), writes.end(), [&](const Span& s) { return s.begin == span.begin && s.end == span.end; }), writes.end());
}
bool RankRun::written(const Span& span) const {
    return std::any_of(stages.begin(), stages.end(), [&](const Draft& d) { return meet({span}, d.writes); });
}

}  // namespace ggml_tp
