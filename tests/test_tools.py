"""The command line: what a person or a script gets to see."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import ggml_tp
import gguf
import jobs
import pytest
import shapes
from conftest import Workers, emulated
from ggml_tp import explain, share
from ggml_tp.host import nmse
from ggml_tp.inspection import Inspection, Layer

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


def test_doctor_shows_every_group():
    done = tool("doctor", "--json", GGML_TP_EMULATE="sm_60*3", GGML_TP_GROUPS="0-1;2")
    host = json.loads(done.stdout)["hosts"]["xllamacpp"]
    assert done.returncode == 0 and host["devices"].count("Emulated sm_60") == 3 and "TP1\nrank 0: device 2" in host["devices"]
    assert [text for text in host["registered"] if text.startswith("TP")] == ["TP0: 2 ranks, Emulated sm_60", "TP1: 1 rank, Emulated sm_60"]
    assert "groups TP0: 0 1; TP1: 2" in host["config"]


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


def test_bench_takes_the_first_of_the_named_devices():
    devices = {"GGML_TP_EMULATE": "sm_80*2", "GGML_TP_DEVICES": "1,0"}
    done = tool("bench", SHIPPED, "--tests", "tg1", "-r", "1", "--ranks", "1,2", "--json", **devices)
    assert [result["ranks"] for result in json.loads(done.stdout)] == [1, 2]
    done = tool("bench", SHIPPED, "--tests", "tg1", "--ranks", "3", **devices)
    assert done.returncode != 0 and done.stderr.splitlines() == ["ggml-tp: GGML_TP_DEVICES names 2 devices, --ranks asks for 3"]


def test_bench_of_one_rank_projects_what_all_would_do():
    """A quarter of the shipped model: 2 of 8 heads, 1 of 4 KV heads, 64 of 256, 65 of 260 tokens."""
    more = ("--one-rank-of", "4", "--all-reduce-us", "1024:1000,65536:64000")
    done = tool("bench", SHIPPED, "--tests", "tg4,pp32,tg2x2", "-r", "1", "--ubatch", "16", *more, "--json", GGML_TP_EMULATE="sm_60*4")
    (result,) = json.loads(done.stdout)
    quarter = (256 * 64 * 2 + 2 * 256 * 32 + 3 * 256 * 64) * 2 + 2 * 256 * 4
    assert result["bytes_per_token"] == 4 * quarter + 65 * 256 * 2 + 256 * 4
    assert (result["ranks"], result["all_reduces"], result["all_reduces_per_token"], result["rounded"]) == (1, 0, 8, {})
    # Each token's 8 all_reduces of 1 KiB take a millisecond; 16 or 2 tokens' as much longer as they are.
    for name, n_tokens, n_steps, a_step in (("tg4", 4, 4, 1), ("pp32", 32, 2, 16), ("tg2 x2", 4, 2, 2)):
        row = result["tests"][name]
        assert row["projected_tokens_per_s"] == pytest.approx(n_tokens / (n_tokens / row["tokens_per_s"] + n_steps * 8 * a_step * 1e-3))
    text = tool("bench", SHIPPED, "--tests", "tg2", "-r", "1", *more, GGML_TP_EMULATE="sm_60").stdout
    assert "projection of 4 ranks" in text and "projections, not measurements" in text


def test_a_share_is_a_model_of_whole_blocks_and_heads_or_none(tmp_path):
    def model(family: str, quant: str) -> Path:
        path = tmp_path / f"{family}-{quant}"
        writers.run(jobs.write_model, {}, path=str(path), family=family, quant=quant, options={})
        return path

    def shapes(path: Path) -> dict[str, list[int]]:
        return {t.name: [int(n) for n in t.shape] for t in gguf.GGUFReader(path).tensors}

    writers, out = Workers(), tmp_path / "share"
    try:
        # 8 heads of 32, 4 of K and V, 768 of the feed forward, 320 tokens.
        made = share.write(model("llama", "Q4_0"), out, 2)
        part, whole = shapes(out), shapes(tmp_path / "llama-Q4_0")
        assert made["rounded"] == {} and set(part) == set(whole)
        wanted = {"attn_q": [256, 128], "attn_k": [256, 64], "attn_output": [128, 256], "ffn_up": [256, 384], "ffn_down": [384, 256], "attn_norm": [256]}
        assert {name: part[f"blk.1.{name}.weight"] for name in wanted} == wanted
        assert part["output.weight"] == part["token_embd.weight"] == [256, 160]
        # Of three ranks the fullest, which has two heads of K and V; of Q4_K whole blocks of 256.
        share.write(tmp_path / "llama-Q4_0", out, 3)
        assert shapes(out)["blk.0.attn_q.weight"] == [256, 128]
        made = share.write(model("llama", "Q4_K"), out, 4)
        assert made["rounded"] == {"attention.head_count": (2, 8), "feed_forward_length": (192, 256)}
        assert shapes(out)["blk.0.ffn_down.weight"] == [256, 256]
        # Norms over all heads are as long as a rank's heads; what is added up of their squares is an all_reduce of two words.
        made = share.write(model("olmo2", "F16"), out, 2)
        assert shapes(out)["blk.1.attn_q_norm.weight"] == [128] and shapes(out)["blk.1.attn_k_norm.weight"] == [64]
        assert sorted(made["all_reduces"]) == [8, 8, 1024, 1024, 1024, 1024]
        for family, message in (("mamba2", "several segments"), ("phi3", "several segments"), ("gemma3n", "more than all_reduces")):
            with pytest.raises(explain.ExplainError, match=message):
                share.write(model(family, "F16"), out, 2)
    finally:
        writers.close()


def test_costs_of_all_reduces():
    costs = share.parse_costs("65536:8,1024:4")
    assert [share.cost(costs, n) for n in (8, 1024, 33280, 65536, 131072)] == pytest.approx([4e-6, 4e-6, 6e-6, 8e-6, 16e-6])
    assert share.cost(share.parse_costs("5"), 1 << 30) == pytest.approx(5e-6)
    for bad in ("x", "1:2,1:3", "1:2:3"):
        with pytest.raises(explain.ExplainError):
            share.parse_costs(bad)


@pytest.mark.parametrize("arguments", [("bench", SHIPPED, "--tests", "xx5"), ("bench", "/nowhere.gguf", "--tests", "tg1")])
def test_bad_requests_are_one_line(arguments):
    done = tool(*arguments, GGML_TP_EMULATE="sm_80*1")
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("ggml-tp: ")]


def test_env_prints_what_to_export():
    done = tool("env")
    assert f"export GGML_BACKEND_PATH={ggml_tp.LIBRARY}" in done.stdout
    assert all(name in done.stdout for name in ("GGML_TP_RANKS", "GGML_TP_P2P", "GGML_TP_NCCL"))


def test_explain_as_json():
    """4 layers of 256 x 256 and 128 x 256 halves, 260 tokens, 8 heads and 4 KV heads of 32: every number by hand."""
    done = tool("explain", SHIPPED, "--ranks", "2", "--ctx", "512", "--json", "--gib", "2", "--read-gbs", "1000", "--all-reduce-us", "10")
    result = json.loads(done.stdout)
    layer = (256 * 256 * 2 + 2 * 256 * 128 + 3 * 256 * 256) * 2
    weights = 4 * (layer // 2 + 2 * 256 * 4) + 260 * 256 * 2 // 2 + 256 * 4
    kv = 4 * 2 * 64 * 2  # layers, K and V, two heads of 32, halves
    assert result["weight_bytes"] == [weights] * 2 == result["read_bytes_per_token"]
    assert result["kv"]["bytes_per_1k_tokens"] == [1024 * kv] * 2 and result["kv"]["bytes"] == [512 * kv] * 2
    assert (result["all_reduces_per_token"], result["all_gathers_per_token"]) == (8, 0)
    assert {row["bytes"] for row in result["reshards"]} == {256 * 4}
    assert abs(result["speed"]["tokens_per_s"] * (weights / 1e12 + 8 * 10e-6) - 1) < 1e-9
    assert abs(result["speed"]["tokens_per_s_at_n_ctx"] * ((weights + 512 * kv) / 1e12 + 8 * 10e-6) - 1) < 1e-9
    n_ctx = result["fits"]["n_ctx"]
    assert n_ctx % 256 == 0 and n_ctx * (kv + 1024) < 2**30 < (n_ctx + 256) * (kv + 1024) + 2**24


def test_explain_for_people():
    text = tool("explain", SHIPPED, "--ranks", "3", "--gib", "2", "--read-gbs", "1000").stdout
    assert len(text.splitlines()) < 30 and "on 3 ranks (split even)" in text
    row = next(line for line in text.splitlines() if line.startswith("blk.*.attn_k.weight"))
    assert "0-3" in row and "axis 1: 32 + 64 + 32" in row and "whole heads" in row
    assert "8 all_reduces, 0 all_gathers" in text and "tokens of context (trained for 512)" in text and "tokens/s" in text
    each = tool("explain", SHIPPED, "--ranks", "3", "--all").stdout
    assert all(f"blk.{layer}.attn_norm.weight" in each for layer in range(4)) and "a vector for whole rows" in each


def test_explain_of_many_layers_and_more_ranks_than_kv_heads():
    """A 70B's shape, which no file is needed for: 64 heads of 128 with 8 KV heads on 16 ranks, each KV head on two of them."""
    matrices = [("attn_q", 8192, 8192), ("attn_k", 8192, 1024), ("attn_v", 8192, 1024), ("attn_output", 8192, 8192)]
    matrices += [("ffn_gate", 8192, 28672), ("ffn_up", 8192, 28672), ("ffn_down", 28672, 8192)]
    f16, f32 = 1, 0
    tensors = [(f"blk.{i}.{name}.weight", f16, [k, n]) for i in range(80) for name, k, n in matrices]
    tensors += [(f"blk.{i}.{name}_norm.weight", f32, [8192]) for i in range(80) for name in ("attn", "ffn")] + [("output.weight", f16, [8192, 128256])]
    plan = Inspection().explain(tensors, [Layer(64, 8, 128, 128, 1024)] * 80, 8192, 0, (f16, f16), 16)
    rows = {row["name"]: row for row in plan["tensors"] + plan["caches"]}
    assert len(plan["reshards"]) == 160 and {row["bytes"] for row in plan["reshards"]} == {8192 * 4}
    assert rows["blk.79.attn_q.weight"]["bytes"] == [8192 * 8192 * 2 // 16] * 16
    assert rows["blk.79.attn_k.weight"]["bytes"] == [8192 * 128 * 2] * 16 and rows["cache_v_l79"]["bytes"] == [1024 * 128 * 2] * 16
    assert rows["blk.0.ffn_norm.weight"]["layout"] == "replicated"
    assert not plan["notes"] and all(row["planned"] for row in rows.values())


def test_explain_names_what_has_no_place():
    tensors = [("blk.0.attn_norm.weight", 0, [256]), ("blk.0.attn_strange.weight", 1, [256, 512]), ("blk.0.attn_output.weight", 1, [256, 256])]
    plan = Inspection().explain([*tensors, ("odd.bias", 0, [7])], [Layer(8, 8, 32, 32, 256)], 256, 0, (1, 1), 2)
    assert [note.split(": ")[0] for note in plan["notes"]] == ["blk.0.attn_strange.weight, attn_output.weight", "odd.bias"]
    strange = next(row for row in plan["tensors"] if "strange" in row["name"])
    assert not strange["planned"] and strange["layout"] == "replicated" and strange["reason"] == "no rule for its name"


def test_explain_leaves_a_layer_out_whose_shapes_do_not_fit():
    tensors = [(f"blk.{i}.ffn_{name}.weight", 1, [256, 256]) for i in range(2) for name in ("up", "down")]
    tensors[1] = ("blk.0.ffn_down.weight", 1, [96, 256])
    plan = Inspection().explain(tensors, [Layer(8, 8, 32, 32, 256)] * 2, 256, 0, (1, 1), 2)
    assert plan["notes"][0] == "blk.0.ffn_down: shapes are not those that its name promises" and plan["notes"][1].startswith("blk.0.ffn_up.weight, ffn_down")
    assert [row["planned"] for row in plan["tensors"]] == [False, False, True, True] and len(plan["reshards"]) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("/nowhere.gguf",), (__file__,), (SHIPPED, "--ranks", "0"), (SHIPPED, "--ranks", "17"), (SHIPPED, "--ranks", "x"), (SHIPPED, "--split", "1"),
        (SHIPPED, "--split", "1,y"), (SHIPPED, "--split", "0,0"), (SHIPPED, "--ctx", "-5"), (SHIPPED, "--cache-type", "f17"), (SHIPPED, "--gib", "much"),
        (SHIPPED, "--cache-type", "q4_K"), (SHIPPED, "--read-gbs", "0"),
    ],
)  # fmt: skip
def test_explain_refuses_in_one_line(arguments):
    done = tool("explain", *arguments)
    assert done.returncode != 0 and not done.stdout and len(done.stderr.splitlines()) == 1 and done.stderr.startswith("ggml-tp: ")


