"""What a machine has, and what is wrong with it: driver, GPUs, NCCL, direct copies, hosts; each with what to do."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

from . import LIBRARY

_HOSTS = ("xllamacpp", "llama_cpp")


def check_driver() -> dict[str, Any]:
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return {"ok": False, "advice": "no NVIDIA driver: install it, or set GGML_TP_EMULATE=\"sm_80*2\" for emulated GPUs (slow, for tests)"}
    version, count = ctypes.c_int(), ctypes.c_int()
    code = cuda.cuInit(0) or cuda.cuDriverGetVersion(ctypes.byref(version)) or cuda.cuDeviceGetCount(ctypes.byref(count))
    if code:
        return {"ok": False, "advice": f"the NVIDIA driver does not start (error {code}): see nvidia-smi"}
    cuda_version = f"{version.value // 1000}.{version.value % 1000 // 10}"
    return {"ok": count.value > 0, "cuda": cuda_version, "gpus": count.value, "advice": "" if count.value else "the driver finds no GPU: see nvidia-smi"}


def _nccl() -> dict[str, Any]:
    candidates = [os.environ.get("GGML_TP_NCCL", ""), str(LIBRARY.parent.parent / "nvidia/nccl/lib/libnccl.so.2"), "libnccl.so.2"]
    for path in filter(None, candidates):
        try:
            nccl = ctypes.CDLL(path)
        except OSError:
            continue
        version = ctypes.c_int()
        nccl.ncclGetVersion(ctypes.byref(version))
        number = f"{version.value // 10000}.{version.value % 10000 // 100}.{version.value % 100}"
        several = version.value >= 23003
        advice = "" if several else "several ranks on one GPU need NCCL 2.30.3: pip install 'nvidia-nccl-cu12>=2.30.3'"
        return {"ok": True, "path": path, "version": number, "several_ranks_on_a_gpu": several, "advice": advice}
    return {"ok": False, "advice": "no NCCL: pip install 'nvidia-nccl-cu12>=2.30.3' (one rank needs none)"}


def _library() -> dict[str, Any]:
    missing = [path.name for path in (LIBRARY, LIBRARY.parent / "libggml-tp-emulator.so") if not path.is_file()]
    return {"ok": not missing, "path": str(LIBRARY), "advice": f"{', '.join(missing)} missing: run build.py" if missing else ""}


def inspect_host(name: str) -> dict[str, Any]:
    """In a process of its own: loads the host and the plugin as a user's program would."""
    from .host import Host, HostError
    from .inspection import Inspection

    try:
        host = Host(name)
        host.quiet()
        host.load_backend(LIBRARY)
    except HostError as error:
        return {"ok": False, "advice": str(error)}
    inspection = Inspection()
    texts = {what: inspection.text(what) for what in ("layout", "config")}
    groups = range(inspection.n_groups())
    texts["devices"] = "".join((f"TP{group}\n" if len(groups) > 1 else "") + inspection.text("devices", group) for group in groups)
    return {"ok": True, "path": str(host.path), **texts, "registered": [f"{n}: {d}" for n, d in host.devices()], "advice": ""}


def _host(name: str) -> dict[str, Any]:
    if importlib.util.find_spec(name) is None:
        return {"ok": False, "installed": False, "advice": f"not installed (pip install {name.replace('llama_cpp', 'llama-cpp-python')})"}
    code = f"import json; from ggml_tp.doctor import inspect_host; print('RESULT ' + json.dumps(inspect_host({name!r})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    result = next((json.loads(line.removeprefix("RESULT ")) for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
    said = [line.removeprefix("ggml-tp: ") for line in done.stderr.splitlines() if line.startswith("ggml-tp: ")]
    if result is None:
        return {"ok": False, "installed": True, "advice": f"the host ended with status {done.returncode}: {' '.join(done.stderr.split()[-30:])}"}
    if not result["ok"] and said:
        result["advice"] = said[-1]
    return {"installed": True, "said": said, **result}


def examine() -> dict[str, Any]:
    """Keys: library, driver, nccl, emulated, hosts; each with `ok` and, when it is wrong, `advice`."""
    return {
        "library": _library(),
        "emulated": os.environ.get("GGML_TP_EMULATE", ""),
        "driver": check_driver(),
        "nccl": _nccl(),
        "hosts": {name: _host(name) for name in _HOSTS},
    }


def report(result: dict[str, Any]) -> str:
    """For people."""

    def line(what: str, part: dict[str, Any], text: str) -> str:
        return f"{'ok     ' if part['ok'] else 'PROBLEM'} {what}: {text or part['advice']}" + (f"\n        {part['advice']}" if text and part["advice"] else "")

    driver, nccl = result["driver"], result["nccl"]
    lines = [
        line("library", result["library"], result["library"]["path"] if result["library"]["ok"] else ""),
        line("driver", driver, f"CUDA {driver['cuda']}, {driver['gpus']} GPUs" if driver["ok"] else ""),
        line("NCCL", nccl, f"{nccl['version']} at {nccl['path']}" if nccl["ok"] else ""),
    ]
    if result["emulated"]:
        lines.append(f"        GGML_TP_EMULATE={result['emulated']}: emulated GPUs are used, slowly, whatever the driver says")
    shown = False
    for name, host in result["hosts"].items():
        lines.append(line(f"host {name}", host, f"{host['path']}\n        {host['layout']}" if host["ok"] else ""))
        if host["ok"] and not shown:
            shown = True
            lines += ["        " + text for text in host["devices"].splitlines() + host["config"].splitlines()]
    return "\n".join(lines)


def is_well(result: dict[str, Any]) -> bool:
    """A host is there and takes the plugin."""
    return bool(result["library"]["ok"]) and any(host["ok"] for host in result["hosts"].values())
