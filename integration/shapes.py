#!/usr/bin/env python3
"""Write a GGUF with a real model's shapes and random, valid weights: for speed, which does not depend on what the weights say.

    row of SHAPES -> tensor list -> header by gguf -> blocks made once per type and scale, tiled into the file

example: python integration/shapes.py llama-8b.gguf --shape llama-8b --type Q4_K
         python integration/shapes.py slice.gguf --shape qwen2.5-72b --type Q4_K --layers 20
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np


@dataclass(frozen=True)
class Shape:
    arch: str
    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_vocab: int
    n_expert: int = 0
    n_expert_used: int = 0
    n_ff_expert: int = 0
    n_ctx: int = 32768
    window: int = 0  # tokens that layers with a window attend to; 0: all attend to all
    n_rope: int = 0  # elements of a head that turn; 0: all
    n_dense: int = 0  # layers without experts, in front
    n_shared: int = 0  # experts that all tokens go through, each of n_ff_expert
    n_linear: int = 0  # layers of linear attention in front of each one of softmax attention
    linear: tuple[int, int, int] = (0, 0, 0)  # their key heads, value heads and the size of both
    # Latent attention: ranks of queries (0: one matrix) and of what is cached, a head's part that does not turn and the one that does, its value.
    latent: tuple[int, int, int, int, int] = (0, 0, 0, 0, 0)
    groups: tuple[int, int] = (0, 0)  # of experts, and how many of them a token is sent to


SHAPES = {
    "tiny": Shape("llama", 2, 256, 512, 8, 4, 32, 512),  # for tests
    "tiny-gpt-oss": Shape("gpt-oss", 2, 192, 192, 8, 2, 32, 512, n_expert=4, n_expert_used=2, n_ff_expert=192, window=32),  # for tests
    "llama-1b": Shape("llama", 16, 2048, 8192, 32, 8, 64, 128256),
    "llama-8b": Shape("llama", 32, 4096, 14336, 32, 8, 128, 128256),
    "llama-70b": Shape("llama", 80, 8192, 28672, 64, 8, 128, 128256),
    "qwen2.5-72b": Shape("qwen2", 80, 8192, 29696, 64, 8, 128, 152064),  # ffn 29568, rounded up to whole 256-blocks
    "qwen3-30b-a3b": Shape("qwen3moe", 48, 2048, 6144, 32, 4, 128, 151936, n_expert=128, n_expert_used=8, n_ff_expert=768),
    "gemma3-12b": Shape("gemma3", 48, 3840, 15360, 16, 8, 256, 262144, window=1024),
    "phi-4": Shape("phi3", 40, 5120, 17920, 40, 10, 128, 100352),
    "glm4-9b": Shape("glm4", 40, 4096, 13696, 32, 2, 128, 151552, n_rope=64),  # 13,696 is no multiple of 256 either
    "glm4.5-air": Shape("glm4moe", 46, 4096, 10944, 96, 8, 128, 151552, 128, 8, 1408, n_rope=64, n_dense=1, n_shared=1),  # without its predicting layer
    "qwen3.5-9b": Shape("qwen35", 32, 4096, 12288, 16, 4, 256, 248320, n_rope=64, n_linear=3, linear=(16, 32, 128)),
    "qwen3.5-35b-a3b": Shape("qwen35moe", 40, 2048, 512, 16, 2, 256, 248320, 256, 8, 512, n_rope=64, n_shared=1, n_linear=3, linear=(16, 32, 128)),
    "glm-4.7-flash": Shape("deepseek2", 47, 2048, 10240, 20, 1, 576, 154880, 64, 4, 1536, n_rope=64, n_dense=1, n_shared=1, latent=(768, 512, 192, 64, 256)),
    "deepseek-v3": Shape("deepseek2", 61, 7168, 18432, 128, 1, 576, 129280, 256, 8, 2048, n_rope=64, n_dense=3, n_shared=1, latent=(1536, 512, 128, 64, 128),
        groups=(8, 4)),
    # What one of eight ranks has of that, and less of it: 8 layers, one of them dense, and an eighth of the vocabulary's rows.
    "deepseek-v3-eighth": Shape("deepseek2", 8, 7168, 2304, 16, 1, 576, 16384, 256, 8, 256, n_rope=64, n_dense=1, n_shared=1, latent=(1536, 512, 128, 64, 128),
        groups=(8, 4)),
    # In MXFP4 as its files are: experts; attention's matrices have the head's type. 2,880 is no multiple of 256: types with blocks of 32.
    "gpt-oss-20b": Shape("gpt-oss", 24, 2880, 2880, 64, 8, 64, 201088, n_expert=32, n_expert_used=4, n_ff_expert=2880, window=128),
}


def _halves(n: int, value: float) -> np.ndarray:
    return np.full(n, value, np.float16).view(np.uint8).reshape(n, 2)


def _q4_0(rng: np.random.Generator, n: int, scale: float) -> np.ndarray:
    blocks = rng.integers(0, 256, (n, 18), dtype=np.uint8)
    blocks[:, :2] = _halves(n, scale / 4.6)  # rms of -8..7
    return blocks


def _q8_0(rng: np.random.Generator, n: int, scale: float) -> np.ndarray:
    blocks = rng.integers(0, 256, (n, 34), dtype=np.uint8)
    blocks[:, :2] = _halves(n, scale / 74)  # rms of -128..127
    return blocks


def _q4_k(rng: np.random.Generator, n: int, scale: float) -> np.ndarray:
    blocks = rng.integers(0, 256, (n, 144), dtype=np.uint8)  # d, dmin, 6-bit scales and mins, quants
    blocks[:, :2] = _halves(n, scale / 140)
    blocks[:, 2:4] = _halves(n, scale / 140 * 7.5)  # scales and mins have the same mean: the values are centred
    return blocks


def _q6_k(rng: np.random.Generator, n: int, scale: float) -> np.ndarray:
    blocks = rng.integers(0, 256, (n, 210), dtype=np.uint8)  # low and high bits, int8 scales, d
    blocks[:, 192:208] = rng.integers(-64, 64, (n, 16)).astype(np.int8).view(np.uint8)
    blocks[:, 208:210] = _halves(n, scale / (18 * 37))
    return blocks


def _scaled(n_bytes: int, halves: dict[int, float]) -> Callable[[np.random.Generator, int, float], np.ndarray]:
    """Blocks of random bits but for halves at some bytes: these, times the scale."""

    def make(rng: np.random.Generator, n: int, scale: float) -> np.ndarray:
        blocks = rng.integers(0, 256, (n, n_bytes), dtype=np.uint8)
        for at, factor in halves.items():
            blocks[:, at : at + 2] = _halves(n, scale * factor)
        return blocks

    return make


def _mxfp4(rng: np.random.Generator, n: int, scale: float) -> np.ndarray:
    blocks = rng.integers(0, 256, (n, 17), dtype=np.uint8)
    blocks[:, 0] = 127 + round(math.log2(scale / 2.7))  # rms of the 16 values; a power of two
    return blocks


def _iq1_m(rng: np.random.Generator, n: int, scale: float) -> np.ndarray:
    blocks = rng.integers(0, 256, (n, 56), dtype=np.uint8)
    scales = blocks[:, 48:].view(np.uint16)  # each has 4 bits of d at its top
    d = np.array([scale / 7.2], np.float16).view(np.uint16)[0]
    scales[:] = (scales & 0x0FFF) | (d >> np.arange(0, 16, 4, dtype=np.uint16) & 15) << 12
    return blocks


def _f16(rng: np.random.Generator, n: int, scale: float) -> np.ndarray:
    return rng.normal(0, scale, n).astype(np.float16).view(np.uint8).reshape(n, 2)


def _f32(rng: np.random.Generator, n: int, scale: float) -> np.ndarray:
    return rng.normal(0, scale, n).astype(np.float32).view(np.uint8).reshape(n, 4)


@dataclass(frozen=True)
class Type:
    elems: int
    bytes: int
    make: Callable[[np.random.Generator, int, float], np.ndarray]
    head: str  # the type of embeddings and output head that files of this type have


TYPES = {
    "Q4_0": Type(32, 18, _q4_0, "Q4_0"),
    "Q8_0": Type(32, 34, _q8_0, "Q8_0"),
    "Q4_K": Type(256, 144, _q4_k, "Q6_K"),
    "Q6_K": Type(256, 210, _q6_k, "Q6_K"),
    # Factors: one by the rms of what they scale; mins centre the values.
    "Q4_1": Type(32, 20, _scaled(20, {0: 1 / 4.6, 2: -7.5 / 4.6}), "Q6_K"),
    "Q5_0": Type(32, 22, _scaled(22, {0: 1 / 9.2}), "Q6_K"),
    "Q5_1": Type(32, 24, _scaled(24, {0: 1 / 9.2, 2: -15.5 / 9.2}), "Q6_K"),
    "Q2_K": Type(256, 84, _scaled(84, {80: 1 / 13, 82: 1.5 / 13}), "Q6_K"),
    "Q3_K": Type(256, 110, _scaled(110, {108: 1 / 43}), "Q6_K"),
    "Q5_K": Type(256, 176, _scaled(176, {0: 1 / 290, 2: 15.5 / 290}), "Q6_K"),
    "IQ4_NL": Type(32, 18, _scaled(18, {0: 1 / 66}), "Q6_K"),
    "IQ4_XS": Type(256, 136, _scaled(136, {0: 1 / 1230}), "Q6_K"),
    "IQ2_XXS": Type(256, 66, _scaled(66, {0: 1 / 53}), "Q6_K"),
    "IQ2_XS": Type(256, 74, _scaled(74, {0: 1 / 56}), "Q6_K"),
    "IQ2_S": Type(256, 82, _scaled(82, {0: 1 / 56}), "Q6_K"),
    "IQ3_XXS": Type(256, 98, _scaled(98, {0: 1 / 140}), "Q6_K"),
    "IQ3_S": Type(256, 110, _scaled(110, {0: 1 / 141}), "Q6_K"),
    "IQ1_S": Type(256, 50, _scaled(50, {0: 1 / 7.2}), "Q6_K"),
    "IQ1_M": Type(256, 56, _iq1_m, "Q6_K"),
    "MXFP4": Type(32, 17, _mxfp4, "Q8_0"),
    "F16": Type(1, 2, _f16, "F16"),
    "F32": Type(1, 4, _f32, "F32"),
}


@dataclass(frozen=True)
class Tensor:
    name: str
    ne: tuple[int, ...]
    type: str
    scale: float = 0.0  # rms of its values; 0: ones; below 0: each is that

    @property
    def n_bytes(self) -> int:
        return math.prod(self.ne) // TYPES[self.type].elems * TYPES[self.type].bytes


def tensors(shape: Shape, type_: str) -> Iterator[Tensor]:
    d, q, kv = shape.n_embd, shape.n_head * shape.head_dim, shape.n_head_kv * shape.head_dim
    oss, head = shape.arch == "gpt-oss", TYPES[type_].head
    attention = head if oss else type_

    def matrix(name: str, *ne: int, of: str = type_) -> Tensor:
        return Tensor(name, ne, of, ne[0] ** -0.5)

    def bias(name: str, *ne: int) -> Tensor:
        return Tensor(name + ".bias", ne, "F32", 0.1)

    yield Tensor("token_embd.weight", (d, shape.n_vocab), head, 1.0)
    if shape.arch != "gemma3":  # its head are the embeddings
        yield matrix("output.weight", d, shape.n_vocab, of=head)
    yield Tensor("output_norm.weight", (d,), "F32")
    for i in range(shape.n_layer):
        p = f"blk.{i}."
        yield Tensor(p + "attn_norm.weight", (d,), "F32")
        n_keys, n_values, size = shape.linear
        linear = shape.n_linear > 0 and (i + 1) % (shape.n_linear + 1) != 0
        gated = 2 if shape.n_linear else 1  # queries and gates of what is attended to
        if linear:
            channels = (2 * n_keys + n_values) * size
            yield from (matrix(f"{p}attn_qkv.weight", d, channels), matrix(f"{p}attn_gate.weight", d, n_values * size))
            yield from (matrix(f"{p}ssm_{x}.weight", d, n_values) for x in ("alpha", "beta"))
            yield from (Tensor(f"{p}ssm_conv1d.weight", (4, channels), "F32", 0.5), Tensor(p + "ssm_dt.bias", (n_values,), "F32", 0.1))
            yield from (Tensor(p + "ssm_a", (n_values,), "F32", -1.0), Tensor(p + "ssm_norm.weight", (size,), "F32"))
            yield matrix(p + "ssm_out.weight", n_values * size, d)
        elif shape.arch == "deepseek2":
            rank, latent, plain, turned, value = shape.latent
            if rank:
                yield from (matrix(p + "attn_q_a.weight", d, rank), Tensor(p + "attn_q_a_norm.weight", (rank,), "F32"))
            yield matrix(p + ("attn_q_b" if rank else "attn_q") + ".weight", rank or d, shape.n_head * (plain + turned))
            yield from (matrix(p + "attn_kv_a_mqa.weight", d, latent + turned), Tensor(p + "attn_kv_a_norm.weight", (latent,), "F32"))
            yield from (matrix(p + "attn_k_b.weight", plain, latent, shape.n_head), matrix(p + "attn_v_b.weight", latent, value, shape.n_head))
            q = shape.n_head * value
        elif shape.arch == "phi3":
            yield matrix(f"{p}attn_qkv.weight", d, q + 2 * kv)
        else:
            yield from (matrix(f"{p}attn_{x}.weight", d, n, of=attention) for x, n in (("q", gated * q), ("k", kv), ("v", kv)))
        if not linear:
            yield matrix(p + "attn_output.weight", q, d, of=attention)
        if oss or shape.arch in ("qwen2", "glm4", "glm4moe"):
            yield from (bias(f"{p}attn_{x}", n) for x, n in (("q", q), ("k", kv), ("v", kv)))
        if oss:
            yield from (bias(p + "attn_output", d), Tensor(p + "attn_sinks.weight", (shape.n_head,), "F32", 1.0))
        if (shape.arch.startswith("qwen3") and not linear) or shape.arch in ("gemma3", "glm4moe"):
            yield from (Tensor(f"{p}attn_{x}_norm.weight", (shape.head_dim,), "F32") for x in "qk")
        behind = ("post_attention_norm", "ffn_norm", "post_ffw_norm") if shape.arch in ("gemma3", "glm4") else ()  # norms of what is added, too
        for norm in behind or ("post_attention_norm" if shape.arch in ("gpt-oss", "glm4moe", "qwen35", "qwen35moe") else "ffn_norm",):
            yield Tensor(f"{p}{norm}.weight", (d,), "F32")
        if shape.n_expert and i >= shape.n_dense:
            n, f = shape.n_expert, shape.n_ff_expert
            yield matrix(p + "ffn_gate_inp.weight", d, n, of="F32")
            yield from (matrix(p + "ffn_gate_exps.weight", d, f, n), matrix(p + "ffn_up_exps.weight", d, f, n))
            yield matrix(p + "ffn_down_exps.weight", f, d, n)
            if shape.arch in ("glm4moe", "deepseek2"):
                yield bias(p + "exp_probs_b", n)
            if shape.n_shared:
                shared = f * shape.n_shared
                if shape.arch == "qwen35moe":
                    yield matrix(p + "ffn_gate_inp_shexp.weight", d, of="F32")
                yield from (matrix(p + "ffn_gate_shexp.weight", d, shared), matrix(p + "ffn_up_shexp.weight", d, shared))
                yield matrix(p + "ffn_down_shexp.weight", shared, d)
            if oss:
                yield from (bias(p + "ffn_gate_inp", n), bias(p + "ffn_gate_exps", f, n), bias(p + "ffn_up_exps", f, n), bias(p + "ffn_down_exps", d, n))
        else:
            if shape.arch in ("phi3", "glm4"):
                yield matrix(p + "ffn_up.weight", d, 2 * shape.n_ff)  # gates first
            else:
                yield from (matrix(p + "ffn_gate.weight", d, shape.n_ff), matrix(p + "ffn_up.weight", d, shape.n_ff))
            yield matrix(p + "ffn_down.weight", shape.n_ff, d)


def _write_header(path: Path, name: str, shape: Shape, all_tensors: list[Tensor]) -> None:
    writer = gguf.GGUFWriter(path, shape.arch)
    writer.add_name(f"synthetic {name}")
    writer.add_context_length(shape.n_ctx)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.latent[1] or shape.head_dim)
    writer.add_rope_dimension_count(shape.n_rope or shape.head_dim)
    writer.add_rope_freq_base(500000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.n_vocab)
    if shape.n_expert:
        writer.add_expert_count(shape.n_expert)
        writer.add_expert_used_count(shape.n_expert_used)
        writer.add_expert_feed_forward_length(shape.n_ff_expert)
    if shape.arch == "deepseek2":
        rank, latent, plain, turned, value = shape.latent
        if rank:
            writer.add_q_lora_rank(rank)
        writer.add_kv_lora_rank(latent)
        writer.add_key_length_mla(plain + turned)
        writer.add_value_length_mla(value)
        writer.add_expert_weights_scale(2.5 if shape.groups[0] else 1.8)
        if shape.groups[0]:
            writer.add_expert_group_count(shape.groups[0])
            writer.add_expert_group_used_count(shape.groups[1])
    if shape.n_shared and shape.arch == "qwen35moe":
        writer.add_expert_shared_feed_forward_length(shape.n_ff_expert)
    elif shape.n_shared:
        writer.add_expert_shared_count(shape.n_shared)
        writer.add_leading_dense_block_count(shape.n_dense)
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        writer.add_expert_weights_norm(True)
    if shape.n_linear:
        n_keys, n_values, size = shape.linear
        writer.add_uint32(f"{shape.arch}.full_attention_interval", shape.n_linear + 1)
        writer.add_array(f"{shape.arch}.rope.dimension_sections", [11, 11, 10, 0])
        writer.add_ssm_conv_kernel(4)
        writer.add_ssm_inner_size(n_values * size)
        writer.add_ssm_state_size(size)
        writer.add_ssm_time_step_rank(n_values)
        writer.add_ssm_group_count(n_keys)
    if shape.window:
        writer.add_sliding_window(shape.window)
    writer.add_tokenizer_model("no_vocab")
    for t in all_tensors:
        ne, type_ = list(reversed(t.ne)), TYPES[t.type]
        if t.type in ("F32", "F16"):
            writer.add_tensor_info(t.name, ne, np.dtype(np.float32 if t.type == "F32" else np.float16), t.n_bytes)
        else:
            ne[-1] = ne[-1] // type_.elems * type_.bytes
            writer.add_tensor_info(t.name, ne, np.dtype(np.uint8), t.n_bytes, raw_dtype=gguf.GGMLQuantizationType[t.type])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


_POOL_BYTES = 16 << 20  # of made blocks per type and scale: larger costs time, smaller more writes
_ALIGNMENT = 32  # GGUF's default


def write(path: Path, name: str, type_: str, n_layer: int | None = None, quiet: bool = False) -> dict[str, object]:
    """Writes the file. Keys: path, shape, type, layers, bytes, seconds."""
    shape = SHAPES[name] if n_layer is None else replace(SHAPES[name], n_layer=n_layer)
    for t in tensors(shape, type_):
        if t.ne[0] % TYPES[t.type].elems:
            of = f"{t.name} has rows of {t.ne[0]}, blocks of {t.type} have {TYPES[t.type].elems}"
            raise ValueError(f"{name} in {type_}: {of}; choose a type of smaller blocks")
    begin = shown = time.monotonic()
    all_tensors = list(tensors(shape, type_))
    total = sum(t.n_bytes for t in all_tensors)
    _write_header(path, name, shape, all_tensors)
    rng = np.random.default_rng(1)
    pools: dict[tuple[str, float], memoryview] = {}
    done = 0
    with open(path, "ab", buffering=0) as file:
        file.write(bytes(-file.tell() % _ALIGNMENT))
        for i, t in enumerate(all_tensors):
            if t.scale <= 0:
                pool = memoryview(np.full(t.n_bytes // 4, t.scale or 1, np.float32).view(np.uint8))
            else:
                key = (t.type, round(t.scale, 5))
                if key not in pools:
                    pools[key] = memoryview(TYPES[t.type].make(rng, _POOL_BYTES // TYPES[t.type].bytes, t.scale).reshape(-1))
                pool = pools[key]
            # Each tensor begins at another block of the pool: two of the same shape are not the same matrix.
            at = (i * 7919 * TYPES[t.type].bytes) % len(pool) if t.scale > 0 else 0
            left = t.n_bytes
            while left:
                n = file.write(pool[at : at + left])
                left -= n
                at = 0 if at + n == len(pool) else at + n
            file.write(bytes(-t.n_bytes % _ALIGNMENT))
            done += t.n_bytes
            if not quiet and time.monotonic() - shown > 2:
                shown = time.monotonic()
                print(f"{path.name}: {done / 1e9:.1f} of {total / 1e9:.1f} GB", file=sys.stderr, flush=True)
    return {"path": str(path), "shape": name, "type": type_, "layers": shape.n_layer, "bytes": total, "seconds": time.monotonic() - begin}


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Write a GGUF with a real model's shapes and random weights.",
        epilog="example: python integration/shapes.py slice.gguf --shape qwen2.5-72b --type Q4_K --layers 20",
    )
    parser.add_argument("out", type=Path, help="the file to write")
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b", help="(default: %(default)s)")
    types = [t for t in TYPES if t != "F32"]
    heads = "Q4_0, Q8_0 and F16 have a head of their own type, MXFP4 of Q8_0, others of Q6_K; gpt-oss's attention has the head's"
    parser.add_argument("--type", choices=types, default="Q4_K", help=f"of the matrices; {heads} (default: %(default)s)")
    parser.add_argument("--layers", type=int, help="how many layers (default: all of the shape's)")
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")
    args = parser.parse_args()
    try:
        result = write(args.out, args.shape, args.type, args.layers)
    except ValueError as e:
        parser.error(str(e))
    print(json.dumps(result) if args.json else "{path}: {shape}, {type}, {layers} layers, {bytes} bytes in {seconds:.1f} s".format(**result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
