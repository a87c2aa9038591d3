// The host's operations by name: its numbers drift between versions, its names do not.
#pragma once

namespace ggml_tp::abi {

// clang-format off
#define GGML_TP_OPS(X)                                                                                                             \
    X(NONE) X(DUP) X(ADD) X(SUB) X(MUL) X(DIV) X(SQR) X(SQRT) X(NORM) X(RMS_NORM) X(MUL_MAT) X(SCALE) X(CPY) X(CONT) X(RESHAPE)     \
    X(VIEW) X(PERMUTE) X(TRANSPOSE) X(GET_ROWS) X(SET_ROWS) X(SOFT_MAX) X(ROPE) X(CLAMP) X(FLASH_ATTN_EXT) X(UNARY) X(GLU)         \
    X(ROPE_BACK) X(LOG) X(SIN) X(COS) X(LEAKY_RELU) X(MUL_MAT_ID) X(ADD_ID) X(ARGSORT) X(TOP_K) X(SUM_ROWS) X(FILL) X(ADD1) \
    X(ACC) X(SET) X(SUM) X(MEAN) X(CUMSUM) X(ARGMAX) X(REPEAT) X(CONCAT) X(PAD) X(ROLL) X(ARANGE) X(TRI) X(DIAG) \
    X(DIAG_MASK_INF) X(L2_NORM) X(GROUP_NORM) X(SSM_CONV) X(SSM_SCAN) X(GATED_DELTA_NET) X(GATED_LINEAR_ATTN) X(RWKV_WKV6) \
    X(RWKV_WKV7) X(SOLVE_TRI) X(OUT_PROD) X(LIGHTNING_INDEXER) X(DSV4_HC_COMB) X(DSV4_HC_PRE) X(DSV4_HC_POST)
#define GGML_TP_UNARIES(X)                                                                                                         \
    X(ABS) X(SGN) X(NEG) X(STEP) X(TANH) X(ELU) X(RELU) X(SIGMOID) X(GELU) X(GELU_QUICK) X(SILU) X(HARDSWISH) X(HARDSIGMOID)       \
    X(EXP) X(EXPM1) X(SOFTPLUS) X(GELU_ERF) X(XIELU) X(FLOOR) X(CEIL) X(ROUND) X(TRUNC)
#define GGML_TP_GLUS(X) X(REGLU) X(GEGLU) X(SWIGLU) X(SWIGLU_OAI) X(GEGLU_ERF) X(GEGLU_QUICK) X(SWIGLU_CLAMP)
// clang-format on

#define GGML_TP_ENUMERATOR(name) name,
enum class Op { GGML_TP_OPS(GGML_TP_ENUMERATOR) UNKNOWN };
enum class Unary { GGML_TP_UNARIES(GGML_TP_ENUMERATOR) UNKNOWN };
enum class Glu { GGML_TP_GLUS(GGML_TP_ENUMERATOR) UNKNOWN };
#undef GGML_TP_ENUMERATOR

const char* op_name(Op op);
Op op_from_name(const char* name);
Unary unary_from_name(const char* name);
Glu glu_from_name(const char* name);

}  // namespace ggml_tp::abi
