#include "token.h"

#include <algorithm>
#include <array>
#include <map>
#include <set>

#include "recurrence.h"

namespace ggml_tp {
namespace {

using abi::Op;
using Shape = std::array<i64, 4>;

constexpr u64 kFirstAddress = 1 << 20;  // of activations; nothing is stored there
constexpr i64 kFloat = 4;               // bytes

/// Strides of a contiguous tensor; false for a type that is not known or a row that does not end with a block.
bool set_strides(int type, const i64 ne[4], i64 nb[4], i64* bytes) {
    const WeightFormat* format = find_weight_format(type);
    if (!format || ne[0] % format->block_elems) return false;
    nb[0] = format->block_bytes;
    nb[1] = ne[0] / format->block_elems * format->block_bytes;
    nb[2] = nb[1] * ne[1];
    nb[3] = nb[2] * ne[2];
    *bytes = nb[3] * ne[3];
    return true;
}

/// A tensor's shape is not what its name promises.
struct Misfit : Error {
    using Error::Error;
};

class Builder {
  public:
    Builder(const ModelShape& model, int n_ranks, const std::vector<double>& split) : model_(model), n_ranks_(n_ranks), split_(split), encoder_(model.encoder) {
        for (const FileTensor& t : model.tensors) {
            Stored s;
            s.name = t.name;
            s.type = t.type;
            std::copy(t.ne, t.ne + 4, s.ne);
            if (*std::min_element(t.ne, t.ne + 4) <= 0) throw Error(t.name + " has no elements");
            if (!set_strides(s.type, s.ne, s.nb, &s.bytes)) {
                out_.notes.push_back(t.name + ": its type is not known here, the host's CPU computes with it");
                continue;
            }
            guess_layout(s, n_ranks, split);
            lay_out_planes(s, n_ranks);
            out_.weights.push_back(std::move(s));
            by_name_[t.name].stored = &out_.weights.back();
        }
    }

    TokenGraph build() {
        const bool encodes = has_norm("enc.blk.0.attn_norm"), decodes = has_norm("dec.blk.0.attn_norm");
        if (encodes) prefix_ = "enc.", encoder_ = true;
        expand(has_streams() ? streams() : stream());
        if (encodes && decodes) {
            out_.of_prompt = std::move(out_.graph);
            out_.graph = {};
            for (auto& [name, weight] : by_name_) weight.id = -1;
            ordered_.clear();
            prefix_ = "dec.", encoder_ = false;
            positions_ = mask_ = wanted_ = buckets_ = -1;
            expand(stream());
        }
        name_unplaced();
        return std::move(out_);
    }

  private:
    struct Weight {
        Stored* stored = nullptr;
        int id = -1;  // in the graph that is being built, once it is read
        bool is_read = false;
    };

    // ---- tensors and nodes

    bool has(const std::string& name) const { return by_name_.count(name) != 0; }
    const i64* ne(const std::string& name) const { return by_name_.at(name).stored->ne; }
    Tensor& at(int id) { return out_.graph.tensors[static_cast<size_t>(id)]; }
    Shape shape(int id) {
        const Tensor& t = at(id);
        return {t.ne[0], t.ne[1], t.ne[2], t.ne[3]};
    }

    int add(Op op, const std::string& name, int type, const Shape& ne, std::initializer_list<int> sources) {
        Tensor t;
        t.id = t.root = static_cast<int>(out_.graph.tensors.size());
        t.name = name;
        t.op = op;
        t.type = type;
        std::copy(ne.begin(), ne.end(), t.ne);
        fits(name, *std::min_element(t.ne, t.ne + 4) > 0 && set_strides(type, t.ne, t.nb, &t.bytes));
        std::fill(t.src, t.src + 10, -1);
        std::copy(sources.begin(), sources.end(), t.src);
        t.address = address_;
        address_ += static_cast<u64>(t.bytes + 256) / 256 * 256;
        out_.graph.tensors.push_back(t);
        return t.id;
    }
    int leaf(const std::string& name, int type, const Shape& ne) { return add(Op::NONE, name, type, ne, {}); }
    int node(Op op, const std::string& name, const Shape& ne, std::initializer_list<int> sources, int type = kF32) {
        const int id = add(op, name, type, ne, sources);
        at(id).is_node = true;
        fits(name, has_shapes_of(at(id)));
        return id;
    }
    static void fits(const std::string& name, bool it_does) {
        if (!it_does) throw Misfit(name + ": shapes are not those that its name promises");
    }
    /// What a host's ggml would insist on, as far as planning relies on it.
    bool has_shapes_of(const Tensor& t) {
        const Tensor &a = at(std::max(t.src[0], 0)), &b = at(std::max(t.src[1], 0));
        auto repeats = [](const Tensor& whole, const Tensor& part) {
            for (int d = 0; d < 4; ++d)
                if (whole.ne[d] % part.ne[d]) return false;
            return true;
        };
        const bool alike = std::equal(t.ne, t.ne + 4, a.ne);
        switch (t.op) {
            case Op::MUL_MAT: return a.ne[0] == b.ne[0] && b.ne[2] % a.ne[2] == 0 && b.ne[3] % a.ne[3] == 0;
            case Op::MUL_MAT_ID: return a.ne[0] == b.ne[0];
            case Op::ADD:
            case Op::SUB:
            case Op::MUL:
            case Op::DIV: return alike && repeats(t, b);
            case Op::ADD_ID: return alike && a.ne[0] == b.ne[0];
            case Op::GLU: return t.src[1] < 0 ? 2 * t.ne[0] == a.ne[0] : alike && std::equal(t.ne, t.ne + 4, b.ne);
            case Op::REPEAT: return repeats(t, a);
            case Op::CONT:
            case Op::CPY: return t.elems() == a.elems();
            case Op::CONCAT: return t.elems() == a.elems() + b.elems();
            case Op::SSM_CONV: return a.ne[0] == b.ne[0] && a.ne[1] == b.ne[1];
            case Op::FLASH_ATTN_EXT: return a.ne[0] == b.ne[0] && a.ne[2] % b.ne[2] == 0;
            default: break;
        }
        const Recurrence* recurrence = recurrence_of(t.op);
        if (!recurrence) return true;
        const Recurrence::Source* of = recurrence->sources;
        const i64 n_head = at(t.src[recurrence->values]).ne[of[recurrence->values].axis];
        for (int i = 0; i < 7 && t.src[i] >= 0; ++i) {
            const i64 n = at(t.src[i]).ne[of[i].axis];
            if (of[i].lies == Recurrence::kHeads && n != n_head) return false;
            if (of[i].lies == Recurrence::kGroups && n_head % n) return false;
        }
        return true;
    }

    /// In the order of a host's graph: before a node what it reads, from left to right.
    void expand(int id) {
        ordered_.resize(out_.graph.tensors.size());
        if (id < 0 || ordered_[static_cast<size_t>(id)]) return;
        ordered_[static_cast<size_t>(id)] = 1;
        for (int i = 0; i < 10; ++i) expand(at(id).src[i]);
        if (at(id).is_node) out_.graph.nodes.push_back(id);
    }

    /// Of `of`'s bytes, from `offset` on, with all four strides.
    int view(int of, const Shape& ne, const Shape& nb, i64 offset) {
        Tensor t = at(of);
        t.id = static_cast<int>(out_.graph.tensors.size());
        t.op = Op::VIEW;
        t.is_node = false;
        std::copy(ne.begin(), ne.end(), t.ne);
        std::copy(nb.begin(), nb.end(), t.nb);
        t.offset += offset;
        t.address += static_cast<u64>(offset);
        t.bytes = t.unit_bytes() + (t.ne[0] / t.unit_elems() - 1) * t.nb[0];
        for (int d = 1; d < 4; ++d) t.bytes += (t.ne[d] - 1) * t.nb[d];
        std::fill(t.src, t.src + 10, -1);
        t.src[0] = of;
        fits(t.name, *std::min_element(t.ne, t.ne + 4) > 0 && offset >= 0 && t.offset + t.bytes <= at(t.root).bytes);
        out_.graph.tensors.push_back(t);
        return t.id;
    }
    int reshaped(int of, const Shape& ne) {
        Shape nb;
        i64 bytes;
        fits(at(of).name, set_strides(at(of).type, ne.data(), nb.data(), &bytes) && ne[0] * ne[1] * ne[2] * ne[3] == at(of).elems());
        return view(of, ne, nb, 0);
    }
    /// `n` rows of `row` floats that lie `stride` floats apart, from float `begin` on.
    int rows_of(int of, i64 row, i64 n, i64 stride, i64 begin) {
        return view(of, {row, n, 1, 1}, {kFloat, stride * kFloat, stride * n * kFloat, stride * n * kFloat}, begin * kFloat);
    }
    int part_of(int of, i64 n, i64 begin) { return rows_of(of, n, 1, at(of).nb[1] / kFloat, begin); }
    /// [row, n] as [row, 1, n]: what batches over heads.
    int by_heads(int of) {
        const Tensor& t = at(of);
        return view(of, {t.ne[0], 1, t.ne[1], 1}, {t.nb[0], t.nb[1] * t.ne[1], t.nb[1], t.nb[1] * t.ne[1]}, 0);
    }

