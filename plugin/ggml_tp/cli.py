"""The ggml-tp command."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from . import LIBRARY

MODELS = Path(__file__).resolve().parent / "models"
VARIABLES = [
    ("GGML_TP_RANKS", "one per GPU", "number of ranks, 1 to 16"),
    ("GGML_TP_DEVICES", "0,1,2,...", "CUDA device of each rank; a number twice puts two ranks on one GPU"),
    ("GGML_TP_SPLIT", "even", "share of each rank, for example 3,1"),
    ("GGML_TP_GROUPS", "all are TP0", 'ranks of each device that the host sees: "0-1;2-3" is TP0 and TP1, which a host stacks by layers'),
    ("GGML_TP_DEVICES_SEPARATE", "off", "1: a device for each rank, with an all_reduce for a host's own -sm tensor"),
    ("GGML_TP_EMULATE", "off", 'emulated GPUs for tests and demos, slow: "sm_60*4" is four P100-like devices'),
    ("GGML_TP_P2P", "where proven", "0: no direct copies between GPUs, by NCCL either"),
    ("GGML_TP_NORM_BYTES", "2097152", "an all_reduce of so many bytes or more is done by the norm behind it, over the GPUs' direct links"),
    ("GGML_TP_PUSH_BYTES", "by the links", "so is one for which a rank sends others up to so many bytes: 1572864 by NVLink, 131072 by PCIe; 0: none"),
    ("GGML_TP_PERSIST", "where it gains", "0: a kernel per step also where a token could be one persistent kernel (sm_90)"),
    ("GGML_TP_NCCL", "the wheel's", "path of libnccl.so.2 (default: the nvidia-nccl-cu12 wheel beside the package, then the system's)"),
    ("GGML_TP_LOG", "1", "0: errors only, 1: one line per event, 2: more"),
    ("GGML_TP_DEADLINE", "60", "seconds after which a graph whose ranks do not answer fails"),
]


def _measure(host: str | None, model: str, prompt: str, n: int, device: str | None) -> dict[str, Any]:
    """One generation in this process, on the CPU or on TP0."""
    from .host import Host

    instance = Host(host)
    if device is not None:
        instance.load_backend(LIBRARY)
    loaded = instance.model(model, device)
    tokens, logits, speed = loaded.context().generate(loaded.tokenize(prompt), n)
    out: dict[str, Any] = {"host": str(instance.path), "text": loaded.text(tokens), "tokens": tokens, "logits": logits.tolist(), "tokens_per_s": speed}
    if device is not None:
        from .inspection import Inspection

        inspection = Inspection()
        out["all_reduces_per_token"] = inspection.counters().last_all_reduces
        sizes = inspection.rank_bytes()
        out["weight_bytes_per_rank"] = [s["weight"] for s in sizes]
        out["kv_bytes_per_rank"] = [s["kv"] for s in sizes]
    return out


def _child(args: argparse.Namespace, device: str | None, ranks: int) -> dict[str, Any]:
    """A process of its own per rank count: the environment is read once per host."""
    environment = dict(os.environ)
    if device is not None:
        environment["GGML_TP_RANKS"] = str(ranks)
        if not args.gpu:
            environment["GGML_TP_EMULATE"] = f"sm_80*{ranks}"
    command = [sys.executable, "-m", "ggml_tp.cli", "demo", "--measure", device or "CPU", "--model", args.model, "--prompt", args.prompt, "-n", str(args.n)]
    done = subprocess.run(command + (["--host", args.host] if args.host else []), capture_output=True, text=True, env=environment, timeout=280)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    lines = [line for line in done.stderr.splitlines() if line.startswith("ggml-tp")] or done.stderr.splitlines()[-1:]
    raise SystemExit("ggml-tp: " + (lines[-1].removeprefix("ggml-tp: ") if lines else f"the host ended with status {done.returncode}"))


def demo(args: argparse.Namespace) -> int:
    if args.measure:
        device = None if args.measure == "CPU" else args.measure
        print("RESULT " + json.dumps(_measure(args.host, args.model, args.prompt, args.n, device)), flush=True)
        return 0
    import numpy as np

    from .host import nmse

    if not args.gpu:
        print("ggml-tp: EMULATED GPUs: this shows that it is right, not how fast it is (--gpu uses real ones)", file=sys.stderr)
    reference = _child(args, None, 1)
    result: dict[str, Any] = {"host": reference["host"], "text": reference["text"], "ranks": {}}
    if not args.json:
        print(f"host {reference['host']}\n\nCPU: {args.prompt}{reference['text']}\n")
    for ranks in [int(field) for field in args.ranks.split(",")]:
        measured = _child(args, "TP0", ranks)
        # Beyond the first token that differs, the two continue different texts: compare the logits up to it.
        same = next((i for i, (a, b) in enumerate(zip(measured["tokens"], reference["tokens"], strict=True)) if a != b), args.n - 1) + 1
        row = {key: measured[key] for key in ("all_reduces_per_token", "weight_bytes_per_rank", "kv_bytes_per_rank", "tokens_per_s")}
        row["same_text"] = measured["text"] == reference["text"]
        row["logits_nmse"] = nmse(np.array(measured["logits"][:same]), np.array(reference["logits"][:same]))
        result["ranks"][str(ranks)] = row
        if not args.json:
            weights, kv = max(row["weight_bytes_per_rank"]), max(row["kv_bytes_per_rank"])
            print(f"TP0, {ranks} ranks: {args.prompt}{measured['text']}")
            print(
                f"  same text {'yes' if row['same_text'] else 'NO'} | logits NMSE {row['logits_nmse']:.1e} | all_reduces a token {row['all_reduces_per_token']}"
                f" | at most {weights / 1e6:.2f} MB weights, KV {kv / 1e6:.2f} MB | {row['tokens_per_s']:.1f} tokens/s\n"
            )
    if args.json:
        print(json.dumps(result))
    return 0 if all(row["same_text"] for row in result["ranks"].values()) else 1


def env(args: argparse.Namespace) -> int:
    print("# for llama.cpp's programs (then run them with --device TP0):")
    print(f"export GGML_BACKEND_PATH={LIBRARY}")
    print("\n# what ggml-tp reads, with its default:")
    for name, default, meaning in VARIABLES:
        print(f"# {name:24} {default:14} {meaning}")
    return 0


def bench(args: argparse.Namespace) -> int:
    from . import bench as measurement
    from .host import HostError

    tests = [measurement.parse(field) for field in args.tests.split(",")]
    if not Path(args.model).is_file():
        raise SystemExit(f"ggml-tp: no model at {args.model}")
    if args.measure:
        try:
            result = measurement.run(args.model, args.host, args.measure, tests, args.repetitions, args.ubatch, not args.no_flash_attn)
        except HostError as error:
            raise SystemExit(f"ggml-tp: {error}") from None
        print("RESULT " + json.dumps(result), flush=True)
        return 0
    if args.one_rank_of:
        return bench_share(args, tests)
    results = measure(args)
    if args.json:
        print(json.dumps(results))
        return 0
    for result in results:
        rates = ", ".join(f"{r['read'] / 1e12:.2f} TB/s read, {r['copy'] / 1e12:.2f} copied" for r in result.get("rates", []))
        print(f"{result['model']} on {result['device']}, {result.get('ranks', 1)} ranks, loaded in {result['load_s']:.1f} s; {rates}")
        for name, row in result["tests"].items():
            share = f"  {100 * row['share_of_limit']:.0f} % of the read limit" if "share_of_limit" in row else ""
            print(f"  {name:16} {row['tokens_per_s']:10.1f} tokens/s{share}")
    return 0


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The runs that `bench` was asked for, each in a process of its own: the environment is read once per host."""
    base = [sys.executable, "-m", "ggml_tp.cli", "bench", args.model, "--tests", args.tests, "-r", str(args.repetitions), "--ubatch", str(args.ubatch)]
    base += ["--no-flash-attn"] * args.no_flash_attn
    base += ["--host", args.host] if args.host else []
    ordinals = [field for field in os.environ.get("GGML_TP_DEVICES", "").split(",") if field]
    counts = args.ranks or str(len(ordinals) or 1)
    runs = [("TP0", int(field)) for field in counts.split(",")] + [(device, 0) for device in (args.against.split(",") if args.against else [])]
    results = []
    for device, ranks in runs:
        environment = dict(os.environ)
        if ranks:
            environment["GGML_TP_RANKS"] = str(ranks)
            if ordinals and len(ordinals) < ranks:
                raise SystemExit(f"ggml-tp: GGML_TP_DEVICES names {len(ordinals)} devices, --ranks asks for {ranks}")
            if ordinals:
                environment["GGML_TP_DEVICES"] = ",".join(ordinals[:ranks])
        done = subprocess.run([*base, "--measure", device], stdout=subprocess.PIPE, text=True, env=environment, timeout=args.timeout)
        line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
        if line is None:
            raise SystemExit(f"ggml-tp: the measurement on {device} ended with status {done.returncode}; see the lines above")
        results.append(json.loads(line.removeprefix("RESULT ")))
    return results


