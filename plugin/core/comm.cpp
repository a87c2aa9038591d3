#include "comm.h"

#include <algorithm>
#include <cstdlib>
#include <thread>

#include "connect.h"

namespace ggml_tp {
namespace {

constexpr size_t kMostCaptured = 512;  // a model of 80 layers asks for 160 in a token, some on the same memory
constexpr double kDrainSeconds = 60;   // for a late rank to come to its kernel and find it given up

/// All groups' locks, in an order that every Comm takes them in.
std::vector<std::unique_lock<std::mutex>> lock_all(std::vector<Group*> groups) {
    std::sort(groups.begin(), groups.end());
    std::vector<std::unique_lock<std::mutex>> locks;
    for (Group* group : groups) locks.emplace_back(group->mutex);
    return locks;
}

}  // namespace

Comm::Comm(std::vector<Group*> groups) : groups_(std::move(groups)), workers_(static_cast<int>(groups_.size())) {
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
    try {
        connect_ranks(driver, devices, workers_, config.deadline_s, comms_);
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
    if (broken_.exchange(true)) return;
    for (const Captured& c : captured_) destroy(groups_[0]->driver(), c);
    for (Handle comm : comms_) groups_[0]->driver().ncclCommDestroy(comm);
}

/// Of one whose capture failed some ranks have none.
void Comm::destroy(const Driver& driver, const Captured& captured) {
    for (Handle executable : captured.executables)
        if (executable) driver.cuGraphExecDestroy(executable);
}

/// Any group's lock may be held, by any thread: nothing here takes one, and nothing waits: an abort may wait for a kernel that waits for its
/// peers' aborts, and one that does not end must not take the host along. The order is Group::fail's: aborts end the kernels that wait, a
/// late rank's kernel finds itself given up when its turn comes, and only then the graphs go, for which the aborts wait before they free
/// what those kernels read (freed sooner, a late rank read it: an illegal address, seen on an H100).
void Comm::give_up() {
    if (broken_.exchange(true)) return;
    Driver& driver = groups_[0]->driver();
    for (Handle comm : comms_)
        if (comm) std::thread([comm, abort = driver.ncclCommAbort] { abort(comm); }).detach();
    std::thread([&driver, groups = groups_, captured = std::exchange(captured_, {})] {
        try {
            for (Group* group : groups)
                if (!group->device(0).wait(kDrainSeconds)) return;  // what still runs keeps its memory
            for (const Captured& c : captured) destroy(driver, c);
        } catch (const Error&) {  // a broken device: its group's next graph says so
        }
    }).detach();
}

/// Finds or captures it. All locks are held.
const Comm::Captured& Comm::captured(const std::vector<void*>& pointers, i64 elems) {
    const auto found = std::find_if(captured_.begin(), captured_.end(), [&](const Captured& c) { return c.elems == elems && c.pointers == pointers; });
    if (found != captured_.end()) {
        captured_.splice(captured_.begin(), captured_, found);
        return captured_.front();
    }
    if (captured_.size() >= kMostCaptured) {
        for (Group* group : groups_) group->finish();  // it may still run
        destroy(groups_[0]->driver(), captured_.back());
        captured_.pop_back();
    }
    captured_.push_front({pointers, elems, std::vector<Handle>(groups_.size())});
    Captured& made = captured_.front();
    Driver& driver = groups_[0]->driver();  // the one in which NCCL is open
    workers_.run([&](int rank) {
        const auto r = static_cast<size_t>(rank);
        const Device& device = groups_[r]->device(0);
        made.executables[r] = device.capture([&] {
            TP_NCCL(driver, rank, ncclAllReduce, pointers[r], pointers[r], static_cast<size_t>(elems), static_cast<int>(WireType::kF32), kNcclSum, comms_[r],
                    device.stream);
        });
    });
    return made;
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
            groups_[r]->memory->enqueue_inputs();
            const Device& device = groups_[r]->device(0);
            const DevicePtr pointer = summands[r].buffer->compute[0] + static_cast<u64>(summands[r].offset);
            pointers[r] = reinterpret_cast<void*>(pointer);
            if (!summands[r].is_zero) continue;
            device.make_current();
            TP_CUDA(driver, static_cast<int>(r), cuMemsetD8Async, pointer, 0, static_cast<size_t>(elems * 4), device.stream);
        }
        const Captured& reduce = captured(pointers, elems);
        for (size_t r = 0; r < summands.size(); ++r) {
            const Device& device = groups_[r]->device(0);
            device.make_current();
            TP_CUDA(driver, static_cast<int>(r), cuGraphLaunch, reduce.executables[r], device.stream);
        }
    } catch (...) {
        give_up();
        throw;
    }
    for (Group* group : groups_) group->expect_all_reduce();
    return true;
}

}  // namespace ggml_tp
