#!/usr/bin/env python3
"""Upstream's op tests (test-backend-ops) against TP0: which cases it takes beside the peer, and whether their results are right.

    support   every case: taken here, taken by the peer (its table in the same sources), taken there and refused here
    test      the cases of some ops, a sample of every op, or all of them, compared with the host's CPU, several processes at a time

The program is compiled once into .cache/ (upstream.py), or given. Status 1 when a case fails or something else is wrong.

example: python integration/op_support.py support
         python integration/op_support.py test --sample 4 --json
         python integration/op_support.py test --ops MUL_MAT,ROPE --emulate "sm_80*3"
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import ggml_tp
import upstream
from ggml_tp import doctor

DEVICE = "TP0"
# The peer's table is older than the program: parameters that have another name since, or two.
RENAMED = {("SET_ROWS", "type"): ("type_dst",), ("CPY", "ne"): ("ne_src",), ("FLASH_ATTN_EXT", "type_KV"): ("type_K", "type_V")}
# Cases of one process. The program looks for each of its 23,000 cases in the whole list, and a string of arguments ends at 128 KiB.
MOST_CASES, MOST_BYTES = 100, 100_000
ANSWER = re.compile(r"^(.*?)  ([A-Z0-9_]+)\((.*)\): (.*?)\s*$")
COLOURS = re.compile(r"\033\[[0-9;]*m")


class Case(NamedTuple):
    op: str
    params: str

    def __str__(self) -> str:
        return f"{self.op}({self.params})"


class Answer(NamedTuple):
    case: Case
    outcome: str  # "ok", "failed" or "refused": by TP0 or by the CPU that it would be compared with
    says: str
    seconds: float


def say(text: str) -> None:
    print(f"op_support: {text}", file=sys.stderr, flush=True)


# ---- the program


def environment_of(emulate: str | None) -> dict[str, str]:
    """For the program: the plugin, and emulated GPUs where they are asked for or the machine has none."""
    settings = dict(os.environ) | {"GGML_BACKEND_PATH": str(ggml_tp.LIBRARY), "GGML_TP_LOG": os.environ.get("GGML_TP_LOG", "0")}
    if emulate is None and "GGML_TP_EMULATE" not in os.environ and not doctor.check_driver()["ok"]:
        emulate = "sm_90*2"
    return settings | ({"GGML_TP_EMULATE": emulate} if emulate else {})


def ask(program: Path, arguments: list[str], environment: dict[str, str]) -> str:
    try:
        done = subprocess.run([str(program), *arguments], capture_output=True, text=True, env=environment, timeout=300)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise upstream.UpstreamError(str(error)) from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["nothing on stderr"]
        raise upstream.UpstreamError(f"{program.name} {arguments[0]} ended with status {done.returncode}: {lines[-1]}")
    return done.stdout


def support(program: Path, environment: dict[str, str], device: str = DEVICE) -> list[tuple[Case, bool]]:
    """Every case of one op, and whether the device takes it."""
    text = ask(program, ["support", "-b", device, "--output", "csv"], environment)
    rows = [row for row in csv.DictReader(text[text.index('"backend_name"') :].splitlines()) if row["backend_name"] == device]
    if not rows:
        raise upstream.UpstreamError(f"no device {device}: see ggml-tp doctor")
    return [(Case(row["op_name"], row["op_params"]), row["supported"] == "1") for row in rows]


def cases(program: Path, environment: dict[str, str]) -> list[Case]:
    """What can be compared: cases that the device and the CPU take, and all graphs of several ops, of which only running them says it."""
    on_cpu = {case for case, there in support(program, environment, "CPU") if there}
    taken = {case for case, here in support(program, environment) if here and case in on_cpu}
    try:
        lines = [line.split("\t") for line in ask(program, ["cases"], environment).splitlines()]
    except upstream.UpstreamError:
        say(f"{program} has no mode `cases` (integration/op_cases.cpp): graphs of several ops are left out")
        return sorted(taken)
    known = [(Case(op, params), several == "1") for op, params, several in lines]
    return list(dict.fromkeys(case for case, several in known if several or case in taken))


# ---- support beside the peer


def parse_params(op: str, text: str) -> dict[str, str]:
    out: dict[str, str] = {}
    for part in re.split(r",(?![^\[]*\])", text):
        name, _, value = part.partition("=")
        out |= {new: value for new in RENAMED.get((op, name), (name,))}
    return out


def by_op(rows: Iterable[tuple[Case, bool]]) -> dict[str, list[tuple[Case, dict[str, str], bool]]]:
    out = defaultdict(list)
    for case, taken in rows:
        out[case.op].append((case, parse_params(case.op, case.params), taken))
    return out


def compare(ours: list[tuple[Case, bool]], peer: list[tuple[Case, bool]]) -> dict[str, dict[str, Any]]:
    """A row an op. A parameter that only one side has says nothing: what differs there only may be the same case, and counts as taken by
    the peer when one such case is. So `missing` may list too many, never too few of those that the peer's table has."""
    out = {}
    theirs = by_op(peer)
    for op, rows in sorted(by_op(ours).items()):
        names = {name for _, params, _ in rows for name in params} & {name for _, params, _ in theirs[op] for name in params}
        table: dict[frozenset[tuple[str, str]], bool] = {}
        for _, params, taken in theirs[op]:
            key = frozenset((name, value) for name, value in params.items() if name in names)
            table[key] = table.get(key, False) or taken
        keys = [frozenset((name, value) for name, value in params.items() if name in names) for _, params, _ in rows]
        out[op] = {
            "cases": len(rows),
            "taken": sum(taken for *_, taken in rows),
            "in_the_peers_table": sum(key in table for key in keys),
            "taken_by_the_peer": sum(table.get(key, False) for key in keys),
            "missing": [str(case) for (case, _, taken), key in zip(rows, keys, strict=True) if table.get(key, False) and not taken],
        }
    return out


