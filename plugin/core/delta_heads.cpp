#include "delta_heads.h"

#include <map>
#include <set>

#include "elementwise.h"
#include "rows_grid.h"

namespace ggml_tp {
namespace {

std::optional<i64> row_of(const View& v, const char* at) {
    for (i64 row = 0; row < n_rows(v); ++row)
        if (row_at(v, row) == at) return row;
    return std::nullopt;
}
bool is_head_op(const StreamElements::Step& step) { return step.op < kStreamWithOther && stream_head_op(static_cast<UnaryOp>(step.op)); }
bool one_row(const GetRowsArgs& g) { return g.idx.type == kI32 && g.y.ne[1] == 1 && g.w.n < i64{1} << 31; }

class Finder {
  public:
    Finder(const std::vector<Draft>& stages, size_t delta, float* windows, float* attended)
        : stages_(stages), delta_(delta), windows_(windows), attended_(attended), args_(stages[delta].get<StreamDelta>().args) {}

    std::optional<DeltaHeads> find() {
        const RecurrentArgs& r = args_;
        StreamHeads& out = stage_;
        if (r.n % 4 || r.n > 128 || r.rows % 32 || r.rows > 128 || r.n_head <= 0 || r.n_head > 1 << 12 || r.snapshots != 1 || r.src[3].ne[0] != 1)
            return std::nullopt;
        out.n_head = static_cast<i32>(r.n_head), out.head_begin = static_cast<i32>(r.head_begin);
        out.n = static_cast<i32>(r.n), out.rows = static_cast<i32>(r.rows), out.scale = r.scale;
        taken_.insert(delta_);
        if (!find_state() || !find_result()) return std::nullopt;
        for (int which = 0; which < 3; ++which)
            if (!find_window(which)) return std::nullopt;
        if (!find_float(3, out.gate) || !find_float(4, out.beta)) return std::nullopt;
        if (!settle()) return std::nullopt;
        write();
        return found_;
    }

  private:
    size_t writer(const char* at, size_t end) const { return writer_of(stages_, span_of(at, 4), end); }
    /// The same of all rows.
    size_t writer(const Rows& rows, size_t end) const {
        const size_t out = writer(rows[0], end);
        for (const char* row : rows)
            if (writer(row, end) != out) return stages_.size();
        return out;
    }
    template <class T>
    std::optional<T> stage(size_t i, i32 kind) const {
        return body_of<T>(stages_, i, kind);
    }
    void take(size_t i) { taken_.insert(i); }
    /// The first stage behind `begin` of which `fits` is true of its body.
    template <class T, class Fits>
    size_t next(size_t begin, i32 kind, const Fits& fits) const {
        for (size_t i = begin + 1; i < stages_.size(); ++i)
            if (const auto body = stage<T>(i, kind); body && fits(*body)) return i;
        return stages_.size();
    }

