"""Queueing, retries and stopping, on the fake worker."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import recipe

from agentmerge.config import TasksConfig
from agentmerge.contracts.worker import WorkerSpec
from agentmerge.errors import CandidateFailed, NotBegun, NoWorker, UserError, WorkerLost
from agentmerge.workers.fake import FakeWorker
from agentmerge.workers.hosts.here import Here
from agentmerge.workers.hosts.nodes import refuse_other_versions
from agentmerge.workers.places import Deadlines
from agentmerge.workers.pool import LOSSES, Pool
from agentmerge.workers.sharing import crowd_of, devices_for

TASKS = TasksConfig(tasks=({"name": "code"}, {"name": "reading"}), limit=20)
REFS = FakeWorker.tasks(WorkerSpec("fake", (), "base", TASKS, "float32", 8)).refs()


def spec(**options: Any) -> WorkerSpec:
    parents = (("base", "/x"), ("b", "/y"), ("c", "/z"))
    return WorkerSpec("fake", parents, "base", TASKS, "float32", 8, options=options)


def expected(b: float, c: float) -> Any:
    worker = FakeWorker(spec())
    return worker.load(recipe(b, c)), worker.score(REFS)


def test_one_worker_serves_many_threads_one_at_a_time() -> None:
    points = [(0.1 * i, 0.5) for i in range(12)]
    with Pool(spec(delay_s=0.01)) as pool, ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda p: pool.evaluate(recipe(*p), REFS), points))
    for point, (fingerprint, results, seconds) in zip(points, found, strict=True):
        assert (fingerprint, results) == expected(*point)
        assert seconds >= 0.01


def test_nothing_is_built_before_it_is_needed() -> None:
    made = []

    def make(given: WorkerSpec, taskset: Any) -> FakeWorker:
        made.append(given)
        return FakeWorker(given, taskset)

    pool = Pool(spec(), make=make)
    assert pool.info == FakeWorker.describe(spec())
    assert made == []
    pool.evaluate(recipe(0.2, 0.3), REFS)
    pool.evaluate(recipe(0.2, 0.4), REFS)
    assert made == [spec()]
    pool.close()
    pool.close()


def test_a_failed_candidate_is_its_own_fault() -> None:
    with Pool(spec(fail_when="max_weight>0.95")) as pool:
        with pytest.raises(CandidateFailed):
            pool.evaluate(recipe(0.99, 0.1), REFS)
        assert pool.evaluate(recipe(0.5, 0.1), REFS)[:2] == expected(0.5, 0.1)


ODD: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "nothing": ("score", lambda rows: None, "score() is None, not list"),
    "one too few": ("score", lambda rows: rows[:-1], f"score() has {len(REFS) - 1} results for"),
    "words": ("score", lambda rows: ["yes"] * len(rows), "score()[0] is a str, not ItemResult"),
    "one number": ("score", lambda rows: [*rows[:-1], 1.0], f"score()[{len(REFS) - 1}] is a float"),
    "one word": ("score", lambda rows: "yes", "score() is a str, not list"),
    "no proof": ("load", lambda proof: None, "load() is None, not Fingerprint"),
}


@pytest.mark.parametrize("what", ODD)
def test_what_no_worker_may_give_fails_the_candidate_and_is_told(what: str) -> None:
    method, odd, said = ODD[what]

    class Odd(FakeWorker):
        def load(self, asked: Any) -> Any:
            self.odd = asked == recipe(0.2, 0.3) and method
            proof = super().load(asked)
            return odd(proof) if self.odd == "load" else proof

        def score(self, items: Any) -> Any:
            rows = super().score(items)
            return odd(rows) if self.odd == "score" else rows

    with Pool(spec(), make=Odd) as pool:
        for _ in range(LOSSES + 1):  # it is not the machine
            with pytest.raises(CandidateFailed) as error:
                pool.evaluate(recipe(0.2, 0.3), REFS)
            assert str(error.value).startswith(f"the 'fake' worker's {said}")
        assert pool.evaluate(recipe(0.5, 0.1), REFS)[:2] == expected(0.5, 0.1)


def test_a_gradient_that_is_none_fails_and_a_tuple_of_results_is_taken() -> None:
    class Odd(FakeWorker):
        def gradient(self, *asked: Any) -> Any:
            return None

        def score(self, items: Any) -> Any:
            return tuple(super().score(items))

    with Pool(spec(), make=Odd) as pool:
        with pytest.raises(CandidateFailed, match=r"gradient\(\) is None, not Gradient"):
            pool.gradient(recipe(0.2, 0.3), REFS, "margin", [1.0] * len(REFS))
        assert pool.evaluate(recipe(0.5, 0.1), REFS)[:2] == expected(0.5, 0.1)


def test_a_host_that_cannot_be_built_is_the_users_to_mend() -> None:
    class Unbuilt(Here):
        def __init__(self, count: int) -> None:
            raise LookupError("no cluster")

    class Refuses(Here):
        def __init__(self, count: int) -> None:
            raise WorkerLost("the cluster is gone")

    with pytest.raises(UserError, match=r"worker host .*Unbuilt .*LookupError: no cluster"):
        Pool(spec(), host=Unbuilt)
    with pytest.raises(WorkerLost, match="the cluster is gone"):
        Pool(spec(), host=Refuses)


def test_a_lost_worker_is_rebuilt_and_the_candidate_tried_again() -> None:
    with Pool(spec(die_at=2)) as pool:
        pool.evaluate(recipe(0.1, 0.1), REFS)
        assert pool.evaluate(recipe(0.5, 0.1), REFS)[:2] == expected(0.5, 0.1)
    with Pool(spec(die_at=1)) as pool:
        with pytest.raises(WorkerLost):
            pool.evaluate(recipe(0.5, 0.1), REFS)
        with pytest.raises(WorkerLost):  # the place in the pool is free again
            pool.evaluate(recipe(0.5, 0.1), REFS)


def test_stop_lets_running_evaluations_end() -> None:
    pool = Pool(spec(delay_s=0.3))
    with ThreadPoolExecutor(3) as threads:
        running = [threads.submit(pool.evaluate, recipe(0.1 * i, 0.5), REFS) for i in range(3)]
        time.sleep(0.1)
        pool.stop()
        ended = [task.exception() for task in running]
    assert [error is None for error in ended].count(True) == 1
    assert sum(isinstance(error, NotBegun) for error in ended) == 2
    with pytest.raises(NotBegun, match="not begun"):
        pool.evaluate(recipe(0.1, 0.5), REFS)
    pool.close()


def test_submitted_work_gets_its_turn_in_order_on_one_thread_a_worker() -> None:
    order: list[int] = []
    before = threading.active_count()
    with Pool(spec(delay_s=0.01, fail_when="max_weight>0.95")) as pool:

        def work(number: int) -> Any:
            order.append(number)
            return pool.evaluate(recipe(0.02 * number, 0.5), REFS)

        turns = [pool.submit(work, number) for number in range(40)]
        failing = pool.submit(pool.evaluate, recipe(0.99, 0.1), REFS)
        assert threading.active_count() <= before + 2  # the worker's own, and who asks it
        pool.wait(turns)
        assert order == list(range(40))
        assert [turn.result()[:2] for turn in turns[:3]] == [
            expected(0.02 * number, 0.5) for number in range(3)
        ]
        assert isinstance(failing.exception(), CandidateFailed)


class SaysWhich(FakeWorker):
    """A digest that tells the process."""

    def load(self, asked: Any) -> Any:
        return replace(super().load(asked), digest=str(os.getpid()))


def test_work_that_asks_several_times_keeps_its_worker() -> None:
    with Pool(spec(delay_s=0.05), count=2, make=SaysWhich) as pool:

        def race(number: int) -> set[str]:
            whole = [recipe(0.1 * number, 0.1), recipe(0.1 * number, 0.1), recipe(0.5, 0.5)]
            found = {pool.evaluate(each, REFS)[0].digest for each in whole}
            pool.gradient(whole[0], REFS, "margin", [1.0] * len(REFS))
            return found

        turns = [pool.submit(race, number) for number in range(4)]
        pool.wait(turns)
        assert all(len(turn.result()) == 1 for turn in turns)
        assert len(set.union(*(turn.result() for turn in turns))) == 2


def test_a_failure_cancels_what_has_not_begun() -> None:
    with Pool(spec(delay_s=0.2)) as pool:

        def broken() -> None:
            pool.evaluate(recipe(0.1, 0.5), REFS)
            raise UserError("the data is gone")

        turns: list[Any] = [pool.submit(broken)]
        turns += [pool.submit(pool.evaluate, recipe(0.1 * i, 0.5), REFS) for i in range(9)]
        pool.wait(turns)
        assert isinstance(turns[0].exception(), UserError)
        assert turns[-1].cancelled()
        assert pool.evaluate(recipe(0.5, 0.1), REFS)[:2] == expected(0.5, 0.1)


def test_a_stopped_pool_begins_nothing_and_says_so() -> None:
    pool = Pool(spec(delay_s=0.3))
    turns = [pool.submit(pool.evaluate, recipe(0.1 * i, 0.5), REFS) for i in range(3)]
    while not turns[0].running():
        time.sleep(0.01)
    time.sleep(0.05)
    pool.close()
    assert turns[0].result()[:2] == expected(0.0, 0.5)
    turns.append(pool.submit(pool.evaluate, recipe(0.1, 0.5), REFS))
    assert all(isinstance(turn.exception(), NotBegun) for turn in turns[1:])


def test_processes_of_their_own(tmp_path: Path) -> None:
    """Two workers: in parallel, faults carried over, a killed process replaced."""
    before = threading.active_count()
    with Pool(spec(delay_s=0.2, fail_when="max_weight>0.95"), count=2) as pool:
        assert threading.active_count() < before + 10
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(lambda c: pool.evaluate(recipe(0.1, c), REFS), (0.1, 0.2)))
            start = time.monotonic()
            points = [(0.5, 0.1 * i) for i in range(4)]
            found = list(threads.map(lambda p: pool.evaluate(recipe(*p), REFS), points))
            assert time.monotonic() - start < 0.75  # four of 0.2 s, two at a time
        for point, (fingerprint, results, _) in zip(points, found, strict=True):
            assert (fingerprint, results) == expected(*point)
        with pytest.raises(CandidateFailed, match="as it was told to"):
            pool.evaluate(recipe(0.99, 0.1), REFS)
        shares = [1.0] * len(REFS)
        gradient, _ = pool.gradient(recipe(0.5, 0.1), REFS, "margin", shares)
        assert pool.differentiates
        assert gradient == FakeWorker(spec()).gradient(recipe(0.5, 0.1), REFS)
        for place in pool._free:
            assert place.worker is not None
            place.worker._process.kill()  # type: ignore[attr-defined]
        assert pool.evaluate(recipe(0.5, 0.1), REFS)[:2] == expected(0.5, 0.1)


def test_a_process_that_keeps_dying_is_said() -> None:
    hard = Pool(spec(die_at=1, die_hard=True), count=2)
    with hard as pool, pytest.raises(WorkerLost, match=r"exit code 9\)"):
        pool.evaluate(recipe(0.5, 0.1), REFS)
    wrong = Pool(spec(fail_when="nonsense"), count=2)
    with wrong as pool, pytest.raises(UserError, match="is not understood"):
        pool.evaluate(recipe(0.5, 0.1), REFS)


def a_machine(monkeypatch: pytest.MonkeyPatch, gpus: int) -> None:
    monkeypatch.setattr("agentmerge.merging.memory.cuda_devices", lambda: gpus)


def test_workers_take_turns_on_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    a_machine(monkeypatch, 3)
    on = replace(spec(), device="cuda")
    assert devices_for(on, 1) == ["cuda"]
    assert devices_for(on, 4) == ["cuda:0", "cuda:1", "cuda:2", "cuda:0"]
    assert crowd_of(on, 4) == 2
    two_each = replace(on, options={"engine_args": {"tensor_parallel_size": 2}})
    assert devices_for(two_each, 2) == ["cuda:0", "cuda:0"]  # the third has no partner
    a_machine(monkeypatch, 4)
    assert devices_for(two_each, 2) == ["cuda:0", "cuda:2"]
    assert devices_for(replace(on, device="cuda:2"), 2) == ["cuda:2"] * 2  # as was asked for
    assert devices_for(spec(), 2) == ["cpu", "cpu"]


class SaysWhere(FakeWorker):
    """A digest that tells the spec's device and crowd; a dozen scores and it dies."""

    def __init__(self, given: WorkerSpec, taskset: Any) -> None:
        super().__init__(replace(given, device="cpu"), taskset)
        self.where = f"{given.device} {os.environ.get('CUDA_VISIBLE_DEVICES')} {given.crowd}"

    def load(self, asked: Any) -> Any:
        return replace(super().load(asked), digest=self.where)


