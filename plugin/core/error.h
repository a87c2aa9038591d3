// The one error type: thrown inside the core, turned into a failed status and one log line by backend.cpp alone.
#pragma once
#include <stdexcept>
#include <string>

namespace ggml_tp {

struct Error : std::runtime_error {
    explicit Error(const std::string& what) : std::runtime_error(what) {}
    Error(const char* api, int code, const std::string& meaning, int rank, const char* file, int line)
        : std::runtime_error(std::string(api) + " failed on rank " + std::to_string(rank) + ": " + meaning + " (" + std::to_string(code) + ", " + file + ":" +
                             std::to_string(line) + ")"),
          code(code) {}
    int code = 0;
};

}  // namespace ggml_tp
