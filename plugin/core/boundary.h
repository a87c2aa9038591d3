// What both sides of the ggml boundary need: errors that stay inside, tables of functions in the host's own layout.
#pragma once
#include <cstdio>
#include <exception>
#include <string>
#include <utility>

#include "abi/host.h"

namespace ggml_tp {

constexpr size_t kHostAlignment = 256;  // of a tensor in any buffer that we offer

inline void log_line(const std::string& text) { std::fprintf(stderr, "ggml-tp: %s\n", text.c_str()); }

template <class F>
auto guarded(F&& body, decltype(body()) failed) -> decltype(body()) {
    try {
        return body();
    } catch (const std::exception& error) {
        if (*error.what()) log_line(error.what());  // empty: it follows from one that was said
    }
    return failed;
}
template <class F>
void guarded_void(F&& body) {
    guarded(
        [&] {
            body();
            return 0;
        },
        0);
}

template <class F>
void* word(F function) {
    return reinterpret_cast<void*>(function);
}

/// The functions of a buffer that hosts of all four layouts know.
struct BufferTable {
    void *free, *base, *init_tensor, *memset_tensor, *set_tensor, *get_tensor, *copy_tensor, *clear;
};
/// A host's buffer of that type, with `context` in it.
void* make_host_buffer(const abi::Host& host, void* type, const BufferTable& table, void* context, size_t size);
/// Where clear() stands tells how many functions this host's table has.
void* context_of_host_buffer(void* buffer, void* clear);

/// The functions of a buffer type that hosts of all four layouts know; get_alloc_size is the host's default.
struct BufferTypeTable {
    void *name, *alloc, *alignment, *max_size, *is_host;
};
/// 6 or 8 functions, device, context: at most 10 words.
void fill_buffer_type(const abi::Host& host, const BufferTypeTable& table, void* device, void** words);

}  // namespace ggml_tp