    bool find_state() {
        const RecurrentArgs& r = args_;
        StreamHeads& out = stage_;
        const size_t from = writer(r.src[5].data, delta_);
        const auto rows = stage<GetRowsArgs>(from, kStreamGetRows);
        if (!rows || !stages_[from].count || !one_row(*rows) || rows->y.data != r.src[5].data) return false;
        const i64 elems = r.n * r.rows * r.n_head;
        const size_t to = next<StreamCopy>(delta_, kStreamCopy, [&](const StreamCopy& c) { return c.from == r.state && c.n == elems; });
        if (to == stages_.size() || writer(reinterpret_cast<const char*>(r.state), to) != delta_ || n_elements(rows->y) != elems) return false;
        out.state = rows->w_view.data, out.state_row = reinterpret_cast<const i32*>(rows->idx.data), out.state_row_bytes = rows->w_view.nb[1];
        out.n_state_rows = static_cast<i32>(rows->w.n), out.fault = rows->fault;
        out.state_to = stage<StreamCopy>(to, kStreamCopy)->to;
        if ((reinterpret_cast<u64>(out.state) | reinterpret_cast<u64>(out.state_to) | static_cast<u64>(out.state_row_bytes)) % 16) return false;
        caches_ = {span_of(rows->w_view), span_of(out.state_to, elems * 4)};
        reads_ = {span_of(rows->w_view), span_of(rows->idx)};
        writes_ = {caches_[1]};
        take(from), take(to);
        return true;
    }
    bool find_result() {
        const RecurrentArgs& r = args_;
        StreamHeads& out = stage_;
        auto dense = [&](const View& v) { return is_dense(v) && v.ne[0] == r.rows && n_elements(v) == r.rows * r.n_head; };
        const size_t at_norm = next<StreamNormRows>(delta_, kStreamNormRows, [&](const StreamNormRows& s) {
            return reinterpret_cast<const float*>(s.norm.a.data) == r.y && dense(s.norm.a) && dense(s.norm.y);
        });
        const auto norm = stage<StreamNormRows>(at_norm, kStreamNormRows);
        if (!norm || writer(reinterpret_cast<const char*>(r.y), at_norm) != delta_ || norm->factor != 1.0f || norm->norm.has_b || !norm->norm.has_weight ||
            !is_vector(norm->norm.weight, r.rows))
            return false;
        const char* const normed = norm->norm.y.data;
        const size_t at_product =
            next<StreamBinary>(at_norm, kStreamBinary, [&](const StreamBinary& b) { return b.args.a.data == normed || b.args.b.data == normed; });
        const auto product = stage<StreamBinary>(at_product, kStreamBinary);
        if (!product || writer(normed, at_product) != at_norm || product->op != static_cast<i32>(BinaryOp::kMul) || product->copy || product->n_push)
            return false;
        const BinaryArgs& m = product->args;
        if (!dense(m.a) || !dense(m.b) || !dense(m.y)) return false;
        const View& of_z = m.a.data == normed ? m.b : m.a;
        const size_t at_z = writer(of_z.data, at_product);
        const auto z = stage<StreamElements>(at_z, kStreamElements);
        if (!z || z->w.data || z->n_steps != 1 || !is_head_op(z->step[0]) || z->y.data != of_z.data || !dense(z->y) || z->x.nb[0] != 4 || z->x.ne[0] != r.rows)
            return false;
        Rows rows;
        for (i64 h = 0; h < r.n_head; ++h) rows.push_back(row_at(z->x, h));
        const std::optional<i64> step = step_of(rows);
        if (!step || *step % 4 || *step > 1 << 24 || *step < 0) return false;
        out.z = reinterpret_cast<const float*>(z->x.data), out.z_stride = static_cast<i32>(*step / 4), out.z_op = z->step[0].op;
        out.weight = reinterpret_cast<const float*>(norm->norm.weight.data), out.eps = norm->norm.eps;
        out.y = reinterpret_cast<float*>(m.y.data);
        take(at_norm), take(at_product), take(at_z);
        place_ = at_product;
        inputs_.push_back({at_z, span_of(z->x)});
        const std::vector<Span> y = {span_of(m.y)};
        size_t reader = at_product + 1;
        while (reader < stages_.size() && !meet(y, stages_[reader].reads)) {
            if (stages_[reader].kind == kStreamProduct || meet(y, stages_[reader].writes)) return false;  // a product's input is kept from before
            ++reader;
        }
        const auto p = stage<StreamProduct>(reader, kStreamProduct);
        if (!p || p->input != kInputPlain || p->a != out.y || stream_input(*p) != r.rows * r.n_head) return false;
        reader_ = reader;
        return true;
    }
    bool find_window(int which) {
        const RecurrentArgs& r = args_;
        StreamHeads& out = stage_;
        Rows rows;
        const View& src = r.src[which];
        for (i64 h = 0; h < r.n_head; ++h)
            rows.push_back(src.data + (which < 2 ? (r.head_begin + h) % r.n_group[which] - r.group_begin[which] : h) * src.nb[1]);
        const i64 n = which < 2 ? r.n : r.rows;
        auto through = [&](const View& y, const View& x) {
            if (y.ne[0] != n || x.ne[0] != n || x.nb[0] != 4 || y.nb[0] != 4 || n_rows(x) != n_rows(y)) return false;
            for (const char*& row : rows) {
                const std::optional<i64> at = row_of(y, row);
                if (!at) return false;
                row = row_at(x, *at);
            }
            return true;
        };
        bool normed = which == 2, activated = false;
        size_t at = delta_;
        StreamElements conv{};
        while (!conv.w.data) {
            at = writer(rows, at);
            if (const auto norm = stage<StreamNormRows>(at, kStreamNormRows)) {
                if (normed || norm->norm.has_b || norm->norm.has_weight || activated || !through(norm->norm.y, norm->norm.a)) return false;
                out.group[which].eps = norm->norm.eps, out.group[which].factor = norm->factor;
                normed = true;
            } else if (const auto e = stage<StreamElements>(at, kStreamElements)) {
                if (e->n_steps == 1 ? activated || e->step[0].op != static_cast<i32>(UnaryOp::kSilu) : e->n_steps > 1) return false;
                activated |= e->n_steps > 0;
                if (e->w.data) conv = *e;
                else if (e->n_steps ? !same_view(e->x, e->y) : !through(e->y, e->x)) return false;
            } else {
                return false;
            }
            take(at);
        }
        if (!normed || !activated) return false;
        // The window itself, over the cache's rows and the product's.
        const i64 taps = conv.w.ne[0], channels = conv.y.ne[0];
        const bool fits = taps > 1 && taps <= kStreamMostTaps && n_elements(conv.y) == channels && conv.y.nb[0] == 4 && conv.x.ne[0] == taps &&
                          conv.x.nb[0] == 4 && conv.w.nb[0] == 4 && conv.w.nb[1] == taps * 4 && n_elements(conv.x) == taps * channels;
        const size_t at_concat = fits ? writer(conv.x.data, at) : stages_.size();
        const auto concat = stage<StreamConcat>(at_concat, kStreamConcat);
        if (!concat) return false;
        const MoveArgs& c = concat->args;
        if (c.p[0] != 0 || c.y.data != conv.x.data || c.y.nb[0] != 4 || c.y.nb[1] != conv.x.nb[1] || n_elements(c.y) != taps * channels ||
            c.x.ne[0] != taps - 1 || c.x.nb[0] != 4 || c.x.nb[1] != (taps - 1) * 4 || c.b.ne[0] != 1 || c.b.nb[1] != 4)
            return false;
        const size_t from = writer(c.x.data, at_concat);
        const auto old = stage<GetRowsArgs>(from, kStreamGetRows);
        if (!old || !stages_[from].count || !one_row(*old) || !(span_of(old->y).begin <= span_of(c.x).begin && span_of(c.x).end <= span_of(old->y).end))
            return false;
        auto leaves = [&](const StreamElements& e) {
            return !e.w.data && !e.n_steps && e.x.data == c.y.data + 4 && e.x.nb[0] == 4 && e.x.nb[1] == c.y.nb[1] && e.x.ne[0] == taps - 1 &&
                   e.x.ne[1] == channels && e.y.ne[0] == taps - 1 && e.y.ne[1] == channels && is_dense(e.y) && n_elements(e.y) == (taps - 1) * channels;
        };
        const size_t to = next<StreamElements>(at_concat, kStreamElements, leaves);
        if (to >= place_ || writer(c.y.data, to) != at_concat) return false;
        const StreamWindowRow row{reinterpret_cast<const i32*>(old->idx.data), old->w_view.nb[1], static_cast<i32>(old->w.n), static_cast<i32>(taps)};
        if (which && (row.row != out.row.row || row.row_bytes != out.row.row_bytes || row.n_rows != out.row.n_rows || row.taps != out.row.taps)) return false;
        out.row = row;
        const StreamWindow all{reinterpret_cast<const float*>(c.b.data), reinterpret_cast<const float*>(conv.w.data),
                               old->w_view.data + (c.x.data - old->y.data), reinterpret_cast<float*>(stage<StreamElements>(to, kStreamElements)->y.data),
                               channels};
        // Which channels are whose.
        std::vector<i64> head;
        i64 least = channels;
        for (const char* r0 : rows) {
            head.push_back((r0 - conv.y.data) / 4);
            if (r0 < conv.y.data || head.back() + n > channels) return false;
            least = std::min(least, head.back());
        }
        if (!set_group(which, head, least, n)) return false;
        StreamWindow& window = out.window[which];
        window = all;
        window.x += least, window.w += least * taps, window.old += least * (taps - 1) * 4, window.to += least * (taps - 1);
        if (!shifted_.count(at)) {
            shifted_.insert(at);
            found_.shift.shift[found_.shift.n_shift++] = all;
            const size_t product = writer(c.b.data, at_concat);
            const auto p = stage<StreamProduct>(product, kStreamProduct);
            if (!p || p->glu || p->role || p->n_push) return false;
            int part = 0;
            while (part < p->n_parts && (p->part[part].y != all.x || p->part[part].n != channels || p->part[part].copy)) ++part;
            if (part == p->n_parts) return false;
            sources_.push_back({product, part, all.x, channels});
            caches_.push_back(span_of(old->w_view)), caches_.push_back(span_of(all.to, (taps - 1) * channels * 4));
            reads_.push_back(span_of(old->w_view)), reads_.push_back(span_of(old->idx));
        }
        take(at_concat), take(from), take(to);
        return true;
    }
    /// Which of the source's rows a head has: heads / repeat % groups.
    bool set_group(int which, const std::vector<i64>& head, i64 least, i64 n) {
        const RecurrentArgs& r = args_;
        if (which == 2) {
            for (size_t h = 0; h < head.size(); ++h)
                if (head[h] != least + static_cast<i64>(h) * n) return false;
            return true;
        }
        for (i64 repeat = 1; repeat <= r.n_head_global; ++repeat)
            for (const i64 groups : {r.n_group[which], r.n_head_global / repeat}) {
                if (r.n_head_global % repeat || groups <= 0) continue;
                auto group = [&](size_t h) { return (r.head_begin + static_cast<i64>(h)) / repeat % groups; };
                i64 first = groups;
                for (size_t h = 0; h < head.size(); ++h) first = std::min(first, group(h));
                bool fits = true;
                for (size_t h = 0; h < head.size(); ++h) fits &= head[h] == least + (group(h) - first) * n;
                if (!fits) continue;
                StreamHeadGroup& to = stage_.group[which];
                to.repeat = static_cast<i32>(repeat), to.groups = static_cast<i32>(groups), to.first = static_cast<i32>(first);
                return true;
            }
        return false;
    }
    bool find_float(int which, StreamHeadFloat& out) {
        const View& src = args_.src[which];
        Rows rows;
        for (i64 h = 0; h < args_.n_head; ++h) rows.push_back(src.data + h * src.nb[1]);
        std::vector<StreamHeadStep> steps;
        size_t at = delta_, read_at = delta_;
        for (;;) {
            at = writer(rows, at);
            const auto e = stage<StreamElements>(at, kStreamElements);
            if (!e) break;
            if (e->w.data || !is_dense(e->y) || !std::equal(e->x.ne, e->x.ne + 4, e->y.ne)) return false;
            Rows from;
            std::vector<Rows> others(static_cast<size_t>(e->n_steps));
            for (const char* row : rows) {
                i64 i = (row - e->y.data) / 4;
                const i64 at0 = i % e->y.ne[0];
                auto element = [&](const View& v) {
                    View wrapped = v;
                    for (int d = 0; d < 4; ++d) {
                        if (v.ne[d] == e->y.ne[d]) continue;
                        if (v.ne[d] != 1) return static_cast<const char*>(nullptr);
                        wrapped.nb[d] = 0, wrapped.ne[d] = e->y.ne[d];
                    }
                    return row_at(wrapped, i / e->y.ne[0]) + at0 * wrapped.nb[0];
                };
                from.push_back(element(e->x));
                for (int s = 0; s < e->n_steps; ++s)
                    if (e->step[s].op >= kStreamWithOther) {
                        others[static_cast<size_t>(s)].push_back(element(e->step[s].b));
                        if (!others[static_cast<size_t>(s)].back() || e->step[s].b.type != kF32) return false;
                    }
            }
            std::vector<StreamHeadStep> here;
            for (int s = 0; s < e->n_steps; ++s) {
                const StreamElements::Step& step = e->step[s];
                StreamHeadStep to{nullptr, step.op, 0};
                if (step.op >= kStreamWithOther
                        ? step.op > kStreamWithOther + static_cast<i32>(BinaryOp::kMul) || step.op == kStreamWithOther + static_cast<i32>(BinaryOp::kSub)
                        : !is_head_op(step))
                    return false;
                if (const Rows& b = others[static_cast<size_t>(s)]; !b.empty()) {
                    const std::optional<i64> stride = step_of(b);
                    if (!stride || (b.size() > 1 && *stride != 4)) return false;
                    to.b = reinterpret_cast<const float*>(b[0]);
                    constants_.push_back(span_of(to.b, args_.n_head * 4));
                }
                here.push_back(to);
            }
            steps.insert(steps.begin(), here.begin(), here.end());
            rows = from;
            read_at = at;
            take(at);
        }
        // Heads of a group side by side, maybe, and groups further apart.
        const auto at_head = [&](size_t h) { return static_cast<i64>(rows[h] - rows[0]); };
        const i64 stride = rows.size() > 1 ? at_head(1) : 4;
        size_t inner = 1;
        while (inner < rows.size() && at_head(inner) == static_cast<i64>(inner) * stride) ++inner;
        const i64 outer = inner < rows.size() ? at_head(inner) : 0;
        for (size_t h = 0; h < rows.size(); ++h)
            if (at_head(h) != static_cast<i64>(h / inner) * outer + static_cast<i64>(h % inner) * stride) return false;
        constexpr i64 kMost = 1 << 24;
        if (stride % 4 || stride < 0 || stride > kMost || outer % 4 || outer < 0 || outer > kMost || steps.size() > kStreamHeadSteps) return false;
        out.x = reinterpret_cast<const float*>(rows[0]), out.n_steps = static_cast<i32>(steps.size());
        out.inner = static_cast<i32>(inner), out.outer = static_cast<i32>(outer / 4), out.stride = static_cast<i32>(stride / 4);
        std::copy(steps.begin(), steps.end(), out.step);
        inputs_.push_back({read_at, span_of(rows[0], at_head(rows.size() - 1) + 4)});
        return true;
    }
    /// Whether all of it may happen where the last of the stages stands.
    bool settle() {
        StreamHeads& out = stage_;
        const RecurrentArgs& r = args_;
        for (int i = 0; i < 3; ++i) {
            constants_.push_back(span_of(out.window[i].w, out.row.taps * (i == 2 ? r.rows * r.n_head : r.n) * 4));
            constants_.push_back(span_of(out.row.row, 4));
        }
        constants_.push_back(span_of(out.weight, r.rows * 4));
        constants_.push_back(span_of(out.state_row, 4));
        for (size_t i = 0; i < stages_.size(); ++i) {
            // Caches and constants are read before a wait; nobody else in the launch has to do with the former.
            if (i <= reader_ + 1 && meet(constants_, stages_[i].writes)) return false;
            if (taken_.count(i)) {
                for (const Span& span : stages_[i].writes)
                    if (!meet({span}, caches_)) found_.left.push_back({i, span});
                continue;
            }
            if (meet(caches_, stages_[i].writes) || meet(caches_, stages_[i].reads)) return false;
            for (const auto& [read_at, span] : inputs_)
                if (i > read_at && i < place_ && meet({span}, stages_[i].writes)) return false;
        }
        if (*taken_.rbegin() != place_) return false;
        taken_.erase(place_);
        found_.taken.assign(taken_.begin(), taken_.end());
        found_.place = place_;
        found_.shift.shift_row = out.row, found_.shift.fault = out.fault;
        i64 before = 0;
        for (const Source& source : sources_) before += source.n;
        return before <= kStreamMostK;
    }

