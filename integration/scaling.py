#!/usr/bin/env python3
"""What N GPUs bring, against one GPU and against a peer: all_reduce latency, decode and prefill of models, and what the memory allows.

    doctor -> all_reduce 8 KB..64 MB -> for each model: 1, 2, 4 .. N ranks, the peer's -sm none|layer|tensor -> Markdown and JSON

Models are the *.gguf of a folder, or synthetic ones of real shapes (shapes.py), written, measured and deleted one by one. Every step is a
process of its own with a timeout; one that fails is a row that says so. The JSON is written after each step.

example: python integration/scaling.py --gpus 2 --peer ./llama-bench --json scaling.json
         python integration/scaling.py --gpus 4 --models ./models --quick
         GGML_TP_EMULATE="sm_80*2" python integration/scaling.py --gpus 2 --shapes tiny:Q4_0 --quick
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import shapes

KIB, MIB = 1 << 10, 1 << 20
SIZES = (8 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB, 16 * MIB, 64 * MIB)
QUICK_SIZES = (8 * KIB, 64 * KIB, MIB)
TESTS, QUICK_TESTS = ("pp512", "pp2048", "tg128"), ("pp64", "tg16")
PEER_MODES = ("none", "layer", "tensor")
MOST_ROUND_BYTES = 4 << 30  # of one timed row of all_reduces


def say(text: str) -> None:
    print(f"scaling: {text}", file=sys.stderr, flush=True)


def run(command: list[str], environment: dict[str, str], timeout: float, right: tuple[int, ...] = (0,)) -> tuple[str | None, str]:
    """(stdout, "") or (None, why not); `right`: the statuses with which stdout counts."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ) | environment, timeout=timeout)
    except subprocess.TimeoutExpired:
        return None, f"no end within {timeout:.0f} s"
    except OSError as error:
        return None, str(error)
    if done.returncode not in right:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return None, f"status {done.returncode}: {lines[-1] if lines else 'nothing on stderr'}"
    return done.stdout, ""


def ranks(devices: list[str], n: int) -> dict[str, str]:
    return {"GGML_TP_DEVICES": ",".join(devices[:n])}


# ---- all_reduce


