// Whether GPUs can copy to each other directly, proven with data: some boards say yes and corrupt silently (behind an IOMMU).
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "device.h"

namespace ggml_tp {

struct Peers {
    enum Link : char { kSame, kNone, kProven, kBroken };
    std::vector<std::vector<Link>> link;  // [from][to], by place in the list of devices

    bool all_proven() const;
    bool any_broken() const;
    /// A line per rank; "-" the same device, "no", "ok", "BROKEN".
    std::string to_text() const;
};

/// Copies patterns of several sizes between all pairs of different devices, both ways, and compares every byte. Leaves peer access as it
/// was. Throws Error when a device fails altogether.
Peers prove_peers(const std::vector<const Device*>& devices, double deadline_s);

/// Whether all pairs are joined by more than PCIe: by NVLink, whose atomics are the links' own.
bool all_by_nvlink(const std::vector<std::unique_ptr<Device>>& devices);

/// Lets every device's kernels store to every other device's memory; only between pairs that are proven.
void enable_peers(const std::vector<std::unique_ptr<Device>>& devices);

}  // namespace ggml_tp
