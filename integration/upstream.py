"""llama-cpp-python's source package, fetched once by pip: its build, and the program of upstream's op tests.

    source package -> llama_cpp, built by pip -> op_cases.cpp and upstream's test-backend-ops.cpp, linked to llama_cpp's ggml

Everything lies in .cache/ of the checkout, and several processes may ask for it at once.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERSION = "0.3.36"
CACHE = ROOT / ".cache"
PACKAGE = CACHE / f"llama-cpp-python-{VERSION}"
SOURCES = CACHE / f"llama-cpp-python-{VERSION}-sources"
PROGRAM = CACHE / f"op-tests-{VERSION}" / "test-backend-ops"
# What the op tests need of the 77 MB: the program, what it includes, and what the peer's backend says that it takes.
NEEDED = ("tests/test-backend-ops.cpp", "ggml/include/", "docs/ops/")
BUILD_OPTIONS = "-DLLAVA_BUILD=OFF -DGGML_NATIVE=OFF -DGGML_OPENMP=OFF -DCMAKE_BUILD_TYPE=Release -DCMAKE_CXX_FLAGS_RELEASE=-O1"


class UpstreamError(Exception):
    """One line for the user."""


@contextmanager
def _alone(what: str) -> Iterator[None]:
    """One process at a time makes a thing, the others find it made."""
    CACHE.mkdir(exist_ok=True)
    with open(CACHE / f"{what}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _run(command: list[str], timeout: float, **environment: str) -> None:
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout, env={**os.environ, **environment})
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UpstreamError(str(error)) from error
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if "error" in line.lower()] or done.stdout.splitlines()
        raise UpstreamError(f"{' '.join(command[:4])} … ended with status {done.returncode}: {lines[0].strip() if lines else 'nothing said'}")


def archive() -> Path:
    """The source package as it is published."""
    path = CACHE / "downloads" / f"llama_cpp_python-{VERSION}.tar.gz"
    with _alone("download"):
        if not path.exists():
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "llama-cpp-python", "-d", str(path.parent)]
            _run([*pip, f"llama-cpp-python=={VERSION}"], timeout=600)
    return path


def sources() -> Path:
    """llama.cpp's folder, with NEEDED in it."""
    published = archive()
    with _alone("sources"):
        if not SOURCES.exists():
            unfinished = SOURCES.with_suffix(f".{os.getpid()}")
            inside = f"llama_cpp_python-{VERSION}/vendor/llama.cpp/"
            with tarfile.open(published) as tar:
                for member in tar:
                    if member.isfile() and member.name.startswith(tuple(inside + needed for needed in NEEDED)):
                        path = unfinished / member.name.removeprefix(inside)
                        path.parent.mkdir(parents=True, exist_ok=True)
                        path.write_bytes(tar.extractfile(member).read())  # type: ignore[union-attr]
            unfinished.rename(SOURCES)
    return SOURCES


def package() -> Path:
    """A folder to import llama_cpp from, built by pip (2 minutes on two cores)."""
    published = archive()
    with _alone("package"):
        if not list(PACKAGE.glob("llama_cpp/lib/libllama.so")):
            _run([sys.executable, "-m", "pip", "install", "-q", "--target", str(PACKAGE), str(published)], timeout=1500, CMAKE_ARGS=BUILD_OPTIONS)
    return PACKAGE


def op_tests() -> Path:
    """Upstream's test-backend-ops with the mode `cases` (op_cases.cpp), with the ggml of package()."""
    tests = sources()
    source = Path(__file__).parent / "op_cases.cpp"
    with _alone("op-tests"):
        if not PROGRAM.exists() or PROGRAM.stat().st_mtime < source.stat().st_mtime:
            PROGRAM.parent.mkdir(exist_ok=True)
            compiled = PROGRAM.with_suffix(".o")
            includes = [f"-I{tests / folder}" for folder in ("tests", "ggml/include")]
            _run(["g++", "-std=c++17", "-O1", "-c", *includes, str(source), "-o", str(compiled)], timeout=600)
            libraries = package() / "llama_cpp" / "lib"
            # Found from where the program lies, so that both folders can be carried to another machine.
            found = f"-Wl,-rpath,$ORIGIN/{os.path.relpath(libraries, PROGRAM.parent)}"
            _run(["g++", str(compiled), f"-L{libraries}", "-lggml", "-lggml-cpu", "-lggml-base", "-pthread", found, "-o", str(PROGRAM)], timeout=60)
    return PROGRAM