    /// Products leave copies of what windows take in, and one takes the result, where nobody else writes.
    void write() {
        StreamHeads& out = stage_;
        i64 before = 0;
        std::map<size_t, Draft> changed;
        auto draft = [&](size_t i) -> Draft& { return changed.try_emplace(i, stages_[i]).first->second; };
        for (const Source& source : sources_) {
            Draft& d = draft(source.stage);
            StreamProduct p = d.get<StreamProduct>();
            float* const copy = p.part[source.part].copy = windows_ + before;
            d.set(p);
            d.writes.push_back(span_of(copy, source.n * 4));
            auto move = [&](StreamWindow& window) {
                if (window.x >= source.y && window.x < source.y + source.n) window.x = copy + (window.x - source.y);
            };
            for (StreamWindow& window : out.window) move(window);
            for (StreamWindow& window : found_.shift.shift) move(window);
            reads_.push_back(d.writes.back());
            found_.shift_reads.push_back(d.writes.back());
            before += source.n;
        }
        for (int i = 0; i < found_.shift.n_shift; ++i) {
            const StreamWindow& window = found_.shift.shift[i];
            const i64 bytes = window.n_channels * (out.row.taps - 1) * 4;
            found_.shift_reads.push_back(span_of(window.old, (out.row.n_rows - 1) * out.row.row_bytes + bytes));
            found_.shift_writes.push_back(span_of(window.to, bytes));
        }
        found_.shift_reads.push_back(span_of(out.row.row, 4));
        Draft& reader = draft(reader_);
        StreamProduct p = reader.get<StreamProduct>();
        const i64 bytes = args_.rows * args_.n_head * 4;
        const Span y = span_of(out.y, bytes), own = span_of(attended_, bytes);
        for (Span& read : reader.reads)
            if (read.begin == y.begin) read = own;
        p.a = out.y = attended_;
        reader.set(p);
        for (const auto& input : inputs_) reads_.push_back(input.second);
        writes_.push_back(own);
        Draft& here = draft(place_);
        here = Draft::of(kStreamHeads, out);
        here.reads = reads_, here.writes = writes_;
        found_.changed.assign(changed.begin(), changed.end());
    }

