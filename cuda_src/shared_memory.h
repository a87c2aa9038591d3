// What a multiprocessor has of shared memory.
#pragma once
#include "launch.h"

namespace ggml_tp {

/// KB of shared memory of a multiprocessor that a block may have, from an architecture on (CUDA C++ Programming Guide, "Technical Specifications per Compute
/// Capability").
constexpr int shared_kb(i32 cc) {
    struct Row {
        i32 cc;
        int kb;
    };
    constexpr Row kRows[] = {{1200, 99}, {900, 227}, {880, 99}, {870, 163}, {810, 99}, {800, 163}};
    for (const Row& row : kRows)
        if (cc >= row.cc) return row.kb;
    return 99;
}

}  // namespace ggml_tp
