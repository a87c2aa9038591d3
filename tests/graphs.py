"""Single-op graphs through a host's ggml API, on its CPU and on TP0: what upstream's test-backend-ops does, without building it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import cffi
import numpy as np

_CDEF = """
typedef struct { size_t mem_size; void *mem_buffer; bool no_alloc; } ggml_init_params;
typedef void *ctx; typedef void *tensor; typedef const char *name_t;
ctx ggml_init(ggml_init_params params); void ggml_free(ctx c);
tensor ggml_new_tensor_4d(ctx c, int type, int64_t a, int64_t b, int64_t d, int64_t e);
tensor ggml_set_name(tensor t, name_t name); void ggml_set_output(tensor t); void ggml_set_input(tensor t);
size_t ggml_nbytes(tensor t); size_t ggml_row_size(int type, int64_t ne); int64_t ggml_nelements(tensor t);
size_t ggml_quantize_chunk(int type, const float *src, void *dst, int64_t start, int64_t rows, int64_t per_row, const float *imatrix);
bool ggml_quantize_requires_imatrix(int type);
void *ggml_backend_get_default_buffer_type(void *backend); void *ggml_gallocr_new(void *buft); void ggml_gallocr_free(void *allocator);
bool ggml_gallocr_alloc_graph(void *allocator, void *graph);
tensor ggml_mul_mat(ctx c, tensor a, tensor b); tensor ggml_add(ctx c, tensor a, tensor b); tensor ggml_sub(ctx c, tensor a, tensor b);
tensor ggml_mul(ctx c, tensor a, tensor b); tensor ggml_mul_inplace(ctx c, tensor a, tensor b); tensor ggml_div(ctx c, tensor a, tensor b);
tensor ggml_scale_bias(ctx c, tensor a, float s, float b);
tensor ggml_clamp(ctx c, tensor a, float lo, float hi); tensor ggml_sqr(ctx c, tensor a); tensor ggml_sqrt(ctx c, tensor a); tensor ggml_sin(ctx c, tensor a);
tensor ggml_silu(ctx c, tensor a); tensor ggml_gelu(ctx c, tensor a); tensor ggml_relu(ctx c, tensor a); tensor ggml_sigmoid(ctx c, tensor a);
tensor ggml_gelu_quick(ctx c, tensor a); tensor ggml_tanh(ctx c, tensor a); tensor ggml_neg(ctx c, tensor a); tensor ggml_abs(ctx c, tensor a);
tensor ggml_exp(ctx c, tensor a); tensor ggml_sgn(ctx c, tensor a); tensor ggml_step(ctx c, tensor a); tensor ggml_elu(ctx c, tensor a);
tensor ggml_hardswish(ctx c, tensor a); tensor ggml_hardsigmoid(ctx c, tensor a); tensor ggml_expm1(ctx c, tensor a); tensor ggml_softplus(ctx c, tensor a);
tensor ggml_gelu_erf(ctx c, tensor a); tensor ggml_xielu(ctx c, tensor a, float n, float p, float beta, float eps); tensor ggml_floor(ctx c, tensor a);
tensor ggml_ceil(ctx c, tensor a); tensor ggml_round(ctx c, tensor a); tensor ggml_trunc(ctx c, tensor a); tensor ggml_log(ctx c, tensor a);
tensor ggml_cos(ctx c, tensor a); tensor ggml_leaky_relu(ctx c, tensor a, float slope, bool inplace);
tensor ggml_swiglu_oai(ctx c, tensor a, tensor b, float alpha, float limit); tensor ggml_pool_1d(ctx c, tensor a, int op, int k, int s, int p);
tensor ggml_rope_multi(ctx c, tensor a, tensor pos, tensor factors, int n_dims, int sections[4], int mode, int n_ctx_orig, float base, float scale, float ext,
                       float attn, float fast, float slow);
tensor ggml_rope_ext_back(ctx c, tensor a, tensor pos, tensor factors, int n_dims, int mode, int n_ctx_orig, float base, float scale, float ext, float attn,
                          float fast, float slow);
tensor ggml_cast(ctx c, tensor a, int type); tensor ggml_add1(ctx c, tensor a, tensor b); tensor ggml_sum(ctx c, tensor a);
tensor ggml_acc(ctx c, tensor a, tensor b, size_t nb1, size_t nb2, size_t nb3, size_t offset); tensor ggml_mean(ctx c, tensor a);
tensor ggml_set(ctx c, tensor a, tensor b, size_t nb1, size_t nb2, size_t nb3, size_t offset); tensor ggml_cumsum(ctx c, tensor a);
tensor ggml_argmax(ctx c, tensor a); tensor ggml_l2_norm(ctx c, tensor a, float eps); tensor ggml_group_norm(ctx c, tensor a, int groups, float eps);
tensor ggml_repeat_4d(ctx c, tensor a, int64_t p, int64_t q, int64_t r, int64_t s); tensor ggml_concat(ctx c, tensor a, tensor b, int dim);
tensor ggml_pad(ctx c, tensor a, int p, int q, int r, int s); tensor ggml_roll(ctx c, tensor a, int p, int q, int r, int s);
tensor ggml_arange(ctx c, float start, float stop, float step); tensor ggml_fill(ctx c, tensor a, float value); tensor ggml_tri(ctx c, tensor a, int type);
tensor ggml_diag(ctx c, tensor a); tensor ggml_diag_mask_inf(ctx c, tensor a, int n_past); tensor ggml_out_prod(ctx c, tensor a, tensor b);
tensor ggml_ssm_conv(ctx c, tensor x, tensor w); tensor ggml_solve_tri(ctx c, tensor a, tensor b, bool left, bool lower, bool unit);
tensor ggml_ssm_scan(ctx c, tensor s, tensor x, tensor dt, tensor a, tensor b, tensor k, tensor ids, int64_t snapshots);
tensor ggml_gated_delta_net(ctx c, tensor q, tensor k, tensor v, tensor g, tensor beta, tensor state, int64_t snapshots);
tensor ggml_gated_linear_attn(ctx c, tensor k, tensor v, tensor q, tensor g, tensor state, float scale);
tensor ggml_rwkv_wkv6(ctx c, tensor k, tensor v, tensor r, tensor tf, tensor td, tensor state);
tensor ggml_rwkv_wkv7(ctx c, tensor r, tensor w, tensor k, tensor v, tensor a, tensor b, tensor state);
tensor ggml_glu(ctx c, tensor a, int op, bool swapped); tensor ggml_glu_split(ctx c, tensor a, tensor b, int op);
tensor ggml_rms_norm(ctx c, tensor a, float eps); tensor ggml_norm(ctx c, tensor a, float eps);
tensor ggml_get_rows(ctx c, tensor a, tensor b); tensor ggml_set_rows(ctx c, tensor a, tensor b, tensor idx);
tensor ggml_cpy(ctx c, tensor a, tensor b); tensor ggml_cont(ctx c, tensor a); tensor ggml_cont_4d(ctx c, tensor a, int64_t p, int64_t q, int64_t r, int64_t s);
tensor ggml_reshape_2d(ctx c, tensor a, int64_t ne0, int64_t ne1);
tensor ggml_permute(ctx c, tensor a, int p, int q, int r, int s); tensor ggml_transpose(ctx c, tensor a);
tensor ggml_view_4d(ctx c, tensor a, int64_t p, int64_t q, int64_t r, int64_t s, size_t nb1, size_t nb2, size_t nb3, size_t offset);
tensor ggml_rope_ext(ctx c, tensor a, tensor pos, tensor factors, int n_dims, int mode, int n_ctx_orig, float base, float scale, float ext, float attn,
                     float fast, float slow);
