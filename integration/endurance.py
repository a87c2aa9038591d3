#!/usr/bin/env python3
"""Whether memory grows: many tokens in one context after another, then many in one context that is cleared between runs.

What a device reports as free is read behind each context; the first one's captured graphs and buffers are the warm-up. Status 1 when less is
free at the end than behind the first by more than --allowed.

example: python integration/endurance.py --tokens 10000 --json
         GGML_TP_EMULATE="sm_60*2" python integration/endurance.py --tokens 60 --contexts 3
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import ggml_tp
from ggml_tp.host import Host, HostError

SHIPPED = Path(ggml_tp.__file__).parent / "models" / "tiny-english.gguf"
MIB = 1 << 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="example: python integration/endurance.py --tokens 10000 --json")
    parser.add_argument("--tokens", type=int, default=10000, help="in all contexts together, and again in one (default: %(default)s)")
    parser.add_argument("--contexts", type=int, default=20, help="one after another (default: %(default)s)")
    parser.add_argument("--model", type=Path, default=SHIPPED, help="GGUF file (default: the shipped one)")
    parser.add_argument("--host", help="xllamacpp, llama_cpp or a path (default: the first installed)")
    parser.add_argument("--allowed", type=float, default=4, help="MiB that may be missing in the end (default: %(default)s)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.contexts < 2 or args.tokens < args.contexts:
        parser.error("--contexts: at least 2; --tokens: at least one each")
    each = -(-args.tokens // args.contexts)
    try:
        host = Host(args.host)
        host.quiet()
        host.load_backend(ggml_tp.LIBRARY)
        if "TP0" not in [name for name, _ in host.devices()]:
            raise HostError("no device TP0: see ggml-tp doctor")
        model = host.model(args.model, "TP0")
        prompt = model.tokenize("It was a ")
        free: dict[str, list[int]] = {"contexts": [], "one context": []}

        def measure(what: str, i: int) -> None:
            free[what].append(host.memory("TP0")[0])
            print(f"endurance: {what} {i + 1} of {args.contexts}: {free[what][-1] / MIB:.1f} MiB free", file=sys.stderr, flush=True)

        for i in range(args.contexts):
            context = model.context(n_ctx=len(prompt) + each)
            context.generate(prompt, each)
            context.close()
            measure("contexts", i)
        context = model.context(n_ctx=len(prompt) + each)
        for i in range(args.contexts):
            context.clear()
            context.generate(prompt, each)
            measure("one context", i)
    except HostError as error:
        print(f"ggml-tp: {error}", file=sys.stderr)
        return 1
    lost = {what: (row[0] - row[-1]) / MIB for what, row in free.items()}
    if args.json:
        print(json.dumps({"tokens": each * args.contexts, "free_bytes": free, "lost_mib": lost}))
    else:
        for what, mib in lost.items():
            print(f"{what}: {each * args.contexts} tokens, {mib:.1f} MiB less free behind the last than behind the first")
    return int(max(lost.values()) > args.allowed)


if __name__ == "__main__":
    sys.exit(main())
