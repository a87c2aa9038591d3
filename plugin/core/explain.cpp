#include "explain.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <deque>
#include <map>
#include <set>

#include "config.h"
#include "plan.h"

namespace ggml_tp {
namespace {

using abi::Op;
using Shape = std::array<i64, 4>;

constexpr u64 kFirstAddress = 1 << 20;  // of activations; nothing is stored there

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

/// A host's graph of one token: attention, feed forward or experts, of what the file has of each.
class Builder {
  public:
    Builder(const ModelShape& model, int n_ranks, const std::vector<double>& split) : model_(model) {
        for (const FileTensor& t : model.tensors) {
            Stored s;
            s.name = t.name;
            s.type = t.type;
            std::copy(t.ne, t.ne + 4, s.ne);
            if (!set_strides(s.type, s.ne, s.nb, &s.bytes)) {
                notes.push_back(t.name + ": its type is not known here, the host's CPU computes with it");
                continue;
            }
            guess_layout(s, n_ranks, split);
            lay_out_planes(s, n_ranks);
            weights.push_back(std::move(s));
            by_name_[t.name] = {&weights.back(), -1};
        }
        n_ranks_ = n_ranks;
        split_ = split;
    }

    void build() {
        int stream = leaf("embeddings", kF32, {model_.n_embd, 1, 1, 1});
        for (size_t i = 0; i < model_.layers.size(); ++i) stream = layer(static_cast<int>(i), stream);
        stream = normed(stream, "output_norm.weight");
        const char* head = has("output.weight") ? "output.weight" : "token_embd.weight";
        if (has(head)) product(head, stream);
    }

    Graph graph;
    std::deque<Stored> weights, caches;  // the graph points into them
    std::vector<std::string> notes;

  private:
    struct Weight {
        Stored* stored = nullptr;
        int id = -1;  // in the graph, once it is read
    };

    bool has(const std::string& name) const { return by_name_.count(name) != 0; }

    int add(Op op, const std::string& name, int type, const Shape& ne, std::initializer_list<int> sources) {
        Tensor t;
        t.id = t.root = static_cast<int>(graph.tensors.size());
        t.name = name;
        t.op = op;
        t.type = type;
        std::copy(ne.begin(), ne.end(), t.ne);
        set_strides(type, t.ne, t.nb, &t.bytes);
        std::fill(t.src, t.src + 10, -1);
        std::copy(sources.begin(), sources.end(), t.src);
        t.address = address_;
        address_ += static_cast<u64>(t.bytes + 256) / 256 * 256;
        graph.tensors.push_back(t);
        return t.id;
    }
    int leaf(const std::string& name, int type, const Shape& ne) { return add(Op::NONE, name, type, ne, {}); }
    int node(Op op, const std::string& name, const Shape& ne, std::initializer_list<int> sources) {
        const int id = add(op, name, kF32, ne, sources);
        graph.tensors[static_cast<size_t>(id)].is_node = true;
        graph.nodes.push_back(id);
        return id;
    }
    Shape shape(int id) const {
        const Tensor& t = graph.tensors[static_cast<size_t>(id)];
        return {t.ne[0], t.ne[1], t.ne[2], t.ne[3]};
    }
    /// Of `of`'s bytes, from `offset` on; strides of axes 1 to 3.
    int view(int of, const Shape& ne, const std::array<i64, 3>& nb, i64 offset) {
        Tensor t = graph.tensors[static_cast<size_t>(of)];
        t.id = static_cast<int>(graph.tensors.size());
        t.op = Op::VIEW;
        t.is_node = false;
        std::copy(ne.begin(), ne.end(), t.ne);
        std::copy(nb.begin(), nb.end(), t.nb + 1);
        t.offset += offset;
        t.address += static_cast<u64>(offset);
        const i64 units = t.ne[0] / t.unit_elems();
        t.bytes = units * t.nb[0];
        for (int d = 1; d < 4; ++d) t.bytes += (t.ne[d] - 1) * t.nb[d];
        std::fill(t.src, t.src + 10, -1);
        t.src[0] = of;
        graph.tensors.push_back(t);
        return t.id;
    }
    int reshaped(int of, const Shape& ne) {
        i64 nb[4], bytes;
        set_strides(graph.tensors[static_cast<size_t>(of)].type, ne.data(), nb, &bytes);
        return view(of, ne, {nb[1], nb[2], nb[3]}, 0);
    }