def test_each_worker_process_is_told_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    a_machine(monkeypatch, 2)
    given = replace(spec(delay_s=0.3, die_at=3), device="cuda")
    seen: list[str] = []
    with Pool(given, count=2, make=SaysWhere) as pool, ThreadPoolExecutor(2) as threads:
        for _ in range(3):  # the last two are of new workers, on the devices of the old ones
            points = [(0.1, 0.5), (0.2, 0.5)]
            found = threads.map(lambda p: pool.evaluate(recipe(*p), REFS), points)
            seen += [fingerprint.digest for fingerprint, _, _ in found]
    assert sorted(set(seen)) == ["cuda 0 1", "cuda 1 1"]
    assert len(seen) == 6


class Near(Here):
    """A host whose workers count as apart, here."""

    apart = True


def test_a_worker_that_is_lost_is_built_anew_on_its_own_device_not_on_a_full_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    a_machine(monkeypatch, 2)

    def make(given: WorkerSpec, taskset: Any) -> FakeWorker:
        if given.device == "cuda:0":
            raise RuntimeError("CUDA out of memory")
        return FakeWorker(replace(given, device="cpu"), taskset)

    with Pool(replace(spec(die_at=2), device="cuda"), 2, make, host=Near) as pool:
        for b in (0.1, 0.2, 0.3):
            assert pool.evaluate(recipe(b, 0.5), REFS)[1] == expected(b, 0.5)[1]


