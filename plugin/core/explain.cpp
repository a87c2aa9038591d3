#include "explain.h"

#include <cstdio>
#include <set>

#include "config.h"
#include "fuse.h"
#include "plan.h"

namespace ggml_tp {
namespace {

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
        case Role::kWhole: return "every rank needs all that comes of it";
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
    TokenGraph token = token_graph(model, n_ranks, split);
    Plan plan;
    std::set<const Stored*> read;
    for (const Graph* graph : {&token.of_prompt, &token.graph}) {
        plan = settle(*graph, n_ranks, split, [&](Stored& tensor, const Sharding& sharding, const std::optional<Extent>& extent) {
            tensor.sharding = sharding;
            tensor.extent = extent;
            lay_out_planes(tensor, n_ranks);
        });
        schedule(plan, *graph);
        verify(plan, *graph);
        for (const Tensor& t : graph->tensors)
            if (t.stored) read.insert(t.stored);
    }
    auto list = [](const auto& items, auto&& text) {
        std::string out = "[";
        for (const auto& item : items) {
            const std::string one = text(item);
            if (!one.empty()) out += (out.size() > 1 ? ",\n" : "") + one;
        }
        return out + "]";
    };
    std::string out = "{\"tensors\":" + list(token.weights, [&](const Stored& s) { return stored_json(s, n_ranks, read.count(&s) != 0); });
    out += ",\n\"caches\":" + list(token.caches, [&](const Stored& s) { return stored_json(s, n_ranks, true); });
    out += ",\n\"reshards\":" + list(plan.steps, [&](const PlanStep& step) {
               if (step.kind == PlanStep::kCompute) return std::string();
               return "{\"kind\":" + quoted(step.kind == PlanStep::kAllGather ? "all_gather" : "all_reduce") +
                      ",\"tensor\":" + quoted(step.names(token.graph)) + ",\"bytes\":" + std::to_string(step.bytes(token.graph)) +
                      ",\"reason\":" + quoted(step.reason) + "}";
           });
    return out + ",\n\"notes\":" + list(token.notes, quoted) + "}\n";
}

}  // namespace

std::string explain(const ModelShape& model, int n_ranks, const std::vector<double>& split) {
    try {
        return planned_json(model, n_ranks, split);
    } catch (const std::exception& error) {  // callers are C
        return "{\"error\":" + quoted(error.what()) + "}\n";
    }
}

}  // namespace ggml_tp