    int stored_leaf(Stored& s) {
        const int id = leaf(s.name, s.type, {s.ne[0], s.ne[1], s.ne[2], s.ne[3]});
        graph.tensors[static_cast<size_t>(id)].stored = &s;
        return id;
    }
    int weight(const std::string& name) {
        Weight& w = by_name_.at(name);
        if (w.id < 0) w.id = stored_leaf(*w.stored);
        return w.id;
    }
    int product(const std::string& name, int x) {
        const int w = weight(name);
        const Shape a = shape(w), b = shape(x);
        return node(Op::MUL_MAT, name.substr(0, name.rfind('.')), {a[1], b[1], b[2], b[3]}, {w, x});
    }
    /// NAME.weight times x, plus NAME.bias where there is one.
    int linear(const std::string& name, int x) {
        const int y = product(name + ".weight", x);
        return has(name + ".bias") ? node(Op::ADD, name + " + bias", shape(y), {y, weight(name + ".bias")}) : y;
    }
    int normed(int x, const std::string& name) {
        if (!has(name)) return x;
        const int y = node(Op::RMS_NORM, name.substr(0, name.rfind('.')), shape(x), {x});
        return node(Op::MUL, name.substr(0, name.rfind('.')) + " weighted", shape(x), {y, weight(name)});
    }

    int layer(int i, int stream) {
        const std::string p = "blk." + std::to_string(i) + ".";
        const int in = normed(stream, p + "attn_norm.weight");
        int out = attention(p, i, in);
        if (i + 1 == static_cast<int>(model_.layers.size())) {  // from here on only tokens whose logits are wanted
            const int wanted = leaf("wanted", kF32, {1, 1, 1, 1});
            if (out >= 0) out = node(Op::GET_ROWS, graph.tensors[static_cast<size_t>(out)].name + ", wanted", shape(out), {out, wanted});
            stream = node(Op::GET_ROWS, p + "residual, wanted", shape(stream), {stream, wanted});
        }
        if (out >= 0 && has(p + "ffn_norm.weight")) out = normed(out, p + "post_attention_norm.weight");
        const char* norm = has(p + "ffn_norm.weight") ? "ffn_norm.weight" : "post_attention_norm.weight";
        const bool parallel = !has(p + norm);  // feed forward reads what attention reads
        if (out >= 0 && !parallel) stream = node(Op::ADD, p + "attention + residual", shape(stream), {out, stream});
        int forward = feed_forward(p, parallel ? in : normed(stream, p + norm));
        if (forward >= 0) forward = normed(forward, p + "post_ffw_norm.weight");
        if (forward >= 0 && out >= 0 && parallel) forward = node(Op::ADD, p + "attention + feed forward", shape(forward), {forward, out});
        return forward >= 0 ? node(Op::ADD, p + "feed forward + residual", shape(stream), {forward, stream}) : stream;
    }

    /// One of Q, K, V as [head, n, 1]: a product of its own or a part of a common one.
    int heads(const std::string& p, const char* which, int x, i64 head, i64 n, int fused, i64 fused_at) {
        const std::string name = p + "attn_" + which, norm = name + "_norm.weight";
        if (fused >= 0) return view(fused, {head, n, 1, 1}, {head * 4, head * n * 4, head * n * 4}, fused_at * 4);
        int y = linear(name, x);
        const bool of_heads = has(norm) && by_name_.at(norm).stored->ne[0] == head;
        if (!of_heads) y = normed(y, norm);  // of all heads together, where there is one
        y = reshaped(y, {head, n, 1, 1});
        return of_heads ? normed(y, norm) : y;
    }

