#include "boundary.h"

namespace ggml_tp {
namespace {

template <int n>
struct Words {
    void* w[n];
};
template <int n>
void* make(const abi::Host& host, void* type, const BufferTable& t, void* context, size_t size) {
    Words<n> words{};
    int i = 0;
    for (void* f : {t.free, t.base, t.init_tensor, t.memset_tensor, t.set_tensor, t.get_tensor}) words.w[i++] = f;
    if (n == 11) i += 2;  // set_tensor_2d, get_tensor_2d: the host falls back
    words.w[i++] = t.copy_tensor;
    words.w[i++] = t.clear;
    // By value and larger than two words: on the stack, so the host must read a table of exactly its own length.
    auto init = reinterpret_cast<void* (*)(void*, Words<n>, void*, size_t)>(host.buffer_init);
    return init(type, words, context, size);
}

}  // namespace

void* make_host_buffer(const abi::Host& host, void* type, const BufferTable& table, void* context, size_t size) {
    return host.layout.buffer_functions == 9 ? make<9>(host, type, table, context, size) : make<11>(host, type, table, context, size);
}

void* context_of_host_buffer(void* buffer, void* clear) {
    void** words = static_cast<void**>(buffer);  // functions, type, context, ...
    return words[(words[7] == clear ? 9 : 11) + 1];
}

void fill_buffer_type(const abi::Host& host, const BufferTypeTable& table, void* device, void** words) {
    const bool wide = host.layout.buffer_type_functions == 8;
    int i = 0;
    words[i++] = table.name;
    words[i++] = table.alloc;
    if (wide) ++i;  // alloc_buffer_n
    words[i++] = table.alignment;
    words[i++] = table.max_size;
    ++i;  // get_alloc_size
    if (wide) ++i;
    words[i++] = table.is_host;
    words[i++] = device;
}

}  // namespace ggml_tp
