"""integration/op_support.py without upstream's program: made-up ones that fail, die, hang and print as it does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import op_support
import pytest
from op_support import Case

SCRIPT = Path(op_support.__file__)
# What it takes is ADD, MUL and SUB, five cases each; graphs of several ops are FUSED's.
PROGRAM = """#!{python}
import os, re, signal, sys, time
known = [(op, f"ne=[{{n}},2,1,1],type=f16") for op in ("ADD", "MUL", "SUB", "FUSED") for n in (1, 2, 3, 4, 900000)]
mode = sys.argv[1]
if mode == "cases":
    for op, params in known:
        print(op, params, int(op == "FUSED"), sep="\\t")
if mode == "support":
    print("load_backend: something that is said before\\n" + '"backend_name","op_name","op_params","test_mode","supported","error_message","backend_reg_name"')
    for op, params in known[:-5]:
        taken = sys.argv[3] == "CPU" or op != "SUB"
        print(f'"{{sys.argv[3]}}","{{op}}","{{params}}","support","{{int(taken)}}","{{"yes" if taken else "no"}}","X"')
if mode == "test":
    wanted = re.findall(r"\\w+\\(.*?\\)", sys.argv[-1])
    print("Testing 2 devices\\n")
    for op, params in known:
        case = f"{{op}}({{params}})"
        if case not in wanted:
            continue
        what = os.environ.get("DO_" + op) if "[3," in case else "FUSED" if op == "FUSED" else None
        if what == "die":
            print("said at the end", file=sys.stderr)
            os.kill(os.getpid(), signal.SIGABRT)
        if what == "hang":
            time.sleep(600)
        if what == "wrong":
            print(f"[{{op}}] ERR = 0.5 > 0.1 ", end="")
        answer = "\\033[1;31mFAIL\\033[0m" if what == "wrong" else "not supported [TP0] " if what == "FUSED" else "\\033[1;32mOK\\033[0m"
        print(f"  {{case}}: {{answer}}", flush=True)
    if os.environ.get("DO_END"):
        print("said behind the last case", file=sys.stderr)
        sys.exit(3)
"""


@pytest.fixture
def program(tmp_path) -> Path:
    path = tmp_path / "test-backend-ops"
    path.write_text(PROGRAM.format(python=sys.executable))
    path.chmod(0o755)
    return path


def tool(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=120)


def test_every_case_gets_an_answer_whatever_the_program_does(program):
    done = tool("test", "--program", program, "--json", "--deadline", "2", "--processes", "2", DO_ADD="die", DO_MUL="hang", DO_FUSED="wrong")
    result = json.loads(done.stdout)
    numbers = {op: (row["ok"], row["failed"], row["refused"]) for op, row in result["ops"].items()}
    assert done.returncode == 1 and numbers == {"ADD": (4, 1, 0), "MUL": (4, 1, 0), "FUSED": (0, 1, 4)}
    assert result["failed"] == {
        "ADD(ne=[3,2,1,1],type=f16)": "the program ended with status -6: said at the end",
        "MUL(ne=[3,2,1,1],type=f16)": "no answer within 2 s",
        "FUSED(ne=[3,2,1,1],type=f16)": "[FUSED] ERR = 0.5 > 0.1",
    }
    assert "op_support: failed: ADD(ne=[3,2,1,1],type=f16): " in done.stderr


def test_an_end_that_goes_wrong_behind_the_last_case_is_a_failure(program):
    done = tool("test", "--program", program, "--ops", "ADD", "--json", "--processes", "1", DO_END="wrong")
    failed = json.loads(done.stdout)["failed"]
    assert done.returncode == 1 and failed["ADD(ne=[900000,2,1,1],type=f16)"] == "the program ended with status 3: said behind the last case"


def test_right_results_are_status_0_and_a_table(program):
    done = tool("test", "--program", program, "--ops", "ADD,MUL", "--sample", "3")
    assert done.returncode == 0 and "| ADD, MUL | 3 | 0 | 0 |" in done.stdout and "| all | 6 | 0 | 0 |" in done.stdout, done


def test_a_sample_is_of_small_cases():
    cases = [Case("ADD", f"ne=[{n},2,1,1],type=f16,eps=0.5") for n in (1, 2, 3, 4, 900000)]
    assert op_support.size(cases[2]) == 6
    assert op_support.sample(cases, 3) == [cases[0], cases[2], cases[3]] and op_support.sample(cases, 9) == cases[:4]
    assert op_support.sample(cases[4:], 3) == cases[4:]


def test_support_beside_a_peer(program, tmp_path):
    """SUB of 1 and 2 is refused here and taken there; the peer knows MUL without types, and ADD not at all."""
    peer = tmp_path / "peer.csv"
    rows = [("SUB", "ne=[1,2,1,1],type=f16", 1), ("SUB", "ne=[2,2,1,1],type=f16", 1), ("SUB", "ne=[3,2,1,1],type=f16", 0), ("SUB", "ne=[4,2,1,1],type=f32", 1),
            ("MUL", "ne=[1,2,1,1]", 0), ("MUL", "ne=[1,2,1,1]", 1), ("MUL", "ne=[2,2,1,1]", 0)]  # fmt: skip
    head = '"op_name","op_params","test_mode","supported"\n'
    peer.write_text(head + "".join(f'"{op}","{params}","support","{taken}"\n' for op, params, taken in rows))
    done = tool("support", "--program", program, "--peer", peer, "--json")
    result = json.loads(done.stdout)
    assert result["SUB"] == {
        "cases": 5, "taken": 0, "in_the_peers_table": 3, "taken_by_the_peer": 2, "missing": ["SUB(ne=[1,2,1,1],type=f16)", "SUB(ne=[2,2,1,1],type=f16)"],
    }  # fmt: skip
    assert result["MUL"] == {"cases": 5, "taken": 5, "in_the_peers_table": 2, "taken_by_the_peer": 1, "missing": []}
    assert result["ADD"]["in_the_peers_table"] == 0
    text = tool("support", "--program", program, "--peer", peer).stdout
    assert "| SUB | 5 | 0 | 3 | 2 | 2 |" in text and "| all | 15 | 10 | 5 | 3 | 2 |" in text


def test_parameters_that_have_another_name_since():
    theirs = [(Case("FLASH_ATTN_EXT", "kv=512,type_KV=q4_0"), True)]
    ours = [(Case("FLASH_ATTN_EXT", f"kv=512,type_K=q4_0,type_V={type_},kv_view=1"), False) for type_ in ("q4_0", "q8_0")]
    assert op_support.compare(ours, theirs)["FLASH_ATTN_EXT"]["missing"] == ["FLASH_ATTN_EXT(kv=512,type_K=q4_0,type_V=q4_0,kv_view=1)"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--program", "/nowhere/test-backend-ops"], "No such file"),
        (["--program", "/bin/false"], "false support ended with status 1: nothing on stderr"),
        (["--ops", "NOTHING"], "no case of NOTHING is taken"),
    ],
)
def test_what_is_wrong_is_one_line(program, arguments, says):
    given = arguments if "--program" in arguments else ["--program", program, *arguments]
    done = tool("test", *given)
    assert done.returncode == 1 and not done.stdout
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("ggml-tp: ") and says in done.stderr
