#include "latent_heads.h"

#include <map>
#include <set>

#include "rows_grid.h"

namespace ggml_tp {
namespace {

/// A row of each of n heads, n_elems floats side by side, as far apart as the next: where the first one is.
struct HeadRows {
    const float* data;
    i64 stride;  // elements
    Span span;
};
std::optional<HeadRows> heads_in(const View& v, i64 n_elems, i64 n) {
    constexpr i64 kMost = 1 << 24;
    if (v.type != kF32 || v.nb[0] != 4 || v.ne[0] != n_elems || n_rows(v) != n || n <= 0) return std::nullopt;
    Rows rows;
    for (i64 h = 0; h < n; ++h) rows.push_back(row_at(v, h));
    const std::optional<i64> step = step_of(rows);
    if (!step || *step % 4 || *step < 0 || *step > kMost) return std::nullopt;
    return HeadRows{reinterpret_cast<const float*>(v.data), *step / 4, span_of(v.data, (n - 1) * *step + n_elems * 4)};
}

class Finder {
  public:
    Finder(const std::vector<Draft>& stages, size_t place, float* attended)
        : stages_(stages), place_(place), attended_(attended), flash_(stages[place].get<StreamFlash>()) {}

    std::optional<Join> find() {
        const FlashAttnArgs& a = flash_.args.a;
        heads_ = a.q.ne[2], n_plain_ = a.v.ne[0], n_turned_ = a.q.ne[0] - a.v.ne[0];
        if (flash_.latent.table || heads_ <= 0 || n_turned_ <= 0 || n_turned_ > 64 || n_turned_ % 2) return std::nullopt;
        if (!find_queries() || !find_own() || !settle()) return std::nullopt;
        return write();
    }

  private:
    size_t writer(const void* at, size_t end) const { return writer_of(stages_, span_of(at, 4), end); }
    /// The rope whose result lies at `y` before stage `end`, which becomes ours.
    bool find_rope(const char* y, size_t end, i64 rows, HeadRows& from) {
        StreamLatent& l = flash_.latent;
        const size_t at = writer(y, end);
        const auto stage = body_of<StreamRope>(stages_, at, kStreamRopeStore);
        if (!stage || stage->args.n_stores) return false;
        for (int r = 0; r < stage->args.n_ropes; ++r) {
            const RopeArgs& rope = stage->args.rope[r];
            if (rope.y.data != y) continue;
            const std::optional<HeadRows> found = heads_in(rope.x, n_turned_, rows);
            if (!found || rope.n_dims != n_turned_ || rope.n_offs || rope.factor != 1.0f) return false;
            if (l.table && (l.table != stage->table[r] || l.neox != rope.neox)) return false;
            l.table = stage->table[r], l.neox = rope.neox;
            from = *found;
            inputs_.push_back({at, from.span});
            ropes_[at].insert(r);
            taken_.insert(at);
            return true;
        }
        return false;
    }
    bool find_queries() {
        const View& q = flash_.args.a.q;
        StreamLatent& l = flash_.latent;
        const size_t at = writer(q.data, place_);
        const auto joined = body_of<StreamConcat>(stages_, at, kStreamConcat);
        if (!joined || joined->args.y.data != q.data || joined->args.p[0] != 0) return false;
        const std::optional<HeadRows> whole = heads_in(joined->args.y, q.ne[0], heads_), plain = heads_in(joined->args.x, n_plain_, heads_);
        if (!whole || whole->stride * 4 != (heads_ > 1 ? q.nb[2] : 0) || !plain) return false;
        if (reinterpret_cast<u64>(plain->data) % 16 || plain->stride % 4) return false;
        HeadRows turned{};
        if (!heads_in(joined->args.b, n_turned_, heads_) || !find_rope(joined->args.b.data, at, heads_, turned)) return false;
        l.q = plain->data, l.q_stride = static_cast<i32>(plain->stride), l.n_plain = static_cast<i32>(n_plain_), l.n_turned = static_cast<i32>(n_turned_);
        l.q_pe = turned.data, l.q_pe_stride = static_cast<i32>(turned.stride);
        inputs_.push_back({at, plain->span});
        taken_.insert(at);
        return true;
    }
    bool find_own() {
        const View& k = flash_.args.a.k;
        StreamLatent& l = flash_.latent;
        const size_t at_store = writer_of(stages_, span_of(k), place_);
        const auto store = body_of<SetRowsArgs>(stages_, at_store, kStreamSetRows);
        if (!store || n_elements(store->idx) != 1 || !cache_of(*store, k, l.cache) || !is_row(store->x, k.ne[0])) return false;
        l.fault = store->fault;
        const size_t at = writer(store->x.data, at_store);
        const auto joined = body_of<StreamConcat>(stages_, at, kStreamConcat);
        if (!joined || joined->args.y.data != store->x.data || joined->args.p[0] != 0 || !is_row(joined->args.y, k.ne[0]) ||
            !is_row(joined->args.x, n_plain_) || !is_row(joined->args.b, n_turned_))
            return false;
        const size_t at_norm = writer(joined->args.x.data, at);
        const auto rows = body_of<StreamNormRows>(stages_, at_norm, kStreamNormRows);
        if (!rows || rows->factor != 1.0f) return false;
        const FusedNormArgs& norm = rows->norm;
        if (norm.has_b || !norm.has_weight || norm.y.data != joined->args.x.data || !is_row(norm.a, n_plain_) || !is_row(norm.y, n_plain_) ||
            !is_vector(norm.weight, n_plain_) || reinterpret_cast<u64>(norm.a.data) % 16)
            return false;
        HeadRows turned{};
        if (!find_rope(joined->args.b.data, at, 1, turned)) return false;
        l.kv = reinterpret_cast<const float*>(norm.a.data), l.k_pe = turned.data;
        l.weight = reinterpret_cast<const float*>(norm.weight.data), l.eps = norm.eps;
        inputs_.push_back({at_norm, span_of(norm.a)});
        taken_.insert(at_norm), taken_.insert(at), taken_.insert(at_store);
        cache_ = span_of(store->y);
        row_ = span_of(l.cache.row, l.cache.row_type == kI64 ? 8 : 4);
        return true;
    }
    static bool is_row(const View& v, i64 n) { return v.type == kF32 && v.ne[0] == n && n_elements(v) == n && v.nb[0] == 4; }

