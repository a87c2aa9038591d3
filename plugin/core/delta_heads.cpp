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
    Finder(const std::vector<Draft>& stages, size_t delta, bool keep_rows, float* windows, float* attended, i64 blocks)
        : stages_(stages),
          delta_(delta),
          keep_rows_(keep_rows),
          windows_(windows),
          attended_(attended),
          blocks_(blocks),
          args_(stages[delta].get<StreamDelta>().args) {}

    std::optional<DeltaHeads> find() {
        const RecurrentArgs& r = args_;
        StreamHeads& out = stage_;
        const bool fits = is_scan() ? r.n <= kStreamScanElems && r.rows % kStreamWarps == 0 && r.rows <= kStreamScanRows && r.src[3].nb[1] == 4
                                    : r.n <= 128 && r.rows % 32 == 0 && r.rows <= 128;
        if (!fits || r.n % 4 || r.n_head <= 0 || r.n_head > 1 << 12 || r.snapshots != 1 || r.src[3].ne[0] != 1) return std::nullopt;
        out.n_head = static_cast<i32>(r.n_head), out.head_begin = static_cast<i32>(r.head_begin);
        out.n = static_cast<i32>(r.n), out.rows = static_cast<i32>(r.rows), out.scale = r.scale;
        taken_.insert(delta_);
        if (!(is_scan() ? find_scan_state() && find_scanned() : find_state() && find_result())) return std::nullopt;
        for (int which = 0; which < 3; ++which)
            if (!find_window(which)) return std::nullopt;
        if (!(is_scan() ? find_float(2, out.gate) : find_float(3, out.gate) && find_float(4, out.beta))) return std::nullopt;
        if (!settle() || !write()) return std::nullopt;
        return found_;
    }

  private:
    struct Source {  // a product's result that a window takes in
        size_t stage;
        const float* y;
        i64 n;
    };
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
    bool is_scan() const { return stages_[delta_].kind == kStreamScan; }
    /// What a stage does element by element, of whichever of these kinds it is.
    std::optional<StreamElements> elements_at(size_t i) const {
        if (const auto e = stage<StreamElements>(i, kStreamElements)) return e;
        StreamElements e{};
        if (const auto b = stage<StreamBinary>(i, kStreamBinary); b && b->op >= 0 && !b->copy && !b->n_push) {
            e.x = b->args.a, e.y = b->args.y, e.n_steps = 1;
            e.step[0].op = kStreamWithOther + b->op, e.step[0].b = b->args.b;
            return e;
        }
        if (const auto c = stage<StreamCopy>(i, kStreamCopy)) {
            auto vector = [&](const float* data) {
                return View{reinterpret_cast<char*>(const_cast<float*>(data)), {c->n, 1, 1, 1}, {4, c->n * 4, c->n * 4, c->n * 4}, kF32, 0};
            };
            e.x = vector(c->from), e.y = vector(c->to);
            return e;
        }
        return std::nullopt;
    }
    static bool is_step(const StreamElements::Step& step, BinaryOp op) { return step.op == kStreamWithOther + static_cast<i32>(op); }
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
        readers_ = {reader};
        return true;
    }
    /// The state is read where the cache has it.
    bool find_scan_state() {
        const RecurrentArgs& r = args_;
        StreamHeads& out = stage_;
        const i64 elems = r.n * r.rows * r.n_head;
        const size_t to = next<StreamCopy>(delta_, kStreamCopy, [&](const StreamCopy& c) { return c.from == r.state && c.n == elems; });
        if (to == stages_.size() || writer(reinterpret_cast<const char*>(r.state), to) != delta_) return false;
        out.state = r.src[0].data, out.state_row = reinterpret_cast<const i32*>(r.src[6].data), out.state_row_bytes = r.src[0].nb[3];
        out.n_state_rows = static_cast<i32>(r.src[0].ne[3]);
        out.state_to = stage<StreamCopy>(to, kStreamCopy)->to;
        out.a = reinterpret_cast<const float*>(r.src[3].data);
        if ((reinterpret_cast<u64>(out.state) | reinterpret_cast<u64>(out.state_to) | static_cast<u64>(out.state_row_bytes)) % 16) return false;
        caches_ = {span_of(r.src[0]), span_of(out.state_to, elems * 4)};
        reads_ = {span_of(r.src[0]), span_of(out.state_row, 4)};
        writes_ = {caches_[1]};
        constants_.push_back(span_of(out.a, r.n_head * 4));
        take(to);
        return true;
    }
    /// What is done with the scan's result: + d * x, gated by z.
    bool find_scanned() {
        const RecurrentArgs& r = args_;
        StreamHeads& out = stage_;
        const char* const y = reinterpret_cast<const char*>(r.y);
        auto dense = [&](const View& v) { return is_dense(v) && n_elements(v) == r.rows * r.n_head; };
        size_t at_sum = delta_ + 1;
        std::optional<StreamElements> sum;
        for (; at_sum < stages_.size(); ++at_sum) {
            sum = elements_at(at_sum);
            if (sum &&
                (sum->x.data == y || (sum->n_steps > 0 && sum->step[sum->n_steps - 1].op >= kStreamWithOther && sum->step[sum->n_steps - 1].b.data == y)))
                break;
        }
        if (at_sum == stages_.size() || sum->w.data || !dense(sum->y) || writer(y, at_sum) != delta_) return false;
        std::optional<StreamElements> skip = sum;
        if (sum->n_steps == 1 && is_step(sum->step[0], BinaryOp::kAdd)) {
            const View& other = sum->x.data == y ? sum->step[0].b : sum->x;
            const size_t at_skip = writer(other.data, at_sum);
            skip = elements_at(at_skip);
            if (at_skip < delta_ || !skip || skip->n_steps != 1 || skip->y.data != other.data || !dense(other) || !dense(skip->y)) return false;
            take(at_skip);
        } else if (sum->n_steps != 2 || !is_step(sum->step[1], BinaryOp::kAdd) || sum->step[1].b.data != y) {
            return false;
        }
        const View &x = r.src[1], &of_x = skip->x, &d = skip->step[0].b;
        if (!is_step(skip->step[0], BinaryOp::kMul) || of_x.data != x.data || of_x.ne[0] != r.rows || of_x.ne[1] != r.n_head || of_x.nb[0] != x.nb[0] ||
            of_x.nb[1] != x.nb[1] || d.type != kF32 || d.ne[0] != 1 || d.ne[1] != r.n_head || d.nb[1] != 4)
            return false;
        out.d = reinterpret_cast<const float*>(d.data);
        constants_.push_back(span_of(out.d, r.n_head * 4));
        take(at_sum);
        const size_t at_glu = next<StreamGlu>(at_sum, kStreamGlu, [&](const StreamGlu& g) { return g.args.b.data == sum->y.data; });
        const auto glu = stage<StreamGlu>(at_glu, kStreamGlu);
        if (!glu || glu->op != static_cast<i32>(GluOp::kSwiglu) || writer(sum->y.data, at_glu) != at_sum || !dense(glu->args.b) || !dense(glu->args.y))
            return false;
        View z = glu->args.a;
        size_t at_z = writer(z.data, at_glu);
        if (const auto copy = elements_at(at_z); copy && !copy->w.data && !copy->n_steps && copy->y.data == z.data && dense(z) && dense(copy->y)) {
            z = copy->x;
            take(at_z);
        } else {
            at_z = at_glu;
        }
        const bool by_heads = z.ne[0] == r.rows && n_rows(z) == r.n_head;
        if (z.type != kF32 || z.nb[0] != 4 || (!by_heads && !dense(z))) return false;
        Rows rows;
        for (i64 h = 0; h < r.n_head; ++h) rows.push_back(by_heads ? row_at(z, h) : z.data + h * r.rows * 4);
        const std::optional<i64> step = step_of(rows);
        if (!step || *step % 4 || *step > 1 << 24 || *step < 0) return false;
        out.z = reinterpret_cast<const float*>(z.data), out.z_stride = static_cast<i32>(*step / 4);
        out.y = reinterpret_cast<float*>(glu->args.y.data);
        take(at_glu);
        place_ = at_glu;
        inputs_.push_back({at_z, span_of(z)});
        // Whoever reads it, up to where it is written anew.
        const std::vector<Span> result = {span_of(glu->args.y)};
        for (size_t i = place_ + 1; i < stages_.size(); ++i) {
            if (meet(result, stages_[i].reads)) readers_.push_back(i);
            if (meet(result, stages_[i].writes)) break;
        }
        reader_ = place_ + 1;
        while (reader_ < stages_.size() && stages_[reader_].kind != kStreamProduct) ++reader_;
        const auto p = stage<StreamProduct>(reader_, kStreamProduct);
        // Heads lie where a product's input is kept; and windows move on behind that product, when whoever waits for the result has waited.
        return p && p->input != kInputKept && !readers_.empty() && readers_.front() <= reader_;
    }
    /// From what a head reads back to the convolution that it comes from, with the ops in between.
    bool through(Rows& rows, const View& y, const View& x, i64 n) const {
        if (y.ne[0] != n || x.ne[0] != n || x.nb[0] != 4 || y.nb[0] != 4 || n_rows(x) != n_rows(y)) return false;
        for (const char*& row : rows) {
            const std::optional<i64> at = row_of(y, row);
            if (!at) return false;
            row = row_at(x, *at);
        }
        return true;
    }
    bool walk_scan(int which, Rows& rows, i64 n, StreamElements& conv, size_t& at) {
        std::vector<StreamElements::Step> steps;
        while (!conv.w.data) {
            at = writer(rows, at);
            const auto e = elements_at(at);
            if (!e) return false;
            if (e->w.data) {
                conv = *e;
            } else if (!same_view(e->x, e->y)) {
                const bool in_order = is_dense(e->x) && is_dense(e->y) && (!e->n_steps || std::equal(e->x.ne, e->x.ne + 4, e->y.ne));
                for (const char*& row : rows)
                    if (in_order) row = e->x.data + (row - e->y.data);
                if (!in_order && (e->n_steps || !through(rows, e->y, e->x, n))) return false;
            }
            steps.insert(steps.begin(), e->step, e->step + e->n_steps);
            take(at);
        }
        if (steps.empty() || steps.size() > 2 || steps.back().op != static_cast<i32>(UnaryOp::kSilu)) return false;
        if (steps.size() == 1) return true;
        const View& bias = steps[0].b;
        const i64 channels = conv.y.ne[0];
        stage_.bias[which] = reinterpret_cast<const float*>(bias.data);
        constants_.push_back(span_of(bias.data, channels * 4));
        return is_step(steps[0], BinaryOp::kAdd) && bias.type == kF32 && bias.ne[0] == channels && n_rows(bias) == 1 && bias.nb[0] == 4;
    }
    bool walk_delta(int which, Rows& rows, i64 n, StreamElements& conv, size_t& at) {
        StreamHeads& out = stage_;
        bool normed = which == 2, activated = false;
        while (!conv.w.data) {
            at = writer(rows, at);
            if (const auto norm = stage<StreamNormRows>(at, kStreamNormRows)) {
                if (normed || norm->norm.has_b || norm->norm.has_weight || activated || !through(rows, norm->norm.y, norm->norm.a, n)) return false;
                out.group[which].eps = norm->norm.eps, out.group[which].factor = norm->factor;
                normed = true;
            } else if (const auto e = stage<StreamElements>(at, kStreamElements)) {
                if (e->n_steps == 1 ? activated || e->step[0].op != static_cast<i32>(UnaryOp::kSilu) : e->n_steps > 1) return false;
                activated |= e->n_steps > 0;
                if (e->w.data) conv = *e;
                else if (e->n_steps ? !same_view(e->x, e->y) : !through(rows, e->y, e->x, n)) return false;
            } else {
                return false;
            }
            take(at);
        }
        return normed && activated;
    }
    bool find_window(int which) {
        const RecurrentArgs& r = args_;
        StreamHeads& out = stage_;
        Rows rows;
        constexpr int kScanSources[] = {5, 4, 1};  // C, B, x
        const View& src = r.src[is_scan() ? kScanSources[which] : which];
        for (i64 h = 0; h < r.n_head; ++h) {
            const i64 head = r.head_begin + h;
            i64 row = h;
            if (which < 2) row = (is_scan() ? head / (r.n_head_global / r.n_group[which]) : head % r.n_group[which]) - r.group_begin[which];
            rows.push_back(src.data + row * src.nb[1]);
        }
        const i64 n = which < 2 ? r.n : r.rows;
        size_t at = delta_;
        StreamElements conv{};
        if (!(is_scan() ? walk_scan(which, rows, n, conv, at) : walk_delta(which, rows, n, conv, at))) return false;
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
        out.row = row, out.fault = old->fault;
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
        if (out.bias[which]) out.bias[which] += least;
        constants_.push_back(span_of(all.w, taps * channels * 4));
        window.x += least, window.w += least * taps, window.old += least * (taps - 1) * 4, window.to += least * (taps - 1);
        if (!shifted_.count(at)) {
            shifted_.insert(at);
            found_.shift.shift[found_.shift.n_shift++] = all;
            const size_t product = writer(c.b.data, at_concat);
            const auto p = stage<StreamProduct>(product, kStreamProduct);
            if (!p || p->glu || p->role || p->n_push) return false;
            sources_.push_back({product, all.x, channels});
            caches_.push_back(span_of(old->w_view)), caches_.push_back(span_of(all.to, (taps - 1) * channels * 4));
            reads_.push_back(span_of(old->w_view)), reads_.push_back(span_of(old->idx));
        }
        take(at_concat), take(to);
        if (keep_rows_) kept_.insert(from);
        else take(from);
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
        for (i64 h = 0; h < args_.n_head; ++h) rows.push_back(src.data + h * src.nb[is_scan() ? 0 : 1]);
        std::vector<StreamHeadStep> steps;
        size_t at = delta_, read_at = delta_;
        for (;;) {
            at = writer(rows, at);
            const auto e = elements_at(at);
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
        constants_.push_back(span_of(out.row.row, 4));
        if (out.weight) constants_.push_back(span_of(out.weight, r.rows * 4));
        constants_.push_back(span_of(out.state_row, 4));
        for (size_t i = 0; i < stages_.size(); ++i) {
            // Caches and constants are read before a wait; nobody else in the launch has to do with the former.
            if (i <= reader_ + 1 && meet(constants_, stages_[i].writes)) return false;
            if (taken_.count(i)) {
                for (const Span& span : stages_[i].writes)
                    if (!meet({span}, caches_)) found_.left.push_back({i, span});
                continue;
            }
            if (meet(caches_, stages_[i].writes) || (meet(caches_, stages_[i].reads) && !kept_.count(i))) return false;
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

    /// The part of a product's rows that a window takes in leaves a copy. False: it is no part, or becomes none.
    bool leave_copy(StreamProduct& p, const Source& source, float* copy) const {
        const i32 before = p.n_parts;
        int part = 0;
        while (part < p.n_parts && (source.y < p.part[part].y || source.y + source.n > p.part[part].y + p.part[part].n)) ++part;
        if (part == p.n_parts || p.part[part].copy) return false;
        if (const i64 first = source.y - p.part[part].y; first > 0) split_part(p, part++, first);
        if (part < p.n_parts) split_part(p, part, source.n);
        if (part >= p.n_parts || p.part[part].y != source.y || p.part[part].n != source.n) return false;
        p.part[part].copy = copy;
        return p.n_parts == before || stream_fit(p, blocks_);
    }
    /// A reader of the result reads it elsewhere. False: of a kind that is not known.
    static bool redirect(Draft& d, const float* from, float* to) {
        const auto move = [&](auto* at) {
            if (reinterpret_cast<const float*>(*at) != from) return false;
            *at = reinterpret_cast<std::remove_pointer_t<decltype(at)>>(to);
            return true;
        };
        const auto set = [&](auto stage, bool moved) {
            d.set(stage);
            return moved;
        };
        if (d.kind == kStreamProduct) {
            auto p = d.get<StreamProduct>();
            const bool moved = move(&p.a);
            return set(p, moved);
        }
        if (d.kind == kStreamNormRows) {
            auto s = d.get<StreamNormRows>();
            const bool moved = move(&s.norm.a.data);
            return set(s, moved);
        }
        if (d.kind == kStreamNormBySquares) {
            auto s = d.get<StreamNormBySquares>();
            const bool moved = move(&s.x);
            return set(s, moved);
        }
        if (d.kind != kStreamSquares) return false;
        auto s = d.get<StreamSquares>();
        bool moved = false;
        for (int i = 0; i < s.n_parts; ++i) moved |= move(&s.x[i]);
        return set(s, moved);
    }
    /// Products leave copies of what windows take in, and whoever takes the result takes it where nobody else writes.
    bool write() {
        StreamHeads& out = stage_;
        i64 before = 0;
        std::map<size_t, Draft> changed;
        auto draft = [&](size_t i) -> Draft& { return changed.try_emplace(i, stages_[i]).first->second; };
        for (const Source& source : sources_) {
            Draft& d = draft(source.stage);
            StreamProduct p = d.get<StreamProduct>();
            float* const copy = windows_ + before;
            if (!leave_copy(p, source, copy)) return false;
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
        const i64 bytes = args_.rows * args_.n_head * 4;
        const Span y = span_of(out.y, bytes), own = span_of(attended_, bytes);
        for (size_t i : readers_) {
            Draft& reader = draft(i);
            for (Span& read : reader.reads)
                if (read.begin == y.begin) read = own;
            if (!redirect(reader, out.y, attended_)) return false;
        }
        out.y = attended_;
        for (const auto& input : inputs_) reads_.push_back(input.second);
        writes_.push_back(own);
        Draft& here = draft(place_);
        here = Draft::of(kStreamHeads, out);
        here.reads = reads_, here.writes = writes_;
        found_.changed.assign(changed.begin(), changed.end());
        return true;
    }

    const std::vector<Draft>& stages_;
    const size_t delta_;
    const bool keep_rows_;
    float *const windows_, *const attended_;
    const i64 blocks_;
    const RecurrentArgs args_;
    StreamHeads stage_{};
    std::vector<Source> sources_;
    std::vector<Span> reads_, writes_;  // of the stage, but for what lies in vectors of its own
    std::vector<size_t> readers_;       // of the result
    size_t reader_ = 0;                 // the next product
    DeltaHeads found_{};
    std::set<size_t> taken_, kept_, shifted_;
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

std::optional<DeltaHeads> delta_heads(const std::vector<Draft>& stages, size_t delta, bool keep_rows, float* windows, float* attended, i64 blocks) {
    return Finder(stages, delta, keep_rows, windows, attended, blocks).find();
}

}  // namespace ggml_tp