void ggml_rope_set_offset(tensor a, int n_offs);
tensor ggml_soft_max_ext(ctx c, tensor a, tensor mask, float scale, float max_bias); void ggml_soft_max_add_sinks(tensor a, tensor sinks);
tensor ggml_mul_mat_id(ctx c, tensor as, tensor b, tensor ids); tensor ggml_add_id(ctx c, tensor a, tensor b, tensor ids);
tensor ggml_argsort(ctx c, tensor a, int order); tensor ggml_top_k(ctx c, tensor a, int k); tensor ggml_sum_rows(ctx c, tensor a);
tensor ggml_reshape_3d(ctx c, tensor a, int64_t p, int64_t q, int64_t r);
tensor ggml_flash_attn_ext(ctx c, tensor q, tensor k, tensor v, tensor mask, float scale, float max_bias, float softcap);
void ggml_flash_attn_ext_add_sinks(tensor a, tensor sinks);
void *ggml_new_graph(ctx c); void ggml_build_forward_expand(void *graph, tensor t);
size_t ggml_backend_dev_count(void); void *ggml_backend_dev_get(size_t i); int ggml_backend_dev_type(void *dev);
void *ggml_backend_dev_by_name(name_t name); void *ggml_backend_dev_init(void *dev, name_t params); void ggml_backend_free(void *backend);
bool ggml_backend_dev_supports_op(void *dev, tensor op);
void *ggml_backend_alloc_ctx_tensors(ctx c, void *backend); void ggml_backend_buffer_free(void *buffer);
void ggml_backend_tensor_set(tensor t, const void *data, size_t offset, size_t size);
void ggml_backend_tensor_get(tensor t, void *data, size_t offset, size_t size);
void ggml_backend_tensor_copy(tensor source, tensor target);
int ggml_backend_graph_compute(void *backend, void *graph);
"""

F32, F16, Q4_0, Q8_0, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_XS, I32, I64, BF16 = 0, 1, 2, 8, 11, 12, 13, 14, 23, 26, 27, 30
NAMES = {F32: "F32", F16: "F16", Q4_0: "Q4_0", Q8_0: "Q8_0", Q4_K: "Q4_K", Q6_K: "Q6_K", BF16: "BF16"}
# Types that have not all of the cases: most are read in wide words (weight_format.h, has_pieces), the others element by element.
OTHER_TYPES = {
    3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 10: "Q2_K", 11: "Q3_K", 13: "Q5_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL",
    21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
    41: "Q1_0", 42: "Q2_0",
}  # fmt: skip
FEW_TYPES = {3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 10: "Q2_K", 11: "Q3_K", 13: "Q5_K", 20: "IQ4_NL", 23: "IQ4_XS", 39: "MXFP4"}  # of those, what mul_few has
BLOCKS_OF_32 = ("Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "MXFP4")
# Types whose encoders search among scales.
SEARCHED = {10: "Q2_K", 11: "Q3_K", Q4_K: "Q4_K", 13: "Q5_K", Q6_K: "Q6_K", IQ4_XS: "IQ4_XS"}
_CPU = 0


class Ggml:
    def __init__(self, library: str | os.PathLike[str], on_device: bool, device: str = "TP0") -> None:
        self.ffi = cffi.FFI()
        self.ffi.cdef(_CDEF)
        self.lib: Any = self.ffi.dlopen(os.fspath(library))
        if on_device:
            self.device = self.lib.ggml_backend_dev_by_name(device.encode())
        else:
            devices = [self.lib.ggml_backend_dev_get(i) for i in range(self.lib.ggml_backend_dev_count())]
            self.device = next(d for d in devices if self.lib.ggml_backend_dev_type(d) == _CPU)
        self.backend = self.lib.ggml_backend_dev_init(self.device, self.ffi.NULL)

    def close(self) -> None:
        self.lib.ggml_backend_free(self.backend)


class Case:
    """One graph: leaves with fixed random contents, which are stored, then ops, whose results lie in a compute buffer as a host's do: only there may
    ranks divide them, and the weights with them. `run` gives (status, the output as f32)."""

    def __init__(self, ggml: Ggml, seed: int = 0) -> None:
        self.ggml, self.lib, self.null = ggml, ggml.lib, ggml.ffi.NULL
        self.stored = self.lib.ggml_init([1 << 20, self.null, True])
        self.c = self.lib.ggml_init([16 << 20, self.null, True])
        self.rng = np.random.default_rng(seed)
        self.leaves: list[tuple[Any, bytes]] = []
        self.early: list[Any] = []  # tensors of the graph that come before all else
        self.inner: Any = None  # a tensor of the graph that `run` reads too, into inner_value: F32
        self.inner_value = np.zeros(0, np.float32)

    def leaf(self, type_: int, *ne: int, scale: float = 1.0, name: str = "", values: np.ndarray | None = None) -> Any:
        ne = (*ne, 1, 1, 1, 1)[:4]
        tensor = self.lib.ggml_new_tensor_4d(self.stored, type_, *ne)
        if name:
            self.lib.ggml_set_name(tensor, name.encode())
        shape = ne[::-1]
        if values is None:
            values = self.rng.normal(0, scale, shape).astype(np.float32)
        self.leaves.append((tensor, self._encode(type_, values.reshape(shape))))
        return tensor

    def _encode(self, type_: int, values: np.ndarray) -> bytes:
        if type_ in (I32, I64):
            return values.astype(np.int32 if type_ == I32 else np.int64).tobytes()
        if type_ == F32:
            return values.astype(np.float32).tobytes()
        flat = np.ascontiguousarray(values, np.float32)
        rows, per_row = flat.size // flat.shape[-1], flat.shape[-1]
        out = self.ggml.ffi.new("char[]", self.lib.ggml_row_size(type_, per_row) * rows)
        alike = np.ones(per_row, np.float32)  # some types cannot do without an importance matrix
        importance = self.ggml.ffi.from_buffer("float *", alike) if self.lib.ggml_quantize_requires_imatrix(type_) else self.null
        self.lib.ggml_quantize_chunk(type_, self.ggml.ffi.from_buffer("float *", flat), out, 0, rows, per_row, importance)
        return bytes(self.ggml.ffi.buffer(out))

    def indices(self, *values: int, type_: int = I32) -> Any:
        return self.leaf(type_, len(values), values=np.array(values))

    def store(self) -> Any:
        """The buffer of all leaves, which have their contents then; null if there are none."""
        buffer = self.lib.ggml_backend_alloc_ctx_tensors(self.stored, self.ggml.backend) if self.leaves else self.null
        assert buffer != self.null or not self.leaves
        for tensor, data in self.leaves:
            self.lib.ggml_backend_tensor_set(tensor, data, 0, len(data))
        return buffer

    def compute(self, outputs: list[Any]) -> tuple[int, list[bytearray]]:
        """The status and the outputs of a graph whose leaves are stored."""
        lib, allocator = self.lib, self.lib.ggml_gallocr_new(self.lib.ggml_backend_get_default_buffer_type(self.ggml.backend))
        graph, values = lib.ggml_new_graph(self.c), []
        for tensor in outputs:
            lib.ggml_set_output(tensor)
        for tensor in (*self.early, *outputs):
            lib.ggml_build_forward_expand(graph, tensor)
        assert lib.ggml_gallocr_alloc_graph(allocator, graph)
        status = lib.ggml_backend_graph_compute(self.ggml.backend, graph)
        for tensor in outputs:
            values.append(bytearray(lib.ggml_nbytes(tensor)))
            lib.ggml_backend_tensor_get(tensor, self.ggml.ffi.from_buffer(values[-1]), 0, len(values[-1]))
        lib.ggml_gallocr_free(allocator)
        return status, values

    def run(self, output: Any, type_: int | None = F32) -> tuple[int, np.ndarray]:
        """`type_`: of the output; None leaves it as bytes."""
        buffer = self.store()
        status, (raw, *inner) = self.compute([output] if self.inner is None else [output, self.inner])
        if inner:
            self.inner_value = np.frombuffer(inner[0], np.float32)
        self.lib.ggml_backend_buffer_free(buffer)
        self.lib.ggml_free(self.c)
        self.lib.ggml_free(self.stored)
        if type_ is None:
            return status, np.frombuffer(raw, np.uint8).astype(np.float32)
        if type_ == F16:
            return status, np.frombuffer(raw, np.float16).astype(np.float32)
        if type_ == BF16:
            return status, (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
        return status, np.frombuffer(raw, np.int32 if type_ == I32 else np.float32).astype(np.float32)


Build = Callable[[Case], Any]
CASES: dict[str, tuple[Build, int | None]] = {}


def case(name: str, type_: int | None = F32) -> Callable[[Build], Build]:
    def add(build: Build) -> Build:
        assert name not in CASES
        CASES[name] = (build, type_)
        return build

    return add


def heads_of_results(g: Case, type_: int, n: int, heads: int) -> Any:
    """What several products have come to is what each head's matrix multiplies: of a head 256 elements, beside others."""
    lib, k = g.lib, heads * 320
    x = g.leaf(F32, 1024)
    for i, rows in enumerate((1024, 1024, 1024, k)):
        x = lib.ggml_mul_mat(g.c, g.leaf(Q8_0, 1024, rows, scale=1 / 32, name=f"blk.{i}.attn_q.weight"), x)
    part = lib.ggml_view_4d(g.c, x, 256, 1, heads, 1, 320 * heads * 4, 320 * 4, 320 * heads * 4, 0)
    return lib.ggml_mul_mat(g.c, g.leaf(type_, 256, n, heads, scale=1 / 16, name="blk.0.attn_k_b.weight"), part)


def row_of_results(g: Case, k: int) -> Any:
    """What several products have come to is a matrix of one row."""
    lib, x = g.lib, g.leaf(F32, k)
    for i in range(5):
        x = lib.ggml_mul_mat(g.c, g.leaf(Q8_0, k, k, scale=k**-0.5, name=f"blk.{i}.attn_q.weight"), x)
    return lib.ggml_mul_mat(g.c, lib.ggml_add(g.c, x, g.leaf(F32, k)), x)


def residuals_of_one_product(g: Case, k: int) -> Any:
    """What a product's result is added to is what its norm has summed up."""
    lib, x = g.lib, g.leaf(F32, k)
    for i in range(8):
        residual = lib.ggml_add(g.c, x, g.leaf(F32, k))
        normed = lib.ggml_rms_norm(g.c, residual, 1e-5)
        x = lib.ggml_add(g.c, lib.ggml_mul_mat(g.c, g.leaf(Q8_0, k, k, scale=k**-0.5, name=f"blk.{i}.attn_q.weight"), normed), residual)
    return x


def of_heads(g: Case, type_: int, k: int, n: int, heads: int, m: int) -> Any:
    """Each head of a token has a matrix of its own; heads of a token lie side by side, as an attention wants them and leaves them."""
    weights = g.leaf(type_, k, n, heads, name="blk.0.attn_k_b.weight", scale=k**-0.5)
    return g.lib.ggml_mul_mat(g.c, weights, g.lib.ggml_permute(g.c, g.leaf(F32, k, heads, m), 0, 2, 1, 3))


def three_products(g: Case, type_: int, k: int, m: int) -> Any:
    """Q, K and V of different widths, one after the other, then side by side in one row."""
    x = g.leaf(F32, k, m)
    q, key, v = (
        g.lib.ggml_mul_mat(g.c, g.leaf(type_, k, n, scale=k**-0.5, name=f"blk.0.attn_{name}.weight"), x) for name, n in (("q", 200), ("k", 96), ("v", 72))
    )
    g.early += [q, key, v]
    return g.lib.ggml_concat(g.c, g.lib.ggml_concat(g.c, q, key, 0), v, 0)


def two_products(g: Case, type_: int, k: int, m: int) -> Any:
    """A tile of 128 rows each."""
    x = g.leaf(F32, k, m)
    a, b = (g.lib.ggml_mul_mat(g.c, g.leaf(type_, k, n, scale=k**-0.5, name=f"blk.0.ffn_{name}.weight"), x) for name, n in (("gate", 40), ("up", 30)))
    return g.lib.ggml_concat(g.c, a, b, 0)


def turned_and_stored(g: Case, type_: int, m: int, mode: int, cache: int = F16, bias: bool = False, read: bool = False) -> Any:
    """Q, K and V as a layer has them, in a host's order: its allocator puts turned keys where Q was. What is stored, and turned queries, side by side.
    read: at the end, also the products as they were."""
    lib, x, rows = g.lib, g.leaf(F32, 2304, m), g.leaf(I64, m, values=g.rng.permutation(m))

    def heads(name: str, n: int) -> Any:
        out = lib.ggml_mul_mat(g.c, g.leaf(type_, 2304, 64 * n, scale=1 / 48, name=f"blk.0.attn_{name}.weight"), x)
        return lib.ggml_reshape_3d(g.c, lib.ggml_add(g.c, out, g.leaf(F32, 64 * n)) if bias else out, 64, n, m)

    def turned(t: Any) -> Any:
        return lib.ggml_rope_ext(g.c, t, g.leaf(I32, m, values=np.arange(m)), g.null, 64, mode, 512, 10000.0, 1.0, 0.0, 1.0, 32.0, 1.0)

    q, k, v = heads("q", 4), heads("k", 2), heads("v", 2)
    g.early += [q, v, k]
    products = [q, k, v]
    q, k = turned(q), turned(k)
    g.early += [q, k]
    out = lib.ggml_reshape_2d(g.c, q, 256, m)
    for name, t in (("k", k), ("v", v)):
        stored = lib.ggml_set_rows(g.c, g.leaf(cache, 128, m, name=f"cache_{name}_l0"), lib.ggml_reshape_2d(g.c, t, 128, m), rows)
        g.early.append(stored)
        out = lib.ggml_concat(g.c, out, lib.ggml_cast(g.c, stored, F32), 0)
    for t, n in zip(products, (256, 128, 128), strict=True) if read else ():
        out = lib.ggml_concat(g.c, out, lib.ggml_reshape_2d(g.c, t, n, m), 0)
    return out


def normed_product(g: Case, type_: int, m: int, residual: str, read: bool = False, alone: bool = False) -> Any:
    """A product, what is added to it (in front of it or behind, or nothing), a norm, and a product of that. The sum is read at the end, unless the norm alone
    reads it; read: the product too."""
    lib, x = g.lib, g.leaf(F32, 2304, m)
    out = first = lib.ggml_mul_mat(g.c, g.leaf(type_, 2304, 256, scale=1 / 48, name="blk.0.attn_output.weight"), x)
    if residual:
        more = lib.ggml_scale_bias(g.c, g.leaf(F32, 256, m), 0.5, 0.0)
        g.early.append(more)
        out = lib.ggml_add(g.c, more, out) if residual == "in front" else lib.ggml_add(g.c, out, more)
    normed = lib.ggml_mul(g.c, lib.ggml_rms_norm(g.c, out, 1e-5), g.leaf(F32, 256))
    up = lib.ggml_mul_mat(g.c, g.leaf(type_, 256, 96, scale=1 / 16, name="blk.0.ffn_up.weight"), normed)
    parts = [out, first] if read else [] if alone else [out]
    for part in parts:
        up = lib.ggml_concat(g.c, up, part, 0)
    return up


def feed_forward(g: Case, type_: int, k: int, n: int, m: int, read: bool = False, up_first: bool = False) -> Any:
    """Norm, gate and up, GLU, down: what is fused around the products. read: at the end, also gate and up. up_first: a graph that has it before gate."""

    def weight(name: str, *ne: int) -> Any:
        return g.leaf(type_, *ne, scale=ne[0] ** -0.5, name=f"blk.0.ffn_{name}.weight")

    x = g.lib.ggml_rms_norm(g.c, g.leaf(F32, k, m), 1e-5)
    gate, up = (g.lib.ggml_mul_mat(g.c, weight(name, k, n), x) for name in ("gate", "up"))
    g.early += [up] if up_first else []
    down = g.lib.ggml_mul_mat(g.c, weight("down", n, k), g.lib.ggml_glu_split(g.c, gate, up, 2))
    for part in (gate, up) if read else ():
        down = g.lib.ggml_concat(g.c, down, part, 0)
    return down