    struct Source {  // a product's result that a window takes in
        size_t stage;
        int part;
        const float* y;
        i64 n;
    };
    const std::vector<Draft>& stages_;
    const size_t delta_;
    float *const windows_, *const attended_;
    const RecurrentArgs args_;
    StreamHeads stage_{};
    std::vector<Source> sources_;
    std::vector<Span> reads_, writes_;  // of the stage, but for what lies in vectors of its own
    size_t reader_ = 0;
    DeltaHeads found_{};
    std::set<size_t> taken_, shifted_;
    size_t place_ = 0;
    std::vector<Span> caches_, constants_;
    std::vector<std::pair<size_t, Span>> inputs_;  // what it reads, and which stage did
};

}  // namespace

void DeltaHeads::shift_in(Draft& stage) const {
    StreamHeads heads = stage.get<StreamHeads>();
    std::copy(std::begin(shift.shift), std::end(shift.shift), heads.shift);
    heads.n_shift = shift.n_shift, heads.shift_row = shift.shift_row, heads.fault = shift.fault;
    stage.set(heads);
    stage.reads.insert(stage.reads.end(), shift_reads.begin(), shift_reads.end());
    stage.writes.insert(stage.writes.end(), shift_writes.begin(), shift_writes.end());
}

std::optional<DeltaHeads> delta_heads(const std::vector<Draft>& stages, size_t delta, float* windows, float* attended) {
    return Finder(stages, delta, windows, attended).find();
}

}  // namespace ggml_tp
