"""Workers: a process per environment, kept for the session, each job with a deadline."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jobs
import pytest

DEADLINE_S = 240


def _start(environment: dict[str, str]) -> None:
    for name in [name for name in os.environ if name.startswith("GGML_TP_")]:
        del os.environ[name]
    os.environ.update(environment)


class Workers:
    def __init__(self) -> None:
        self._pools: dict[tuple[tuple[str, str], ...], concurrent.futures.ProcessPoolExecutor] = {}

    def run(self, job: Callable[..., Any], environment: dict[str, str], **arguments: Any) -> Any:
        key = tuple(sorted(environment.items()))
        if key not in self._pools:
            context = multiprocessing.get_context("spawn")
            self._pools[key] = concurrent.futures.ProcessPoolExecutor(1, context, _start, (environment,))
        return self._pools[key].submit(job, **arguments).result(DEADLINE_S)

    def close(self) -> None:
        for pool in self._pools.values():
            pool.shutdown(wait=True, cancel_futures=True)


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    instance = Workers()
    yield instance
    instance.close()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
    folder = tmp_path_factory.mktemp("models")
    writers = Workers()

    def get(family: str, quant: str, **options: Any) -> str:
        path: Path = folder / f"{family}-{quant}-{zlib.crc32(repr(sorted(options.items())).encode()):x}.gguf"
        if not path.exists():
            writers.run(jobs.write_model, {}, path=str(path), family=family, quant=quant, options=options)
        return str(path)

    yield get
    writers.close()


def emulated(ranks: int, arch: str = "sm_60", **more: str) -> dict[str, str]:
    """The settings for that many ranks: emulated, or with TEST_GPUS="0,1,..." on those GPUs, several to one where they are fewer."""
    if gpus := os.environ.get("TEST_GPUS"):
        ordinals = gpus.split(",")
        return {
            "GGML_TP_DEVICES": ",".join(ordinals[rank % len(ordinals)] for rank in range(ranks)),
            "GGML_TP_NCCL": os.environ.get("TEST_NCCL", ""),
            **more,
        }
    return {"GGML_TP_EMULATE": f"{arch}*{ranks}", **more}