    /// [head, n_head_kv, cells] of a cache after `values` were written to it, as attention reads it.
    int cached(const char* kind, int i, const std::string& p, int type, i64 head, const ModelShape::Layer& l, int values) {
        Stored s;
        s.name = std::string("cache_") + kind + "_l" + std::to_string(i);
        s.type = type;
        const Shape ne{head * l.n_head_kv, l.cells, 1, 1};
        std::copy(ne.begin(), ne.end(), s.ne);
        if (!set_strides(type, s.ne, s.nb, &s.bytes)) throw Error(s.name + ": rows of " + std::to_string(ne[0]) + " do not end with a block of its type");
        guess_layout(s, n_ranks_, split_);
        lay_out_planes(s, n_ranks_);
        caches.push_back(std::move(s));
        const int cache = stored_leaf(caches.back());
        const int row = reshaped(values, {ne[0], 1, 1, 1});
        const int written = view(cache, ne, {caches.back().nb[1], caches.back().nb[2], caches.back().nb[3]}, 0);
        Tensor& w = graph.tensors[static_cast<size_t>(written)];
        w.op = Op::SET_ROWS, w.name = p + "cache_" + kind, w.is_node = true;
        w.src[0] = row, w.src[1] = positions();
        graph.nodes.push_back(written);
        const WeightFormat& format = *find_weight_format(type);
        const i64 head_bytes = head / format.block_elems * format.block_bytes;
        if (head % format.block_elems) throw Error(s.name + ": heads of " + std::to_string(head) + " do not end with a block of its type");
        return view(cache, {head, l.cells, l.n_head_kv, 1}, {caches.back().nb[1], head_bytes, caches.back().nb[2]}, 0);
    }
    int positions() {
        if (positions_ < 0) positions_ = leaf("positions", kF32, {1, 1, 1, 1});
        return positions_;
    }

    int attention(const std::string& p, int i, int x) {
        const ModelShape::Layer& l = model_.layers[static_cast<size_t>(i)];
        const bool separate = has(p + "attn_q.weight") && has(p + "attn_k.weight") && has(p + "attn_v.weight"), common = has(p + "attn_qkv.weight");
        const i64 n_q = l.n_head * l.head_k, n_k = l.n_head_kv * l.head_k, n_v = l.n_head_kv * l.head_v;
        const bool fits = separate ? rows(p + "attn_q.weight") == n_q && rows(p + "attn_k.weight") == n_k && rows(p + "attn_v.weight") == n_v
                                   : common && rows(p + "attn_qkv.weight") == n_q + n_k + n_v;
        if (!fits || l.n_head <= 0 || !has(p + "attn_output.weight")) {
            notes.push_back(p + "*: its attention is of a kind that is not modelled; layouts are guesses by name, its cache and its reduces are not counted");
            return -1;
        }
        const int fused = separate ? -1 : linear(p + "attn_qkv", x);
        int q = heads(p, "q", x, l.head_k, l.n_head, fused, 0), k = heads(p, "k", x, l.head_k, l.n_head_kv, fused, n_q);
        const int v = heads(p, "v", x, l.head_v, l.n_head_kv, fused, n_q + n_k);
        q = node(Op::ROPE, p + "q", shape(q), {q, positions()});
        k = node(Op::ROPE, p + "k", shape(k), {k, positions()});
        const int keys = cached("k", i, p, model_.type_k, l.head_k, l, k), values = cached("v", i, p, model_.type_v, l.head_v, l, v);
        const i64 head_bytes = l.head_k * 4;
        const int asked = view(q, {l.head_k, 1, l.n_head, 1}, {head_bytes * l.n_head, head_bytes, head_bytes * l.n_head}, 0);
        if (mask_ < 0) mask_ = leaf("mask", kF16, {l.cells, 1, 1, 1});
        const int attended = node(Op::FLASH_ATTN_EXT, p + "attention", {l.head_v, l.n_head, 1, 1}, {asked, keys, values, mask_});
        if (has(p + "attn_sinks.weight")) graph.tensors[static_cast<size_t>(attended)].src[4] = weight(p + "attn_sinks.weight");
        return linear(p + "attn_output", reshaped(attended, {l.head_v * l.n_head, 1, 1, 1}));
    }
    i64 rows(const std::string& name) const { return by_name_.at(name).stored->ne[1]; }

