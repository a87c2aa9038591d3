"""Several devices of one host: groups of ranks that it stacks by layers."""

from __future__ import annotations

import os
from pathlib import Path

import ggml_tp
import jobs
import pytest
from conftest import emulated
from ggml_tp.host import SPLIT_LAYERS, SPLIT_TENSORS, nmse

SHIPPED = str(Path(ggml_tp.__file__).parent / "models" / "tiny-english.gguf")
N_LAYER = 4
PROMPT = [(17 * i + i * i) % 250 for i in range(40)]
NMSE = 1e-5  # F16: the CPU rounds activations to f16 before each product, we do not


@pytest.fixture(scope="module")
def reference(workers) -> dict:
    return workers.run(jobs.run_model, {}, model=SHIPPED, prompt=PROMPT, n=6, on_device=False)


@pytest.mark.parametrize(
    ("ranks", "groups", "more"),
    [(4, "0,2;1,3", {"GGML_TP_SPLIT": "3,1,1,2"}), (4, "2;0-1", {"GGML_TP_DEVICES": "3,2,3"})],
)  # fmt: skip
def test_layers_over_two_groups(workers, reference, ranks, groups, more):
    environment = emulated(ranks, GGML_TP_GROUPS=groups, **more)
    result = workers.run(jobs.run_devices, environment, model=SHIPPED, prompt=PROMPT, n=6, devices="TP0,TP1", split_mode=SPLIT_LAYERS)
    assert [name for name in result["devices"] if name.startswith("TP")] == ["TP0", "TP1"]
    assert nmse(result["prompt_logits"], reference["prompt_logits"]) <= NMSE
    assert result["tokens"] == reference["tokens"] and nmse(result["logits"], reference["logits"]) <= NMSE
    # Every layer is on one of the two, divided among that one's ranks, and both have some.
    reduces = [c.last_all_reduces for c in result["counters"]]
    assert all(c.graphs_computed > 0 for c in result["counters"])
    if all(len(group) > 1 for group in result["bytes"]):
        assert sum(reduces) == 2 * N_LAYER and min(reduces) >= 2
    assert all(rank["kv"] > 0 and rank["weight"] > 0 for group in result["bytes"] for rank in group)
    whole = N_LAYER * 2 * 128 * 1024 * 2  # bytes of cache: K and V, four heads of 32, halves
    assert sum(rank["kv"] for group in result["bytes"] for rank in group) == whole


def test_one_group_of_two_is_enough(workers, reference):
    """Ranks that no group names are left alone."""
    environment = emulated(4, GGML_TP_GROUPS="1;2-3")
    result = workers.run(jobs.run_devices, environment, model=SHIPPED, prompt=PROMPT, n=6, devices="TP1", split_mode=SPLIT_LAYERS)
    assert result["tokens"] == reference["tokens"]
    assert [len(group) for group in result["bytes"]] == [1, 2] and not any(result["bytes"][0][0].values())


def test_tensors_copied_between_groups(workers):
    names = ["plain", "blk.0.attn_q.weight", "blk.0.attn_output.weight", "cache_k_l0"]
    result = workers.run(jobs.copy_between, emulated(4, GGML_TP_GROUPS="0-1;2-3"), names=names)
    assert result == {name: [True] * 3 for name in names}


@pytest.mark.parametrize(
    "bad",
    [
        {"GGML_TP_GROUPS": "0-1;1-2"}, {"GGML_TP_GROUPS": "0-1;;2"}, {"GGML_TP_GROUPS": "0;1", "GGML_TP_RANKS": "1"},
        {"GGML_TP_GROUPS": "0-1;2", "GGML_TP_SPLIT": "1,1,0"}, {"GGML_TP_GROUPS": "0;1", "GGML_TP_DEVICES": "0,9"},
    ],
    ids=str,
)  # fmt: skip
def test_bad_groups_leave_a_living_host(workers, bad, capfd):
    result = workers.run(jobs.try_to_load, {**emulated(4), **bad}, model=SHIPPED)
    assert not result["accepted"] and not any(name.startswith("TP") for name in result["devices"]) and len(result["tokens"]) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("ggml-tp: ")]
    assert len(lines) == 1, lines


