// The inspection C API (inspect.h) over the groups of this process: in the order of their hosts' addresses, then of their devices.
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>

#include "explain.h"
#include "state.h"

#pragma GCC visibility push(default)
extern "C" {
#include "inspect.h"
}
#pragma GCC visibility pop

using namespace ggml_tp;

namespace {

HostDevice* host_device(int group) {
    Process& p = process();
    std::lock_guard lock(p.mutex);
    for (auto& [base, state] : p.hosts)
        for (auto& device : state->devices)
            if (group-- == 0) return device.get();
    return nullptr;
}

size_t copy_out(const std::string& text, char* out, size_t capacity) {
    if (out && capacity) {
        const size_t n = text.size() < capacity - 1 ? text.size() : capacity - 1;
        std::memcpy(out, text.data(), n);
        out[n] = 0;
    }
    return text.size();
}

}  // namespace

int ggml_tp_group_count(void) {
    Process& p = process();
    std::lock_guard lock(p.mutex);
    size_t n = 0;
    for (auto& [base, state] : p.hosts) n += state->devices.size();
    return static_cast<int>(n);
}

int ggml_tp_rank_count(int group) {
    HostDevice* device = host_device(group);
    return device ? device->group->n_ranks() : -1;
}

int ggml_tp_get_counters(int group, struct ggml_tp_counters* out) {
    HostDevice* device = host_device(group);
    if (!device || !out) return -1;
    std::lock_guard lock(device->group->mutex);
    const Counters& c = device->group->counters;
    *out = {c.graphs_computed,  c.programs_built,       c.graph_launches_per_rank,   c.weights_resharded, c.last_all_reduces,
            c.last_all_gathers, c.last_kernel_launches, device->group->n_programs(), c.host_all_reduces,  c.graphs_unread};
    return 0;
}

size_t ggml_tp_text(int group, int what, char* out, size_t capacity) {
    HostDevice* device = host_device(group);
    if (!device) return 0;
    std::lock_guard lock(device->group->mutex);
    std::string text;
    switch (what) {
        case GGML_TP_TEXT_CONFIG: text = device->group->config.to_text(); break;
        case GGML_TP_TEXT_LAYOUT: text = device->host->layout.to_text(); break;
        case GGML_TP_TEXT_PLAN: text = device->group->last_plan; break;
        case GGML_TP_TEXT_PROGRAM: text = device->group->last_program; break;
        case GGML_TP_TEXT_DEVICES: text = device->group->devices_text(); break;
        case GGML_TP_TEXT_STAGES: text = device->group->stage_times(); break;
        default: break;
    }
    return copy_out(text, out, capacity);
}

int ggml_tp_rank_bytes(int group, int rank, uint64_t* weight_bytes, uint64_t* kv_bytes, uint64_t* compute_bytes) {
    HostDevice* device = host_device(group);
    if (!device || rank < 0 || rank >= device->group->n_ranks()) return -1;
    std::lock_guard lock(device->group->mutex);
    if (weight_bytes) *weight_bytes = device->group->memory->weight_bytes(rank);
    if (kv_bytes) *kv_bytes = device->group->memory->kv_bytes(rank);
    if (compute_bytes) *compute_bytes = device->group->memory->compute_bytes(rank);
    return 0;
}

int ggml_tp_measure(int group, int rank, uint64_t bytes, int rounds, double* read_rate, double* copy_rate) {
    HostDevice* device = host_device(group);
    if (!device || rank < 0 || rank >= device->group->n_ranks() || !read_rate || !copy_rate) return -1;
    std::lock_guard lock(device->group->mutex);
    try {
        const Rates rates = device->group->measure(rank, bytes, rounds);
        *read_rate = rates.read, *copy_rate = rates.copy;
        return 0;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "ggml-tp: %s\n", error.what());
        return -1;
    }
}

int ggml_tp_time_all_reduce(int group, uint64_t bytes, int how, int rounds, double* seconds) {
    HostDevice* device = host_device(group);
    if (!device || !seconds || bytes < 4 || rounds < 1 || rounds > 10000) return -1;
    std::lock_guard lock(device->group->mutex);
    try {
        if (!device->group->can_reduce(static_cast<Reduce>(how), bytes)) return -2;
        *seconds = device->group->time_all_reduce(bytes, static_cast<Reduce>(how), rounds);
        return 0;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "ggml-tp: %s\n", error.what());
        return -1;
    }
}

int ggml_tp_delay(int group, int rank, double seconds) {
    HostDevice* device = host_device(group);
    if (!device || rank < 0 || rank >= device->group->n_ranks() || !(seconds >= 0) || seconds > 600) return -1;
    std::lock_guard lock(device->group->mutex);
    device->group->delay(rank, seconds);
    return 0;
}

size_t ggml_tp_explain(const struct ggml_tp_model* model, int n_ranks, const double* split, char* out, size_t capacity) {
    ModelShape shape{{}, {}, model->n_embd, model->n_expert_used, model->type_k, model->type_v};
    shape.layer_norm = model->traits & GGML_TP_LAYER_NORM;
    shape.parallel = model->traits & GGML_TP_PARALLEL;
    shape.residual_first = model->traits & GGML_TP_RESIDUAL_FIRST;
    shape.encoder = model->traits & GGML_TP_ENCODER;
    shape.unfused = model->traits & GGML_TP_UNFUSED;
    for (size_t i = 0; i < model->n_tensors; ++i) {
        const ggml_tp_file_tensor& t = model->tensors[i];
        shape.tensors.push_back({t.name, t.type, {t.ne[0], t.ne[1], t.ne[2], t.ne[3]}});
    }
    for (size_t i = 0; i < model->n_layers; ++i) {
        const ggml_tp_layer& l = model->layers[i];
        shape.layers.push_back({l.n_head, l.n_head_kv, l.head_k, l.head_v, l.cells, l.cache_of, l.sparse_gate != 0});
    }
    return copy_out(explain(shape, n_ranks, split ? std::vector<double>(split, split + n_ranks) : std::vector<double>{}), out, capacity);
}

const char* ggml_tp_version(void) { return "0.1.0"; }
