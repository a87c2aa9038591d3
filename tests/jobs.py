"""What tests run in a process of its own: the environment is read once per host, and a host that dies must not take pytest along."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import exact
import families
import gguf
import graphs
import numpy as np
import random_graphs
from ggml_tp import LIBRARY as INSTALLED
from ggml_tp.host import N_GPU_LAYERS_OFFSET, SPLIT_TENSORS, Host, HostError
from ggml_tp.inspection import Inspection

LIBRARY = Path(os.environ.get("TEST_LIBRARY", INSTALLED))  # a sanitizer's build, when tests ask for it
_cache: dict[Any, Any] = {}


def _host(library: str | None = None) -> Host:
    if library not in _cache:
        _cache[library] = Host(library)
    return _cache[library]


def _with_plugin(library: str | None = None) -> Host:
    host = _host(library)
    if ("loaded", library) not in _cache:
        host.load_backend(LIBRARY)
        _cache["loaded", library] = True
    return host


def write_model(path: str, family: str, quant: str, options: dict[str, Any]) -> None:
    families.write_model(_host(), Path(path), family, quant, **options)


def _model_params(host: Host, layers: int, on_cpu: str) -> Any:
    ffi, lib = host.ffi, host.lib
    params = ffi.new("params_t *", lib.llama_model_default_params())
    ffi.cast("int32_t *", params)[N_GPU_LAYERS_OFFSET // 4] = layers
    if on_cpu:
        if "overrides" not in _cache:
            ffi.cdef("typedef struct { const char *pattern; void *buft; } buft_override; void *ggml_backend_cpu_buffer_type(void);")
            _cache["overrides"] = ffi.dlopen(os.fspath(host.path))
        _cache["pattern"] = ffi.new("char[]", on_cpu.encode())
        _cache["override"] = ffi.new("buft_override[2]", [(_cache["pattern"], _cache["overrides"].ggml_backend_cpu_buffer_type())])
        ffi.cast("void **", params)[1] = _cache["override"]
    return params


def run_model(
    model: str, prompt: list[int] | str, n: int, on_device: bool, flash_attn: bool = True, library: str | None = None, n_ubatch: int = 512,
    layers: int = 999, on_cpu: str = "", kv_type: int = graphs.F16,
) -> dict[str, Any]:  # fmt: skip
    """Greedy generation and the logits of every prompt position. `layers`: how many of them the device has; `on_cpu`: weights, by a pattern, that
    stay with the host's CPU all the same."""
    host = _with_plugin(library) if on_device else _host(library)
    loaded = host.model(model, "TP0" if on_device else None, _model_params(host, layers, on_cpu) if on_device and (layers < 999 or on_cpu) else None)
    tokens_in = loaded.tokenize(prompt) if isinstance(prompt, str) else prompt
    context = loaded.context(n_ctx=1024, flash_attn=flash_attn, n_ubatch=n_ubatch, kv_type=kv_type)
    tokens, logits, _ = context.generate(tokens_in, n)
    out: dict[str, Any] = {"tokens": tokens, "logits": logits, **_inspected(on_device)}
    context.close()
    context = loaded.context(n_ctx=1024, flash_attn=flash_attn, n_ubatch=n_ubatch, kv_type=kv_type)
    out["prompt_logits"] = context.decode(tokens_in, 0, all_logits=True)
    context.close()
    loaded.close()
    return out


_MORE = """
    typedef struct llama_lora llama_lora;
    void llama_set_embeddings(void *context, bool embeddings);
    int32_t llama_encode(void *context, llama_batch batch);
    float *llama_get_embeddings_ith(void *context, int32_t i);
    int32_t llama_model_n_embd(const void *model);
    int32_t llama_model_decoder_start_token(const void *model);
    void llama_memory_seq_cp(void *memory, int32_t seq, int32_t to_seq, int32_t from, int32_t to);
    void llama_memory_seq_add(void *memory, int32_t seq, int32_t from, int32_t to, int32_t delta);
    bool llama_memory_can_shift(void *memory);
    llama_lora *llama_adapter_lora_init(void *model, const char *path);
    int32_t llama_set_adapters_lora(void *context, llama_lora **adapters, size_t n, float *scales);
    int32_t llama_set_adapter_cvec(void *context, const float *data, size_t n, int32_t n_embd, int32_t first_layer, int32_t last_layer);
"""


def _more(host: Host) -> Any:
    """Functions of the host that only tests call."""
    if ("more", host.path) not in _cache:
        host.ffi.cdef(_MORE)
        _cache["more", host.path] = host.ffi.dlopen(os.fspath(host.path))
    return _cache["more", host.path]


def _inspected(on_device: bool) -> dict[str, Any]:
    if not on_device:
        return {}
    inspection = Inspection(LIBRARY)
    return {"counters": inspection.counters(), "bytes": inspection.rank_bytes(), "plan": inspection.text("plan"), "program": inspection.text("program")}


