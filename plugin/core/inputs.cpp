#include "inputs.h"

#include <algorithm>

#include "copy.h"

namespace ggml_tp {
namespace {

// Larger pieces are the driver's: their way over the bus takes longer than its call. The bound itself was not measured.
constexpr i64 kMostBytes = 256 << 10;

}  // namespace

void InputCopies::add(const char* from, DevicePtr to, i64 bytes, bool pinned) {
    if (!pinned || bytes > kMostBytes) {
        TP_CUDA(device_.driver, device_.rank, cuMemcpyHtoDAsync, to, from, static_cast<size_t>(bytes), device_.stream);
        return;
    }
    if (n_ == kInputPieces) send();
    args_.piece[n_++] = {from, reinterpret_cast<char*>(to), bytes};
    most_bytes_ = std::max(most_bytes_, bytes);
}

void InputCopies::send() {
    if (n_ == 0) return;
    device_.launch(kernel_, copy_inputs_launch(n_, most_bytes_), &args_);
    n_ = 0, most_bytes_ = 0;
}

}  // namespace ggml_tp
