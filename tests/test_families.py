"""Every architecture of families.py through an unmodified host on emulated ranks, against the host's CPU."""

from __future__ import annotations

import jobs
import pytest
from conftest import emulated
from families import FAMILIES
from ggml_tp.host import nmse
from graphs import Q4_0, Q8_0
from test_end_to_end import TOLERANCE

PROMPT = [(17 * i + i * i) % 300 for i in range(44)]  # longer than the sliding windows
RANKS = (1, 2, 3, 4, 5, 8)


def check(workers, models, family: str, quant: str, ranks: int, only_here: dict | None = None, **options) -> dict:
    row = FAMILIES[family]
    arguments = {"model": models(family, quant), "prompt": PROMPT, "n": 3, **options}
    reference = workers.run(getattr(jobs, row.job), {}, on_device=False, **arguments)
    result = workers.run(getattr(jobs, row.job), emulated(ranks), on_device=True, **arguments, **(only_here or {}))
    assert nmse(result["prompt_logits"], reference["prompt_logits"]) <= TOLERANCE[quant]
    same = next((i for i, (a, b) in enumerate(zip(result["tokens"], reference["tokens"], strict=True)) if a != b), len(reference["tokens"])) + 1
    assert nmse(result["logits"][:same], reference["logits"][:same]) <= TOLERANCE[quant]
    return result


@pytest.mark.full
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_family(workers, models, family, ranks):
    check(workers, models, family, "F16", ranks)


@pytest.mark.parametrize(("family", "ranks", "kv_type"), [("llama", 2, Q8_0), ("gemma3", 3, Q4_0), ("deepseek2", 4, Q8_0), ("gpt-oss", 5, Q4_0)])
def test_quantised_caches(workers, models, family, ranks, kv_type):
    check(workers, models, family, "F16", ranks, kv_type=kv_type)


@pytest.mark.parametrize(("family", "ranks"), [("gemma2", 2), ("cohere2", 3), ("deepseek2", 2), ("qwen35", 3), ("mpt", 5), ("gpt-oss", 8), ("t5", 3), ("bert", 2)])
def test_without_flash_attention(workers, models, family, ranks):
    check(workers, models, family, "F16", ranks, flash_attn=False)


@pytest.mark.parametrize(("family", "ranks", "layers"), [("llama", 3, 1), ("qwen2moe", 2, 2), ("jamba", 3, 2), ("gemma3", 2, 1)])
def test_partial_offload(workers, models, family, ranks, layers):
    """The host's CPU has the first layers, or the output too (it counts as one more)."""
    check(workers, models, family, "F16", ranks, only_here={"layers": layers})


@pytest.mark.parametrize(("family", "ranks"), [("llama", 3), ("phi3", 2), ("qwen3moe", 3), ("llama", 8)])
def test_lora(workers, models, tmp_path, family, ranks):
    model, lora = models(family, "F16"), str(tmp_path / "lora.gguf")
    workers.run(jobs.write_lora, {}, path=lora, model=model)
    arguments = {"model": model, "prompt": PROMPT, "lora": lora, "steer": False}
    reference = workers.run(jobs.adapted, {}, on_device=False, **arguments)["prompt_logits"]
    plain = workers.run(jobs.adapted, {}, on_device=False, **{**arguments, "lora": None})["prompt_logits"]
    result = workers.run(jobs.adapted, emulated(ranks), on_device=True, **arguments)["prompt_logits"]
    assert nmse(result, reference) <= TOLERANCE["F16"] < 0.01 < nmse(plain, reference)


@pytest.mark.parametrize(("family", "ranks"), [("llama", 3), ("command-r", 2)])
def test_control_vector(workers, models, family, ranks):
    arguments = {"model": models(family, "F16"), "prompt": PROMPT, "lora": None, "steer": True}
    reference = workers.run(jobs.adapted, {}, on_device=False, **arguments)["prompt_logits"]
    plain = workers.run(jobs.adapted, {}, on_device=False, **{**arguments, "steer": False})["prompt_logits"]
    result = workers.run(jobs.adapted, emulated(ranks), on_device=True, **arguments)["prompt_logits"]
    assert nmse(result, reference) <= TOLERANCE["F16"] < 0.001 < nmse(plain, reference)


@pytest.mark.parametrize(
    ("family", "ranks", "options"),
    [
        ("llama", 3, {}), ("llama", 2, {"kv_type": Q8_0}), ("gemma3", 2, {}), ("llama", 5, {"flash_attn": False}), ("deepseek2", 2, {}),
        ("mamba2", 3, {}), ("jamba", 2, {}), ("qwen35", 2, {}),
    ],
)  # fmt: skip
def test_shifted_and_copied_sequences(workers, models, family, ranks, options):
    arguments = {"model": models(family, "F16"), "prompt": PROMPT, **options}
    reference = workers.run(jobs.edited_cache, {}, on_device=False, **arguments)
    result = workers.run(jobs.edited_cache, emulated(ranks), on_device=True, **arguments)
    assert nmse(result, reference) <= TOLERANCE["Q8_0" if "kv_type" in options else "F16"]