def _mul_mats() -> None:
    for type_ in (Q4_0, Q8_0, Q4_K, Q6_K):
        for n, heads in ((76, 20), (64, 7), (40, 34)):  # groups of ten heads; all in one; of two, and rows that end within a tile
            if type_ == Q6_K and heads == 20:
                continue  # four rows of its scales are no multiple of 16 bytes
            case(f"mul_mat {NAMES[type_]}, then each of {heads} heads {n}")(lambda g, t=type_, n=n, h=heads: heads_of_results(g, t, n, h))
    case("mul_mat Q8_0, then a row that they have come to")(lambda g: row_of_results(g, 1024))
    case("mul_mat Q8_0, then what its norm has summed up")(lambda g: residuals_of_one_product(g, 1024))
    case("mul_mat Q8_0, a matrix for each of 128 heads, 520 tokens: more rows than a grid's second axis")(lambda g: of_heads(g, Q8_0, 32, 16, 128, 520))
    for t in NAMES:
        for m in (1, 2, 3, 8, 11, 17, 70):
            case(f"mul_mat {NAMES[t]} 256x37 m{m}")(lambda g, t=t, m=m: g.lib.ggml_mul_mat(g.c, g.leaf(t, 256, 37, scale=1 / 16), g.leaf(F32, 256, m)))
        # A name gives the layout in planes and the division: columns, or rows (a sum of Partials; of 512, cut inside blocks of 256 at 3 ranks).
        for name in ("attn_q", "attn_output"):
            for m in (1, 2, 6, 7, 33, 130):
                case(f"mul_mat {NAMES[t]} {name} m{m}")(
                    lambda g, t=t, m=m, name=name: g.lib.ggml_mul_mat(g.c, g.leaf(t, 512, 192, scale=1 / 22, name=f"blk.0.{name}.weight"), g.leaf(F32, 512, m))
                )
        # No multiples of a tile: rows, columns, and where blocks allow it k.
        k = {F16: 328, BF16: 328, Q4_0: 288, Q8_0: 288}.get(t, 768)
        for name in ("attn_q", "attn_output"):
            for m in (12, 40, 300):
                case(f"mul_mat {NAMES[t]} {name} {k}x200 m{m}")(
                    lambda g, t=t, m=m, k=k, name=name: g.lib.ggml_mul_mat(g.c, g.leaf(t, k, 200, scale=1 / 18, name=f"blk.0.{name}.weight"), g.leaf(F32, k, m))
                )
        for heads, m in ((20, 1), (34, 1), (5, 3), (6, 40)):
            case(f"mul_mat {NAMES[t]}, a matrix for each of {heads} heads, m{m}")(lambda g, t=t, h=heads, m=m: of_heads(g, t, 256, 70, h, m))
        case(f"mul_mat {NAMES[t]} of a feed-forward network m150")(lambda g, t=t: feed_forward(g, t, 256, 512, 150))
        case(f"mul_mat {NAMES[t]}, three of one input m150")(lambda g, t=t: three_products(g, t, 256, 150))
        case(f"mul_mat {NAMES[t]} 2304x150, k in pieces, m12")(
            lambda g, t=t: g.lib.ggml_mul_mat(g.c, g.leaf(t, 2304, 150, scale=1 / 48, name="blk.0.attn_q.weight"), g.leaf(F32, 2304, 12))
        )
        if t in (Q4_0, Q8_0, Q4_K, Q6_K, F16, BF16):  # which tiles of many columns multiply without a copy
            case(f"mul_mat {NAMES[t]} 2304x150, k in pieces, m100")(
                lambda g, t=t: g.lib.ggml_mul_mat(g.c, g.leaf(t, 2304, 150, scale=1 / 48, name="blk.0.attn_q.weight"), g.leaf(F32, 2304, 100))
            )
            case(f"mul_mat {NAMES[t]}, two of one input, k in pieces, m70")(lambda g, t=t: two_products(g, t, 2304, 70))
        case(f"mul_mat {NAMES[t]} of a feed-forward network m40")(lambda g, t=t: feed_forward(g, t, 768, 1280, 40))
        case(f"mul_mat {NAMES[t]}, three of one input m20")(lambda g, t=t: three_products(g, t, 1280, 20))
        case(f"mul_mat {NAMES[t]} broadcast")(lambda g, t=t: g.lib.ggml_mul_mat(g.c, g.leaf(t, 256, 16, 2, 1, scale=1 / 16), g.leaf(F32, 256, 3, 4, 2)))
        case(f"get_rows {NAMES[t]}")(lambda g, t=t: g.lib.ggml_get_rows(g.c, g.leaf(t, 256, 9), g.indices(8, 0, 3, 3)))
        case(f"get_rows of a matrix in planes {NAMES[t]}")(
            lambda g, t=t: g.lib.ggml_get_rows(g.c, g.leaf(t, 256, 9, name="blk.0.ffn_norm.weight"), g.indices(8, 0, 3, 3))
        )
    for t, name in OTHER_TYPES.items():
        for m in (1, 11, 33):
            case(f"mul_mat {name} 256x37 m{m}")(lambda g, t=t, m=m: g.lib.ggml_mul_mat(g.c, g.leaf(t, 256, 37, scale=1 / 16), g.leaf(F32, 256, m)))
        for role, m in (("attn_q", 3), ("attn_output", 1), ("attn_output", 40)):
            case(f"mul_mat {name} {role} m{m}")(
                lambda g, t=t, m=m, role=role: g.lib.ggml_mul_mat(g.c, g.leaf(t, 768, 96, scale=1 / 28, name=f"blk.0.{role}.weight"), g.leaf(F32, 768, m))
            )
        if name in BLOCKS_OF_32:  # half a step of tensor cores' tiles at the end
            case(f"mul_mat {name} attn_output 288x200 m40")(
                lambda g, t=t: g.lib.ggml_mul_mat(g.c, g.leaf(t, 288, 200, scale=1 / 17, name="blk.0.attn_output.weight"), g.leaf(F32, 288, 40))
            )
        case(f"mul_mat {name} broadcast")(lambda g, t=t: g.lib.ggml_mul_mat(g.c, g.leaf(t, 256, 16, 2, 1, scale=1 / 16), g.leaf(F32, 256, 3, 4, 2)))
        case(f"get_rows {name}")(lambda g, t=t: g.lib.ggml_get_rows(g.c, g.leaf(t, 512, 9), g.indices(8, 0, 3, 3)))
    for t, name in FEW_TYPES.items():
        # 288 and 384 weights have 9 and 12 bytes of MXFP4's scales: copied one by one, and in words of which the last is not there.
        for k in (288, 384) if name in BLOCKS_OF_32 else (768,):
            for role, m in (("attn_q", 7), ("attn_q", 12), ("attn_output", 12), ("attn_q", 20), ("attn_q", 40)):
                case(f"mul_mat {name} {role} {k}x200 m{m}, few columns")(
                    lambda g, t=t, m=m, k=k, role=role: g.lib.ggml_mul_mat(g.c, g.leaf(t, k, 200, scale=1 / 18, name=f"blk.0.{role}.weight"), g.leaf(F32, k, m))
                )
        case(f"mul_mat {name} 2304x150, k in pieces, m12")(
            lambda g, t=t: g.lib.ggml_mul_mat(g.c, g.leaf(t, 2304, 150, scale=1 / 48, name="blk.0.attn_q.weight"), g.leaf(F32, 2304, 12))
        )
        case(f"mul_mat {name}, three of one input m20")(lambda g, t=t: three_products(g, t, 1280, 20))
    for m in (12, 40, 130):  # in pieces, which are added up where they are read
        for t in (Q4_0, Q4_K, BF16):
            case(f"mul_mat {NAMES[t]} of a feed-forward network in pieces m{m}")(lambda g, t=t, m=m: feed_forward(g, t, 2304, 256, m))
            for mode, name in ((0, "normal"), (2, "neox")):
                case(f"mul_mat {NAMES[t]}, Q, K and V turned and stored, {name}, m{m}")(lambda g, t=t, m=m, mode=mode: turned_and_stored(g, t, m, mode))
            for residual in ("in front", "behind", ""):
                case(f"mul_mat {NAMES[t]} and norm, residual {residual or 'none'}, m{m}")(lambda g, t=t, m=m, r=residual: normed_product(g, t, m, r))
            case(f"mul_mat {NAMES[t]} and norm alone, m{m}")(lambda g, t=t, m=m: normed_product(g, t, m, "", alone=True))
        case(f"mul_mat Q4_0 of a feed-forward network in pieces, up first, m{m}")(lambda g, m=m: feed_forward(g, Q4_0, 2304, 256, m, up_first=True))
        case(f"mul_mat Q4_0 of a feed-forward network in pieces, read again, m{m}")(lambda g, m=m: feed_forward(g, Q4_0, 2304, 256, m, True))
        case(f"mul_mat Q4_K and norm, the product read again, m{m}")(lambda g, m=m: normed_product(g, Q4_K, m, "behind", True))
        case(f"mul_mat Q4_0, Q, K and V turned and stored, read again, m{m}")(lambda g, m=m: turned_and_stored(g, Q4_0, m, 2, read=True))
        case(f"mul_mat Q4_0, Q, K and V with biases turned and stored, m{m}")(lambda g, m=m: turned_and_stored(g, Q4_0, m, 2, bias=True))
        case(f"mul_mat Q4_0, Q, K and V turned and stored in Q8_0, m{m}")(lambda g, m=m: turned_and_stored(g, Q4_0, m, 2, Q8_0))
    for t, name in ((Q3_K, "Q3_K"), (Q6_K, "Q6_K")):  # one block a row: their halves lie two bytes apart, as more than one a row are padded
        case(f"mul_mat {name} attn_q 256x200 m12")(
            lambda g, t=t: g.lib.ggml_mul_mat(g.c, g.leaf(t, 256, 200, scale=1 / 16, name="blk.0.attn_q.weight"), g.leaf(F32, 256, 12))
        )
    case("mul_mat Q4_0, a view of x's columns")(
        lambda g: g.lib.ggml_mul_mat(g.c, g.leaf(Q4_0, 64, 37), g.lib.ggml_view_4d(g.c, g.leaf(F32, 96, 5), 64, 5, 1, 1, 384, 1920, 1920, 128))
    )
    # K·Q and V·softmax without flash attention: the cache's rows are strided.
    case("mul_mat F16 permuted w, F32 x")(
        lambda g: g.lib.ggml_mul_mat(g.c, g.lib.ggml_permute(g.c, g.leaf(F16, 64, 4, 33), 0, 2, 1, 3), g.leaf(F32, 64, 5, 8))
    )
    for t in (F32, F16, BF16):
        case(f"mul_mat {NAMES[t]} permuted w, F32 x of 40 columns")(
            lambda g, t=t: g.lib.ggml_mul_mat(g.c, g.lib.ggml_permute(g.c, g.leaf(t, 72, 4, 45), 0, 2, 1, 3), g.leaf(F32, 72, 40, 8, 2))
        )
        case(f"mul_mat {NAMES[t]} w, permuted x of 33 columns")(
            lambda g, t=t: g.lib.ggml_mul_mat(g.c, g.leaf(t, 203, 34), g.lib.ggml_permute(g.c, g.leaf(F32, 203, 3, 33), 0, 2, 1, 3))
        )
    case("mul_mat F32 x permuted")(lambda g: g.lib.ggml_mul_mat(g.c, g.leaf(F32, 64, 7, 3), g.lib.ggml_permute(g.c, g.leaf(F32, 64, 3, 5), 0, 2, 1, 3)))
    case("mul_mat F16 x F16")(lambda g: g.lib.ggml_mul_mat(g.c, g.leaf(F16, 64, 7), g.leaf(F16, 64, 5)))