def test_every_place_that_a_candidate_is_too_large_for_rests_and_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    a_machine(monkeypatch, 3)
    seen, told = list[str](), list[str]()

    def make(given: WorkerSpec, taskset: Any) -> FakeWorker:
        seen.append(given.device)
        full = len(seen) < 3

        class Full(FakeWorker):
            def score(self, items: Any) -> Any:
                if full:
                    raise WorkerLost("out of memory on cuda")
                return super().score(items)

        return Full(replace(given, device="cpu"), taskset)

    with Pool(replace(spec(), device="cuda"), 3, make, host=Near, tell=told.append) as pool:
        with pytest.raises(WorkerLost, match="out of memory"):
            pool.evaluate(recipe(0.1, 0.5), REFS)
        assert pool.evaluate(recipe(0.2, 0.5), REFS)[1] == expected(0.2, 0.5)[1]
    assert seen == ["cuda:0", "cuda:1", "cuda:2"]
    assert [line.split(" is ")[0] for line in told] == [f"a worker on cuda:{n}" for n in (0, 1)]


class Crowded(FakeWorker):
    """Of a device whose memory others have: the first. ``where``: load, or score once it is one."""

    def __init__(self, given: WorkerSpec, taskset: Any) -> None:
        self.full = os.environ["CUDA_VISIBLE_DEVICES"] == "0"
        if self.full and given.options["where"] == "load":
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        super().__init__(replace(given, device="cpu", options={}), taskset)

    def score(self, items: Any) -> Any:
        time.sleep(0.05)
        if self.full:
            raise WorkerLost("out of memory on cuda: lower worker.batch_size")
        return super().score(items)


