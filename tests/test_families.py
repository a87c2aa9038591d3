"""Every architecture of families.py through an unmodified host on emulated ranks, against the host's CPU."""

from __future__ import annotations

import jobs
import pytest
from conftest import emulated
from families import FAMILIES
from ggml_tp.host import nmse
from test_end_to_end import TOLERANCE

PROMPT = [(17 * i + i * i) % 300 for i in range(44)]  # longer than the sliding windows
RANKS = (1, 2, 3, 4, 5, 8)


def check(workers, models, family: str, quant: str, ranks: int, **options) -> dict:
    row = FAMILIES[family]
    arguments = {"model": models(family, quant), "prompt": PROMPT, "n": 3, **options}
    reference = workers.run(getattr(jobs, row.job), {}, on_device=False, **arguments)
    result = workers.run(getattr(jobs, row.job), emulated(ranks), on_device=True, **arguments)
    assert nmse(result["prompt_logits"], reference["prompt_logits"]) <= TOLERANCE[quant]
    same = next((i for i, (a, b) in enumerate(zip(result["tokens"], reference["tokens"], strict=True)) if a != b), len(reference["tokens"])) + 1
    assert nmse(result["logits"][:same], reference["logits"][:same]) <= TOLERANCE[quant]
    return result


@pytest.mark.full
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_family(workers, models, family, ranks):
    check(workers, models, family, "F16", ranks)
