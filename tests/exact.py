"""A llama in float64, its caches rounded by the host's own quantiser: what logits are exactly, where the host's CPU rounds as much as a test allows."""

from __future__ import annotations

import os
from typing import Any

import cffi
import gguf
import numpy as np


def _cached(lib: Any, ffi: cffi.FFI, values: np.ndarray, kv_type: int) -> np.ndarray:
    """Rows of [n_tokens, n] as a cache of that type gives them back."""
    kind = gguf.GGMLQuantizationType(kv_type)
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rows, n = values.shape
    blocks = np.zeros((rows, n // block * block_bytes), np.uint8)
    lib.ggml_quantize_chunk(kv_type, ffi.from_buffer("float[]", np.ascontiguousarray(values, np.float32)), ffi.from_buffer(blocks), 0, rows, n, ffi.NULL)
    return gguf.quants.dequantize(blocks, kind).astype(np.float64)


def llama_logits(library: str | os.PathLike[str], model: str, prompt: list[int], kv_type: int) -> np.ndarray:
    """[n_tokens, n_vocab] of a prompt read at once."""
    ffi = cffi.FFI()
    ffi.cdef("size_t ggml_quantize_chunk(int type, const float *x, void *blocks, int64_t start, int64_t n_rows, int64_t n, const float *importance);")
    lib: Any = ffi.dlopen(os.fspath(library))
    reader = gguf.GGUFReader(model)
    weights = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64) for tensor in reader.tensors}
    keys = ("attention.head_count", "attention.head_count_kv", "attention.key_length", "block_count")
    n_head, n_head_kv, n, n_layer = (int(reader.fields[f"llama.{key}"].contents()) for key in keys)
    tokens = len(prompt)

    def times(x: np.ndarray, name: str) -> np.ndarray:
        return x @ weights[f"{name}.weight"].T

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weights[f"{name}.weight"]

    turns = np.exp(1j * np.arange(tokens)[:, None, None] * 10000.0 ** (-2 * np.arange(n // 2) / n))

    def rope(x: np.ndarray) -> np.ndarray:
        pairs = x.reshape(tokens, -1, n // 2, 2)
        turned = (pairs[..., 0] + 1j * pairs[..., 1]) * turns
        return np.stack([turned.real, turned.imag], -1).reshape(tokens, -1)

    def heads(rows: np.ndarray) -> np.ndarray:
        return np.repeat(rows.reshape(tokens, n_head_kv, n), n_head // n_head_kv, axis=1)

    x = weights["token_embd.weight"][prompt]
    for i in range(n_layer):
        p = f"blk.{i}."
        h = norm(x, p + "attn_norm")
        q = rope(times(h, p + "attn_q")).reshape(tokens, n_head, n)
        k, v = (heads(_cached(lib, ffi, rows, kv_type)) for rows in (rope(times(h, p + "attn_k")), times(h, p + "attn_v")))
        scores = np.einsum("thd,chd->htc", q, k) / np.sqrt(n)
        scores = np.where(np.tril(np.ones((tokens, tokens))), scores, -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        x = x + times(np.einsum("htc,chd->thd", shares, v).reshape(tokens, -1), p + "attn_output")
        h = norm(x, p + "ffn_norm")
        gate = times(h, p + "ffn_gate")
        x = x + times(gate / (1 + np.exp(-gate)) * times(h, p + "ffn_up"), p + "ffn_down")
    return times(norm(x, "output_norm"), "output")
