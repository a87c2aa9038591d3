"""ggml-tp: tensor parallelism for llama.cpp-style runtimes as one drop-in backend plugin."""

from __future__ import annotations

from pathlib import Path

LIBRARY = Path(__file__).resolve().parent / "libggml-tp.so"


def load(host: str | None = None) -> list[tuple[str, str]]:
    """Registers the backend with a host library and returns the host's devices as (name, description).

    `host`: "xllamacpp", "llama_cpp" or the path of a shared object; None: the one that is imported, else one that is installed.
    Call it before the host loads its first model. Raises HostError with one line when there is no host or it refuses.
    """
    from .host import Host

    instance = Host(host)
    instance.load_backend(LIBRARY)
    return instance.devices()


__all__ = ["LIBRARY", "load"]
