"""Hosts: the four struct layouts in prebuilt ones, llama-cpp-python from its sources, and made-up hosts that must be refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import ggml_tp
import jobs
import pytest
import upstream
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


def stub_host(folder: Path, **layout: int) -> str:
    """Builds tests/data/stub_host.c, a host of any layout, and lets it load the plugin; its output and its errors."""
    defaults = {"BACKEND_FUNCTIONS": 16, "BUFFER_FUNCTIONS": 11, "API_VERSION": 3, **layout}
    program = folder / "stub_host"
    defines = [f"-D{name}={value}" for name, value in defaults.items()]
    subprocess.run(["gcc", "-rdynamic", *defines, str(ROOT / "tests/data/stub_host.c"), "-ldl", "-o", str(program)], check=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GGML_TP_")} | emulated(1)
    done = subprocess.run([str(program), str(jobs.LIBRARY)], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done
    return done.stdout + done.stderr


def test_a_known_layout_is_accepted(tmp_path):
    assert stub_host(tmp_path).startswith("accepted\n")


@pytest.mark.parametrize(
    ("layout", "says"),
    [
        ({"BACKEND_FUNCTIONS": 19}, "struct layout is unknown (backend_i 19,"),
        ({"BUFFER_FUNCTIONS": 12}, "struct layout is unknown (backend_i 16, buffer_i 12,"),
        ({"API_VERSION": 99}, "asks for backend API version 99; this ggml-tp knows 1 to 3"),
    ],
)
def test_an_unknown_host_gets_one_line(tmp_path, layout, says):
    lines = stub_host(tmp_path, **layout).splitlines()
    assert lines[0] == "refused"
    ours = [line for line in lines if line.startswith("ggml-tp: ")]
    assert len(ours) == 1 and says in ours[0], lines


@pytest.fixture(scope="module")
def llama_cpp() -> Path:
    return upstream.package()


@pytest.mark.upstream
@pytest.mark.timeout(1800)
def test_llama_cpp_python(llama_cpp):
    """Its own Llama class, with nothing but ggml_tp.load() before it."""
    script = (
        "import sys, json, llama_cpp, ggml_tp\n"
        "devices = ggml_tp.load('llama_cpp') if sys.argv[2] == 'TP0' else []\n"
        "llama = llama_cpp.Llama(sys.argv[1], n_gpu_layers=-1 if devices else 0, n_ctx=512, verbose=False)\n"
        "text = llama('It was a ', max_tokens=64, temperature=0)['choices'][0]['text']\n"
        "print('RESULT', json.dumps([text, [name for name, _ in devices]]), flush=True)\n"
    )
    model = str(Path(ggml_tp.__file__).parent / "models" / "tiny-english.gguf")
    texts, devices = {}, {}
    for where in ("CPU", "TP0"):
        environment = {**os.environ, **emulated(3), "PYTHONPATH": str(llama_cpp)}
        done = subprocess.run([sys.executable, "-c", script, model, where], capture_output=True, text=True, env=environment, timeout=200)
        line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), "")
        assert line, done.stderr[-3000:]
        texts[where], devices[where] = json.loads(line.removeprefix("RESULT "))
    assert "TP0" in devices["TP0"] and len(texts["CPU"]) > 40
    assert texts["TP0"] == texts["CPU"]


@pytest.mark.upstream
@pytest.mark.timeout(1800)
def test_logits_through_llama_cpp_python(workers, models, llama_cpp):
    library = str(llama_cpp / "llama_cpp" / "lib" / "libllama.so")
    arguments = {"model": models("qwen3", "Q4_K"), "prompt": list(range(1, 40)), "n": 8, "library": library}
    reference = workers.run(jobs.run_model, {"TEST_HOST": "llama_cpp"}, on_device=False, **arguments)
    result = workers.run(jobs.run_model, emulated(3, TEST_HOST="llama_cpp"), on_device=True, **arguments)
    assert nmse(result["prompt_logits"], reference["prompt_logits"]) < 5e-4
    assert result["counters"].last_all_reduces == 4
