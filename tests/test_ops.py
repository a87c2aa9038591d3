"""Every op that is claimed, alone, against the host's CPU; and graphs that must be refused."""

from __future__ import annotations

import os
import re

import jobs
import numpy as np
import pytest
from conftest import emulated, share_a_gpu
from ggml_tp.host import nmse
from graphs import CASES as ALL_CASES
from graphs import FOREIGN, OTHER_TYPES, OUTSIDE

# Sanitizers are slow: they take every so many cases, which meets each family of kernels.
CASES = list(ALL_CASES)[:: int(os.environ.get("TEST_EVERY", "1"))]
SETTINGS = [("sm_60", 1), ("sm_60", 3), ("sm_86", 2)]
# Emulated, several ranks share the cases by default: every case is computed by one rank, and by three or by two of another architecture.
SHARES = {("sm_60", 3): slice(0, None, 2), ("sm_86", 2): slice(1, None, 2)} if "TEST_GPUS" not in os.environ else {}


def tolerance(name: str) -> float:
    if name.startswith(("mul_mat", "experts")) and any(t in name for t in ("Q4_0", "Q8_0", "Q4_K", "Q6_K")):
        return 5e-4  # both sides quantise activations, in blocks of different length
    if name.startswith(("mul_mat", "experts")) and any(t in name for t in OTHER_TYPES.values()):
        return 5e-4  # the CPU quantises activations
    if name.startswith("mul_mat BF16"):
        return 1e-4  # the CPU rounds activations to bf16
    if name.startswith("flash_attn quantised"):
        return 1e-4  # the CPU quantises queries
    if "searched" in name:
        return 1e-12  # the same bits; another guess for one group of 16 would be 1e-8 and more
    if any(text in name for text in ("and back", "set_rows Q", "set_rows IQ")):
        return 1e-5  # a tie that falls the other way
    if name.startswith("flash_attn"):
        return 2e-5  # the CPU rounds its running sums over V to f16: 9e-6 seen over 1536 cells
    if "quick" in name:
        return 5e-7  # the CPU has a table of f16
    if "F16" in name:
        return 5e-6  # the CPU rounds activations to f16
    return 1e-7


AT_ONCE = 300  # cases: all of them took a job 152 s of its 240 beside another worker on two cores


def results_of(workers, environment, names, on_device):
    names, results = list(names), {}
    for first in range(0, len(names), AT_ONCE):
        results.update(workers.run(jobs.run_cases, environment, names=names[first : first + AT_ONCE], on_device=on_device))
    return results


@pytest.fixture(scope="module")
def reference(workers):
    return results_of(workers, {}, CASES, on_device=False)