    int stored_leaf(Stored& s) {
        const int id = leaf(s.name, s.type, {s.ne[0], s.ne[1], s.ne[2], s.ne[3]});
        at(id).stored = &s;
        return id;
    }
    int weight(const std::string& name) {
        Weight& w = by_name_.at(name);
        if (w.id < 0) w.id = stored_leaf(*w.stored);
        w.is_read = true;
        return w.id;
    }
    int product(const std::string& name, int x) {
        const int w = weight(name + ".weight");
        const Shape a = shape(w), b = shape(x);
        return node(Op::MUL_MAT, name, {a[1], b[1], b[2], b[3]}, {w, x});
    }
    /// NAME.weight times x, plus NAME.bias where there is one.
    int linear(const std::string& name, int x) { return biased(name, product(name, x)); }
    int biased(const std::string& name, int x) { return has(name + ".bias") ? plus(name + " + bias", x, weight(name + ".bias")) : x; }
    int plus(const std::string& name, int a, int b) { return node(Op::ADD, name, shape(a), {a, b}); }
    int times(const std::string& name, int a, int b) { return node(Op::MUL, name, shape(a), {a, b}); }
    int unary(const std::string& name, int x) { return node(Op::UNARY, name, shape(x), {x}); }
    int joined(const std::string& name, const Shape& ne, int axis, int a, int b) {
        const int id = node(Op::CONCAT, name, ne, {a, b});
        at(id).params[0] = axis;
        return id;
    }

    std::string norm_name(const std::string& name) const { return has(name + ".weight") ? name + ".weight" : name; }  // Falcon-H1 leaves the ending out
    bool has_norm(const std::string& name) const { return has(norm_name(name)); }
    /// x itself where there is no such norm.
    int normed(int x, const std::string& name) {
        if (!has_norm(name)) return x;
        const int y = node(model_.layer_norm || has(name + ".bias") ? Op::NORM : Op::RMS_NORM, name, shape(x), {x});
        return biased(name, times(name + " weighted", y, weight(norm_name(name))));
    }

    // ---- layers

    int stream() {
        // The norm of embeddings is LFM2's last one: it has no other, and its layers begin with norms, unlike BERT's.
        const bool ends_with_it = !has_norm(prefix_ + "output_norm") && has_norm("blk.0.attn_norm");
        int stream = leaf("embeddings", kF32, {model_.n_embd, 1, 1, 1});
        if (!ends_with_it) stream = normed(stream, "token_embd_norm");
        for (int i = 0; i < n_layer(); ++i) stream = attempted(stream, [&] { return layer(i, stream); });
        return attempted(stream, [&] { return logits(normed(stream, ends_with_it ? "token_embd_norm" : prefix_ + "output_norm")); });
    }
    /// `otherwise`, and a note, where an architecture means something else by the same names.
    template <class Part>
    int attempted(int otherwise, Part&& part) {
        const Mark before = mark();
        try {
            return part();
        } catch (const Misfit& misfit) {
            out_.notes.push_back(misfit.what());
            back_to(before);
            return otherwise;
        }
    }
    struct Mark {
        size_t n_tensors, n_nodes, n_caches;
        std::vector<char> ordered;
    };
    Mark mark() const { return {out_.graph.tensors.size(), out_.graph.nodes.size(), out_.caches.size(), ordered_}; }
    void back_to(const Mark& mark) {
        const int n = static_cast<int>(mark.n_tensors);
        out_.graph.tensors.resize(mark.n_tensors);
        out_.graph.nodes.resize(mark.n_nodes);
        while (out_.caches.size() > mark.n_caches) out_.caches.pop_back();
        ordered_ = mark.ordered;
        for (auto& [name, weight] : by_name_)
            if (weight.id >= n) weight.id = -1, weight.is_read = false;
        for (int* once : {&positions_, &mask_, &wanted_, &first_v_, &encoded_, &buckets_})
            if (*once >= n) *once = -1;
        std::erase_if(caches_, [n](const auto& of) { return of.second[0] >= n || of.second[1] >= n; });
    }
    int n_layer() const {
        const int n = static_cast<int>(model_.layers.size());
        if (prefix_ != "enc.") return n;
        int encoding = 0;  // more or fewer than those that decode
        while (has_norm("enc.blk." + std::to_string(encoding) + ".attn_norm")) ++encoding;
        return n ? encoding : 0;
    }
    const ModelShape::Layer& shape_of(int i) const { return model_.layers[std::min(static_cast<size_t>(i), model_.layers.size() - 1)]; }
    int logits(int x) {
        const char* head = has("output.weight") ? "output" : "token_embd";
        return !encoder_ && has(std::string(head) + ".weight") ? linear(head, x) : x;
    }

    int layer(int i, int stream) {
        const std::string p = prefix_ + "blk." + std::to_string(i) + ".";
        const bool is_last = i + 1 == n_layer();
        if (has_rwkv(p)) return rwkv(p, i, is_last, stream);
        const bool norm_before = has_norm(p + "attn_norm"), has_forward = has_feed_forward(p);
        const int in = normed(stream, p + "attn_norm");
        int mixed = mixer(p, i, has_norm(p + "attn_norm_2") ? normed(stream, p + "attn_norm_2") : in);
        int forward = mixed < 0 && has_forward && !has_norm(p + "ffn_norm") ? feed_forward(p, i, in) : -1;  // a layer of nothing else
        int forward_in = in;
        if (mixed >= 0 && has_all(p, {"attn_output.weight", "ssm_in.weight"})) {  // summed up before rows are chosen
            stream = plus(p + "attention and state + residual", mixed, stream);
            mixed = -1;
        }
        if (mixed >= 0 && has_all(p, {"cross_attn_q.weight", "cross_attn_k.weight", "cross_attn_v.weight", "cross_attn_o.weight"})) {
            stream = plus(p + "attention + residual", mixed, stream);
            mixed = cross_attention(p, i, normed(stream, p + "cross_attn_norm"));
        }
        if (is_last) {  // from here on only tokens whose logits are wanted
            mixed = wanted(mixed);
            forward = wanted(forward);
            stream = wanted(stream);
            if (mixed >= 0) forward_in = wanted(in);
        }
        if (forward >= 0) return plus(p + "feed forward + residual", forward, stream);

        // A norm behind attention is feed forward's own, or of what attention gives, or (BERT) of its sum with the residual: the others say which.
        const std::string behind = has_norm(p + "post_attention_norm") ? "post_attention_norm" : "attn_output_norm";
        const std::string before_forward = has_norm(p + "ffn_norm") ? "ffn_norm" : norm_before ? behind : "";
        const bool of_sums = !norm_before && behind == "attn_output_norm";
        if (mixed >= 0 && behind != before_forward && !of_sums) mixed = normed(mixed, p + behind);
        const bool has_own = !before_forward.empty() && has_norm(p + before_forward);
        if (mixed >= 0 && has_forward && norm_before && (model_.parallel || !has_own)) {
            forward = feed_forward(p, i, has_own ? normed(stream, p + before_forward) : forward_in);
            const int first = model_.residual_first ? stream : mixed, second = model_.residual_first ? mixed : stream;
            return plus(p + "layer", plus(p + "attention and feed forward", forward, first), second);
        }
        if (mixed >= 0) stream = plus(p + "attention + residual", mixed, stream);
        if (of_sums) stream = normed(stream, p + behind);
        if (!has_forward) return stream;
        forward = feed_forward(p, i, has_own ? normed(stream, p + before_forward) : stream);
        forward = normed(forward, p + "post_ffw_norm");
        if (!of_sums) forward = normed(forward, p + "layer_output_norm");
        stream = plus(p + "feed forward + residual", forward, stream);
        return of_sums ? normed(stream, p + "layer_output_norm") : stream;
    }
    int wanted(int x) {
        if (x < 0) return x;
        if (wanted_ < 0) wanted_ = leaf("wanted", kF32, {1, 1, 1, 1});
        return node(Op::GET_ROWS, at(x).name + ", wanted", shape(x), {x, wanted_});
    }