@pytest.mark.parametrize("command", ["demo", "bench", "doctor", "explain", "env"])
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


@pytest.mark.parametrize("name", ["gemma3-12b", "phi-4", "glm4-9b", "glm4.5-air", "qwen3.5-9b", "qwen3.5-35b-a3b", "glm-4.7-flash", "deepseek-v3"])
def test_a_synthetic_model_of_each_family_loads_and_is_one_launch_a_token(tmp_path, monkeypatch, name):
    """Small, but with the tensors and keys that the large one has: a host refuses what lacks one."""
    small = {"n_layer": 4, "n_embd": 256, "n_ff": 512, "n_head": 4, "n_head_kv": 2, "head_dim": 64, "n_vocab": 512}
    more = {"glm4.5-air": {"n_expert": 16, "n_ff_expert": 256, "n_rope": 32}, "glm4-9b": {"n_rope": 32}, "qwen3.5-9b": {"n_rope": 32, "linear": (2, 4, 128)}}
    more["qwen3.5-35b-a3b"] = more["qwen3.5-9b"] | {"n_expert": 16, "n_ff_expert": 256}
    latent = {"n_head_kv": 1, "head_dim": 160, "n_rope": 32, "latent": (96, 128, 64, 32, 64), "n_expert": 16, "n_ff_expert": 256}
    more |= {"glm-4.7-flash": latent, "deepseek-v3": latent | {"n_dense": 1}}
    monkeypatch.setitem(shapes.SHAPES, name, replace(shapes.SHAPES[name], **(small | more.get(name, {}))))
    path = tmp_path / "model.gguf"
    # Attention over latents is launches of its own. Nearly equal experts are chosen otherwise where activations are quantised otherwise, so floats tell more.
    is_latent = name in ("glm-4.7-flash", "deepseek-v3")
    shapes.write(path, name, "F16" if is_latent else "Q4_0", quiet=True)
    arguments = {"model": str(path), "prompt": list(range(1, 20)), "n": 3}
    workers = Workers()
    reference = workers.run(jobs.run_model, {}, on_device=False, **arguments)
    result = workers.run(jobs.run_model, emulated(1, "sm_90"), on_device=True, **arguments)
    workers.close()
    assert nmse(result["prompt_logits"], reference["prompt_logits"]) <= (1e-5 if is_latent else 2e-4)
    assert is_latent or result["counters"].last_kernel_launches == 1, result["program"]


