// What is kept per host (keyed by where the host is mapped: two hosts in one process reach the same image of this library).
#pragma once
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "abi/host.h"
#include "group.h"

namespace ggml_tp {

/// One group of ranks as a host sees it: a device with its buffer type. The words are in the host's layout, set by backend.cpp.
struct HostDevice {
    const abi::Host* host = nullptr;
    std::unique_ptr<Group> group;
    std::string name, description;             // "TP0"
    std::string pinned_name;                   // of its host buffer type
    std::atomic<bool>* failed_late = nullptr;  // its host's
    void* words[17] = {};                      // 15 functions, registration, context
    void* buffer_type_words[13] = {};          // this, then what the host sees: 6 or 8 functions, device, context
    void* pinned_type_words[13] = {};          // likewise
    void* buffer_type() { return buffer_type_words + 1; }
    const void* pinned_type() const { return pinned_type_words + 1; }
    void* pinned_type() { return pinned_type_words + 1; }
};

struct HostState {
    std::unique_ptr<abi::Host> host;
    std::vector<std::unique_ptr<HostDevice>> devices;
    std::atomic<bool> failed_late{false};  // a graph on any device, after its compute had returned: the next one's status says so, once
    void* registration[6] = {};            // version, get_name, get_device_count, get_device, get_proc_address, context
};

struct Process {
    std::mutex mutex;
    std::map<void*, std::unique_ptr<HostState>> hosts;
};

Process& process();

}  // namespace ggml_tp