def embed(model: str, prompt: list[int], n: int, on_device: bool, flash_attn: bool = True) -> dict[str, Any]:
    """Of a model that is only an encoder: every token's embedding before pooling (none is asked for), as run_model's prompt_logits."""
    host = _with_plugin() if on_device else _host()
    lib, loaded = _more(host), host.model(model, "TP0" if on_device else None)
    context = loaded.context(n_ctx=1024, flash_attn=flash_attn)
    lib.llama_set_embeddings(context.handle, True)
    batch = context._fill([(token, i, 0) for i, token in enumerate(prompt)], True)
    assert lib.llama_encode(context.handle, batch) == 0
    n_embd = lib.llama_model_n_embd(loaded.handle)
    rows = [np.frombuffer(host.ffi.buffer(lib.llama_get_embeddings_ith(context.handle, i), n_embd * 4), np.float32).copy() for i in range(len(prompt))]
    out = {"tokens": [], "prompt_logits": np.stack(rows), "logits": np.stack(rows), **_inspected(on_device)}
    lib.llama_batch_free(batch)
    context.close()
    loaded.close()
    return out


def encode_decode(model: str, prompt: list[int], n: int, on_device: bool, flash_attn: bool = True) -> dict[str, Any]:
    """The encoder reads the prompt, the decoder generates; then it reads what it said in one batch. The plan is a token's, and how the encoder's
    tensors are stored."""
    host = _with_plugin() if on_device else _host()
    lib, loaded = _more(host), host.model(model, "TP0" if on_device else None)
    context = loaded.context(n_ctx=1024, flash_attn=flash_attn)
    batch = context._fill([(token, i, 0) for i, token in enumerate(prompt)], True)
    assert lib.llama_encode(context.handle, batch) == 0
    encoders = [line for line in Inspection(LIBRARY).text("plan").splitlines() if line.startswith("stored ")] if on_device else []
    start = lib.llama_model_decoder_start_token(loaded.handle)
    tokens, logits, _ = context.generate([start], n)
    out = {"tokens": tokens, "logits": logits, **_inspected(on_device)}
    if on_device:
        out["plan"] = "\n".join([*encoders, out["plan"]])
    context.clear()
    assert lib.llama_encode(context.handle, batch) == 0
    out["prompt_logits"] = context.decode([start, *prompt[:20]], 0, all_logits=True)
    lib.llama_batch_free(batch)
    context.close()
    loaded.close()
    return out


def exact_logits(model: str, prompt: list[int], kv_type: int) -> np.ndarray:
    return exact.llama_logits(_host().path, model, prompt, kv_type)


def write_draft(path: str, model: str, noise: float) -> None:
    """A model that mostly says what another does: its matrices, each element off by a part of itself."""
    shutil.copy(model, path)
    rng = np.random.default_rng(0)
    for tensor in gguf.GGUFReader(path, "r+").tensors:
        if tensor.tensor_type == gguf.GGMLQuantizationType.F16:
            tensor.data[...] = (tensor.data * (1 + noise * rng.normal(size=tensor.data.shape))).astype(np.float16)


def write_lora(path: str, model: str) -> None:
    families.write_lora(Path(path), Path(model))


def adapted(model: str, prompt: list[int], lora: str | None, steer: bool, on_device: bool) -> dict[str, Any]:
    """Logits of every prompt position with a LoRA adapter at half of its strength, or with a control vector from the second layer on."""
    host = _with_plugin() if on_device else _host()
    ffi, lib, loaded = host.ffi, _more(host), host.model(model, "TP0" if on_device else None)
    context = loaded.context(n_ctx=512)
    if lora:
        adapters = ffi.new("llama_lora *[1]", [lib.llama_adapter_lora_init(loaded.handle, os.fsencode(lora))])
        assert adapters[0] != ffi.NULL
        assert lib.llama_set_adapters_lora(context.handle, adapters, 1, ffi.new("float[1]", [0.5])) == 0
    if steer:
        n_embd = lib.llama_model_n_embd(loaded.handle)
        vector = np.linspace(-1, 1, n_embd, dtype=np.float32)
        assert lib.llama_set_adapter_cvec(context.handle, ffi.from_buffer("float[]", vector), n_embd, n_embd, 1, 1) == 0
    out = {"prompt_logits": context.decode(prompt, 0, all_logits=True), **_inspected(on_device)}
    context.close()
    loaded.close()
    return out