@pytest.mark.parametrize("where", ["load", "score"])
def test_a_device_out_of_memory_is_left_out_with_the_reason(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentmerge.merging.memory.cuda_devices", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    told: list[str] = []
    given = replace(spec(where=where), device="cuda")
    with Pool(given, 2, Crowded, host="process", tell=told.append) as pool:
        turns = [pool.submit(pool.evaluate, recipe(0.1 * i, 0.5), REFS) for i in range(9)]
        pool.wait(turns)
        assert [turn.result()[1] for turn in turns] == [expected(0.1 * i, 0.5)[1] for i in range(9)]
    assert len(told) == 1
    assert told[0].startswith("a worker on cuda:0 is left out")
    assert "out of memory" in told[0]


def test_a_node_that_refuses_is_left_out_and_told_once_and_only_where_all_do_is_it_raised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    a_machine(monkeypatch, 2)
    monkeypatch.setattr("agentmerge.workers.pool.REST_S", 0.0)
    other, told = {"cuda:0"}, list[str]()

    def make(given: WorkerSpec, taskset: Any) -> FakeWorker:
        if given.device in other:
            refuse_other_versions({"Python": "1.5"})
        return FakeWorker(replace(given, device="cpu"), taskset)

    given = replace(spec(die_at=2), device="cuda")
    with Pool(given, 2, make, host=Near, tell=told.append) as pool:
        for b in (0.1, 0.2, 0.3):
            assert pool.evaluate(recipe(b, 0.5), REFS)[1] == expected(b, 0.5)[1]
        assert len(told) == 1
        assert f"node {socket.gethostname()} has Python" in told[0]
        other.add("cuda:1")
        with pytest.raises(NoWorker, match=r"no worker can be started: node .* and not 1\.5"):
            pool.evaluate(recipe(0.4, 0.5), REFS)


class Slow:
    """A host that takes its time before it has anything that could be ended."""

    apart = True
    said: list[str]
    go: threading.Event

    def __init__(self, count: int) -> None:
        pass

    def start(self, given: WorkerSpec, build: Any) -> Any:
        self.go.wait(10)
        return self

    def ready(self) -> Any:
        raise AssertionError("nobody waits for it")

    def end(self) -> None:
        self.said.append("ended")

    def close(self) -> None:
        self.said.append("closed")


def test_a_worker_that_was_given_up_before_it_was_there_is_ended_once_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Slow, "said", list[str](), raising=False)
    monkeypatch.setattr(Slow, "go", threading.Event(), raising=False)
    with Pool(spec(), host=Slow, deadlines=Deadlines(ends=time.monotonic() + 0.2)) as pool:
        with pytest.raises(NotBegun):
            pool.evaluate(recipe(0.1, 0.5), REFS)
        Slow.go.set()
        ends = time.monotonic() + 10
        while len(Slow.said) < 2 and time.monotonic() < ends:
            time.sleep(0.01)
        (place,) = pool._places
        assert (Slow.said, place.hosted, place.worker) == (["ended", "closed"], None, None)