def test_a_synthetic_gpt_oss_has_its_own_tensors_and_loads(tmp_path):
    path, script = tmp_path / "model.gguf", [sys.executable, str(ROOT / "integration" / "shapes.py")]
    subprocess.run([*script, str(path), "--shape", "tiny-gpt-oss", "--type", "MXFP4"], check=True)
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert types["blk.1.ffn_up_exps.weight"] == "MXFP4" and types["blk.1.attn_q.weight"] == "Q8_0"
    assert {"blk.0.attn_sinks.weight", "blk.0.ffn_down_exps.bias", "blk.0.post_attention_norm.weight"} <= types.keys()
    done = tool("bench", str(path), "--tests", "pp40,tg2", "-r", "1", "--ranks", "2", "--json", GGML_TP_EMULATE="sm_90*2")
    assert json.loads(done.stdout)[0]["tests"]["tg2"]["tokens_per_s"] > 0
    refused = subprocess.run([*script, str(path), "--shape", "gpt-oss-20b", "--type", "Q4_K"], capture_output=True, text=True)
    assert refused.returncode == 2 and "rows of 2880, blocks of Q6_K have 256; choose a type of smaller blocks" in refused.stderr


def test_scaling_reports_what_ran_and_what_did_not(tmp_path):
    peer = tmp_path / "peer"
    peer.write_text(
        f"#!{sys.executable}\nimport json, sys\nif 'tensor' in sys.argv: sys.exit('no tensor split here')\n"
        "print(json.dumps([{'n_prompt': 8 * (1 - g), 'n_gen': 4 * g, 'avg_ts': 5.0, 'samples_ts': [5.0]} for g in (0, 1)]))\n"
    )
    peer.chmod(0o755)
    command = [sys.executable, str(ROOT / "integration" / "scaling.py"), "--gpus", "2", "--shapes", "tiny:Q4_0", "--quick", "--tests", "pp8,tg4"]
    command += ["--all-reduces", "8192,16384"]
    environment = dict(os.environ) | {"GGML_TP_EMULATE": "sm_80*2"}
    out = tmp_path / "out.json"
    done = subprocess.run([*command, "--peer", str(peer), "--json", str(out)], capture_output=True, text=True, env=environment, timeout=250)
    result = json.loads(out.read_text())
    (entry,) = result["models"]
    assert done.returncode == 0 and "Emulated" in result["gpu"]
    assert set(result["all_reduce"]) == {"NCCL", "NCCL in a graph", "pulled, with the norm", "pushed, with the norm"}
    assert entry["ours"]["2"]["tests"]["tg4"]["tokens_per_s"] > 0 and entry["peer"]["layer"]["tests"]["pp8"]["tokens_per_s"] == 5.0
    assert entry["limit"]["all_reduces"] == 4 and 0 < entry["limit"]["tokens_per_s"] < entry["limit"]["tokens_per_s_without_reduces"]
    assert "| tiny-Q4_0 | tg4 |" in done.stdout and "peer tensor: status 1: no tensor split here" in done.stdout


