#!/usr/bin/env python3
"""Build ggml-tp: kernels -> cubins (NVRTC), core -> libggml-tp.so, emulator -> libggml-tp-emulator.so.

The only build entry: the package build calls it, and it runs alone:
    python build.py --arch sm_90,sm_60 --out plugin/ggml_tp
"""

from __future__ import annotations

import argparse
import concurrent.futures
import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
CACHE = ROOT / "build" / "objects"
KERNELS = sorted((ROOT / "cuda_src").glob("*.cu"))
# All that NVRTC 12.9 compiles and users have: Pascal to Blackwell.
ARCHS = ("sm_60", "sm_61", "sm_70", "sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
# An architecture whose cubins are compiled with its own features, which no other has: sm_90's warpgroup products. Its PTX is without them.
FEATURES = {"sm_90": "sm_90a"}
# Emulated, a kernel file is compiled for the oldest architecture and for those at which its text changes (`#if TP_ARCH >= 800`); the emulator takes the
# newest class that a GPU has. That is a third of the objects that four classes of each file were.
OLDEST_CLASS = 600
SETTINGS_OF_ARCHS = {"TP_WGMMA": 900}  # as cuda_src/emulator/fibers.h defines them
# Kernels as text for GPUs that are newer than all cubins: the PTX version that NVRTC 12.9 writes needs a driver of its age, so it is
# lowered to the first that knows what the text uses (assembled by older drivers' own compiler; tried on an H100).
PTX_VERSIONS = {"compute_60": "7.4", "compute_70": "7.7", "compute_75": "7.7", "compute_80": "7.7", "compute_90": "8.0"}
INCLUDES = [f"-I{ROOT / 'cuda_src'}", f"-I{ROOT / 'plugin/core'}"]
WARNINGS = ["-Wall", "-Wextra", "-Werror"]
# Of the emulator and of kernels that it runs; its tensor cores widen eight halves at a time.
EMULATED = ["-march=x86-64-v3", "-fno-strict-aliasing", "-DTP_EMULATED", "-Wno-unknown-pragmas"]
COMMON = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-pthread", *WARNINGS, *INCLUDES]
SANITIZERS = {
    "none": [],
    # Null pointers and sizes of objects are ASan's to find (stream.cu compiles in 52 s instead of 79, mul_few.cu in 35 instead of 41).
    "address": [
        *("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-sanitize=null,object-size,pointer-overflow"),
        *("-fno-omit-frame-pointer", "-g1"),
    ],
    "thread": ["-fsanitize=thread", "-fno-omit-frame-pointer", "-g1", "-DTP_TSAN"],
}
# The scheduler of the emulated threads tells TSan itself what orders what; see fibers.cpp.
NOT_INSTRUMENTED = {"fibers.cpp": ["-fsanitize=thread"]}


class BuildError(RuntimeError):
    """One line that says what is missing and what to do."""


def gpus_found() -> list[str]:
    """Architectures of the GPUs of this machine; empty without a driver."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count, found = ctypes.c_int(), set()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return []
    for ordinal in range(count.value):
        major, minor = ctypes.c_int(), ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, ordinal)
        cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, ordinal)
        found.add(f"sm_{major.value}{minor.value}")
    return sorted(found)


def compile_kernel(source: Path, arch: str, ptx: bool = False, quick: bool = False) -> bytes:
    """A cubin (or PTX) of one kernel file, by NVRTC; needs no GPU and no driver. Quick: hardly optimised, in a sixth of the time."""
    from cuda.bindings import nvrtc

    target = arch.replace("sm_", "compute_") if ptx else FEATURES.get(arch, arch)
    status, program = nvrtc.nvrtcCreateProgram(source.read_bytes(), source.name.encode(), 0, [], [])
    if status != 0:
        raise BuildError(f"NVRTC failed to start: {status}")
    options = [b"--std=c++17", b"-default-device", f"--gpu-architecture={target}".encode(), f"--include-path={ROOT / 'cuda_src'}".encode()]
    options += [b"--Ofast-compile=max"] if quick else []
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if status != 0:
        _, size = nvrtc.nvrtcGetProgramLogSize(program)
        log = b" " * size
        nvrtc.nvrtcGetProgramLog(program, log)
        raise BuildError(f"{source.name} does not compile for {arch}:\n{log.decode().rstrip()}")
    size_of, get = (nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX) if ptx else (nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
    _, size = size_of(program)
    data = b" " * size
    get(program, data)
    nvrtc.nvrtcDestroyProgram(program)
    if ptx:
        data = re.sub(rb"(?m)^\.version .*$", b".version " + PTX_VERSIONS[target].encode(), data, count=1)
        data = re.sub(rb'(?m)^.*\.pragma "used_bytes_mask.*$', b"", data)  # a hint that PTX 8.3 brought
    return data


def run(command: list[str], what: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise BuildError(f"{command[0]} not found: install a C++20 compiler (Debian, Ubuntu: apt-get install g++)") from None
    if done.returncode != 0:
        raise BuildError(f"{what} failed:\n{done.stderr.rstrip()}")


def digest(source: Path, flags: list[str]) -> str:
    """Of everything that an object depends on: flags, the source, every header of the project."""
    h = hashlib.sha256("\0".join(flags).encode())
    for path in [source, *sorted((ROOT / "cuda_src").rglob("*.h")), *sorted((ROOT / "plugin/core").rglob("*.h"))]:
        h.update(path.name.encode() + path.read_bytes())
    return h.hexdigest()[:24]


def classes(source: Path) -> list[int]:
    """The emulated architectures (compute capability * 100) at which a kernel file's text, or that of a header it includes, changes; the oldest first."""
    seen, left, found = set(), [source], {OLDEST_CLASS}
    while left:
        path = left.pop()
        text = path.read_text()
        seen.add(path)
        found |= {int(number) for number in re.findall(r"TP_ARCH\s*(?:>=|<)\s*(\d+)", text)}
        found |= {number for name, number in SETTINGS_OF_ARCHS.items() if re.search(rf"#if.*\b{name}\b", text)}
        left += [header for name in re.findall(r'#include "([^"]+)"', text) if (header := ROOT / "cuda_src" / name).exists() and header not in seen]
    return sorted(found)


def compile_object(source: Path, flags: list[str]) -> Path:
    target = CACHE / f"{source.name}-{digest(source, flags)}.o"
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        language = ["-x", "c++"] if source.suffix == ".cu" else []
        partial = target.with_suffix(f".{os.getpid()}.tmp.o")
        flags = [flag for flag in flags if flag not in NOT_INSTRUMENTED.get(source.name, [])]
        run(["g++", *language, *COMMON, *flags, "-c", str(source), "-o", str(partial)], f"compiling {source.name}")
        partial.rename(target)
    return target


def image_of(source: Path, arch: str) -> Path:
    path = CACHE / f"{source.stem}-{digest(source, [FEATURES.get(arch, arch)])}.{arch}.cubin"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.tmp")
        partial.write_bytes(compile_kernel(source, arch.replace("compute_", "sm_"), arch in PTX_VERSIONS))
        partial.rename(path)
    return path


def largest_first(function: Callable[..., Any], work: list[tuple[Any, ...]], jobs: int) -> list[Any]:
    """Results of function(source, ...), in the order of `work`. The largest sources begin first: stream.cu, which takes longest, would begin among the
    last, and every other core would wait for it."""
    order = sorted(range(len(work)), key=lambda i: -work[i][0].stat().st_size)
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        results = dict(zip(order, pool.map(lambda i: function(*work[i]), order), strict=True))
    return [results[i] for i in range(len(work))]


def kernel_images(archs: list[str], work: Path, jobs: int = 1) -> list[Path]:
    """The generated table of cubins and its assembler file; an empty table without architectures."""
    work.mkdir(parents=True, exist_ok=True)
    rows, labels, assembler = [], [], ['    .section .rodata\n']
    for arch in archs:
        ptx = arch in PTX_VERSIONS
        number = int(arch.removeprefix("sm_").removeprefix("compute_"))
        for source, path in zip(KERNELS, largest_first(image_of, [(source, arch) for source in KERNELS], jobs), strict=True):
            label = f"ggml_tp_image_{source.stem}_{arch}"
            assembler.append(f'    .balign 64\n    .global {label}\n    .hidden {label}\n{label}:\n    .incbin "{path}"\n')
            labels.append(f'extern "C" const unsigned char {label}[];')
            rows.append(f'    {{{number // 10}, {number % 10}, {int(arch in FEATURES)}, {int(ptx)}, "{source.stem}", {label}}},')
        print(f"build: {len(KERNELS)} kernel files for {arch}{' (PTX)' if ptx else ''}", flush=True)
    assembler.append('    .section .note.GNU-stack,"",@progbits\n')
    table = work / "kernel_images.cpp"
    empty = "    {0, 0, 0, 0, nullptr, nullptr},"  # an array of no elements is not C++
    table.write_text(
        '#include "kernel_images.h"\n' + "\n".join(labels) + "\nnamespace ggml_tp {\nconst KernelImage kKernelImages[] = {\n"
        + ("\n".join(rows) or empty) + f"\n}};\nconst int kKernelImageCount = {len(rows)};\n}}  // namespace ggml_tp\n"
    )
    images = work / "kernel_images.S"
    images.write_text("".join(assembler))
    return [table, images]


def build(out: Path, archs: list[str], sanitize: str, jobs: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    checks = SANITIZERS[sanitize]
    work = ROOT / "build" / "images"
    table, images = kernel_images(archs, work, jobs)
    level = "-O1" if checks else "-O2"  # sanitized, -O1 compiles in two thirds of the time
    core_flags = [level, *checks]
    emulator_flags = [level, *EMULATED, *checks]
    core = [*sorted((ROOT / "plugin/core").rglob("*.cpp")), table]
    emulator = sorted((ROOT / "cuda_src/emulator").glob("*.cpp"))
    work_items = [(s, core_flags) for s in core] + [(s, emulator_flags) for s in emulator]
    work_items += [(s, [*emulator_flags, f"-DTP_ARCH={c}"]) for s in KERNELS for c in classes(s)]
    objects = largest_first(compile_object, work_items, jobs)
    print(f"build: {len(objects)} objects", flush=True)
    image_object = work / "kernel_images.o"
    run(["g++", "-c", str(images), "-o", str(image_object)], "assembling the kernel images")
    # A sanitizer's functions come from its runtime, which the process preloads.
    link = ["g++", "-shared", "-pthread", *([] if checks else ["-Wl,-z,defs"]), *checks, "-static-libstdc++", "-static-libgcc"]
    libraries = (
        ("libggml-tp.so", [*objects[: len(core)], image_object], "ggml_backend_init; ggml_backend_score; ggml_tp_*;"),
        ("libggml-tp-emulator.so", objects[len(core) :], "cu*; nccl*; tp_emulator_configure;"),
    )
    for name, parts, exports in libraries:
        # Nothing else is visible, libstdc++'s templates neither: a host may bring another libstdc++.
        script = work / f"{name}.map"
        script.write_text(f"{{ global: {exports} local: *; }};\n")
        partial = out / f".{name}.{os.getpid()}"
        run([*link, f"-Wl,--version-script={script}", "-o", str(partial), *map(str, parts), "-ldl"], f"linking {name}")
        partial.rename(out / name)  # a process that has the old file open keeps it
        print(f"build: {out / name}", flush=True)
    target = out / "inspect.h"
    if target.resolve() != (ROOT / "plugin/core/inspect.h").resolve():
        shutil.copyfile(ROOT / "plugin/core/inspect.h", target)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Build libggml-tp.so and libggml-tp-emulator.so.", epilog="example: python build.py --arch sm_90,sm_60 --out plugin/ggml_tp"
    )
    of = f"comma-separated, of {' '.join(ARCHS)}; compute_NN is PTX for newer GPUs; none: emulator only"
    parser.add_argument("--arch", help=f"{of} (default: the GPUs of this machine)")
    parser.add_argument("--out", type=Path, default=ROOT / "plugin" / "ggml_tp", help="folder for the libraries (default: %(default)s)")
    parser.add_argument("--sanitize", choices=sorted(SANITIZERS), default="none", help="address: ASan and UBSan; thread: TSan")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args(argv)
    try:
        named = args.arch if args.arch is not None else os.environ.get("GGML_TP_BUILD_ARCH")
        archs = gpus_found() if named is None else [] if named == "none" else named.split(",")
        known = (*ARCHS, *PTX_VERSIONS)
        unknown = [arch for arch in archs if arch not in known]
        if unknown:
            raise BuildError(f"unknown architecture {unknown[0]}; known: {' '.join(known)}")
        newest = [f"compute_{arch.removeprefix('sm_')}" for arch in archs if f"compute_{arch.removeprefix('sm_')}" in PTX_VERSIONS]
        if newest and not any(arch in PTX_VERSIONS for arch in archs):
            archs = [*archs, max(newest, key=lambda name: int(name.removeprefix("compute_")))]
        build(args.out.resolve(), archs, args.sanitize, max(args.jobs, 1))
    except BuildError as error:
        print(f"build: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