    /// What lets tokens see each other: attention, a state, or both side by side (Falcon-H1); -1: nothing that is known here.
    int mixer(const std::string& p, int i, int x) {
        if (has_all(p,
                    {"ssm_conv1d_q.weight", "ssm_conv1d_k.weight", "ssm_conv1d_v.weight", "attn_q.weight", "attn_k.weight", "attn_v.weight", "ssm_f_a.weight",
                     "ssm_f_b.weight", "ssm_g_a.weight", "ssm_g_b.weight", "ssm_beta.weight", "ssm_dt.bias", "ssm_a", "ssm_norm.weight", "attn_output.weight"}))
            return gated_delta_of_channels(p, i, x);
        if (has_all(p, {"ssm_conv1d.weight", "attn_qkv.weight", "attn_gate.weight", "ssm_dt.bias", "ssm_a", "ssm_norm.weight", "ssm_out.weight"}) &&
            (has(p + "ssm_ba.weight") || has_all(p, {"ssm_alpha.weight", "ssm_beta.weight"})))
            return gated_delta(p, i, x);
        if (has_all(p, {"shortconv.in_proj.weight", "shortconv.conv.weight", "shortconv.out_proj.weight"})) return short_convolution(p, i, x);
        const int attended = has(p + "attn_kv_a_mqa.weight") ? latent_attention(p, i, x) : attention(p, i, x);
        if (!has_all(p, {"ssm_in.weight", "ssm_conv1d.weight", "ssm_dt.bias", "ssm_a", "ssm_d", "ssm_out.weight"})) return attended;
        const int scanned = has_all(p, {"ssm_x.weight", "ssm_dt.weight"}) ? mamba(p, i, x) : mamba2(p, i, x);
        return attended < 0 || scanned < 0 ? std::max(attended, scanned) : plus(p + "attention + state", attended, scanned);
    }
    bool has_all(const std::string& p, std::initializer_list<const char*> names) const {
        return std::all_of(names.begin(), names.end(), [&](const char* name) { return has(p + name); });
    }

    // ---- attention

    /// One of Q, K, V as [head, n]: a product of its own or a part of a common one.
    int heads(const std::string& p, const char* which, int x, i64 head, i64 n, int fused, i64 fused_at) {
        const std::string name = p + "attn_" + which;
        int y = fused >= 0 ? part_of(fused, head * n, fused_at) : linear(name, x);
        const bool of_heads = has(name + "_norm.weight") && ne(name + "_norm.weight")[0] == head;
        if (!of_heads) y = normed(y, name + "_norm");  // of all heads together, where there is one
        y = rows_of(y, head, n, head, 0);
        return of_heads ? normed(y, name + "_norm") : y;
    }
    /// Where a host does not rotate (NoPE, learnt or relative positions) it makes no difference: every division by heads passes.
    int rotated(const std::string& name, int x) {
        const int y = node(Op::ROPE, name, shape(x), {x, positions()});
        for (const char* factors : {"rope_freqs.weight", "rope_factors_short.weight"})
            if (has(factors)) at(y).src[2] = weight(factors);
        not_read_.insert("rope_factors_long.weight");  // instead of the short ones, in a context longer than was trained for
        return y;
    }
    int positions() {
        if (positions_ < 0) positions_ = leaf("positions", kF32, {1, 1, 1, 1});
        return positions_;
    }

    int attention(const std::string& p, int i, int x) {
        const ModelShape::Layer& l = shape_of(i);
        const std::string output = p + (has(p + "attn_output.weight") ? "attn_output" : "attn_o");
        if (l.n_head <= 0 || l.n_head_kv <= 0 || !has(output + ".weight")) return -1;
        const auto rows = [&](const char* name) { return has(p + name) ? ne(p + name)[1] : 0; };
        const i64 n_q = l.n_head * l.head_k, n_k = l.n_head_kv * l.head_k, n_v = l.n_head_kv * l.head_v;
        if (const auto shared = caches_.find(static_cast<int>(l.cache_of)); shared != caches_.end() && rows("attn_q.weight") == n_q) {
            for (const char* name : {"attn_k.weight", "attn_v.weight", "attn_k_norm.weight"}) not_read_.insert(p + name);  // files have them all the same
            const auto [keys, values] = shared->second;
            const int q = rotated(p + "q", heads(p, "q", x, l.head_k, l.n_head, -1, 0));
            return linear(output, side_by_side(flash(p, q, of_cache(keys, l.head_k, l), of_cache(values, l.head_v, l), l.head_v, l.n_head)));
        }
        const bool gated = rows("attn_q.weight") == 2 * n_q;  // beside every head of Q its gate
        const bool separate = (rows("attn_q.weight") == n_q || gated) && rows("attn_k.weight") == n_k && rows("attn_v.weight") == n_v;
        if (!separate && rows("attn_qkv.weight") != n_q + n_k + n_v) return -1;
        const int fused = separate ? -1 : linear(p + "attn_qkv", x);
        int q, gate = -1;
        if (separate && gated) {
            const int both = linear(p + "attn_q", x);
            q = normed(rows_of(both, l.head_k, l.n_head, 2 * l.head_k, 0), p + "attn_q_norm");
            gate = rows_of(both, l.head_k, l.n_head, 2 * l.head_k, l.head_k);
        } else {
            q = heads(p, "q", x, l.head_k, l.n_head, fused, 0);
        }
        const int k = heads(p, "k", x, l.head_k, l.n_head_kv, fused, n_q), v = heads(p, "v", x, l.head_v, l.n_head_kv, fused, n_q + n_k);
        int out = attended(p, i, l, rotated(p + "q", q), rotated(p + "k", k), v);
        if (gate >= 0) out = times(p + "attention gated", out, unary(p + "gate", node(Op::CONT, p + "gate, side by side", {n_q, 1, 1, 1}, {gate})));
        return linear(output, out);
    }
    /// Of what the encoder has said, for each of whose tokens a decoder multiplies K and V anew.
    int cross_attention(const std::string& p, int i, int x) {
        const ModelShape::Layer& l = shape_of(i);
        if (encoded_ < 0) encoded_ = leaf("encoded", kF32, {model_.n_embd, 1, 1, 1});
        const int q = heads(p + "cross_", "q", x, l.head_k, l.n_head, -1, 0), k = heads(p + "cross_", "k", encoded_, l.head_k, l.n_head_kv, -1, 0);
        const int v = heads(p + "cross_", "v", encoded_, l.head_v, l.n_head_kv, -1, 0);
        expand(q), expand(k), expand(v);
        const int out = node(Op::FLASH_ATTN_EXT, p + "cross attention", {l.head_v, l.n_head, 1, 1},
                             {by_heads(q), as_halves(p + "cross k", k), as_halves(p + "cross v", v)});
        expand(out);
        return linear(p + "cross_attn_o", side_by_side(out));
    }
    int as_halves(const std::string& name, int x) { return node(Op::CPY, name + " as halves", {at(x).ne[0], 1, at(x).ne[1], 1}, {by_heads(x)}, kF16); }

