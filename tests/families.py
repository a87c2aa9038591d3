"""Tiny random models of each family and quantisation, written with valid blocks and a fixed seed."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

N_LAYER, N_EMBD, N_FF, N_HEAD, N_HEAD_KV, HEAD_DIM, N_VOCAB = 2, 256, 768, 8, 4, 32, 320
N_EXPERT, N_EXPERT_USED, N_FF_EXPERT = 6, 3, 192
# Families with experts, and the architecture that they are of.
EXPERTS = {"qwen3moe": "qwen3moe", "mixtral": "llama", "qwen2moe": "qwen2moe", "gpt-oss": "gpt-oss"}


def _k_quant(values: np.ndarray, name: str) -> np.ndarray:
    """gguf cannot quantise to Q4_K and Q6_K: random blocks whose values have about the same size."""
    rng = np.random.default_rng(values.size)
    rows, blocks = values.shape[0], values.shape[1] // 256
    scale = float(values.std())
    n_bytes = {"Q4_K": 144, "Q6_K": 210}[name]
    out = rng.integers(0, 256, (rows, blocks, n_bytes), dtype=np.uint8)
    if name == "Q4_K":
        out[..., 0:2] = np.frombuffer(np.float16(scale / 140).tobytes(), np.uint8)
        out[..., 2:4] = np.frombuffer(np.float16(scale / 140 * 7.5).tobytes(), np.uint8)
    else:
        out[..., 192:208] = rng.integers(-64, 64, (rows, blocks, 16)).astype(np.int8).view(np.uint8)
        out[..., 208:210] = np.frombuffer(np.float16(scale / (18 * 37)).tobytes(), np.uint8)
    return out.reshape(rows, blocks * n_bytes)


def write_model(
    path: Path, family: str, quant: str, seed: int = 0, rope_factors: bool = False, dequantized: bool = False,
    n_ff_expert: int = N_FF_EXPERT, foreign: bool = False,
) -> Path:  # fmt: skip
    """A GGUF file of two layers. `quant`: F32, F16, BF16, Q8_0, Q4_0, Q4_K or Q6_K for all matrices.

    `dequantized` writes the same values as F32. `n_ff_expert`: 256 and its multiples for types with blocks of 256.
    `foreign`: one matrix of each layer is of a type that only the host's CPU knows.
    """
    rng = np.random.default_rng(seed)
    w = gguf.GGUFWriter(path, EXPERTS.get(family, family))
    w.add_context_length(2048)
    w.add_embedding_length(N_EMBD)
    w.add_block_count(N_LAYER)
    w.add_feed_forward_length(N_FF)
    w.add_head_count(N_HEAD)
    w.add_head_count_kv(N_HEAD_KV)
    if family in EXPERTS:
        w.add_expert_count(N_EXPERT)
        w.add_expert_used_count(N_EXPERT_USED)
        w.add_expert_feed_forward_length(n_ff_expert)
    if family == "mixtral":
        n_ff_expert = N_FF
    if family == "qwen2moe":
        w.add_expert_shared_feed_forward_length(N_FF)
    if family == "gpt-oss":
        w.add_sliding_window(32)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_freq_base(10000.0)
    w.add_key_length(HEAD_DIM)
    w.add_value_length(HEAD_DIM)
    w.add_rope_dimension_count(HEAD_DIM)
    w.add_vocab_size(N_VOCAB)
    w.add_tokenizer_model("no_vocab")
    kind = gguf.GGMLQuantizationType[quant]

    def matrix(name: str, rows: int, columns: int) -> None:
        add(name, rng.normal(0, columns**-0.5, (rows, columns)).astype(np.float32), kind)

    def embeddings() -> None:
        """Of a model with experts: each token prefers them in an order of its own, by its first elements, which its router reads. As of
        trained models, and unlike that of random ones, its choice does not hang on the last bits of a product."""
        values = rng.normal(0, 1, (N_VOCAB, N_EMBD)).astype(np.float32)
        if family in EXPERTS:
            values[:, :N_EXPERT] = 2.5 * np.stack([rng.permutation(N_EXPERT) - (N_EXPERT - 1) / 2 for _ in range(N_VOCAB)])
        add("token_embd.weight", values, kind)

    def router(name: str) -> None:
        values = rng.normal(0, 0.1 * N_EMBD**-0.5, (N_EXPERT, N_EMBD)).astype(np.float32)
        w.add_tensor(name, values + np.eye(N_EXPERT, N_EMBD, dtype=np.float32))

    def experts(name: str, rows: int, columns: int) -> None:
        add(name, rng.normal(0, columns**-0.5, (N_EXPERT, rows, columns)).astype(np.float32), kind)

    def add(name: str, values: np.ndarray, kind: gguf.GGMLQuantizationType) -> None:
        flat = values.reshape(-1, values.shape[-1])
        data = _k_quant(flat, kind.name) if kind.name.endswith("_K") else gguf.quants.quantize(flat, kind)
        data = data.reshape(*values.shape[:-1], -1)
        if dequantized:
            w.add_tensor(name, gguf.quants.dequantize(data, kind))
        else:
            w.add_tensor(name, data, raw_dtype=kind)

    def vector(name: str, n: int, mean: float, spread: float) -> None:
        w.add_tensor(name, rng.normal(mean, spread, n).astype(np.float32))

    embeddings()
    matrix("output.weight", N_VOCAB, N_EMBD)
    vector("output_norm.weight", N_EMBD, 1, 0.1)
    if rope_factors:
        w.add_tensor("rope_freqs.weight", np.linspace(1, 8, HEAD_DIM // 2, dtype=np.float32))
    for layer in range(N_LAYER):
        p = f"blk.{layer}."
        vector(p + "attn_norm.weight", N_EMBD, 1, 0.1)
        vector(p + ("post_attention_norm.weight" if family == "gpt-oss" else "ffn_norm.weight"), N_EMBD, 1, 0.1)
        for name, rows in (("attn_q", N_HEAD), ("attn_k", N_HEAD_KV), ("attn_v", N_HEAD_KV)):
            matrix(p + name + ".weight", rows * HEAD_DIM, N_EMBD)
            if family in ("qwen2", "qwen2moe", "gpt-oss"):
                vector(p + name + ".bias", rows * HEAD_DIM, 0, 0.1)
        if family.startswith("qwen3"):
            vector(p + "attn_q_norm.weight", HEAD_DIM, 1, 0.1)
            vector(p + "attn_k_norm.weight", HEAD_DIM, 1, 0.1)
        matrix(p + "attn_output.weight", N_EMBD, N_HEAD * HEAD_DIM)
        if family == "gpt-oss":
            vector(p + "attn_output.bias", N_EMBD, 0, 0.1)
            vector(p + "attn_sinks.weight", N_HEAD, 0, 1)
        if family in EXPERTS:
            router(p + "ffn_gate_inp.weight")
            for name, rows, columns in (("gate", n_ff_expert, N_EMBD), ("up", n_ff_expert, N_EMBD), ("down", N_EMBD, n_ff_expert)):
                experts(p + f"ffn_{name}_exps.weight", rows, columns)
                if family == "gpt-oss":
                    w.add_tensor(p + f"ffn_{name}_exps.bias", rng.normal(0, 0.1, (N_EXPERT, rows)).astype(np.float32))
            if family == "gpt-oss":
                vector(p + "ffn_gate_inp.bias", N_EXPERT, 0, 0.1)
            if family != "qwen2moe":
                continue
            vector(p + "ffn_gate_inp_shexp.weight", N_EMBD, 0, N_EMBD**-0.5)
        suffix = "_shexp" if family == "qwen2moe" else ""
        matrix(p + f"ffn_gate{suffix}.weight", N_FF, N_EMBD)
        if foreign:
            add(p + "ffn_up.weight", rng.normal(0, N_EMBD**-0.5, (N_FF, N_EMBD)).astype(np.float32), gguf.GGMLQuantizationType.TQ2_0)
        else:
            matrix(p + f"ffn_up{suffix}.weight", N_FF, N_EMBD)
        matrix(p + f"ffn_down{suffix}.weight", N_EMBD, N_FF)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path
