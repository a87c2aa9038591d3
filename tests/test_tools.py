"""The command line: what a person or a script gets to see."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import ggml_tp
import gguf
import pytest

ROOT = Path(__file__).resolve().parent.parent
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


@pytest.mark.parametrize("type_", ["Q4_0", "Q4_K", "Q8_0"])
def test_a_synthetic_model_of_a_real_shape_is_whole_and_loads(tmp_path, type_):
    path = tmp_path / "model.gguf"
    command = [sys.executable, str(ROOT / "integration" / "shapes.py"), str(path), "--shape", "tiny", "--type", type_, "--layers", "1", "--json"]
    result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    reader = gguf.GGUFReader(path)
    assert result["bytes"] == sum(int(t.n_bytes) for t in reader.tensors) and path.stat().st_size % 32 == 0
    q, k = (next(t for t in reader.tensors if t.name == f"blk.0.attn_{x}.weight") for x in "qk")
    assert q.tensor_type.name == type_ and bytes(q.data[0][:64]) != bytes(k.data[0][:64])
    done = tool("bench", str(path), "--tests", "pp8,tg2", "-r", "1", "--ranks", "2", "--json", GGML_TP_EMULATE="sm_80*2")
    assert json.loads(done.stdout)[0]["tests"]["tg2"]["tokens_per_s"] > 0


def test_scaling_reports_what_ran_and_what_did_not(tmp_path):
    peer = tmp_path / "peer"
    peer.write_text(
        f"#!{sys.executable}\nimport json, sys\nif 'tensor' in sys.argv: sys.exit('no tensor split here')\n"
        "print(json.dumps([{'n_prompt': 8 * (1 - g), 'n_gen': 4 * g, 'avg_ts': 5.0, 'samples_ts': [5.0]} for g in (0, 1)]))\n"
    )
    peer.chmod(0o755)
    command = [sys.executable, str(ROOT / "integration" / "scaling.py"), "--gpus", "2", "--shapes", "tiny:Q4_0", "--quick", "--tests", "pp8,tg4"]
    environment = dict(os.environ) | {"GGML_TP_EMULATE": "sm_80*2"}
    out = tmp_path / "out.json"
    done = subprocess.run([*command, "--peer", str(peer), "--json", str(out)], capture_output=True, text=True, env=environment, timeout=250)
    result = json.loads(out.read_text())
    (entry,) = result["models"]
    assert done.returncode == 0 and set(result["all_reduce"]) == {"NCCL", "NCCL in a graph"}
    assert entry["ours"]["2"]["tests"]["tg4"]["tokens_per_s"] > 0 and entry["peer"]["layer"]["tests"]["pp8"]["tokens_per_s"] == 5.0
    assert entry["limit"]["all_reduces"] == 4 and 0 < entry["limit"]["tokens_per_s"] < entry["limit"]["tokens_per_s_without_reduces"]
    assert "| tiny-Q4_0 | tg4 |" in done.stdout and "peer tensor: status 1: no tensor split here" in done.stdout


@pytest.mark.parametrize("script", ["scaling.py", "shapes.py"])
def test_help_of_integration_scripts_has_an_example(script):
    done = subprocess.run([sys.executable, str(ROOT / "integration" / script), "--help"], capture_output=True, text=True, timeout=60)
    assert "example: " in done.stdout