    /// DeepSeek's: K and V of all heads come out of one latent vector, beside which one rotated part of K is everybody's. Where the file has the
    /// second product of K as a matrix for each head, the latent itself is cached, as the only head, and Q is brought to it.
    int latent_attention(const std::string& p, int i, int x) {
        const ModelShape::Layer& of_file = shape_of(i);
        const bool absorbed = has_all(p, {"attn_k_b.weight", "attn_v_b.weight"});
        const std::string q_name = p + (has(p + "attn_q_b.weight") ? "attn_q_b" : "attn_q");
        if (!has_all(p, {"attn_kv_a_norm.weight", "attn_output.weight"}) || !has(q_name + ".weight") || !(absorbed || has(p + "attn_kv_b.weight"))) return -1;
        const i64 n = absorbed ? ne(p + "attn_k_b.weight")[2] : of_file.n_head;
        const i64 latent = ne(p + "attn_kv_a_norm.weight")[0], rotary = ne(p + "attn_kv_a_mqa.weight")[1] - latent;
        if (n <= 0 || rotary <= 0 || ne(q_name + ".weight")[1] % n) return -1;
        const i64 head = ne(q_name + ".weight")[1] / n, plain = head - rotary;
        const i64 head_v = absorbed ? ne(p + "attn_v_b.weight")[1] : ne(p + "attn_kv_b.weight")[1] / n - plain;
        if (plain <= 0 || head_v <= 0) return -1;
        int q = x;
        if (has(p + "attn_q_a.weight")) q = normed(linear(p + "attn_q_a", x), p + "attn_q_a_norm");
        q = rows_of(linear(q_name, q), head, n, head, 0);
        const int both = linear(p + "attn_kv_a_mqa", x), common = normed(part_of(both, latent, 0), p + "attn_kv_a_norm");
        const int k_rotated = rotated(p + "k_rotary", part_of(both, rotary, latent));
        if (!absorbed) {
            const int kv = product(p + "attn_kv_b", common);
            const int v = node(Op::CONT, p + "v", {head_v, n, 1, 1}, {rows_of(kv, head_v, n, plain + head_v, plain)});
            const int repeated = node(Op::REPEAT, p + "k_rotary of all heads", {rotary, n, 1, 1}, {k_rotated});
            const int k = joined(p + "k", {head, n, 1, 1}, 0, rows_of(kv, plain, n, plain + head_v, 0), repeated);
            return linear(p + "attn_output", attended(p, i, {n, n, head, head_v, of_file.cells}, rotated(p + "q", q), k, v));
        }
        const int to_latent = node(Op::MUL_MAT, p + "attn_k_b", {latent, 1, n, 1}, {weight(p + "attn_k_b.weight"), by_heads(rows_of(q, plain, n, head, 0))});
        q = joined(p + "q", {latent + rotary, n, 1, 1}, 0, rows_of(to_latent, latent, n, latent, 0),
                   rotated(p + "q_rotary", rows_of(q, rotary, n, head, plain)));
        const int k = joined(p + "k", {latent + rotary, 1, 1, 1}, 0, common, k_rotated);
        expand(q), expand(k);
        const int cache = cached("k", i, p, model_.type_k, latent + rotary, of_file.cells, k);
        const ModelShape::Layer one_head{n, 1, latent + rotary, latent, of_file.cells};
        const int out = flash(p, q, of_cache(cache, latent + rotary, one_head), of_cache(cache, latent, one_head), latent, n);
        const int values = node(Op::MUL_MAT, p + "attn_v_b", {head_v, 1, n, 1}, {weight(p + "attn_v_b.weight"), by_heads(out)});
        const int copy = node(Op::CONT, p + "attention, side by side", {head_v, n, 1, 1}, {rows_of(values, head_v, n, head_v, 0)});
        return linear(p + "attn_output", side_by_side(copy));
    }

    /// [head_v * n_head] of Q [head_k, n_head], K and V [head, n_head_kv], which are written to the caches first.
    int attended(const std::string& p, int i, const ModelShape::Layer& l, int q, int k, int v) {
        expand(q), expand(k), expand(v);
        // T5's bias by distance, its first layer's where a layer has none: no flash attention adds it.
        const std::string own = p + "attn_rel_b.weight", first = prefix_ + "blk.0.attn_rel_b.weight", bias = has(own) ? own : has(first) ? first : "";
        auto cells_first = [&](int values, i64 cells, const Shape& nb, int type) {
            const Shape ne{cells, l.head_v, l.n_head_kv, 1};
            return node(Op::CONT, p + "v, cells first", ne, {view(values, ne, nb, 0)}, type);
        };
        if (encoder_) {
            const i64 head = l.head_v * kFloat, all = head * l.n_head_kv;
            if (!bias.empty()) return unfused(p, l, q, by_heads(k), cells_first(v, 1, {all, kFloat, head, all}, kF32), bias);
            return side_by_side(flash(p, q, as_halves(p + "k", k), as_halves(p + "v", v), l.head_v, l.n_head));
        }
        const int keys = cached("k", i, p, model_.type_k, l.head_k * l.n_head_kv, l.cells, k), seen_keys = of_cache(keys, l.head_k, l);
        if (model_.unfused) return unfused(p, l, q, seen_keys, cached_by_elements(p, i, l, v), bias);
        const int values = cached("v", i, p, model_.type_v, l.head_v * l.n_head_kv, l.cells, v), seen_values = of_cache(values, l.head_v, l);
        caches_[i] = {keys, values};
        if (bias.empty()) return side_by_side(flash(p, q, seen_keys, seen_values, l.head_v, l.n_head));
        const Tensor& t = at(seen_values);
        return unfused(p, l, q, seen_keys, cells_first(seen_values, l.cells, {t.nb[1], t.nb[0], t.nb[2], t.nb[3]}, model_.type_v), bias);
    }
    int side_by_side(int heads) { return reshaped(heads, {at(heads).ne[0] * at(heads).ne[1], 1, 1, 1}); }
    /// [head_v, n_head]
    int flash(const std::string& p, int q, int keys, int values, i64 head_v, i64 n_head) {
        const int out = node(Op::FLASH_ATTN_EXT, p + "attention", {head_v, n_head, 1, 1}, {by_heads(q), keys, values, mask(shape(keys)[1])});
        if (has(p + "attn_sinks.weight")) at(out).src[4] = weight(p + "attn_sinks.weight");
        expand(out);
        return out;
    }
    int mask(i64 cells) {
        if (mask_ < 0) mask_ = leaf("mask", kF16, {cells, 1, 1, 1});
        return mask_;
    }
    /// The same by ops of their own, of K [head_k, cells, n_head_kv] and V [cells, head_v, n_head_kv].
    int unfused(const std::string& p, const ModelShape::Layer& l, int q, int keys, int values, const std::string& bias) {
        const i64 cells = shape(keys)[1];
        int scores = node(Op::MUL_MAT, p + "kq", {cells, 1, l.n_head, 1}, {keys, by_heads(q)});
        if (!bias.empty()) {
            if (buckets_ < 0) buckets_ = leaf("buckets of distances", kF32, {cells, 1, 1, 1});
            const i64 n = ne(bias)[0];
            const int of_cells = node(Op::GET_ROWS, p + "bias", {n, cells, 1, 1}, {weight(bias), buckets_});
            const int turned = view(of_cells, {cells, 1, n, 1}, {n * kFloat, n * cells * kFloat, kFloat, n * cells * kFloat}, 0);
            scores = plus(p + "kq + bias", scores, node(Op::CONT, p + "bias of heads", {cells, 1, n, 1}, {turned}));
        }
        const int shares = node(Op::SOFT_MAX, p + "kq_soft_max", shape(scores), {scores, mask(cells)});
        const int out = node(Op::MUL_MAT, p + "kqv", {l.head_v, 1, l.n_head, 1}, {values, shares});
        const int copy = node(Op::CONT, p + "attention", {l.head_v * l.n_head, 1, 1, 1}, {rows_of(out, l.head_v, l.n_head, l.head_v, 0)});
        expand(copy);
        return copy;
    }
    /// V from its cache where that has the cells of an element side by side: every element that is written is a row of one.
    int cached_by_elements(const std::string& p, int i, const ModelShape::Layer& l, int v) {
        const i64 n_v = l.head_v * l.n_head_kv;
        const int cache = cache_leaf("cache_v_l" + std::to_string(i), model_.type_v, n_v, l.cells);
        if (find_weight_format(model_.type_v)->block_elems != 1) throw Error(at(cache).name + ": without flash attention its type must be one of floats");
        written(reshaped(cache, {1, n_v * l.cells, 1, 1}), Op::SET_ROWS, p + "cache_v", reshaped(v, {1, n_v, 1, 1}), positions());
        const i64 element = at(cache).nb[0], cells = element * l.cells;
        return view(cache, {l.cells, l.head_v, l.n_head_kv, 1}, {element, cells, cells * l.head_v, cells * n_v}, 0);
    }

    int cache_leaf(const std::string& name, int type, i64 row, i64 n) {
        Stored s;
        s.name = name;
        s.type = type;
        const Shape ne{row, n, 1, 1};
        std::copy(ne.begin(), ne.end(), s.ne);
        if (!set_strides(type, s.ne, s.nb, &s.bytes)) throw Error(name + ": rows of " + std::to_string(row) + " do not end with a block of its type");
        guess_layout(s, n_ranks_, split_);
        lay_out_planes(s, n_ranks_);
        out_.caches.push_back(std::move(s));
        return stored_leaf(out_.caches.back());
    }
    /// Into `of`'s bytes, by an op that is part of the graph for that alone.
    int written(int of, Op op, const std::string& name, int values, int where) {
        Tensor& t = at(of);
        t.op = op, t.name = name, t.is_node = true;
        t.src[0] = values, t.src[1] = where;
        expand(of);
        return of;
    }
    /// The cache after a row of values was written to it.
    int cached(const char* kind, int i, const std::string& p, int type, i64 row, i64 cells, int values) {
        const int cache = cache_leaf(std::string("cache_") + kind + "_l" + std::to_string(i), type, row, cells);
        written(reshaped(cache, {row, cells, 1, 1}), Op::SET_ROWS, p + "cache_" + kind, reshaped(values, {row, 1, 1, 1}), positions());
        return cache;
    }
    /// [head, cells, n_head_kv] of a cache, as attention reads it.
    int of_cache(int cache, i64 head, const ModelShape::Layer& l) {
        const Tensor& t = at(cache);
        const WeightFormat& format = *find_weight_format(t.type);
        if (head % format.block_elems) throw Error(t.name + ": heads of " + std::to_string(head) + " do not end with a block of its type");
        return view(cache, {head, l.cells, l.n_head_kv, 1}, {t.nb[0], t.nb[1], head / format.block_elems * format.block_bytes, t.nb[2]}, 0);
    }

