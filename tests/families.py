"""Tiny random models of many architectures and every quantisation, with valid blocks and a fixed seed.

A family is a row of hyperparameters: which tensors that makes, and of what shapes, the host says itself (llama_model_init_from_user), so that a
row is a few keys and no list of weights. What a row leaves out is COMMON's.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cffi
import gguf
import numpy as np
import shapes
from ggml_tp.host import Host, HostError

N_LAYER, N_EMBD, N_FF, N_HEAD, N_HEAD_KV, HEAD_DIM, N_VOCAB = 2, 256, 768, 8, 4, 32, 320
N_EXPERT, N_EXPERT_USED, N_FF_EXPERT = 6, 3, 192

COMMON: dict[str, Any] = {
    "context_length": 2048,
    "embedding_length": N_EMBD,
    "block_count": N_LAYER,
    "feed_forward_length": N_FF,
    "vocab_size": N_VOCAB,
    "attention.head_count": N_HEAD,
    "attention.head_count_kv": N_HEAD_KV,
    "attention.key_length": HEAD_DIM,
    "attention.value_length": HEAD_DIM,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "attention.layer_norm_epsilon": 1e-5,
    "rope.freq_base": 10000.0,
    "rope.dimension_count": HEAD_DIM,
}
EXPERTS: dict[str, Any] = {"expert_count": N_EXPERT, "expert_used_count": N_EXPERT_USED, "expert_feed_forward_length": N_FF_EXPERT}
SHARED: dict[str, Any] = {"expert_shared_count": 1, "expert_shared_feed_forward_length": N_FF}
LAYER_NORM: dict[str, Any] = {"attention.layer_norm_rms_epsilon": None}
SOFTMAX, SIGMOID = 1, 2  # expert_gating_func
# The latent attention of DeepSeek: one cached head of the latent (64) and the rotary part (32); heads of 32 + 32 and 32.
LATENT: dict[str, Any] = {
    "attention.head_count_kv": 1, "attention.q_lora_rank": 96, "attention.kv_lora_rank": 64, "attention.key_length": 96, "attention.value_length": 64,
    "attention.key_length_mla": 64, "attention.value_length_mla": 32, "rope.dimension_count": 32,
}  # fmt: skip


def ssm(inner: int, state: int, heads: int, groups: int) -> dict[str, Any]:
    return {"ssm.conv_kernel": 4, "ssm.inner_size": inner, "ssm.state_size": state, "ssm.time_step_rank": heads, "ssm.group_count": groups}


GEMMA4: dict[str, Any] = {
    "attention.sliding_window": 32, "attention.sliding_window_pattern": [True, False], "embedding_length_per_layer_input": 0,
    "attention.key_length_swa": HEAD_DIM, "attention.value_length_swa": HEAD_DIM,
}  # fmt: skip
OF_GEMMA4: dict[str, Any] = {"optional": r"rope_freqs\.weight|ffn_gate_inp\.scale", "scaled": {"attn_q_norm": 0.2}, "explained": False}
QKV = {"attn_qkv": ("attn_q", "attn_k", "attn_v")}
GATE_UP = {"ffn_gate_up_exps": ("ffn_gate_exps", "ffn_up_exps")}
BIASES = r"(attn_[qkv]|attn_qkv|attn_output|ffn_up|ffn_down)\.bias"  # with those of norms, where models have them at all


@dataclass(frozen=True)
class Family:
    arch: str
    keys: Mapping[str, Any] = field(default_factory=dict)  # without the architecture's prefix; None: absent
    optional: str = ""  # of OPTIONAL, what this family has all the same (a pattern of whole names after "blk.N.")
    without: str = ""  # what the host would take and this family does not have
    joined: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # tensors that this family has side by side in one
    scaled: Mapping[str, float] = field(default_factory=dict)  # tensors by pattern, whose random values would be too large, or too small to matter
    ahead: int = 0  # layers that predict further tokens, which hosts leave out
    job: str = "run_model"  # of jobs.py
    cost: tuple[int, int] | None = None  # all_reduces and all_gathers of one token; None: two reduces a layer
    explained: bool = True  # whether `explain` knows all of a token's graph; else it names the tensors that it does not
    beyond: tuple[int, int] | None = None  # groups of a norm, and how often it is gathered for where there are more ranks than these


# What a host takes if it is there, and most families do not have.
OPTIONAL = r"(?!exp_probs_b|ssm_).*\.bias|rope_.*|.*scale|attn_sinks\.weight|cls\..*"

FAMILIES: dict[str, Family] = {
    "llama": Family("llama"),
    "llama-mqa": Family("llama", {"attention.head_count_kv": 1}),
    "qwen2": Family("qwen2", optional=r"attn_[qkv]\.bias"),
    "qwen3": Family("qwen3"),
    "qwen3moe": Family("qwen3moe", EXPERTS),
    "mixtral": Family("llama", EXPERTS | {"expert_feed_forward_length": N_FF}),
    "qwen2moe": Family("qwen2moe", EXPERTS | SHARED, optional=r"attn_[qkv]\.bias"),
    "gpt-oss": Family("gpt-oss", EXPERTS | {"attention.sliding_window": 32}, optional=rf"{BIASES}|ffn_\w+\.bias|attn_sinks\.weight",
        scaled={"attn_sinks": 4.0}),
    "gemma3": Family("gemma3", {"attention.sliding_window": 32, "attention.sliding_window_pattern": 2}, without="output|dense_.*"),
    "phi3": Family("phi3", joined=QKV),
    "glm4": Family("glm4", {"rope.dimension_count": 16}, optional=r"attn_[qkv]\.bias"),
    "glm4moe": Family("glm4moe", EXPERTS | SHARED | {"leading_dense_block_count": 1, "rope.dimension_count": 16, "expert_gating_func": SIGMOID,
        "expert_weights_norm": True}, optional=r"attn_[qkv]\.bias", ahead=1),
    "command-r": Family("command-r", LAYER_NORM | {"logit_scale": 0.25}, without="attn_[qk]_norm|output", cost=(3, 0)),
    "cohere2": Family("cohere2", LAYER_NORM | {"logit_scale": 0.25, "attention.sliding_window": 32, "attention.sliding_window_pattern": 2},
        without="output", cost=(3, 0)),
    "falcon": Family("falcon", {"attention.head_count_kv": 2}, optional=r"(attn|output)_norm(_2)?\.bias", joined=QKV, cost=(3, 0)),
    "olmo2": Family("olmo2", cost=(6, 0)),
    "minicpm3": Family("minicpm3", {"attention.head_count_kv": 8, "attention.q_lora_rank": 96, "attention.kv_lora_rank": 64, "attention.key_length": 64,
        "attention.value_length": 32}),
    "deepseek2": Family("deepseek2", EXPERTS | SHARED | LATENT | {"leading_dense_block_count": 1}),
    "deepseek3": Family("deepseek2", EXPERTS | SHARED | LATENT | {"leading_dense_block_count": 1, "expert_count": 24, "expert_group_count": 4,
        "expert_group_used_count": 2, "expert_gating_func": SIGMOID, "expert_weights_norm": True, "expert_weights_scale": 2.5}),
    "deepseek2-no-mla": Family("deepseek2", EXPERTS | SHARED | LATENT | {"leading_dense_block_count": 1, "attention.head_count_kv": 8,
        "attention.key_length": 64, "attention.value_length": 32, "attention.key_length_mla": None, "attention.value_length_mla": None}),
    "deepseek2-fused": Family("deepseek2", EXPERTS | SHARED | LATENT | {"leading_dense_block_count": 1}, joined=GATE_UP),
    "llama4": Family("llama4", EXPERTS | {"block_count": 4, "interleave_moe_layer_step": 2, "expert_used_count": 1}),
    "qwen3next": Family("qwen3next", EXPERTS | SHARED | ssm(256, 32, 8, 4) | {"full_attention_interval": 2}, without="ssm_in"),
    "qwen35": Family("qwen35", ssm(256, 32, 8, 4) | {"full_attention_interval": 2, "rope.dimension_sections": [4, 6, 6, 0]}, ahead=1),
    "qwen35moe": Family("qwen35moe", EXPERTS | SHARED | ssm(256, 32, 8, 4) | {"full_attention_interval": 2,
        "rope.dimension_sections": [4, 6, 6, 0]}),
    "mamba": Family("mamba", ssm(512, 16, 16, 0), cost=(4, 0)),
    "mamba2": Family("mamba2", ssm(512, 32, 16, 2), cost=(2, 0), beyond=(2, 2)),
    "jamba": Family("jamba", EXPERTS | ssm(512, 16, 16, 0) | {"attention.head_count_kv": [0, 4]}, cost=(5, 0)),
    "falcon-h1": Family("falcon-h1", ssm(512, 32, 16, 2), beyond=(2, 2)),
    "granitehybrid": Family("granitehybrid", ssm(512, 32, 16, 2) | {"attention.head_count_kv": [0, 4], "embedding_scale": 12.0, "residual_scale": 0.22,
        "attention.scale": 0.0156, "logit_scale": 8.0}, beyond=(2, 1)),
    "nemotron_h": Family("nemotron_h", ssm(512, 32, 16, 2) | {"block_count": 3, "attention.head_count_kv": [0, 4, 0],
        "feed_forward_length": [0, 0, 768]}, cost=(3, 0), beyond=(2, 1)),
    # Experts of one matrix, and of a latent.
    "nemotron_h_moe": Family("nemotron_h_moe", EXPERTS | SHARED | ssm(512, 32, 16, 2) | {"block_count": 4, "attention.head_count_kv": [0, 4, 0, 0],
        "feed_forward_length": [0, 0, 768, 768], "moe_latent_size": 128}, scaled={"ffn_gate_inp": 2.0}, cost=(6, 0), beyond=(2, 1), explained=False),
    "lfm2": Family("lfm2", {"attention.head_count_kv": [0, 4], "shortconv.l_cache": 3}, without="dense_2"),
    # Attention is not scaled, 22 layers amplify, of few gates the topmost 5 % are next to none: unscaled and with an ffn of 96, the host's CPU
    # differs from itself by an NMSE of 8e-3 with another batch size.
    "gemma3n": Family("gemma3n", {"block_count": 22, "embedding_length": 64, "attention.head_count": 8, "attention.head_count_kv": 1,
        "feed_forward_length": 384, "attention.sliding_window": 32, "attention.sliding_window_pattern": 5}, scaled={"attn_q_norm": 0.2,
        "altup_.*coef": 0.1, "_post_norm|_post.*norm|post_.*norm": 0.3}, cost=(44, 10)),
    # Attention is not scaled here either; embeddings of every layer's own. wide: heads of 512 and 256, as real ones have.
    "gemma4": Family("gemma4", GEMMA4 | {"embedding_length_per_layer_input": 64}, **OF_GEMMA4),
    "gemma4-wide": Family("gemma4", GEMMA4 | {"attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 512,
        "attention.value_length": 512, "attention.key_length_swa": 256, "attention.value_length_swa": 256, "rope.dimension_count": 512,
        "rope.dimension_count_swa": 256}, **OF_GEMMA4),
    "gemma4-moe": Family("gemma4", EXPERTS | GEMMA4, cost=(6, 0), **OF_GEMMA4),
    "gemma2": Family("gemma2", {"attention.sliding_window": 32, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}, without="output"),
    "phi2": Family("phi2", optional=r".*\.bias", cost=(3, 0)),
    "gpt2": Family("gpt2", {"attention.head_count_kv": 8}, optional=r".*\.bias", joined=QKV),
    "gptneox": Family("gptneox", {"attention.head_count_kv": 8, "use_parallel_residual": True}, optional=r".*\.bias", joined=QKV, cost=(3, 0)),
    "starcoder2": Family("starcoder2", optional=r".*\.bias"),
    "bloom": Family("bloom", {"attention.head_count_kv": 8}, optional=r".*\.bias", joined=QKV),
    "mpt": Family("mpt", LAYER_NORM | {"attention.head_count_kv": 8, "attention.max_alibi_bias": 8.0}, without="attn_[qk]_norm", joined=QKV),
    "stablelm": Family("stablelm", {"rope.dimension_count": 16, "use_parallel_residual": False}, optional=r".*norm\.bias"),
    "olmoe": Family("olmoe", EXPERTS | {"attention.head_count_kv": 8}, cost=(6, 0)),
    "dbrx": Family("dbrx", EXPERTS | LAYER_NORM | {"attention.clamp_kqv": 8.0, "feed_forward_length": 192}, joined=QKV),
    "granitemoe": Family("granitemoe", EXPERTS | {"logit_scale": 8.0, "embedding_scale": 12.0, "residual_scale": 0.22, "attention.scale": 0.0156}),
    "grok": Family("grok", EXPERTS),
    "exaone4": Family("exaone4", {"attention.sliding_window": 32}),
    "minimax-m2": Family("minimax-m2", EXPERTS | {"expert_gating_func": SIGMOID}, cost=(6, 0)),
    "rwkv6": Family("rwkv6", {"attention.head_count": 0, "attention.head_count_kv": 0, "wkv.head_size": 32, "time_mix_extra_dim": 32,
        "time_decay_extra_dim": 64}, optional=r".*\.bias", without="time_mix_lerp_[wkvrg]"),
    "rwkv7": Family("rwkv7", {"attention.head_count": 0, "attention.head_count_kv": 0, "wkv.head_size": 32, "attention.decay_lora_rank": 32,
        "attention.iclr_lora_rank": 32, "attention.value_residual_mix_lora_rank": 32, "attention.gate_lora_rank": 64}, optional=r".*\.bias"),
    "kimi-linear": Family("kimi-linear", EXPERTS | SHARED | LATENT | {"leading_dense_block_count": 1, "attention.head_count_kv": [0, 1],
        "ssm.conv_kernel": 4, "kda.head_dim": 32, "expert_gating_func": SIGMOID}),
    "bert": Family("bert", {"tokenizer.ggml.token_type_count": 2, "attention.causal": False, "pooling_type": 0}, optional=r".*\.bias",
        without="cls.*", job="embed"),
    "t5": Family("t5", {"attention.relative_buckets_count": 8, "attention.head_count_kv": 8, "decoder_start_token_id": 1}, scaled={"attn_q": 0.3},
        job="encode_decode", cost=(6, 0)),
}  # fmt: skip


def has_experts(family: str) -> bool:
    return "expert_count" in FAMILIES[family].keys


def host_blocks(library: str | os.PathLike[str], values: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Rows of [n_rows, n] as blocks, by the host's own quantiser; where a type needs an importance matrix, everything matters as much."""
    ffi = cffi.FFI()
    ffi.cdef("size_t ggml_quantize_chunk(int type, const float *x, void *blocks, int64_t start, int64_t n_rows, int64_t n, const float *importance);")
    ffi.cdef("bool ggml_quantize_requires_imatrix(int type);")
    lib: Any = ffi.dlopen(os.fspath(library))
    (rows, n), (elems, n_bytes) = values.shape, gguf.GGML_QUANT_SIZES[kind]
    out = np.zeros((rows, n // elems * n_bytes), np.uint8)
    alike = np.ones(n, np.float32)
    importance = ffi.from_buffer("float[]", alike) if lib.ggml_quantize_requires_imatrix(int(kind)) else ffi.NULL
    lib.ggml_quantize_chunk(int(kind), ffi.from_buffer("float[]", np.ascontiguousarray(values, np.float32)), ffi.from_buffer(out), 0, rows, n, importance)
    return out


def _quantized(host: Host, rng: np.random.Generator, values: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Blocks of the values or, where quantising searches (26 s for the experts of two layers in IQ2_XS), random ones of their size: all bits occur."""
    try:
        return gguf.quants.quantize(values, kind)
    except NotImplementedError:
        if made := shapes.TYPES.get(kind.name):
            return made.make(rng, values.size // made.elems, float(values.std())).reshape(len(values), -1)
        return host_blocks(host.path, values, kind)


def _writer(path: Path, family: str, more: Mapping[str, Any]) -> gguf.GGUFWriter:
    row = FAMILIES[family]
    w = gguf.GGUFWriter(path, row.arch)
    w.add_tokenizer_model("no_vocab")
    for name, value in (COMMON | dict(row.keys) | dict(more)).items():
        add = {bool: w.add_bool, int: w.add_uint32, float: w.add_float32, str: w.add_string, list: w.add_array}.get(type(value))
        if add:
            add(name if name.startswith("tokenizer.") else f"{row.arch}.{name}", value)
    return w


def _close(w: gguf.GGUFWriter) -> None:
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def wanted_tensors(host: Host, keys: Path) -> list[tuple[str, tuple[int, ...]]]:
    """Every tensor, required or optional, that the host makes of a file of keys: its name and shape, slowest axis first."""
    ffi = cffi.FFI()
    ffi.cdef("""
        typedef struct { unsigned char bytes[512]; } params_t;
        typedef struct { bool no_alloc; void **ctx; } gguf_init_params;
        params_t llama_model_default_params(void);
        void *gguf_init_from_file(const char *path, gguf_init_params params);
        void gguf_free(void *gguf);
        void *llama_model_init_from_user(void *gguf, void *set_tensor_data, void *user, params_t params);
        void llama_model_free(void *model);
        const char *ggml_get_name(const void *tensor);
    """)
    lib: Any = ffi.dlopen(os.fspath(host.path))
    found: list[tuple[str, tuple[int, ...]]] = []

    @ffi.callback("void(void *, void *)")
    def visit(tensor: Any, _user: Any) -> None:
        ne = ffi.cast("int64_t *", ffi.cast("char *", tensor) + 16)
        shape = tuple(int(ne[d]) for d in range(4))
        n_dims = max([1, *(d + 1 for d in range(4) if shape[d] > 1)])
        found.append((ffi.string(lib.ggml_get_name(tensor)).decode(), shape[n_dims - 1 :: -1] if n_dims < 4 else shape[::-1]))

    metadata = lib.gguf_init_from_file(os.fsencode(keys), {"no_alloc": True, "ctx": ffi.NULL})
    params = ffi.new("params_t *", lib.llama_model_default_params())
    devices = ffi.new("void *[1]")
    ffi.cast("void **", params)[0] = devices
    model = lib.llama_model_init_from_user(metadata, visit, ffi.NULL, params[0])
    lib.gguf_free(metadata)
    if model == ffi.NULL:
        raise HostError(f"the host makes no model of {keys}; see the lines above")
    lib.llama_model_free(model)
    return list(dict(found).items())


def _tensors(host: Host, keys: Path, family: str, also: str) -> dict[str, tuple[int, ...]]:
    """What a model of the family has: of all that the host would take, less optional ones, some joined."""
    row = FAMILIES[family]
    keep, drop = re.compile(f"(?:{row.optional or '(?!)'}|{also or '(?!)'})"), re.compile(f"(?:{OPTIONAL})")
    without = re.compile(rf"(?:{row.without or '(?!)'})(?:\.(?:weight|bias))?")
    whole_of = {part: whole for whole, parts in row.joined.items() for part in parts}
    out: dict[str, tuple[int, ...]] = {}
    for name, shape in wanted_tensors(host, keys):
        prefix, base = re.fullmatch(r"((?:(?:enc|dec)\.)?(?:blk\.\d+\.)?)(.*)", name).groups()  # type: ignore[union-attr]
        if (drop.fullmatch(base) and not keep.fullmatch(base)) or without.fullmatch(base):
            continue
        stem, _, suffix = base.rpartition(".")
        if whole := whole_of.get(stem):
            axis = -2 if suffix == "weight" else -1
            name, before = f"{prefix}{whole}.{suffix}", out.get(f"{prefix}{whole}.{suffix}")
            rows = shape[axis] + (before[axis] if before else 0)
            shape = (*shape[:-2], rows, shape[-1]) if axis == -2 else (rows,)
        out[name] = shape
    return out


def cost_of(family: str, ranks: int) -> tuple[int, int]:
    """All_reduces and all_gathers of one token: two all_reduces a layer, or what the family's row says."""
    row = FAMILIES[family]
    reduces, gathers = row.cost or (2 * (COMMON | dict(row.keys))["block_count"], 0)
    if row.beyond and ranks > row.beyond[0]:
        gathers += row.beyond[1]
    return (reduces, gathers) if ranks > 1 else (0, 0)


# Read element by element by the host's own ops, which take F32 only; or too small for anybody to quantise.
PLAIN = re.compile(
    r"norm|ffn_gate_inp|conv(1d|\.weight|\.bias)|ssm_(a|d)\b|time_mix_(lerp|first|decay|a|k|r|w|v|g)|time_mix_(?!key|value|receptance|gate|output)|position_embd"
    r"|token_types|attn_rel_b|altup|rope_|sinks|channel_mix_lerp|exp_probs_b"
)


def _values(rng: np.random.Generator, name: str, shape: tuple[int, ...], n_expert: int) -> np.ndarray:
    """Of about the size that a trained model's have. With experts, each token prefers them in an order of its own, by the first elements of its
    embedding, which routers read: as of trained models, and unlike that of random ones, its choice does not hang on the last bits of a product."""
    normal = rng.normal(0, 1, shape).astype(np.float32)
    if name == "token_embd.weight":
        if n_expert:
            normal[:, :n_expert] = 2.5 * np.stack([rng.permutation(n_expert) - (n_expert - 1) / 2 for _ in range(shape[0])])
        return normal
    if re.search(r"norm.*\.weight$", name):
        return 1 + 0.1 * normal
    if name.endswith("ffn_gate_inp.weight"):
        return np.eye(*shape, dtype=np.float32) + 0.1 * shape[-1] ** -0.5 * normal
    if re.search(r"ssm_a\b", name):
        return -np.abs(normal) - 0.1  # a decay
    if re.search(r"rope_", name):
        return np.linspace(1, 8, shape[-1], dtype=np.float32)
    if re.search(r"sinks|ssm_d\b", name):
        return normal
    if name.endswith("bias") or len(shape) == 1:
        return 0.1 * normal
    return shape[-1] ** -0.5 * normal


def write_model(
    host: Host, path: Path, family: str, quant: str, seed: int = 0, also: str = "", dequantized: bool = False, scaled: Mapping[str, float] | None = None,
    **keys: Any,
) -> None:  # fmt: skip
    """A GGUF file. `quant`: the type of all matrices, as far as rows are whole blocks.

    `also`: optional tensors to have. `dequantized` writes the same values as F32. `scaled`: tensors by pattern, whose values are that much larger. `keys`:
    other hyperparameters, "." written as "__".
    """
    more = {name.replace("__", "."): value for name, value in keys.items()}
    keys_path = path.with_suffix(".keys")
    _close(_writer(keys_path, family, more))
    tensors = _tensors(host, keys_path, family, also)
    if ahead := FAMILIES[family].ahead:  # each one more of the last layer's kind, fed by the last state and the token that is known
        n_layer, n_embd = ((COMMON | dict(FAMILIES[family].keys) | more)[key] for key in ("block_count", "embedding_length"))
        for i in range(n_layer, n_layer + ahead):
            last = {name.replace(f"blk.{n_layer - 1}.", f"blk.{i}."): shape for name, shape in tensors.items() if name.startswith(f"blk.{n_layer - 1}.")}
            own = {"eh_proj": (n_embd, 2 * n_embd), "enorm": (n_embd,), "hnorm": (n_embd,), "shared_head_norm": (n_embd,)}
            tensors |= last | {f"blk.{i}.nextn.{name}.weight": shape for name, shape in own.items()}
        more |= {"block_count": n_layer + ahead, "nextn_predict_layers": ahead}
    w = _writer(path, family, more)
    n_expert = dict(FAMILIES[family].keys).get("expert_count", 0)
    for name, shape in tensors.items():
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        values = _values(rng, name, shape, n_expert)
        for pattern, scale in (*FAMILIES[family].scaled.items(), *(scaled or {}).items()):
            if re.search(pattern, name):
                values *= np.float32(scale)
        kind = gguf.GGMLQuantizationType[quant]
        if len(shape) < 2 or PLAIN.search(name) or not name.endswith("weight") or shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            w.add_tensor(name, values)
            continue
        flat = values.reshape(-1, shape[-1])
        data = _quantized(host, rng, flat, kind)
        data = data.reshape(*shape[:-1], -1)
        if dequantized:
            w.add_tensor(name, gguf.quants.dequantize(data, kind))
        else:
            w.add_tensor(name, data, raw_dtype=kind)
    _close(w)


def write_lora(path: Path, model: Path, rank: int = 8, seed: int = 1) -> None:
    """An adapter for every matrix of every layer, experts too; its products are about a third of the matrix's own."""
    reader = gguf.GGUFReader(model)
    w = gguf.GGUFWriter(path, str(reader.fields["general.architecture"].contents()))
    w.add_type("adapter")
    w.add_string("adapter.type", "lora")
    w.add_float32("adapter.lora.alpha", float(rank))
    rng = np.random.default_rng(seed)
    for tensor in reader.tensors:
        if not re.fullmatch(r"blk\.\d+\.(attn_[qkv]|attn_qkv|attn_output|ffn_(up|gate|down)(_exps)?)\.weight", tensor.name):
            continue
        k, n, *more = (int(d) for d in tensor.shape)
        w.add_tensor(tensor.name + ".lora_a", rng.normal(0, k**-0.5, (*more, rank, k)).astype(np.float32))
        w.add_tensor(tensor.name + ".lora_b", rng.normal(0, 0.3 * rank**-0.5, (*more, n, rank)).astype(np.float32))
    _close(w)
