#include "peers.h"

#include <cstdint>
#include <cstring>

namespace ggml_tp {
namespace {

constexpr int kAlreadyEnabled = 704;
// A cache line's worth, an odd number of words, and more than any bridge buffers.
constexpr size_t kSizes[] = {512, (1 << 20) + 4, 8 << 20};

/// One pair, one way.
bool copies_right(const Device& from, const Device& to, double deadline_s) {
    const Driver& driver = from.driver;
    const size_t most = kSizes[2];
    const DevicePtr source = from.allocate(most), target = to.allocate(most);
    bool right = true;
    try {
        std::vector<std::uint32_t> sent(most / 4), got(most / 4);
        std::uint32_t state = 2463534242u + static_cast<std::uint32_t>(from.rank * 16 + to.rank);
        for (std::uint32_t& word : sent) state ^= state << 13, state ^= state >> 17, state ^= state << 5, word = state;
        from.make_current();
        TP_CUDA(driver, from.rank, cuMemcpyHtoDAsync, source, sent.data(), most, from.stream);
        for (const size_t bytes : kSizes) {
            to.make_current();
            TP_CUDA(driver, to.rank, cuMemsetD8Async, target, 0, bytes, to.stream);
            if (!to.wait(deadline_s) || !from.wait(deadline_s)) throw Error("a copy between GPUs did not end in time");
            from.make_current();
            TP_CUDA(driver, from.rank, cuMemcpyPeerAsync, target, to.context(), source, from.context(), bytes, from.stream);
            if (!from.wait(deadline_s)) throw Error("a copy between GPUs did not end in time");
            to.make_current();
            TP_CUDA(driver, to.rank, cuMemcpyDtoHAsync, got.data(), target, bytes, to.stream);
            if (!to.wait(deadline_s)) throw Error("a copy between GPUs did not end in time");
            right &= std::memcmp(sent.data(), got.data(), bytes) == 0;
        }
    } catch (...) {
        from.release(source);
        to.release(target);
        throw;
    }
    from.release(source);
    to.release(target);
    return right;
}

}  // namespace

Peers prove_peers(const std::vector<const Device*>& devices, double deadline_s) {
    Peers out;
    out.link.assign(devices.size(), std::vector<Peers::Link>(devices.size(), Peers::kSame));
    for (size_t f = 0; f < devices.size(); ++f)
        for (size_t t = 0; t < devices.size(); ++t) {
            const Device *from = devices[f], *to = devices[t];
            if (from->ordinal == to->ordinal) continue;
            Peers::Link& link = out.link[f][t];
            int can = 0;
            TP_CUDA(from->driver, from->rank, cuDeviceCanAccessPeer, &can, from->ordinal, to->ordinal);
            link = Peers::kNone;
            if (!can) continue;
            from->make_current();
            const int code = from->driver.cuCtxEnablePeerAccess(to->context(), 0);
            if (code && code != kAlreadyEnabled) continue;
            link = copies_right(*from, *to, deadline_s) ? Peers::kProven : Peers::kBroken;
            from->make_current();
            if (code != kAlreadyEnabled) from->driver.cuCtxDisablePeerAccess(to->context());
        }
    return out;
}

bool all_by_nvlink(const std::vector<std::unique_ptr<Device>>& devices) {
    constexpr int kNativeAtomicSupported = 3;  // CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED
    for (const auto& from : devices)
        for (const auto& to : devices) {
            if (from->ordinal == to->ordinal) continue;
            int native = 0;
            TP_CUDA(from->driver, from->rank, cuDeviceGetP2PAttribute, &native, kNativeAtomicSupported, from->ordinal, to->ordinal);
            if (!native) return false;
        }
    return true;
}

void enable_peers(const std::vector<std::unique_ptr<Device>>& devices) {
    for (const auto& from : devices)
        for (const auto& to : devices) {
            if (from->ordinal == to->ordinal) continue;
            from->make_current();
            const int code = from->driver.cuCtxEnablePeerAccess(to->context(), 0);
            if (code != kAlreadyEnabled) from->driver.check_cuda(code, "cuCtxEnablePeerAccess", from->rank, __FILE__, __LINE__);
        }
}

bool Peers::all_proven() const {
    for (const auto& row : link)
        for (const Link l : row)
            if (l == kNone || l == kBroken) return false;
    return true;
}

bool Peers::any_broken() const {
    for (const auto& row : link)
        for (const Link l : row)
            if (l == kBroken) return true;
    return false;
}

std::string Peers::to_text() const {
    static constexpr const char* kNames[] = {"-", "no", "ok", "BROKEN"};
    std::string out;
    for (size_t r = 0; r < link.size(); ++r) {
        out += "rank " + std::to_string(r) + " to others:";
        for (const Link l : link[r]) out += std::string(" ") + kNames[static_cast<int>(l)];
        out += "\n";
    }
    return out;
}

}  // namespace ggml_tp