def bench_share(args: argparse.Namespace, tests: list[Any]) -> int:
    """One rank's share of N on one GPU, and what N would do with the collectives' measured times: a projection, and called one."""
    import tempfile

    from . import share
    from .explain import ExplainError

    if args.ranks or args.against:
        raise SystemExit("ggml-tp: --one-rank-of times one rank; leave --ranks and --against out")
    results, model = [], args.model
    try:
        counts = [int(field) for field in args.one_rank_of.split(",")]
    except ValueError:
        raise SystemExit(f"ggml-tp: --one-rank-of {args.one_rank_of} is no list of rank counts: write for example 2,4,8") from None
    try:
        costs = share.parse_costs(args.all_reduce_us) if args.all_reduce_us else None
        for n in counts:
            with tempfile.TemporaryDirectory() as folder:
                args.model, args.ranks = str(Path(folder) / f"one-of-{n}-{Path(model).name}"), "1"
                made = share.write(model, args.model, n)
                more = "".join(f"; {key} {exact} rounded up to {used}, whole blocks" for key, (exact, used) in made["rounded"].items())
                print(f"ggml-tp: a share of {n} ranks: {made['bytes'] / 1e9:.2f} GB{more}", file=sys.stderr, flush=True)
                (result,) = measure(args)
            result |= {"model": Path(model).name, "one_rank_of": n, "all_reduces_per_token": len(made["all_reduces"])}
            result |= {"all_reduce_us": args.all_reduce_us, "rounded": made["rounded"]}
            for test in tests:
                row = result["tests"][test.name]
                n_tokens = test.n_prompt or test.n_gen * test.n_seq
                a_step = min(test.n_prompt, args.ubatch) if test.n_prompt else test.n_seq
                if costs:
                    speed = share.projected(row["tokens_per_s"], n_tokens, -(-n_tokens // a_step), a_step, made["all_reduces"], costs)
                    row["projected_tokens_per_s"] = speed
            results.append(result)
    except ExplainError as error:
        raise SystemExit(f"ggml-tp: {error}") from None
    except OSError as error:
        raise SystemExit(f"ggml-tp: the share is a temporary file of its own ({error}): TMPDIR may name a folder with more room") from None
    if args.json:
        print(json.dumps(results))
        return 0
    for result in results:
        print(f"{result['model']}, one rank's share of {result['one_rank_of']} on one GPU, without its {result['all_reduces_per_token']} all_reduces a token")
        for name, row in result["tests"].items():
            projection = f"  projection of {result['one_rank_of']} ranks: {row['projected_tokens_per_s']:.1f}" if costs else ""
            print(f"  {name:16} {row['tokens_per_s']:10.1f} tokens/s{projection}")
    if costs:
        print(f"projections, not measurements: the share's time and the all_reduces' ({args.all_reduce_us} us) one behind the other")
    return 0


def explain(args: argparse.Namespace) -> int:
    from . import explain as explanation

    def number(name: str, text: str | None, least: float, most: float) -> float | None:
        try:
            value = None if text is None else float(text)
        except ValueError:
            value = float("nan")
        if value is not None and not least <= value <= most:
            raise SystemExit(f"ggml-tp: {name} {text}: a number from {least:g} to {most:g}")
        return value

    def count(name: str, text: str, most: int) -> int:
        return int(number(name, text, 1, most) or 1)

    n_ranks = count("--ranks", args.ranks, 16)
    split = None if args.split is None else [number("--split", share, 0, 1e6) or 0.0 for share in args.split.split(",")]
    if split is not None and (len(split) != n_ranks or not sum(split) > 0):
        raise SystemExit(f"ggml-tp: --split {args.split}: write one share for each of {n_ranks} ranks, for example {','.join(['1'] * n_ranks)}")
    types = args.cache_type.split(",")
    try:
        result = explanation.explain(
            args.model, n_ranks, split,
            n_ctx=count("--ctx", args.ctx, 1 << 24), cache_types=(types[0], types[-1]),
            n_ubatch=count("--ubatch", args.ubatch, 65536), swa_full=args.swa_full,
            gib=number("--gib", args.gib, 0, 65536), reserve_gib=number("--reserve-gib", args.reserve_gib, 0, 65536) or 0.0,
            read_gbs=number("--read-gbs", args.read_gbs, 1e-3, 1e6), all_reduce_us=number("--all-reduce-us", args.all_reduce_us, 0, 1e6),
        )  # fmt: skip
    except explanation.ExplainError as error:
        raise SystemExit(f"ggml-tp: {error}") from None
    print(json.dumps(result) if args.json else explanation.report(result, args.all))
    return 0


def doctor(args: argparse.Namespace) -> int:
    from . import doctor as examination

    result = examination.examine()
    print(json.dumps(result) if args.json else examination.report(result))
    return 0 if examination.is_well(result) else 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="ggml-tp", description=__import__("ggml_tp").__doc__)
    commands = parser.add_subparsers(required=True)
    p = commands.add_parser("demo", help="generate on the host's CPU and on N ranks, and compare", epilog="example: ggml-tp demo --ranks 1,3 --json")
    p.add_argument("--ranks", default="1,2,4", help="rank counts (default: %(default)s)")
    p.add_argument("--host", help="xllamacpp, llama_cpp or a path (default: the first installed)")
    p.add_argument("--model", default=str(MODELS / "tiny-english.gguf"), help="GGUF file (default: the shipped one)")
    p.add_argument("--prompt", default="It was a ")
    p.add_argument("-n", type=int, default=64, help="tokens to generate (default: %(default)s)")
    p.add_argument("--gpu", action="store_true", help="use the machine's GPUs instead of emulated ones")
    p.add_argument("--json", action="store_true")
    p.add_argument("--measure", help=argparse.SUPPRESS)
    p.set_defaults(run=demo)
    example = "example: ggml-tp bench model.gguf --ranks 1,2 --tests pp512,tg128,tg64@16384,tg32x8"
    p = commands.add_parser("bench", help="speed through a real host, as a share of the memory's rate", epilog=example)
    p.add_argument("model", help="GGUF file")
    p.add_argument("--ranks", help="rank counts, a run each, on the first of GGML_TP_DEVICES (default: as many as that names, else 1)")
    p.add_argument("--one-rank-of", help="time one rank's share of so many ranks, a run each, on one GPU: 2,4,8")
    p.add_argument("--all-reduce-us", help="with it: what all_reduces were measured to take, 4.3 or 32768:3,16777216:64 (bytes:us); projects all ranks' speed")
    p.add_argument("--tests", default="pp512,pp2048,tg128", help="ppN, tgN, tgN@DEPTH, tgNxSEQUENCES (default: %(default)s)")
    p.add_argument("--against", help="other devices of the host to measure too, for example CUDA0 or CPU")
    p.add_argument("-r", "--repetitions", type=int, default=3, help="the median counts (default: %(default)s)")
    p.add_argument("--ubatch", type=int, default=512, help="tokens that the host computes at once (default: %(default)s)")
    p.add_argument("--no-flash-attn", action="store_true")
    p.add_argument("--host", help="xllamacpp, llama_cpp or a path (default: the first installed)")
    p.add_argument("--timeout", type=float, default=3600, help="seconds for one run (default: %(default)s)")
    p.add_argument("--json", action="store_true")
    p.add_argument("--measure", help=argparse.SUPPRESS)
    p.set_defaults(run=bench)
    p = commands.add_parser("doctor", help="what this machine has and what to do about it", epilog="example: GGML_TP_RANKS=2 ggml-tp doctor")
    p.add_argument("--json", action="store_true")
    p.set_defaults(run=doctor)
    example = "example: ggml-tp explain model.gguf --ranks 4 --gib 80 --read-gbs 3000 --all-reduce-us 15"
    p = commands.add_parser("explain", help="what N ranks make of a model: shards, collectives, memory, speed; needs no GPU and no host", epilog=example)
    p.add_argument("model", help="GGUF file, or the first of several that it is split over")
    p.add_argument("--ranks", default="2", help="number of ranks, 1 to 16 (default: %(default)s)")
    p.add_argument("--split", help="share of each rank, for example 3,1 (default: even)")
    p.add_argument("--ctx", default="8192", help="tokens of context (default: %(default)s)")
    p.add_argument("--cache-type", default="f16", help="type of the KV cache, or K,V (default: %(default)s)")
    p.add_argument("--ubatch", default="512", help="tokens that the host computes at once (default: %(default)s)")
    p.add_argument("--swa-full", action="store_true", help="the host keeps all tokens also for layers that attend to a window, as libraries do")
    p.add_argument("--gib", help="memory of one card: says the largest context that fits")
    p.add_argument("--reserve-gib", default="1", help="left free on each card: CUDA, NCCL, the host's margin (default: %(default)s)")
    p.add_argument("--read-gbs", help="GB/s that one card reads: says the most tokens/s (ggml-tp bench measures it)")
    p.add_argument("--all-reduce-us", help="microseconds of one all_reduce of a token (integration/scaling.py measures it)")
    p.add_argument("--all", action="store_true", help="a line for each tensor, not for each kind")
    p.add_argument("--json", action="store_true")
    p.set_defaults(run=explain)
    p = commands.add_parser("env", help="print what to export for llama.cpp's programs", epilog='example: eval "$(ggml-tp env)"')
    p.set_defaults(run=env)
    args = parser.parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
