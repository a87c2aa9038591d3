// An expert's number, checked.
#pragma once
#include "tp.h"

namespace ggml_tp {

/// The expert of slot j of token t; -1, and a fault, where there is none of this number. Without numbers: entries take all matrices in turn.
TP_DEVICE i64 expert_of(const View& ids, i64 j, i64 t, i64 n_expert, u32* fault) {
    if (!ids.data) return (i64)((u32)(t * ids.ne[0] + j) % (u32)n_expert);
    const i32 expert = *(const i32*)(ids.data + j * ids.nb[0] + t * ids.nb[1]);
    if (expert >= 0 && expert < n_expert) return expert;
    atomicExch(fault, (u32)kFaultExpert);
    return -1;
}

}  // namespace ggml_tp
