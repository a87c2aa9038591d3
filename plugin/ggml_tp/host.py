"""The llama.cpp C API of a host library (xllamacpp, llama-cpp-python, ...), the same for every version since mid-2025.

The host's parameter structs differ by version; they are treated as opaque bytes and the few fields that are set are found from
the host's own default values. Used by the demo and by the tests; a real host uses its own bindings.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import struct
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cffi
import numpy as np

_CDEF = """
typedef struct { unsigned char bytes[512]; } params_t;  /* larger than any version's: passed in memory, the host reads its part */
typedef struct {
    int32_t n_tokens; int32_t *token; float *embd; int32_t *pos; int32_t *n_seq_id; int32_t **seq_id; int8_t *logits;
} llama_batch;
void llama_backend_init(void);
params_t llama_model_default_params(void);
params_t llama_context_default_params(void);
void *llama_model_load_from_file(const char *path, params_t params);
void *llama_init_from_model(void *model, params_t params);
void llama_model_free(void *model);
void llama_free(void *context);
const void *llama_model_get_vocab(const void *model);
int32_t llama_vocab_n_tokens(const void *vocab);
int32_t llama_tokenize(const void *vocab, const char *text, int32_t n, int32_t *tokens, int32_t n_max, bool special, bool parse);
int32_t llama_token_to_piece(const void *vocab, int32_t token, char *buffer, int32_t n, int32_t lstrip, bool special);
llama_batch llama_batch_init(int32_t n_tokens, int32_t embd, int32_t n_seq_max);
void llama_batch_free(llama_batch batch);
int32_t llama_decode(void *context, llama_batch batch);
float *llama_get_logits_ith(void *context, int32_t i);
size_t llama_state_get_size(void *context);
size_t llama_state_get_data(void *context, uint8_t *data, size_t n);
size_t llama_state_set_data(void *context, const uint8_t *data, size_t n);
void llama_synchronize(void *context);
void *llama_get_memory(const void *context);
void llama_memory_clear(void *memory, bool data);
bool llama_memory_seq_rm(void *memory, int32_t seq, int32_t from, int32_t to);
void llama_log_set(void *callback, void *user);
void *ggml_backend_load(const char *path);
void *ggml_backend_dev_by_name(const char *name);
size_t ggml_backend_dev_count(void);
void *ggml_backend_dev_get(size_t index);
const char *ggml_backend_dev_name(void *device);
const char *ggml_backend_dev_description(void *device);
void ggml_backend_dev_memory(void *device, size_t *free_bytes, size_t *total_bytes);
"""

N_GPU_LAYERS_OFFSET = 16  # after devices and tensor_buft_overrides
_SPLIT_MODE_OFFSET = 20
SPLIT_LAYERS, SPLIT_TENSORS = 1, 3  # LLAMA_SPLIT_MODE_LAYER, LLAMA_SPLIT_MODE_TENSOR
_LOG_ERROR = 4  # GGML_LOG_LEVEL_ERROR
_DEFAULT_THREADS = 4  # GGML_DEFAULT_N_THREADS
_F16 = 1  # GGML_TYPE_F16, the default of caches


class HostError(RuntimeError):
    """The host library cannot be used; the message says what and what to do."""


def find_library(host: str | os.PathLike[str] | None = None) -> Path:
    """The shared object that exports ggml: `host` names a module (xllamacpp, llama_cpp) or is a path; None: the first one found."""
    if host is not None and os.sep in os.fspath(host):
        path = Path(host)
        if not path.is_file():
            raise HostError(f"no host library at {path}")
        return path
    names = [os.fspath(host)] if host is not None else ["xllamacpp", "llama_cpp"]
    names.sort(key=lambda name: name not in sys.modules)
    for name in names:
        with contextlib.suppress(ImportError, ValueError):
            spec = importlib.util.find_spec(name)
            if spec is None or not spec.submodule_search_locations:
                continue
            folder = Path(next(iter(spec.submodule_search_locations)))
            for pattern in ("xllamacpp*.so", "lib/libllama.so"):
                for path in sorted(folder.glob(pattern)):
                    return path
    raise HostError(f"no host library found ({', '.join(names)}): pip install 'ggml-tp[demo]', or give a path")


@dataclass(frozen=True)
class _ContextFields:
    threads: int
    flash_attn: int
    flash_attn_is_enum: bool
    kv_types: int


def _context_fields(defaults: bytes) -> _ContextFields:
    """Byte offsets, from the host's defaults: three or four enums of -1 follow the thread counts."""
    words = struct.unpack_from("40i", defaults)
    first = words.index(-1, 4)
    threads = next(i for i in range(4, first) if words[i] == words[i + 1] == _DEFAULT_THREADS)
    types = next(i for i in range(first, 39) if words[i] == words[i + 1] == _F16)  # type_k, type_v
    if words[first + 3] == -1:  # llama_flash_attn_type, since 2025-08
        return _ContextFields(threads * 4, (first + 3) * 4, True, types * 4)
    return _ContextFields(threads * 4, (types + 6) * 4 + 2, False, types * 4)  # after the abort callback: embeddings, offload_kqv, flash_attn