def edited_cache(model: str, prompt: list[int], on_device: bool, kv_type: int = graphs.F16, flash_attn: bool = True) -> np.ndarray:
    """A sequence is copied; of the first one positions are cut out and the rest shifted; then both go on, and one more after the copy is gone."""
    host = _with_plugin() if on_device else _host()
    lib, loaded = _more(host), host.model(model, "TP0" if on_device else None)
    context = loaded.context(n_ctx=512, n_seq_max=2, kv_type=kv_type, flash_attn=flash_attn)
    rows = [context.decode(prompt, 0)]
    memory, n = lib.llama_get_memory(context.handle), len(prompt)
    lib.llama_memory_seq_cp(memory, 0, 1, -1, -1)
    rows.append(context.decode_batch([(7, n, 0), (8, n, 1)], all_logits=True))
    if lib.llama_memory_can_shift(memory):
        assert host.lib.llama_memory_seq_rm(memory, 0, 5, 13)
        lib.llama_memory_seq_add(memory, 0, 13, -1, -8)
        n -= 8
    rows.append(context.decode_batch([(9, n + 1, 0)], all_logits=True))
    assert host.lib.llama_memory_seq_rm(memory, 1, -1, -1)
    rows.append(context.decode_batch([(10, n + 2, 0), (11, 0, 1)], all_logits=True))
    context.close()
    loaded.close()
    return np.concatenate(rows)