    // ---- layers with a state

    /// cache_KIND_lI, a row of n floats for the only sequence.
    int state(const char* kind, int i, i64 n) { return cache_leaf(std::string("cache_") + kind + "_l" + std::to_string(i), kF32, n, 1); }
    int row_of(int cache) { return node(Op::GET_ROWS, at(cache).name + ", this sequence's", {at(cache).ne[0], 1, 1, 1}, {cache, positions()}); }
    /// `values` into the row of a state, from float `begin` on.
    void keep(const std::string& p, int cache, int values, i64 begin) {
        Shape nb, ne = shape(values);
        i64 bytes;
        set_strides(kF32, ne.data(), nb.data(), &bytes);
        written(view(cache, ne, nb, begin * kFloat), Op::CPY, p + "state kept", values, cache);
    }
    /// A convolution over the last tokens: what the state has of them from float `begin` on, and behind it `values` [n] of this one.
    int convolved(const std::string& p, const std::string& name, int cache, int states, i64 begin, int values) {
        const i64 taps = ne(name + ".weight")[0], n = shape(values)[0];
        const int before = rows_of(states, taps - 1, n, taps - 1, begin);
        const i64 row = at(values).nb[1];
        const int across = view(values, {1, n, 1, 1}, {row, kFloat, row, row}, 0);
        const int window = joined(p + "window", {taps, n, 1, 1}, 0, before, across);
        keep(p, cache, rows_of(window, taps - 1, n, taps, 1), begin);
        return biased(name, node(Op::SSM_CONV, name, {n, 1, 1, 1}, {window, reshaped(weight(name + ".weight"), {taps, n, 1, 1})}));
    }

    int short_convolution(const std::string& p, int i, int x) {
        const std::string conv = p + "shortconv.conv";
        const i64 taps = ne(conv + ".weight")[0], n = ne(conv + ".weight")[1];
        if (ne(p + "shortconv.in_proj.weight")[1] != 3 * n) return -1;
        const int cache = state("r", i, (taps - 1) * n), states = row_of(cache), in = product(p + "shortconv.in_proj", x);
        const int values = times(p + "shortconv.in", part_of(in, n, 0), part_of(in, n, 2 * n));
        const int out = convolved(p, conv, cache, states, 0, values);
        return product(p + "shortconv.out_proj", times(p + "shortconv.out", part_of(in, n, n), out));
    }

    /// Every channel is a head; B, C and the step come out of a product of the channels.
    int mamba(const std::string& p, int i, int x) {
        const i64 d_state = ne(p + "ssm_a")[0], n = ne(p + "ssm_a")[1], taps = ne(p + "ssm_conv1d.weight")[0], rank = ne(p + "ssm_dt.weight")[0];
        if (ne(p + "ssm_in.weight")[1] != 2 * n || ne(p + "ssm_x.weight")[1] != rank + 2 * d_state) return -1;
        const int conv_cache = state("r", i, (taps - 1) * n), states = row_of(conv_cache), in = product(p + "ssm_in", x);
        const int channels = unary(p + "ssm_conv1d, activated", convolved(p, p + "ssm_conv1d", conv_cache, states, 0, part_of(in, n, 0)));
        const int bcdt = product(p + "ssm_x", channels);
        const int step_in = has_norm(p + "ssm_dt_norm") ? normed(part_of(bcdt, rank, 0), p + "ssm_dt_norm")
                                                        : node(Op::CONT, p + "step", {rank, 1, 1, 1}, {part_of(bcdt, rank, 0)});
        const int step = linear(p + "ssm_dt", step_in);
        const int b = normed(part_of(bcdt, d_state, rank), p + "ssm_b_norm"), c = normed(part_of(bcdt, d_state, rank + d_state), p + "ssm_c_norm");
        const int y = scanned(p, i, {d_state, 1, n}, 1, rows_of(channels, 1, n, 1, 0), step, b, c);
        const int out = plus(p + "state + d", part_of(y, n, 0), times(p + "ssm_d", channels, weight(p + "ssm_d")));
        return product(p + "ssm_out", activated(p + "ssm gated", node(Op::CONT, p + "gate", {n, 1, 1, 1}, {part_of(in, n, n)}), out));
    }
    /// Heads of channels; B and C are groups', and all comes side by side out of one product.
    int mamba2(const std::string& p, int i, int x) {
        const i64 n = ne(p + "ssm_out.weight")[0], n_head = ne(p + "ssm_a")[1], channels = ne(p + "ssm_conv1d.weight")[1],
                  taps = ne(p + "ssm_conv1d.weight")[0];
        const i64 groups = has_norm(p + "ssm_norm") ? ne(norm_name(p + "ssm_norm"))[1] : 1, d_state = (channels - n) / 2 / groups, head = n / n_head;
        if (ne(p + "ssm_in.weight")[1] != n + channels + n_head || d_state <= 0 || n + 2 * groups * d_state != channels || n_head * head != n) return -1;
        const int conv_cache = state("r", i, (taps - 1) * channels), states = row_of(conv_cache), in = product(p + "ssm_in", x);
        const int conv = unary(p + "ssm_conv1d, activated", convolved(p, p + "ssm_conv1d", conv_cache, states, 0, part_of(in, channels, n)));
        const int values = rows_of(conv, head, n_head, head, 0);
        const int step = biased(p + "ssm_dt", node(Op::CONT, p + "step", {n_head, 1, 1, 1}, {part_of(in, n_head, n + channels)}));
        const int b = rows_of(conv, d_state, groups, d_state, n), c = rows_of(conv, d_state, groups, d_state, n + groups * d_state);
        const int y = scanned(p, i, {d_state, head, n_head}, groups, values, step, b, c);
        int out = plus(p + "state + d", rows_of(y, head, n_head, head, 0), times(p + "ssm_d", values, weight(p + "ssm_d")));
        out = activated(p + "ssm gated", node(Op::CONT, p + "gate", {head, n_head, 1, 1}, {rows_of(in, head, n_head, head, 0)}), out);
        if (has_norm(p + "ssm_norm")) out = normed(rows_of(out, n / groups, groups, n / groups, 0), p + "ssm_norm");
        return product(p + "ssm_out", reshaped(out, {n, 1, 1, 1}));
    }
    /// y of all heads, then their states: of channels {d_state, channels of a head, heads}, which are kept.
    int scanned(const std::string& p, int i, const std::array<i64, 3>& of, i64 groups, int values, int step, int b, int c) {
        const i64 n = of[1] * of[2], d_state = of[0];
        const int cache = state("s", i, d_state * n), b_of_groups = rows_of(b, d_state, groups, d_state, 0),
                  c_of_groups = rows_of(c, d_state, groups, d_state, 0);
        const int y = node(Op::SSM_SCAN, p + "state", {n + d_state * n, 1, 1, 1},
                           {reshaped(cache, {of[0], of[1], of[2], 1}), values, step, weight(p + "ssm_a"), b_of_groups, c_of_groups, positions()});
        keep(p, cache, part_of(y, d_state * n, n), 0);
        return y;
    }

