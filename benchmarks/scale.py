"""What many workers bring: their share of time at work, and what the search itself costs.

    python -m benchmarks.scale utilisation [--workers 1 4 8 32] [--cv 0.3 0.6] [--evaluations 400]
    python -m benchmarks.scale driver [--evaluations 10000] [--workers 64]
    python -m benchmarks.scale proposal [--evaluations 1000] [--items 1000] [--workers 1 8]
    python -m benchmarks.scale quality [--evaluations 100] [--workers 1 4 8 16] [--seeds 5]
    python -m benchmarks.scale real [--evaluations 60] [--seeds 3]

Candidates are scored by the fake worker; how long each takes is drawn (lognormal) and
passes on a virtual clock, so that 64 workers need no machine. All else is the search as it runs.
``real`` is of two workers that merge and answer (``real_workers.py``).
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import random
import tempfile
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from agentmerge.config import SearchConfig
from agentmerge.session import opening
from agentmerge.workers.fake import FakeWorker
from benchmarks import lagging, real_workers
from benchmarks.proposing import proposal

CONFIG = """\
genome:
  models: [north, south, east]
  base_model: base
  merge_method: task_arithmetic
  layer_granularity: 2
tasks: [{name: one}, {name: two}]
limit: 20
worker: {kind: fake}
"""


class VirtualPool:
    """A worker pool on a virtual clock: candidates end in the order of their drawn durations.

    workers: how many. cv: of the durations, whose mean is 1. busy, now: seconds on that clock.
    """

    differentiates = False

    def __init__(self, spec: Any, taskset: Any, workers: int, cv: float, seed: int = 0) -> None:
        self._worker = FakeWorker(spec, taskset)
        self.info = self._worker.info
        self._workers, self._seed = workers, seed
        self._sigma = math.sqrt(math.log(1 + cv * cv))
        self._waiting: deque[tuple[Future[Any], Callable[[], Any], float]] = deque()
        self._running: list[tuple[float, int, Future[Any], Callable[[], Any]]] = []
        self._submitted = 0
        self.now = self.busy = 0.0
        self._begun = 0

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        turn: Future[Any] = Future()
        self._submitted += 1
        rng = random.Random(f"{self._seed} {self._submitted}")
        seconds = math.exp(rng.gauss(-(self._sigma**2) / 2, self._sigma))
        self._waiting.append((turn, lambda: work(*arguments), seconds))
        self._begin()
        return turn

    def _begin(self) -> None:
        while self._waiting and len(self._running) < self._workers:
            turn, work, seconds = self._waiting.popleft()
            self.busy += seconds
            self._begun += 1
            heapq.heappush(self._running, (self.now + seconds, self._begun, turn, work))

    def wait(self, turns: Collection[Future[Any]], beside: Collection[Future[Any]] = ()) -> None:
        while not all(turn.done() for turn in turns):
            self.now, _, turn, work = heapq.heappop(self._running)
            try:
                turn.set_result(work())
            except BaseException as error:
                turn.set_exception(error)
            self._begin()

    def evaluate(
        self, recipe: Any, refs: Sequence[Any], wanted: Callable[[], bool] = lambda: True
    ) -> Any:
        return self._worker.load(recipe), self._worker.score(refs), 0.001

    def stop(self) -> None:
        self._waiting.clear()

    def close(self) -> None:
        pass


@contextmanager
def virtual(workers: int, cv: float, seed: int = 0) -> Iterator[list[VirtualPool]]:
    """Searches that are begun inside have such a pool; the list holds theirs."""
    made: list[VirtualPool] = []

    def pool_of(prepared: Any, *_: Any, **__: Any) -> VirtualPool:
        made.append(VirtualPool(prepared.spec, prepared.taskset, workers, cv, seed))
        return made[-1]

    with mock.patch.object(opening, "pool_of", pool_of):
        yield made


def searched(workers: int, cv: float, lag: bool, evaluations: int, seed: int = 0) -> VirtualPool:
    """The pool of a random search that is done."""
    from agentmerge.session.driving import run

    search = {"algorithm": "random", "seed": seed, "sealed_share": 0}
    search |= {"lag": 2 * workers, "population": 1} if lag else {"population": workers}
    overrides = {f"search.{key}": value for key, value in search.items()}
    overrides |= {"budget.max_evaluations": evaluations, "search.max_generations": None}
    with tempfile.TemporaryDirectory() as folder, virtual(workers, cv, seed) as made:
        path = Path(folder) / "config.yml"
        path.write_text(CONFIG)
        run(SearchConfig.from_file(path, overrides), runs_dir=Path(folder) / "runs")
    [pool] = made
    return pool


def utilisation(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    for cv in arguments.cv:
        for workers in arguments.workers:
            row: dict[str, Any] = {"cv": cv, "workers": workers}
            for name, lag in (("barrier", False), ("window", True)):
                pool = searched(workers, cv, lag, arguments.evaluations, arguments.seed)
                row[name] = round(pool.busy / (pool.now * workers), 3)
            print(json.dumps(row), flush=True)
            found.append(row)
    return found


def driver(arguments: argparse.Namespace) -> None:
    """What a candidate takes in each tenth of a search: of the processor, with all that writes
    beside it, and of the clock; and what of it the fake worker takes."""
    marks: list[tuple[float, ...]] = []
    evaluate, scoring = VirtualPool.evaluate, [0.0]

    def timed(pool: VirtualPool, *asked: Any, **named: Any) -> Any:
        before = time.thread_time()
        answer = evaluate(pool, *asked, **named)
        scoring[0] += time.thread_time() - before
        marks.append((time.process_time(), scoring[0], time.perf_counter()))
        return answer

    with mock.patch.object(VirtualPool, "evaluate", timed):
        searched(arguments.workers[-1], 0.3, True, arguments.evaluations, arguments.seed)
    tenth = max(1, (len(marks) - 1) // 10)
    for at in range(0, len(marks) - tenth, tenth):
        used, scored, passed = (
            1000 * (new - old) / tenth
            for new, old in zip(marks[at + tenth], marks[at], strict=True)
        )
        row = {"search_ms": used - scored, "scoring_ms": scored, "clock_ms": passed}
        told = {name: round(each, 2) for name, each in row.items()}
        print(json.dumps({"candidates": at + tenth} | told), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["utilisation", "driver", "proposal", "quality", "real"])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4, 8, 32, 64])
    parser.add_argument("--cv", type=float, nargs="+", default=[0.3, 0.6])
    parser.add_argument("--evaluations", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--items", type=int, default=1000, help="of a proposal's history")
    lagging.options(parser)
    arguments = parser.parse_args()
    kinds = {
        "utilisation": utilisation,
        "driver": driver,
        "proposal": proposal,
        "quality": lagging.quality,
        "real": real_workers.real,
    }
    kinds[arguments.what](arguments)


if __name__ == "__main__":
    main()