def read_peer(path: Path) -> list[tuple[Case, bool]]:
    with open(path, newline="") as file:
        return [(Case(row["op_name"], row["op_params"]), row["supported"] == "1") for row in csv.DictReader(file) if row["test_mode"] == "support"]


# ---- running cases


def run_once(program: Path, wanted: list[Case], environment: dict[str, str], deadline: float, heard: Callable[[Answer], None]) -> tuple[set[Case], str]:
    """One process: which cases it answered, and what went wrong with itself."""
    command = [str(program), "test", "-b", DEVICE, "-o", ",".join(map(str, wanted))]
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace", env=environment)
        answered, failures = set(), 0
        since = time.monotonic()
        over = threading.Event()

        def watch() -> None:
            while not over.wait(0.2):
                if time.monotonic() - since > deadline:
                    process.kill()
                    return

        watcher = threading.Thread(target=watch)
        watcher.start()
        assert process.stdout
        for line in process.stdout:
            match = ANSWER.match(COLOURS.sub("", line))
            if match and (case := Case(match[2], match[3])) in wanted:
                outcome = "ok" if match[4] == "OK" else "refused" if match[4].startswith("not supported") else "failed"
                now = time.monotonic()
                heard(Answer(case, outcome, match[1].strip() or match[4], now - since))
                answered.add(case)
                failures += outcome == "failed"
                since = now
        status = process.wait()
        late = not watcher.is_alive()
        over.set()
        watcher.join()
        errors.seek(0)
        last = ([line.strip() for line in errors if line.strip()] or ["nothing on stderr"])[-1]
    if late:
        return answered, f"no answer within {deadline:.0f} s"
    # 1 is its answer to cases that failed.
    return answered, "" if status == 0 or (status == 1 and failures) else f"the program ended with status {status}: {last}"


def run_cases(program: Path, wanted: list[Case], environment: dict[str, str], deadline: float, heard: Callable[[Answer], None]) -> None:
    """Each case gets an answer. One that ends the process, or says nothing for `deadline` seconds, has failed; the others go on in another one."""
    left = wanted
    while left:
        since = time.monotonic()
        answered, wrong = run_once(program, left, environment, deadline, heard)
        rest = [case for case in left if case not in answered]
        if wrong or rest:
            # The program runs cases in its order, which is that of the list. Behind the last case it is the end that went wrong.
            culprit = rest.pop(0) if rest else left[-1]
            heard(Answer(culprit, "failed", wrong or "the program did not run it", time.monotonic() - since))
        left = rest


def size(case: Case) -> int:
    """Grows with what a case costs: the product of its integers."""
    return math.prod(int(number) for number in re.findall(r"(?<![\w.])\d+(?![\w.])", case.params) if int(number))


