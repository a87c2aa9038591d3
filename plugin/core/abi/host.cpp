#include "host.h"

#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "tensor.h"

namespace ggml_tp::abi {
namespace {

constexpr uintptr_t kFake = 0x10000;  // words of a fake object are kFake + their index: a getter's answer tells the offset
constexpr int kUnaryOpParam = 0, kGluOpParam = 0;
constexpr int kComputeFlag = 16;
constexpr int kNewestApi = 3;  // GGML_BACKEND_API_VERSION of 2026-10

thread_local bool probing_now = false;  // the host calls back on the thread that probes
thread_local std::string captured_log;

void capture_log(int, const char* text, void*) { captured_log += text; }
void nothing() {}

}  // namespace

bool Host::probing() { return probing_now; }

void* Host::base_of(void* address) {
    Dl_info info{};
    return dladdr(address, &info) ? info.dli_fbase : nullptr;
}

void* Host::symbol(const char* name) const { return handle_ ? dlsym(handle_, name) : nullptr; }

std::unique_ptr<Host> Host::attach(void* return_address, std::string* error) {
    Dl_info info{};
    std::unique_ptr<Host> host(new Host);
    if (return_address && dladdr(return_address, &info) && info.dli_fname) {
        host->path = info.dli_fname;
        host->handle_ = dlopen(info.dli_fname, RTLD_NOLOAD | RTLD_LAZY);
    }
    if (!host->symbol("ggml_backend_buffer_init")) host->handle_ = dlopen(nullptr, RTLD_LAZY);
    if (!host->symbol("ggml_backend_buffer_init")) {
        *error = "the host (" + host->path + ") exports no ggml functions: it was linked statically without -rdynamic and cannot load plugins of this kind";
        return nullptr;
    }
    if (!host->probe(error)) return nullptr;
    return host;
}

bool Host::probe(std::string* error) {
    auto need = [&](const char* name) {
        void* p = symbol(name);
        if (!p && error->empty()) *error = "the host (" + path + ") lacks " + name + ": its ggml is older than 2024-12 or was stripped";
        return p;
    };
    using Getter = uintptr_t (*)(const void*);
    auto backend_device = reinterpret_cast<Getter>(need("ggml_backend_get_device"));
    auto buffer_type = reinterpret_cast<Getter>(need("ggml_backend_buffer_get_type"));
    auto type_device = reinterpret_cast<Getter>(need("ggml_backend_buft_get_device"));
    auto device_props = reinterpret_cast<void (*)(void*, void*)>(need("ggml_backend_dev_get_props"));
    auto graph_nodes = reinterpret_cast<Getter>(need("ggml_graph_nodes"));
    auto graph_n_nodes = reinterpret_cast<int (*)(const void*)>(need("ggml_graph_n_nodes"));
    auto get_data = reinterpret_cast<Getter>(need("ggml_get_data"));
    auto get_name = reinterpret_cast<const char* (*)(const void*)>(need("ggml_get_name"));
    op_name_ = reinterpret_cast<const char* (*)(int)>(need("ggml_op_name"));
    unary_name_ = reinterpret_cast<const char* (*)(int)>(need("ggml_unary_op_name"));
    glu_name_ = reinterpret_cast<const char* (*)(int)>(symbol("ggml_glu_op_name"));  // since 2025-07
    nbytes = reinterpret_cast<size_t (*)(const void*)>(need("ggml_nbytes"));
    buffer_usage = reinterpret_cast<int (*)(void*)>(need("ggml_backend_buffer_get_usage"));
    buffer_init = need("ggml_backend_buffer_init");
    if (!error->empty()) return false;

    uintptr_t words[96];
    for (size_t i = 0; i < 96; ++i) words[i] = kFake + i;
    layout.backend_functions = static_cast<int>(backend_device(words) - kFake) - 1;  // after the guid
    layout.buffer_functions = static_cast<int>(buffer_type(words) - kFake);
    layout.buffer_type_functions = static_cast<int>(type_device(words) - kFake);
    layout.graph_nodes = static_cast<int>(graph_nodes(words) - kFake) * 8;
    layout.tensor_data = static_cast<int>(get_data(words) - kFake) * 8;
    layout.tensor_name = static_cast<int>(get_name(words) - reinterpret_cast<const char*>(words));
    int32_t ints[192];
    for (int i = 0; i < 192; ++i) ints[i] = 5000 + i;
    layout.graph_n_nodes = (graph_n_nodes(ints) - 5000) * 4;
    // The host clears as many bytes of the properties as it knows.
    unsigned char props[256];
    std::memset(props, 0xAA, sizeof props);
    void* device[32];
    for (void*& word : device) word = reinterpret_cast<void*>(&nothing);
    device_props(device, props);
    layout.props_bytes = sizeof props;
    while (layout.props_bytes > 0 && props[layout.props_bytes - 1] == 0xAA) --layout.props_bytes;
    layout.graph_uid = symbol("ggml_graph_next_uid") ? 88 : -1;
    layout.has_compute_flag = symbol("ggml_build_forward_select") != nullptr;

    struct Known {
        int backend, buffer, type, props, api;
    };
    static constexpr Known kKnown[] = {{13, 9, 6, 40, 1}, {14, 9, 6, 56, 2}, {16, 11, 6, 56, 2}, {16, 11, 8, 56, 3}};
    for (const Known& k : kKnown)
        if (k.backend == layout.backend_functions && k.buffer == layout.buffer_functions && k.type == layout.buffer_type_functions &&
            k.props == layout.props_bytes)
            layout.api_version = k.api;
    if (!layout.api_version || layout.tensor_data != 248 || layout.graph_n_nodes != 4) {
        *error = "the host's struct layout is unknown (" + layout.to_text() + "): a newer ggml-tp is needed for " + path;
        return false;
    }
    if (const int said = probe_api_version(); said > 0) {
        if (said > kNewestApi) {
            *error = "the host (" + path + ") asks for backend API version " + std::to_string(said) + "; this ggml-tp knows 1 to " +
                     std::to_string(kNewestApi) + ": a newer one is needed";
            return false;
        }
        layout.api_version = said;
    }
    return true;
}

/// Lets the host load this very file with an impossible version and reads the one that it wanted from its message.
int Host::probe_api_version() const {
    auto load = reinterpret_cast<void* (*)(const char*)>(symbol("ggml_backend_load"));
    auto log_set = reinterpret_cast<void (*)(void*, void*)>(symbol("ggml_log_set"));
    auto log_get = reinterpret_cast<void (*)(void**, void**)>(symbol("ggml_log_get"));
    Dl_info self{};
    if (!load || !log_set || !log_get || !dladdr(reinterpret_cast<void*>(&nothing), &self)) return -1;
    void *callback = nullptr, *user = nullptr;
    log_get(&callback, &user);
    probing_now = true;
    captured_log.clear();
    log_set(reinterpret_cast<void*>(&capture_log), nullptr);
    load(self.dli_fname);
    log_set(callback, user);
    probing_now = false;
    const size_t at = captured_log.find("current: ");
    return at == std::string::npos ? -1 : std::atoi(captured_log.c_str() + at + 9);
}

Op Host::op_of(const TensorRef& tensor) const {
    const int number = tensor.op();
    auto found = ops_.find(number);
    if (found == ops_.end()) found = ops_.emplace(number, op_from_name(op_name_(number))).first;
    return found->second;
}

int Host::sub_op_of(const TensorRef& tensor) const {
    switch (op_of(tensor)) {
        case Op::UNARY: return static_cast<int>(unary_from_name(unary_name_(tensor.op_param_i32(kUnaryOpParam))));
        case Op::GLU: return glu_name_ ? static_cast<int>(glu_from_name(glu_name_(tensor.op_param_i32(kGluOpParam)))) : static_cast<int>(Glu::UNKNOWN);
        default: return 0;
    }
}

bool Host::is_computed(const TensorRef& tensor) const { return !layout.has_compute_flag || (tensor.flags() & kComputeFlag); }

std::string Layout::to_text() const {
    return "backend_i " + std::to_string(backend_functions) + ", buffer_i " + std::to_string(buffer_functions) + ", buffer_type_i " +
           std::to_string(buffer_type_functions) + ", props " + std::to_string(props_bytes) + " bytes, cgraph nodes at " + std::to_string(graph_nodes) +
           ", uid at " + std::to_string(graph_uid) + ", tensor data at " + std::to_string(tensor_data) + ", API version " + std::to_string(api_version);
}

}  // namespace ggml_tp::abi
