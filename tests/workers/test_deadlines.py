"""No worker keeps a search waiting for ever: deadlines of candidates and of the pool."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny
from test_pool import REFS, expected, spec
from tiny import recipe

from agentmerge.errors import NotBegun, NoWorker, WorkerLost
from agentmerge.workers import places, pool
from agentmerge.workers.hosts import process
from agentmerge.workers.kinds import worker_class
from agentmerge.workers.places import Deadlines
from agentmerge.workers.pool import Pool

HANGS = {"hang_when": "max_weight>0.9"}


def children() -> list[psutil.Process]:
    return running("spawn_main")


def running(words: str) -> list[psutil.Process]:
    """Processes that were started from here with these words in their command line."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it ends while it is looked at
            found += [child] if words in str(child.cmdline()) else []
    return found


def within(seconds: float, condition: Any) -> bool:
    patience = time.monotonic() + seconds
    while not condition() and time.monotonic() < patience:
        time.sleep(0.02)
    return bool(condition())


def test_a_late_candidate_is_lost_and_its_workers_are_gone() -> None:
    with Pool(spec(**HANGS), deadlines=Deadlines(asked_s=0.5)) as tried:
        assert tried.evaluate(recipe(0.5, 0.1), REFS)[:2] == expected(0.5, 0.1)
        before = children()
        with pytest.raises(WorkerLost, match=r"not scored within 0.5 s \(worker.timeout_s\)"):
            tried.evaluate(recipe(0.95, 0.1), REFS)
        assert within(5, lambda: not any(map(psutil.pid_exists, [p.pid for p in before])))
        assert tried.evaluate(recipe(0.4, 0.1), REFS)[:2] == expected(0.4, 0.1)
    assert within(5, lambda: not children())


def test_a_stopped_process_is_replaced_and_the_candidate_scored(monkeypatch) -> None:
    monkeypatch.setattr(process, "CLOSING_S", 0.2)
    with Pool(spec(), count=1, deadlines=Deadlines(asked_s=2.0)) as tried:
        tried.evaluate(recipe(0.5, 0.1), REFS)
        (worker,) = children()
        os.kill(worker.pid, signal.SIGSTOP)
        many = REFS * 300  # more than a pipe takes before somebody reads
        assert tried.evaluate(recipe(0.5, 0.1), many)[0] == expected(0.5, 0.1)[0]
        (worker,) = children()
        os.kill(worker.pid, signal.SIGSTOP)
    assert within(5, lambda: not children())


def test_the_default_follows_what_candidates_took(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Deadlines()
    assert limits.of(1000) == float("inf")
    limits.took(50.0, 100)
    limits.took(1.0, 100)
    assert (limits.of(100), limits.of(2000)) == (1000.0, 20_000.0)
    assert limits.of(1) == places.FLOOR_S
    monkeypatch.setattr(places, "FLOOR_S", 0.5)
    with Pool(spec(**HANGS), count=2) as tried:
        tried.evaluate(recipe(0.5, 0.1), REFS)
        with pytest.raises(WorkerLost, match=r"20 times what the slowest took; worker\.timeout_s"):
            tried.evaluate(recipe(0.95, 0.1), REFS)


def test_in_this_process_it_is_said_that_nothing_can_be_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(places, "FLOOR_S", 0.3)
    tried = Pool(spec(**HANGS))
    tried.evaluate(recipe(0.5, 0.1), REFS)
    with pytest.raises(NoWorker, match=r"in this process cannot be ended: set worker\.timeout_s"):
        tried.evaluate(recipe(0.95, 0.1), REFS)
    with pytest.raises(NoWorker, match="given up"):
        tried.evaluate(recipe(0.5, 0.1), REFS)
    tried.close()


@pytest.mark.parametrize("count", [1, 2])
def test_the_pools_time_ends_what_runs(count: int) -> None:
    deadlines = Deadlines()
    with Pool(spec(**HANGS), count=count, deadlines=deadlines) as tried:
        tried.evaluate(recipe(0.5, 0.1), REFS)
        began = time.monotonic()
        deadlines.ends = began + 0.4
        with pytest.raises(NotBegun, match="time was up"):
            tried.evaluate(recipe(0.95, 0.1), REFS)
        with pytest.raises(NotBegun):
            tried.evaluate(recipe(0.5, 0.1), REFS)
        assert time.monotonic() - began < 2
    assert within(5, lambda: not children())


def never(*_: Any) -> Any:
    time.sleep(3600)


def test_a_worker_that_never_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_STARTING_S", 0.3)
    with Pool(spec(), count=2, make=never) as tried, pytest.raises(NoWorker, match="not ready"):
        tried.evaluate(recipe(0.5, 0.1), REFS)
    assert within(5, lambda: not children())
    ends = Deadlines(ends=time.monotonic() + 0.3)
    with Pool(spec(), make=never, deadlines=ends) as tried, pytest.raises(NotBegun):
        tried.evaluate(recipe(0.5, 0.1), REFS)


def test_whoever_is_interrupted_while_waiting_leaves_no_worker() -> None:
    with Pool(spec(**HANGS), count=2) as tried:
        tried.evaluate(recipe(0.5, 0.1), REFS)
        threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGINT]).start()
        with pytest.raises(KeyboardInterrupt):
            tried.evaluate(recipe(0.95, 0.1), REFS)
        assert tried.evaluate(recipe(0.4, 0.1), REFS)[:2] == expected(0.4, 0.1)
    assert within(5, lambda: not children())


@pytest.mark.parametrize(
    ("kind", "limit_s"), [("hf", 3.0), pytest.param("disk", 15.0, marks=pytest.mark.slow)]
)
def test_a_stopped_worker_with_a_real_model_is_replaced(
    kind: str, limit_s: float, parents: dict[str, Path], tasks_dir: Path
) -> None:
    """With every process that it had started, and the answers are those of one in this process."""
    config = tiny.tasks_config(tasks_dir, "tiny_choice", "tiny_text", limit=30)
    given = tiny.spec(parents, config, kind=kind, options={"base": "base"})
    refs = worker_class(given).tasks(given).refs()
    with Pool(given) as here:
        alone = here.evaluate(recipe(0.9, 0.2), refs)[:2]
    deadlines = Deadlines(asked_s=600.0)
    with Pool(given, deadlines=deadlines) as tried:
        assert tried.evaluate(recipe(0.9, 0.2), refs)[:2] == alone
        (worker,) = children()
        hold(kind, worker, tried)
        deadlines.asked_s = limit_s
        threading.Timer(limit_s - 1, setattr, [deadlines, "asked_s", 600.0]).start()
        assert tried.evaluate(recipe(0.9, 0.2), refs)[:2] == alone
        assert not worker.is_running()
    assert within(5, lambda: not evaluations())


def hold(kind: str, worker: psutil.Process, tried: Pool) -> None:
    """Stop the worker, or what scores for it, once that is there."""
    if kind == "hf":
        worker.suspend()
        return

    def stop() -> None:
        if within(60, evaluations):
            evaluations()[0].suspend()

    threading.Thread(target=stop).start()


def evaluations() -> list[psutil.Process]:
    return running("disk_eval")
