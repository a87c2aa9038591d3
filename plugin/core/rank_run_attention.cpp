// Attention: its own token's heads, its cells, its pieces.
#include "rank_run.h"

#include <algorithm>
#include <cstring>

#include "flash_attn.h"
#include "rope.h"

namespace ggml_tp {
namespace {

constexpr i64 kLeastCells = kStreamWarps * kColumnsStep;  // of a piece of attention: a step for every warp
constexpr i32 kWholeHeads = 4;  // query heads of a unit of one piece: eight took 11,200 cycles a layer at 64 cells, two fours 8,700 (Qwen3-30B-A3B)
constexpr i64 kWholeCells = kStreamWarps * kColumnsRun;  // up to here one piece: to combine pieces costs more than four steps of its warps

}  // namespace

bool RankRun::add_flash(FlashSplitArgs f) {
    const FlashAttnArgs& a = f.a;
    const i64 cells = a.k.ne[1];
    if (a.q.ne[1] != 1 || a.q.ne[3] != 1 || cells <= 0) return false;
    if (a.has_mask && written(span_of(a.mask))) return false;  // it is looked at before the stage, as is the row that the token's cell is
    const auto d = static_cast<int>(a.q.ne[0]);
    const i64 most = cells <= kWholeCells ? 1 : (cells + kLeastCells - 1) / kLeastCells;
    if (most == 1) {
        f.head_groups = (a.gqa_ratio + kWholeHeads - 1) / kWholeHeads;
        f.group_heads = (a.gqa_ratio + f.head_groups - 1) / f.head_groups;
    }
    const int meet_bytes = flash_columns_floats(kStreamWarps, std::min(a.gqa_ratio, f.group_heads), d) * 4;
    if (kStreamQueryBytes + meet_bytes > kStreamInputBytes) return false;
    const i64 units = a.k.ne[2] * f.head_groups;
    const i64 splits = std::clamp<i64>(memory_->n_blocks / std::max<i64>(units, 1), 1, most);
    f.cells = static_cast<i32>(round_up((cells + splits - 1) / splits, kColumnsStep));
    f.n_splits = static_cast<i32>((cells + f.cells - 1) / f.cells);
    StreamFlash stage{};
    stage.args = f;
    stage.n_units = static_cast<i32>(units);
    Draft out = Draft::of(kStreamFlash, stage);
    out.reads = {span_of(a.k), span_of(a.v)};
    if (take_own_token(stage, out)) stages.pop_back();
    else out.reads.push_back(span_of(a.q));
    if (a.has_mask) out.reads.push_back(span_of(a.mask));
    if (!stage.own.table) stage.own = {};
    const bool known = cells > (stage.own.q_norm ? kStreamedCellsNormed : kStreamedCells) && own_cells(stage);
    for (const StreamOwnToken::Cache& cache : {stage.own.k_cache, stage.own.v_cache})
        if (cache.row && written(span_of(cache.row, 8))) return false;
    if (known) stream_cells_fit(stage, memory_->n_blocks);
    if (!stage.cells.groups && !stage.own.table) stage.own = {};
    out.set(stage);
    push_attention(std::move(out));
    pending = true;
    return true;
}
void RankRun::push_attention(Draft d) {
    // Offsets for now; a later attention of the run uses the same scratch.
    StreamFlash f = d.get<StreamFlash>();
    const i64 acc_bytes = round_up(flash_split_acc(f.args) * 4, kAlign), meta_bytes = round_up(flash_split_meta(f.args) * 4, kAlign);
    f.args.acc = nullptr;
    f.args.meta = reinterpret_cast<float*>(acc_bytes);
    scratch_bytes = std::max(scratch_bytes, acc_bytes + meta_bytes);
    d.set(f);
    stages.push_back(std::move(d));
    kept_ = nullptr;  // its warps meet in the same shared memory
}
/// Latent attention of queries and a cache that are in memory; latent_heads() may take what makes them into it.
bool RankRun::add_latent(const FlashSplitArgs& f) {
    const FlashAttnArgs& a = f.a;
    const i64 cells = a.k.ne[1], heads = a.q.ne[2], units = std::max<i64>((heads + kStreamLatentHeads - 1) / kStreamLatentHeads, 1);
    auto sixteens = [](const View& v) { return reinterpret_cast<u64>(v.data) % 16 == 0 && v.nb[1] % 16 == 0 && v.nb[2] % 16 == 0; };
    if (a.q.ne[1] != 1 || a.q.ne[3] != 1 || a.k.ne[3] != 1 || a.max_bias != 0 || a.logit_softcap != 0 || heads * a.q.nb[2] >= i64{1} << 31) return false;
    if (pending || !sixteens(a.q) || (a.has_mask && written(span_of(a.mask)))) return false;
    const bool alone = f.n_splits == 1;  // no combination follows
    StreamFlash stage{};
    stage.args = f;
    if (!stream_latent_fit(stage, alone || cells <= kStreamLatentWhole ? 1 : memory_->n_blocks / units)) return false;
    StreamLatent& l = stage.latent;
    l.used = 1;
    l.q = reinterpret_cast<const float*>(a.q.data), l.q_stride = static_cast<i32>(a.q.nb[2] / 4), l.n_plain = static_cast<i32>(a.q.ne[0]);
    for (const Draft& d : stages) {  // the token's own cell is on its way before it is written: its row comes otherwise
        if (!meet({span_of(a.k)}, d.writes)) continue;
        const bool latent = d.kind == kStreamFlash && d.get<StreamFlash>().latent.used;
        if (latent || d.kind != kStreamSetRows || l.cache.row) return false;
        const SetRowsArgs store = d.get<SetRowsArgs>();
        if (n_elements(store.idx) != 1 || !cache_of(store, a.k, l.cache)) return false;
        l.fault = store.fault;
    }
    if (l.cache.row && written(span_of(l.cache.row, 8))) return false;
    Draft d = Draft::of(kStreamFlash, stage);
    d.reads = {span_of(a.q), span_of(a.k)};
    if (l.cache.row) d.reads.push_back(span_of(l.cache.row, l.cache.row_type == kI64 ? 8 : 4));
    if (a.has_mask) d.reads.push_back(span_of(a.mask));
    if (alone) {
        if (meet({span_of(a.y)}, d.reads) || !sixteens(a.y)) return false;
        stage.y = a.y;
        d.set(stage);
        d.writes = {span_of(a.y)};
    }
    push_attention(std::move(d));
    pending = !alone;
    return true;
}
/// Whether what this launch writes of an attention's K and V is known: one cell of each, or nothing. Then f.own says where it is.
bool RankRun::own_cells(StreamFlash& f) const {
    StreamOwnToken& own = f.own;
    auto one_row = [](const View& x) { return x.ne[0] * x.ne[1] * x.ne[2] * x.ne[3] == 1; };
    auto find = [&](const View& seen, StreamOwnToken::Cache& known) {
        for (const Draft& d : stages) {
            if (!meet({span_of(seen)}, d.writes)) continue;
            StreamOwnToken::Cache to{};
            auto of_store = [&](const SetRowsArgs& store) {
                own.fault = store.fault;
                return one_row(store.idx) && cache_of(store, seen, to);
            };
            bool found = false;
            if (d.kind == kStreamRopeStore) {
                const RopeStoreArgs r = d.get<StreamRope>().args;
                int writers = 0;
                for (int i = 0; i < r.n_stores; ++i)
                    if (span_of(r.store[i].y).meets(span_of(seen))) found = of_store(r.store[i]), ++writers;
                found &= writers == 1;
            } else if (d.kind == kStreamSetRows) {
                found = of_store(d.get<SetRowsArgs>());
            } else if (d.kind == kStreamFlash) {
                const StreamOwnToken other = d.get<StreamFlash>().own;
                own.fault = other.fault;
                for (const StreamOwnToken::Cache& cache : {other.k_cache, other.v_cache}) {
                    const i64 from = seen.data - cache.data;
                    if (!cache.row || from < 0 || from >= cache.n_rows * cache.row_bytes || cache.row_bytes != seen.nb[1] || from % cache.row_bytes) continue;
                    to = cache, to.first = from / cache.row_bytes;
                    found = true;
                }
            }
            if (!found || (known.row && std::memcmp(&known, &to, sizeof to) != 0)) return false;
            known = to;
        }
        return true;
    };
    const bool taken = own.table;  // its own stage writes: then no other may
    StreamOwnToken::Cache k{}, v{};
    if (!find(f.args.a.k, k) || !find(f.args.a.v, v)) return false;
    if (taken && (k.row || v.row)) return false;
    if (!taken) own.k_cache = k, own.v_cache = v;
    return !own.k_cache.row == !own.v_cache.row;
}
/// Whether the attention can do what the stage before it does, which turns its queries and keys and stores its keys and values: one hand-over
/// less a layer. What it reads must not lie where it, or the same stage of another block, writes.
bool RankRun::take_own_token(StreamFlash& f, Draft& out) {
    if (stages.empty() || stages.back().kind != kStreamRopeStore || cautious) return false;
    const FlashAttnArgs& a = f.args.a;
    const StreamRope ropes = stages.back().get<StreamRope>();
    const RopeStoreArgs& r = ropes.args;
    if (r.n_ropes != 2 || r.n_stores != 2 || r.stored_rope < 0 || ropes.table[0] != ropes.table[1]) return false;
    const RopeArgs &k = r.rope[r.stored_rope], &q = r.rope[1 - r.stored_rope];
    const i64 d = a.q.ne[0], k_heads = a.k.ne[2], q_heads = a.q.ne[2];
    if (k_heads == 0) return true;  // a rank without heads has the stages of the others
    auto heads = [d](const View& v, i64 n) { return is_packed(v, d * n) && v.ne[0] == d; };
    if (!heads(q.x, q_heads) || !heads(q.y, q_heads) || !heads(k.x, k_heads) || !heads(k.y, k_heads)) return false;
    if (a.q.data != q.y.data || (q_heads > 1 && a.q.nb[2] != d * 4) || q.n_dims != k.n_dims || q.n_offs != k.n_offs || q.neox != k.neox) return false;
    if (q.n_dims % 8 || q.n_offs % 8 || (q.neox && q.n_dims % 16) || k.factor != 1.0f) return false;
    StreamOwnToken& own = f.own;
    const SetRowsArgs& v = r.store[1];
    if (!is_packed(v.x, d * k_heads) || !cache_of(r.store[0], a.k, own.k_cache) || !cache_of(v, a.v, own.v_cache)) return false;
    own.fault = v.fault;
    own.q = reinterpret_cast<const float*>(q.x.data), own.k = reinterpret_cast<const float*>(k.x.data), own.v = reinterpret_cast<const float*>(v.x.data);
    auto of_rope = [&](const RopeArgs& rope) { return rope.y.data == rope.x.data ? head_norm(rope.x, rope.x) : std::nullopt; };
    const std::optional<size_t> q_norm = of_rope(q), k_norm = of_rope(k), v_norm = q_norm && k_norm ? head_norm(v.x, k.x) : std::nullopt;
    i64 q_stride = d;
    if (q_norm && k_norm && d % 32 == 0) {
        auto take = [&](size_t at, const float*& x, const float*& weight, float& eps, i64 heads_n, i64& stride) {
            const FusedNormArgs n = stages[at].get<StreamNormRows>().norm;
            x = reinterpret_cast<const float*>(n.a.data), eps = n.eps;
            weight = n.has_weight ? reinterpret_cast<const float*>(n.weight.data) : memory_->vectors[kOnes];
            stride = n.a.ne[1] > 1 ? n.a.nb[1] / 4 : d;
            if (stride != d) return;
            if (const float* copy = copy_of_output(x, d * heads_n, next_turned_, kTurned0, 3, at)) x = copy;
        };
        i64 k_stride = d;
        take(*q_norm, own.q, own.q_norm, own.q_eps, q_heads, q_stride);
        take(*k_norm, own.k, own.k_norm, own.k_eps, k_heads, k_stride);
        if (k_stride != d || q_stride < d || q_stride > 1 << 20) return false;
        if (v_norm) {
            const float* weight = nullptr;
            float eps = 0;
            i64 v_stride = d;
            take(*v_norm, own.v, weight, eps, k_heads, v_stride);
            if (v_stride != d || eps != own.k_eps || weight != memory_->vectors[kOnes]) return false;
            own.v_normed = 1;
        }
    }
    own.q_y = reinterpret_cast<float*>(q.y.data), own.k_y = reinterpret_cast<float*>(k.y.data);
    if (!own.v_normed)
        if (const float* copy = copy_of_output(own.v, d * k_heads, next_turned_, kTurned0, 3)) own.v = copy;
    const Draft before = stages.back();
    const std::vector<Span> inputs = {span_of(own.q, ((q_heads - 1) * q_stride + d) * 4), span_of(own.k, d * k_heads * 4), span_of(own.v, d * k_heads * 4)};
    if (meet(inputs, before.writes)) return false;
    for (const float* p : {own.q, own.k, own.v, own.q_norm, own.k_norm})
        if (reinterpret_cast<u64>(p) % 16) return false;  // it is read in sixteens
    own.table = ropes.table[0];
    own.n_dims = q.n_dims, own.n_offs = q.n_offs, own.neox = q.neox;
    f.q_factor = q.factor, f.args.a.scale *= q.factor;
    own.width_inverse = stream_inverse(d / 4);
    own.q_stride = static_cast<i32>(q_stride);
    std::vector<Span> nowhere;  // what the norms would have left
    if (own.q_norm) {
        std::vector<size_t> norms = {*q_norm, *k_norm};
        nowhere = {span_of(q.x), span_of(k.x)};
        if (own.v_normed) norms.push_back(*v_norm), nowhere.push_back(span_of(v.x));
        std::sort(norms.rbegin(), norms.rend());
        for (const size_t norm : norms) stages.erase(stages.begin() + static_cast<std::ptrdiff_t>(norm));
    }
    for (const Span& read : before.reads)
        if (!meet({read}, nowhere)) out.reads.push_back(read);
    out.reads.insert(out.reads.end(), inputs.begin(), inputs.end());
    out.writes = before.writes;
    return true;
}
/// The stage that norms heads x, where an attention can do that with its own heads. like: heads of that shape.
std::optional<size_t> RankRun::head_norm(const View& x, const View& like) const {
    for (size_t i = stages.size(); i-- > 0 && stages.size() - i <= 5;) {
        if (stages[i].kind != kStreamNormRows) continue;
        const StreamNormRows s = stages[i].get<StreamNormRows>();
        const FusedNormArgs& n = s.norm;
        if (s.factor != 1.0f) break;
        const i64 elems = like.ne[0] * like.ne[1];
        if (n.y.data != x.data) continue;
        const bool heads = n.a.type == kF32 && n.a.nb[0] == 4 && n.a.nb[1] % 16 == 0 && n.a.ne[0] * n.a.ne[1] == elems && n.a.ne[2] * n.a.ne[3] == 1;
        if (n.has_b || !heads || !is_packed(n.y, elems) || n.a.ne[0] != like.ne[0]) break;
        return i;
    }
    return std::nullopt;
}
/// A norm without weights of whole heads that the last stage turns might as well come first (Llama 4): a turn keeps a head's length.
bool RankRun::norm_before_rope(const FusedNormArgs& n) {
    if (cautious || stages.empty() || stages.back().kind != kStreamRopeStore || n.has_weight || n.has_b || !same_view(n.a, n.y)) return false;
    Draft& d = stages.back();
    StreamRope s = d.get<StreamRope>();
    for (int i = 0; i < s.args.n_ropes; ++i) {
        RopeArgs& rope = s.args.rope[i];
        if (!same_view(rope.y, n.a) || s.args.n_stores || rope.factor != 1.0f || rope.attn_factor != 1.0f || rope.ext_factor != 0.0f) continue;
        FusedNormArgs before = n;
        before.a = rope.x;
        Draft norm = Draft::of(kStreamNormRows, StreamNormRows{before, nullptr, 1.0f, 0});
        norm.reads = {span_of(rope.x)}, norm.writes = {span_of(n.y)};
        std::vector<Span> others = d.reads;  // but for what is turned
        std::erase_if(others, [&](const Span& r) { return r.begin == span_of(rope.x).begin; });
        if (meet(norm.writes, others)) return false;
        rope.x = n.y;
        d.set(s);
        d.reads = others;
        d.reads.push_back(span_of(n.y));
        stages.insert(stages.end() - 1, std::move(norm));
        return true;
    }
    return false;
}
/// Rows of K that the last stage turns, and of V behind them, are stored by it.
bool RankRun::store_with_rope(const SetRowsArgs& store) {
    if (cautious || stages.empty() || stages.back().kind != kStreamRopeStore || store.row_period) return false;
    Draft& d = stages.back();
    StreamRope s = d.get<StreamRope>();
    RopeStoreArgs& r = s.args;
    const View& x = store.x;
    const std::vector<Span> from = {span_of(x)}, to = {span_of(store.y)};
    if (r.n_stores == 2 || meet(to, d.reads) || meet(to, d.writes)) return false;
    if (r.n_stores == 0) {
        for (int i = 0; i < r.n_ropes; ++i) {
            const View& y = r.rope[i].y;
            const i64 n = y.ne[0] * y.ne[1];
            if (x.data == y.data && is_packed(y, n) && x.type == kF32 && x.ne[0] == n && n_elements(x) == n && x.nb[0] == 4) r.stored_rope = i;
        }
        if (r.stored_rope < 0) return false;
    } else if (r.stored_rope < 0 || meet(from, d.writes)) {
        return false;
    }
    r.store[r.n_stores++] = store;
    const Launch launch = rope_store_launch(r, {});
    if (!launch.kernel || launch.grid[0] > kMostElems / 256) return false;
    if (r.n_stores == 2) d.reads.push_back(from[0]);
    d.writes.push_back(to[0]);
    d.count = static_cast<i32>(launch.grid[0]);
    d.set(s);
    return true;
}
bool RankRun::add_combine(FlashCombineArgs c) {
    if (stages.empty() || stages.back().kind != kStreamFlash || c.y.ne[2] * c.y.ne[3] != 1 || c.y.nb[0] != 4) return false;
    const FlashSplitArgs f = stages.back().get<StreamFlash>().args;
    const i64 k = c.y.ne[0] * c.y.ne[1];
    if (stream_combine_bytes(f.n_splits) > kStreamInputBytes || c.y.ne[0] % 4) return false;
    if (c.xq) {
        if (c.y.nb[1] != c.y.ne[0] * 4) return false;
        Recipe r;
        r.input = kInputPlain, r.a = reinterpret_cast<const float*>(c.y.data), r.k = k;
        if (!bind(c.xq, r)) return false;
    }
    Draft& flash = stages.back();
    StreamFlash whole = flash.get<StreamFlash>();
    // One piece is the result, unless that lies where another block may still read what it needs. Of streamed cells there are pieces on each rank.
    if (!cautious && f.n_splits == 1 && f.a.k.ne[1] <= kStreamedCells && !meet({span_of(c.y)}, flash.reads) &&
        (!whole.latent.used || (reinterpret_cast<u64>(c.y.data) | static_cast<u64>(c.y.nb[1])) % 16 == 0)) {
        whole.y = c.y;
        // The host's allocator gives it what nobody reads any more: the turned keys, once they are in the cache.
        const i64 d = f.a.q.ne[0];
        if (whole.own.k_y && meet({span_of(c.y)}, {span_of(whole.own.k_y, d * f.a.k.ne[2] * 4)})) whole.own.k_y = nullptr;
        if (whole.own.q_y && meet({span_of(c.y)}, {span_of(whole.own.q_y, d * f.a.q.ne[2] * 4)})) whole.own.q_y = nullptr;
        whole.args.a.sinks = c.sinks, whole.args.a.has_sinks = c.has_sinks, whole.args.a.head_offset = c.head_offset;
        flash.set(whole);
        flash.writes.push_back(span_of(c.y));
        pending = false;
        return true;
    }
    c.acc = f.acc, c.meta = f.meta, c.n_splits = f.n_splits, c.xq = c.xd = nullptr;
    Draft d = Draft::of(kStreamCombine, StreamCombine{c, stream_inverse((c.y.ne[0] + 31) / 32), 0});
    d.writes = {span_of(c.y)};
    stages.push_back(std::move(d));
    pending = false;
    return true;
}
/// Where the turns of this rope stand, the same in all layers; null: too many kinds.
float* RankRun::table_of(const RopeArgs& rope) {
    RopeArgs key = rope;
    key.x = key.y = View{};
    key.neox = key.n_offs = 0;
    key.factor = 1.0f;
    std::string bytes(reinterpret_cast<const char*>(&key), sizeof key);
    if (const auto found = tables_.find(bytes); found != tables_.end()) return found->second;
    if (tables_.size() == kMostTables || rope.n_dims > kTableFloats) return nullptr;
    float* table = memory_->vectors[kTables] + static_cast<i64>(tables_.size()) * kTableFloats;
    tables_[bytes] = table;
    Draft d = Draft::of(kStreamTurns, StreamTurns{rope, table});
    d.reads = {span_of(rope.pos)};
    d.writes = {span_of(table, rope.n_dims * 4)};
    stages.push_back(std::move(d));
    return table;
}
bool RankRun::add_rope(const RankLaunch& l) {
    StreamRope s{};
    RopeStoreArgs& a = s.args;
    if (named(l, "rope_store")) {
        a = args_of<RopeStoreArgs>(l);
    } else {
        if (l.args.size() != sizeof(RopeArgs)) return false;
        a.rope[0] = args_of<RopeArgs>(l);
        a.n_ropes = 1;
        a.stored_rope = -1;
    }
    Draft d;
    for (int i = 0; i < a.n_ropes; ++i) {
        View& x = a.rope[i].x;
        if (x.ne[2] * x.ne[3] != 1 || a.rope[i].sectioned == kVision) return false;
        // K's result may lie where Q's input was: with a copy of the input both can be turned at once.
        const i64 n = x.ne[0] * x.ne[1];
        if (x.type == kF32 && x.nb[0] == 4 && x.nb[1] == x.ne[0] * 4)
            if (float* copy = copy_of_output(reinterpret_cast<const float*>(x.data), n, next_turned_, kTurned0, 3)) x.data = reinterpret_cast<char*>(copy);
        s.table[i] = table_of(a.rope[i]);
        if (!s.table[i]) return false;
        d.reads.push_back(span_of(x));
        d.reads.push_back(span_of(s.table[i], a.rope[i].n_dims * 4));
        d.writes.push_back(span_of(a.rope[i].y));
    }
    for (int i = 0; i < a.n_stores; ++i) {
        if (i > 0 || a.stored_rope < 0) d.reads.push_back(span_of(a.store[i].x));
        d.writes.push_back(span_of(a.store[i].y));
    }
    if (!cautious && !stages.empty() && stages.back().kind == kStreamRopeStore) {
        Draft& last = stages.back();
        StreamRope first = last.get<StreamRope>();
        if (first.args.n_ropes == 1 && first.args.n_stores == 0 && a.n_ropes == 1 && !meet(d.reads, last.writes) && !meet(d.writes, last.writes) &&
            !meet(d.writes, last.reads)) {
            first.args.rope[1] = a.rope[0], first.table[1] = s.table[0], first.args.n_ropes = 2;
            std::copy(a.store, a.store + 2, first.args.store);
            first.args.n_stores = a.n_stores;
            first.args.stored_rope = a.stored_rope < 0 ? -1 : 1;
            s = first;
            d.reads.insert(d.reads.end(), last.reads.begin(), last.reads.end());
            d.writes.insert(d.writes.end(), last.writes.begin(), last.writes.end());
            stages.pop_back();
        }
    }
    const Launch launch = rope_store_launch(a, {});
    if (!launch.kernel || launch.grid[0] > kMostElems / 256) return false;
    Draft whole = Draft::of(kStreamRopeStore, s);
    whole.count = static_cast<i32>(launch.grid[0]);
    whole.reads = d.reads, whole.writes = d.writes;
    stages.push_back(std::move(whole));
    return true;
}

}  // namespace ggml_tp