    /// Linear attention of Qwen3-Next and Qwen3.5: heads of Q and K are fewer than those of V. Where the gates' products are one, they lie beside
    /// each other by heads of K, and Q and K are repeated for their heads of V; else the op itself goes through them in turns.
    int gated_delta(const std::string& p, int i, int x) {
        const i64 n = ne(p + "ssm_out.weight")[0], n_v = ne(p + "ssm_a")[0], head = ne(p + "ssm_norm.weight")[0];
        const i64 taps = ne(p + "ssm_conv1d.weight")[0], channels = ne(p + "ssm_conv1d.weight")[1], n_k = (channels - n) / 2 / head,
                  per_k = n_k ? n_v / n_k : 0;
        const bool fused = has(p + "ssm_ba.weight");
        if (n != n_v * head || per_k * n_k != n_v || n_v <= 0 || n + 2 * n_k * head != channels || ne(p + "attn_qkv.weight")[1] != channels) return -1;
        const int conv_cache = state("r", i, (taps - 1) * channels), states = row_of(conv_cache), in = product(p + "attn_qkv", x);
        const int conv = unary(p + "ssm_conv1d, activated", convolved(p, p + "ssm_conv1d", conv_cache, states, 0, in));
        const int cache = state("s", i, head * head * n_v), before = reshaped(row_of(cache), {head, head, n_v, 1});
        int q = of_unit_length(p + "q", rows_of(conv, head, n_k, head, 0)), k = of_unit_length(p + "k", rows_of(conv, head, n_k, head, n_k * head));
        int step, open;
        if (fused) {
            for (int* one : {&q, &k}) {
                const int of_each = view(*one, {head, 1, n_k, 1}, {kFloat, head * kFloat, head * kFloat, n_k * head * kFloat}, 0);
                *one = rows_of(node(Op::REPEAT, p + "heads of V", {head, per_k, n_k, 1}, {of_each}), head, n_v, head, 0);
            }
            const int both = product(p + "ssm_ba", x);
            step = node(Op::CONT, p + "step", {n_v, 1, 1, 1}, {rows_of(both, per_k, n_k, 2 * per_k, per_k)});
            open = node(Op::CONT, p + "beta", {per_k, n_k, 1, 1}, {rows_of(both, per_k, n_k, 2 * per_k, 0)});
        } else {
            step = product(p + "ssm_alpha", x);
            open = product(p + "ssm_beta", x);
        }
        const int decay = times(p + "decay", unary(p + "step, positive", biased(p + "ssm_dt", step)), weight(p + "ssm_a"));
        const int out = remembered(p, cache, head, n_v, q, k, rows_of(conv, head, n_v, head, 2 * n_k * head), rows_of(decay, 1, n_v, 1, 0),
                                   rows_of(unary(p + "beta, open", open), 1, n_v, 1, 0), before);
        const int gate = unary(p + "gate", rows_of(product(p + "attn_gate", x), head, n_v, head, 0));
        return product(p + "ssm_out", reshaped(times(p + "gated", normed(out, p + "ssm_norm"), gate), {n, 1, 1, 1}));
    }
    /// Kimi's: Q, K and V apart, each with its convolution, and a decay for every channel.
    int gated_delta_of_channels(const std::string& p, int i, int x) {
        const i64 taps = ne(p + "ssm_conv1d_q.weight")[0], n = ne(p + "attn_q.weight")[1], n_head = ne(p + "ssm_a")[1], head = ne(p + "ssm_norm.weight")[0];
        if (n != n_head * head || ne(p + "attn_k.weight")[1] != n || ne(p + "attn_v.weight")[1] != n) return -1;
        const int conv_cache = state("r", i, 3 * (taps - 1) * n), states = row_of(conv_cache), cache = state("s", i, head * head * n_head);
        int qkv[3];
        for (int which = 0; which < 3; ++which) {
            const std::string letter(1, "qkv"[which]);
            const int conv = convolved(p, p + "ssm_conv1d_" + letter, conv_cache, states, which * (taps - 1) * n, product(p + "attn_" + letter, x));
            qkv[which] = rows_of(unary(p + letter + ", activated", conv), head, n_head, head, 0);
        }
        const int before = reshaped(row_of(cache), {head, head, n_head, 1});
        const int step = unary(p + "step, positive", biased(p + "ssm_dt", product(p + "ssm_f_b", product(p + "ssm_f_a", x))));
        const int decay = times(p + "decay", rows_of(step, head, n_head, head, 0), rows_of(weight(p + "ssm_a"), 1, n_head, 1, 0));
        const int open = unary(p + "beta, open", rows_of(product(p + "ssm_beta", x), 1, n_head, 1, 0));
        const int out = remembered(p, cache, head, n_head, of_unit_length(p + "q", qkv[0]), of_unit_length(p + "k", qkv[1]), qkv[2], decay, open, before);
        const int gate = unary(p + "gate", rows_of(product(p + "ssm_g_b", product(p + "ssm_g_a", x)), head, n_head, head, 0));
        return product(p + "attn_output", reshaped(times(p + "gated", normed(out, p + "ssm_norm"), gate), {n, 1, 1, 1}));
    }
    int of_unit_length(const std::string& name, int x) { return node(Op::SCALE, name, shape(x), {node(Op::RMS_NORM, name, shape(x), {x})}); }
    /// [head, n] of a state that every token reads and changes; the state behind it is kept.
    int remembered(const std::string& p, int cache, i64 head, i64 n, int q, int k, int v, int decay, int open, int before) {
        const int y = node(Op::GATED_DELTA_NET, p + "state", {head * n, 1 + head, 1, 1}, {q, k, v, decay, open, before});
        keep(p, cache, view(y, {head, head, n, 1}, {kFloat, head * kFloat, head * head * kFloat, head * head * n * kFloat}, head * n * kFloat), 0);
        return rows_of(y, head, n, head, 0);
    }

    // ---- RWKV: a token is mixed with the one before, by factors of its own