class Host:
    """A loaded host library."""

    def __init__(self, library: str | os.PathLike[str] | None = None) -> None:
        self.path = find_library(library)
        self.ffi = cffi.FFI()
        self.ffi.cdef(_CDEF)
        self.lib: Any = self.ffi.dlopen(os.fspath(self.path))
        self.lib.llama_backend_init()

    def quiet(self) -> None:
        """Lets only the host's errors through to stderr."""
        def log(level: int, text: Any, _user: Any) -> None:
            if level == _LOG_ERROR:
                sys.stderr.write(self.ffi.string(text).decode(errors="replace"))

        self._log = self.ffi.callback("void(int, const char *, void *)", log)
        self.lib.llama_log_set(self._log, self.ffi.NULL)

    def load_backend(self, plugin: str | os.PathLike[str]) -> None:
        """Registers a backend plugin with the host; its own message on stderr says why when it refuses."""
        if not self.lib.ggml_backend_load(os.fsencode(plugin)):
            raise HostError(f"the host {self.path} refused {plugin}; see the line above")

    def devices(self) -> list[tuple[str, str]]:
        """Name and description of every device that the host knows."""
        out = []
        for i in range(self.lib.ggml_backend_dev_count()):
            device = self.lib.ggml_backend_dev_get(i)
            name, text = (self.ffi.string(f(device)).decode() for f in (self.lib.ggml_backend_dev_name, self.lib.ggml_backend_dev_description))
            out.append((name, text))
        return out

    def memory(self, device: str) -> tuple[int, int]:
        """Free and total bytes that a device reports to the host."""
        values = self.ffi.new("size_t[2]")
        self.lib.ggml_backend_dev_memory(self.lib.ggml_backend_dev_by_name(device.encode()), values, values + 1)
        return int(values[0]), int(values[1])

    def model(self, path: str | os.PathLike[str], device: str | None, params: Any = None, split_mode: int | None = None) -> Model:
        """Loads a GGUF onto a device by name, several ("TP0,TP1"), or the CPU; `params` (params_t *) overrides the host's defaults.

        `split_mode`: how the host divides it over several; SPLIT_LAYERS is the default.
        """
        return Model(self, path, device, params, split_mode)


