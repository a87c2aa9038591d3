"""Every architecture of families.py through an unmodified host on emulated ranks, against the host's CPU."""

from __future__ import annotations

import os

import jobs
import pytest
from conftest import emulated
from families import FAMILIES, cost_of, has_experts
from ggml_tp import explain
from ggml_tp.host import nmse
from graphs import IQ4_XS, Q3_K, Q4_0, Q4_K, Q5_K, Q6_K, Q8_0
from test_end_to_end import TOLERANCE, check_explained, of_same_text

PROMPT = [(17 * i + i * i) % 300 for i in range(44)]  # longer than the sliding windows
RANKS = (1, 2, 3, 4, 5, 8)
# Of every kind of graph one, most at 2 or 3 ranks, whose processes are there already; architectures by turns, as kernels differ.
ARCHS = ("sm_60", "sm_80", "sm_90")
SAMPLE = [
    ("llama-mqa", "F16", 3),
    ("gemma3", "F16", 3), ("phi3", "F16", 3), ("phi3", "Q4_K", 2), ("glm4", "Q4_0", 3), ("glm4moe", "F16", 2), ("command-r", "F16", 3), ("falcon", "F16", 3),
    ("gpt2", "Q8_0", 3), ("gptneox", "F16", 2), ("olmo2", "F16", 3), ("minicpm3", "F16", 3), ("deepseek2-fused", "F16", 2), ("llama4", "F16", 2),
    ("qwen3next", "F16", 3), ("qwen35", "F16", 2), ("mamba2", "F16", 2), ("nemotron_h", "F16", 3), ("lfm2", "F16", 2), ("bert", "F16", 3), ("t5", "F16", 2),
]  # fmt: skip
full = pytest.mark.full


def rows(always: list[tuple], in_full: list[tuple]) -> list:
    return [*always, *(pytest.param(*row, marks=full) for row in in_full)]


def check(workers, models, family: str, quant: str, ranks: int, only_here: dict | None = None, arch: str = "sm_60", tolerance: str = "", **options) -> dict:
    row = FAMILIES[family]
    arguments = {"model": models(family, quant), "prompt": PROMPT, "n": 3, **options}
    reference = workers.run(getattr(jobs, row.job), {}, on_device=False, **arguments)
    result = workers.run(getattr(jobs, row.job), emulated(ranks, arch), on_device=True, **arguments, **(only_here or {}))
    allowed = TOLERANCE[tolerance or quant]
    assert nmse(result["prompt_logits"], reference["prompt_logits"]) <= allowed
    same = next((i for i, (a, b) in enumerate(zip(result["tokens"], reference["tokens"], strict=True)) if a != b), len(reference["tokens"])) + 1
    assert nmse(result["logits"][:same], reference["logits"][:same]) <= allowed
    return result


def check_cost(result: dict, family: str, ranks: int) -> None:
    """What the last graph reduced and gathered."""
    counters = result["counters"]
    assert (counters.last_all_reduces, counters.last_all_gathers) == cost_of(family, ranks), result["plan"]


def check_family(workers, models, family: str, quant: str, ranks: int, arch: str = "sm_60") -> None:
    """Its values, its cost, and that `explain` says the same of its file."""
    result = check(workers, models, family, quant, ranks, arch=arch)
    check_cost(result, family, ranks)
    if FAMILIES[family].explained:
        check_explained(models(family, quant), ranks, result, tokens=len(PROMPT) if FAMILIES[family].job == "embed" else 1)
    else:
        assert any("no place in a token's graph is known here" in note for note in explain.explain(models(family, quant), ranks)["notes"])


@pytest.mark.parametrize(("family", "quant", "ranks", "arch"), [(*row, ARCHS[i % len(ARCHS)]) for i, row in enumerate(SAMPLE)])
def test_family(workers, models, family, quant, ranks, arch):
    check_family(workers, models, family, quant, ranks, arch)