def _element_wise() -> None:
    for op in ("add", "sub", "mul", "div"):
        for b in ((70, 5, 3, 2), (70, 1, 1, 1), (70, 5, 1, 1), (1, 5, 3, 1), (35, 1, 3, 2)):
            case(f"{op} [70,5,3,2] by {list(b)}")(
                lambda g, op=op, b=b: getattr(g.lib, f"ggml_{op}")(g.c, g.leaf(F32, 70, 5, 3, 2), g.leaf(F32, *b, values=g.rng.uniform(0.5, 2, b[::-1])))
            )
    case("add F16", F16)(lambda g: g.lib.ggml_add(g.c, g.leaf(F16, 64, 3), g.leaf(F32, 64, 3)))
    case("scale and shift")(lambda g: g.lib.ggml_scale_bias(g.c, g.leaf(F32, 77, 3), 1.5, -0.25))
    case("clamp")(lambda g: g.lib.ggml_clamp(g.c, g.leaf(F32, 77, 3), -0.5, 0.75))
    case("sqr")(lambda g: g.lib.ggml_sqr(g.c, g.leaf(F32, 77, 3)))
    case("sqrt")(lambda g: g.lib.ggml_sqrt(g.c, g.leaf(F32, 77, 3, values=g.rng.uniform(0, 9, (3, 77)))))
    for op in ("silu", "gelu", "relu", "sigmoid", "gelu_quick", "tanh", "neg", "abs", "exp"):
        case(op)(lambda g, op=op: getattr(g.lib, f"ggml_{op}")(g.c, g.leaf(F32, 130, 3, scale=3)))
    for op in ("sgn", "step", "elu", "hardswish", "hardsigmoid", "expm1", "softplus", "gelu_erf", "floor", "ceil", "round", "trunc", "sin", "cos"):
        case(op)(lambda g, op=op: getattr(g.lib, f"ggml_{op}")(g.c, g.leaf(F32, 130, 3, scale=3)))
    case("log")(lambda g: g.lib.ggml_log(g.c, g.leaf(F32, 77, 3, values=g.rng.uniform(0.01, 9, (3, 77)))))
    case("leaky_relu")(lambda g: g.lib.ggml_leaky_relu(g.c, g.leaf(F32, 77, 3), 0.1, False))
    case("xielu")(lambda g: g.lib.ggml_xielu(g.c, g.leaf(F32, 77, 3, scale=3), 4.0, 20.0, 0.5, 1e-7))
    for number, op in ((0, "reglu"), (1, "geglu"), (2, "swiglu"), (4, "geglu_erf"), (5, "geglu_quick")):
        case(f"mul_mat Q8_0 of a {op}")(
            lambda g, n=number: g.lib.ggml_mul_mat(g.c, g.leaf(Q8_0, 96, 40, scale=0.1), g.lib.ggml_glu_split(g.c, g.leaf(F32, 96, 4), g.leaf(F32, 96, 4), n))
        )
        case(f"{op} of two")(lambda g, n=number: g.lib.ggml_glu_split(g.c, g.leaf(F32, 100, 4), g.leaf(F32, 100, 4), n))
        for swapped in (False, True):
            case(f"{op} of halves{', swapped' * swapped}")(lambda g, n=number, s=swapped: g.lib.ggml_glu(g.c, g.leaf(F32, 200, 4), n, s))