def long_cache(model: str, n: int, on_device: bool) -> dict[str, Any]:
    """Two sequences of n tokens; of each, positions in the middle are cut out, and three more tokens lie where those were. The logits of these."""
    host = _with_plugin() if on_device else _host()
    lib, loaded = _more(host), host.model(model, "TP0" if on_device else None)
    context = loaded.context(n_ctx=2 * (n // 256 + 1) * 256, n_seq_max=2)
    memory, rows = lib.llama_get_memory(context.handle), []
    for seq in (0, 1):
        for begin in range(0, n, 512):
            context.decode([(17 * i + i * i + 5 * seq) % 300 for i in range(begin, min(begin + 512, n))], begin, seq)
        rows += [context.decode([3], n, seq)]
        assert host.lib.llama_memory_seq_rm(memory, seq, 3, n - 200)  # cells of the first tile, which is there before they are written
        rows += [context.decode([token], n + i, seq) for i, token in ((1, 7), (2, 8), (3, 9))]
    out = {"logits": np.concatenate(rows), **_inspected(on_device)}
    context.close()
    loaded.close()
    return out


def speculate(model: str, draft: str, prompt: list[int] | str, guesses: list[int], on_device: bool, flash_attn: bool = True) -> dict[str, Any]:
    """Two models at once, by turns: the draft guesses as many tokens as each round says, the target reads them in one batch of one more and
    says which of them it would have said; both forget the others."""
    host = _with_plugin() if on_device else _host()
    device = "TP0" if on_device else None
    target, drafter = host.model(model, device), host.model(draft, device)
    prompt = target.tokenize(prompt) if isinstance(prompt, str) else prompt
    contexts = target.context(n_ctx=512, flash_attn=flash_attn), drafter.context(n_ctx=512, flash_attn=flash_attn)
    logits, drafted = contexts[0].decode(prompt, 0), contexts[1].decode(prompt, 0)
    text, rows, draft_rows, accepted = [int(np.argmax(logits[-1]))], [logits], [drafted], []
    for n in guesses:
        start, guess = len(prompt) + len(text) - 1, [text[-1]]
        for _ in range(n):
            drafted = contexts[1].decode([guess[-1]], start + len(guess) - 1)
            draft_rows.append(drafted)
            guess.append(int(np.argmax(drafted[-1])))
        logits = contexts[0].decode(guess, start, all_logits=True)
        said = [int(token) for token in np.argmax(logits, axis=1)]
        right = next((i for i in range(n) if guess[i + 1] != said[i]), n)
        rows.append(logits)
        text += said[: right + 1]
        accepted.append(right)
        contexts[0].forget(start + right + 1)
        if right == n:  # the draft has not read its own last guess
            contexts[1].decode([guess[-1]], start + n)
        contexts[1].forget(start + right + 1)
    out = {"tokens": text, "accepted": accepted, "logits": np.concatenate(rows), "draft_logits": np.concatenate(draft_rows)}
    for context in contexts:
        context.close()
    for loaded in (target, drafter):
        loaded.close()
    return out


def run_devices(
    model: str, prompt: list[int], n: int, devices: str, split_mode: int, flash_attn: bool = True, late_s: float = 0.0
) -> dict[str, Any]:  # fmt: skip
    """Greedy generation of a model that the host divides over several devices ("TP0,TP1"); `late_s`: then the last one is late once."""
    host = _with_plugin()
    inspection = Inspection(LIBRARY)
    groups = range(inspection.n_groups())
    before = [inspection.counters(group) for group in groups]
    loaded = host.model(model, devices, split_mode=split_mode)
    context = loaded.context(n_ctx=1024, flash_attn=flash_attn)
    out: dict[str, Any] = {"devices": [name for name, _ in host.devices()]}
    out["tokens"], out["logits"], _ = context.generate(prompt, n)
    out["bytes"] = [inspection.rank_bytes(group) for group in groups]
    out["counters"] = [inspection.counters(group) for group in groups]
    out["host_all_reduces"] = [now.host_all_reduces - then.host_all_reduces for now, then in zip(out["counters"], before, strict=True)]
    if late_s:
        inspection.delay(0, late_s, group=groups[-1])
        out["late"] = []
        for _ in range(3):
            context.clear()
            try:
                context.decode(prompt[:4], 0)
                out["late"].append(True)
            except HostError:
                out["late"].append(False)
        context.clear()
        out["again"], out["again_logits"], _ = context.generate(prompt, n)
    context.close()
    context = loaded.context(n_ctx=1024, flash_attn=flash_attn)
    out["prompt_logits"] = context.decode(prompt, 0, all_logits=True)
    context.close()
    loaded.close()
    return out


def time_of_late_devices(model: str, late_s: float) -> tuple[float, float]:
    """Seconds of a decode for which one device of a host that divides tensors is late, and of one for which both are."""
    loaded = _with_plugin().model(model, "TP0,TP1", split_mode=SPLIT_TENSORS)
    inspection = Inspection(LIBRARY)
    context = loaded.context(n_ctx=512)
    context.generate([1, 2, 3], 3)
    times = []
    for i, late in enumerate(([0], [0, 1])):
        for group in late:
            inspection.delay(0, late_s, group=group)
        begin = time.perf_counter()
        context.decode([5], 5 + i)
        times.append(time.perf_counter() - begin)
    context.close()
    loaded.close()
    return times[0], times[1]


def copy_between(names: list[str]) -> dict[str, list[bool]]:
    """Of halves [256, 192] with such a name, copied from a buffer of TP0 into one of TP1 and back into another of TP0: whether each has the
    bytes that were set."""
    host = _with_plugin()
    there, here = graphs.Ggml(host.path, True, device="TP1"), graphs.Ggml(host.path, True, device="TP0")
    lib, ffi = here.lib, here.ffi
    out: dict[str, list[bool]] = {}
    for name in names:
        data = np.random.default_rng(0).integers(0, 256, 256 * 192 * 2, dtype=np.uint8).tobytes()
        contexts = [lib.ggml_init([1 << 20, ffi.NULL, True]) for _ in range(3)]
        tensors = [lib.ggml_set_name(lib.ggml_new_tensor_4d(c, graphs.F16, 256, 192, 1, 1), name.encode()) for c in contexts]
        buffers = [lib.ggml_backend_alloc_ctx_tensors(c, ggml.backend) for c, ggml in zip(contexts, (here, there, here), strict=True)]
        lib.ggml_backend_tensor_set(tensors[0], data, 0, len(data))
        for source, target in zip(tensors, tensors[1:], strict=False):
            lib.ggml_backend_tensor_copy(source, target)
        read = [bytearray(len(data)) for _ in tensors]
        for tensor, into in zip(tensors, read, strict=True):
            lib.ggml_backend_tensor_get(tensor, ffi.from_buffer(into), 0, len(into))
        out[name] = [bytes(into) == data for into in read]
        for buffer, context in zip(buffers, contexts, strict=True):
            lib.ggml_backend_buffer_free(buffer)
            lib.ggml_free(context)
    there.close()
    here.close()
    return out


def inputs_in_pieces(sizes: list[int], writes: list[tuple[int, int, int]]) -> tuple[int, list[int]]:
    """Inputs of a graph, so many F32 each, which the host writes whole before the first of two graphs, and (input, first byte, bytes) one after the other
    before both: the last status, and of every input how many bytes that the second graph saw are not those written last."""
    _with_plugin()
    here = graphs.Ggml(_host().path, True)
    lib, ffi, rng = here.lib, here.ffi, np.random.default_rng(0)
    c = lib.ggml_init([16 << 20, ffi.NULL, True])
    inputs = [lib.ggml_new_tensor_4d(c, graphs.F32, n, 1, 1, 1) for n in sizes]
    graph, outputs = lib.ggml_new_graph(c), []
    for tensor in inputs:
        lib.ggml_set_input(tensor)
        lib.ggml_set_output(tensor)  # else its memory is the next result's, once it has been read
        outputs.append(lib.ggml_cont(c, tensor))
        lib.ggml_set_output(outputs[-1])
        lib.ggml_build_forward_expand(graph, outputs[-1])
    allocator = lib.ggml_gallocr_new(lib.ggml_backend_get_default_buffer_type(here.backend))
    assert lib.ggml_gallocr_alloc_graph(allocator, graph)
    wanted = [np.zeros(4 * n, np.uint8) for n in sizes]
    for before in ([(i, 0, 4 * size) for i, size in enumerate(sizes)], []):
        for i, first, n in before + writes:
            data = rng.integers(0, 256, n, dtype=np.uint8)
            wanted[i][first : first + n] = data
            lib.ggml_backend_tensor_set(inputs[i], data.tobytes(), first, n)
        status = lib.ggml_backend_graph_compute(here.backend, graph)
    differ = []
    for tensor, right in zip(outputs, wanted, strict=True):
        seen = np.zeros_like(right)
        lib.ggml_backend_tensor_get(tensor, ffi.from_buffer(seen), 0, len(seen))
        differ.append(int((seen != right).sum()))
    lib.ggml_gallocr_free(allocator)
    lib.ggml_free(c)
    here.close()
    return status, differ


def _unified(host: Host, n_ctx: int, n_seq_max: int) -> Any:
    """Parameters of a context whose sequences share all cells."""
    ffi = host.ffi
    params = ffi.new("params_t *", host.lib.llama_context_default_params())
    bools = bytes(ffi.buffer(params)).index(bytes([0, 1, 1, 1, 1, 0]))  # embeddings, offload_kqv, no_perf, op_offload, swa_full, kv_unified
    ffi.cast("char *", params)[bools + 5] = b"\x01"
    words = ffi.cast("int32_t *", params)
    words[0], words[1], words[2], words[3] = n_ctx, 2048, 512, n_seq_max
    return params


def sequences(model: str, on_device: bool, unified: bool = False) -> np.ndarray:
    """Three sequences of different length, then one more token of each in one batch, then one of the second alone. Unified, one is longer than a third
    of the cells, which a context of parts would refuse."""
    host = _with_plugin() if on_device else _host()
    loaded = host.model(model, "TP0" if on_device else None)
    context = loaded.context(params=_unified(host, 1024, 3)) if unified else loaded.context(n_ctx=512, n_seq_max=3)
    lengths = (5, 170, 430) if unified else (5, 17, 40)
    rows = []
    for s in range(3) if unified else [-1]:  # one after the other, or all in one batch
        items = [((7 * i + 13 * q) % 300, i, q) for q, m in enumerate(lengths) for i in range(m) if q == s or s < 0]
        rows.append(context.decode_batch(items, all_logits=True))
    rows.append(context.decode_batch([(3 + s, n, s) for s, n in enumerate(lengths)], all_logits=True))
    rows.append(context.decode_batch([(6, lengths[1] + 1, 1)], all_logits=True))
    context.close()
    loaded.close()
    return np.concatenate(rows)


def alternated(model: str) -> tuple[np.ndarray, str]:
    """Three sequences that go on by turns, a token at a time, and a batch of two of them in between: logits, and the program of single tokens."""
    host = _with_plugin()
    loaded = host.model(model, "TP0")
    context = loaded.context(n_ctx=768, n_seq_max=3)
    positions, logits, program = [0, 0, 0], [], ""
    for i in range(14):
        batch = [i * i % 3] if i != 9 else [0, 1]
        if len(batch) > 1:
            program = Inspection().text("program")
        logits.append(context.decode_batch([((31 * i + seq) % 300, positions[seq], seq) for seq in batch], all_logits=True))
        for seq in batch:
            positions[seq] += 1
    context.close()
    loaded.close()
    return np.concatenate(logits), program


def perplexity(model: str, text: str, on_device: bool) -> float:
    """Over non-overlapping windows of 256 tokens."""
    host = _with_plugin() if on_device else _host()
    loaded = host.model(model, "TP0" if on_device else None)
    tokens = loaded.tokenize(text)
    losses = []
    for begin in range(0, len(tokens) - 256, 256):
        context = loaded.context(n_ctx=512)
        window = tokens[begin : begin + 256]
        logits = context.decode(window, 0, all_logits=True)[:-1].astype(np.float64)
        top = logits.max(axis=1, keepdims=True)
        log_sum = top[:, 0] + np.log(np.exp(logits - top).sum(axis=1))
        losses.append(log_sum - logits[np.arange(255), window[1:]])
        context.close()
    loaded.close()
    return float(np.exp(np.concatenate(losses).mean()))


def save_state(model: str, prompt: list[int]) -> bytes:
    loaded = _with_plugin().model(model, "TP0")
    context = loaded.context()
    context.decode(prompt, 0)
    return context.state()


def restore_state(model: str, state: bytes, token: int, position: int) -> np.ndarray:
    loaded = _with_plugin().model(model, "TP0")
    context = loaded.context()
    context.restore(state)
    return context.decode([token], position)[-1]


def try_to_load(model: str) -> dict[str, Any]:
    """Whether the plugin was taken, and that the host lives on without it."""
    host = _host()
    try:
        host.load_backend(LIBRARY)
        accepted = True
    except HostError:
        accepted = False
    tokens, _, _ = host.model(model, None).context().generate([1, 2, 3], 2)
    return {"accepted": accepted, "devices": [name for name, _ in host.devices()], "tokens": tokens}


def out_of_memory(model: str, kv_bytes: int) -> dict[str, Any]:
    """A context for whose cache, of `kv_bytes` a token, the device has not the memory; then one that fits."""
    host = _with_plugin()
    loaded = host.model(model, "TP0")
    try:
        loaded.context(n_ctx=host.memory("TP0")[1] * 5 // 4 // kv_bytes)
        refused = False
    except HostError:
        refused = True
    tokens, _, _ = loaded.context(n_ctx=256).generate([1, 2, 3], 2)
    return {"refused": refused, "tokens": tokens}


def run_cases(names: list[str], on_device: bool, library: str | None = None) -> dict[str, tuple[bool, int, np.ndarray]]:
    """Of each case of graphs.CASES: whether it is claimed, its status, its output."""
    host = _with_plugin(library) if on_device else _host(library)
    ggml = graphs.Ggml(host.path, on_device)
    out = {}
    for name in names:
        build, type_ = graphs.CASES[name]
        case = graphs.Case(ggml)
        output = build(case)
        supported = bool(ggml.lib.ggml_backend_dev_supports_op(ggml.device, output))
        out[name] = (supported, *case.run(output, type_))
    ggml.close()
    return out


def texts(names: list[str], what: str) -> dict[str, str]:
    """Of each case of graphs.CASES: its "program" or "plan" (inspection.TEXTS)."""
    ggml = graphs.Ggml(_with_plugin().path, True)
    out = {}
    for name in names:
        case = graphs.Case(ggml)
        case.run(graphs.CASES[name][0](case))
        out[name] = Inspection(LIBRARY).text(what)
    ggml.close()
    return out


def programs(names: list[str]) -> dict[str, str]:
    return texts(names, "program")


def refuse_cases(table: str) -> dict[str, tuple[bool, int, int]]:
    """Of each bad graph: whether it is claimed, its status, and the status of a good graph after it."""
    host = _with_plugin()
    ggml = graphs.Ggml(host.path, True)
    out = {}
    for name, build in getattr(graphs, table).items():
        bad, good = graphs.Case(ggml), graphs.Case(ggml)
        output = build(bad)
        claimed = bool(ggml.lib.ggml_backend_dev_supports_op(ggml.device, output))
        status, _ = bad.run(output, None)
        out[name] = (claimed, status, good.run(graphs.CASES["scale and shift"][0](good))[0])
    ggml.close()
    return out


def product(type_: int, k: int, n: int, m: int, name: str, on_device: bool) -> tuple[int, np.ndarray]:
    """w [k, n] times x [k, m]; the name of w decides how it is sharded."""
    host = _with_plugin() if on_device else _host()
    if ("ggml", on_device) not in _cache:
        _cache["ggml", on_device] = graphs.Ggml(host.path, on_device)
    case = graphs.Case(_cache["ggml", on_device])
    return case.run(case.lib.ggml_mul_mat(case.c, case.leaf(type_, k, n, scale=k**-0.5, name=name), case.leaf(graphs.F32, k, m)))


def random_graph(numbers: list[int], weight_types: list[int], reused: bool, floor: float, on_device: bool) -> tuple[list[str], dict[str, float]]:
    """What is wrong with the graph that the numbers make, and its values' distances from NumPy's."""
    host = _with_plugin() if on_device else _host()
    if ("ggml", on_device) not in _cache:
        _cache["ggml", on_device] = graphs.Ggml(host.path, on_device)
    graph = random_graphs.RandomGraph(_cache["ggml", on_device], numbers, weight_types)
    graph.grow()
    return random_graphs.evaluate(graph, reused, floor)


def passed_on(on_device: bool) -> tuple[np.ndarray, np.ndarray]:
    """Norms of a product times factors, the product's rows being divided: it stays a Partial; and the product itself."""
    host = _with_plugin() if on_device else _host()
    ggml = graphs.Ggml(host.path, on_device)
    case = graphs.Case(ggml)
    w = case.leaf(graphs.F32, 192, 70, scale=0.1, name="blk.0.attn_output.weight")
    case.inner = case.lib.ggml_mul_mat(case.c, w, case.leaf(graphs.F32, 192, 3))
    output = case.lib.ggml_rms_norm(case.c, case.lib.ggml_mul(case.c, case.inner, case.leaf(graphs.F32, 1, 3)), 1e-5)
    status, value = case.run(output)
    assert status == 0
    ggml.close()
    return value, case.inner_value


def norms_that_reduce(on_device: bool, read_sums: bool, tokens: int) -> tuple[list[np.ndarray], str]:
    """Two products whose summands a residual and a norm follow, as a layer has them: the last norm, the sums too if they are read; and the program."""
    host = _with_plugin() if on_device else _host()
    ggml = graphs.Ggml(host.path, on_device)
    case, lib = graphs.Case(ggml), ggml.lib
    n, n_ff = 96, 160
    attn = case.leaf(graphs.F32, 128, n, scale=0.1, name="blk.0.attn_output.weight")
    up = case.leaf(graphs.F32, n, n_ff, scale=0.1, name="blk.0.ffn_up.weight")
    down = case.leaf(graphs.F32, n_ff, n, scale=0.1, name="blk.0.ffn_down.weight")
    x, residual = case.leaf(graphs.F32, 128, tokens), case.leaf(graphs.F32, n, tokens)
    weights = [case.leaf(graphs.F32, n) for _ in range(2)]
    buffer = case.store()

    def normed(total: Any, weight: Any) -> Any:
        return lib.ggml_mul(case.c, lib.ggml_rms_norm(case.c, total, 1e-5), weight)

    first = lib.ggml_add(case.c, lib.ggml_mul_mat(case.c, attn, x), residual)
    second = lib.ggml_add(case.c, lib.ggml_mul_mat(case.c, down, lib.ggml_mul_mat(case.c, up, normed(first, weights[0]))), first)
    status, values = case.compute([*([first, second] if read_sums else []), normed(second, weights[1])])
    assert status == 0
    program = Inspection(LIBRARY).text("program") if on_device else ""
    lib.ggml_backend_buffer_free(buffer)
    ggml.close()
    return [np.frombuffer(value, np.float32) for value in values], program


def _run_case(on_device: bool, build: graphs.Build) -> np.ndarray:
    """An F32 output."""
    ggml = graphs.Ggml((_with_plugin() if on_device else _host()).path, on_device)
    case = graphs.Case(ggml)
    status, value = case.run(build(case))
    assert status == 0
    ggml.close()
    return value


def gathered_halves(on_device: bool) -> np.ndarray:
    """A product whose rows are divided, at 3 ranks into 23, 24 and 23, as halves beside themselves: their rows must be whole for that."""

    def build(g: graphs.Case) -> Any:
        w, x = g.leaf(graphs.F32, 64, 70, scale=0.1, name="blk.0.attn_q.weight"), g.leaf(graphs.F32, 64, 3)
        halves = g.lib.ggml_cast(g.c, g.lib.ggml_mul_mat(g.c, w, x), graphs.F16)
        return g.lib.ggml_cast(g.c, g.lib.ggml_concat(g.c, halves, halves, 0), graphs.F32)

    value = _run_case(on_device, build)
    if on_device:
        assert Inspection(LIBRARY).counters().last_all_gathers == 1
    return value


def product_of_shared_heads(on_device: bool) -> np.ndarray:
    """V of two heads, read by attention and along its row by a product: of 3 ranks one has both heads, of 4 ranks two have each."""

    def build(g: graphs.Case) -> Any:
        x, widths = g.leaf(graphs.F32, 64, 5), (("q", 4), ("k", 2), ("v", 2))
        rows = [g.lib.ggml_mul_mat(g.c, g.leaf(graphs.F32, 64, 64 * n, scale=1 / 8, name=f"blk.0.attn_{name}.weight"), x) for name, n in widths]
        heads = (g.lib.ggml_permute(g.c, g.lib.ggml_reshape_3d(g.c, row, 64, n, 5), 0, 2, 1, 3) for row, (_, n) in zip(rows, widths, strict=True))
        attended = g.lib.ggml_flash_attn_ext(g.c, *heads, g.null, 0.125, 0.0, 0.0)
        product = g.lib.ggml_mul_mat(g.c, g.leaf(graphs.F32, 128, 96, scale=1 / 11, name="blk.0.ffn_down.weight"), rows[2])
        return g.lib.ggml_concat(g.c, g.lib.ggml_reshape_3d(g.c, attended, 256, 5, 1), product, 0)

    return _run_case(on_device, build)


def result_without_memory() -> tuple[int, np.ndarray]:
    """A host that stores its leaves after it made a view of one, and has forgotten the view: the status, and a right graph's output after it."""
    ggml = graphs.Ggml(_with_plugin().path, True)
    lib, case = ggml.lib, graphs.Case(ggml)
    cache, x = case.leaf(graphs.F32, 40, 9), case.leaf(graphs.F32, 40, 2)
    graph = lib.ggml_new_graph(case.c)
    lib.ggml_build_forward_expand(graph, lib.ggml_set_rows(case.c, cache, x, case.indices(8, 3, type_=graphs.I64)))
    buffer = lib.ggml_backend_alloc_ctx_tensors(case.stored, ggml.backend)
    status = lib.ggml_backend_graph_compute(ggml.backend, graph)
    lib.ggml_backend_buffer_free(buffer)
    lib.ggml_free(case.c)
    after = graphs.Case(ggml)
    return status, after.run(after.lib.ggml_neg(after.c, after.leaf(graphs.F32, 3, values=np.arange(3))))[1]


def late_peer(model: str, seconds: float, n_ubatch: int = 512) -> dict[str, Any]:
    """A generation, a prompt of 40 tokens whose first n_ubatch find a rank late, the same generation again."""
    loaded = _with_plugin().model(model, "TP0")
    inspection = Inspection(LIBRARY)
    context = loaded.context(n_ctx=256, n_ubatch=n_ubatch)
    before, _, _ = context.generate([1, 2, 3], 4)
    inspection.delay(inspection.n_ranks() - 1, seconds)
    try:
        context.decode([5] * 40, 6)
        failed = False
    except HostError:
        failed = True
    context.close()
    context = loaded.context(n_ctx=256, n_ubatch=n_ubatch)
    after, _, _ = context.generate([1, 2, 3], 4)
    context.close()
    loaded.close()
    unread = inspection.counters().graphs_unread
    return {"failed": failed, "unread": unread, "tokens_before": before, "tokens_after": after}


def batches(model: str, n_tokens: int, n_ubatch: int, on_device: bool) -> dict[str, Any]:
    """Last logits of a prompt that the host cuts into batches of n_ubatch; graphs of which nobody reads results."""
    host = _with_plugin() if on_device else Host()
    loaded = host.model(model, "TP0" if on_device else None)
    context = loaded.context(n_ctx=512, n_ubatch=n_ubatch)
    logits = context.decode([3 + i % 50 for i in range(n_tokens)], 0)
    context.close()
    loaded.close()
    return {"unread": Inspection(LIBRARY).counters().graphs_unread if on_device else 0, "logits": logits}


def many_contexts(model: str, n: int) -> dict[str, Any]:
    """Of n contexts one after the other: captured programs with each open and after it is closed, free memory then."""
    host = _with_plugin()
    loaded = host.model(model, "TP0")
    inspection = Inspection(LIBRARY)
    out: dict[str, Any] = {"before": inspection.counters().programs_cached, "open": [], "closed": [], "free": [], "tokens": []}
    for _ in range(n):
        context = loaded.context(n_ctx=512)
        out["tokens"].append(context.generate([1, 2, 3], 3)[0])
        out["open"].append(inspection.counters().programs_cached)
        context.close()
        out["closed"].append(inspection.counters().programs_cached)
        out["free"].append(host.memory("TP0")[0])
    loaded.close()
    return out


def two_contexts(model: str) -> dict[str, Any]:
    """Two contexts in turns; one is closed, the other goes on."""
    loaded = _with_plugin().model(model, "TP0")
    inspection = Inspection(LIBRARY)
    first, second = loaded.context(n_ctx=512), loaded.context(n_ctx=512)
    tokens = [first.generate([1, 2, 3], 3)[0], second.generate([1, 2, 3], 3)[0]]
    both = inspection.counters()
    first.close()
    one = inspection.counters()
    second.clear()
    tokens.append(second.generate([1, 2, 3], 3)[0])
    after = inspection.counters()
    second.close()
    loaded.close()
    return {"tokens": tokens, "both": both, "one": one, "after": after}


def try_contexts(model: str, contexts: list[int]) -> list[dict[str, Any]]:
    """Of each size: whether such a context can be made and a token decoded in it, and the activations of a rank."""
    loaded = _with_plugin().model(model, "TP0")
    out = []
    for n_ctx in contexts:
        context = None
        try:
            context = loaded.context(n_ctx=n_ctx)
            context.decode([1], 0)
            out.append({"made": True, "compute": [rank["compute"] for rank in Inspection(LIBRARY).rank_bytes()]})
        except HostError:
            out.append({"made": False})
        if context is not None:
            context.close()
    loaded.close()
    return out


_FIT = "_Z17common_fit_paramsPKcP18llama_model_paramsP20llama_context_paramsPfP32llama_model_tensor_buft_overridePmjPK22common_fit_extra_model14ggml_log_level"


def fit(model: str, margin_mib: int, n_ctx_min: int) -> dict[str, Any]:
    """The host's own --fit chooses context and layers for TP0; then both are really made, and a token more than the last cell is decoded."""
    host = _with_plugin()
    ffi = host.ffi
    if not _cache.get("fit"):
        ffi.cdef(f"""
            int {_FIT}(const char *path, params_t *model, params_t *context, float *split, void *overrides, size_t *margins, uint32_t n_ctx_min,
                       const void *extra, int log_level);
            uint32_t llama_n_ctx(const void *context);
        """)
        _cache["fit"] = ffi.dlopen(str(host.path))
    lib = _cache["fit"]
    mparams, cparams = ffi.new("params_t *", lib.llama_model_default_params()), ffi.new("params_t *", lib.llama_context_default_params())
    devices, split, overrides = ffi.new("void *[2]"), ffi.new("float[64]"), ffi.new("void *[16384]")
    devices[0] = lib.ggml_backend_dev_by_name(b"TP0")
    ffi.cast("void **", mparams)[0] = devices
    ffi.cast("uint32_t *", cparams)[0] = 0  # n_ctx: to be chosen
    before = host.memory("TP0")
    margins = ffi.new("size_t[64]", [margin_mib << 20] * 64)
    status = getattr(lib, _FIT)(os.fsencode(model), mparams, cparams, split, overrides, margins, n_ctx_min, ffi.NULL, 4)
    out: dict[str, Any] = {"status": status, "before": before, "n_gpu_layers": ffi.cast("int32_t *", mparams)[4]}
    loaded = host.model(model, "TP0", mparams)
    context = loaded.context(params=cparams)
    out["n_ctx"] = lib.llama_n_ctx(context.handle)
    out["tokens"] = context.generate([1, 2, 3], 3)[0]
    out["bytes"] = Inspection(LIBRARY).rank_bytes()
    out["left"] = host.memory("TP0")
    context.close()
    loaded.close()
    return out


def devices_text() -> str:
    _with_plugin()
    return Inspection(LIBRARY).text("devices")