# What most users have: int8 or less, on sm_90, whose persistent kernel takes most of these. Each family in one way by default, by turns.
WAYS = {"alone": (1, {}), "two ranks, cache in blocks": (2, {"kv_type": Q8_0}), "no flash attention": (1, {"flash_attn": False})}
GENERATING = [name for name, row in FAMILIES.items() if row.job != "embed"]


def ways_of(family: str) -> list[str]:
    """Of an encoder with a decoder the job has no options, and hosts refuse grok a cache in blocks."""
    plain = FAMILIES[family].job == "run_model"
    return [way for way, (_, options) in WAYS.items() if not options or (plain and ("kv_type" not in options or family != "grok"))]


AS_USED = [
    pytest.param(family, way, marks=() if i % len(ways_of(family)) == j else full)
    for i, family in enumerate(GENERATING)
    for j, way in enumerate(ways_of(family))
]


@pytest.mark.parametrize(("family", "way"), AS_USED)
def test_family_as_it_is_used(workers, models, family, way):
    """Routers and states make more of what int8 rounds than other tests allow for: 1.3e-3 (DeepSeek 2, of any kernel). What went wrong in such a way once was
    1e-2 and more."""
    ranks, options = WAYS[way]
    row = FAMILIES[family]
    arguments = {"model": models(family, "Q8_0"), "prompt": PROMPT, "n": 4, **options}
    reference = workers.run(getattr(jobs, row.job), {}, on_device=False, **arguments)
    result = workers.run(getattr(jobs, row.job), emulated(ranks, "sm_90"), on_device=True, **arguments)
    assert nmse(result["prompt_logits"], reference["prompt_logits"]) <= 1e-3
    assert nmse(*of_same_text(result, reference)) <= 2e-3


def test_explain_says_which_architectures_are_compared(models, monkeypatch):
    assert {row.arch for row in FAMILIES.values() if row.explained} == explain.COMPARED
    monkeypatch.setattr(explain, "COMPARED", explain.COMPARED - {"llama"})
    (note,) = explain.explain(models("llama", "F16"), 2)["notes"]
    assert note.startswith("llama: not one of the architectures compared")


@full
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_family_whole_product(workers, models, family, ranks):
    check_family(workers, models, family, "F16", ranks)


# Of every kind of layer: sliding windows, latent attention, states, experts, encoders. Most ranks have no head of K and V of their own, many none at all.
MOST_RANKS = ("gemma3", "gpt-oss", "phi3", "olmo2", "deepseek2", "kimi-linear", "mamba2", "jamba", "qwen3next", "rwkv7", "lfm2", "llama4", "bert", "t5")


@pytest.mark.skipif(len(os.environ.get("TEST_GPUS", "0,1").split(",")) < 2, reason="NCCL does not end among sixteen ranks of one GPU; among eight it does")
@pytest.mark.parametrize("family", ["llama", "qwen3moe", *(pytest.param(name, marks=full) for name in MOST_RANKS)])
def test_family_on_sixteen_ranks(workers, models, family):
    check_family(workers, models, family, "F16", 16)


