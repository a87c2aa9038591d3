// Everything that the environment can say, read once per host into a printable value.
#pragma once
#include <string>
#include <vector>

namespace ggml_tp {

inline constexpr int kMaxRanks = 16;

struct Config {
    int n_ranks = 0;                       // GGML_TP_RANKS; 0: one per device
    std::vector<int> devices;              // GGML_TP_DEVICES, CUDA ordinals, one per rank; empty: 0, 1, 2, ...
    std::vector<double> split;             // GGML_TP_SPLIT, a weight per rank; empty: even
    std::vector<std::vector<int>> groups;  // GGML_TP_GROUPS="0-1;2-3": ranks of each device that the host sees; empty: all are one
    bool separate = false;                 // GGML_TP_DEVICES_SEPARATE=1: a device for each rank
    int emulated_cc = 0;                   // GGML_TP_EMULATE="sm_60*4": 600; 0: real GPUs
    int emulated_devices = 0;
    std::string nccl_path;      // GGML_TP_NCCL; empty: the wheel beside the package, then the system's
    bool p2p = true;            // GGML_TP_P2P=0: no direct copies between GPUs, by NCCL either
    long norm_bytes = 2 << 20;  // GGML_TP_NORM_BYTES: all_reduces from this size on are the work of the norm behind them, where peers can be reached
    long push_bytes = -1;       // GGML_TP_PUSH_BYTES: and those for which a rank sends others up to so many bytes; -1: by the links
    bool persist = true;        // GGML_TP_PERSIST=0: a kernel per step also where a token could be one persistent kernel
    int log_level = 1;          // GGML_TP_LOG: 0 errors, 1 one line per event, 2 plans and programs
    double deadline_s = 60;     // GGML_TP_DEADLINE: how long one graph may take before its peers are given up

    std::string to_text() const;
};

/// Reads the GGML_TP_* variables. Throws Error with one line that names the variable, its value and what is allowed.
Config read_config();

/// One Config per group, its devices and split those of its ranks. `n_devices`: of the machine, one rank each where nothing is said.
std::vector<Config> configs_of_groups(const Config& config, int n_devices);

}  // namespace ggml_tp