    int glu(const std::string& name, int gate, int up) {
        return up < 0 ? node(Op::UNARY, name, shape(gate), {gate}) : node(Op::GLU, name, shape(gate), {gate, up});
    }
    int dense(const std::string& p, const std::string& suffix, int x) {
        const int up = linear(p + "ffn_up" + suffix, x);
        const bool gated = has(p + "ffn_gate" + suffix + ".weight");
        const bool both = !gated && shape(up)[0] == 2 * by_name_.at(p + "ffn_down" + suffix + ".weight").stored->ne[0];  // gate and up side by side
        int hidden;
        if (gated) hidden = glu(p + "ffn_glu" + suffix, linear(p + "ffn_gate" + suffix, x), up);
        else if (both) hidden = node(Op::GLU, p + "ffn_glu" + suffix, {shape(up)[0] / 2, 1, 1, 1}, {up});
        else hidden = glu(p + "ffn_act" + suffix, up, -1);
        return linear(p + "ffn_down" + suffix, hidden);
    }
    int expert_product(const std::string& name, int x, int chosen) {
        const int w = weight(name + ".weight");
        const int y = node(Op::MUL_MAT_ID, name, {shape(w)[1], model_.n_expert_used, 1, 1}, {w, x, chosen});
        return has(name + ".bias") ? node(Op::ADD_ID, name + " + bias", shape(y), {y, weight(name + ".bias"), chosen}) : y;
    }
    int experts(const std::string& p, int x) {
        const i64 used = model_.n_expert_used, n_embd = shape(x)[0];
        const int scores = linear(p + "ffn_gate_inp", x);
        const int order = node(Op::ARGSORT, p + "experts", shape(scores), {scores});
        const int chosen = view(order, {used, 1, 1, 1}, {used * 4, used * 4, used * 4}, 0);
        const int shares = node(Op::SOFT_MAX, p + "experts' weights", shape(scores), {scores});
        const int factors = view(shares, {1, used, 1, 1}, {4, used * 4, used * 4}, 0);
        const int in = reshaped(x, {n_embd, 1, 1, 1});
        int hidden;
        if (has(p + "ffn_gate_up_exps.weight")) {
            const int both = expert_product(p + "ffn_gate_up_exps", in, chosen);
            hidden = node(Op::GLU, p + "ffn_glu_exps", {shape(both)[0] / 2, used, 1, 1}, {both});
        } else {
            const int up = expert_product(p + "ffn_up_exps", in, chosen);
            const bool gated = has(p + "ffn_gate_exps.weight");
            hidden = gated ? glu(p + "ffn_glu_exps", expert_product(p + "ffn_gate_exps", in, chosen), up) : glu(p + "ffn_act_exps", up, -1);
        }
        const int down = expert_product(p + "ffn_down_exps", hidden, chosen);
        const int weighted = node(Op::MUL, p + "experts weighted", shape(down), {down, factors});
        auto slot = [&](i64 e) { return view(weighted, {n_embd, 1, 1, 1}, {n_embd * used * 4, n_embd * used * 4, n_embd * used * 4}, e * n_embd * 4); };
        int sum = slot(0);
        for (i64 e = 1; e < used; ++e) sum = node(Op::ADD, p + "sum of experts", {n_embd, 1, 1, 1}, {sum, slot(e)});
        if (!has(p + "ffn_up_shexp.weight") || !has(p + "ffn_down_shexp.weight")) return sum;
        int shared = dense(p, "_shexp", x);
        if (has(p + "ffn_gate_inp_shexp.weight")) {
            const int open = node(Op::UNARY, p + "shared expert's gate", {1, 1, 1, 1}, {product(p + "ffn_gate_inp_shexp.weight", x)});
            shared = node(Op::MUL, p + "shared expert gated", shape(shared), {shared, open});
        }
        return node(Op::ADD, p + "experts + shared expert", shape(sum), {sum, shared});
    }
    int feed_forward(const std::string& p, int x) {
        const bool with_experts = has(p + "ffn_gate_inp.weight") && has(p + "ffn_down_exps.weight") && model_.n_expert_used > 0 &&
                                  (has(p + "ffn_up_exps.weight") || has(p + "ffn_gate_up_exps.weight"));
        if (with_experts) return experts(p, x);
        if (has(p + "ffn_up.weight") && has(p + "ffn_down.weight")) return dense(p, "", x);
        notes.push_back(p + "*: no feed forward that is modelled here; layouts are guesses by name, its reduces are not counted");
        return -1;
    }