@pytest.mark.parametrize(
    ("ranks", "split_mode", "more"), [(3, SPLIT_TENSORS, {"GGML_TP_DEVICES": "2,0,1"}), (2, SPLIT_LAYERS, {})]
)  # fmt: skip
def test_a_host_that_divides_models_itself(workers, reference, ranks, split_mode, more):
    """Its -sm tensor and -sm layer on a device for each rank: these kernels, and this all_reduce where it asks for one."""
    environment = emulated(ranks, GGML_TP_DEVICES_SEPARATE="1", **more)
    devices = ",".join(f"TP{rank}" for rank in range(ranks))
    result = workers.run(jobs.run_devices, environment, model=SHIPPED, prompt=PROMPT, n=6, devices=devices, split_mode=split_mode)
    assert nmse(result["prompt_logits"], reference["prompt_logits"]) <= NMSE
    assert result["tokens"] == reference["tokens"] and nmse(result["logits"], reference["logits"]) <= NMSE
    # The prompt and five tokens: as many reduces on every device, two for each layer.
    assert set(result["host_all_reduces"]) == {2 * N_LAYER * 6 if split_mode == SPLIT_TENSORS else 0}
    assert all(counters.graphs_computed > 0 for counters in result["counters"])
    assert all(len(group) == 1 and group[0]["weight"] > 0 and group[0]["kv"] > 0 for group in result["bytes"])


def test_quantised_weights_of_a_host_that_divides_tensors_itself(workers, models):
    model = models("qwen2", "Q4_0")
    expected = workers.run(jobs.run_model, {}, model=model, prompt=PROMPT, n=4, on_device=False)
    environment = emulated(2, "sm_90", GGML_TP_DEVICES_SEPARATE="1")
    result = workers.run(jobs.run_devices, environment, model=model, prompt=PROMPT, n=4, devices="TP0,TP1", split_mode=SPLIT_TENSORS)
    assert nmse(result["prompt_logits"], expected["prompt_logits"]) <= 5e-4
    assert result["host_all_reduces"] == [2 * 2 * 4] * 2


def test_a_late_device_fails_one_decode(workers, reference):
    """The all_reduce is given up after the deadline, a decode says so, and then the host adds up by itself."""
    environment = emulated(2, GGML_TP_DEVICES_SEPARATE="1", GGML_TP_DEADLINE="1")
    result = workers.run(jobs.run_devices, environment, model=SHIPPED, prompt=PROMPT, n=4, devices="TP0,TP1", split_mode=SPLIT_TENSORS, late_s=2.0)
    assert not all(result["late"]) and result["late"][2]
    assert result["again"] == result["tokens"] == reference["tokens"][:4] and nmse(result["again_logits"], reference["logits"][:4]) <= NMSE
    assert nmse(result["prompt_logits"], reference["prompt_logits"]) <= NMSE  # a new context, connected anew


@pytest.mark.skipif(os.environ.get("TEST_GPUS", "0,1").count(",") == 0, reason="delays on one GPU take turns")
def test_devices_of_a_host_that_divides_tensors_overlap(workers):
    """graph_compute returns when its graph is launched: else the host would wait for one device after the other."""
    environment = emulated(2, GGML_TP_DEVICES_SEPARATE="1")
    one, both = workers.run(jobs.time_of_late_devices, environment, model=SHIPPED, late_s=0.7)
    assert one > 0.7 and both < one + 0.4


def test_separate_devices_and_groups_exclude_each_other(workers, capfd):
    result = workers.run(jobs.try_to_load, emulated(2, GGML_TP_DEVICES_SEPARATE="1", GGML_TP_GROUPS="0;1"), model=SHIPPED)
    assert not result["accepted"] and len(result["tokens"]) == 2 and "GGML_TP_DEVICES_SEPARATE" in capfd.readouterr().err
