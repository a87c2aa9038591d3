// Kernels with planted mistakes, for test_sanitizers.py. usage: planted KERNEL (one block of 64 threads)
#include <cstdio>
#include <vector>

#include "tp.h"

/// Every thread reads what another of its block wrote to shared memory.
template <bool kBarrier>
TP_DEVICE void reverse(const ggml_tp::FillArgs& args) {
    __shared__ float shared[64];
    const unsigned i = threadIdx.x;
    shared[i] = args.value + (float)i;
    if (kBarrier) __syncthreads();
    ((float*)args.y.data)[i] = shared[63 - i];
}
TP_KERNEL(right, FillArgs, 64) { reverse<true>(args); }
TP_KERNEL(race, FillArgs, 64) { reverse<false>(args); }
TP_KERNEL(overflow, FillArgs, 64) { ((float*)args.y.data)[threadIdx.x + 1] = args.value; }
TP_KERNEL(shared_overflow, FillArgs, 64) {
    __shared__ float shared[63];
    shared[threadIdx.x] = args.value;
    ((float*)args.y.data)[threadIdx.x] = shared[threadIdx.x];
}

int main(int, char** argv) {
    std::vector<float> out(64);
    ggml_tp::FillArgs args{};
    args.y.data = reinterpret_cast<char*>(out.data());
    args.value = 1;
    const char* error = "no such kernel";
    const tp_emulator::Kernel* kernel = tp_emulator::find_kernel(argv[1], 600);
    if (!kernel || !tp_emulator::run(*kernel, {1, 1, 1}, {64, 1, 1}, 0, &args, &error)) return std::puts(error), 2;
    std::printf("%g %g\n", out[0], out[63]);
}
