// An expert's number, checked.
#pragma once
#include "tp.h"

namespace ggml_tp {

/// The expert of slot j of token t; -1, and a fault, where there is none of this number.
TP_DEVICE i64 expert_of(const View& ids, i64 j, i64 t, i64 n_expert, u32* fault) {
    const i32 expert = *(const i32*)(ids.data + j * ids.nb[0] + t * ids.nb[1]);
    if (expert >= 0 && expert < n_expert) return expert;
    atomicExch(fault, (u32)kFaultExpert);
    return -1;
}

}  // namespace ggml_tp
