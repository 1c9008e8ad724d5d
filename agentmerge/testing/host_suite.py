"""What every host promises (``contracts/worker.py``), as tests that its author inherits.

    class TestMine(HostSuite):
        name = "mine"

Its workers are fake ones, which need no model.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from agentmerge.config import TasksConfig
from agentmerge.contracts.worker import Host, ItemRef, Worker, WorkerSpec
from agentmerge.errors import CandidateFailed, UserError, WorkerLost
from agentmerge.plugins import load
from agentmerge.recipe import Recipe
from agentmerge.workers.fake import FakeWorker


@dataclass(frozen=True)
class Fakes:
    """Builds a fake worker, or refuses; can be sent anywhere."""

    refused: bool = False

    def __call__(self, spec: WorkerSpec) -> Worker:
        if self.refused:
            raise UserError("no such thing: take another")
        return FakeWorker(spec)


class HostSuite:
    #: The host's entry point.
    name = "process"

    @pytest.fixture
    def host(self) -> Iterator[Host]:
        host: Host = load("agentmerge.hosts", self.name)(2)
        yield host
        host.close()

    @pytest.fixture
    def spec(self) -> WorkerSpec:
        parents = (("base", "/base"), ("b", "/b"), ("c", "/c"))
        tasks = TasksConfig(tasks=({"name": "code"}, {"name": "reading"}), limit=10)
        return WorkerSpec("fake", parents, "base", tasks, "float32", 8)

    def test_a_worker_there_is_what_one_here_is(self, host: Host, spec: WorkerSpec) -> None:
        hosted = host.start(spec, Fakes())
        worker, alone = hosted.ready(), FakeWorker(spec)
        assert worker.info == alone.info
        for b in (0.2, 0.7):
            assert _scored(worker, spec, b) == _scored(alone, spec, b)
        hosted.close()

    def test_a_candidates_failure_is_told_and_the_worker_stays(
        self, host: Host, spec: WorkerSpec
    ) -> None:
        spec = replace(spec, options={"fail_when": "max_weight>0.9"})
        hosted = host.start(spec, Fakes())
        worker = hosted.ready()
        with pytest.raises(CandidateFailed):
            _scored(worker, spec, 0.95)
        assert _scored(worker, spec, 0.5) == _scored(FakeWorker(spec), spec, 0.5)
        hosted.close()

    def test_what_building_raised_is_raised_by_ready(self, host: Host, spec: WorkerSpec) -> None:
        hosted = host.start(spec, Fakes(refused=True))
        with pytest.raises(UserError, match="no such thing"):
            hosted.ready()
        hosted.close()

    def test_two_work_beside_each_other(self, host: Host, spec: WorkerSpec) -> None:
        if not host.apart:
            return
        both = {b: host.start(spec, Fakes()) for b in (0.3, 0.6)}
        workers = {b: hosted.ready() for b, hosted in both.items()}
        for b, worker in workers.items():
            worker.load(_recipe(b))
        for b, worker in workers.items():
            assert worker.score(_refs(spec)) == _scored(FakeWorker(spec), spec, b)[1]
            both[b].close()

    def test_what_is_at_work_is_ended_at_once(self, host: Host, spec: WorkerSpec) -> None:
        if not host.apart:
            return
        hosted = host.start(replace(spec, options={"delay_s": 60}), Fakes())
        worker = hosted.ready()
        raised: list[Exception] = []

        def work() -> None:
            try:
                _scored(worker, spec, 0.5)
            except Exception as error:
                raised.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        time.sleep(0.2)
        hosted.end()
        thread.join(20)
        assert not thread.is_alive()
        assert [type(error) for error in raised] == [WorkerLost]
        hosted.close()


def _refs(spec: WorkerSpec) -> tuple[ItemRef, ...]:
    return FakeWorker.tasks(spec).refs()


def _scored(worker: Worker, spec: WorkerSpec, b: float) -> Any:
    return worker.load(_recipe(b)), worker.score(_refs(spec))


def _recipe(b: float) -> Recipe:
    models = [
        {"model": name, "parameters": {"weight": weight}} for name, weight in (("b", b), ("c", 0.4))
    ]
    body = {"merge_method": "task_arithmetic", "base_model": "base", "models": models}
    return Recipe.parse(body).canonical(4)
