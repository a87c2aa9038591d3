#include "connect.h"

#include <string>

#include "program.h"

namespace ggml_tp {
namespace {

constexpr size_t kWarmUpElems[] = {1024, 1 << 18};

}  // namespace

void connect_ranks(const Driver& driver, const std::vector<const Device*>& devices, Workers& workers, double deadline_s, std::vector<Handle>& comms) {
    NcclId id{};
    TP_NCCL(driver, -1, ncclGetUniqueId, &id);
    std::vector<Handle> made(devices.size());
    workers.run([&](int r) {
        devices[r]->make_current();
        TP_NCCL(driver, r, ncclCommInitRank, &made[r], static_cast<int>(devices.size()), id, r);
    });
    comms = made;
    workers.run([&](int r) {
        const Device& device = *devices[r];
        const DevicePtr buffer = device.allocate(kWarmUpElems[1] * 4);
        TP_CUDA(driver, r, cuMemsetD8Async, buffer, 0, kWarmUpElems[1] * 4, device.stream);
        for (const size_t elems : kWarmUpElems)
            TP_NCCL(driver, r, ncclAllReduce, reinterpret_cast<const void*>(buffer), reinterpret_cast<void*>(buffer), elems, static_cast<int>(WireType::kF32),
                    kNcclSum, comms[r], device.stream);
        const bool done = device.wait(deadline_s);
        if (done) device.release(buffer);  // else NCCL may still write to it
        if (!done) throw Error("NCCL's first all_reduce did not end within " + std::to_string(deadline_s) + " s on rank " + std::to_string(r));
    });
}

}  // namespace ggml_tp