    bool has_rwkv(const std::string& p) const {
        const bool common =
            has_all(p, {"time_mix_lerp_fused.weight", "time_mix_key.weight", "time_mix_value.weight", "time_mix_receptance.weight", "time_mix_output.weight",
                        "time_mix_ln.weight", "channel_mix_lerp_k.weight", "channel_mix_key.weight", "channel_mix_value.weight"});
        const bool six = has_all(p, {"time_mix_first.weight", "time_mix_decay.weight", "time_mix_decay_w1.weight", "time_mix_decay_w2.weight",
                                     "time_mix_lerp_x.weight", "time_mix_w1.weight", "time_mix_w2.weight", "time_mix_gate.weight"});
        const bool seven = has_all(p, {"time_mix_w0.weight", "time_mix_w1.weight", "time_mix_w2.weight", "time_mix_a0.weight", "time_mix_a1.weight",
                                       "time_mix_a2.weight", "time_mix_k_k.weight", "time_mix_k_a.weight", "time_mix_r_k.weight"});
        return common && (six || seven);
    }
    int rwkv(const std::string& p, int i, bool is_last, int stream) {
        const i64 n = model_.n_embd, head = shape_of(i).head_k;
        fits(p + "time_mix_*", head > 0 && n % head == 0);
        const int tokens = state("r", i, 2 * n), before = row_of(tokens), memory = state("s", i, n * head);
        const int in = normed(stream, p + "attn_norm");
        const int difference = node(Op::SUB, p + "token before - token", {n, 1, 1, 1}, {part_of(before, n, 0), in});
        const bool six = has(p + "time_mix_first.weight");
        const int mixed = six ? rwkv6(p, n, head, memory, in, difference) : rwkv7(p, i, n, head, memory, in, difference);
        stream = plus(p + "time mix + residual", product(p + "time_mix_output", mixed), stream);
        int forward = normed(stream, p + "attn_norm_2"), last = part_of(before, n, n);
        keep(p, tokens, reshaped(joined(p + "tokens", {n, 2, 1, 1}, 1, in, forward), {2 * n, 1, 1, 1}), 0);
        if (is_last) last = wanted(last), forward = wanted(forward), stream = wanted(stream);
        const int change = node(Op::SUB, p + "token before - token", {n, 1, 1, 1}, {last, forward});
        auto lerped = [&](const char* name) { return plus(p + name, times(p + name, change, weight(p + name + ".weight")), forward); };
        const int hidden = unary(p + "channel_mix_key, activated", product(p + "channel_mix_key", lerped("channel_mix_lerp_k")));
        int out = product(p + "channel_mix_value", node(Op::SQR, p + "squared", shape(hidden), {hidden}));
        if (has_all(p, {"channel_mix_receptance.weight", "channel_mix_lerp_r.weight"}))
            out = times(p + "channel mix gated", unary(p + "receptance", product(p + "channel_mix_receptance", lerped("channel_mix_lerp_r"))), out);
        return plus(p + "channel mix + residual", out, stream);
    }
    /// What goes into the output's product: the state's answer, normed by heads.
    int rwkv6(const std::string& p, i64 n, i64 head, int memory, int in, int difference) {
        const i64 rank = ne(p + "time_mix_w2.weight")[0], n_head = n / head;
        const int first = plus(p + "time_mix_lerp_x", times(p + "time_mix_lerp_x", difference, weight(p + "time_mix_lerp_x.weight")), in);
        const int low = unary(p + "time_mix_w1, activated", product(p + "time_mix_w1", first));
        const i64 bytes = rank * kFloat;
        const int of_five = node(Op::CONT, p + "low ranks", {rank, 1, 1, 5}, {view(low, {rank, 1, 1, 5}, {kFloat, bytes, bytes, bytes}, 0)});
        int mixes = node(Op::MUL_MAT, p + "time_mix_w2", {n, 1, 1, 5}, {reshaped(weight(p + "time_mix_w2.weight"), {rank, n, 1, 5}), of_five});
        mixes = plus(p + "time_mix_lerp_fused", mixes, weight(p + "time_mix_lerp_fused.weight"));
        mixes = plus(p + "mixes", times(p + "mixes", mixes, difference), in);  // of w, k, v, r and g
        const int k = product(p + "time_mix_key", part_of(mixes, n, n)), v = product(p + "time_mix_value", part_of(mixes, n, 2 * n));
        const int r = product(p + "time_mix_receptance", part_of(mixes, n, 3 * n));
        int decay = product(p + "time_mix_decay_w2", unary(p + "time_mix_decay_w1, activated", product(p + "time_mix_decay_w1", part_of(mixes, n, 0))));
        decay = unary(p + "decay", plus(p + "time_mix_decay", decay, weight(p + "time_mix_decay.weight")));
        auto by_head = [&](int x) { return rows_of(x, head, n_head, head, 0); };
        const int y = node(Op::RWKV_WKV6, p + "state", {n, 1 + head, 1, 1},
                           {by_head(k), by_head(v), by_head(r), weight(p + "time_mix_first.weight"), by_head(decay), row_of(memory)});
        keep(p, memory, part_of(y, n * head, n), 0);
        return times(p + "gated", rwkv_normed(p, n, head, y), unary(p + "gate", product(p + "time_mix_gate", part_of(mixes, n, 4 * n))));
    }
    int rwkv7(const std::string& p, int i, i64 n, i64 head, int memory, int in, int difference) {
        const i64 n_head = n / head, n_mixes = ne(p + "time_mix_lerp_fused.weight")[3];
        const int repeated = node(Op::REPEAT, p + "of all mixes", {n, 1, 1, n_mixes}, {difference});
        const int mixes = plus(p + "mixes", times(p + "time_mix_lerp_fused", repeated, weight(p + "time_mix_lerp_fused.weight")), in);  // r, w, k, v, a, g
        auto mix = [&](i64 which) { return part_of(mixes, n, which * n); };
        auto by_head = [&](int x) { return rows_of(x, head, n_head, head, 0); };
        auto low_rank = [&](const std::string& of, int x, bool active) {
            const int low = product(p + "time_mix_" + of + "1", x);
            return product(p + "time_mix_" + of + "2", active ? unary(p + of + ", activated", low) : low);
        };
        auto shifted = [&](const std::string& of, int x) { return unary(p + of, plus(p + of, x, weight(p + "time_mix_" + of + "0.weight"))); };
        const int r = product(p + "time_mix_receptance", mix(0));
        const int decay = unary(p + "decay", node(Op::SCALE, p + "decay", {n, 1, 1, 1}, {shifted("w", low_rank("w", mix(1), true))}));
        const int k = product(p + "time_mix_key", mix(2)), a = shifted("a", low_rank("a", mix(4), false));
        const int k_a = times(p + "time_mix_k_a", k, weight(p + "time_mix_k_a.weight"));
        const int key = plus(p + "key", k, node(Op::SUB, p + "key", {n, 1, 1, 1}, {times(p + "key", a, k_a), k_a}));
        int v = product(p + "time_mix_value", mix(3));
        if (i == 0) {
            first_v_ = v;
            for (const char* name : {"time_mix_v0.weight", "time_mix_v1.weight", "time_mix_v2.weight"})
                not_read_.insert(p + name);  // files have them all the same
        } else if (first_v_ >= 0 && has_all(p, {"time_mix_v0.weight", "time_mix_v1.weight", "time_mix_v2.weight"})) {
            const int share = shifted("v", low_rank("v", mix(3), false));
            v = plus(p + "value", v, times(p + "value", node(Op::SUB, p + "first value - value", {n, 1, 1, 1}, {first_v_, v}), share));
        }
        const int k_k = times(p + "time_mix_k_k", k, weight(p + "time_mix_k_k.weight"));
        const int removed = node(Op::L2_NORM, p + "removed", {head, n_head, 1, 1}, {by_head(k_k)});
        const int y = node(
            Op::RWKV_WKV7, p + "state", {n, 1 + head, 1, 1},
            {by_head(r), by_head(decay), by_head(key), by_head(v), unary(p + "removed", removed), times(p + "replaced", removed, by_head(a)), row_of(memory)});
        keep(p, memory, part_of(y, n * head, n), 0);
        const int r_k =
            times(p + "time_mix_r_k", times(p + "key asked", by_head(key), by_head(r)), reshaped(weight(p + "time_mix_r_k.weight"), {head, n_head, 1, 1}));
        const int of_now = times(p + "value of now", by_head(v), node(Op::SUM_ROWS, p + "sum of heads", {1, n_head, 1, 1}, {r_k}));
        const int out = plus(p + "time mix", rwkv_normed(p, n, head, y), reshaped(of_now, {n, 1, 1, 1}));
        return has_all(p, {"time_mix_g1.weight", "time_mix_g2.weight"}) ? times(p + "gated", out, low_rank("g", mix(5), true)) : out;
    }
    int rwkv_normed(const std::string& p, i64 n, i64 head, int y) {
        const int by_head = node(Op::NORM, p + "time_mix_ln", {head, n / head, 1, 1}, {rows_of(y, head, n / head, head, 0)});
        return biased(p + "time_mix_ln", times(p + "time_mix_ln", reshaped(by_head, {n, 1, 1, 1}), weight(p + "time_mix_ln.weight")));
    }

    // ---- feed forward

    int activated(const std::string& name, int gate, int up) { return up < 0 ? unary(name, gate) : node(Op::GLU, name, shape(gate), {gate, up}); }
    int dense(const std::string& p, const std::string& suffix, int x, bool sparse_gate = false) {
        const int up = linear(p + "ffn_up" + suffix, x);
        const bool gated = has(p + "ffn_gate" + suffix + ".weight");
        const bool both = !gated && shape(up)[0] == 2 * ne(p + "ffn_down" + suffix + ".weight")[0];  // gate and up side by side
        int hidden;
        if (gated && sparse_gate) hidden = times(p + "ffn_glu", up, above_most(p, linear(p + "ffn_gate", x)));
        else if (gated) hidden = activated(p + "ffn_glu" + suffix, linear(p + "ffn_gate" + suffix, x), up);
        else if (both) hidden = node(Op::GLU, p + "ffn_glu" + suffix, {shape(up)[0] / 2, 1, 1, 1}, {up});
        else hidden = activated(p + "ffn_act" + suffix, up, -1);
        if (suffix.empty() && has(p + "ffn.act.scales")) hidden = node(Op::DIV, p + "ffn_act scaled", shape(hidden), {hidden, weight(p + "ffn.act.scales")});
        return linear(p + "ffn_down" + suffix, hidden);
    }
    /// Gates less what a share of them stays below, by their mean and deviation.
    int above_most(const std::string& p, int gates) {
        const int mean = node(Op::MEAN, p + "gates' mean", {1, 1, 1, 1}, {gates});
        return unary(p + "ffn_act", node(Op::SUB, p + "gates above most", shape(gates), {gates, mean}));
    }
    int expert_product(const std::string& name, int x, int chosen) {
        const int w = weight(name + ".weight");
        const int y = node(Op::MUL_MAT_ID, name, {shape(w)[1], model_.n_expert_used, 1, 1}, {w, x, chosen});
        return has(name + ".bias") ? node(Op::ADD_ID, name + " + bias", shape(y), {y, weight(name + ".bias"), chosen}) : y;
    }
    int experts(const std::string& p, int x) {
        const i64 used = model_.n_expert_used, n_embd = shape(x)[0];
        const int scores = linear(p + "ffn_gate_inp", x), ranked = biased(p + "exp_probs_b", scores);
        const int chosen = part_of(node(Op::ARGSORT, p + "experts", shape(scores), {ranked}), used, 0);
        const int shares = node(Op::SOFT_MAX, p + "experts' weights", shape(scores), {scores});
        const int factors = rows_of(shares, 1, used, 1, 0);
        const int in = reshaped(x, {n_embd, 1, 1, 1});
        int hidden;
        if (has(p + "ffn_gate_up_exps.weight")) {
            const int both = expert_product(p + "ffn_gate_up_exps", in, chosen);
            hidden = node(Op::GLU, p + "ffn_glu_exps", {shape(both)[0] / 2, used, 1, 1}, {both});
        } else {
            const int up = expert_product(p + "ffn_up_exps", in, chosen);
            const bool gated = has(p + "ffn_gate_exps.weight");
            hidden = gated ? activated(p + "ffn_glu_exps", expert_product(p + "ffn_gate_exps", in, chosen), up) : activated(p + "ffn_act_exps", up, -1);
        }
        const int down = expert_product(p + "ffn_down_exps", hidden, chosen);
        const int weighted = times(p + "experts weighted", down, factors);
        auto slot = [&](i64 e) { return rows_of(weighted, n_embd, 1, n_embd * used, e * n_embd); };
        int sum = slot(0);
        for (i64 e = 1; e < used; ++e) sum = plus(p + "sum of experts", sum, slot(e));
        if (!has_dense(p, "_shexp")) return sum;
        int shared = dense(p, "_shexp", x);
        if (has(p + "ffn_gate_inp_shexp.weight"))
            shared = times(p + "shared expert gated", shared, unary(p + "shared expert's gate", product(p + "ffn_gate_inp_shexp", x)));
        return plus(p + "experts + shared expert", sum, shared);
    }
    bool has_experts(const std::string& p) const {
        return has(p + "ffn_gate_inp.weight") && has(p + "ffn_down_exps.weight") && model_.n_expert_used > 0 &&
               (has(p + "ffn_up_exps.weight") || has(p + "ffn_gate_up_exps.weight"));
    }
    bool has_dense(const std::string& p, const std::string& suffix) const {
        return has(p + "ffn_up" + suffix + ".weight") && has(p + "ffn_down" + suffix + ".weight");
    }
    bool has_feed_forward(const std::string& p) const { return has_experts(p) || has_dense(p, ""); }
    int feed_forward(const std::string& p, int i, int x) {
        if (!has_experts(p)) return dense(p, "", x, shape_of(i).sparse_gate);
        const int of_experts = experts(p, x);
        return has_dense(p, "") ? plus(p + "feed forward + experts", dense(p, "", x), of_experts) : of_experts;  // Grok has both
    }

