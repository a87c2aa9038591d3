"""One rank's share of a model as a model of its own, so that one GPU can time what one of N would compute.

    GGUF → the plan for N ranks (explain) → every tensor cut to one rank's part, keys that name lengths cut alike → GGUF

Values are not the rank's own (the first blocks of each tensor), only shapes, types and layers are: the file is for timing alone. Collectives are
not in it; `projected` adds what they were measured to take.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from .explain import ExplainError, explain, parts, read

# Tensors that a rank holds a part of: the axis that is cut, the key that names its length, and whose heads that length counts.
_LENGTHS = (
    (r"blk\.\d+\.attn_q\.(weight|bias)", 1, "attention.head_count", "k"),
    (r"blk\.\d+\.attn_k\.(weight|bias)", 1, "attention.head_count_kv", "k"),
    (r"blk\.\d+\.attn_v\.(weight|bias)", 1, "attention.head_count_kv", "v"),
    (r"blk\.\d+\.attn_q_norm\.weight", 1, "attention.head_count", "k"),  # of all heads together
    (r"blk\.\d+\.attn_k_norm\.weight", 1, "attention.head_count_kv", "k"),
    (r"blk\.\d+\.attn_output\.weight", 0, "attention.head_count", "v"),
    (r"blk\.\d+\.ffn_(gate|up)\.(weight|bias)", 1, "feed_forward_length", ""),
    (r"blk\.\d+\.ffn_down\.weight", 0, "feed_forward_length", ""),
    (r"blk\.\d+\.ffn_(gate|up)_exps\.weight", 1, "expert_feed_forward_length", ""),
    (r"blk\.\d+\.ffn_down_exps\.weight", 0, "expert_feed_forward_length", ""),
    (r"blk\.\d+\.ffn_(gate|up)_shexp\.weight", 1, "expert_shared_feed_forward_length", ""),
    (r"blk\.\d+\.ffn_down_shexp\.weight", 0, "expert_shared_feed_forward_length", ""),
    (r"(output|token_embd)\.weight", 1, "vocab_size", ""),
)


def _length_of(name: str, axis: int, n_axes: int) -> tuple[str, str]:
    """The key, and whose heads; a bias has one axis, which its weight's rows become."""
    for pattern, cut, key, heads in _LENGTHS:
        if re.fullmatch(pattern, name) and axis == (0 if n_axes == 1 else cut):
            return key, heads
    raise ExplainError(f"{name} is divided along axis {axis}: there is no smaller model whose {name} is as large as a rank's part")


