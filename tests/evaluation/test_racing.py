"""The test that drops a candidate: right as often as it promises, and quick where it can be."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from agentmerge.config import TasksConfig
from agentmerge.contracts.worker import ItemResult
from agentmerge.evaluation.racing import Course, RacedTask, evidence_against
from agentmerge.workers.fake import fake_tasks

ALPHA = 0.05
RUNS = 300


def sign(rng: np.random.Generator, total: int, up: float, down: float) -> np.ndarray:
    """A whole task's paired differences of right and wrong, and their exact mean is (up - down)."""
    gains, losses = round(up * total), round(down * total)
    values = np.zeros(total)
    values[:gains], values[gains : gains + losses] = 1.0, -1.0
    return rng.permutation(values)


def tasks(whole: list[tuple[float, np.ndarray]]) -> list[RacedTask]:
    """All items but the last tenth, as a race that is looked at to its end."""
    return [RacedTask(w, values[: round(0.9 * len(values))], len(values)) for w, values in whole]


@pytest.mark.parametrize(
    ("weights", "totals", "rates"),
    [
        ((1.0,), (200,), ((0.1, 0.1),)),
        ((1.0,), (60,), ((0.45, 0.45),)),
        ((1.0, 0.5), (100, 150), ((0.2, 0.3), (0.4, 0.2))),  # one task's loss, the other's gain
        ((1.0, -1.0), (37, 90), ((0.0, 0.0), (0.1, 0.1))),
    ],
)
def test_an_equal_is_dropped_no_oftener_than_alpha_however_often_it_is_looked_at(
    weights, totals, rates
) -> None:
    rng = np.random.default_rng(3)
    dropped = 0
    for _ in range(RUNS):
        whole = [
            (w, sign(rng, n, *rate)) for w, n, rate in zip(weights, totals, rates, strict=True)
        ]
        assert sum(w * v.mean() for w, v in whole) == pytest.approx(0.0, abs=1e-9)
        dropped += evidence_against(tasks(whole)) >= 1 / ALPHA
    assert dropped / RUNS <= ALPHA


@pytest.mark.parametrize(
    ("up", "down", "share"), [(0.05, 0.45, 0.25), (0.05, 0.25, 0.5), (0.0, 0.9, 0.125)]
)
def test_a_loser_is_dropped_early(up: float, down: float, share: float) -> None:
    rng = np.random.default_rng(4)
    found = []
    for _ in range(100):
        values = sign(rng, 200, up, down)
        found.append(evidence_against([RacedTask(1.0, values[: round(share * 200)], 200)]))
    assert np.mean(np.array(found) >= 1 / ALPHA) > 0.8


def test_more_items_never_take_evidence_back() -> None:
    values = sign(np.random.default_rng(5), 120, 0.1, 0.3)
    looks = [evidence_against([RacedTask(0.7, values[:n], 120)]) for n in range(1, 120)]
    assert looks == sorted(looks)


def test_what_cannot_be_caught_up_is_certain() -> None:
    assert evidence_against([RacedTask(1.0, np.full(60, -1.0), 100)]) == math.inf
    assert evidence_against([RacedTask(1.0, np.full(60, 1.0), 100)]) == 1.0


@pytest.mark.parametrize("weights", [(1.0,), (0.1, 0.2), (0.7, 0.1, 0.2)])
def test_what_the_best_answers_would_make_equal_is_not_certain_to_lose(
    weights: tuple[float, ...],
) -> None:
    """Half lost, and all of the other half won: exactly as good in the end."""
    values = np.repeat([-1.0, 1.0], 30)
    for seen in range(30, 60):
        found = evidence_against([RacedTask(w, values[:seen], 60) for w in weights])
        assert math.isfinite(found), seen
    worse = np.append(values[:30], [-1.0, 1.0])
    assert evidence_against([RacedTask(w, worse, 60) for w in weights]) == math.inf


def test_tasks_asked_in_full_give_a_head_start() -> None:
    values = sign(np.random.default_rng(6), 100, 0.1, 0.3)[:50]
    level, behind, ahead = (
        evidence_against([RacedTask(1.0, values, 100)], start) for start in (0.0, -0.3, 0.3)
    )
    assert behind > level > ahead


def course(**metrics: str) -> Course:
    tasks = [{"name": name, "metric": f"{metric},none"} for name, metric in metrics.items()]
    return Course(fake_tasks(TasksConfig(tasks=tasks, sealed_share=0.0), documents=90))


def test_rungs_are_nested_and_the_same_fraction_of_every_task() -> None:
    found = course(one="acc", two="exact_match")
    rungs = [found.refs(rung) for rung in (0.125, 0.25, 0.5, 1.0)]
    for small, large in pairwise(rungs):
        assert set(small) < set(large)
    assert [len(rung) for rung in rungs] == [24, 46, 90, 180]
    for rung in rungs:
        assert len({sum(ref.task == name for ref in rung) for name in ("one", "two")}) == 1
    first = [ref.index for ref in rungs[0] if ref.task == "one"]
    assert first != sorted(first), "an order by document could be an order by subject"


def test_what_is_no_bounded_mean_is_asked_in_full() -> None:
    found = course(one="acc", two="word_perplexity")
    assert [ref.task for ref in found.refs(0.125)].count("two") == 90
    assert not course(two="word_perplexity").raceable
    results = {ref: ItemResult(1.0, None, None) for ref in found.refs(1.0)}
    better = results | {ref: ItemResult(3.0, None, None) for ref in results if ref.task == "two"}
    share, lead = found.evidence(0.125, better, results)
    assert share == 1.0
    assert lead == pytest.approx(math.exp(-1) - math.exp(-3), rel=0.6), "of whole perplexities"


def test_a_metric_that_is_not_what_its_name_says_is_not_raced() -> None:
    found = course(one="acc")
    good = {ref: ItemResult(7.0, None, None) for ref in found.refs(1.0)}
    bad = {ref: ItemResult(0.0, None, None) for ref in good}
    assert found.evidence(0.5, bad, good) == (0.0, -7.0)
