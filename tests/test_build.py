"""What is built: every kernel for every architecture, and libraries that load anywhere."""

from __future__ import annotations

import concurrent.futures
import importlib
import importlib.util
import os
import re
import subprocess
from pathlib import Path

import ggml_tp
import pytest

ROOT = Path(__file__).resolve().parent.parent
_spec = importlib.util.spec_from_file_location("ggml_tp_build", ROOT / "build.py")
assert _spec is not None and _spec.loader is not None
build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build)


# Which architectures by default: one of each set of variants (sm_61 adds one instruction) and the newest, not optimised (sm_90's took 292 s as they are built,
# sm_80's 183 s beside one worker, quickly 20 or 30). sm_80 says whether a kernel from sm_80 on uses what only sm_90 has.
QUICK = {"sm_60", "sm_80", "sm_90", "sm_120", "compute_60"}


def rows(archs, often):
    return [arch if arch in often else pytest.param(arch, marks=pytest.mark.full) for arch in archs]


def kernels_compile(arch, quick):
    work = [(source, arch, False, quick) for source in build.KERNELS]
    images = build.largest_first(build.compile_kernel, work, os.cpu_count() or 1)
    for source, image in zip(build.KERNELS, images, strict=True):
        assert image[:4] == b"\x7fELF", source


@pytest.mark.timeout(900)  # sm_90 took 173 s beside one worker, more than 300 beside a build too
@pytest.mark.parametrize("arch", rows(build.ARCHS, {}))
def test_kernels_compile_as_they_are_built(arch):
    kernels_compile(arch, quick=False)


@pytest.mark.parametrize("arch", rows(build.ARCHS, QUICK))
def test_kernels_compile(arch):
    """What an architecture lacks (an instruction, a type, shared memory) is found without optimising."""
    kernels_compile(arch, quick=True)


def test_kernels_are_emulated_as_each_architecture_has_them():
    """A class that is left out would have the text of the one below it."""
    archs = (600, 610, 700, 800, 900, 1200)
    flags = [flag for flag in build.COMMON if flag not in build.WARNINGS] + ["-DTP_EMULATED", "-E", "-P", "-x", "c++"]

    def text(job):
        done = subprocess.run(["g++", *flags, f"-DTP_ARCH={job[1]}", str(job[0])], capture_output=True, text=True, check=True)
        return re.sub(r'(Kernel\{"\w+", )\d+', r"\1", done.stdout)  # but for the class that a kernel is registered with

    assert build.classes(ROOT / "cuda_src/mul_wgmma.cu") == [600, 900] and build.classes(ROOT / "cuda_src/norm.cu") == [600]
    wanted = [(source, arch) for source in build.KERNELS for arch in archs]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        texts = dict(zip(wanted, pool.map(text, wanted), strict=True))
    for source, arch in wanted:
        newest = max(c for c in build.classes(source) if c <= arch)
        if newest == 900 and arch == 1200 and "TP_WGMMA" in source.read_text():
            continue  # a GPU that has no warpgroups is not asked for their kernels
        assert hash(texts[source, arch]) == hash(texts[source, newest]), (source, arch, newest)  # a megabyte each: no comparison is printed


def symbols(*options: str) -> list[str]:
    lines = subprocess.run(["nm", "-D", *options, str(ggml_tp.LIBRARY)], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line.split()[-1].split("@")[0] for line in lines]


def test_exports_are_the_declared_ones():
    exported = set(symbols("--defined-only"))
    assert {"ggml_backend_init", "ggml_backend_score"} <= exported
    assert all(name.startswith("ggml_tp_") for name in exported - {"ggml_backend_init", "ggml_backend_score"}), exported


def test_nothing_of_python_ggml_cuda_or_nccl_is_needed():
    wanted = symbols("--undefined-only")
    assert not [name for name in wanted if name.startswith(("Py", "_Py", "ggml", "llama", "cu", "nccl"))]


def test_unknown_architecture_is_one_line(capsys):
    assert build.main(["--arch", "sm_1"]) == 1
    assert capsys.readouterr().err.startswith("build: unknown architecture sm_1; known: sm_60")


@pytest.mark.parametrize("arch", rows(build.PTX_VERSIONS, QUICK))
def test_kernels_as_text_for_newer_gpus(arch, tmp_path):
    """Assembled by ptxas, as a driver would."""
    ptxas = next(Path(folder) / "bin/ptxas" for folder in importlib.import_module("nvidia.cuda_nvcc").__path__)
    for source in build.KERNELS:
        text = build.compile_kernel(source, arch.replace("compute_", "sm_"), ptx=True, quick=True).decode().rstrip("\0")
        assert f".version {build.PTX_VERSIONS[arch]}\n" in text and f".target {arch.replace('compute_', 'sm_')}" in text
        (tmp_path / "kernel.ptx").write_text(text)
        command = [str(ptxas), "-O0", "-arch", arch.replace("compute_", "sm_"), "kernel.ptx", "-o", "kernel.cubin"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[:2000]
