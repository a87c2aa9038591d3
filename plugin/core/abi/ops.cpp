#include "ops.h"

#include <cstring>

namespace ggml_tp::abi {
namespace {

#define GGML_TP_STRING(name) #name,
constexpr const char* kOps[] = {GGML_TP_OPS(GGML_TP_STRING) "UNKNOWN"};
constexpr const char* kUnaries[] = {GGML_TP_UNARIES(GGML_TP_STRING) "UNKNOWN"};
constexpr const char* kGlus[] = {GGML_TP_GLUS(GGML_TP_STRING) "UNKNOWN"};

template <int n>
int find(const char* const (&names)[n], const char* name) {
    for (int i = 0; i < n - 1; ++i)
        if (!std::strcmp(names[i], name)) return i;
    return n - 1;
}

}  // namespace

const char* op_name(Op op) { return kOps[static_cast<int>(op)]; }
Op op_from_name(const char* name) { return static_cast<Op>(find(kOps, name)); }
Unary unary_from_name(const char* name) { return static_cast<Unary>(find(kUnaries, name)); }
Glu glu_from_name(const char* name) { return static_cast<Glu>(find(kGlus, name)); }

}  // namespace ggml_tp::abi
