"""The core's pure parts: sharding, weights' planes, head division, the plan verifier; and random shapes through the whole of it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import jobs
import pytest
from conftest import emulated
from ggml_tp.host import nmse
from graphs import F16, NAMES, Q4_0, Q4_K, Q6_K, Q8_0
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_build import ROOT, build


@pytest.fixture(scope="module")
def core_checks(tmp_path_factory) -> Path:
    program = tmp_path_factory.mktemp("core") / "core_checks"
    sources = [ROOT / "tests/data/core_checks.cpp", *(s for s in sorted((ROOT / "plugin/core").rglob("*.cpp")) if s.name not in ("backend.cpp", "inspect.cpp"))]
    objects = [build.compile_object(source, ["-O2"]) for source in sources]
    table = ROOT / "build" / "images" / "kernel_images.cpp"
    if not table.exists():
        build.kernel_images([], table.parent)
    images = build.compile_object(table, ["-O2"])
    assembled = program.with_suffix(".images.o")
    subprocess.run(["g++", "-c", str(table.with_suffix(".S")), "-o", str(assembled)], check=True)
    subprocess.run(["g++", "-pthread", *map(str, objects), str(images), str(assembled), "-ldl", "-o", str(program)], check=True)
    return program


@pytest.mark.parametrize("seed", range(5))
def test_core_checks(core_checks, seed):
    done = subprocess.run([str(core_checks), str(seed)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    type_=st.sampled_from([F16, Q4_0, Q8_0, Q4_K, Q6_K]),
    blocks=st.integers(1, 4),
    n=st.integers(1, 70),
    m=st.integers(1, 12),
    name=st.sampled_from(["", "blk.0.attn_q.weight", "blk.3.ffn_down.weight"]),
    ranks=st.sampled_from([1, 3, 4]),
)
def test_products_of_any_shape(workers, type_, blocks, n, m, name, ranks):
    shape = {"type_": type_, "k": 256 * blocks, "n": n, "m": m, "name": name}
    reference = workers.run(jobs.product, {}, on_device=False, **shape)
    result = workers.run(jobs.product, emulated(ranks), on_device=True, **shape)
    assert result[0] == 0
    assert nmse(result[1], reference[1]) <= (1e-5 if NAMES[type_] == "F16" else 2e-3), shape  # one row of few outputs: larger than the mean
