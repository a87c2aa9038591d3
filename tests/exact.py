"""A llama in float64, its caches rounded by the host's own quantiser: what logits are exactly, where the host's CPU rounds as much as a test allows."""

from __future__ import annotations

import os

import gguf
import numpy as np
from families import host_blocks


def _cached(library: str | os.PathLike[str], values: np.ndarray, kv_type: int) -> np.ndarray:
    """Rows of [n_tokens, n] as a cache of that type gives them back."""
    kind = gguf.GGMLQuantizationType(kv_type)
    return gguf.quants.dequantize(host_blocks(library, values, kind), kind).astype(np.float64)


def llama_logits(library: str | os.PathLike[str], model: str, prompt: list[int], kv_type: int) -> np.ndarray:
    """[n_tokens, n_vocab] of a prompt read at once."""
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
        k, v = (heads(_cached(library, rows, kv_type)) for rows in (rope(times(h, p + "attn_k")), times(h, p + "attn_v")))
        scores = np.einsum("thd,chd->htc", q, k) / np.sqrt(n)
        scores = np.where(np.tril(np.ones((tokens, tokens))), scores, -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        x = x + times(np.einsum("htc,chd->thd", shares, v).reshape(tokens, -1), p + "attn_output")
        h = norm(x, p + "ffn_norm")
        gate = times(h, p + "ffn_gate")
        x = x + times(gate / (1 + np.exp(-gate)) * times(h, p + "ffn_up"), p + "ffn_down")
    return times(norm(x, "output_norm"), "output")
