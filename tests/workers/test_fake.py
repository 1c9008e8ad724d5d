"""The fake worker is something to search on."""

from __future__ import annotations

import numpy as np
import pytest
from test_pool import REFS, TASKS, spec
from tiny import recipe

from agentmerge.contracts.worker import ItemRef
from agentmerge.errors import UserError
from agentmerge.recipe import Recipe
from agentmerge.workers.fake import FakeWorker, _optimum, fake_tasks

TASKSET = fake_tasks(TASKS)


def score(asked: Recipe) -> float:
    worker = FakeWorker(spec(base="base"))
    worker.load(asked)
    return TASKSET.score(dict(zip(REFS, worker.score(REFS), strict=True))).value


def test_the_optimum_is_inside_away_from_the_middle_and_smooth() -> None:
    grid = [(b / 10, c / 10) for b in range(11) for c in range(11)]
    scores = {point: score(recipe(*point)) for point in grid}
    best = max(scores, key=lambda point: scores[point])
    assert scores[best] > 1.05 * max(scores[w / 10, w / 10] for w in range(11))
    assert max(abs(w - 0.5) for w in best) >= 0.15
    worker = FakeWorker(spec())
    margins = []
    for w in (0.4, 0.401):
        worker.load(recipe(w, 0.5))
        margins.append([result.margin for result in worker.score(REFS)])
    steps = np.abs(np.subtract(*np.asarray(margins, float)))
    assert 0 < steps.max() < 0.05


def test_values_follow_margins_and_tasks_differ() -> None:
    worker = FakeWorker(spec())
    worker.load(recipe(0.4, 0.6))
    results = worker.score(REFS)
    assert all(((result.margin or 0.0) > 0) == bool(result.value) for result in results)
    assert {result.value for result in results} == {0.0, 1.0}
    one, two = (_optimum(name, ("b", "c"), 2, 2) for name in ("code", "reading"))
    assert np.abs(one - two).max() > 0.1


def test_slices_normalisation_and_parents() -> None:
    """Equal merges score alike, however they are written."""
    twice = Recipe.parse(
        {
            "merge_method": "linear",
            "models": [
                {"model": name, "parameters": {"weight": weight}}
                for name, weight in (("b", 0.8), ("c", 0.4))
            ],
        }
    )
    half = Recipe.parse(
        {
            "merge_method": "linear",
            "slices": [
                {
                    "sources": [
                        {"model": name, "layer_range": [i, i + 1], "parameters": {"weight": weight}}
                        for name, weight in (("b", 0.2), ("c", 0.1))
                    ]
                }
                for i in range(2)
            ],
        }
    )
    worker = FakeWorker(spec())
    first = worker.load(twice.canonical(2))
    assert worker.load(half.canonical(2)).digest == first.digest
    assert worker.load(Recipe.of_model("b", 2)).digest != first.digest


def test_sealed_items_and_limits() -> None:
    task = TASKSET.tasks[0]
    assert len(task.search) == len(task.sealed) == 20
    assert fake_tasks(TASKS.model_copy(update={"limit": 30})).refs()[:20] == TASKSET.refs()[:20]
    assert isinstance(task.items[0], ItemRef)


def test_options_that_are_not_understood() -> None:
    with pytest.raises(UserError, match=r"write e\.g\. 'max_weight"):
        FakeWorker(spec(fail_when="weights>1"))
    failing = recipe(0.3, 0.3).hash()
    worker = FakeWorker(spec(fail_when=[failing]))
    worker.load(recipe(0.3, 0.4))
    with pytest.raises(Exception, match="as it was told to"):
        worker.load(recipe(0.3, 0.3))