    /// Whether all of it may happen where the attention stands.
    bool settle() const {
        for (const auto& [at, ropes] : ropes_)
            if (static_cast<int>(ropes.size()) != stages_[at].get<StreamRope>().args.n_ropes) return false;
        for (size_t i = 0; i < place_; ++i) {
            // The cache's other rows, the number of this token's, and the norm's weights are read before a wait.
            const std::vector<Span> constants = {row_, span_of(flash_.latent.weight, n_plain_ * 4)};
            if (meet(constants, stages_[i].writes)) return false;
            if (taken_.count(i)) continue;
            if (meet({cache_}, stages_[i].writes)) return false;
            for (const auto& [read_at, span] : inputs_)
                if (i > read_at && meet({span}, stages_[i].writes)) return false;
        }
        return true;
    }
    std::optional<Join> write() {
        Join out;
        out.taken.assign(taken_.begin(), taken_.end());
        for (const size_t i : taken_)
            for (const Span& span : stages_[i].writes)
                if (!span.meets(cache_)) out.left.push_back({i, span});
        Draft here = stages_[place_];
        const StreamLatent& l = flash_.latent;
        const Span joined = span_of(flash_.args.a.q);
        here.reads.erase(std::remove_if(here.reads.begin(), here.reads.end(), [&](const Span& s) { return s.begin == joined.begin; }), here.reads.end());
        for (const auto& input : inputs_) here.reads.push_back(input.second);
        here.reads.push_back(span_of(l.table, n_turned_ * 4));
        here.reads.push_back(row_);
        here.writes.push_back(cache_);
        if (flash_.y.data && !leave_elsewhere(here, out)) return std::nullopt;
        here.set(flash_);
        out.changed.push_back({place_, here});
        return out;
    }
    /// The result goes to a vector of its own, and the product that takes it finds it there.
    bool leave_elsewhere(Draft& here, Join& out) {
        View& y = flash_.y;
        const std::optional<HeadRows> rows = heads_in(y, n_plain_, heads_);
        const Span before = span_of(y), own = span_of(attended_, kStreamMostK * 4);
        size_t reader = place_ + 1;
        while (reader < stages_.size() && !meet({before}, stages_[reader].reads)) {
            if (meet({before, own}, stages_[reader].writes)) return false;
            ++reader;
        }
        auto p = body_of<StreamProduct>(stages_, reader, kStreamProduct);
        if (!rows || !p || p->input != kInputPlain || p->b || p->a != rows->data || stream_input(*p) != n_plain_ * heads_) return false;
        if (heads_ > 1 && rows->stride != n_plain_) return false;
        if (meet({own}, stages_[reader].writes) || meet({own}, here.reads)) return false;
        Draft takes = stages_[reader];
        const Span all = span_of(attended_, n_plain_ * heads_ * 4);
        p->a = attended_;
        takes.set(*p);
        for (Span& read : takes.reads)
            if (read.begin == before.begin) read = all;
        for (Span& written : here.writes)
            if (written.begin == before.begin) written = all;
        out.left.push_back({place_, before});
        y.data = reinterpret_cast<char*>(attended_);
        out.changed.push_back({reader, takes});
        return true;
    }