def _rows() -> None:
    for n in (5, 64, 256, 1000, 4096):
        case(f"rms_norm {n}")(lambda g, n=n: g.lib.ggml_rms_norm(g.c, g.leaf(F32, n, 3, 2), 1e-5))
        case(f"norm {n}")(lambda g, n=n: g.lib.ggml_norm(g.c, g.leaf(F32, n, 3, 2), 1e-5))
    case("rms_norm of a view")(
        lambda g: g.lib.ggml_rms_norm(g.c, g.lib.ggml_view_4d(g.c, g.leaf(F32, 96, 4, 3), 32, 4, 3, 1, 96 * 4, 96 * 16, 96 * 48, 128), 1e-5)
    )
    for to in (F32, F16, BF16):
        for index in (I32, I64):
            case(f"set_rows {NAMES[to]}, {'I32' if index == I32 else 'I64'}", to)(
                lambda g, to=to, index=index: g.lib.ggml_set_rows(g.c, g.leaf(to, 40, 9), g.leaf(F32, 40, 3), g.indices(8, 0, 5, type_=index))
            )
        for frm in (F32, F16, BF16):
            case(f"cpy {NAMES[frm]} to {NAMES[to]}", to)(lambda g, to=to, frm=frm: g.lib.ggml_cpy(g.c, g.leaf(frm, 40, 5, 2), g.leaf(to, 40, 5, 2)))
        case(f"cont of permuted {NAMES[to]}", to)(lambda g, to=to: g.lib.ggml_cont(g.c, g.lib.ggml_permute(g.c, g.leaf(to, 40, 5, 3), 1, 2, 0, 3)))
    for to, name in {Q4_0: "Q4_0", Q8_0: "Q8_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 20: "IQ4_NL", 35: "TQ2_0", 39: "MXFP4"}.items():
        case(f"cpy to {name} and back")(lambda g, to=to: g.lib.ggml_cast(g.c, g.lib.ggml_cast(g.c, g.leaf(F32, 768, 5, 2), to), F32))
        case(f"set_rows {name}")(
            lambda g, to=to: g.lib.ggml_cast(g.c, g.lib.ggml_set_rows(g.c, g.leaf(to, 768, 9), g.leaf(F32, 768, 3), g.indices(8, 0, 5, type_=I64)), F32)
        )
    for to, name in SEARCHED.items():
        case(f"cpy to searched {name} and back")(lambda g, to=to: g.lib.ggml_cast(g.c, g.lib.ggml_cast(g.c, g.leaf(F32, 768, 5, 2), to), F32))
        for frm in (F32, F16):
            case(f"set_rows searched {name} from {NAMES[frm]}")(lambda g, to=to, frm=frm: set_odd_rows(g, to, frm))
    case("cont of permuted Q8_0", None)(lambda g: g.lib.ggml_cont(g.c, g.lib.ggml_permute(g.c, g.leaf(Q8_0, 96, 5, 3), 0, 2, 1, 3)))
    case("cpy F32 to I32", I32)(lambda g: g.lib.ggml_cpy(g.c, g.leaf(F32, 70, 3, scale=100), g.leaf(I32, 70, 3, values=np.zeros(210))))
    case("cpy I32", I32)(lambda g: g.lib.ggml_cpy(g.c, g.indices(2**24 + 1, -5, 7), g.indices(0, 0, 0)))
    case("cont in another shape")(lambda g: g.lib.ggml_cont_4d(g.c, g.lib.ggml_permute(g.c, g.leaf(F32, 32, 4, 6), 0, 2, 1, 3), 128, 6, 1, 1))
    case("get_rows I32", I32)(lambda g: g.lib.ggml_get_rows(g.c, g.leaf(I32, 3, 4, values=np.arange(12) + 2**24 + 1), g.indices(3, 1)))


def odd_rows(g: Case, n: int) -> np.ndarray:
    """What encoders have branches for: groups of zeros, of one value, of one sign, next to nothing, an outlier, ties."""
    normal, ramp = g.rng.normal(0, 1, (4, n)), np.linspace(-1, 1, n)
    outlier, mixed, tiny = 0.01 * normal[1], normal[2].copy(), 1e-20 * normal[3]
    outlier[5::64], mixed[: n // 4], mixed[n // 2 : n // 2 + 16] = 8, 0, 1e-20
    return np.stack([normal[0], ramp, outlier, mixed, tiny, np.zeros(n), np.full(n, 0.7), np.full(n, -0.7), -np.abs(normal[1]), np.rint(8 * ramp) / 8])


def set_odd_rows(g: Case, to: int, frm: int) -> Any:
    rows = g.lib.ggml_set_rows(g.c, g.leaf(to, 512, 20), g.leaf(frm, 512, 10, values=odd_rows(g, 512)), g.indices(*range(1, 20, 2), type_=I64))
    return g.lib.ggml_cast(g.c, rows, F32)


def _ropes() -> None:
    def rope(g: Case, mode: int = 0, n_dims: int = 64, factors: bool = False, ext: float = 0.0, type_: int = F32) -> Any:
        f = g.leaf(F32, n_dims // 2, values=np.linspace(1, 8, n_dims // 2)) if factors else g.null
        pos = g.indices(0, 3, 100, 4000, 77)
        return g.lib.ggml_rope_ext(g.c, g.leaf(type_, 64, 6, 5), pos, f, n_dims, mode, 512, 10000.0, 0.25 if ext else 1.0, ext, 1.0, 32.0, 1.0)

    def offset(g: Case, tensor: Any) -> Any:
        g.lib.ggml_rope_set_offset(tensor, 16)
        return tensor

    def multi(g: Case, mode: int, n_dims: int = 64, sections: tuple[int, ...] = (12, 8, 8, 4), ext: float = 0.0) -> Any:
        pos = g.leaf(I32, 20, values=g.rng.integers(0, 900, 20))
        sections_ = g.ggml.ffi.new("int[4]", sections)
        return g.lib.ggml_rope_multi(g.c, g.leaf(F32, 64, 6, 5), pos, g.null, n_dims, sections_, mode, 512, 10000.0, 0.25 if ext else 1.0, ext, 1.0, 32.0, 1.0)

    for mode, name in ((8, "multi"), (40, "interleaved")):
        case(f"rope {name}")(lambda g, m=mode: multi(g, m))
        case(f"rope {name}, part of a head, YaRN")(lambda g, m=mode: multi(g, m, n_dims=48, ext=1.0))
    case("rope vision")(lambda g: multi(g, 24, n_dims=32, sections=(16, 16, 0, 0)))
    case("rope back")(
        lambda g: g.lib.ggml_rope_ext_back(
            g.c, g.leaf(F32, 64, 6, 5), g.indices(0, 3, 100, 4000, 77), g.null, 64, 2, 512, 10000.0, 1.0, 0.0, 1.0, 32.0, 1.0
        )
    )
    for mode, name in ((0, "normal"), (2, "neox")):
        case(f"rope {name}")(lambda g, m=mode: rope(g, m))
        case(f"rope {name}, part of a head")(lambda g, m=mode: rope(g, m, n_dims=32))
        case(f"rope {name}, factors")(lambda g, m=mode: rope(g, m, factors=True))
        case(f"rope {name}, YaRN")(lambda g, m=mode: rope(g, m, ext=1.0))
        case(f"rope {name}, from an offset")(lambda g, m=mode: offset(g, rope(g, m, n_dims=32)))
        case(f"rope {name}, F16", F16)(lambda g, m=mode: rope(g, m, type_=F16))

    # Heads that a thread turns one behind the other: 8 of 11 and the other 3, all 3, and 2 of 6 in a few tokens.
    def many(g: Case, mode: int = 0, heads: int = 11, tokens: int = 90, type_: int = F32, n_dims: int = 64) -> Any:
        x = g.leaf(type_, 64, heads, tokens)
        pos = g.leaf(I32, tokens, values=g.rng.integers(0, 4000, tokens))
        f = g.leaf(F32, n_dims // 2, values=np.linspace(1, 8, n_dims // 2))
        return g.lib.ggml_rope_ext(g.c, x, pos, f, n_dims, mode, 512, 10000.0, 0.25, 1.0, 1.0, 32.0, 1.0)

    def many_multi(g: Case, mode: int, tokens: int = 90) -> Any:
        pos = g.leaf(I32, 4 * tokens, values=g.rng.integers(0, 900, 4 * tokens))
        sections = g.ggml.ffi.new("int[4]", (12, 8, 8, 4))
        return g.lib.ggml_rope_multi(g.c, g.leaf(F32, 64, 11, tokens), pos, g.null, 64, sections, mode, 512, 10000.0, 1.0, 0.0, 1.0, 32.0, 1.0)

    def stored(g: Case, mode: int, tokens: int, heads: int = 11) -> Any:
        """Turned keys, and values, in rows of their caches, side by side: rope and stores are one kernel."""
        rows = g.leaf(I64, tokens, values=g.rng.permutation(tokens + 9)[:tokens])
        keys = g.lib.ggml_reshape_3d(g.c, many(g, mode, heads, tokens), 64 * heads, tokens, 1)
        values = g.leaf(F32, 64 * heads, tokens)
        caches = [g.lib.ggml_set_rows(g.c, g.leaf(F32, 64 * heads, tokens + 9), x, rows) for x in (keys, values)]
        return g.lib.ggml_concat(g.c, caches[0], caches[1], 0)

    for mode, name in ((0, "normal"), (2, "neox")):
        case(f"rope {name}, many tokens")(lambda g, m=mode: many(g, m))
        case(f"rope {name}, many tokens, part of a head")(lambda g, m=mode: many(g, m, n_dims=32))
        case(f"rope {name}, many tokens of three heads")(lambda g, m=mode: many(g, m, 3, 200))
        case(f"rope {name}, 22 tokens of six heads")(lambda g, m=mode: many(g, m, 6, 22))
        case(f"rope {name}, many tokens, F16", F16)(lambda g, m=mode: many(g, m, type_=F16))
        for tokens in (3, 22, 90):
            case(f"rope {name} and stores, {tokens} tokens")(lambda g, m=mode, n=tokens: stored(g, m, n))
    for mode, name in ((8, "multi"), (40, "interleaved")):
        case(f"rope {name}, many tokens")(lambda g, m=mode: many_multi(g, m))


def causal(n_kv: int, n_tokens: int) -> np.ndarray:
    return np.where(np.arange(n_kv)[None, :] <= np.arange(n_tokens)[:, None] + n_kv - n_tokens, 0.0, -np.inf).astype(np.float32)


def _attention() -> None:
    def soft_max(g: Case, n: int = 70, mask: int | None = None, max_bias: float = 0.0, sinks: bool = False) -> Any:
        m = g.null if mask is None else g.leaf(mask, n, 7, values=causal(n, 7))
        out = g.lib.ggml_soft_max_ext(g.c, g.leaf(F32, n, 7, 6, scale=3), m, 0.3, max_bias)
        if sinks:
            g.lib.ggml_soft_max_add_sinks(out, g.leaf(F32, 6))
        return out

    case("soft_max")(soft_max)
    case("soft_max, long")(lambda g: soft_max(g, n=3000))
    for mask in (F32, F16):
        case(f"soft_max, mask {NAMES[mask]}")(lambda g, m=mask: soft_max(g, mask=m))
        case(f"soft_max, mask {NAMES[mask]}, ALiBi")(lambda g, m=mask: soft_max(g, mask=m, max_bias=8.0))
    case("soft_max, sinks")(lambda g: soft_max(g, mask=F32, sinks=True))

    def flash(g: Case, d: int = 64, n_kv: int = 96, n_tokens: int = 3, heads: int = 6, kv_heads: int = 2, max_bias: float = 0.0, softcap: float = 0.0,
              sinks: bool = False, mask: bool = True, type_: int = F16, streams: int = 1, type_v: int | None = None,
              closed: tuple[int, int] = (0, 0), slanted: bool = False) -> Any:  # fmt: skip
        """`closed`: cells that no token sees, beyond what is causal; `slanted`: those that are seen have values, not 0."""
        q = g.leaf(F32, d, n_tokens, heads, streams)
        k, v = g.leaf(type_, d, n_kv, kv_heads, streams), g.leaf(type_ if type_v is None else type_v, d, n_kv, kv_heads, streams)
        values = np.broadcast_to(causal(n_kv, n_tokens), (streams, 1, n_tokens, n_kv)).copy()
        values[..., closed[0] : closed[1]] = -np.inf
        if slanted:
            values = values + g.rng.uniform(-2, 2, values.shape)
        m = g.leaf(F16, n_kv, n_tokens, 1, streams, values=values) if mask else g.null
        out = g.lib.ggml_flash_attn_ext(g.c, q, k, v, m, d**-0.5, max_bias, softcap)
        if sinks:
            g.lib.ggml_flash_attn_ext_add_sinks(out, g.leaf(F32, heads))
        return out

    def of_cache(g: Case, type_: int, heads: int, kv_heads: int, d: int = 64, n_kv: int = 96, n_tokens: int = 3, max_bias: float = 0.0) -> Any:
        """Keys and values as views of caches, which ranks divide by heads."""

        def view(name: str) -> Any:
            cache = g.leaf(type_, d * kv_heads, n_kv, name=name)
            head, row = g.lib.ggml_row_size(type_, d), g.lib.ggml_row_size(type_, d * kv_heads)
            return g.lib.ggml_permute(g.c, g.lib.ggml_view_4d(g.c, cache, d, kv_heads, n_kv, 1, head, row, row * n_kv, 0), 0, 2, 1, 3)

        mask = g.leaf(F16, n_kv, n_tokens, values=causal(n_kv, n_tokens))
        return g.lib.ggml_flash_attn_ext(g.c, g.leaf(F32, d, n_tokens, heads), view("cache_k_l0"), view("cache_v_l0"), mask, d**-0.5, max_bias, 0.0)

    def latent(g: Case, heads: int, n_tokens: int, n_kv: int, d: int = 576, dv: int = 512, softcap: float = 0.0, max_bias: float = 0.0, mask: bool = True,
               streams: int = 1, type_: int = F16, closed: tuple[int, int] = (0, 0), slanted: bool = False) -> Any:  # fmt: skip
        """All heads read one row of keys a cell, whose beginning is the values."""
        cache = g.leaf(type_, d, n_kv, 1, streams)
        row = g.lib.ggml_row_size(type_, d)
        v = g.lib.ggml_view_4d(g.c, cache, dv, n_kv, 1, streams, row, row * n_kv, row * n_kv, 0)
        values = np.broadcast_to(causal(n_kv, n_tokens), (streams, 1, n_tokens, n_kv)).copy()
        values[..., closed[0] : closed[1]] = -np.inf
        if slanted:
            values = values + g.rng.uniform(-2, 2, values.shape)
        m = g.leaf(F16, n_kv, n_tokens, 1, streams, values=values) if mask else g.null
        return g.lib.ggml_flash_attn_ext(g.c, g.leaf(F32, d, n_tokens, heads, streams), cache, v, m, d**-0.5, max_bias, softcap)

    def product(g: Case, type_: int, n_tokens: int) -> Any:
        """What follows attention: it leaves what the product reads."""
        out = of_cache(g, F16, 8, 4, n_kv=256, n_tokens=n_tokens)
        w = g.leaf(type_, 512, 96, scale=1 / 22, name="blk.0.attn_output.weight")
        return g.lib.ggml_mul_mat(g.c, w, g.lib.ggml_reshape_2d(g.c, out, 512, n_tokens))

    for type_ in (Q4_K, BF16):
        for n_tokens in (1, 2, 12, 40):
            case(f"mul_mat {NAMES[type_]} of attention of {n_tokens} tokens")(lambda g, t=type_, n=n_tokens: product(g, t, n))
    for kv_heads in (2, 3, 6):
        case(f"flash_attn of caches, {kv_heads} heads")(lambda g, n=kv_heads: of_cache(g, F16, 6, n))
        for type_, name in {Q8_0: "Q8_0", Q4_0: "Q4_0"}.items():
            case(f"flash_attn quantised caches, {name}, {kv_heads} heads")(lambda g, t=type_, n=kv_heads: of_cache(g, t, 6, n))
    case("set_rows Q8_0 into a divided cache")(
        lambda g: g.lib.ggml_cast(
            g.c, g.lib.ggml_set_rows(g.c, g.leaf(Q8_0, 192, 9, name="cache_k_l0"), g.leaf(F32, 192, 3), g.indices(8, 0, 5, type_=I64)), F32
        )
    )
    for d in (32, 64, 80, 96, 128, 256):
        case(f"flash_attn d{d}")(lambda g, d=d: flash(g, d))
    for n_tokens in (1, 2, 17, 40):
        case(f"flash_attn {n_tokens} tokens")(lambda g, n=n_tokens: flash(g, n_tokens=n, n_kv=256))
    for d in (32, 64, 80, 96, 112, 128):
        case(f"flash_attn d{d}, 70 tokens")(lambda g, d=d: flash(g, d, n_tokens=70, n_kv=256))
    for d in (192, 256):
        case(f"flash_attn d{d}, 70 tokens")(lambda g, d=d: flash(g, d, n_tokens=70, n_kv=136, heads=2, kv_heads=1))
    case("flash_attn, 70 tokens, odd number of cells")(lambda g: flash(g, n_tokens=70, n_kv=101))
    case("flash_attn, 70 tokens, no mask")(lambda g: flash(g, n_tokens=70, n_kv=101, mask=False))
    case("flash_attn, 70 tokens, ALiBi, softcap, sinks")(lambda g: flash(g, n_tokens=70, n_kv=128, max_bias=8.0, softcap=20.0, sinks=True))
    case("flash_attn, 130 tokens, two streams")(lambda g: flash(g, n_tokens=130, n_kv=160, streams=2))
    # Heads that share a block's K and V: 1, 2, 4 and 8 of one KV head, in blocks of four warps and of eight.
    for heads, kv_heads in ((3, 1), (9, 3), (4, 2), (8, 2), (8, 1)):
        case(f"flash_attn, 100 tokens, {heads} heads of {kv_heads}")(lambda g, h=heads, n=kv_heads: flash(g, n_tokens=100, n_kv=200, heads=h, kv_heads=n))
    # Whole steps, and whole windows of 32 steps, that nobody sees, in between.
    for d in (64, 128, 256):
        case(f"flash_attn d{d}, 100 tokens, steps closed between")(lambda g, d=d: flash(g, d, 400, 100, 2, 1, closed=(70, 280)))
    for d, cells in ((64, 64), (256, 32)):
        case(f"flash_attn d{d}, 70 tokens, windows closed between")(lambda g, d=d, n=cells: flash(g, d, 66 * n + 8, 70, 2, 1, closed=(100, 65 * n + 5)))
    case("flash_attn, 70 tokens, windows seen by all")(lambda g: flash(g, n_tokens=70, n_kv=35 * 64, heads=2, kv_heads=1))
    case("flash_attn, 100 tokens, some see nothing")(lambda g: flash(g, n_tokens=100, n_kv=40))
    case("flash_attn, 130 tokens, whole blocks see nothing")(lambda g: flash(g, n_tokens=130, n_kv=40, heads=8, kv_heads=1))
    case("flash_attn, 70 tokens, no mask, whole steps")(lambda g: flash(g, n_tokens=70, n_kv=128, mask=False))
    case("flash_attn, 70 tokens, a mask of any values")(lambda g: flash(g, 80, n_tokens=70, n_kv=200, slanted=True))
    case("flash_attn, 130 tokens, two streams, sinks, 4 heads of one KV head")(
        lambda g: flash(g, 128, n_tokens=130, n_kv=192, heads=4, kv_heads=1, streams=2, sinks=True, closed=(64, 128))
    )
    case("flash_attn d256, 70 tokens, softcap, sinks")(lambda g: flash(g, 256, n_tokens=70, n_kv=104, heads=4, softcap=30.0, sinks=True))
    for heads, kv_heads in ((6, 2), (6, 3), (8, 2), (8, 4), (12, 3)):
        case(f"flash_attn of caches, 70 tokens, {heads} heads of {kv_heads}")(
            lambda g, h=heads, n=kv_heads: of_cache(g, F16, h, n, n_kv=136, n_tokens=70, max_bias=8.0)
        )
    for heads, n_tokens, n_kv in ((20, 1, 256), (5, 1, 1400), (16, 3, 96), (128, 1, 136), (20, 9, 304), (1, 70, 128), (4, 40, 80)):
        case(f"flash_attn latent, {heads} heads, {n_tokens} tokens, {n_kv} cells")(lambda g, h=heads, t=n_tokens, n=n_kv: latent(g, h, t, n))
    for d, dv in ((96, 64), (320, 256), (136, 72)):
        for n_tokens in (1, 9):
            case(f"flash_attn latent of {dv} in {d}, {n_tokens} tokens")(lambda g, d=d, v=dv, t=n_tokens: latent(g, 8, t, 104, d, v))
    case("flash_attn latent, steps closed between")(lambda g: latent(g, 20, 4, 400, closed=(70, 280)))
    case("flash_attn latent, windows closed between")(lambda g: latent(g, 3, 24, 66 * 32 + 8, 96, 64, closed=(100, 65 * 32 + 5)))
    case("flash_attn latent, a mask of any values")(lambda g: latent(g, 6, 12, 208, slanted=True))
    case("flash_attn latent, no mask")(lambda g: latent(g, 20, 4, 101, mask=False))
    case("flash_attn latent, ALiBi, softcap")(lambda g: latent(g, 8, 10, 96, max_bias=8.0, softcap=20.0))
    case("flash_attn latent, two streams")(lambda g: latent(g, 20, 5, 160, streams=2))
    case("flash_attn latent, some see nothing")(lambda g: latent(g, 4, 60, 40))
    case("flash_attn quantised latent cache")(lambda g: latent(g, 8, 5, 96, type_=Q8_0))
    # Heads wider than 256: few rows of a KV head in the cells' pieces, and more in blocks of 32 and 64.
    for d, heads, kv_heads, n_tokens, n_kv in ((512, 8, 2, 1, 400), (512, 6, 2, 3, 101), (512, 8, 1, 9, 72), (264, 4, 2, 40, 72), (320, 3, 3, 70, 40)):
        case(f"flash_attn wide, d{d}, {heads} heads of {kv_heads}, {n_tokens} tokens")(
            lambda g, d=d, h=heads, n=kv_heads, t=n_tokens, c=n_kv: flash(g, d, c, t, h, n)
        )
    case("flash_attn wide, ALiBi, softcap, sinks")(lambda g: flash(g, 264, 72, 20, 4, 2, max_bias=8.0, softcap=20.0, sinks=True))
    case("flash_attn wide, 1 token, sinks, few cells")(lambda g: flash(g, 512, 40, 1, 4, 2, sinks=True))
    case("flash_attn wide, two streams, windows closed between")(lambda g: flash(g, 264, 66 * 32 + 8, 2, 2, 1, streams=2, closed=(100, 65 * 32 + 5)))
    case("flash_attn wide, some see nothing")(lambda g: flash(g, 264, 40, 60, 2, 1))
    case("flash_attn wide, a mask of any values")(lambda g: flash(g, 264, 104, 12, 6, 1, slanted=True))
    case("flash_attn wide, no mask")(lambda g: flash(g, 264, 101, 4, 8, 1, mask=False))
    for kv_heads in (1, 2):
        case(f"flash_attn wide, of caches, {kv_heads} heads")(lambda g, n=kv_heads: of_cache(g, F16, 8, n, 512))
        case(f"flash_attn quantised caches, wide, {kv_heads} heads, 20 tokens")(lambda g, n=kv_heads: of_cache(g, Q8_0, 4, n, 512, n_tokens=20))
    case("flash_attn 1 token, many cells")(lambda g: flash(g, d=128, n_tokens=1, n_kv=1536))
    case("flash_attn 1 token, cells of others between")(lambda g: flash(g, d=128, n_tokens=1, n_kv=1536, closed=(33, 1301)))
    case("flash_attn, 20 heads of one KV head")(lambda g: flash(g, heads=20, kv_heads=1))
    case("flash_attn, odd number of cells")(lambda g: flash(g, n_kv=101))
    case("flash_attn, no mask")(lambda g: flash(g, mask=False))
    case("flash_attn, ALiBi")(lambda g: flash(g, max_bias=8.0))
    case("flash_attn, a mask of any values")(lambda g: flash(g, slanted=True))
    case("flash_attn, a mask of any values, 1 token")(lambda g: flash(g, slanted=True, n_tokens=1, n_kv=512))
    case("flash_attn, softcap")(lambda g: flash(g, softcap=20.0))
    case("flash_attn, sinks")(lambda g: flash(g, sinks=True))
    case("flash_attn, sinks, 1 token")(lambda g: flash(g, sinks=True, n_tokens=1, n_kv=512))
    case("flash_attn, a KV head each")(lambda g: flash(g, kv_heads=6))
    case("flash_attn, two streams")(lambda g: flash(g, streams=2))
    case("flash_attn, F32 cache")(lambda g: flash(g, type_=F32))
    for type_, name in {Q4_0: "Q4_0", Q8_0: "Q8_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 20: "IQ4_NL"}.items():
        case(f"flash_attn quantised, {name}")(lambda g, t=type_: flash(g, type_=t))
    case("flash_attn quantised, 70 tokens, two streams")(lambda g: flash(g, type_=Q8_0, n_tokens=70, n_kv=128, streams=2))
    case("flash_attn quantised, K Q8_0 and V Q4_0")(lambda g: flash(g, type_=Q8_0, type_v=Q4_0))
    case("flash_attn, BF16 cache")(lambda g: flash(g, type_=BF16))


def expert_ids(g: Case, n_used: int, n_tokens: int, n_expert: int, of_all: bool = False) -> Any:
    """A view of the first rows of a sorted order, as routers make it: experts of a token are different, tokens are n_expert apart.

    of_all: every token's first is the last expert."""
    order = np.stack([g.rng.permutation(n_expert - of_all) for _ in range(n_tokens)])
    if of_all:
        order = np.hstack([np.full((n_tokens, 1), n_expert - 1), order])
    ids = g.leaf(I32, n_expert, n_tokens, values=order)
    return g.lib.ggml_view_4d(g.c, ids, n_used, n_tokens, 1, 1, n_expert * 4, n_expert * n_tokens * 4, n_expert * n_tokens * 4, 0)


def mul_mat_id(g: Case, type_: int, k: int, n: int, n_expert: int, n_used: int, n_tokens: int, name: str = "", x_rows: int = 1, of_all: bool = False) -> Any:
    w = g.leaf(type_, k, n, n_expert, scale=k**-0.5, name=name)
    return g.lib.ggml_mul_mat_id(g.c, w, g.leaf(F32, k, x_rows, n_tokens), expert_ids(g, n_used, n_tokens, n_expert, of_all))


def _experts() -> None:
    for t in NAMES:
        for n_tokens in (1, 2, 3, 17, 70):
            case(f"mul_mat_id {NAMES[t]} 256x37, {n_tokens} tokens")(lambda g, t=t, m=n_tokens: mul_mat_id(g, t, 256, 37, 5, 2, m))
        # Divided by columns, one input of all slots; by rows, cut inside blocks of 256 at 3 ranks, every slot with an input of its own.
        for name, n, x_rows in (("ffn_gate_exps", 192, 1), ("ffn_down_exps", 70, 4)):
            for n_tokens in (1, 5, 33, 130):
                case(f"mul_mat_id {NAMES[t]} {name}, {n_tokens} tokens")(
                    lambda g, t=t, m=n_tokens, name=name, n=n, x=x_rows: mul_mat_id(g, t, 512, n, 9, 4, m, f"blk.0.{name}.weight", x)
                )
        # More entries of one expert than a tile of few columns has: of 16, and where an expert has fewer on average of 8.
        for n_expert in (9, 12):
            case(f"mul_mat_id {NAMES[t]} of {n_expert}, an expert of all 20 tokens")(
                lambda g, t=t, n=n_expert: mul_mat_id(g, t, 512, 150, n, 2, 20, "blk.0.ffn_up_exps.weight", of_all=True)
            )
        case(f"mul_mat_id {NAMES[t]} more experts used than warps")(lambda g, t=t: mul_mat_id(g, t, 256, 37, 40, 18, 3, "blk.0.ffn_up_exps.weight"))
        case(f"mul_mat_id {NAMES[t]}, many tokens of few experts")(lambda g, t=t: mul_mat_id(g, t, 256, 200, 3, 2, 170, "blk.0.ffn_up_exps.weight"))
    for t, name in OTHER_TYPES.items():
        case(f"mul_mat_id {name} 256x37, 3 tokens")(lambda g, t=t: mul_mat_id(g, t, 256, 37, 5, 2, 3))
        # Enough tokens for tensor cores; rows cut inside blocks of 256 at 2 ranks.
        for role, n, x_rows, n_tokens in (("ffn_gate_exps", 96, 1, 2), ("ffn_up_exps", 96, 1, 33), ("ffn_down_exps", 70, 2, 33)):
            case(f"mul_mat_id {name} {role}, {n_tokens} tokens")(
                lambda g, t=t, m=n_tokens, role=role, n=n, x=x_rows: mul_mat_id(g, t, 768, n, 4, 2, m, f"blk.0.{role}.weight", x)
            )
    for t, name in FEW_TYPES.items():
        case(f"mul_mat_id {name} ffn_down_exps, 5 tokens")(lambda g, t=t: mul_mat_id(g, t, 512, 70, 9, 4, 5, "blk.0.ffn_down_exps.weight", 4))
        for n_expert in (9, 12):
            case(f"mul_mat_id {name} of {n_expert}, an expert of all 20 tokens")(
                lambda g, t=t, n=n_expert: mul_mat_id(g, t, 512, 150, n, 2, 20, "blk.0.ffn_up_exps.weight", of_all=True)
            )
    for t in (Q8_0, Q4_K):
        # Halves end at 65,504; the CPU makes halves of activations itself where weights are.
        case(f"mul_mat {NAMES[t]} of large activations, 40 tokens")(lambda g, t=t: g.lib.ggml_mul_mat(g.c, g.leaf(t, 512, 64), g.leaf(F32, 512, 40, scale=1e5)))
        case(f"mul_mat_id {NAMES[t]} of large activations, 40 tokens")(
            lambda g, t=t: g.lib.ggml_mul_mat_id(g.c, g.leaf(t, 512, 64, 4), g.leaf(F32, 512, 1, 40, scale=1e5), expert_ids(g, 2, 40, 4))
        )
    case("mul_mat_id F16 of an odd length")(lambda g: mul_mat_id(g, F16, 90, 37, 5, 2, 3, "blk.0.ffn_down_exps.weight", 2))
    for n_tokens in (3, 70):
        case(f"mul_mat F32 of a router, {n_tokens} tokens")(
            lambda g, m=n_tokens: g.lib.ggml_mul_mat(g.c, g.leaf(F32, 256, 37, scale=1 / 16, name="blk.0.ffn_gate_inp.weight"), g.leaf(F32, 256, m))
        )
    for order in (0, 1):
        for n in (2, 7, 128, 1000, 4096):
            case(f"argsort {n}, {'descending' if order else 'ascending'}", I32)(
                lambda g, n=n, order=order: g.lib.ggml_argsort(g.c, g.leaf(F32, n, 3, 2, values=g.rng.permutation(n * 6)), order)
            )

    for n, rows in ((1025, 520), (4097, 3), (40000, 2)):  # runs that are merged: two, in two goes, five, forty
        case(f"argsort {n}, long", I32)(lambda g, n=n, r=rows: g.lib.ggml_argsort(g.c, g.leaf(F32, n, r, values=g.rng.permutation(n * r)), r % 2))

    def top_k(g: Case, n: int, k: int) -> Any:
        """Their order is free: the sum of the values."""
        x = g.leaf(F32, n, 5)
        values = g.lib.ggml_get_rows(g.c, g.lib.ggml_reshape_3d(g.c, x, 1, n, 5), g.lib.ggml_top_k(g.c, x, k))
        return g.lib.ggml_sum_rows(g.c, g.lib.ggml_reshape_3d(g.c, values, k, 5, 1))

    case("top_k 8 of 128")(lambda g: top_k(g, 128, 8))
    case("top_k 40 of 1000")(lambda g: top_k(g, 1000, 40))
    for n, k in ((1025, 1025), (5000, 40), (5000, 2048), (70001, 1), (70001, 1500)):
        case(f"top_k {k} of {n}")(lambda g, n=n, k=k: top_k(g, n, k))
    case("top_k of all")(lambda g: top_k(g, 7, 7))
    for n in (1, 5, 64, 1000):
        case(f"sum_rows {n}")(lambda g, n=n: g.lib.ggml_sum_rows(g.c, g.leaf(F32, n, 3, 2)))
    case("sum_rows of permuted")(lambda g: g.lib.ggml_sum_rows(g.c, g.lib.ggml_permute(g.c, g.leaf(F32, 40, 5, 3), 0, 2, 1, 3)))
    case("add_id")(lambda g: g.lib.ggml_add_id(g.c, g.leaf(F32, 70, 2, 5), g.leaf(F32, 70, 6), expert_ids(g, 2, 5, 6)))
    case("fill")(lambda g: g.lib.ggml_fill(g.c, g.leaf(F32, 70, 5), -2.5))

    def layer(g: Case, n_tokens: int, biases: bool, fused: bool = False, type_: int = F16) -> Any:
        """Experts as models have them: weights times products, summed over slots; with biases, gpt-oss's; gate and up one tensor or two."""
        lib, ids = g.lib, expert_ids(g, 3, n_tokens, 8)
        x = g.leaf(F32, 256, 1, n_tokens)
        if fused:
            both = lib.ggml_mul_mat_id(g.c, g.leaf(F16, 256, 320, 8, scale=1 / 16, name="blk.0.ffn_gate_up_exps.weight"), x, ids)
            up, gate = (lib.ggml_view_4d(g.c, both, 160, 3, n_tokens, 1, 1280, 3840, 3840 * n_tokens, at) for at in (640, 0))
        else:
            up, gate = (
                lib.ggml_mul_mat_id(g.c, g.leaf(type_, 256, 160, 8, scale=1 / 16, name=f"blk.0.ffn_{part}_exps.weight"), x, ids) for part in ("up", "gate")
            )
        if biases:
            up, gate = (lib.ggml_add_id(g.c, part, g.leaf(F32, 160, 8), ids) for part in (up, gate))
        hidden = lib.ggml_swiglu_oai(g.c, gate, up, 1.702, 7.0) if biases else lib.ggml_glu_split(g.c, gate, up, 2)
        out = lib.ggml_mul_mat_id(g.c, g.leaf(type_, 160, 64, 8, scale=1 / 13, name="blk.0.ffn_down_exps.weight"), hidden, ids)
        if biases:
            out = lib.ggml_add_id(g.c, out, g.leaf(F32, 64, 8), ids)
        out = lib.ggml_mul(g.c, out, g.leaf(F32, 1, 3, n_tokens))
        parts = [lib.ggml_view_4d(g.c, out, 64, n_tokens, 1, 1, 64 * 3 * 4, 64 * 3 * 4 * n_tokens, 64 * 3 * 4 * n_tokens, 64 * 4 * i) for i in range(3)]
        return lib.ggml_add(g.c, lib.ggml_add(g.c, parts[0], parts[1]), parts[2])

    for n_tokens in (1, 3, 40):
        for biases in (False, True):
            case(f"experts F16 of {n_tokens} tokens{', biases' * biases}")(lambda g, m=n_tokens, b=biases: layer(g, m, b))
        case(f"experts F16 of {n_tokens} tokens, gate and up in one")(lambda g, m=n_tokens: layer(g, m, False, True))
        for t, name in ((Q8_0, "Q8_0"), (39, "MXFP4")):
            case(f"experts {name} of {n_tokens} tokens, biases")(lambda g, m=n_tokens, t=t: layer(g, m, True, type_=t))

    def routed(g: Case, again: bool) -> Any:
        """One token through two layers of experts, each behind its router, as gpt-oss's. again: the products without their biases are read after all that."""
        lib, out, products = g.lib, g.leaf(F32, 256), []

        def product(name: str, k: int, n: int, x: Any, ids: Any) -> Any:
            y = lib.ggml_mul_mat_id(g.c, g.leaf(Q8_0, k, n, 8, scale=k**-0.5, name=f"{name}_exps.weight"), x, ids)
            products.append(lib.ggml_reshape_3d(g.c, y, n * 4, 1, 1))
            return lib.ggml_add_id(g.c, y, g.leaf(F32, n, 8, name=f"{name}_exps.bias"), ids)

        for layer in ("blk.0.ffn_", "blk.1.ffn_"):
            x = lib.ggml_mul_inplace(g.c, lib.ggml_rms_norm(g.c, out, 1e-5), g.leaf(F32, 256))
            logits = lib.ggml_add(g.c, lib.ggml_mul_mat(g.c, g.leaf(F32, 256, 8, scale=1 / 16, name=layer + "gate_inp.weight"), x), g.leaf(F32, 8))
            ids = lib.ggml_view_4d(g.c, lib.ggml_argsort(g.c, logits, 1), 4, 1, 1, 1, 32, 32, 32, 0)
            chosen = lib.ggml_get_rows(g.c, lib.ggml_reshape_3d(g.c, logits, 1, 8, 1), ids)
            weights = lib.ggml_reshape_3d(g.c, lib.ggml_soft_max_ext(g.c, lib.ggml_reshape_3d(g.c, chosen, 4, 1, 1), g.null, 1.0, 0.0), 1, 4, 1)
            g.early.append(weights)
            of_each = lib.ggml_reshape_3d(g.c, x, 256, 1, 1)
            up, gate = (product(layer + part, 256, 160, of_each, ids) for part in ("up", "gate"))
            down = product(layer + "down", 160, 256, lib.ggml_swiglu_oai(g.c, gate, up, 1.702, 1.5), ids)
            down = lib.ggml_mul(g.c, down, weights)
            slots = [lib.ggml_view_4d(g.c, down, 256, 1, 1, 1, 4096, 4096, 4096, 1024 * i) for i in range(4)]
            out = lib.ggml_add(g.c, lib.ggml_add(g.c, lib.ggml_add(g.c, slots[0], slots[1]), slots[2]), slots[3])
            g.early.append(out)
        for part in products if again else ():
            out = lib.ggml_add(g.c, out, lib.ggml_sum_rows(g.c, part))
        return out

    for again in (False, True):
        case(f"experts Q8_0 behind their router{', products read again' * again}")(lambda g, a=again: routed(g, a))

    def grouped(g: Case, n_expert: int, groups: int, used: int, sigmoid: bool, again: bool) -> Any:
        """The sum of two layers of experts of some groups, as DeepSeek-V3's, of one token each: no router sees what int8 has rounded. again: what routers have
        found on the way is read after all that."""
        lib, each, shown, wide = g.lib, n_expert // groups, [], 512 if n_expert > 256 else 320

        def also(x: Any, at: Any = None) -> Any:
            """Shown behind all else, each element with a factor of its own; at: rows of a table, by these numbers."""
            shown.append((x, at))
            return x

        def first(order: Any, n: int, rows: int, stride: int) -> Any:
            return lib.ggml_view_4d(g.c, order, n, rows, 1, 1, stride * 4, stride * rows * 4, stride * rows * 4, 0)

        def product(name: str, k: int, n: int, ids: Any, x: Any) -> Any:
            return lib.ggml_mul_mat_id(g.c, g.leaf(Q8_0, k, n, n_expert, scale=k**-0.5, name=f"{name}_exps.weight"), x, ids)

        out = g.leaf(F32, wide)
        for layer in ("blk.0.ffn_", "blk.1.ffn_"):
            x = lib.ggml_mul_inplace(g.c, lib.ggml_rms_norm(g.c, g.leaf(F32, wide), 1e-5), g.leaf(F32, wide))
            logits = lib.ggml_mul_mat(g.c, g.leaf(F32, wide, n_expert, scale=wide**-0.5, name=f"{layer}gate_inp.weight"), x)
            probs = lib.ggml_sigmoid(g.c, logits) if sigmoid else lib.ggml_soft_max_ext(g.c, logits, g.null, 1.0, 0.0)
            by = lib.ggml_add(g.c, probs, g.leaf(F32, n_expert, scale=0.3 if sigmoid else 0.01))
            in_groups = lib.ggml_reshape_3d(g.c, by, each, groups, 1)
            order = also(lib.ggml_argsort(g.c, in_groups, 1), each)
            best = also(lib.ggml_get_rows(g.c, lib.ggml_reshape_3d(g.c, in_groups, 1, each, groups), first(order, 2, groups, each)))
            sums = also(lib.ggml_sum_rows(g.c, lib.ggml_reshape_3d(g.c, best, 2, groups, 1)))
            group_order = also(lib.ggml_argsort(g.c, lib.ggml_reshape_3d(g.c, sums, groups, 1, 1), 1), groups)
            chosen = first(group_order, used, 1, groups)
            rows = also(lib.ggml_get_rows(g.c, in_groups, chosen))
            left = also(lib.ggml_set_rows(g.c, lib.ggml_fill(g.c, in_groups, -np.inf), rows, chosen))
            all_in_order = lib.ggml_argsort(g.c, lib.ggml_reshape_3d(g.c, left, n_expert, 1, 1), 1)
            also(first(all_in_order, used * each, 1, n_expert), n_expert)  # equal ones, -infinity, have no order on the CPU
            ids = first(all_in_order, 4, 1, n_expert)
            weights = lib.ggml_reshape_3d(g.c, lib.ggml_get_rows(g.c, lib.ggml_reshape_3d(g.c, probs, 1, n_expert, 1), ids), 4, 1, 1)
            total = lib.ggml_clamp(g.c, lib.ggml_sum_rows(g.c, weights), 6e-5, np.inf)
            weights = lib.ggml_reshape_3d(g.c, lib.ggml_scale_bias(g.c, lib.ggml_div(g.c, weights, total), 2.5, 0.0), 1, 4, 1)
            g.early.append(weights)
            of_each = lib.ggml_reshape_3d(g.c, x, wide, 1, 1)
            gate, up = (product(layer + part, wide, 96, ids, of_each) for part in ("gate", "up"))
            down = lib.ggml_mul(g.c, product(layer + "down", 96, wide, ids, lib.ggml_glu_split(g.c, gate, up, 2)), weights)
            slots = [lib.ggml_view_4d(g.c, down, wide, 1, 1, 1, wide * 16, wide * 16, wide * 16, wide * 4 * i) for i in range(4)]
            out = lib.ggml_add(g.c, out, lib.ggml_add(g.c, lib.ggml_add(g.c, lib.ggml_add(g.c, slots[0], slots[1]), slots[2]), slots[3]))
            g.early.append(out)
        for x, table in shown if again else ():
            n = lib.ggml_nelements(x)
            x = lib.ggml_reshape_3d(g.c, x, n, 1, 1)
            if table:  # numbers of rows
                x = lib.ggml_reshape_3d(g.c, lib.ggml_get_rows(g.c, g.leaf(F32, 1, table), x), n, 1, 1)
            x = lib.ggml_mul(g.c, lib.ggml_clamp(g.c, x, -9.0, 9.0), g.leaf(F32, n))
            out = lib.ggml_add(g.c, out, lib.ggml_sum_rows(g.c, x))
        return out

    # Groups of less than a warp's experts, of as many, across warps where a lane has two experts; as many groups as the persistent kernel knows.
    for n_expert, groups, used, sigmoid, again in ((24, 4, 1, False, True), (256, 8, 4, True, False), (264, 6, 2, True, True), (96, 32, 3, False, True)):
        how = f"experts Q8_0, {n_expert} in {groups} groups, {used} of them, {'sigmoids' if sigmoid else 'soft max'}{', all read again' * again}"
        case(how)(lambda g, e=n_expert, n=groups, u=used, s=sigmoid, a=again: grouped(g, e, n, u, s, a))


def _moves_and_sums() -> None:
    case("add1")(lambda g: g.lib.ggml_add1(g.c, g.leaf(F32, 77, 3), g.leaf(F32, 1)))
    for op in ("acc", "set"):
        case(op)(lambda g, op=op: getattr(g.lib, f"ggml_{op}")(g.c, g.leaf(F32, 70, 5, 3), g.leaf(F32, 33, 2, 3), 280, 1400, 4200, 280 + 16))
    case("sum")(lambda g: g.lib.ggml_sum(g.c, g.leaf(F32, 301, 5, 3)))
    for n in (5, 300, 1025):
        case(f"mean {n}")(lambda g, n=n: g.lib.ggml_mean(g.c, g.leaf(F32, n, 5, 3)))
        case(f"cumsum {n}")(lambda g, n=n: g.lib.ggml_cumsum(g.c, g.leaf(F32, n, 5, 3)))
        case(f"argmax {n}", I32)(lambda g, n=n: g.lib.ggml_argmax(g.c, g.leaf(F32, n, 5, values=g.rng.integers(0, n // 2, 5 * n))))
        case(f"l2_norm {n}")(lambda g, n=n: g.lib.ggml_l2_norm(g.c, g.leaf(F32, n, 5, 3), 1e-6))
    case("group_norm")(lambda g: g.lib.ggml_group_norm(g.c, g.leaf(F32, 17, 9, 10, 2), 4, 1e-5))
    case("repeat")(lambda g: g.lib.ggml_repeat_4d(g.c, g.leaf(F32, 35, 1, 2), 70, 5, 2, 3))
    for dim in range(4):
        a, b = [70, 5, 3, 2], [70, 5, 3, 2]
        b[dim] = 7
        case(f"concat {dim}")(lambda g, d=dim, a=a, b=b: g.lib.ggml_concat(g.c, g.leaf(F32, *a), g.leaf(F32, *b), d))
    case("pad")(lambda g: g.lib.ggml_pad(g.c, g.leaf(F32, 70, 5, 3), 3, 2, 1, 2))
    case("roll")(lambda g: g.lib.ggml_roll(g.c, g.leaf(F32, 70, 5, 3, 2), 3, -2, 1, 0))
    case("arange")(lambda g: g.lib.ggml_arange(g.c, 1.0, 301.0, 0.5))
    for which in range(4):
        case(f"tri {which}")(lambda g, w=which: g.lib.ggml_tri(g.c, g.leaf(F32, 37, 37, 3), w))
    case("diag")(lambda g: g.lib.ggml_diag(g.c, g.leaf(F32, 37, 1, 3, 2)))
    case("diag_mask_inf")(lambda g: g.lib.ggml_diag_mask_inf(g.c, g.leaf(F32, 40, 33, 2), 5))
    case("out_prod")(lambda g: g.lib.ggml_out_prod(g.c, g.leaf(F32, 37, 19, 2), g.leaf(F32, 11, 19, 4)))
    case("out_prod of transposed")(lambda g: g.lib.ggml_out_prod(g.c, g.leaf(F32, 37, 19, 2), g.lib.ggml_transpose(g.c, g.leaf(F32, 19, 11, 4))))
    for t, name in {Q4_0: "Q4_0", Q8_0: "Q8_0", Q4_K: "Q4_K", Q6_K: "Q6_K", **OTHER_TYPES}.items():
        case(f"out_prod {name}")(lambda g, t=t: g.lib.ggml_out_prod(g.c, g.leaf(t, 256, 19, 2), g.leaf(F32, 11, 19, 2)))
    # As a LoRA's training has it: a weight that ranks divide is gathered.
    case("out_prod of a weight")(lambda g: g.lib.ggml_out_prod(g.c, g.leaf(Q4_K, 256, 19, name="blk.0.attn_q.weight"), g.leaf(F32, 11, 19)))


def _recurrences() -> None:
    def unit(g: Case, *ne: int) -> Any:  # between 0 and 1: what decays
        return g.leaf(F32, *ne, values=g.rng.uniform(0.5, 1, np.prod(ne)))

    for tokens in (1, 9):
        case(f"ssm_conv {tokens}")(lambda g, n=tokens: g.lib.ggml_ssm_conv(g.c, g.leaf(F32, n + 3, 70, 2), g.leaf(F32, 4, 70)))
        for kind, width in (("a head", 1), ("an element", 40)):
            case(f"ssm_scan {tokens}, A for {kind}")(
                lambda g, n=tokens, w=width: g.lib.ggml_ssm_scan(
                    g.c, g.leaf(F32, 40, 6 if w == 1 else 1, 4, 3), g.leaf(F32, 6 if w == 1 else 1, 4, n, 2), g.leaf(F32, 4, n, 2),
                    g.leaf(F32, w, 4, values=-g.rng.uniform(0.1, 1, 4 * w)), g.leaf(F32, 40, 2, n, 2), g.leaf(F32, 40, 2, n, 2), g.indices(2, 0), 1,
                )
            )  # fmt: skip
        for gates in (1, 48):
            case(f"gated_delta_net {tokens}, {gates} gates")(
                lambda g, n=tokens, w=gates: g.lib.ggml_gated_delta_net(
                    g.c, g.leaf(F32, 48, 2, n, 2, scale=0.15), g.leaf(F32, 48, 2, n, 2, scale=0.15), g.leaf(F32, 48, 4, n, 2),
                    g.leaf(F32, w, 4, n, 2, values=-g.rng.uniform(0, 1, w * 8 * n)), unit(g, 1, 4, n, 2), g.leaf(F32, 48, 48, 4, 2), 1,
                )
            )  # fmt: skip
        packed = (64, 3, 2 * tokens)
        case(f"gated_linear_attn {tokens}")(
            lambda g, p=packed: g.lib.ggml_gated_linear_attn(
                g.c, g.leaf(F32, *p), g.leaf(F32, *p), g.leaf(F32, *p), unit(g, *p), g.leaf(F32, 64 * 64 * 3, 2), 0.125
            )
        )
        case(f"rwkv_wkv6 {tokens}")(
            lambda g, p=packed: g.lib.ggml_rwkv_wkv6(
                g.c, g.leaf(F32, *p), g.leaf(F32, *p), g.leaf(F32, *p), g.leaf(F32, 64, 3), unit(g, *p), g.leaf(F32, 64 * 64 * 3, 2)
            )
        )
        case(f"rwkv_wkv7 {tokens}")(
            lambda g, p=packed: g.lib.ggml_rwkv_wkv7(
                g.c, g.leaf(F32, *p), unit(g, *p), g.leaf(F32, *p), g.leaf(F32, *p), g.leaf(F32, *p, scale=0.1), g.leaf(F32, *p, scale=0.1),
                g.leaf(F32, 64 * 64 * 3, 2),
            )
        )  # fmt: skip
    case("solve_tri")(
        lambda g: g.lib.ggml_solve_tri(
            g.c, g.leaf(F32, 19, 19, 3, values=np.tril(g.rng.uniform(-0.1, 0.1, (3, 19, 19))) + np.eye(19)), g.leaf(F32, 37, 19, 3), True, True, False
        )
    )


for _register in (_mul_mats, _element_wise, _rows, _ropes, _attention, _experts, _moves_and_sums, _recurrences):
    _register()


def _bad_expert(g: Case, type_: int, bad: int, name: str = "", n_tokens: int = 1) -> Any:
    ids = np.zeros((n_tokens, 2), np.int64)
    ids[-1, 1] = bad
    return g.lib.ggml_mul_mat_id(g.c, g.leaf(type_, 256, 70, 5, name=name), g.leaf(F32, 256, 1, n_tokens), g.leaf(I32, 2, n_tokens, values=ids))


# Graphs that TP0 must not claim, and must refuse with a status when a host sends them anyway.
FOREIGN: dict[str, Build] = {
    "an op without a kernel": lambda g: g.lib.ggml_pool_1d(g.c, g.leaf(F32, 8, 3), 0, 2, 2, 0),
    "a copy to a type without a kernel": lambda g: g.lib.ggml_cpy(g.c, g.leaf(F32, 256, 3), g.leaf(16, 256, 3)),
}
# Indices outside their tensors.
OUTSIDE: dict[str, Build] = {
    "get_rows, a row beyond the end": lambda g: g.lib.ggml_get_rows(g.c, g.leaf(F16, 64, 9), g.indices(1, 9)),
    "get_rows, a negative row": lambda g: g.lib.ggml_get_rows(g.c, g.leaf(F32, 64, 9), g.indices(-1, 2)),
    "get_rows, far away": lambda g: g.lib.ggml_get_rows(g.c, g.leaf(Q4_0, 64, 9), g.indices(0, 2**31 - 1)),
    "mul_mat_id, an expert beyond the last": lambda g: _bad_expert(g, F16, 5),
    "mul_mat_id, a negative expert": lambda g: _bad_expert(g, Q4_0, -1),
    "mul_mat_id, an expert of divided weights": lambda g: _bad_expert(g, Q4_0, 2**31 - 1, "blk.0.ffn_gate_exps.weight"),
    "mul_mat_id, an expert of many tokens": lambda g: _bad_expert(g, F16, -(2**31), "blk.0.ffn_down_exps.weight", 40),
    "add_id, an expert beyond the last": lambda g: g.lib.ggml_add_id(
        g.c, g.leaf(F32, 70, 1, 2), g.leaf(F32, 70, 6), g.leaf(I32, 1, 2, values=np.array([1, 6]))
    ),
    "set_rows, a cell beyond the end": lambda g: g.lib.ggml_set_rows(g.c, g.leaf(F16, 40, 9), g.leaf(F32, 40, 2), g.indices(0, 9, type_=I64)),
    "set_rows, a negative cell": lambda g: g.lib.ggml_set_rows(g.c, g.leaf(F32, 40, 9), g.leaf(F32, 40, 2), g.indices(-1, 3, type_=I64)),
    "ssm_scan, a state beyond the last": lambda g: g.lib.ggml_ssm_scan(
        g.c, g.leaf(F32, 16, 6, 4, 3), g.leaf(F32, 6, 4, 1, 2), g.leaf(F32, 4, 1, 2), g.leaf(F32, 1, 4), g.leaf(F32, 16, 2, 1, 2), g.leaf(F32, 16, 2, 1, 2),
        g.indices(1, 3), 1,
    ),
    "ssm_scan, a negative state": lambda g: g.lib.ggml_ssm_scan(
        g.c, g.leaf(F32, 16, 6, 4, 3), g.leaf(F32, 6, 4, 1, 1), g.leaf(F32, 4, 1, 1), g.leaf(F32, 1, 4), g.leaf(F32, 16, 2, 1, 1), g.leaf(F32, 16, 2, 1, 1),
        g.indices(-1), 1,
    ),
    "set_rows, a cell of a divided cache": lambda g: g.lib.ggml_set_rows(
        g.c, g.leaf(F16, 96, 9, name="cache_k_l0"), g.leaf(F32, 96, 2), g.indices(2**40, 3, type_=I64)
    ),
}