@full
@pytest.mark.parametrize("quant", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize("family", [name for name in FAMILIES if not has_experts(name) and name != "gemma3n"])
def test_family_quantised(workers, models, family, quant):
    """Without experts, whose choices hang on the last bits of products of int8; gemma3n's 22 layers amplify those."""
    check_cost(check(workers, models, family, quant, 3), family, 3)


@pytest.mark.parametrize(("family", "quant", "ranks"), rows([("phi3", "F16", 2)], [("glm4", "Q4_0", 3)]))
def test_segments_in_the_persistent_kernel_and_on_tensor_cores(workers, models, family, quant, ranks):
    check_cost(check(workers, models, family, quant, ranks, arch="sm_90"), family, ranks)


@pytest.mark.parametrize(("family", "ranks", "kv_type"), rows([("llama", 2, Q8_0), ("gemma3", 3, Q4_0)], [("deepseek2", 4, Q8_0), ("gpt-oss", 5, Q4_0)]))
def test_quantised_caches(workers, models, family, ranks, kv_type):
    """The host's CPU multiplies such keys by queries in int8, we by floats: the tolerance is that of int8 products."""
    check(workers, models, family, "F16", ranks, kv_type=kv_type, tolerance="Q8_0")


def of_heads_of_256(models, kv_type):
    """What such blocks ask for. Hosts turn what they quantise by a matrix of their own; with the setting they do not."""
    heads = {"attention__key_length": 256, "attention__value_length": 256, "rope__dimension_count": 256, "attention__head_count": 4}
    return {"model": models("llama", "F16", attention__head_count_kv=2, **heads), "prompt": PROMPT, "kv_type": kv_type, "n": 3}


NOT_TURNED = {"LLAMA_ATTN_ROT_DISABLE": "1"}
CACHES_OF_256 = rows([(2, Q4_K), (3, IQ4_XS)], [(r, t) for t in (Q3_K, Q4_K, Q5_K, Q6_K, IQ4_XS) for r in (1, 2, 3, 4)])


@pytest.mark.skipif("TEST_GPUS" in os.environ, reason="products of floats, which GPUs before sm_80 compute; the others: the next test")
@pytest.mark.parametrize(("ranks", "kv_type"), CACHES_OF_256)
def test_caches_in_blocks_of_256(workers, models, ranks, kv_type):
    """Against the exact logits of such a cache: the host's CPU is off by 5e-4 to 7e-4 in Q3_K and Q4_K (ours: below 1e-4). Q2_K's quantiser takes other
    scales for values that differ in their last bits (ours: 3e-3, the CPU: 6e-3)."""
    arguments = of_heads_of_256(models, kv_type)
    result = workers.run(jobs.run_model, emulated(ranks, **NOT_TURNED), on_device=True, **arguments)
    reference = workers.run(jobs.exact_logits, {}, model=arguments["model"], kv_type=kv_type, prompt=[*PROMPT, *result["tokens"][:-1]])
    assert nmse(result["prompt_logits"], reference[: len(PROMPT)]) <= TOLERANCE["BF16"]
    assert nmse(result["logits"], reference[len(PROMPT) - 1 :]) <= TOLERANCE["BF16"]


@pytest.mark.parametrize(("ranks", "kv_type"), CACHES_OF_256)
def test_caches_in_blocks_of_256_behind_products_of_halves(workers, models, ranks, kv_type):
    """From sm_80 on activations become halves, as on the host's CPU: both choose other scales for K and V than exact ones do, and are nearer to each other
    (Q4_K: 6.0e-4 and 6.6e-4 from exact, 2.8e-4 apart)."""
    arguments = of_heads_of_256(models, kv_type)
    result = workers.run(jobs.run_model, emulated(ranks, "sm_90", **NOT_TURNED), on_device=True, **arguments)
    reference = workers.run(jobs.run_model, NOT_TURNED, on_device=False, **arguments)
    assert nmse(result["prompt_logits"], reference["prompt_logits"]) <= TOLERANCE["Q8_0"]


@pytest.mark.parametrize(("ranks", "kv_type"), rows([(2, Q6_K)], [(1, IQ4_XS), (3, IQ4_XS), (4, Q6_K)]))
def test_turned_caches_in_blocks_of_256(workers, models, ranks, kv_type):
    """As hosts do by default, against the CPU."""
    model = of_heads_of_256(models, kv_type)["model"]
    check(workers, lambda *_: model, "llama", "F16", ranks, kv_type=kv_type, tolerance="Q8_0")


# Whole on every rank: norms, small vectors, convolutions; B and C of more ranks than groups; Q and K, where V has more heads, at 2 and 3 ranks.
SHARES = [("mamba", 4, 0.29), ("mamba2", 2, 0.51), ("mamba2", 8, 0.17), ("qwen35", 4, 0.28), ("qwen3next", 4, 0.26), ("rwkv7", 4, 0.33), ("lfm2", 3, 0.37)]


@pytest.mark.parametrize(("family", "ranks", "share"), SHARES)
def test_bytes_per_rank_of_recurrent_layers(workers, models, family, ranks, share):
    """Of the weights and of the states that one rank alone has."""
    one = check(workers, models, family, "F16", 1)["bytes"][0]
    for rank in check(workers, models, family, "F16", ranks)["bytes"]:
        assert rank["weight"] <= one["weight"] * share, rank["weight"] / one["weight"]
        assert rank["kv"] <= one["kv"] * (share + 0.26), rank["kv"] / one["kv"]


UNFUSED = [("gemma2", 2), ("cohere2", 3), ("deepseek2", 2), ("qwen35", 3), ("mpt", 5), ("gpt-oss", 8), ("t5", 3), ("bert", 2)]


@pytest.mark.parametrize(("family", "ranks"), rows([("gpt-oss", 2), ("phi3", 3)], UNFUSED))
def test_without_flash_attention(workers, models, family, ranks):
    check(workers, models, family, "F16", ranks, flash_attn=False)


@pytest.mark.parametrize(("family", "ranks", "layers"), rows([("llama", 3, 1)], [("qwen2moe", 2, 2), ("jamba", 3, 2), ("gemma3", 2, 1)]))
def test_partial_offload(workers, models, family, ranks, layers):
    """The host's CPU has the first layers, or the output too (it counts as one more)."""
    check(workers, models, family, "F16", ranks, only_here={"layers": layers})


@pytest.mark.parametrize(("family", "ranks"), rows([("llama", 3), ("phi3", 2)], [("qwen3moe", 3), ("llama", 8)]))
def test_lora(workers, models, tmp_path, family, ranks):
    model, lora = models(family, "F16"), str(tmp_path / "lora.gguf")
    workers.run(jobs.write_lora, {}, path=lora, model=model)
    arguments = {"model": model, "prompt": PROMPT, "lora": lora, "steer": False}
    reference = workers.run(jobs.adapted, {}, on_device=False, **arguments)["prompt_logits"]
    plain = workers.run(jobs.adapted, {}, on_device=False, **{**arguments, "lora": None})["prompt_logits"]
    result = workers.run(jobs.adapted, emulated(ranks), on_device=True, **arguments)["prompt_logits"]
    assert nmse(result, reference) <= TOLERANCE["F16"] < 0.01 < nmse(plain, reference)


@pytest.mark.parametrize(("family", "ranks"), rows([("llama", 3)], [("command-r", 2)]))
def test_control_vector(workers, models, family, ranks):
    arguments = {"model": models(family, "F16"), "prompt": PROMPT, "lora": None, "steer": True}
    reference = workers.run(jobs.adapted, {}, on_device=False, **arguments)["prompt_logits"]
    plain = workers.run(jobs.adapted, {}, on_device=False, **{**arguments, "steer": False})["prompt_logits"]
    result = workers.run(jobs.adapted, emulated(ranks), on_device=True, **arguments)["prompt_logits"]
    assert nmse(result, reference) <= TOLERANCE["F16"] < 0.001 < nmse(plain, reference)


RECURRENT = [("mamba2", 3, {}), ("kimi-linear", 3, {}), ("qwen35", 2, {}), ("rwkv7", 2, {})]
SHIFTED = [("gemma3", 2, {}), ("llama", 5, {"flash_attn": False}), ("deepseek2", 2, {}), *RECURRENT]


# Not of quantised keys: the host itself crashes when it builds their shift.
@pytest.mark.parametrize(("family", "ranks", "options"), rows([("llama", 3, {}), ("jamba", 2, {})], SHIFTED))
def test_shifted_and_copied_sequences(workers, models, family, ranks, options):
    arguments = {"model": models(family, "F16"), "prompt": PROMPT, **options}
    reference = workers.run(jobs.edited_cache, {}, on_device=False, **arguments)
    result = workers.run(jobs.edited_cache, emulated(ranks), on_device=True, **arguments)
    assert nmse(result, reference) <= TOLERANCE["F16"]
