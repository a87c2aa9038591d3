// Inputs of a graph on their way from pinned memory to a rank: one launch brings them all.
#pragma once
#include "args.h"
#include "device.h"

namespace ggml_tp {

/// One rank's pieces of a launch. Pieces of one launch must not overlap: they are copied in no order.
class InputCopies {
  public:
    /// copy_inputs: the kernel's handle on that device.
    InputCopies(const Device& device, Handle copy_inputs) : device_(device), kernel_(copy_inputs) {}
    /// A copy of `bytes` that send() enqueues at the latest. `from` stays as it is until the device has run it; pinned: kernels may read it.
    /// Throws Error.
    void add(const char* from, DevicePtr to, i64 bytes, bool pinned);
    /// Enqueues what add() has kept, on the device's stream. Waits for nothing. Throws Error.
    void send();

  private:
    const Device& device_;
    Handle kernel_;
    int n_ = 0;
    i64 most_bytes_ = 0;
    CopyInputsArgs args_;
};

}  // namespace ggml_tp