    // ---- Gemma 3n: several streams, of which a layer computes with the first and predicts the others

    bool has_streams() const {
        for (int i = 0; i < n_layer(); ++i)
            if (!has_all("blk." + std::to_string(i) + ".",
                         {"altup_router.weight", "altup_router_norm.weight", "altup_predict_coef.weight", "altup_correct_coef.weight",
                          "altup_correct_scale.weight", "laurel_l.weight", "laurel_r.weight", "inp_gate.weight", "proj.weight"}))
                return false;
        return n_layer() && has_all("", {"altup_proj.weight", "altup_unembd_proj.weight", "per_layer_model_proj.weight", "per_layer_proj_norm.weight"});
    }
    int streams() {
        const i64 n = model_.n_embd, more = ne("altup_proj.weight")[2], of_layer = ne("per_layer_proj_norm.weight")[0];
        const int first = leaf("embeddings", kF32, {n, 1, 1, 1});
        const int others =
            node(Op::MUL_MAT, "altup_proj", {n, 1, more, 1}, {weight("altup_proj.weight"), node(Op::REPEAT, "embeddings", {n, 1, more, 1}, {first})});
        int streams = joined("streams", {n, 1, 1 + more, 1}, 2, first, others);
        const int of_layers = normed(rows_of(product("per_layer_model_proj", first), of_layer, n_layer(), of_layer, 0), "per_layer_proj_norm");
        for (int i = 0; i < n_layer(); ++i) streams = streams_layer(i, 1 + more, streams, rows_of(of_layers, of_layer, 1, of_layer, i * of_layer));
        const int back = node(Op::MUL_MAT, "altup_unembd_proj", {n, 1, more, 1}, {weight("altup_unembd_proj.weight"), others_of(streams, n, more)});
        int sum = rows_of(streams, n, 1, n, 0);
        for (i64 s = 0; s < more; ++s) sum = plus("sum of streams", sum, rows_of(back, n, 1, n, s * n));
        return logits(normed(wanted(sum), "output_norm"));
    }
    int others_of(int streams, i64 n, i64 more) { return view(streams, {n, 1, more, 1}, {kFloat, n * kFloat, n * kFloat, n * more * kFloat}, n * kFloat); }
    int streams_layer(int i, i64 m, int streams, int of_layer) {
        const std::string p = "blk." + std::to_string(i) + ".";
        const i64 n = model_.n_embd;
        auto routed = [&](int x) { return unary(p + "altup_router, activated", product(p + "altup_router", normed(x, p + "altup_router_norm"))); };
        const int turned = node(Op::CONT, p + "streams", {m, n, 1, 1}, {view(streams, {m, n, 1, 1}, {n * kFloat, kFloat, n * m * kFloat, n * m * kFloat}, 0)});
        const int factors = rows_of(product(p + "altup_predict_coef", routed(rows_of(streams, n, 1, n, 0))), m, m, m, 0);
        const int predictions = plus(p + "predictions", reshaped(node(Op::MUL_MAT, p + "predictions", {n, m, 1, 1}, {turned, factors}), {n, 1, m, 1}), streams);
        const int active = rows_of(predictions, n, 1, n, 0), in = normed(active, p + "attn_norm");
        int out = mixer(p, i, in);
        out = out < 0 ? active : plus(p + "attention + residual", normed(out, p + "post_attention_norm"), active);
        const int shortcut = plus(p + "laurel", normed(product(p + "laurel_r", product(p + "laurel_l", in)), p + "laurel_post_norm"), in);
        out = plus(p + "attention + laurel", out, shortcut);
        if (has_feed_forward(p)) out = plus(p + "feed forward + residual", normed(feed_forward(p, i, normed(out, p + "ffn_norm")), p + "post_ffw_norm"), out);
        const int new_part = node(Op::REPEAT, p + "innovation", {n, 1, m, 1}, {node(Op::SUB, p + "innovation", {n, 1, 1, 1}, {out, active})});
        const int shares = node(Op::CONT, p + "altup_correct_coef", {1, 1, m, 1}, {rows_of(product(p + "altup_correct_coef", routed(out)), 1, m, 1, 0)});
        const int corrected = plus(p + "corrected", times(p + "correction", new_part, shares), predictions), first = rows_of(corrected, n, 1, n, 0);
        const int gate =
            unary(p + "inp_gate, activated", product(p + "inp_gate", times(p + "altup_correct_scale", first, weight(p + "altup_correct_scale.weight"))));
        const int of_this = normed(product(p + "proj", times(p + "per layer", gate, of_layer)), p + "post_norm");
        return joined(p + "streams", {n, 1, m, 1}, 2, first, plus(p + "others", others_of(corrected, n, m - 1), of_this));
    }

    // ---- what has no place

    void name_unplaced() {
        std::map<std::string, std::string> of_layers;
        std::vector<std::string> order;
        for (const Stored& s : out_.weights) {
            if (by_name_.at(s.name).is_read || not_read_.count(s.name)) continue;
            const size_t blk = s.name.find("blk."), dot = blk == 0 || blk == 4 ? s.name.find('.', blk + 4) : std::string::npos;
            const std::string layer = dot == std::string::npos ? "" : s.name.substr(0, dot + 1), name = s.name.substr(layer.size());
            std::string& names = of_layers[layer];
            if (names.empty()) order.push_back(layer);
            names += (names.empty() ? "" : ", ") + name;
        }
        for (const std::string& layer : order)
            out_.notes.push_back(layer + of_layers[layer] +
                                 ": no place in a token's graph is known here; layouts are guesses by name, their part of caches and reduces is not counted");
    }

    const ModelShape& model_;
    int n_ranks_;
    std::vector<double> split_;
    TokenGraph out_;
    std::map<std::string, Weight> by_name_;
    std::vector<char> ordered_;       // by id: has its place among the nodes
    std::set<std::string> not_read_;  // by hosts either
    u64 address_ = kFirstAddress;
    int positions_ = -1, mask_ = -1, wanted_ = -1, first_v_ = -1, encoded_ = -1, buckets_ = -1;
    std::string prefix_;  // of layers' names: an encoder beside a decoder has one
    bool encoder_ = false;
    std::map<int, std::array<int, 2>> caches_;  // K and V by layer
};

}  // namespace

TokenGraph token_graph(const ModelShape& model, int n_ranks, const std::vector<double>& split) { return Builder(model, n_ranks, split).build(); }

}  // namespace ggml_tp
