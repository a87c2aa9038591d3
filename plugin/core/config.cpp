#include "config.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "error.h"

namespace ggml_tp {
namespace {

std::string variable(const char* name) {
    const char* value = std::getenv(name);
    return value ? value : "";
}

[[noreturn]] void refuse(const char* name, const std::string& value, const std::string& allowed) {
    throw Error(std::string(name) + "=\"" + value + "\" is not valid: " + allowed);
}

bool parse_int(const std::string& text, long* out) {
    if (text.empty()) return false;
    char* end = nullptr;
    *out = std::strtol(text.c_str(), &end, 10);
    return *end == 0;
}

std::vector<std::string> fields(const std::string& text, char separator = ',') {
    std::vector<std::string> out(1);
    for (char c : text) {
        if (c == separator) out.emplace_back();
        else out.back() += c;
    }
    return out;
}

/// "0-1;2-3" or "0,2;1,3": ranks, none of them twice.
std::vector<std::vector<int>> parse_groups(const std::string& text) {
    std::vector<std::vector<int>> out;
    bool taken[kMaxRanks] = {};
    for (const std::string& group : fields(text, ';')) {
        out.emplace_back();
        for (const std::string& field : fields(group)) {
            const size_t dash = field.find('-');
            long first = 0, last = 0;
            const bool read = parse_int(field.substr(0, dash), &first) && (dash == std::string::npos || parse_int(field.substr(dash + 1), &last));
            if (dash == std::string::npos) last = first;
            if (!read || first < 0 || last < first || last >= kMaxRanks)
                refuse("GGML_TP_GROUPS", text, "write the ranks (0 to 15) of each group, for example 0-1;2-3 or 0,2;1,3");
            for (long rank = first; rank <= last; ++rank) {
                if (taken[rank]) refuse("GGML_TP_GROUPS", text, "rank " + std::to_string(rank) + " is in two places");
                taken[rank] = true;
                out.back().push_back(static_cast<int>(rank));
            }
        }
    }
    return out;
}

}  // namespace

Config read_config() {
    Config config;
    if (std::string text = variable("GGML_TP_EMULATE"); !text.empty() && text != "0") {
        int sm = 0, count = 1, used = 0;
        int matched = std::sscanf(text.c_str(), "sm_%d%n*%d%n", &sm, &used, &count, &used);
        if (matched < 1 || used != static_cast<int>(text.size()) || sm < 50 || sm > 130 || count < 1 || count > kMaxRanks)
            refuse("GGML_TP_EMULATE", text, "write sm_<architecture>*<devices>, for example sm_60*4 (1 to 16 devices)");
        config.emulated_cc = sm * 10;
        config.emulated_devices = count;
    }
    if (std::string text = variable("GGML_TP_DEVICES"); !text.empty()) {
        for (const std::string& field : fields(text)) {
            long ordinal = 0;
            if (!parse_int(field, &ordinal) || ordinal < 0 || ordinal > 1023)
                refuse("GGML_TP_DEVICES", text, "write CUDA device numbers separated by commas, for example 0,1,2");
            config.devices.push_back(static_cast<int>(ordinal));
        }
        if (config.devices.size() > kMaxRanks) refuse("GGML_TP_DEVICES", text, "at most 16 devices");
    }
    if (std::string text = variable("GGML_TP_RANKS"); !text.empty()) {
        long ranks = 0;
        if (!parse_int(text, &ranks) || ranks < 1 || ranks > kMaxRanks) refuse("GGML_TP_RANKS", text, "a number of ranks from 1 to 16");
        config.n_ranks = static_cast<int>(ranks);
    }
    if (!config.devices.empty() && config.n_ranks && config.n_ranks != static_cast<int>(config.devices.size()))
        refuse("GGML_TP_DEVICES", variable("GGML_TP_DEVICES"), "GGML_TP_RANKS asks for " + std::to_string(config.n_ranks) + " ranks; name as many devices");
    if (!config.devices.empty()) config.n_ranks = static_cast<int>(config.devices.size());
    if (std::string text = variable("GGML_TP_GROUPS"); !text.empty()) {
        config.groups = parse_groups(text);
        int n = 0;
        for (const auto& group : config.groups)
            for (int rank : group) n = std::max(n, rank + 1);
        if (config.n_ranks && n > config.n_ranks)
            refuse("GGML_TP_GROUPS", text, "there are " + std::to_string(config.n_ranks) + " ranks, 0 to " + std::to_string(config.n_ranks - 1));
        if (!config.n_ranks) config.n_ranks = n;
    }
    if (std::string text = variable("GGML_TP_SPLIT"); !text.empty()) {
        double sum = 0;
        for (const std::string& field : fields(text)) {
            char* end = nullptr;
            double share = std::strtod(field.c_str(), &end);
            if (field.empty() || *end || !(share >= 0) || share > 1e6) refuse("GGML_TP_SPLIT", text, "write one share per rank, for example 3,1");
            config.split.push_back(share);
            sum += share;
        }
        if (config.split.size() > kMaxRanks) refuse("GGML_TP_SPLIT", text, "at most 16 shares");
        if (!(sum > 0)) refuse("GGML_TP_SPLIT", text, "the shares add up to nothing");
        if (config.n_ranks && config.n_ranks != static_cast<int>(config.split.size()))
            refuse("GGML_TP_SPLIT", text, "there are " + std::to_string(config.n_ranks) + " ranks; write one share for each");
        config.n_ranks = static_cast<int>(config.split.size());
        for (const auto& group : config.groups) {
            double of_group = 0;
            for (int rank : group) of_group += config.split[static_cast<size_t>(rank)];
            if (!(of_group > 0)) refuse("GGML_TP_SPLIT", text, "the shares of a group of GGML_TP_GROUPS add up to nothing");
        }
    }
    config.nccl_path = variable("GGML_TP_NCCL");
    const std::pair<const char*, bool*> switches[] = {
        {"GGML_TP_P2P", &config.p2p}, {"GGML_TP_PERSIST", &config.persist}, {"GGML_TP_DEVICES_SEPARATE", &config.separate}};
    for (const auto& [name, value] : switches)
        if (std::string text = variable(name); !text.empty()) {
            if (text != "0" && text != "1") refuse(name, text, "0 or 1");
            *value = text == "1";
        }
    const std::pair<const char*, long*> sizes[] = {{"GGML_TP_NORM_BYTES", &config.norm_bytes}, {"GGML_TP_PUSH_BYTES", &config.push_bytes}};
    for (const auto& [name, value] : sizes)
        if (std::string text = variable(name); !text.empty()) {
            long bytes = 0;
            if (!parse_int(text, &bytes) || bytes < 0) refuse(name, text, "bytes, 0 or more");
            *value = bytes;
        }
    if (config.separate && !config.groups.empty()) refuse("GGML_TP_DEVICES_SEPARATE", "1", "GGML_TP_GROUPS says already which ranks are a device");
    if (std::string text = variable("GGML_TP_LOG"); !text.empty()) {
        long level = 0;
        if (!parse_int(text, &level) || level < 0 || level > 2) refuse("GGML_TP_LOG", text, "0, 1 or 2");
        config.log_level = static_cast<int>(level);
    }
    if (std::string text = variable("GGML_TP_DEADLINE"); !text.empty()) {
        char* end = nullptr;
        config.deadline_s = std::strtod(text.c_str(), &end);
        if (*end || !(config.deadline_s > 0) || config.deadline_s > 86400) refuse("GGML_TP_DEADLINE", text, "seconds that one graph may take, up to 86400");
    }
    return config;
}

std::vector<Config> configs_of_groups(const Config& config, int n_devices) {
    if (config.groups.empty() && !config.separate) return {config};
    std::vector<std::vector<int>> groups = config.groups;
    if (config.separate)
        for (int rank = 0; rank < (config.n_ranks ? config.n_ranks : std::min(n_devices, kMaxRanks)); ++rank) groups.push_back({rank});
    std::vector<Config> out;
    for (const auto& group : groups) {
        Config one = config;
        one.n_ranks = static_cast<int>(group.size());
        one.devices.clear();
        one.split.clear();
        for (int rank : group) {
            const int device = config.devices.empty() ? rank : config.devices[static_cast<size_t>(rank)];
            if (device >= n_devices)
                throw Error("rank " + std::to_string(rank) + " is to be on device " + std::to_string(device) + " but there are " + std::to_string(n_devices) +
                            " devices: see GGML_TP_DEVICES, GGML_TP_GROUPS and GGML_TP_RANKS");
            one.devices.push_back(device);
            if (!config.split.empty()) one.split.push_back(config.split[static_cast<size_t>(rank)]);
        }
        out.push_back(std::move(one));
    }
    return out;
}

std::string Config::to_text() const {
    std::string out = "ranks " + (n_ranks ? std::to_string(n_ranks) : std::string("auto")) + "\ndevices";
    for (int device : devices) out += " " + std::to_string(device);
    if (devices.empty()) out += " auto";
    out += "\nsplit";
    for (double share : split) out += " " + std::to_string(share);
    if (split.empty()) out += " even";
    for (size_t g = 0; g < groups.size(); ++g) {
        out += g ? "; TP" + std::to_string(g) + ":" : "\ngroups TP0:";
        for (int rank : groups[g]) out += " " + std::to_string(rank);
    }
    if (separate) out += "\na device for each rank";
    out += "\nemulate ";
    out += emulated_cc ? "sm_" + std::to_string(emulated_cc / 10) + "*" + std::to_string(emulated_devices) : "no";
    out += "\nnccl " + (nccl_path.empty() ? "auto" : nccl_path);
    out += p2p ? "\np2p where it is proven" : "\np2p off";
    out += "\nall_reduces by the norms behind them: of " + std::to_string(norm_bytes) + " bytes and more, and where a rank sends up to " +
           (push_bytes < 0 ? "what suits the links" : std::to_string(push_bytes));
    out += persist ? "\npersistent kernel where it can" : "\nno persistent kernel";
    out += "\nlog " + std::to_string(log_level) + "\ndeadline_s " + std::to_string(deadline_s) + "\n";
    return out;
}

}  // namespace ggml_tp