@pytest.mark.parametrize(
    ("script", "seconds", "status", "says"),
    [
        ("echo llama_model_loader: loaded meta data; sleep 0.2; echo llama_context: constructing; [ $4 = CUDA0 ] || test -f $GGML_BACKEND_PATH", 60, 0, ""),
        ("echo no GPU here; exit 3", 60, 1, "on CUDA0 ended with status 3:  | no GPU here"),
        ("echo llama_model_loader: loaded meta data; exec sleep 60", 1, 1, "on CUDA0 ended with status -9"),
    ],
)
def test_load_times_are_of_the_hosts_own_lines(tmp_path, script, seconds, status, says):
    bench = tmp_path / "llama-bench"
    bench.write_text(f"#!/bin/sh\n{script}\n")
    bench.chmod(0o755)
    command = [sys.executable, str(ROOT / "integration" / "load_time.py"), str(bench), "--bench", str(bench), "-r", "2", "--timeout", str(seconds), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == status and says in done.stderr, done.stderr
    if not status:
        times = json.loads(done.stdout)["seconds"]
        assert set(times) == {"CUDA0", "TP0"} and all(len(each) == 2 and min(each) >= 0.19 for each in times.values()), times


@pytest.mark.parametrize("script", ["scaling.py", "shapes.py", "op_support.py", "load_time.py"])
def test_help_of_integration_scripts_has_an_example(script):
    done = subprocess.run([sys.executable, str(ROOT / "integration" / script), "--help"], capture_output=True, text=True, timeout=60)
    assert "example: " in done.stdout


@pytest.mark.parametrize(("allowed", "status"), [("0", 0), ("-1", 1)])
def test_endurance_sees_what_is_free(allowed, status):
    """Nothing is lost here: right when nothing may be, wrong when a MiB must be gained."""
    command = [sys.executable, str(ROOT / "integration" / "endurance.py"), "--tokens", "12", "--contexts", "3", "--allowed", allowed, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ) | {"GGML_TP_EMULATE": "sm_60*2"}, timeout=200)
    result = json.loads(done.stdout)
    assert done.returncode == status and result["tokens"] == 12, done.stderr
    assert [len(row) for row in result["free_bytes"].values()] == [3, 3]
    # The one context holds its cache and buffers while it is measured: free bytes are looked at, not made up.
    assert 0 < result["free_bytes"]["one context"][0] < result["free_bytes"]["contexts"][0]
