// Memory of the host that GPUs copy to and from directly, offered to the host as a device's host buffer type. A host keeps there what its CPU computes for
// a device (embeddings of a batch, masks) and the logits.
#pragma once

namespace ggml_tp {

struct HostDevice;

/// Fills device.pinned_type().
void fill_pinned_type(HostDevice& device);

}  // namespace ggml_tp