def sample(all_cases: list[Case], n: int) -> list[Case]:
    """Of each op n cases, evenly among its smaller ones in the program's order, first and last included. Emulated, a large one takes minutes:
    128 experts of 768 x 2048, say, beside which an op has a small case."""
    ops = defaultdict(list)
    for case in all_cases:
        ops[case.op].append(case)
    picked = set()
    for row in ops.values():
        sizes = sorted(map(size, row))
        most = max(32 * sizes[0], 1 << 18, min(sizes[len(sizes) // 2], 1 << 27))
        small = [case for case in row if size(case) <= most]
        picked |= {small[round(i * (len(small) - 1) / max(1, n - 1))] for i in range(n)}
    return [case for case in all_cases if case in picked]


def jobs_of(wanted: list[Case], processes: int) -> list[list[Case]]:
    """Pieces in the program's order, small enough that every process gets some and a string of arguments holds them."""
    most = max(1, min(MOST_CASES, -(-len(wanted) // (4 * processes))))
    out: list[list[Case]] = []
    length = 0
    for case in wanted:
        if not out or len(out[-1]) == most or length + len(str(case)) > MOST_BYTES:
            out.append([])
            length = 0
        out[-1].append(case)
        length += len(str(case)) + 1
    return out


def test(program: Path, wanted: list[Case], environment: dict[str, str], processes: int, deadline: float) -> list[Answer]:
    answers: dict[Case, Answer] = {}
    lock, told = threading.Lock(), time.monotonic()

    def heard(answer: Answer) -> None:
        nonlocal told
        with lock:
            # The program has a few cases twice: the worse answer counts.
            if answer.case not in answers or answer.outcome == "failed":
                answers[answer.case] = answer
            if answer.outcome == "failed":
                say(f"failed: {answer.case}: {answer.says}")
            if time.monotonic() - told > 10:
                told = time.monotonic()
                say(f"{len(answers)} of {len(wanted)} cases, {sum(a.outcome == 'failed' for a in answers.values())} failed, now at {answer.case.op}")

    with ThreadPoolExecutor(processes) as pool:
        for job in [pool.submit(run_cases, program, piece, environment, deadline, heard) for piece in jobs_of(wanted, processes)]:
            job.result()
    return [answers[case] for case in wanted]


# ---- the report


def table(head: list[str], rows: dict[str, tuple[int, ...]]) -> str:
    """Ops with the same numbers share a row."""
    same = defaultdict(list)
    for op, numbers in rows.items():
        same[numbers].append(op)
    lines = [[", ".join(ops), *(f"{number:,}" for number in numbers)] for numbers, ops in same.items()]
    total = ["all", *(f"{sum(column):,}" for column in zip(*rows.values(), strict=True))]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines, total]) + "\n"


def support_table(rows: dict[str, dict[str, Any]]) -> str:
    columns = ("cases", "taken", "in_the_peers_table", "taken_by_the_peer")
    numbers: dict[str, tuple[int, ...]] = {op: (*(row[column] for column in columns), len(row["missing"])) for op, row in rows.items()}
    return table(["op (each)", "cases", "taken here", "in the peer's table", "taken by the peer", "taken there, refused here"], numbers)


def outcomes(answers: list[Answer]) -> dict[str, dict[str, Any]]:
    out: dict[str, dict[str, Any]] = defaultdict(lambda: {"ok": 0, "failed": 0, "refused": 0, "seconds": 0.0})
    for answer in answers:
        out[answer.case.op][answer.outcome] += 1
        out[answer.case.op]["seconds"] += answer.seconds
    return dict(out)


def test_table(rows: dict[str, dict[str, Any]]) -> str:
    return table(["op (each)", "OK", "failed", "not supported"], {op: (row["ok"], row["failed"], row["refused"]) for op, row in rows.items()})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Upstream's op tests against TP0: what it takes beside the peer, and whether it is right.",
        epilog="example: python integration/op_support.py test --sample 4 --json",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--program", type=Path, help="a test-backend-ops of the same sources (default: compiled once into .cache/)")
    common.add_argument("--emulate", help="GGML_TP_EMULATE for the program (default: as it is set; without a GPU sm_90*2)")
    common.add_argument("--json", action="store_true", help="everything as JSON instead of a table")
    p = commands.add_parser("support", parents=[common], help="which cases are taken", epilog="example: python integration/op_support.py support")
    p.add_argument("--peer", type=Path, help="its table as CSV (default: the sources' docs/ops/CUDA.csv)")
    p = commands.add_parser(
        "test", parents=[common], help="whether results are right", epilog="example: python integration/op_support.py test --ops MUL_MAT,ROPE"
    )
    p.add_argument("--ops", help="comma-separated (default: all)")
    p.add_argument("--sample", type=int, help="that many cases of each op, always the same ones (default: all)")
    p.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="at a time (default: %(default)s)")
    p.add_argument("--deadline", type=float, default=300, help="seconds that one case may take (default: %(default)s)")
    args = parser.parse_args()
    if args.command == "test" and (args.processes < 1 or args.deadline <= 0 or (args.sample is not None and args.sample < 1)):
        parser.error("--processes, --deadline and --sample: more than 0")
    return args


def main() -> int:
    args = parse()
    try:
        environment = environment_of(args.emulate)
        if not args.program and not upstream.PROGRAM.exists():
            say("building upstream's op tests, minutes the first time")
        program = args.program or upstream.op_tests()
        if args.command == "support":
            rows = compare(support(program, environment), read_peer(args.peer or upstream.sources() / "docs/ops/CUDA.csv"))
            print(json.dumps(rows) if args.json else support_table(rows))
            return 0
        wanted = cases(program, environment)
        if args.ops:
            ops = args.ops.split(",")
            if unknown := set(ops) - {case.op for case in wanted}:
                raise upstream.UpstreamError(f"no case of {', '.join(sorted(unknown))} is taken; known are {', '.join(sorted({case.op for case in wanted}))}")
            wanted = [case for case in wanted if case.op in ops]
        if args.sample:
            wanted = sample(wanted, args.sample)
        # An emulated graph may take as long as its case: 512 tokens over 16,384 cells are minutes, after which their ranks would be called late.
        environment.setdefault("GGML_TP_DEADLINE", str(args.deadline))
        answers = test(program, wanted, environment, args.processes, args.deadline)
    except (upstream.UpstreamError, OSError) as error:
        print(f"ggml-tp: {error}", file=sys.stderr)
        return 1
    failed = [answer for answer in answers if answer.outcome == "failed"]
    if args.json:
        print(json.dumps({"ops": outcomes(answers), "failed": {str(answer.case): answer.says for answer in failed}}))
    else:
        print(test_table(outcomes(answers)))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
