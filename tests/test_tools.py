"""The command line: what a person or a script gets to see."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import ggml_tp
import pytest

SHIPPED = str(Path(ggml_tp.__file__).parent / "models" / "tiny-english.gguf")


def tool(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GGML_TP_")}
    return subprocess.run([sys.executable, "-m", "ggml_tp.cli", *arguments], capture_output=True, text=True, env=clean | environment, timeout=250)


def test_doctor_finds_the_host_and_its_ranks():
    done = tool("doctor", "--json", GGML_TP_EMULATE="sm_60*3")
    result = json.loads(done.stdout)
    host = result["hosts"]["xllamacpp"]
    assert done.returncode == 0 and host["ok"] and "API version 3" in host["layout"]
    assert host["devices"].count("Emulated sm_60") == 3 and "rank 2 to others: ok ok -" in host["devices"]
    assert "TP0: 3 ranks, Emulated sm_60" in host["registered"]
    text = tool("doctor", GGML_TP_EMULATE="sm_60*3").stdout
    assert "ok      host xllamacpp" in text and "emulated GPUs are used" in text


def test_doctor_says_what_to_do(tmp_path):
    done = tool("doctor", "--json", GGML_TP_EMULATE="sm_60*2", GGML_TP_RANKS="5")
    host = json.loads(done.stdout)["hosts"]["xllamacpp"]
    assert done.returncode == 1 and not host["ok"] and "GGML_TP_RANKS=5 but there are 2 devices" in host["advice"]


def test_bench_as_json():
    done = tool("bench", SHIPPED, "--tests", "pp32,tg4,tg2x2,tg2@40", "-r", "1", "--ranks", "2", "--json", GGML_TP_EMULATE="sm_80*2")
    (result,) = json.loads(done.stdout)
    assert result["ranks"] == 2 and result["all_reduces"] == 8 and set(result["tests"]) == {"pp32", "tg4", "tg2 x2", "tg2 @40"}
    assert all(row["tokens_per_s"] > 0 for row in result["tests"].values())
    # 260 x 256 embeddings are not read, the output head is: 4 layers of 7 matrices, norms in F32.
    layer = (256 * 256 * 2 + 2 * 256 * 128 + 3 * 256 * 256) * 2 + 2 * 256 * 4
    assert result["bytes_per_token"] == 4 * layer + 260 * 256 * 2 + 256 * 4


@pytest.mark.parametrize("arguments", [("bench", SHIPPED, "--tests", "xx5"), ("bench", "/nowhere.gguf", "--tests", "tg1")])
def test_bad_requests_are_one_line(arguments):
    done = tool(*arguments, GGML_TP_EMULATE="sm_80*1")
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("ggml-tp: ")]


def test_env_prints_what_to_export():
    done = tool("env")
    assert f"export GGML_BACKEND_PATH={ggml_tp.LIBRARY}" in done.stdout
    assert all(name in done.stdout for name in ("GGML_TP_RANKS", "GGML_TP_P2P", "GGML_TP_NCCL"))


@pytest.mark.parametrize("command", ["demo", "bench", "doctor", "env"])
def test_help_has_an_example(command):
    assert "example: " in tool(command, "--help").stdout
