// What is kept per host (keyed by where the host is mapped: two hosts in one process reach the same image of this library).
#pragma once
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "abi/host.h"
#include "group.h"

namespace ggml_tp {

struct HostState {
    std::unique_ptr<abi::Host> host;
    std::unique_ptr<Group> group;
    std::string description;
    // Objects in the host's layout; their words are set by backend.cpp.
    void* registration[6] = {};        // version, get_name, get_device_count, get_device, get_proc_address, context
    void* device[17] = {};             // 15 functions, registration, context
    void* buffer_type_words[13] = {};  // this, then what the host sees: 6 or 8 functions, device, context
    void* buffer_type() { return buffer_type_words + 1; }
};

struct Process {
    std::mutex mutex;
    std::map<void*, std::unique_ptr<HostState>> hosts;
};

Process& process();

}  // namespace ggml_tp
