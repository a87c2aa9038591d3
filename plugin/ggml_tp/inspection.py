"""What a loaded libggml-tp.so says of itself: plan and program text, counters, bytes per rank (inspect.h, read verbatim)."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cffi

from . import LIBRARY

REDUCES = {"NCCL": 0, "NCCL in a graph": 1, "NCCL, symmetric windows": 2, "pulled, with the norm": 3, "pushed, with the norm": 4}
TEXTS = {"config": 0, "layout": 1, "plan": 2, "program": 3, "devices": 4, "stages": 5}
# Of a model's graph, what its file's tensors do not say.
TRAITS = {"layer_norm": 1, "parallel": 2, "residual_first": 4, "encoder": 8, "unfused": 16}


@dataclass(frozen=True)
class Counters:
    graphs_computed: int
    programs_built: int
    graph_launches_per_rank: int
    weights_resharded: int
    last_all_reduces: int
    last_all_gathers: int
    last_kernel_launches: int
    programs_cached: int
    host_all_reduces: int
    graphs_unread: int


@dataclass(frozen=True)
class Layer:
    """One layer's attention: heads, their elements, and the cells of its KV cache; more see inspect.h."""

    n_head: int
    n_head_kv: int
    head_k: int
    head_v: int
    cells: int
    cache_of: int = -1
    sparse_gate: bool = False


class Inspection:
    """The groups of ranks in this process; group 0 is the first host's."""

    def __init__(self, library: Path = LIBRARY) -> None:
        self.ffi = cffi.FFI()
        self.ffi.cdef((library.parent / "inspect.h").read_text())
        self.lib: Any = self.ffi.dlopen(os.fspath(library))

    def version(self) -> str:
        return self.ffi.string(self.lib.ggml_tp_version()).decode()

    def n_groups(self) -> int:
        return self.lib.ggml_tp_group_count()

    def n_ranks(self, group: int = 0) -> int:
        return self.lib.ggml_tp_rank_count(group)

    def text(self, what: str, group: int = 0) -> str:
        n = self.lib.ggml_tp_text(group, TEXTS[what], self.ffi.NULL, 0)
        buffer = self.ffi.new("char[]", n + 1)
        self.lib.ggml_tp_text(group, TEXTS[what], buffer, n + 1)
        return self.ffi.string(buffer).decode()

    def counters(self, group: int = 0) -> Counters:
        out = self.ffi.new("struct ggml_tp_counters *")
        if self.lib.ggml_tp_get_counters(group, out) != 0:
            raise LookupError(f"no group {group}")
        return Counters(**{name: getattr(out, name) for name in Counters.__dataclass_fields__})

    def rank_bytes(self, group: int = 0) -> list[dict[str, int]]:
        """Weight, KV cache and compute bytes of every rank."""
        out = []
        for rank in range(self.n_ranks(group)):
            values = self.ffi.new("uint64_t[3]")
            self.lib.ggml_tp_rank_bytes(group, rank, values, values + 1, values + 2)
            out.append(dict(zip(("weight", "kv", "compute"), map(int, values), strict=True)))
        return out

    def rates(self, rank: int = 0, gib: float = 4.0, rounds: int = 5, group: int = 0) -> dict[str, float]:
        """Bytes per second that a rank's device reads, and copies (read plus written), measured now."""
        values = self.ffi.new("double[2]")
        if self.lib.ggml_tp_measure(group, rank, int(gib * 2**30), rounds, values, values + 1) != 0:
            raise LookupError(f"rank {rank} could not be measured; see the line above")
        return {"read": values[0], "copy": values[1]}

    def all_reduce_seconds(self, n_bytes: int, how: str, rounds: int = 50, group: int = 0) -> float | None:
        """One all_reduce of f32 among the ranks, `how` of REDUCES; None: this library cannot reduce that way."""
        seconds = self.ffi.new("double *")
        status = self.lib.ggml_tp_time_all_reduce(group, n_bytes, REDUCES[how], rounds, seconds)
        if status == -1:
            raise LookupError(f"an all_reduce of {n_bytes} bytes by {how} could not be timed; see the line above")
        return None if status else seconds[0]

    def delay(self, rank: int, seconds: float, group: int = 0) -> None:
        """For tests: the rank's next graph begins that much later."""
        if self.lib.ggml_tp_delay(group, rank, seconds) != 0:
            raise LookupError(f"no rank {rank}")

    def explain(
        self, tensors: list[tuple[str, int, list[int]]], layers: list[Layer], n_embd: int, n_expert_used: int, cache_types: tuple[int, int],
        n_ranks: int, split: list[float] | None = None, traits: frozenset[str] = frozenset(),
    ) -> dict[str, Any]:  # fmt: skip
        """The plan of one decoded token of a model whose device tensors are (name, type, ne); needs no host and no device. Keys: see inspect.h.

        `traits`: of TRAITS, what no tensor says.
        """
        ffi = self.ffi
        names = [ffi.new("char[]", name.encode()) for name, _, _ in tensors]
        rows = ffi.new("struct ggml_tp_file_tensor[]", max(len(tensors), 1))
        for row, text, (_, type_, ne) in zip(rows, names, tensors, strict=False):
            row.name, row.type, row.ne = text, type_, (*ne, 1, 1, 1)[:4]
        shapes = ffi.new("struct ggml_tp_layer[]", max(len(layers), 1))
        for shape, layer in zip(shapes, layers, strict=False):
            for name, number in vars(layer).items():
                setattr(shape, name, number)
        model = ffi.new("struct ggml_tp_model *")
        model.tensors, model.n_tensors, model.layers, model.n_layers = rows, len(tensors), shapes, len(layers)
        model.n_embd, model.n_expert_used, (model.type_k, model.type_v) = n_embd, n_expert_used, cache_types
        model.traits = sum(TRAITS[trait] for trait in traits)
        shares = ffi.new("double[]", split) if split else ffi.NULL
        n = 1024 * len(tensors)
        while True:  # once, unless names are very long
            buffer = ffi.new("char[]", n + 1)
            needed = self.lib.ggml_tp_explain(model, n_ranks, shares, buffer, n + 1)
            if needed <= n:
                return json.loads(ffi.buffer(buffer, needed)[:].decode(errors="replace"))
            n = needed
