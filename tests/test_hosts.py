"""The four struct layouts, each in a prebuilt host: it loads the plugin, its layout is probed, and it generates what its CPU does."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import jobs
import pytest
from conftest import emulated
from ggml_tp.host import nmse

ROOT = Path(__file__).resolve().parent.parent
# version -> backend_i, buffer_i, buffer_type_i functions, API version
HOSTS = {"0.1.20": (13, 9, 6, 1), "0.2.5": (14, 9, 6, 2), "2026.5.9093": (16, 11, 6, 2), "2026.10.11549": (16, 11, 8, 3)}


def library_of(version: str) -> str:
    """The extension module of an xllamacpp release, fetched once by pip."""
    folder = ROOT / ".cache" / f"xllamacpp-{version}"
    if not list(folder.glob("xllamacpp/xllamacpp*.so")):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(folder), f"xllamacpp=={version}"]
        subprocess.run(command, check=True, timeout=200)
        for wheel in folder.glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(folder)
    return str(next(folder.glob("xllamacpp/xllamacpp*.so")))


def layout(library: str) -> str:
    jobs._with_plugin(library)
    return jobs.Inspection().text("layout")


@pytest.mark.parametrize("version", HOSTS)
def test_layout_and_text(workers, models, version):
    library = library_of(version)
    environment = emulated(2, GGML_TP_LOG="1", TEST_HOST=version)  # a process of its own per host
    backend, buffer, buffer_type, api = HOSTS[version]
    text = workers.run(layout, environment, library=library)
    assert text.startswith(f"backend_i {backend}, buffer_i {buffer}, buffer_type_i {buffer_type}, ") and text.endswith(f"API version {api}")
    arguments = {"model": models("llama", "F16"), "prompt": list(range(1, 40)), "n": 8, "library": library}
    reference = workers.run(jobs.run_model, {"TEST_HOST": version}, on_device=False, **arguments)
    result = workers.run(jobs.run_model, environment, on_device=True, **arguments)
    assert result["tokens"] == reference["tokens"]
    assert nmse(result["logits"], reference["logits"]) < 1e-5