def time_all_reduces(sizes: list[int]) -> dict[str, dict[str, float]]:
    """In a process of its own: seconds by way and size."""
    from ggml_tp import LIBRARY
    from ggml_tp.host import Host
    from ggml_tp.inspection import REDUCES, Inspection

    host = Host()
    host.quiet()
    host.load_backend(LIBRARY)
    inspection = Inspection()
    out: dict[str, dict[str, float]] = {}
    for how in REDUCES:
        for size in sizes:
            seconds = inspection.all_reduce_seconds(size, how, rounds=max(4, min(200, MOST_ROUND_BYTES // size // 16)))
            if seconds is None:
                break
            out.setdefault(how, {})[str(size)] = seconds
    return out


def latency(table: dict[str, dict[str, float]], n_bytes: int) -> float | None:
    """Seconds of the fastest way that a token may use (in a graph), between the sizes measured."""
    best = None
    for how, row in table.items():
        if how == "NCCL" and len(table) > 1:
            continue
        points = sorted((int(size), seconds) for size, seconds in row.items())
        below = max((p for p in points if p[0] <= n_bytes), default=points[0])
        above = min((p for p in points if p[0] >= n_bytes), default=points[-1])
        share = 0.0 if above[0] == below[0] else math.log(n_bytes / below[0]) / math.log(above[0] / below[0])
        seconds = below[1] + (above[1] - below[1]) * min(max(share, 0.0), 1.0)
        best = seconds if best is None else min(best, seconds)
    return best


# ---- models


def embedding_length(model: Path) -> int:
    import gguf

    fields = gguf.GGUFReader(model).fields
    return int(fields[f"{fields['general.architecture'].contents()}.embedding_length"].contents())


@contextmanager
def synthetic(spec: str, folder: Path) -> Iterator[Path]:
    """NAME:TYPE[:LAYERS]"""
    name, type_, *layers = spec.split(":")
    path = folder / (spec.replace(":", "-") + ".gguf")
    say(f"writing {path}")
    shapes.write(path, name, type_, int(layers[0]) if layers else None)
    try:
        yield path
    finally:
        path.unlink()


@contextmanager
def existing(path: Path) -> Iterator[Path]:
    yield path


def measure_ours(model: Path, devices: list[str], n: int, args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "ggml_tp.cli", "bench", str(model), "--ranks", str(n), "--tests", ",".join(args.tests)]
    out, why = run([*command, "-r", str(args.repetitions), "--json"], ranks(devices, n), args.timeout)
    return {"error": why} if out is None else json.loads(out)[0]


def measure_peer(model: Path, mode: str, args: argparse.Namespace) -> dict[str, Any]:
    """llama-bench's rows as {test: tokens/s}."""
    prompts = [t[2:] for t in args.tests if t.startswith("pp")]
    gens = [t[2:] for t in args.tests if t.startswith("tg")]
    command = [args.peer, "-m", str(model), "-sm", mode, "-ngl", "99", "-fa", "1", "-p", ",".join(prompts) or "0", "-n", ",".join(gens) or "0"]
    visible = {} if "CUDA_VISIBLE_DEVICES" in os.environ else {"CUDA_VISIBLE_DEVICES": ",".join(args.devices)}
    out, why = run([*command, "-r", str(args.repetitions), "-o", "json"], visible, args.timeout)
    if out is None:
        return {"error": why}
    try:
        rows = json.loads(out)
    except ValueError:
        return {"error": "its output is not JSON"}
    tests = {(f"pp{row['n_prompt']}" if row["n_prompt"] else f"tg{row['n_gen']}"): {"tokens_per_s": row["avg_ts"], "all": row["samples_ts"]} for row in rows}
    return {"tests": tests, "build": rows[0].get("build_commit", "") if rows else ""}


def speed(part: dict[str, Any] | None, test: str) -> float | None:
    row = (part or {}).get("tests", {}).get(test)
    return row["tokens_per_s"] if row else None


def rank_counts(text: str | None, n: int) -> list[int]:
    """Of --ranks, else 1, 2, 4, ... and all n."""
    counts = [int(field) for field in text.split(",")] if text else [1 << i for i in range(n.bit_length()) if 1 << i < n]
    return sorted({*counts, 1, n})


def add_model(entry: dict[str, Any], reduces: dict[str, dict[str, float]], n: int) -> None:
    """A token's time by its parts: weights at the measured read rate, then all_reduces at the measured latency."""
    many = entry["ours"].get(str(n), {})
    if "rates" not in many:
        return
    rate = min(r["read"] for r in many["rates"])
    weights = many["bytes_per_token"] / n / rate
    each = latency(reduces, entry["n_embd"] * 4) if reduces else None
    waiting = many["all_reduces"] * (each or 0.0)
    tg = next((t for t in many["tests"] if t.startswith("tg")), None)
    entry["limit"] = {
        "bytes_per_token": many["bytes_per_token"],
        "read_rate": rate,
        "all_reduces": many["all_reduces"],
        "all_reduce_s": each,
        "tokens_per_s": 1 / (weights + waiting),
        "tokens_per_s_without_reduces": 1 / weights,
        "share": speed(many, tg) * (weights + waiting) if tg else None,  # type: ignore[operator]
    }


# ---- the report


def number(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def size_text(n_bytes: int) -> str:
    return f"{n_bytes // MIB} MB" if n_bytes >= MIB else f"{n_bytes // KIB} KB"


def ratio(a: float | None, b: float | None) -> str:
    return "–" if a is None or not b else f"{a / b:.2f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]) + "\n"


def report(result: dict[str, Any]) -> str:
    n = result["gpus"]
    lines = [f"# {n} ranks on {', '.join(result['devices'])}: {result['gpu']}\n", f"{result['when']}, ggml-tp {result['version']}, commit {result['commit']}\n"]
    reduces = result["all_reduce"]
    if "error" in reduces:
        lines.append(f"all_reduce: {reduces['error']}\n")
    elif reduces:
        sizes = sorted({int(size) for row in reduces.values() for size in row})
        times = [[row.get(str(size)) for row in reduces.values()] for size in sizes]
        rows = [[size_text(size), *(number(s and 1e6 * s) for s in row)] for size, row in zip(sizes, times, strict=True)]
        lines.append(table(["all_reduce, µs", *reduces], rows))
    modes = [f"peer {mode}" for mode in PEER_MODES] if result["peer"] else []
    counts = result["ranks"]
    rows, limits, failures = [], [], []
    for entry in result["models"]:
        for test in result["tests"]:
            ours = [speed(entry["ours"].get(str(count)), test) for count in counts]
            peers = [speed(entry["peer"].get(mode), test) for mode in PEER_MODES] if modes else []
            best = max((p for p in peers if p is not None), default=None)
            gains = [ratio(each, ours[0]) for each in ours[1:]]
            rows.append([entry["name"], test, *map(number, ours), *gains, *map(number, peers), *([ratio(ours[-1], best)] if modes else [])])
        if limit := entry.get("limit"):
            each = number(1e6 * limit["all_reduce_s"] if limit["all_reduce_s"] is not None else None)
            limits.append([
                entry["name"], f"{limit['bytes_per_token'] / 1e9:.2f} GB", f"{limit['read_rate'] / 1e12:.2f} TB/s", f"{limit['all_reduces']} × {each} µs",
                number(limit["tokens_per_s"]), "–" if limit["share"] is None else f"{100 * limit['share']:.0f} %",
            ])  # fmt: skip
        for group in ("ours", "peer"):
            failures += [f"- {entry['name']}, {group} {key}: {part['error']}" for key, part in entry[group].items() if "error" in part]
    heads = [*("1 rank" if count == 1 else f"{count} ranks" for count in counts), *(f"{count} / 1" for count in counts[1:])]
    lines.append(table(["tokens/s of", "test", *heads, *modes, *([f"{n} ranks / best peer"] if modes else [])], rows))
    if limits:
        lines.append(table(["decode", "read a token", "a rank reads", "all_reduces", f"limit of {n} ranks, tokens/s", "reached"], limits))
    return "\n".join(lines + (["Failed:\n", *failures] if failures else []))


def commit() -> str:
    out, _ = run(["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"], {}, 10)
    return (out or "unknown").strip()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure what N GPUs bring, against one and against a peer.",
        epilog="example: python integration/scaling.py --gpus 2 --peer ./llama-bench --shapes llama-8b:Q4_K,llama-70b:Q4_K:20 --json scaling.json",
    )
    parser.add_argument("--gpus", type=int, default=2, help="the most ranks (default: %(default)s)")
    parser.add_argument("--devices", help="CUDA device of each rank; a number twice puts two ranks on one GPU (default: 0,1,...)")
    parser.add_argument("--ranks", help="rank counts, on the first of --devices; 1 and --gpus are among them (default: 1,2,4,...)")
    parser.add_argument("--models", type=Path, help="folder of *.gguf to measure instead of synthetic ones")
    parser.add_argument("--shapes", default="llama-8b:Q4_0,llama-8b:Q4_K,qwen2.5-72b:Q4_K:20", help="NAME:TYPE[:LAYERS],... (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where synthetic models are written (default: a temporary folder)")
    parser.add_argument("--peer", help="llama-bench, or a script that takes its arguments")
    parser.add_argument("--peer-modes", default=",".join(PEER_MODES), help="its -sm (default: %(default)s)")
    parser.add_argument("--tests", help=f"ppN and tgN (default: {','.join(TESTS)})")
    parser.add_argument("-r", "--repetitions", type=int, help="the median counts (default: 3)")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one run (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help=f"{','.join(QUICK_TESTS)}, one repetition, three all_reduce sizes")
    parser.add_argument("--json", type=Path, help="file to write after each step")
    parser.add_argument("--all-reduces", help=f"bytes of the all_reduces to time (default: {','.join(map(str, SIZES))})")
    parser.add_argument("--measure-all-reduce", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not 1 <= args.gpus <= 16:
        parser.error("--gpus is 1 to 16")
    args.devices = args.devices.split(",") if args.devices else [str(i) for i in range(args.gpus)]
    if len(args.devices) != args.gpus:
        parser.error(f"--devices names {len(args.devices)} devices, --gpus says {args.gpus}")
    args.tests = args.tests.split(",") if args.tests else list(QUICK_TESTS if args.quick else TESTS)
    if args.ranks and not all(field.isdigit() and 1 <= int(field) <= args.gpus for field in args.ranks.split(",")):
        parser.error(f"--ranks {args.ranks}: write counts of 1 to {args.gpus}, for example 1,{args.gpus}")
    if args.all_reduces and not all(field.isdigit() and int(field) >= 4 for field in args.all_reduces.split(",")):
        parser.error(f"--all-reduces {args.all_reduces}: write bytes, for example 8192,65536")
    args.ranks = rank_counts(args.ranks, args.gpus)
    args.repetitions = args.repetitions or (1 if args.quick else 3)
    for spec in [] if args.models else args.shapes.split(","):
        name, type_, *layers = [*spec.split(":"), ""] if ":" not in spec else spec.split(":")
        if name not in shapes.SHAPES or type_ not in shapes.TYPES or len(layers) > 1 or (layers and not layers[0].isdigit()):
            parser.error(f"{spec} is no NAME:TYPE[:LAYERS]: names {', '.join(shapes.SHAPES)}; types {', '.join(shapes.TYPES)}")
    if args.models and not any(args.models.glob("*.gguf")):
        parser.error(f"no *.gguf in {args.models}")
    return args


def main() -> int:
    args = parse()
    if args.measure_all_reduce:
        print("RESULT " + json.dumps(time_all_reduces([int(s) for s in args.measure_all_reduce.split(",")])), flush=True)
        return 0
    from ggml_tp.inspection import Inspection

    n = args.gpus
    result: dict[str, Any] = {
        "when": time.strftime("%Y-%m-%d"), "version": Inspection().version(), "commit": commit(), "gpus": n, "devices": args.devices, "gpu": "unknown",
        "ranks": args.ranks, "tests": args.tests, "peer": args.peer or "", "all_reduce": {}, "models": [],
    }  # fmt: skip

    def save() -> None:
        if args.json:
            args.json.write_text(json.dumps(result, indent=1))

    say("doctor")
    # Status 1: something is wrong, a host that is not installed too; what it says counts all the same.
    out, why = run([sys.executable, "-m", "ggml_tp.cli", "doctor", "--json"], ranks(args.devices, n), args.timeout, right=(0, 1))
    result["doctor"] = json.loads(out) if out else {"error": why}
    if out is None:
        say(f"doctor: {why}")
    host = next((h for h in result["doctor"].get("hosts", {}).values() if h["ok"]), None)
    if host:
        result["gpu"] = next((line.split("TP0: ")[1] for line in host["registered"] if line.startswith("TP0: ")), "unknown")
    save()
    if n > 1:
        say("all_reduce")
        sizes = args.all_reduces or ",".join(map(str, QUICK_SIZES if args.quick else SIZES))
        out, why = run([sys.executable, __file__, "--measure-all-reduce", sizes], ranks(args.devices, n), args.timeout)
        result["all_reduce"] = json.loads(out.split("RESULT ")[1]) if out else {"error": why}
        save()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        todo = [existing(p) for p in sorted(args.models.glob("*.gguf"))] if args.models else [synthetic(s, folder) for s in args.shapes.split(",")]
        for context in todo:
            with context as model:
                entry: dict[str, Any] = {"name": model.stem, "file_bytes": model.stat().st_size, "n_embd": embedding_length(model), "ours": {}, "peer": {}}
                result["models"].append(entry)
                for count in args.ranks:
                    say(f"{model.stem}: {count} rank{'s' * (count > 1)}")
                    entry["ours"][str(count)] = measure_ours(model, args.devices, count, args)
                    save()
                for mode in args.peer_modes.split(",") if args.peer else []:
                    say(f"{model.stem}: peer -sm {mode}")
                    entry["peer"][mode] = measure_peer(model, mode, args)
                    save()
                add_model(entry, {} if "error" in result["all_reduce"] else result["all_reduce"], n)
                save()
    print(report(result))
    return 0 if any(speed(entry["ours"].get(str(n)), test) for entry in result["models"] for test in result["tests"]) else 1


if __name__ == "__main__":
    sys.exit(main())
