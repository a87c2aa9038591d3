#include "pinned.h"

#include <cstring>
#include <memory>
#include <mutex>

#include "abi/tensor.h"
#include "boundary.h"
#include "state.h"

namespace ggml_tp {
namespace {

struct PinnedBuffer {
    HostDevice* device;
    char* memory;
    size_t size;
};

void buffer_clear(void* buffer, uint8_t value);
PinnedBuffer& context_of(void* buffer) { return *static_cast<PinnedBuffer*>(context_of_host_buffer(buffer, word(buffer_clear))); }
char* at(void* buffer, const void* tensor, size_t offset) {
    return static_cast<char*>(abi::TensorRef(*context_of(buffer).device->host, tensor).data()) + offset;
}

void buffer_free(void* buffer) {
    guarded_void([&] {
        std::unique_ptr<PinnedBuffer> b(&context_of(buffer));
        std::lock_guard lock(b->device->group->mutex);
        b->device->group->memory->release_pinned(b->memory);
    });
}
void* buffer_base(void* buffer) { return context_of(buffer).memory; }
void buffer_memset_tensor(void* buffer, void* tensor, uint8_t value, size_t offset, size_t size) { std::memset(at(buffer, tensor, offset), value, size); }
void buffer_set_tensor(void* buffer, void* tensor, const void* data, size_t offset, size_t size) { std::memcpy(at(buffer, tensor, offset), data, size); }
void buffer_get_tensor(void* buffer, const void* tensor, void* data, size_t offset, size_t size) { std::memcpy(data, at(buffer, tensor, offset), size); }
bool buffer_copy_tensor(void*, const void*, void*) { return false; }  // the host copies through set and get
void buffer_clear(void* buffer, uint8_t value) { std::memset(context_of(buffer).memory, value, context_of(buffer).size); }

HostDevice& device_of_type(void* type) { return *static_cast<HostDevice*>(static_cast<void**>(type)[-1]); }
const char* type_name(void* type) { return device_of_type(type).pinned_name.c_str(); }
void* type_alloc(void* type, size_t size) {
    return guarded(
        [&]() -> void* {
            HostDevice& device = device_of_type(type);
            auto context = std::make_unique<PinnedBuffer>();
            context->device = &device;
            context->size = size;
            {
                std::lock_guard lock(device.group->mutex);
                context->memory = device.group->memory->allocate_pinned(static_cast<i64>(size));
            }
            const BufferTable table{word(buffer_free),       word(buffer_base),        nullptr,           word(buffer_memset_tensor), word(buffer_set_tensor),
                                    word(buffer_get_tensor), word(buffer_copy_tensor), word(buffer_clear)};
            return make_host_buffer(*device.host, type, table, context.release(), size);
        },
        nullptr);
}
size_t type_alignment(void*) { return kHostAlignment; }
size_t type_max_size(void*) { return ~size_t{0} >> 1; }
bool type_is_host(void*) { return true; }

}  // namespace

void fill_pinned_type(HostDevice& device) {
    device.pinned_type_words[0] = &device;
    const BufferTypeTable table{word(type_name), word(type_alloc), word(type_alignment), word(type_max_size), word(type_is_host)};
    fill_buffer_type(*device.host, table, device.words, device.pinned_type_words + 1);
}

}  // namespace ggml_tp