def check(workers, reference, arch, ranks, names, **more):
    results = results_of(workers, emulated(ranks, arch, **more), names, on_device=True)
    wrong = []
    for name, (claimed, status, value) in results.items():
        expected = reference[name][2]
        finite = np.isfinite(expected)
        error = nmse(value[finite], expected[finite])
        if not claimed or status != 0 or not np.array_equal(finite, np.isfinite(value)) or error > tolerance(name):
            wrong.append(f"{name}: claimed {claimed}, status {status}, NMSE {error:.2e}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(("arch", "ranks"), SETTINGS)
def test_ops(workers, reference, arch, ranks):
    check(workers, reference, arch, ranks, CASES[SHARES.get((arch, ranks), slice(None))])


def test_cases_are_divided(workers):
    """They were not for a long time: a result that is stored whole makes its weights whole."""
    divisions = {
        "mul_mat Q4_K attn_q m7": "attn_q.weight: sharded axis 1 [0,64) [64,128) [128,192)",
        "mul_mat Q4_K attn_output m7": "attn_output.weight: sharded axis 0 [0,192) [192,320) [320,512)",
        "mul_mat Q4_0, three of one input m150": "attn_k.weight: sharded axis 1 [0,32) [32,64) [64,96)",
        "mul_mat_id Q4_K ffn_gate_exps, 5 tokens": "ffn_gate_exps.weight: sharded axis 1 [0,64) [64,128) [128,192)",
        "mul_mat_id Q4_K ffn_down_exps, 5 tokens": "ffn_down_exps.weight: sharded axis 0 [0,160) [160,352) [352,512)",
        "set_rows Q8_0 into a divided cache": "cache_k_l0: sharded axis 0 [0,64) [64,128) [128,192)",
        "flash_attn, 100 tokens, 4 heads of 2": "FLASH_ATTN_EXT node_0: sharded axis 1 [0,1) [1,3) [3,4)",
    }
    for text, division in zip(workers.run(jobs.texts, emulated(3), names=list(divisions), what="plan").values(), divisions.values(), strict=True):
        assert division in text, text


@pytest.mark.full
@pytest.mark.parametrize(("arch", "ranks"), SHARES)
def test_all_ops_of_several_ranks(workers, reference, arch, ranks):
    check(workers, reference, arch, ranks, CASES)


@pytest.mark.parametrize("ranks", [1, 3])
def test_products_of_warpgroups(workers, reference, ranks):
    """sm_90's own instructions, for all products of more columns than mul_vec takes (of few types their halves), and those of many experts' tokens."""
    many = re.compile(
        r"mul_mat (\S+ attn_output (\S+ )?m40|.* m(130|150|300)|.* in pieces, m(70|100))$|mul_mat_id .*(130 tokens|many tokens|ffn_(up|down)_exps, 33 tokens)"
        "|large activations"
    )
    check(workers, reference, "sm_90", ranks, [name for name in CASES if many.match(name)])


@pytest.mark.parametrize(("arch", "ranks"), [("sm_80", 2), ("sm_120", 3)])
def test_few_columns_of_rows_of_any_length(workers, reference, arch, ranks):
    """288 weights have 18 bytes of scales, which are padded; of Q3_K and Q6_K each second scale of a row lies across a copy's word. Architectures differ in
    how long rings are; 768 weights are cut inside blocks of 256 at 2 ranks."""
    few = re.compile(r"mul_mat \S+ attn_(q|output) \d+x200 m(12|40)$|.* in pieces, m12$|.*few columns$|mul_mat_id .*(exps, 5 tokens|all 20 tokens)$")
    names = [name for name in CASES if few.match(name)]
    assert len(names) > 20 or "TEST_EVERY" in os.environ
    check(workers, reference, arch, ranks, names)


@pytest.mark.parametrize(("arch", "ranks"), [("sm_86", 1), ("sm_90", 3)])
def test_attention_of_many_tokens(workers, reference, arch, ranks):
    """Tensor cores, whole and in shards whose first head is one of a KV head's others."""
    check(workers, reference, arch, ranks, [name for name in CASES if re.match(r"flash_attn.* (70|100|130) tokens", name)])


@pytest.mark.skipif("TEST_GPUS" in os.environ, reason="names of the emulated architectures' kernels")
def test_attention_of_many_tokens_has_blocks_of_eight_warps_where_they_suffice(workers):
    """The emulated GPUs have four multiprocessors."""
    kernels = {
        "flash_attn, 100 tokens, 3 heads of 1": "flash_tile_64_4<",
        "flash_attn, 100 tokens, 9 heads of 3": "flash_tile_64_8<",
        "flash_attn, 100 tokens, 8 heads of 1": "flash_tile_64_8<",
        "flash_attn d112, 70 tokens": "flash_tile_128_8<",
        "flash_attn d192, 70 tokens": "flash_tile_256_4<",
    }
    for text, kernel in zip(workers.run(jobs.programs, emulated(1, "sm_86"), names=list(kernels)).values(), kernels.values(), strict=True):
        assert kernel in text, text


@pytest.mark.skipif("TEST_GPUS" in os.environ, reason="names of the emulated architectures' kernels")
def test_attention_leaves_what_its_product_reads(workers):
    """One launch where a block has all of its heads' cells."""
    names = [f"mul_mat {name} of attention of {n} tokens" for n in (2, 12, 40) for name in ("Q4_K", "BF16")]
    for name, text in zip(names, workers.run(jobs.programs, emulated(1, "sm_80"), names=names).values(), strict=True):
        assert "flash_columns_64<1," in text and "mul_" in text and not re.search("panels<|quantize_x<|flash_combine<", text), f"{name}: {text}"


@pytest.mark.skipif("TEST_GPUS" in os.environ, reason="names of the emulated architectures' kernels")
def test_pieces_are_added_up_where_they_are_read(workers):
    """By a norm; by Q's and K's ropes and what is stored, one launch though turned keys lie where Q was. Not where somebody else comes first."""
    expected = {
        **{f"mul_mat Q4_K and norm, residual {r}, m{m}": "fused_norm_pieces" for r in ("in front", "behind", "none") for m in (12, 130)},
        **{f"mul_mat {name}, m40": "fused_norm_pieces" for name in ("BF16 and norm, residual behind", "Q4_K and norm, the product read again")},
        **{f"mul_mat Q4_0, Q, K and V turned and stored, {mode}, m12": "rope_store_pieces" for mode in ("normal", "neox")},
        "mul_mat BF16, Q, K and V turned and stored, neox, m40": "rope_store_pieces",
        "mul_mat Q4_0, Q, K and V turned and stored, read again, m12": "rope_store_pieces",
        **{f"mul_mat Q4_0 of a feed-forward network in pieces{of}m12": "fused_glu_swiglu" for of in (" ", ", up first, ", ", read again, ")},
    }
    for text, kernel in zip(workers.run(jobs.programs, emulated(1, "sm_90"), names=list(expected)).values(), expected.values(), strict=True):
        assert text.count(f": {kernel}<") == 1 and not re.search("sum_pieces<|: rope_[a-z]+<", text), text
    names = ["mul_mat Q4_0, Q, K and V with biases turned and stored, m12", "mul_mat Q4_0, Q, K and V turned and stored in Q8_0, m12"]
    for text in workers.run(jobs.programs, emulated(1, "sm_90"), names=names).values():
        assert "sum_pieces<" in text and "_pieces<" not in text.replace("sum_pieces<", ""), text


@pytest.mark.skipif("TEST_GPUS" in os.environ, reason="names of the emulated architectures' kernels")
def test_warpgroups_take_what_they_can(workers):
    """Q, K and V are one launch, so are gate and up; norm and GLU leave what the products read, whose weights have their own type's kernel; few tiles
    divide k."""
    names = ["mul_mat Q4_0, three of one input m150", "mul_mat BF16 of a feed-forward network m150", "mul_mat_id Q4_K, many tokens of few experts"]
    names.append("mul_mat Q8_0, two of one input, k in pieces, m70")
    three, network, experts, pieces = workers.run(jobs.programs, emulated(1, "sm_90"), names=names).values()
    assert [three.count(kernel) for kernel in ("half_panels<", "mul_wgmma_q4_0_", "mul_tile_")] == [1, 1, 0], three
    assert [network.count(kernel) for kernel in ("bf16_panels<", "mul_wgmma_bf16_", "fused_norm<", "fused_glu_swiglu<")] == [0, 2, 1, 1], network
    assert "half_entries<" in experts and "mul_wgmma_id_q4_K_128<" in experts, experts
    # The emulated GPUs have four multiprocessors: two tiles leave room for two pieces of k.
    assert "mul_wgmma_q8_0_128<1,2,2>" in pieces and "sum_pieces<" in pieces, pieces
    for text in workers.run(jobs.programs, emulated(1, "sm_86"), names=names).values():
        assert "mul_tile_" in text and "mul_wgmma" not in text, text


@pytest.mark.skipif("TEST_GPUS" in os.environ, reason="names of the emulated architectures' kernels")
@pytest.mark.parametrize("ranks", [1, 2])
def test_experts_in_the_persistent_kernel(workers, reference, ranks):
    """What its stages leave for others: results that somebody reads must be there, and only those may be left out. A row that stages compute is no weight."""
    behind = [name for name in CASES if name.startswith("mul_mat") and ", then " in name]
    check(workers, reference, "sm_90", ranks, [name for name in CASES if name.startswith("experts")] + behind)
    if ranks > 1:
        return  # these products' columns are gathered there, which ends the run
    of_heads = [name for name in behind if " heads " in name]
    for name, program in workers.run(jobs.programs, emulated(ranks, "sm_90"), names=of_heads).items():
        assert len(re.findall(r"^(  -- |     )product node_", program, re.MULTILINE)) >= 5, f"{name}: {program}"


@pytest.mark.parametrize(("arch", "ranks"), [("sm_80", 1), ("sm_90", 3)])
def test_latent_attention_and_wide_heads(workers, reference, arch, ranks):
    """The shapes that test_ops' architectures have no shared memory for; and which kernel each is."""
    check(workers, reference, arch, ranks, [name for name in CASES if re.match("flash_attn.*(latent|wide)", name)])
    if "TEST_GPUS" in os.environ:
        return  # names of the emulated architectures' kernels
    expected = {"20 heads, 9 tokens": "flash_latent_64<3,", "5 heads, 1 tokens": "flash_latent_16<1,", "20 heads, 1 tokens": "flash_latent_16<2,"}
    expected |= {"d512, 8 heads of 2, 1 tokens": "flash_wide_16<1,", "d512, 8 heads of 1, 9 tokens": "flash_wide_64<2,"}
    names = [name for text in expected for name in ALL_CASES if text in name]
    programs = workers.run(jobs.programs, emulated(1, arch), names=names)
    for name, kernel in zip(names, expected.values(), strict=True):
        assert kernel in programs[name], programs[name]


@pytest.mark.skipif("TEST_GPUS" in os.environ, reason="names of the emulated architectures' kernels")
def test_few_columns_have_their_kernel(workers):
    """From three columns on, where there are tensor cores (few_least); two read weights once too, by mul_vec."""
    names = [f"mul_mat Q4_0 attn_q m{m}" for m in (2, 6, 33)]
    names += ["mul_mat Q4_K attn_q 768x200 m12", "mul_mat Q4_K 2304x150, k in pieces, m12"]
    of_types = (("MXFP4", 288, 7), ("Q5_0", 384, 12), ("IQ4_XS", 768, 20), ("Q3_K", 768, 40))
    names += [f"mul_mat {name} attn_q {k}x200 m{m}, few columns" for name, k, m in of_types]
    kernels_of_types = ("mul_few_mxfp4_8<", "mul_few_q5_0_16<", "mul_few_iq4_xs_32<", "mul_few_q3_K_64<")
    expected = {
        "sm_75": ("mul_vec_q4_0_", "mul_vec_q4_0_", *["mul_"] * 7),
        "sm_80": ("mul_vec_q4_0_", "mul_few_q4_0_8<", "mul_few_q4_0_64<", "mul_few_q4_K_16<", "mul_few_q4_K_16_tall<", *kernels_of_types),
    }
    for arch, kernels in expected.items():
        for text, kernel in zip(workers.run(jobs.programs, emulated(1, arch), names=names).values(), kernels, strict=True):
            assert kernel in text, text


@pytest.mark.skipif("TEST_GPUS" in os.environ, reason="names of the emulated architectures' kernels")
def test_experts_of_few_tokens_have_their_kernel(workers):
    """From four tokens on, where there are tensor cores; until there are 8 entries for an expert, of more than 4 in tiles of 16."""
    names = [f"mul_mat_id Q4_K ffn_gate_exps, {n} tokens" for n in (1, 5, 33)] + ["mul_mat_id Q4_K of 9, an expert of all 20 tokens"]
    expected = {
        "sm_75": ("mul_vec_id_q4_K<", "mul_vec_id_q4_K<", "mul_id_q4_K<", "mul_id_q4_K<"),
        "sm_80": ("mul_vec_id_q4_K<", "mul_few_id_q4_K_8<", "mul_tile_id_q4_K_small<", "mul_few_id_q4_K_16<"),
        "sm_90": ("mul_vec_id_q4_K<", "mul_few_id_q4_K_8<", "mul_wgmma_id_q4_K_64<", "mul_few_id_q4_K_16<"),
    }
    for arch, kernels in expected.items():
        for text, kernel in zip(workers.run(jobs.programs, emulated(1, arch), names=names).values(), kernels, strict=True):
            assert kernel in text, text


@pytest.mark.parametrize("arch", ["sm_60", "sm_90"])
@pytest.mark.skipif("TEST_GPUS" in os.environ, reason="names of the emulated architectures' kernels")
def test_experts_of_many_tokens_are_weighed_and_summed_in_one_launch(workers, arch):
    names = ["experts F16 of 40 tokens", "experts F16 of 40 tokens, biases", "mul_mat F32 of a router, 70 tokens"]
    plain, biases, router = workers.run(jobs.programs, emulated(1, arch), names=names).values()
    for text in (plain, biases):
        assert [text.count(kernel) for kernel in ("weighted_sum<", "binary_mul<", "binary_add<")] == [1, 0, 0], text
    assert "mul_floats_f32<2,3,1>" in router, router


@pytest.mark.skipif("TEST_GPUS" in os.environ, reason="names of the emulated architectures' kernels")
@pytest.mark.parametrize("n_tokens", [1, 3])
def test_biases_of_experts_are_added_with_their_products(workers, n_tokens):
    """Gate and up are one launch, what their GLU leaves is quantised with it, down with its weights and sums is another."""
    (text,) = workers.run(jobs.programs, emulated(1, "sm_80"), names=[f"experts MXFP4 of {n_tokens} tokens, biases"]).values()
    kernels = ("mul_vec_id_mxfp4<", "fused_glu_swiglu_oai<", "add_id<", "binary_", "weighted_sum<")
    assert [text.count(kernel) for kernel in kernels] == [2, 1, 0, 0, 0], text


@pytest.mark.skipif("TEST_GPUS" in os.environ, reason="names of the emulated architectures' kernels")
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_experts_of_a_persistent_kernel(workers, reference, ranks):
    names = [name for name in CASES if name.startswith("experts Q8_0 behind their router")]
    for name, text in workers.run(jobs.programs, emulated(ranks, "sm_90"), names=names).items():
        assert "mul_vec_id" not in text and "add_id" not in text and "stream of " in text, f"{name}: {text}"
    check(workers, reference, "sm_90", ranks, names)


@pytest.mark.skipif("TEST_GPUS" in os.environ, reason="names of the emulated architectures' kernels")
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_experts_in_groups(workers, reference, ranks):
    """A router's choice of groups is the experts' stage's work on sm_90, and one launch elsewhere."""
    names = [name for name in CASES if name.startswith("experts Q8_0, ")]
    for name, text in workers.run(jobs.programs, emulated(ranks, "sm_90"), names=names).items():
        assert "mul_vec_id" not in text and text.startswith("stream of "), f"{name}: {text}"
    check(workers, reference, "sm_90", ranks, names)
    for name, text in workers.run(jobs.programs, emulated(ranks, "sm_61"), names=names[:1]).items():
        assert all(f" {other}<" not in text for other in ("fill", "set_rows", "argsort")) and " chain<" in text, f"{name}: {text}"


# TEST_STDERR: a process of its own, started while pytest captures, so that its lines are seen.
@pytest.mark.parametrize("ranks", [1, 3])
def test_foreign_graphs_are_not_claimed_and_refused(workers, ranks, capfd):
    for name, result in workers.run(jobs.refuse_cases, emulated(ranks, TEST_STDERR="foreign"), table="FOREIGN").items():
        assert result == (False, -1, 0), name
    assert capfd.readouterr().err.count("ggml-tp: no kernel for ") == len(FOREIGN)


@pytest.mark.parametrize("ranks", [1, 3])
def test_indices_outside_touch_nothing_and_fail(workers, ranks, capfd):
    for name, result in workers.run(jobs.refuse_cases, emulated(ranks, TEST_STDERR="outside"), table="OUTSIDE").items():
        assert result == (True, -1, 0), name
    assert len(re.findall("an? (?:row|expert's) number outside the tensor", capfd.readouterr().err)) == len(OUTSIDE)


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_partial_that_was_passed_on_is_read_as_its_sum(workers, ranks):
    """Its all_reduce comes behind the multiplication; a host that reads the product itself gets the ranks' summands added up."""
    for value, expected in zip(workers.run(jobs.passed_on, emulated(ranks), on_device=True), workers.run(jobs.passed_on, {}, on_device=False), strict=True):
        assert nmse(value, expected) <= tolerance("")


PULL, PUSH = {"GGML_TP_NORM_BYTES": "0", "GGML_TP_PUSH_BYTES": "0"}, {"GGML_TP_PUSH_BYTES": "1048576"}


@pytest.mark.parametrize(
    ("kernel", "ranks", "arch", "tokens"),
    [("pull_norm", 2, "sm_60", 9), ("pull_norm", 3, "sm_90", 9), ("pull_norm", 16, "sm_80", 9),
     ("push_norm", 2, "sm_60", 9), ("push_norm", 3, "sm_90", 140), ("push_norm", 16, "sm_80", 9)],
)  # fmt: skip
def test_norms_that_reduce(workers, kernel, ranks, arch, tokens):
    """What they leave divided by rows, or as summands, a host reads whole. 16 ranks: more than rows; 140 rows: more than an H200 has blocks for."""
    if share_a_gpu(ranks):
        pytest.skip("NCCL reduces among ranks that share a GPU")
    for read_sums in (False, True):
        arguments = {"read_sums": read_sums, "tokens": tokens}
        values, program = workers.run(jobs.norms_that_reduce, emulated(ranks, arch, **(PULL if kernel == "pull_norm" else PUSH)), on_device=True, **arguments)
        assert program.count(f": {kernel}<") == 2 and "all_reduce " not in program
        expected, _ = workers.run(jobs.norms_that_reduce, {}, on_device=False, **arguments)
        assert len(values) == (3 if read_sums else 1)
        for value, of_cpu in zip(values, expected, strict=True):
            assert nmse(value, of_cpu) <= 1e-6


@pytest.mark.parametrize(("ranks", "arch"), [(2, "sm_90"), (5, "sm_90"), (3, "sm_75")])
def test_summands_are_pushed_in_pieces(workers, reference, ranks, arch):
    """Where a product is divided along k its pieces are added up by the norm that pushes them; of a product that others read too NCCL has the sum. A norm
    behind which no residual is added pushes too."""
    if share_a_gpu(ranks):
        pytest.skip("NCCL reduces among ranks that share a GPU")
    kinds = [f"mul_mat {t} and norm{r}" for t in ("Q4_K", "BF16") for r in (", residual in front", ", residual behind", " alone")]
    pushed = [name for kind in kinds for m in (12, 130) if (name := f"{kind}, m{m}") in CASES]
    others = [name for name in ("mul_mat Q4_K and norm, the product read again, m12", "mul_mat Q4_K and norm, residual none, m12") if name in CASES]
    if "TEST_GPUS" not in os.environ and "TEST_EVERY" not in os.environ:  # the emulated GPUs have four multiprocessors, which products share in pieces
        for name, text in workers.run(jobs.programs, emulated(ranks, arch, **PUSH), names=pushed).items():
            assert text.count(": push_norm<") == 1 and not re.search(" f32$|sum_pieces<", text, re.M), f"{name}: {text}"
        for name, text in workers.run(jobs.programs, emulated(ranks, arch, **PUSH), names=others).items():
            assert text.count(" f32\n") == 1 and "push_norm<" not in text, f"{name}: {text}"
        text = workers.run(jobs.programs, emulated(ranks, arch, GGML_TP_PUSH_BYTES="0", GGML_TP_NORM_BYTES="99999999"), names=pushed[:1])[pushed[0]]
        assert ("sum_pieces<" in text) == (ranks == 2), text  # of more ranks k is too short to be divided
    check(workers, reference, arch, ranks, pushed + others, **PUSH)
    check(workers, reference, arch, 2, pushed + others, **PUSH, GGML_TP_SPLIT="3,1")  # one has pieces, one has not


def test_what_does_not_fit_an_inbox_is_not_pushed(workers):
    if share_a_gpu(2):
        pytest.skip("NCCL reduces among ranks that share a GPU")
    name = "mul_mat Q4_K and norm, residual behind, m12"  # rows of 256 elements: 12,288 bytes
    for push_bytes, pushes in (("12288", True), ("12287", False)):
        text = workers.run(jobs.programs, emulated(2, "sm_90", GGML_TP_PUSH_BYTES=push_bytes), names=[name])[name]
        assert ("push_norm<" in text) == pushes != (" f32\n" in text), text


@pytest.mark.skipif("TEST_GPUS" in os.environ, reason="the emulator's links are said to be PCIe")
def test_less_is_pushed_by_pcie(workers):
    """Rows of 256 elements: 130 are more than 128 KiB, 12 are not."""
    names = [f"mul_mat Q4_K and norm, residual behind, m{m}" for m in (12, 130)]
    for links, pushes in (({}, [True, True]), ({"TP_EMULATOR_PCIE": "1"}, [True, False])):
        texts = workers.run(jobs.programs, emulated(2, "sm_90", **links), names=names).values()
        assert ["push_norm<" in text for text in texts] == pushes


@pytest.mark.parametrize("ranks", [1, 3])
def test_inputs_arrive_as_they_were_last_written(workers, ranks):
    """More of them than one launch takes, of all sizes, and written again in part before their graph: a small piece, then a large one over it, which the
    driver copies, and the other way round; from and to addresses that no wider word begins at; parts with others between them that stay."""
    sizes = [1, 3, 5, 33, 257, 80_000, 100_000, 128, *range(1, 20)]
    writes = [(3, 5, 7), (4, 16, 999), (4, 0, 1028), (4, 1027, 1), (5, 100, 4), (5, 0, 320_000), (5, 319_999, 1), (6, 3, 399_990), (6, 2, 2), (0, 1, 2),
              (7, 0, 100), (7, 256, 100)]  # fmt: skip
    assert workers.run(jobs.inputs_in_pieces, emulated(ranks), sizes=sizes, writes=writes) == (0, [0] * len(sizes))


def test_a_result_without_memory_is_refused(workers, capfd):
    """The process died of it."""
    status, after = workers.run(jobs.result_without_memory, emulated(2, TEST_STDERR="memory"))
    assert status != 0 and list(after) == [0, -1, -2]
    assert "has no memory; the graph is refused" in capfd.readouterr().err


@pytest.mark.parametrize("ranks", [3, 4])
def test_heads_that_two_ranks_hold_are_summed_once(workers, ranks):
    result = workers.run(jobs.product_of_shared_heads, emulated(ranks), on_device=True)
    assert nmse(result, workers.run(jobs.product_of_shared_heads, {}, on_device=False)) <= 1e-6  # was 0.57


def test_halves_are_gathered_wherever_their_division_lies(workers):
    result = workers.run(jobs.gathered_halves, emulated(3), on_device=True)
    assert nmse(result, workers.run(jobs.gathered_halves, {}, on_device=False)) <= 1e-6  # one half's last bit
