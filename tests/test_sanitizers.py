"""Core and kernels under ASan + UBSan and under TSan, and planted mistakes that they must find."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_build import ROOT, build

TESTS = Path(__file__).parent
pytestmark = pytest.mark.sanitize
RUNTIMES = {"address": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}
OPTIONS = {
    # Hosts and Python leak by design at exit; ours are found by the memory counters of other tests.
    "ASAN_OPTIONS": "detect_leaks=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": f"halt_on_error=1 exitcode=66 suppressions={TESTS / 'data' / 'tsan.supp'}",
}
EVERY = "93"  # op case: with 31 CI took 31 minutes on two cores
DEADLINE = "200"  # of a graph: beside two builds on two cores one of three ranks took TSan more than the 60 s that hosts have; a job has 240
# A part of the tests that goes through every kernel family, captured graphs, collectives, uneven shards and failures.
PART = [
    "test_ops.py",
    "test_end_to_end.py::test_logits[llama-Q6_K-3]",
    "test_end_to_end.py::test_logits[qwen3-Q4_0-3]",
    "test_end_to_end.py::test_without_flash_attention[1]",
    "test_end_to_end.py::test_several_sequences[llama-3]",
    "test_end_to_end.py::test_state_of_four_ranks_restores_into_two[llama]",
    "test_end_to_end.py::test_exhausted_memory_is_refused",
    "test_end_to_end.py::test_a_token_is_one_persistent_kernel[llama-Q4_0-2]",
    "test_end_to_end.py::test_query_heads_of_one_kv_head_in_several_units[qwen3-1-10-2]",
    "test_groups.py::test_quantised_weights_of_a_host_that_divides_tensors_itself",
]
# Nearly a quarter of TSan's time was the norms of sixteen ranks; and what looks at kernels' names computes nothing.
LEFT_OUT = [
    "test_ops.py::test_norms_that_reduce[pull_norm-16-sm_80-9]",
    "test_ops.py::test_norms_that_reduce[push_norm-16-sm_80-9]",
    "test_ops.py::test_warpgroups_take_what_they_can",
    "test_ops.py::test_few_columns_have_their_kernel",
    "test_ops.py::test_attention_of_many_tokens_has_blocks_of_eight_warps_where_they_suffice",
    "test_ops.py::test_experts_of_many_tokens_are_weighed_and_summed_in_one_launch",
]
# What is refused, planned or chosen, and one rank's ops alone: nothing that threads could be at odds about but what other tests have as well.
OF_ONE_THREAD = [
    "test_ops.py::test_ops[sm_60-1]",
    "test_ops.py::test_foreign_graphs_are_not_claimed_and_refused",
    "test_ops.py::test_cases_are_divided",
    "test_ops.py::test_less_is_pushed_by_pcie",
    "test_ops.py::test_what_does_not_fit_an_inbox_is_not_pushed",
    "test_ops.py::test_experts_of_few_tokens_have_their_kernel",
    "test_ops.py::test_attention_leaves_what_its_product_reads",
    "test_ops.py::test_pieces_are_added_up_where_they_are_read",
    "test_ops.py::test_indices_outside_touch_nothing_and_fail[1]",
    "test_ops.py::test_a_result_without_memory_is_refused",
    "test_ops.py::test_products_of_warpgroups[1]",
    "test_ops.py::test_attention_of_many_tokens[sm_86-1]",
]


def libraries(sanitizer: str, folder: Path) -> Path:
    assert build.main(["--arch", "none", "--sanitize", sanitizer, "--out", str(folder)]) == 0
    return folder / "libggml-tp.so"


def preload(sanitizer: str) -> str:
    paths = [subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip() for name in RUNTIMES[sanitizer]]
    return " ".join(paths)


def without_aslr(command: list[str]) -> list[str]:
    """Older TSan runtimes refuse the addresses of kernels with much randomisation; containers may forbid to turn it off."""
    allowed = subprocess.run(["setarch", "-R", "true"], capture_output=True).returncode == 0
    return ["setarch", "-R", *command] if allowed else command


@pytest.mark.timeout(2500)  # beside a build on two cores TSan took 1,209 s
@pytest.mark.parametrize("sanitizer", RUNTIMES)
def test_a_part_of_the_tests_is_clean(sanitizer, tmp_path):
    library = libraries(sanitizer, tmp_path)
    environment = {**os.environ, **OPTIONS, "LD_PRELOAD": preload(sanitizer), "TEST_LIBRARY": str(library), "TEST_EVERY": EVERY, "TEST_DEADLINE": DEADLINE}
    left_out = LEFT_OUT + (OF_ONE_THREAD if sanitizer == "thread" else [])
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-x", *(f"--deselect=tests/{name}" for name in left_out)]
    command += [str(TESTS / part) for part in PART]
    done = subprocess.run(without_aslr(command), capture_output=True, text=True, env=environment, cwd=ROOT, timeout=2400)
    report = done.stdout[-6000:] + done.stderr[-6000:]
    assert done.returncode == 0, report
    for word in ("ERROR: AddressSanitizer", "runtime error:", "WARNING: ThreadSanitizer"):
        assert word not in done.stdout + done.stderr, report


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")

    def run(kernel: str, sanitizer: str) -> subprocess.CompletedProcess[str]:
        program = folder / sanitizer
        if not program.exists():
            flags = [flag for flag in build.COMMON if flag != "-fvisibility=hidden"] + ["-O1", *build.EMULATED, *build.SANITIZERS[sanitizer]]
            fibers = [flag for flag in flags if flag not in (build.NOT_INSTRUMENTED["fibers.cpp"] if sanitizer == "thread" else [])]
            source, scheduler = TESTS / "data" / "planted.cpp", ROOT / "cuda_src" / "emulator" / "fibers.cpp"
            subprocess.run(["g++", *fibers, "-c", str(scheduler), "-o", f"{program}.o"], check=True)
            subprocess.run(["g++", *flags, str(source), f"{program}.o", "-o", str(program)], check=True)
        environment = {**os.environ, **OPTIONS}
        return subprocess.run(without_aslr([str(program), kernel]), capture_output=True, text=True, env=environment, timeout=60)

    return run


@pytest.mark.parametrize("sanitizer", RUNTIMES)
def test_a_right_kernel_is_clean(planted, sanitizer):
    done = planted("right", sanitizer)
    assert (done.returncode, done.stdout, done.stderr) == (0, "64 1\n", "")


@pytest.mark.parametrize(
    ("kernel", "sanitizer", "report"),
    [
        ("race", "thread", "WARNING: ThreadSanitizer: data race"),
        ("overflow", "address", "ERROR: AddressSanitizer: heap-buffer-overflow"),
        ("shared_overflow", "address", "runtime error: index 63 out of bounds"),
    ],
)
def test_planted_mistakes_are_found(planted, kernel, sanitizer, report):
    done = planted(kernel, sanitizer)
    assert done.returncode != 0 and report in done.stderr
