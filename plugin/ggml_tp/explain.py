"""What N ranks make of a model, from its GGUF alone: the core's own plan of one token, bytes per rank, what fits, how fast it can be."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .inspection import Inspection, Layer

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
# Of the host's input layer: they stay with its CPU. token_embd is copied to the device where it is the output head as well.
_ON_CPU = ("token_embd.weight", "token_types.weight", "position_embd.weight", "per_layer_token_embd.weight")
# Architectures whose plan is that of a host's graph (tests compare). Of others, what tensors are for is taken from their names all the same.
COMPARED = frozenset([
    "bert", "bloom", "command-r", "cohere2", "dbrx", "deepseek2", "exaone4", "falcon", "falcon-h1", "gemma2", "gemma3", "gemma3n", "glm4", "glm4moe",
    "gpt-oss", "gpt2", "gptneox", "granitehybrid", "granitemoe", "grok", "jamba", "kimi-linear", "lfm2", "llama", "llama4", "mamba", "mamba2", "minicpm3",
    "minimax-m2", "mpt", "nemotron_h", "olmo2", "olmoe", "phi2", "phi3", "qwen2", "qwen2moe", "qwen3", "qwen35", "qwen35moe", "qwen3moe", "qwen3next",
    "rwkv6", "rwkv7", "stablelm", "starcoder2", "t5",
])  # fmt: skip
# Of every so many layers all but the last attend to a window only, where the file does not say it.
_WINDOW_PERIOD = {"gpt-oss": 2, "gemma2": 2, "gemma3": 6, "cohere2": 4}
# What neither keys nor tensors say: whose parallel layers add feed forward to the residual before attention, and which attention is never flash attention.
_RESIDUAL_FIRST, _UNFUSED = ("command-r", "cohere2", "gptneox"), ("grok",)
# Layers that have caches of their own (those behind read the last two of them, one of which has a window), and those whose gates are sparse.
_OWN_CACHES, _SPARSE_GATES = {"gemma3n": 20}, {"gemma3n": 10}
_CELL_PADDING = 256
_FAR = 1 << 16  # cells; no window is as long


class ExplainError(ValueError):
    """One line that says what cannot be explained."""


@dataclass(frozen=True)
class File:
    """What a GGUF says of a model, as far as it matters here."""

    architecture: str
    tensors: list[tuple[str, int, list[int]]]  # name, type, ne
    heads: list[tuple[int, int, int, int]]  # per layer: query heads, KV heads, elements of a K and of a V head
    n_embd: int
    n_ff: int  # the widest that a token has at once
    n_vocab: int
    n_expert: int
    n_expert_used: int
    n_ctx_train: int
    window: int  # tokens that some layers attend to; 0: all attend to all
    windowed: list[bool]  # per layer
    traits: frozenset[str] = frozenset()  # of inspection.TRAITS
    n_ahead: int = 0  # layers behind these that predict tokens further ahead: hosts leave them out, tensors too

    @property
    def device_tensors(self) -> list[tuple[str, int, list[int]]]:
        tied = "encoder" not in self.traits and all(name != "output.weight" for name, _, _ in self.tensors)
        left_out = tuple(f"blk.{len(self.heads) + i}." for i in range(self.n_ahead))
        return [t for t in self.tensors if (t[0] not in _ON_CPU and not t[0].startswith(left_out)) or (tied and t[0] == "token_embd.weight")]

    def layers(self, n_ctx: int, n_ubatch: int, swa_full: bool) -> list[Layer]:
        cells = _padded(n_ctx)
        few = cells if swa_full else min(cells, _padded(self.window + n_ubatch))
        own = _OWN_CACHES.get(self.architecture, len(self.heads))
        return [
            Layer(*heads, few if windowed else cells, -1 if i < own else own - 1 - windowed, i < _SPARSE_GATES.get(self.architecture, 0))
            for i, (heads, windowed) in enumerate(zip(self.heads, self.windowed, strict=True))
        ]


def _padded(n: int) -> int:
    return (n + _CELL_PADDING - 1) // _CELL_PADDING * _CELL_PADDING


def parts(path: Path) -> list[Path]:
    """All files of a model that is split over several."""
    match = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", path.name)
    if not match:
        return [path]
    return [path.with_name(f"{match[1]}-{i:05}-of-{match[3]}.gguf") for i in range(1, int(match[3]) + 1)]


def read(path: str | Path) -> File:
    """Raises ExplainError with one line."""
    import gguf

    tensors: list[tuple[str, int, list[int]]] = []
    fields: dict[str, Any] = {}
    for part in parts(Path(path)):
        if not part.is_file():
            raise ExplainError(f"no model at {part}")
        try:
            reader = gguf.GGUFReader(part)
            tensors += [(t.name, int(t.tensor_type), [int(n) for n in t.shape]) for t in reader.tensors]
        except Exception as error:  # whatever numpy and gguf raise on bytes that are no GGUF
            raise ExplainError(f"{part} is no GGUF that can be read: {' '.join(str(error).split())[:160]}") from None
        fields = {**reader.fields, **fields}

    def value(key: str, default: Any = None) -> Any:
        field = fields.get(key)
        return default if field is None else field.contents()

    arch = value("general.architecture")
    n_layer, n_embd, n_head = (value(f"{arch}.{key}") for key in ("block_count", "embedding_length", "attention.head_count"))
    n_ahead = int(value(f"{arch}.nextn_predict_layers", 0))
    if not arch or not n_layer or not n_embd or not tensors or n_layer <= n_ahead:
        raise ExplainError(f"{path} is no language model: it has no layers, embedding length or tensors")
    n_layer = int(value(f"{arch}.decoder_block_count", n_layer - n_ahead))

    def per_layer(key: str, default: Any) -> list[int]:
        number = value(f"{arch}.{key}", default)
        return [int(n) for n in number][: len(number) - n_ahead] if isinstance(number, list) else [int(number or 0)] * n_layer

    heads = per_layer("attention.head_count", 0)
    kv_heads = per_layer("attention.head_count_kv", n_head)
    if len(heads) != n_layer or len(kv_heads) != n_layer:
        raise ExplainError(f"{path} names head counts for {len(heads)} and {len(kv_heads)} layers but has {n_layer}")
    common = n_embd // max(heads[0], 1)
    head_k, head_v = int(value(f"{arch}.attention.key_length", common)), int(value(f"{arch}.attention.value_length", common))
    if head := int(value(f"{arch}.wkv.head_size", 0)):  # RWKV names its heads by their size alone
        heads, kv_heads, head_k, head_v = [n_embd // head] * n_layer, [0] * n_layer, head, head
    vocabulary = next((ne[1] for name, _, ne in tensors if name == "token_embd.weight" and len(ne) > 1), 0)
    n_ff = per_layer("feed_forward_length", 0)
    of_experts = int(value(f"{arch}.expert_feed_forward_length", 0)) * int(value(f"{arch}.expert_used_count", 0))
    window = per_layer("attention.sliding_window", 0)[0]
    period = value(f"{arch}.attention.sliding_window_pattern", _WINDOW_PERIOD.get(arch, 1))
    windowed = [bool(flag) for flag in period] if isinstance(period, list) else [i % period < period - 1 for i in range(n_layer)]
    names = {name for name, _, _ in tensors}
    only_encodes = "enc.output_norm.weight" in names and "dec.output_norm.weight" not in names
    traits = {
        "layer_norm": value(f"{arch}.attention.layer_norm_rms_epsilon") is None, "parallel": value(f"{arch}.use_parallel_residual", False),
        "residual_first": arch in _RESIDUAL_FIRST, "unfused": arch in _UNFUSED,
        "encoder": "output.weight" not in names and (only_encodes or not value(f"{arch}.attention.causal", True)),
    }  # fmt: skip
    return File(
        architecture=arch, tensors=tensors, heads=[(h, kv, head_k, head_v) for h, kv in zip(heads, kv_heads, strict=True)], n_embd=n_embd,
        n_ff=max(*n_ff, of_experts), n_vocab=vocabulary, n_expert=int(value(f"{arch}.expert_count", 0)),
        n_expert_used=int(value(f"{arch}.expert_used_count", 0)), n_ctx_train=int(value(f"{arch}.context_length", 0)),
        window=window, windowed=(windowed + [False] * n_layer)[:n_layer] if window else [False] * n_layer,
        traits=frozenset(name for name, holds in traits.items() if holds), n_ahead=n_ahead,
    )  # fmt: skip


def compute_bytes(file: File, n_ctx: int, n_ubatch: int) -> int:
    """About what the host asks for activations, all of it on every rank: logits of a batch, mask (f16), what a layer holds at once."""
    widest = max(max((h * k for h, _, k, _ in file.heads), default=0), file.n_ff, file.n_embd)
    mask = _padded(n_ctx) * n_ubatch * 2 * (2 if any(file.windowed) else 1)
    return n_ubatch * 4 * (file.n_vocab + 6 * file.n_embd + 4 * widest) + mask


def explain(
    path: str | Path, n_ranks: int, split: list[float] | None = None, n_ctx: int = 8192, cache_types: tuple[str, str] = ("f16", "f16"),
    n_ubatch: int = 512, swa_full: bool = False, gib: float | None = None, reserve_gib: float = 1.0, read_gbs: float | None = None,
    all_reduce_us: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """`swa_full`: whether the host keeps every token also for layers that attend to a window (libraries do, llama.cpp's programs do not).

    Keys: model, ranks, tensors, reshards, weight_bytes, read_bytes_per_token, kv, fits (with gib), speed (with read_gbs), notes.
    """
    import gguf

    types = {t.name.lower(): int(t) for t in gguf.GGMLQuantizationType}
    for name in cache_types:
        if name not in types:
            raise ExplainError(f"{name} is no type of a cache: write for example f16 or q8_0")
    file = read(path)
    inspection = Inspection()

    def plan(cells: int) -> dict[str, Any]:
        layers = file.layers(cells, n_ubatch, swa_full)
        of_caches = (types[cache_types[0]], types[cache_types[1]])
        made = inspection.explain(file.device_tensors, layers, file.n_embd, file.n_expert_used, of_caches, n_ranks, split, file.traits)
        if "error" in made:
            raise ExplainError(made["error"])
        return made

    made = plan(n_ctx)
    notes = made["notes"]
    if file.architecture not in COMPARED:
        notes = [f"{file.architecture}: not one of the architectures compared with real plans; what its tensors are for is taken from their names", *notes]
    weights = _sums(made["tensors"], n_ranks)

    def read_of(row: dict[str, Any], rank: int) -> float:
        return row["bytes"][rank] * (file.n_expert_used / file.n_expert if "_exps." in row["name"] and file.n_expert else 1.0)

    read_bytes = [int(sum(read_of(row, rank) for row in made["tensors"])) for rank in range(n_ranks)]
    kv_bytes = _sums(made["caches"], n_ranks)
    # Caches grow linearly once windows are full: two plans say all.
    low, high = (_sums(plan(n)["caches"], n_ranks) for n in (_FAR, 2 * _FAR))
    per_cell = [(b - a) / _FAR for a, b in zip(low, high, strict=True)]
    out: dict[str, Any] = {
        "model": {
            "file": Path(path).name, "architecture": file.architecture, "layers": len(file.heads), "layers_ahead": file.n_ahead,
            "parameters": sum(_elems(ne) for _, _, ne in file.tensors), "experts": file.n_expert, "experts_used": file.n_expert_used,
            "n_ctx_train": file.n_ctx_train,
        },
        "ranks": n_ranks, "split": split, "tensors": made["tensors"], "caches": made["caches"], "reshards": made["reshards"],
        "all_reduces_per_token": sum(row["kind"] == "all_reduce" for row in made["reshards"]),
        "all_gathers_per_token": sum(row["kind"] == "all_gather" for row in made["reshards"]),
        "weight_bytes": weights, "read_bytes_per_token": read_bytes,
        "kv": {"n_ctx": n_ctx, "types": list(cache_types), "bytes": kv_bytes, "bytes_per_1k_tokens": [int(1024 * n) for n in per_cell]},
        "notes": notes,
    }  # fmt: skip
    if gib is not None:
        out["fits"] = _fits(file, weights, low, per_cell, n_ubatch, gib, reserve_gib)
    if read_gbs is not None:
        waiting = 0.0 if all_reduce_us is None else out["all_reduces_per_token"] * all_reduce_us * 1e-6

        def tokens_per_s(kv: list[int]) -> float:
            return 1 / (max(a + b for a, b in zip(read_bytes, kv, strict=True)) / (read_gbs * 1e9) + waiting)

        out["speed"] = {
            "read_gbs": read_gbs, "all_reduce_us": all_reduce_us, "all_reduce_share": waiting * tokens_per_s([0] * n_ranks),
            "tokens_per_s": tokens_per_s([0] * n_ranks), "tokens_per_s_at_n_ctx": tokens_per_s(kv_bytes),
        }  # fmt: skip
    return out


def _elems(ne: list[int]) -> int:
    n = 1
    for of_axis in ne:
        n *= of_axis
    return n


def _sums(rows: list[dict[str, Any]], n_ranks: int) -> list[int]:
    return [sum(row["bytes"][rank] for row in rows) for rank in range(n_ranks)]


def _fits(
    file: File, weights: list[int], far_kv: list[int], kv_per_cell: list[float], n_ubatch: int, gib: float, reserve_gib: float
) -> dict[str, Any]:  # fmt: skip
    """The largest context, in steps of 256 cells: on the fullest rank weights, its part of the cache, all of the activations, the reserve."""
    card = int(gib * GIB)

    def left(n_ctx: int) -> int:
        held = max(w + kv + each * (n_ctx - _FAR) for w, kv, each in zip(weights, far_kv, kv_per_cell, strict=True))
        return int(card - reserve_gib * GIB - held - compute_bytes(file, n_ctx, n_ubatch))

    n = 0
    step = 1 << 30
    while step >= _CELL_PADDING:
        if left(n + step) >= 0:
            n += step
        step //= 2
    return {
        "gib": gib, "reserve_gib": reserve_gib, "n_ctx": n, "weights_fit": left(_CELL_PADDING) >= 0,
        "compute_bytes": compute_bytes(file, n, n_ubatch), "beyond_training": bool(file.n_ctx_train) and n > file.n_ctx_train,
    }  # fmt: skip


# ---- for people


def size(n_bytes: float) -> str:
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if n_bytes >= unit:
            return f"{n_bytes / unit:.2f} {name}"
    return f"{n_bytes:.0f} B"


def _count(n: int) -> str:
    return f"{n / 1e9:.2f} B" if n >= 1e8 else f"{n / 1e6:.2f} M"


def _sizes(values: list[int]) -> str:
    return f"{size(values[0])} each" if len(set(values)) == 1 and len(values) > 1 else ", ".join(map(size, values))


def _layout(text: str) -> str:
    """"sharded axis 1 [0,8) [8,16)" -> "axis 1: 8 + 8"."""
    match = re.fullmatch(r"sharded axis (\d)((?: \[\d+,\d+\))+)", text)
    if not match:
        return "whole" if text == "replicated" else text
    lengths = [int(end) - int(begin) for begin, end in re.findall(r"\[(\d+),(\d+)\)", match[2])]
    return f"axis {match[1]}: " + (f"{len(lengths)} x {lengths[0]}" if len(set(lengths)) == 1 else " + ".join(map(str, lengths)))


def _layer_of(name: str) -> tuple[str, int | None]:
    match = re.fullmatch(r"blk\.(\d+)\.(.*)", name) or re.fullmatch(r"(?:cache_([kv])_l(\d+))", name)
    if not match:
        return name, None
    return (f"blk.*.{match[2]}", int(match[1])) if name.startswith("blk.") else (f"cache_{match[1]}", int(match[2]))


def _spans(numbers: list[int]) -> str:
    """0-3,5,7-8."""
    out: list[list[int]] = []
    for n in numbers:
        if out and out[-1][1] == n - 1:
            out[-1][1] = n
        else:
            out.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in out)


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def report(result: dict[str, Any], every: bool) -> str:
    """For people; `every`: a line for each tensor, else one for those that are alike in all layers."""
    model, kv = result["model"], result["kv"]
    groups: dict[tuple[Any, ...], list[int]] = {}
    for row in result["tensors"] + result["caches"]:
        name, layer = (row["name"], None) if every else _layer_of(row["name"])
        key = (name, row["type"], row["global_bytes"], row["layout"], tuple(row["bytes"]), row["reason"])
        groups.setdefault(key, []).append(-1 if layer is None else layer)
    rows = [["tensor", "layers", "type", "whole", "on the ranks", "bytes of a rank", "why"]]
    for (name, type_, whole, layout, of_ranks, reason), layers in groups.items():
        rows.append([name, "" if layers == [-1] else _spans(layers), type_, size(whole), _layout(layout), _sizes(list(of_ranks)), reason])
    split = "even" if not result["split"] else ",".join(f"{share:g}" for share in result["split"])
    experts = f", {model['experts_used']} of {model['experts']} experts" if model["experts"] else ""
    ahead = f" (and {model['layers_ahead']} that predict ahead, which hosts leave out)" if model["layers_ahead"] else ""
    lines = [
        f"{model['file']}: {model['architecture']}, {model['layers']} layers{ahead}{experts}, {_count(model['parameters'])} parameters,"
        f" on {result['ranks']} rank{'s' * (result['ranks'] > 1)} (split {split})",
        "", *_table(rows), "",
        f"weights:  {_sizes(result['weight_bytes'])}; read for one token: {_sizes(result['read_bytes_per_token'])}",
        f"KV cache: {_sizes(kv['bytes_per_1k_tokens'])} per 1k tokens ({'/'.join(kv['types'])}); {_sizes(kv['bytes'])} at {kv['n_ctx']}",
    ]  # fmt: skip
    reshards: dict[tuple[str, int, str], int] = {}
    for row in result["reshards"]:
        kind_of = (row["kind"], row["bytes"], _layer_of(row["tensor"])[0] + ": " + row["reason"])
        reshards[kind_of] = reshards.get(kind_of, 0) + 1
    lines.append(f"a token:  {result['all_reduces_per_token']} all_reduces, {result['all_gathers_per_token']} all_gathers")
    lines += [f"          {count} {kind}{'s' * (count > 1)} of {size(n)} of {text}" for (kind, n, text), count in reshards.items()]
    if fits := result.get("fits"):
        card = f"{fits['gib']:g} GiB cards, {fits['reserve_gib']:g} GiB of each left free"
        if not fits["weights_fit"]:
            lines.append(f"fits:     not on {card}: more ranks are needed, or a smaller type")
        else:
            beyond = f" (trained for {model['n_ctx_train']})" if fits["beyond_training"] else ""
            lines.append(f"fits:     {fits['n_ctx']} tokens of context{beyond} on {card}, about {size(fits['compute_bytes'])} of activations on each")
    if speed := result.get("speed"):
        waits = "" if speed["all_reduce_us"] is None else f", {speed['all_reduce_us']:g} us an all_reduce ({100 * speed['all_reduce_share']:.0f} % of a token)"
        lines.append(
            f"speed:    at most {speed['tokens_per_s']:.1f} tokens/s with an empty cache, {speed['tokens_per_s_at_n_ctx']:.1f} at {kv['n_ctx']} tokens,"
            f" where a rank reads {speed['read_gbs']:g} GB/s{waits}"
        )
    return "\n".join(lines + [f"note:     {note}" for note in _joined(result["notes"])])


def _joined(notes: list[str]) -> list[str]:
    """Notes that are alike but for their layer are one."""
    out: dict[str, list[int]] = {}
    for note in notes:
        match = re.fullmatch(r"blk\.(\d+)\.(.*)", note)
        out.setdefault(f"blk.*.{match[2]}" if match else note, []).append(int(match[1]) if match else -1)
    return [note if layers == [-1] else f"layers {_spans(layers)}: {note.removeprefix('blk.*.')}" for note, layers in out.items()]
