// The ggml boundary: fills the tables that a host calls, in the host's own layout, and is the only place that turns an Error into a
// failed status and one line on stderr. Source of the tables: ggml-backend-impl.h, 2024-12 to 2026-10 (docs/decisions.md).
#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "abi/host.h"
#include "abi/tensor.h"
#include "boundary.h"
#include "comm.h"
#include "group.h"
#include "pinned.h"
#include "state.h"

namespace ggml_tp {
namespace {

constexpr int kStatusFailed = -1, kStatusAllocFailed = -2, kStatusSuccess = 0;
constexpr int kDeviceGpu = 1, kUsageCompute = 2;

HostDevice& device_of(void* device) { return *static_cast<HostDevice*>(static_cast<void**>(device)[16]); }

struct HostBuffer {
    HostDevice* device;
    std::unique_ptr<Buffer> buffer;
};

void buffer_clear(void* buffer, uint8_t value);

HostBuffer& context_of_buffer(void* buffer) { return *static_cast<HostBuffer*>(context_of_host_buffer(buffer, word(buffer_clear))); }

Buffer* our_buffer(void* context, void* host_buffer) {
    auto* device = static_cast<HostDevice*>(context);
    void** words = static_cast<void**>(host_buffer);
    const int functions = device->host->layout.buffer_functions;
    if (words[functions] != device->buffer_type()) return nullptr;
    return static_cast<HostBuffer*>(words[functions + 1])->buffer.get();
}

/// Of weights that the host has mapped from its file: ggml_backend_cpu_buffer_from_ptr's. Nothing else lies there, and nobody writes to it.
bool is_mapped(void* type) { return std::strcmp(reinterpret_cast<const char* (*)(void*)>(static_cast<void**>(type)[0])(type), "CPU_Mapped") == 0; }

/// Rows of a table that the host keeps (token_embd), which are sent as they lie in the file: the host's CPU makes floats of them with one thread, 8 ms for 512
/// rows of 8,192. Not where the first layer is the CPU's, and only by numbers that the host itself has written.
bool is_row_of_host(const HostDevice& device, const abi::TensorRef& t) {
    const abi::Host& host = *device.host;
    if (host.op_of(t) != abi::Op::GET_ROWS || !device.group->memory->has_first_layer()) return false;
    const abi::TensorRef table(host, t.src(0)), ids(host, t.src(1));
    for (int d = 1; d < 4; ++d)
        if (ids.ne(d) != 1 || (d > 1 && table.ne(d) != 1)) return false;
    return host.op_of(ids) == abi::Op::NONE && !ids.view_src() && !table.view_src() && ids.type() == kI32 && t.type() == kF32;
}
/// Whether it reads memory of the host other than such rows. Hosts ask that of pinned memory too: weights there are the CPU's, which has better types for
/// them (its repacked ones), as this device does not borrow weights for a batch.
bool reads_host(const HostDevice& device, const void* operation) {
    const abi::TensorRef t(*device.host, operation);
    for (int i = 0; i < 10; ++i) {
        if (!t.src(i)) continue;
        const abi::TensorRef source(*device.host, t.src(i));
        void** buffer = static_cast<void**>(source.buffer() || !source.view_src() ? source.buffer() : abi::TensorRef(*device.host, source.view_src()).buffer());
        void* type = buffer ? buffer[device.host->layout.buffer_functions] : nullptr;
        if (type && (type == device.pinned_type() || (is_mapped(type) && (i > 0 || !is_row_of_host(device, t))))) return true;
    }
    return false;
}

// ---- buffers
/// Waits for graphs that still run, before their results are read or their memory is written to at once.
void finish(HostDevice& device) {
    try {
        device.group->finish();
    } catch (...) {
        *device.failed_late = true;
        throw;
    }
}
void buffer_free(void* buffer) {
    guarded_void([&] {
        HostBuffer& b = context_of_buffer(buffer);
        std::lock_guard lock(b.device->group->mutex);
        guarded_void([&] { finish(*b.device); });
        b.device->group->release(*b.buffer);
        delete &b;
    });
}
void* buffer_base(void* buffer) {
    return guarded([&] { return reinterpret_cast<void*>(context_of_buffer(buffer).buffer->base); }, nullptr);
}
int buffer_init_tensor(void* buffer, void* tensor) {
    return guarded(
        [&] {
            HostBuffer& b = context_of_buffer(buffer);
            const abi::TensorRef t(*b.device->host, tensor);
            std::lock_guard lock(b.device->group->mutex);
            if (b.device->host->buffer_usage(buffer) == kUsageCompute) {
                b.device->group->memory->make_compute(*b.buffer);
                return kStatusSuccess;
            }
            if (t.view_src() || b.buffer->is_compute) return kStatusSuccess;
            Stored stored;
            stored.name = t.name();
            stored.type = t.type();
            for (int d = 0; d < 4; ++d) stored.ne[d] = t.ne(d), stored.nb[d] = static_cast<i64>(t.nb(d));
            stored.bytes = static_cast<i64>(b.device->host->nbytes(tensor));
            stored.offset = static_cast<i64>(reinterpret_cast<u64>(t.data()) - b.buffer->base);
            if (stored.bytes == 0) return kStatusSuccess;
            if (stored.offset < 0 || stored.offset + stored.bytes > b.buffer->size) throw Error(stored.name + " lies outside its buffer");
            b.device->group->memory->announce(*b.buffer, std::move(stored));
            return kStatusSuccess;
        },
        kStatusAllocFailed);
}
i64 offset_in(const HostBuffer& b, const void* tensor, size_t offset) {
    return static_cast<i64>(reinterpret_cast<u64>(abi::TensorRef(*b.device->host, tensor).data()) - b.buffer->base + offset);
}
void buffer_memset_tensor(void* buffer, void* tensor, uint8_t value, size_t offset, size_t size) {
    guarded_void([&] {
        HostBuffer& b = context_of_buffer(buffer);
        std::lock_guard lock(b.device->group->mutex);
        finish(*b.device);
        b.device->group->memory->fill(*b.buffer, offset_in(b, tensor, offset), value, static_cast<i64>(size));
    });
}
void buffer_set_tensor(void* buffer, void* tensor, const void* data, size_t offset, size_t size) {
    guarded_void([&] {
        HostBuffer& b = context_of_buffer(buffer);
        std::lock_guard lock(b.device->group->mutex);
        if (!b.buffer->is_compute) finish(*b.device);  // inputs follow their graph on the stream
        b.device->group->memory->write(*b.buffer, offset_in(b, tensor, offset), data, static_cast<i64>(size));
    });
}
void buffer_get_tensor(void* buffer, const void* tensor, void* data, size_t offset, size_t size) {
    guarded_void([&] {
        HostBuffer& b = context_of_buffer(buffer);
        std::lock_guard lock(b.device->group->mutex);
        finish(*b.device);
        b.device->group->memory->read(*b.buffer, offset_in(b, tensor, offset), data, static_cast<i64>(size));
    });
}
bool buffer_copy_tensor(void*, const void*, void*) { return false; }  // the host copies through its own memory
void buffer_clear(void* buffer, uint8_t value) {
    guarded_void([&] {
        HostBuffer& b = context_of_buffer(buffer);
        std::lock_guard lock(b.device->group->mutex);
        finish(*b.device);
        b.device->group->memory->fill(*b.buffer, 0, value, b.buffer->size);
    });
}

// ---- buffer type
HostDevice& device_of_type(void* type) { return *static_cast<HostDevice*>(static_cast<void**>(type)[-1]); }
const char* type_name(void* type) { return device_of_type(type).name.c_str(); }
void* type_alloc(void* type, size_t size) {
    return guarded(
        [&]() -> void* {
            HostDevice& device = device_of_type(type);
            auto context = std::make_unique<HostBuffer>();
            context->device = &device;
            {
                std::lock_guard lock(device.group->mutex);
                context->buffer = device.group->memory->reserve(static_cast<i64>(size));
            }
            const BufferTable table{word(buffer_free),       word(buffer_base),       word(buffer_init_tensor), word(buffer_memset_tensor),
                                    word(buffer_set_tensor), word(buffer_get_tensor), word(buffer_copy_tensor), word(buffer_clear)};
            return make_host_buffer(*device.host, type, table, context.release(), size);
        },
        nullptr);
}
size_t type_alignment(void*) { return kHostAlignment; }
size_t type_max_size(void*) { return ~size_t{0} >> 1; }
bool type_is_host(void*) { return false; }

// ---- device
const char* device_name(void* device) { return device_of(device).name.c_str(); }
const char* device_description(void* device) { return device_of(device).description.c_str(); }
void device_memory(void* device, size_t* free_bytes, size_t* total_bytes) {
    *free_bytes = *total_bytes = 0;
    guarded_void([&] {
        Group& group = *device_of(device).group;
        std::lock_guard lock(group.mutex);
        group.memory->report(free_bytes, total_bytes);
    });
}
int device_type(void*) { return kDeviceGpu; }
void device_props(void* device, char* props) {
    const abi::Layout& layout = device_of(device).host->layout;
    const char *name = device_name(device), *description = device_description(device);
    size_t free_bytes, total_bytes;
    device_memory(device, &free_bytes, &total_bytes);
    const int type = kDeviceGpu;
    std::memcpy(props, &name, 8);
    std::memcpy(props + 8, &description, 8);
    std::memcpy(props + 16, &free_bytes, 8);
    std::memcpy(props + 24, &total_bytes, 8);
    std::memcpy(props + 32, &type, 4);
    // caps: async, host_buffer, buffer_from_host_ptr, events, and mmap_support where the host knows it (else padding).
    char* caps = props + layout.caps_offset();
    std::memset(caps, 0, 4);
    caps[1] = 1;
    if (layout.props_bytes == 56) caps[4] = 1;
}
void* device_init_backend(void* device, const char*);
void* device_buffer_type(void* device) { return device_of(device).buffer_type(); }
void* device_pinned_type(void* device) { return device_of(device).pinned_type(); }
bool device_supports_op(void* device, const void* operation) {
    return guarded(
        [&] {
            HostDevice& d = device_of(device);
            if (reads_host(d, operation)) return false;
            return d.group->supports(*d.host, operation);
        },
        false);
}
bool device_supports_type(void* device, void* type) { return type == device_of(device).buffer_type() || is_mapped(type); }
bool device_offload_op(void*, const void*) { return false; }

// ---- backend: {guid, table, device, context}
struct HostBackend {
    void* words[24];
    HostDevice* device;
};
HostBackend& backend_of(void* backend) { return *static_cast<HostBackend*>(backend); }
const char* backend_name(void* backend) { return backend_of(backend).device->name.c_str(); }
void backend_free(void* backend) { delete &backend_of(backend); }
/// Transfers return when they are done, and so does graph_compute unless the host overlaps its devices.
void backend_synchronize(void* backend) {
    guarded_void([&] {
        HostDevice& device = *backend_of(backend).device;
        std::lock_guard lock(device.group->mutex);
        finish(device);
    });
}
int backend_graph_compute(void* backend, void* graph) {
    return guarded(
        [&] {
            HostDevice& device = *backend_of(backend).device;
            std::lock_guard lock(device.group->mutex);
            if (device.failed_late->exchange(false)) return kStatusFailed;
            device.group->compute(*device.host, graph, our_buffer, &device);
            return kStatusSuccess;
        },
        kStatusFailed);
}
void backend_graph_optimize(void* backend, void* graph) {
    guarded_void([&] { order_products(*backend_of(backend).device->host, graph); });
}
unsigned char kGuid[16] = {'g', 'g', 'm', 'l', '-', 't', 'p', 0x5d, 0x91, 0x0e, 0x77, 0x42, 0xa8, 0x3c, 0x6b, 0x01};

void* device_init_backend(void* device, const char*) {
    return guarded(
        [&]() -> void* {
            HostDevice& d = device_of(device);
            auto* backend = new HostBackend{};
            const int functions = d.host->layout.backend_functions;
            int i = 0;
            void** w = backend->words;
            w[i++] = kGuid;
            w[i++] = word(backend_name);
            w[i++] = word(backend_free);
            i += functions == 16 ? 5 : 3;  // set/get_tensor_async, their 2d forms, cpy_tensor_async: none
            w[i++] = word(backend_synchronize);
            i += 4;  // graph plans: none
            w[i++] = word(backend_graph_compute);
            if (functions >= 14) w[functions] = word(backend_graph_optimize);  // the last one, since 2025-09
            w[functions + 1] = device;
            backend->device = &d;
            return backend;
        },
        nullptr);
}

// ---- all_reduce for hosts that divide models by themselves: signatures of ggml-backend.h's ggml_backend_comm_*_t
struct HostComm {
    std::vector<HostDevice*> devices;
    std::unique_ptr<Comm> comm;
};
void* comm_init(void** backends, size_t n) {
    return guarded(
        [&]() -> void* {
            auto out = std::make_unique<HostComm>();
            std::vector<Group*> groups;
            for (size_t i = 0; i < n; ++i) {
                if (*static_cast<void**>(backends[i]) != kGuid) return nullptr;  // another plugin's backend: the host reduces by itself
                HostDevice* device = backend_of(backends[i]).device;
                if (device->group->n_ranks() != 1 || std::find(groups.begin(), groups.end(), device->group.get()) != groups.end()) return nullptr;
                out->devices.push_back(device);
                groups.push_back(device->group.get());
            }
            if (n < 2) return nullptr;
            out->comm = std::make_unique<Comm>(groups);
            if (!out->comm->notes().empty() && groups[0]->config.log_level > 0) log_line(out->comm->notes());
            return out.release();
        },
        nullptr);
}
void comm_free(void* comm) { delete static_cast<HostComm*>(comm); }
bool comm_all_reduce(void* comm, void** tensors) {
    return guarded(
        [&] {
            HostComm& c = *static_cast<HostComm*>(comm);
            std::vector<Comm::Summand> summands;
            i64 elems = 0;
            for (size_t r = 0; r < c.devices.size(); ++r) {
                const abi::Host& host = *c.devices[r]->host;
                const abi::TensorRef t(host, tensors[r]);
                const i64 here = t.ne(0) * t.ne(1) * t.ne(2) * t.ne(3);
                void* host_buffer = t.buffer() || !t.view_src() ? t.buffer() : abi::TensorRef(host, t.view_src()).buffer();
                if (t.type() != kF32 || !host_buffer || (r && here != elems) || static_cast<i64>(host.nbytes(tensors[r])) != here * 4) return false;
                elems = here;
                Buffer* buffer = our_buffer(c.devices[r], host_buffer);
                summands.push_back({buffer, buffer ? static_cast<i64>(reinterpret_cast<u64>(t.data()) - buffer->base) : 0, !host.is_computed(t)});
            }
            return c.comm->all_reduce(summands, elems);
        },
        false);
}

// ---- registration
HostState& state_of(void* registration) { return *static_cast<HostState*>(static_cast<void**>(registration)[5]); }
const char* registration_name(void*) { return "TP"; }
size_t registration_devices(void* registration) { return state_of(registration).devices.size(); }
void* registration_device(void* registration, size_t i) {
    const auto& devices = state_of(registration).devices;
    return i < devices.size() ? devices[i]->words : nullptr;
}
void* registration_proc(void*, const char* name) {
    const std::pair<const char*, void*> known[] = {{"ggml_backend_comm_init", word(comm_init)},
                                                   {"ggml_backend_comm_free", word(comm_free)},
                                                   {"ggml_backend_comm_allreduce_tensor", word(comm_all_reduce)}};
    for (const auto& [of, function] : known)
        if (std::strcmp(name, of) == 0) return function;
    return nullptr;
}

void fill_registration(HostState& s) {
    void** r = s.registration;
    const int api = s.host->layout.api_version;
    std::memcpy(&r[0], &api, sizeof api);
    r[1] = word(registration_name), r[2] = word(registration_devices), r[3] = word(registration_device), r[4] = word(registration_proc), r[5] = &s;
}

void fill_device(HostDevice& d, HostState& s) {
    int i = 0;
    for (void* f : {word(device_name), word(device_description), word(device_memory), word(device_type), word(device_props), word(device_init_backend),
                    word(device_buffer_type), word(device_pinned_type), static_cast<void*>(nullptr), word(device_supports_op), word(device_supports_type),
                    word(device_offload_op)})
        d.words[i++] = f;
    d.words[15] = s.registration;
    d.words[16] = &d;
    d.buffer_type_words[0] = &d;
    const BufferTypeTable table{word(type_name), word(type_alloc), word(type_alignment), word(type_max_size), word(type_is_host)};
    fill_buffer_type(*d.host, table, d.words, d.buffer_type_words + 1);
    fill_pinned_type(d);
}

std::string directory_of_plugin() {
    Dl_info info{};
    dladdr(reinterpret_cast<void*>(&directory_of_plugin), &info);
    const std::string path = info.dli_fname ? info.dli_fname : "";
    return path.substr(0, path.rfind('/') == std::string::npos ? 0 : path.rfind('/'));
}

}  // namespace

Process& process() {
    static Process* p = new Process;  // never destroyed: hosts call us until the very end
    return *p;
}

}  // namespace ggml_tp

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void* ggml_backend_init() {
    using namespace ggml_tp;
    static int impossible[12] = {-7777};
    if (abi::Host::probing()) return impossible;
    void* caller = __builtin_return_address(0);
    return guarded(
        [&]() -> void* {
            Process& p = process();
            std::lock_guard lock(p.mutex);
            void* base = abi::Host::base_of(caller);
            if (auto found = p.hosts.find(base); found != p.hosts.end()) return found->second->registration;
            std::string error;
            auto state = std::make_unique<HostState>();
            state->host = abi::Host::attach(caller, &error);
            if (!state->host) throw Error(error);
            const Config config = read_config();
            const std::string directory = directory_of_plugin();
            for (const Config& of_group : configs_of_groups(config, config.groups.empty() && !config.separate ? 0 : count_devices(config, directory))) {
                auto device = std::make_unique<HostDevice>();
                device->host = state->host.get();
                device->failed_late = &state->failed_late;
                device->name = "TP" + std::to_string(state->devices.size());
                device->pinned_name = device->name + "_Host";
                device->group = std::make_unique<Group>(of_group, directory);
                device->description = device->group->description();
                fill_device(*device, *state);
                state->devices.push_back(std::move(device));
            }
            fill_registration(*state);
            std::string said;
            for (const auto& device : state->devices) said += (said.empty() ? "" : "; ") + device->name + " = " + device->description;
            if (config.emulated_cc) log_line("EMULATED GPUs (GGML_TP_EMULATE): for demos and tests, slow; " + said);
            else if (config.log_level > 0) log_line(said);
            for (const auto& device : state->devices)
                if (!device->group->notes().empty() && config.log_level > 0) log_line(device->name + ": " + device->group->notes());
            HostState* raw = state.get();
            p.hosts[base] = std::move(state);
            return raw->registration;
        },
        nullptr);
}

EXPORT int ggml_backend_score() { return 100; }