class Model:
    """A model in a host, on the CPU or on devices."""

    def __init__(self, host: Host, path: str | os.PathLike[str], device: str | None, params: Any = None, split_mode: int | None = None) -> None:
        self.host = host
        ffi, lib = host.ffi, host.lib
        given, params = params is not None, ffi.new("params_t *", lib.llama_model_default_params() if params is None else params[0])
        names = device.split(",") if device is not None else []
        self._devices = ffi.new("void *[]", len(names) + 1)
        for i, name in enumerate(names):
            self._devices[i] = lib.ggml_backend_dev_by_name(name.encode())
            if self._devices[i] == ffi.NULL:
                raise HostError(f"the host has no device {name}")
        ffi.cast("void **", params)[0] = self._devices
        if not given:
            ffi.cast("int32_t *", params)[N_GPU_LAYERS_OFFSET // 4] = 999 if device is not None else 0
        if split_mode is not None:
            ffi.cast("int32_t *", params)[_SPLIT_MODE_OFFSET // 4] = split_mode
        self.handle = lib.llama_model_load_from_file(os.fsencode(path), params[0])
        if self.handle == ffi.NULL:
            raise HostError(f"the host could not load {os.fspath(path)}; see the lines above")
        self.vocab = lib.llama_model_get_vocab(self.handle)
        self.n_vocab: int = lib.llama_vocab_n_tokens(self.vocab)

    def tokenize(self, text: str) -> list[int]:
        data = text.encode()
        tokens = self.host.ffi.new("int32_t[]", len(data) + 8)
        n = self.host.lib.llama_tokenize(self.vocab, data, len(data), tokens, len(data) + 8, True, False)
        return list(tokens[0:n])

    def text(self, tokens: list[int]) -> str:
        buffer = self.host.ffi.new("char[64]")
        out = b""
        for token in tokens:
            n = self.host.lib.llama_token_to_piece(self.vocab, token, buffer, 64, 0, False)
            out += self.host.ffi.buffer(buffer, max(n, 0))[:]
        return out.decode(errors="replace")

    def context(
        self, n_ctx: int = 512, flash_attn: bool = True, n_seq_max: int = 1, n_ubatch: int = 512, kv_type: int = _F16, params: Any = None
    ) -> Context:
        """`kv_type`: a ggml_type, of both caches. `params` (params_t *): used as they are, without the others."""
        return Context(self, n_ctx, flash_attn, n_seq_max, n_ubatch, kv_type, params)

    def close(self) -> None:
        if self.handle is not None:
            self.host.lib.llama_model_free(self.handle)
            self.handle = None


class Context:
    """A context: its KV cache and the last logits."""

    def __init__(self, model: Model, n_ctx: int, flash_attn: bool, n_seq_max: int, n_ubatch: int, kv_type: int, params: Any) -> None:
        self.model = model
        ffi, lib = model.host.ffi, model.host.lib
        if params is None:
            params = ffi.new("params_t *", lib.llama_context_default_params())
            fields = _context_fields(bytes(ffi.buffer(params)))
            words = ffi.cast("int32_t *", params)
            words[0], words[1], words[2], words[3] = n_ctx, max(n_ubatch, 2048), n_ubatch, n_seq_max
            words[fields.threads // 4] = words[fields.threads // 4 + 1] = 2
            words[fields.kv_types // 4] = words[fields.kv_types // 4 + 1] = kv_type
            if fields.flash_attn_is_enum:
                words[fields.flash_attn // 4] = int(flash_attn)
            else:
                params.bytes[fields.flash_attn] = int(flash_attn)
        self.handle = lib.llama_init_from_model(model.handle, params[0])
        if self.handle == ffi.NULL:
            raise HostError("the host could not make a context; see the lines above")

    def decode(self, tokens: list[int], start: int, seq: int = 0, all_logits: bool = False) -> np.ndarray:
        """Logits [n_tokens or 1, n_vocab], f32, after `tokens` at positions start, start + 1, ..."""
        return self.decode_batch([(token, start + i, seq) for i, token in enumerate(tokens)], all_logits)

    def decode_batch(self, items: list[tuple[int, int, int]], all_logits: bool = False) -> np.ndarray:
        """Logits of one batch of (token, position, sequence); of its last item unless all_logits (each sequence's last is computed)."""
        ffi, lib = self.model.host.ffi, self.model.host.lib
        batch = self._fill(items, all_logits)
        try:
            status = lib.llama_decode(self.handle, batch)
        finally:
            lib.llama_batch_free(batch)
        if status != 0:
            raise HostError(f"llama_decode returned {status}")
        rows = range(len(items)) if all_logits else [len(items) - 1]
        return np.stack([self._logits(ffi, lib, i) for i in rows])

    def _fill(self, items: list[tuple[int, int, int]], all_logits: bool) -> Any:
        batch = self.model.host.lib.llama_batch_init(len(items), 0, 1)
        batch.n_tokens = len(items)
        last = {seq: i for i, (_, _, seq) in enumerate(items)}
        for i, (token, position, seq) in enumerate(items):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0] = seq
            batch.logits[i] = int(all_logits or last[seq] == i)
        return batch

    def _logits(self, ffi: Any, lib: Any, i: int) -> np.ndarray:
        pointer = lib.llama_get_logits_ith(self.handle, i)
        if pointer == ffi.NULL:
            raise HostError(f"no logits for item {i}")
        return np.frombuffer(ffi.buffer(pointer, self.model.n_vocab * 4), np.float32).copy()

    def generate(self, prompt: list[int], n: int) -> tuple[list[int], np.ndarray, float]:
        """Greedy: (n tokens, logits [n, n_vocab] that chose them, decoded tokens per second)."""
        logits = self.decode(prompt, 0)[-1]
        tokens: list[int] = []
        rows = []
        begin = time.perf_counter()
        for i in range(n):
            rows.append(logits)
            tokens.append(int(np.argmax(logits)))
            if i + 1 < n:
                logits = self.decode([tokens[-1]], len(prompt) + i)[-1]
        seconds = time.perf_counter() - begin
        return tokens, np.stack(rows), (n - 1) / seconds if seconds > 0 else 0.0

    def run(self, items: list[tuple[int, int, int]]) -> float:
        """Seconds for one batch of (token, position, sequence), logits of its last item; nothing is read back."""
        lib = self.model.host.lib
        batch = self._fill(items, False)
        try:
            begin = time.perf_counter()
            status = lib.llama_decode(self.handle, batch)
            lib.llama_synchronize(self.handle)
            seconds = time.perf_counter() - begin
        finally:
            lib.llama_batch_free(batch)
        if status != 0:
            raise HostError(f"llama_decode returned {status}")
        return seconds

    def clear(self) -> None:
        """Forgets all positions."""
        lib = self.model.host.lib
        lib.llama_memory_clear(lib.llama_get_memory(self.handle), False)

    def forget(self, start: int, seq: int = 0) -> None:
        """Forgets a sequence's positions from `start` on."""
        lib = self.model.host.lib
        if not lib.llama_memory_seq_rm(lib.llama_get_memory(self.handle), seq, start, -1):
            raise HostError(f"the host cannot forget the positions from {start} on")

    def state(self) -> bytes:
        ffi, lib = self.model.host.ffi, self.model.host.lib
        n = lib.llama_state_get_size(self.handle)
        data = ffi.new("uint8_t[]", n)
        return bytes(ffi.buffer(data, lib.llama_state_get_data(self.handle, data, n)))

    def restore(self, state: bytes) -> None:
        ffi, lib = self.model.host.ffi, self.model.host.lib
        if lib.llama_state_set_data(self.handle, ffi.from_buffer("uint8_t[]", state), len(state)) == 0:
            raise HostError("the host could not restore the state")

    def close(self) -> None:
        if self.handle is not None:
            self.model.host.lib.llama_free(self.handle)
            self.handle = None


def nmse(value: np.ndarray, reference: np.ndarray) -> float:
    """Mean squared error over the reference's mean square; NaN counts as infinite."""
    error = float(np.sum((value.astype(np.float64) - reference) ** 2) / np.sum(reference.astype(np.float64) ** 2))
    return error if np.isfinite(error) else float("inf")