    const std::vector<Draft>& stages_;
    const size_t place_;
    float* const attended_;
    StreamFlash flash_;
    i64 heads_ = 0, n_plain_ = 0, n_turned_ = 0;
    std::vector<std::pair<size_t, Span>> inputs_;  // what it reads, and which stage did
    std::map<size_t, std::set<int>> ropes_;        // of a stage, which are ours
    std::set<size_t> taken_;
    Span cache_{}, row_{};
};

std::optional<Join> pack_join(const std::vector<Draft>& stages, size_t i, const float* packed) {
    const StreamElements e = stages[i].get<StreamElements>();
    auto p = body_of<StreamProduct>(stages, i + 1, kStreamProduct);
    if (!p || p->role != kHeads || p->input != kInputPlain || e.w.data || e.n_steps || p->a != packed || e.y.data != reinterpret_cast<const char*>(packed))
        return std::nullopt;
    const i64 heads = p->slots * p->slot_groups;
    const std::optional<HeadRows> rows = heads_in(e.x, p->k, heads);
    if (!rows || rows->stride % 4 || reinterpret_cast<u64>(rows->data) % 16 || p->k % 8 || heads * (p->k / 8) * (p->k / 8) >= 1 << 16 ||
        meet({rows->span}, stages[i + 1].writes))
        return std::nullopt;
    Draft d = stages[i + 1];
    const Span was = span_of(packed, 4);
    p->input = kInputHeads, p->a = rows->data, p->a_stride = static_cast<i32>(rows->stride), p->heads_inverse = stream_inverse(p->k / 8);
    d.set(*p);
    for (Span& read : d.reads)
        if (read.begin == was.begin) read = rows->span;
    Join out;
    out.taken = {i};
    out.changed = {{i + 1, d}};
    return out;
}

std::optional<Join> copy_join(const std::vector<Draft>& stages, size_t i) {
    const StreamCopy c = stages[i].get<StreamCopy>();
    auto p = i ? body_of<StreamProduct>(stages, i - 1, kStreamProduct) : std::nullopt;
    if (!p || p->role != kHeads || p->n_parts != 1) return std::nullopt;
    StreamPart& part = p->part[0];
    const i64 n = static_cast<i64>(part.n) * p->slots * p->slot_groups;
    const Span from = span_of(c.from, n * 4), to = span_of(c.to, n * 4);
    if (part.y != c.from || p->y_stride != part.n || n != c.n || part.copy || part.raw || part.bias || meet({to}, stages[i - 1].reads)) return std::nullopt;
    Draft d = stages[i - 1];
    part.y = c.to;
    d.set(*p);
    for (Span& written : d.writes)
        if (written.begin == from.begin) written = to;
    Join out;
    out.taken = {i};
    out.changed = {{i - 1, d}};
    out.left = {{i - 1, from}};
    return out;
}

}  // namespace

std::optional<Join> latent_heads(const std::vector<Draft>& stages, size_t i, float* packed, float* attended) {
    switch (stages[i].kind) {
        case kStreamFlash: return stages[i].get<StreamFlash>().latent.used ? Finder(stages, i, attended).find() : std::nullopt;
        case kStreamElements: return pack_join(stages, i, packed);
        case kStreamCopy: return copy_join(stages, i);
        default: return std::nullopt;
    }
}

}  // namespace ggml_tp
