#include "comm.h"

#include <algorithm>
#include <cstdlib>
#include <thread>

namespace ggml_tp {
namespace {

constexpr int kNcclSum = 0;

/// All groups' locks, in an order that every Comm takes them in.
std::vector<std::unique_lock<std::mutex>> lock_all(std::vector<Group*> groups) {
    std::sort(groups.begin(), groups.end());
    std::vector<std::unique_lock<std::mutex>> locks;
    for (Group* group : groups) locks.emplace_back(group->mutex);
    return locks;
}

}  // namespace

Comm::Comm(std::vector<Group*> groups) : groups_(std::move(groups)), comms_(groups_.size()) {
    const auto locks = lock_all(groups_);
    Driver& driver = groups_[0]->driver();
    const Config& config = groups_[0]->config;
    std::vector<const Device*> devices;
    for (Group* group : groups_) {
        group->finish();
        devices.push_back(&group->device(0));
    }
    // As for ranks of one group: NCCL must not be let loose on direct copies that corrupt data.
    if (config.p2p && prove_peers(devices, config.deadline_s).any_broken()) {
        setenv("NCCL_P2P_DISABLE", "1", 1);
        notes_ = "direct copies between GPUs corrupt data (an IOMMU?): turned off for NCCL";
    }
    driver.open_nccl();
    NcclId id{};
    TP_NCCL(driver, -1, ncclGetUniqueId, &id);
    const int n = static_cast<int>(groups_.size());
    Workers workers(n);
    try {
        workers.run([&](int r) {
            groups_[static_cast<size_t>(r)]->device(0).make_current();
            TP_NCCL(driver, r, ncclCommInitRank, &comms_[static_cast<size_t>(r)], n, id, r);
        });
    } catch (...) {
        give_up();
        throw;
    }
    for (Group* group : groups_) group->overlap(this, [this] { give_up(); });
}

Comm::~Comm() {
    const auto locks = lock_all(groups_);
    for (Group* group : groups_) {
        try {
            group->finish();
        } catch (const Error&) {  // said before, or of no consequence: nobody reads those results any more
        }
        group->end_overlap(this);
    }
    if (!broken_.exchange(true))
        for (Handle comm : comms_) groups_[0]->driver().ncclCommDestroy(comm);
}

/// Any group's lock may be held, by any thread: nothing here takes one.
void Comm::give_up() {
    if (broken_.exchange(true)) return;
    // An abort may wait for a kernel that waits for its peers' aborts, and one that does not end must not take the host along.
    for (Handle comm : comms_)
        if (comm) std::thread([comm, abort = groups_[0]->driver().ncclCommAbort] { abort(comm); }).detach();
}

bool Comm::all_reduce(const std::vector<Summand>& summands, i64 elems) {
    const auto locks = lock_all(groups_);
    if (broken_ || summands.size() != groups_.size()) return false;
    for (const Summand& s : summands)
        if (!s.buffer || !s.buffer->is_compute || s.offset < 0 || s.offset + elems * 4 > s.buffer->size) return false;
    if (elems == 0) return true;
    Driver& driver = groups_[0]->driver();
    try {
        std::vector<void*> pointers(summands.size());
        for (size_t r = 0; r < summands.size(); ++r) {
            const Device& device = groups_[r]->device(0);
            const DevicePtr pointer = summands[r].buffer->compute[0] + static_cast<u64>(summands[r].offset);
            pointers[r] = reinterpret_cast<void*>(pointer);
            if (!summands[r].is_zero) continue;
            device.make_current();
            TP_CUDA(driver, static_cast<int>(r), cuMemsetD8Async, pointer, 0, static_cast<size_t>(elems * 4), device.stream);
        }
        TP_NCCL(driver, -1, ncclGroupStart);
        for (size_t r = 0; r < summands.size(); ++r) {
            const Device& device = groups_[r]->device(0);
            device.make_current();
            TP_NCCL(driver, static_cast<int>(r), ncclAllReduce, pointers[r], pointers[r], static_cast<size_t>(elems), static_cast<int>(WireType::kF32),
                    kNcclSum, comms_[r], device.stream);
        }
        TP_NCCL(driver, -1, ncclGroupEnd);
    } catch (...) {
        give_up();
        throw;
    }
    for (Group* group : groups_) group->expect_all_reduce();
    return true;
}

}  // namespace ggml_tp
