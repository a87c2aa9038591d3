"""Speed through a real host: prefill, decode, depth and batches, as shares of the memory rate measured in the same run."""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import LIBRARY


@dataclass(frozen=True)
class Test:
    """`n_prompt` tokens in one batch, or `n_gen` steps of `n_seq` sequences, after `depth` tokens in the cache."""

    n_prompt: int = 0
    n_gen: int = 0
    n_seq: int = 1
    depth: int = 0

    @property
    def name(self) -> str:
        kind = f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"
        return kind + (f" x{self.n_seq}" if self.n_seq > 1 else "") + (f" @{self.depth}" if self.depth else "")


def parse(text: str) -> Test:
    """"pp512", "tg128", "tg64@16384", "tg32x8": prompt or generated tokens, sequences, depth."""
    head, _, depth = text.partition("@")
    head, _, n_seq = head.partition("x")
    kind, n = head[:2], head[2:]
    if kind not in ("pp", "tg") or not n.isdigit() or (depth and not depth.isdigit()) or (n_seq and not n_seq.isdigit()):
        raise SystemExit(f"ggml-tp: {text} is no test: write for example pp512, tg128, tg64@16384 (at depth) or tg32x8 (8 sequences)")
    count = int(n)
    return Test(count if kind == "pp" else 0, count if kind == "tg" else 0, int(n_seq or 1), int(depth or 0))


def bytes_per_token(model: str) -> int:
    """Weights read for one decoded token of a dense model: everything but the embedding table, unless it is the output head as well."""
    import gguf

    reader = gguf.GGUFReader(model)
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in reader.tensors}
    used = {tensor.name: tensor for tensor in reader.tensors}
    architecture = reader.fields["general.architecture"].contents()
    n_expert = reader.fields.get(f"{architecture}.expert_count")
    n_used = reader.fields.get(f"{architecture}.expert_used_count")
    share = n_used.contents() / n_expert.contents() if n_expert and n_used else 1.0
    skip = "token_embd.weight" if "output.weight" in used else ""
    return int(sum(size * (share if "_exps." in name else 1.0) for name, size in sizes.items() if name != skip))


def _steps(context: Any, test: Test) -> tuple[int, float]:
    """(tokens, seconds) of one repetition. Token ids do not matter for speed; they vary so that nothing is cached by value."""
    context.clear()
    ids = min(250, context.model.n_vocab)
    for begin in range(0, test.depth, 2048):
        n = min(2048, test.depth - begin)
        for seq in range(test.n_seq):
            context.run([((7 * i) % ids, begin + i, seq) for i in range(n)])
    if test.n_prompt:
        return test.n_prompt, context.run([((7 * i) % ids, test.depth + i, 0) for i in range(test.n_prompt)])
    seconds = sum(context.run([((13 * i + s) % ids, test.depth + i, s) for s in range(test.n_seq)]) for i in range(test.n_gen))
    return test.n_gen * test.n_seq, seconds


def run(model: str, host: str | None, device: str, tests: list[Test], repetitions: int, n_ubatch: int, flash_attn: bool) -> dict[str, Any]:
    """Loads the model once and runs every test on it. Keys: host, device, model_bytes, bytes_per_token, load_s, rates, tests."""
    import time

    from .host import Host
    from .inspection import Inspection

    instance = Host(host)
    instance.quiet()
    out: dict[str, Any] = {"host": str(instance.path), "device": device, "model": Path(model).name, "bytes_per_token": bytes_per_token(model)}
    if device == "TP0":
        instance.load_backend(LIBRARY)
        inspection = Inspection()
        out["ranks"] = inspection.n_ranks()
        out["devices"] = inspection.text("devices")
        # An emulated rate says nothing, and 4 GiB of it would take minutes.
        size = (2**-6, 1) if "kernels emulated" in out["devices"] else (4.0, 5)
        out["rates"] = [inspection.rates(rank, *size) for rank in range(inspection.n_ranks())]
    begin = time.perf_counter()
    loaded = instance.model(model, None if device == "CPU" else device)
    out["load_s"] = time.perf_counter() - begin
    out["tests"] = {}
    for test in tests:
        n_ctx = test.n_seq * (test.depth + test.n_prompt + test.n_gen + 32)
        context = loaded.context(n_ctx=(n_ctx + 255) // 256 * 256, flash_attn=flash_attn, n_seq_max=test.n_seq, n_ubatch=n_ubatch)
        _steps(context, Test(test.n_prompt, min(test.n_gen, 4), test.n_seq, min(test.depth, 512)))  # captures, allocates
        speeds = []
        for _ in range(repetitions):
            n, seconds = _steps(context, test)
            speeds.append(n / seconds)
        context.close()
        row: dict[str, Any] = {"tokens_per_s": statistics.median(speeds), "all": speeds}
        if test.n_gen and test.n_seq == 1 and "rates" in out:
            rate = min(r["read"] for r in out["rates"]) * out["ranks"]
            row["read_limit_tokens_per_s"] = rate / out["bytes_per_token"]
            row["share_of_limit"] = row["tokens_per_s"] / row["read_limit_tokens_per_s"]
        out["tests"][test.name] = row
        print(f"ggml-tp: {device} {test.name}: {row['tokens_per_s']:.1f} tokens/s", file=sys.stderr, flush=True)
    if device == "TP0":
        counters = inspection.counters()
        out["kernel_launches"], out["all_reduces"] = counters.last_kernel_launches, counters.last_all_reduces
    loaded.close()
    return out
