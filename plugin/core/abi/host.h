// The host that loaded us: its functions, found at load time, and its struct layouts, probed by calling its own getters on fake
// objects. Four layouts exist since 2024-12; anything else is refused with one line (docs/decisions.md).
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>

#include "ops.h"

namespace ggml_tp::abi {

class TensorRef;

struct Layout {
    int backend_functions = 0;                                // 13, 14, 16
    int buffer_functions = 0;                                 // 9, 11
    int buffer_type_functions = 0;                            // 6, 8
    int props_bytes = 0;                                      // 40, 56
    int graph_n_nodes = 4, graph_nodes = 16, graph_uid = -1;  // byte offsets; -1: the host has none
    int tensor_data = 248, tensor_name = 256;
    bool has_compute_flag = false;
    int api_version = 0;

    int caps_offset() const { return props_bytes == 40 ? 36 : 48; }
    std::string to_text() const;
};

class Host {
  public:
    /// The host behind a return address inside it. Null with one line in *error when it cannot be served.
    static std::unique_ptr<Host> attach(void* return_address, std::string* error);
    /// Where the host that owns this address is mapped: the key of its state.
    static void* base_of(void* address);
    /// True while attach() lets a host load this library a second time to learn its API version.
    static bool probing();

    Layout layout;
    std::string path;

    size_t (*nbytes)(const void*) = nullptr;
    int (*buffer_usage)(void*) = nullptr;
    void* buffer_init = nullptr;  // called with the layout's own signature

    Op op_of(const TensorRef& tensor) const;
    int sub_op_of(const TensorRef& tensor) const;  // Unary or Glu as int, 0 for other ops
    /// Nodes without the COMPUTE flag are skipped, where the host has that flag.
    bool is_computed(const TensorRef& tensor) const;

  private:
    void* symbol(const char* name) const;
    bool probe(std::string* error);
    int probe_api_version() const;

    void* handle_ = nullptr;
    const char* (*op_name_)(int) = nullptr;
    const char* (*unary_name_)(int) = nullptr;
    const char* (*glu_name_)(int) = nullptr;
    mutable std::map<int, Op> ops_;
};

}  // namespace ggml_tp::abi
