"""Workers: a process per environment, some of them kept while their module runs, each job and each end with a deadline."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jobs
import pytest

DEADLINE_S = 240
CLOSE_S = 60  # sanitized processes end slowly
MOST_WORKERS = 6  # at once: under TSan one takes up to 3.5 GB; all of test_ops.py's took 22 GB of 24, or were killed, where six take 11


def _serve(connection: Connection, environment: dict[str, str]) -> None:
    """In the worker: jobs one after the other, until pytest closes the pipe or is gone."""
    for name in [name for name in os.environ if name.startswith("GGML_TP_")]:
        del os.environ[name]
    os.environ.update(environment)
    while True:
        try:
            job, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = (True, job(**arguments))
        except BaseException as error:
            answer = (False, (error, traceback.format_exc()))
        connection.send(answer)


class WorkerError(Exception):
    """A worker that died, or was too late and was killed."""


class Worker:
    """A process and a pipe. No executor: it joins its process without a deadline, and one that died in a host's assertion left pytest hanging there."""

    def __init__(self, environment: dict[str, str]) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._name = f"worker {environment}"
        self._process = context.Process(target=_serve, args=(theirs, environment), daemon=True)
        self._process.start()
        theirs.close()  # so that the pipe ends when the process does

    def run(self, job: Callable[..., Any], arguments: dict[str, Any], deadline: float) -> Any:
        end = time.monotonic() + deadline
        try:
            self._connection.send((job, arguments))
            # A debugger that a host's assertion starts has both ends that say that a process is gone: it is asked for.
            while not self._connection.poll(0.5):
                if time.monotonic() > end:
                    self._process.kill()
                    raise WorkerError(f"{self._name}: no end of {job.__name__} within {deadline:.0f} s, killed")
                if not self._process.is_alive() and not self._connection.poll():
                    raise EOFError
            done, result = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(CLOSE_S)
            raise WorkerError(f"{self._name}: died in {job.__name__}, exit code {self._process.exitcode} (-6: an assertion; -9: killed, for memory?)") from None
        if not done:
            error, text = result
            raise error from WorkerError(f"{self._name}:\n{text}")
        return result

    def alive(self) -> bool:
        return self._process.is_alive()

    def close(self, deadline: float) -> str:
        """What went wrong, or nothing."""
        self._connection.close()
        self._process.join(deadline)
        if not self._process.is_alive():
            return ""
        self._process.kill()
        self._process.join()
        return f"{self._name}: did not end within {deadline:.0f} s, killed"


class Workers:
    """By environment; the least recently used goes when there are too many."""

    def __init__(self) -> None:
        self._workers: dict[tuple[tuple[str, str], ...], Worker] = {}  # the most recently used is the last

    def run(self, job: Callable[..., Any], environment: dict[str, str], deadline: float = DEADLINE_S, **arguments: Any) -> Any:
        key = tuple(sorted(environment.items()))
        worker = self._workers.pop(key, None)
        if worker is None or not worker.alive():
            if len(self._workers) == MOST_WORKERS and (failure := self._workers.pop(next(iter(self._workers))).close(CLOSE_S)):
                raise WorkerError(failure)
            worker = Worker(environment)
        self._workers[key] = worker
        return worker.run(job, arguments, deadline)

    def close(self, deadline: float = CLOSE_S) -> None:
        failures = [failure for worker in self._workers.values() if (failure := worker.close(deadline))]
        if failures:
            raise WorkerError("; ".join(failures))


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


def share_a_gpu(ranks: int) -> bool:
    """Whether TEST_GPUS names fewer than that many."""
    return ranks > len(os.environ.get("TEST_GPUS", "0" + ",0" * 15).split(","))


def emulated(ranks: int, arch: str = "sm_60", **more: str) -> dict[str, str]:
    """The settings for that many ranks: emulated, or with TEST_GPUS="0,1,..." on those GPUs, several to one where they are fewer.

    An odd number of ranks lets norms pull all_reduces of any size, as they do large ones; 2 and 6 push these small ones; 4 and 8 have NCCL for them.
    """
    more = ({} if ranks % 4 == 2 else {"GGML_TP_PUSH_BYTES": "0"}) | ({"GGML_TP_NORM_BYTES": "0"} if ranks % 2 else {}) | more
    if "TEST_DEADLINE" in os.environ:
        more = {"GGML_TP_DEADLINE": os.environ["TEST_DEADLINE"]} | more
    gpus = os.environ.get("TEST_GPUS")
    if not gpus:
        return {"GGML_TP_EMULATE": f"{arch}*{ranks}", **more}
    ordinals = gpus.split(",")
    devices = more.pop("GGML_TP_DEVICES", ",".join(map(str, range(ranks)))).split(",")
    return {
        "GGML_TP_DEVICES": ",".join(ordinals[int(device) % len(ordinals)] for device in devices),
        "GGML_TP_NCCL": os.environ.get("TEST_NCCL", ""),
        **more,
    }
