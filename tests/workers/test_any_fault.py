"""Faults drawn at every step of a small search: it ends with an answer, or a resume ends it.

On the fake worker and on ``hf``, with a perplexity beside an accuracy.
"""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from agentmerge.config import SearchConfig
from agentmerge.errors import AgentmergeError, CandidateFailed, TaskError, WorkerLost
from agentmerge.ledger import Ledger
from agentmerge.ledger.store import Store
from agentmerge.session import driving
from agentmerge.workers.fake import FakeWorker
from agentmerge.workers.hf import HfWorker
from tests.session.conftest import BODY, OBJECTIVES, config

FAULTS: dict[str, Callable[[], Exception]] = {
    "candidate": lambda: CandidateFailed("the merge is not finite"),
    "item": lambda: CandidateFailed("log-likelihood nan for document 7"),
    "worker": lambda: WorkerLost("killed by signal 9"),
    "memory": lambda: RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "code": lambda: ZeroDivisionError("division by zero"),
    "task": lambda: TaskError("task 'one' gave no 'acc' for document 3"),
    "disk": lambda: sqlite3.OperationalError("database or disk is full"),
}


@contextmanager
def faults(worker: Any, rng: random.Random, share: float) -> Iterator[list[str]]:
    """Of every call of the worker and every write of the ledger, a share fails."""
    drawn: list[str] = []

    def draw(kinds: list[str]) -> None:
        if rng.random() < share:
            drawn.append(rng.choice(kinds))
            raise FAULTS[drawn[-1]]()

    load, score, writing = worker.load, worker.score, Store._writing

    def loading(self: Any, recipe: Any) -> Any:
        draw(["candidate", "worker", "memory"])
        return load(self, recipe)

    def scoring(self: Any, items: Any) -> Any:
        draw(["item", "worker", "memory", "code", "task"])
        return score(self, items)

    @contextmanager
    def write(self: Store) -> Iterator[Any]:
        with writing(self) as conn:
            if share:
                draw(["disk"])
            yield conn

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "load", loading)
        patch.setattr(worker, "score", scoring)
        patch.setattr(Store, "_writing", write)
        yield drawn


def driven(settings: SearchConfig, folder: Path, worker: Any, seed: int) -> None:
    """Faults get rarer from one try to the next, and none may be anything but an error of ours."""
    rng = random.Random(seed)
    seen: list[str] = []
    row = None
    for attempt, share in enumerate((0.2, 0.1, 0.05, 0.0)):
        with faults(worker, rng, share) as drawn:
            try:
                if attempt and (folder / driving.LEDGER).exists() and _exists(folder):
                    row = driving.resume("a", runs_dir=folder)
                else:
                    row = driving.run(settings, name="a", runs_dir=folder)
            except AgentmergeError:
                row = None
            finally:
                seen += drawn
        if row is not None and row.status == "done":
            break
    assert seen
    assert row is not None
    assert row.status == "done", seen
    with Ledger(folder / driving.LEDGER) as ledger:
        found = ledger.candidates(row.id)
    if any(c.score is not None for c in found):
        assert row.result is not None
        place = tuple(row.result["answer"]["candidate"])
        assert place in {(c.generation, c.slot) for c in found if c.score is not None}
        assert row.result["verdict"]
        assert (folder / "a" / "best.yml").is_file()
    assert driving.resume("a", runs_dir=folder).status == "done"


def _exists(folder: Path) -> bool:
    with Ledger(folder / driving.LEDGER) as ledger:
        return any(row.name == "a" for row in ledger.runs())


@pytest.mark.parametrize("seed", range(8))
def test_a_fake_search_ends_with_an_answer(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in list(OBJECTIVES.values())[seed % len(OBJECTIVES)].items():
        monkeypatch.setitem(BODY, key, value)
    algorithm = ["random", "margins", "gradient", "cma_es"][seed % 4]
    settings = config(
        search={"algorithm": algorithm, "seed": seed, "population": 3},
        budget={"max_evaluations": 16},
    )
    driven(settings, tmp_path, FakeWorker, seed)


@pytest.mark.parametrize("every", [1, 3])
def test_a_worker_that_gives_no_results_ends_no_search(
    tmp_path: Path, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    score, calls = FakeWorker.score, count(1)

    def scoring(self: Any, items: Any) -> Any:
        return None if next(calls) % every == 0 else score(self, items)

    monkeypatch.setattr(FakeWorker, "score", scoring)
    settings = config(search={"algorithm": "random"}, budget={"max_evaluations": 16})
    row = driving.run(settings, name="a", runs_dir=tmp_path)
    assert row.status == "done"
    assert driving.resume("a", runs_dir=tmp_path).status == "done"
    with Ledger(tmp_path / driving.LEDGER) as ledger:
        found = ledger.candidates(row.id)
    failures = {c.failure for c in found if c.state == "failed"}
    assert failures == {"the 'fake' worker's score() is None, not list; mend the worker"}
    assert any(c.score is not None for c in found) == (every > 1)


@pytest.mark.parametrize("seed", range(2))
def test_a_search_on_real_models_ends_with_an_answer(
    parents: dict[str, Path], tasks_dir: Path, tmp_path: Path, seed: int
) -> None:
    body = {
        "genome": {
            "models": [str(parents["b"]), str(parents["c"])],
            "base_model": str(parents["base"]),
            "merge_method": "task_arithmetic",
        },
        "tasks": [
            {"name": "tiny_choice", "metric": tiny.METRICS["tiny_choice"]},
            {"name": "tiny_text", "metric": tiny.METRICS["tiny_text"], "weight": 0.01},
        ],
        "task_search_path": [str(tasks_dir)],
        "limit": 20,
        "search": {"algorithm": ["gradient", "random"][seed], "population": 2},
        "budget": {"max_evaluations": 14},
        "worker": {"kind": "hf", "batch_size": 20, "device": "cpu"},
    }
    driven(SearchConfig.from_text(yaml.safe_dump(body)), tmp_path, HfWorker, seed)
