#!/usr/bin/env python3
"""How long one host takes to load a model onto its own CUDA backend and onto TP0.

    llama-bench (built with CUDA) -v -> its lines with the times they came -> seconds from the file's header to the first context

The host, the file and the file's place in memory are the same for both devices, which take turns. llama-bench is given one GPU and eight tokens.

example: python integration/load_time.py llama-8b.gguf --bench llama.cpp/build/bin/llama-bench
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import ggml_tp

BEGINS, ENDS = "llama_model_loader: loaded meta data", "llama_context: constructing"  # llama.cpp's own lines


def load_seconds(bench: Path, model: Path, device: str, timeout: float) -> float:
    """RuntimeError: llama-bench did not load the model; its last lines say why."""
    environment = os.environ | {"LD_LIBRARY_PATH": f"{bench.parent}:{os.environ.get('LD_LIBRARY_PATH', '')}"}
    if device.startswith("TP"):
        environment["GGML_BACKEND_PATH"] = str(ggml_tp.LIBRARY)
    command = [str(bench), "-m", str(model), "-dev", device, "-ngl", "99", "-p", "0", "-n", "8", "-r", "1", "-fa", "1", "-v"]
    begin, end, last = None, None, [""]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, text=True, errors="replace") as process:
        assert process.stdout
        late = threading.Timer(timeout, process.kill)
        late.start()
        for line in process.stdout:
            now = time.monotonic()
            last = [*last[-4:], line.rstrip()]
            if BEGINS in line:
                begin = now
            if begin and not end and ENDS in line:
                end = now
        late.cancel()
    if not begin or not end or process.returncode:
        raise RuntimeError(f"{bench.name} on {device} ended with status {process.returncode}: " + " | ".join(last))
    return end - begin


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Time a host's loading of a model onto its own CUDA backend and onto TP0.",
        epilog="example: python integration/load_time.py llama-8b.gguf --bench llama.cpp/build/bin/llama-bench",
    )
    parser.add_argument("model", type=Path, help="a GGUF that one GPU holds")
    parser.add_argument("--bench", type=Path, required=True, help="llama.cpp's llama-bench, built with CUDA")
    parser.add_argument("--devices", default="CUDA0,TP0", help="of the host (default: %(default)s)")
    parser.add_argument("-r", "--rounds", type=int, default=3, help="by turns; the median counts (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=300, help="seconds after which llama-bench is killed (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print all times as JSON")
    args = parser.parse_args()
    seconds: dict[str, list[float]] = {device: [] for device in args.devices.split(",")}
    try:
        for i in range(args.rounds):
            for device, times in seconds.items():
                print(f"round {i + 1} of {args.rounds}, {device}", file=sys.stderr)
                times.append(load_seconds(args.bench.resolve(), args.model, device, args.timeout))
    except (OSError, RuntimeError) as error:
        print(f"load_time.py: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps({"model": str(args.model), "bytes": args.model.stat().st_size, "seconds": seconds}))
    else:
        for device, times in seconds.items():
            print(f"{device:6} {statistics.median(times):6.2f} s of {', '.join(f'{t:.2f}' for t in times)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