def write(source: str | Path, out: str | Path, n_ranks: int) -> dict[str, Any]:
    """Writes the share of the rank that reads most, which the others wait for.

    Keys: ranks, rank, all_reduces (bytes of each that one token takes), bytes, rounded (lengths that end inside a block of the weights' type, and what
    they are in the share: a model's rows are whole blocks). Raises ExplainError with one line where the share is no model: heads that are not
    whole, fused or recurrent tensors, all_gathers.
    """
    import gguf

    file, plan = read(source), explain(source, n_ranks)
    if any(row["kind"] != "all_reduce" for row in plan["reshards"]):
        raise ExplainError(f"{Path(source).name} needs more than all_reduces between {n_ranks} ranks: a share timed alone would say nothing about them")
    rank = max(range(n_ranks), key=lambda r: plan["read_bytes_per_token"][r])
    of_heads = {"": 1, "k": file.heads[0][2], "v": file.heads[0][3]}
    shapes = {name: list(ne) for name, _, ne in file.tensors}
    blocks = {name: gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(type_)][0] for name, type_, _ in file.tensors}
    cuts: list[tuple[str, int, str, int]] = []  # tensor, axis, key, elements of one
    lengths: dict[str, int] = {}
    least: dict[str, int] = {}  # of which a length must be a multiple
    for row in plan["tensors"]:
        name = row["name"]
        if row["layout"] == "replicated":
            continue
        match = re.fullmatch(r"sharded axis (\d)((?: \[\d+,\d+\))+)", row["layout"])
        if not match:
            raise ExplainError(f"{name} is divided in several segments: a share of it is no tensor of a model")
        axis = int(match[1])
        begin, end = (int(n) for n in re.findall(r"\[(\d+),(\d+)\)", match[2])[rank])
        key, heads = _length_of(name, axis, len(shapes[name]))
        one = of_heads[heads]
        if end <= begin or (end - begin) % one:
            raise ExplainError(f"rank {rank} of {n_ranks} holds [{begin}, {end}) of {name}, which is no whole number of heads of {one}")
        if lengths.setdefault(key, (end - begin) // one) != (end - begin) // one:
            raise ExplainError(f"rank {rank} of {n_ranks} holds another part of {name} than of the tensors before it")
        cuts.append((name, axis, key, one))
        if axis == 0 and len(shapes[name]) > 1:
            least[key] = math.lcm(least.get(key, 1), blocks[name] // math.gcd(blocks[name], one))
    rounded = {key: (lengths[key], -(-lengths[key] // n) * n) for key, n in least.items() if lengths[key] % n}
    lengths |= {key: to for key, (_, to) in rounded.items()}
    for name, axis, key, one in cuts:
        shapes[name][axis] = lengths[key] * one
    lengths.setdefault("vocab_size", file.n_vocab)
    if "token_embd.weight" in shapes:  # the host's: as long as the head
        shapes["token_embd.weight"][1] = lengths["vocab_size"]
    lengths |= {"attention.key_length": of_heads["k"], "attention.value_length": of_heads["v"]}
    return {
        "ranks": n_ranks, "rank": rank, "bytes": _write(source, Path(out), file.architecture, shapes, lengths),
        "all_reduces": [row["bytes"] for row in plan["reshards"]], "rounded": rounded,
    }  # fmt: skip


def _write(source: str | Path, out: Path, arch: str, shapes: dict[str, list[int]], lengths: dict[str, int]) -> int:
    import gguf

    readers = [gguf.GGUFReader(part) for part in parts(Path(source))]
    writer = gguf.GGUFWriter(out, arch)
    for name, field in readers[0].fields.items():
        key = name.removeprefix(arch + ".")
        if name.startswith(("GGUF.", "tokenizer.", "split.")) or name == "general.architecture" or key in lengths:
            continue
        writer.add_key_value(name, field.contents(), field.types[0], field.types[1] if len(field.types) > 1 else None)
    for key, length in lengths.items():
        writer.add_uint32(f"{arch}.{key}", length)
    writer.add_tokenizer_model("no_vocab")
    total = 0
    for tensor in (t for reader in readers for t in reader.tensors if t.name in shapes):
        ne = shapes[tensor.name]
        elems, size = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
        n_bytes = int(np.prod(ne, dtype=np.int64)) // elems * size
        data = tensor.data.reshape(-1).view(np.uint8)[:n_bytes]
        writer.add_tensor(tensor.name, data.reshape(*reversed(ne[1:]), ne[0] // elems * size), raw_dtype=tensor.tensor_type)
        total += n_bytes
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return total


def parse_costs(text: str) -> list[tuple[int, float]]:
    """"4.3" (microseconds of any) or "32768:3,16777216:64" (bytes:microseconds) as (bytes, seconds), by bytes."""
    try:
        pairs = [field.split(":") if ":" in field else ["0", field] for field in text.split(",")]
        costs = sorted((int(n_bytes), float(us) * 1e-6) for n_bytes, us in pairs)
    except ValueError:
        raise ExplainError(f"{text} is no time of all_reduces: write for example 4.3, or 32768:3,16777216:64 (bytes:microseconds)") from None
    if len(costs) > 1 and len({n for n, _ in costs}) < len(costs):
        raise ExplainError(f"{text} has two times for one size")
    return costs


def cost(costs: list[tuple[int, float]], n_bytes: int) -> float:
    """Seconds: the first below its size, between two in proportion, beyond the last as fast as that. One alone is of any size."""
    if len(costs) == 1 or n_bytes <= costs[0][0]:
        return costs[0][1]
    for (a, fast), (b, slow) in zip(costs, costs[1:], strict=False):
        if n_bytes <= b:
            return fast + (slow - fast) * (n_bytes - a) / (b - a)
    return costs[-1][1] * n_bytes / costs[-1][0]


def projected(tokens_per_s: float, n_tokens: int, n_steps: int, tokens_a_step: int, all_reduces: list[int], costs: list[tuple[int, float]]) -> float:
    """Tokens/s of all ranks: the share's seconds for n_tokens, and in each of n_steps the collectives of tokens_a_step tokens one behind the other."""
    return n_tokens / (n_tokens / tokens_per_s + n_steps * sum(cost(costs, n_bytes * tokens_a_step) for n_bytes in all_reduces))
