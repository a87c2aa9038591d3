// Reading the host's ggml_tensor and ggml_cgraph. Offsets up to `data` are the same in all known hosts; the rest is probed.
#pragma once
#include <cstdint>
#include <cstring>

#include "host.h"

namespace ggml_tp::abi {

template <class T>
T read_at(const void* object, int offset) {
    T value;
    std::memcpy(&value, static_cast<const char*>(object) + offset, sizeof value);
    return value;
}

class TensorRef {
  public:
    TensorRef(const Host& host, const void* tensor) : host_(host), tensor_(tensor) {}
    int type() const { return read_at<int32_t>(tensor_, 0); }
    void* buffer() const { return read_at<void*>(tensor_, 8); }
    int64_t ne(int d) const { return read_at<int64_t>(tensor_, 16 + 8 * d); }
    uint64_t nb(int d) const { return read_at<uint64_t>(tensor_, 48 + 8 * d); }
    int op() const { return read_at<int32_t>(tensor_, 80); }
    int32_t op_param_i32(int i) const { return read_at<int32_t>(tensor_, 84 + 4 * i); }
    int flags() const { return read_at<int32_t>(tensor_, 148); }
    const void* src(int i) const { return read_at<const void*>(tensor_, 152 + 8 * i); }
    const void* view_src() const { return read_at<const void*>(tensor_, 232); }
    void* data() const { return read_at<void*>(tensor_, host_.layout.tensor_data); }
    const char* name() const { return static_cast<const char*>(tensor_) + host_.layout.tensor_name; }

  private:
    const Host& host_;
    const void* tensor_;
};

class GraphRef {
  public:
    GraphRef(const Host& host, const void* graph) : host_(host), graph_(graph) {}
    int n_nodes() const { return read_at<int32_t>(graph_, host_.layout.graph_n_nodes); }
    void** nodes() const { return read_at<void**>(graph_, host_.layout.graph_nodes); }
    const void* node(int i) const { return read_at<void**>(graph_, host_.layout.graph_nodes)[i]; }
    uint64_t uid() const { return host_.layout.graph_uid < 0 ? 0 : read_at<uint64_t>(graph_, host_.layout.graph_uid); }

  private:
    const Host& host_;
    const void* graph_;
};

}  // namespace ggml_tp::abi
