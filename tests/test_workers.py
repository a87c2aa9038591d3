"""The workers themselves: one that dies or hangs is said in a line, and pytest goes on."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
from conftest import MOST_WORKERS, WorkerError, Workers


def _pid() -> int:
    return os.getpid()


def _abort_under_a_debugger() -> None:
    """As ggml does: the child inherits the pipe and outlives the worker."""
    if os.fork() == 0:
        time.sleep(20)
        os._exit(0)
    os.abort()


def _fail() -> None:
    raise ValueError("said by the job")


def _hang() -> None:
    time.sleep(600)


def _hang_at_the_end() -> None:
    threading.Thread(target=time.sleep, args=(600,)).start()  # not a daemon: the process waits for it


@pytest.fixture
def some() -> Workers:
    return Workers()


@pytest.mark.parametrize("job", [os.abort, _abort_under_a_debugger])
def test_a_job_that_aborts_is_said_and_the_next_one_runs(some, job):
    first = some.run(_pid, {})
    since = time.monotonic()
    with pytest.raises(WorkerError, match=f"died in {job.__name__}, exit code -6"):
        some.run(job, {})
    assert time.monotonic() - since < 15
    assert some.run(_pid, {}) not in (first, os.getpid())
    some.close()


def test_a_job_that_hangs_is_killed(some):
    with pytest.raises(WorkerError, match="no end of _hang within 1 s, killed"):
        some.run(_hang, {}, deadline=1)
    some.close()


def test_an_error_keeps_its_type_and_says_where(some):
    with pytest.raises(ValueError, match="said by the job") as caught:
        some.run(_fail, {})
    assert "in _fail" in str(caught.value.__cause__)
    some.close()


def test_too_many_end_the_least_recently_used(some):
    pids = [some.run(_pid, {"NUMBER": str(i)}) for i in range(MOST_WORKERS)]
    assert some.run(_pid, {"NUMBER": "0"}) == pids[0]
    some.run(_pid, {"NUMBER": str(MOST_WORKERS)})
    assert some.run(_pid, {"NUMBER": "0"}) == pids[0]
    with pytest.raises(ProcessLookupError):
        os.kill(pids[1], 0)
    some.close()


def test_a_worker_that_died_between_jobs_is_replaced_and_one_that_does_not_end_is_killed(some):
    dead = some.run(_pid, {})
    os.kill(dead, signal.SIGSEGV)
    os.waitid(os.P_PID, dead, os.WEXITED | os.WNOWAIT)  # until it only waits to be joined: its main thread alone is a zombie before that
    late = some.run(_pid, {})
    some.run(_hang_at_the_end, {})
    with pytest.raises(WorkerError, match="did not end within 1 s, killed"):
        some.close(deadline=1)
    with pytest.raises(ProcessLookupError):
        os.kill(late, 0)
