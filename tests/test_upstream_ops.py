"""Upstream's test-backend-ops, compiled from llama-cpp-python's sources, against TP0: what is claimed, and whether it is right."""

from __future__ import annotations

import os
from pathlib import Path

import op_support
import pytest
import upstream
from conftest import emulated

pytestmark = [pytest.mark.timeout(1800)]

# Ops that no case is taken of: images and sound, and training. No other op may refuse what the peer takes.
REFUSED = {
    "COL2IM_1D", "CONV_2D", "CONV_2D_DW", "CONV_3D", "CONV_TRANSPOSE_1D", "CONV_TRANSPOSE_2D", "IM2COL", "IM2COL_3D", "PAD_REFLECT_1D", "POOL_1D",
    "POOL_2D", "TIMESTEP_EMBEDDING", "UPSCALE",
    "COUNT_EQUAL", "CROSS_ENTROPY_LOSS", "CROSS_ENTROPY_LOSS_BACK", "GET_ROWS_BACK", "OPT_STEP_ADAMW", "OPT_STEP_SGD", "REPEAT_BACK", "RMS_NORM_BACK",
    "SILU_BACK", "SOFT_MAX_BACK",
}  # fmt: skip
# How many cases of an op must at least be found in the peer's table: a comparison with nothing finds nothing missing.
COMPARED = {
    "MUL_MAT": 1200, "MUL_MAT_ID": 600, "FLASH_ATTN_EXT": 1000, "SOFT_MAX": 200, "ROPE": 200, "SET_ROWS": 250, "GET_ROWS": 150, "CPY": 250, "CONT": 40,
    "CONCAT": 30, "RMS_NORM": 9, "NORM": 12, "L2_NORM": 15, "SSM_CONV": 9, "SSM_SCAN": 3, "RWKV_WKV6": 4, "RWKV_WKV7": 4, "GATED_LINEAR_ATTN": 4,
    "ARGSORT": 90, "SWIGLU": 24, "SILU": 8, "ADD": 80, "MUL": 80, "ADD_ID": 36,
}  # fmt: skip
# The last op of these graphs is taken, one before it is not: im2col.
NOT_WHOLE, NOT_WHOLE_CASES = {"CONV_1D_DW"}, 9
# Of 14,215 different cases of one op that are taken, 12,609: the host's CPU refuses the others (products by halves). With 2,575 graphs of several ops.
COMPARABLE = 15_184


@pytest.fixture(scope="module")
def program() -> Path:
    return upstream.op_tests()


def environment(ranks: int, arch: str) -> dict[str, str]:
    clean = {name: value for name, value in op_support.environment_of("").items() if name not in ("GGML_TP_EMULATE", "GGML_TP_DEVICES")}
    return clean | emulated(ranks, arch)


@pytest.mark.upstream
def test_nothing_that_the_peer_takes_is_refused(program):
    rows = op_support.compare(op_support.support(program, environment(2, "sm_90")), op_support.read_peer(upstream.sources() / "docs/ops/CUDA.csv"))
    assert {op for op, row in rows.items() if row["taken"] == 0} == REFUSED
    assert {op: row["missing"] for op, row in rows.items() if row["missing"] and op not in REFUSED} == {}
    assert {op: rows[op]["in_the_peers_table"] for op, least in COMPARED.items() if rows[op]["in_the_peers_table"] < least} == {}
    assert sum(row["taken"] for row in rows.values()) >= 14_321
    assert len(op_support.cases(program, environment(2, "sm_90"))) >= COMPARABLE


def run(program: Path, ranks: int, arch: str, n: int | None, deadline: int = 240) -> int:
    """How many cases are right; none may be wrong, and what is chosen is what can be compared."""
    settings = environment(ranks, arch)
    wanted = op_support.cases(program, settings)
    if n:
        wanted = op_support.sample(wanted, n)
    answers = op_support.test(program, wanted, settings | {"GGML_TP_DEADLINE": str(deadline)}, processes=os.cpu_count() or 1, deadline=deadline)
    assert [(str(answer.case), answer.says) for answer in answers if answer.outcome == "failed"] == []
    rows = op_support.outcomes(answers)
    assert {op for op, row in rows.items() if row["refused"]} == NOT_WHOLE
    return sum(row["ok"] for row in rows.values())


@pytest.mark.upstream
@pytest.mark.parametrize(("arch", "ranks"), [("sm_90", 2), ("sm_60", 3)])
def test_a_few_cases_of_every_op(program, arch, ranks):
    assert run(program, ranks, arch, 4) >= 420


@pytest.mark.full
@pytest.mark.timeout(6 * 3600)
def test_all_cases(program):
    assert run(program, 2, "sm_90", None, deadline=1800) >= COMPARABLE - NOT_WHOLE_CASES