    const ModelShape& model_;
    int n_ranks_ = 1;
    std::vector<double> split_;
    std::map<std::string, Weight> by_name_;
    u64 address_ = kFirstAddress;
    int positions_ = -1, mask_ = -1;
};

const char* role_name(Role role) {
    switch (role) {
        case Role::kReplicated: return "replicated";
        case Role::kWhole: return "whole";
        case Role::kColumn: return "column";
        case Role::kSegments: return "segments";
        case Role::kMixer: return "mixer";
        case Role::kRow: return "row";
        case Role::kKvCache: return "cache";
        case Role::kState: return "state";
    }
    return "";
}

const char* reason_of(const Stored& s, int n_ranks) {
    if (n_ranks == 1) return "there is one rank";
    if (s.is_sharded()) {
        if (s.confirmed) return "whole heads, as the graph wants it";
        switch (s.role) {
            case Role::kRow: return "inputs divided: products are summands";
            case Role::kKvCache: return "each rank keeps its own heads";
            case Role::kSegments: return "outputs side by side, each divided";
            default: return "outputs divided";
        }
    }
    if (s.confirmed) return "the graph reads it in ways that no division serves";
    switch (s.role) {
        case Role::kWhole: return "it chooses experts: every rank needs all of it";
        case Role::kReplicated: return s.ne[1] == 1 && s.ne[2] == 1 ? "a vector for whole rows" : "no rule for its name";
        default: return "its shape gives nothing to divide";
    }
}

std::string quoted(const std::string& text) {
    std::string out = "\"";
    for (char c : text) {
        if (c == '"' || c == '\\') out += '\\', out += c;
        else if (static_cast<unsigned char>(c) < 0x20) {
            char code[8];
            std::snprintf(code, sizeof code, "\\u%04x", static_cast<unsigned char>(c));
            out += code;
        } else out += c;
    }
    return out + "\"";
}

std::string stored_json(const Stored& s, int n_ranks, bool planned) {
    const WeightFormat* format = find_weight_format(s.type);
    const std::string text = s.to_text(n_ranks);
    std::string out = "{\"name\":" + quoted(s.name) + ",\"type\":" + quoted(format ? format->name : "?") + ",\"role\":" + quoted(role_name(s.role));
    out += ",\"layout\":" + quoted(text.substr(0, text.find("; bytes"))) + ",\"global_bytes\":" + std::to_string(s.bytes) + ",\"bytes\":[";
    for (int r = 0; r < n_ranks; ++r) out += (r ? "," : "") + std::to_string(s.local_bytes(r));
    return out + "],\"reason\":" + quoted(reason_of(s, n_ranks)) + ",\"planned\":" + (planned ? "true" : "false") + "}";
}

std::string planned_json(const ModelShape& model, int n_ranks, const std::vector<double>& split) {
    if (n_ranks < 1 || n_ranks > kMaxRanks) throw Error("1 to " + std::to_string(kMaxRanks) + " ranks");
    Builder builder(model, n_ranks, split);
    builder.build();
    const Plan plan = settle(builder.graph, n_ranks, split, [&](Stored& tensor, const Sharding& sharding, const std::optional<Extent>& extent) {
        tensor.sharding = sharding;
        tensor.extent = extent;
        lay_out_planes(tensor, n_ranks);
    });
    verify(plan, builder.graph);
    std::set<const Stored*> read;
    for (const Tensor& t : builder.graph.tensors)
        if (t.stored) read.insert(t.stored);
    auto list = [](const auto& items, auto&& text) {
        std::string out = "[";
        for (const auto& item : items) {
            const std::string one = text(item);
            if (!one.empty()) out += (out.size() > 1 ? ",\n" : "") + one;
        }
        return out + "]";
    };
    std::string out = "{\"tensors\":" + list(builder.weights, [&](const Stored& s) { return stored_json(s, n_ranks, read.count(&s) != 0); });
    out += ",\n\"caches\":" + list(builder.caches, [&](const Stored& s) { return stored_json(s, n_ranks, true); });
    out += ",\n\"reshards\":" + list(plan.steps, [&](const PlanStep& step) {
               if (step.kind == PlanStep::kCompute) return std::string();
               const Tensor& t = builder.graph.tensors[static_cast<size_t>(step.tensor)];
               const char* kind = step.kind == PlanStep::kAllReduce ? "all_reduce" : "all_gather";
               return "{\"kind\":" + quoted(kind) + ",\"tensor\":" + quoted(t.name) + ",\"bytes\":" + std::to_string(t.bytes) +
                      ",\"reason\":" + quoted(step.reason) + "}";
           });
    return out + ",\n\"notes\":" + list(builder.notes, quoted) + "}\n";
}

}  // namespace

std::string explain(const ModelShape& model, int n_ranks, const std::vector<double>& split) {
    try {
        return planned_json(model, n_ranks, split);
    } catch (const Error& error) {
        return "{\"error\":" + quoted(error.what()) + "}\n";
    }
}

}  // namespace ggml_tp
