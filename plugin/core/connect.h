// NCCL communicators, ready to be captured.
#pragma once
#include <vector>

#include "device.h"
#include "runner.h"

namespace ggml_tp {

constexpr int kNcclSum = 0;  // ncclSum, of all all_reduces

/// A communicator for each of `devices` into `comms`, on the worker of its number, and one all_reduce of each size class outside of a capture:
/// NCCL connects its peers, allocates and loads kernels at the first call of a kind, and a capture that comes first fails (internal error, seen
/// on four H100). driver: the one in which NCCL is open. comms is empty unless all have one; who catches an Error has to abort what is there.
void connect_ranks(const Driver& driver, const std::vector<const Device*>& devices, Workers& workers, double deadline_s, std::vector<Handle>& comms);

}  // namespace ggml_tp
