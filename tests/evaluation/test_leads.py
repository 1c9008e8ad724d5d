"""Differences and intervals of every kind of metric, each resampled as what it is."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from lm_eval.api import metrics

from agentmerge.contracts.strategy import Observation
from agentmerge.contracts.worker import ItemRef, ItemResult
from agentmerge.evaluation.aggregation import Rebuild
from agentmerge.evaluation.leads import PairedNoise, counted, lead, least_leads
from agentmerge.evaluation.tasks import Objective, ScoredTask, TaskSet

Results = dict[ItemRef, ItemResult]


def task(
    name: str, size: int, rebuild: Rebuild = "plain", statics: Any = (), higher: bool = True
) -> ScoredTask:
    refs = tuple(ItemRef(name, i, f"{name}{i}") for i in range(size))
    return ScoredTask(
        name, 1.0, "m", "none", higher, "loglikelihood", None, name, refs, tuple(range(size)),
        tuple(range(size)), rebuild, tuple(map(float, statics)), name,
    )  # fmt: skip


def taskset(*found: tuple[ScoredTask, Callable[[Any], Any] | None]) -> TaskSet:
    return TaskSet(
        tuple(t for t, _ in found),
        tuple(Objective(t.name, t.weight, t.higher_is_better, (t.name,)) for t, _ in found),
        aggregations={t.name: f for t, f in found if f is not None},
    )


def results(one: ScoredTask, values: Any) -> Results:
    return {ref: ItemResult(float(v)) for ref, v in zip(one.items, values, strict=True)}


RNG = np.random.default_rng(0)
WORDS = RNG.integers(5, 40, 60)
GOLD = RNG.integers(0, 2, 60)
CLASSES = RNG.integers(0, 3, 60)
NATS = -RNG.gamma(3.0, 1.0, 60)
LESS = NATS - RNG.gamma(1.0, 0.3, 60)
KINDS: dict[str, tuple[ScoredTask, Callable[[Any], Any] | None, Any, Any]] = {
    "mean": (task("a", 60), None, GOLD, GOLD * 0),
    "lower is better": (task("a", 60, higher=False), metrics.mean, -NATS, -LESS),
    "perplexity": (task("a", 60, higher=False), metrics.perplexity, NATS, LESS),
    "word perplexity": (
        task("a", 60, "weighted", WORDS, higher=False),
        metrics.weighted_perplexity,
        NATS * WORDS,
        LESS * WORDS,
    ),
    "bits a byte": (
        task("a", 60, "weighted", WORDS, higher=False),
        metrics.bits_per_byte,
        NATS * WORDS,
        LESS * WORDS,
    ),
    "f1": (
        task("a", 60, "class", GOLD),
        metrics.f1_score,
        np.where(np.arange(60) % 10 == 0, 1 - GOLD, GOLD),
        np.where(np.arange(60) % 2 == 0, 1 - GOLD, GOLD),
    ),
    "mcc": (
        task("a", 60, "class", CLASSES),
        metrics.matthews_corrcoef,
        np.where(np.arange(60) % 10 == 0, (CLASSES + 1) % 3, CLASSES),
        np.where(np.arange(60) % 2 == 0, (CLASSES + 1) % 3, CLASSES),
    ),
    "a task's own": (task("a", 60), statistics.median, NATS, LESS),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_metric_has_its_difference_and_an_interval(kind: str) -> None:
    one, function, better, worse = KINDS[kind]
    tasks = taskset((one, function))
    mine, theirs = results(one, better), results(one, worse)
    found = lead(tasks, mine, theirs, 0)
    assert found is not None
    truth = tasks.score(mine).value - tasks.score(theirs).value
    assert found.mean == pytest.approx(truth, rel=1e-9)
    assert found.low < truth < found.high
    assert found.low > 0, "a difference on every other item, or on all, is beyond noise"
    back = lead(tasks, theirs, mine, 0)
    assert back is not None
    assert back.high < 0
    # resampled as lm-eval would: the spread of the aggregate over draws of items
    rng = np.random.default_rng(1)
    draws = []
    for _ in range(300):
        drawn = rng.integers(60, size=60)
        refs = [one.items[i] for i in drawn]
        draws.append(
            tasks.objective({"a": tasks.aggregate(one, [mine[r] for r in refs], refs)})
            - tasks.objective({"a": tasks.aggregate(one, [theirs[r] for r in refs], refs)})
        )
    width = float(np.quantile(draws, 0.975) - np.quantile(draws, 0.025))
    if kind != "a task's own":
        assert found.high - found.low == pytest.approx(width, rel=0.35, abs=0.05 * abs(truth))


@pytest.mark.parametrize("kind", KINDS)
def test_alike_is_not_certain(kind: str) -> None:
    one, function, better, _ = KINDS[kind]
    tasks = taskset((one, function))
    mine = results(one, better)
    found = lead(tasks, mine, mine, 0)
    if found is not None:  # an aggregation that resamples do not move has no interval
        assert found.mean == 0
        assert found.low < 0 < found.high
    alone = lead(tasks, mine, None, 0)
    assert alone is not None
    assert alone.mean == pytest.approx(tasks.score(mine).value)
    assert alone.low < alone.mean < alone.high


def test_a_perplexity_beside_an_accuracy() -> None:
    """Both count; and one that explodes in some resamples is a number all the same."""
    acc, ppl = task("acc", 80), task("ppl", 40, higher=False)
    tasks = taskset((acc, None), (ppl, metrics.perplexity))
    right = np.random.default_rng(2).integers(0, 2, 80)
    mine = results(acc, right) | results(ppl, np.full(40, -1.0) - np.linspace(0, 1, 40))
    wild = results(acc, right) | results(ppl, np.where(np.arange(40) < 39, -1.0, -30_000.0))
    found = lead(tasks, mine, wild, 0)
    assert found is not None
    assert np.isfinite(found).all()
    least = least_leads(tasks, [mine, wild], mine, 0)
    assert least is not None
    assert least[0] <= 0
    assert least[1] <= 0


def test_tries_beyond_those_counted_are_stood_for_by_some() -> None:
    one = task("a", 30)
    mean, own = taskset((one, None)), taskset((one, statistics.median))
    assert counted(mean, 40) == list(range(40))
    for tasks, size, most in ((mean, 10_000, 1000), (own, 50, 20)):
        found = counted(tasks, size)
        assert found[:5] == [0, 1, 2, 3, 4], "those that can be chosen"
        assert found[-1] == size - 1
        assert len(set(found)) == most


def noise_of(found: TaskSet, *known: Results) -> float:
    noise = PairedNoise(found, lambda recipe: known[int(recipe)])
    one, other = (Observation(0, i, None, "x", 0.0, recipe_hash=str(i)) for i in range(2))
    return noise(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_two_scores_are_apart_by_the_noise_of_the_metric_itself(kind: str) -> None:
    """As a plain bootstrap of the metric over paired items has it; of means, in closed form."""
    one, function, mine, theirs = KINDS[kind]
    found = taskset((one, function))
    both = [results(one, values) for values in (mine, theirs)]
    rng, gaps = np.random.default_rng(1), []
    for _ in range(800):
        drawn = rng.integers(0, 60, 60)
        again = replace(one, statics=tuple(np.array(one.statics)[drawn]) if one.statics else ())
        told = taskset((again, function))
        scores = [
            told.score(results(again, np.asarray(values)[drawn]), "search").value
            for values in (mine, theirs)
        ]
        gaps.append(scores[0] - scores[1])
    assert noise_of(found, *both) == pytest.approx(np.std(gaps), rel=0.25)
    assert noise_of(found, *both) == noise_of(found, *both)


def test_noise_of_a_perplexity_beside_an_accuracy_counts_both() -> None:
    accuracy, loss = task("right", 60), task("loss", 60, higher=False)
    right, other = GOLD, np.where(np.arange(60) % 7 == 0, 1 - GOLD, GOLD)
    first = results(accuracy, right) | results(loss, NATS)
    second = results(accuracy, other) | results(loss, LESS)
    both = noise_of(taskset((accuracy, None), (loss, metrics.perplexity)), first, second)
    alone = [
        noise_of(taskset((accuracy, None)), first, second),
        noise_of(taskset((loss, metrics.perplexity)), first, second),
    ]
    assert min(alone) > 0
    assert both == pytest.approx(float(np.hypot(*alone)))


@pytest.mark.parametrize("size", [1, 2, 9])
def test_few_items_of_a_perplexity_have_noise_too(size: int) -> None:
    one = task("a", size, higher=False)
    both = results(one, NATS[:size]), results(one, LESS[:size])
    found = noise_of(taskset((one, metrics.perplexity)), *both)
    assert 0 < found < np.inf
    wild = results(one, [-1e6] * size), both[1]
    assert 0 < noise_of(taskset((one, metrics.perplexity)), *wild) < np.inf


def test_noise_is_of_the_items_that_both_have() -> None:
    one = task("a", 60, higher=False)
    first, second = results(one, NATS), results(one, LESS)
    half, other = (dict(list(known.items())[:30]) for known in (first, second))
    found = taskset((one, metrics.perplexity))
    assert noise_of(found, half, second) == noise_of(found, half, other)
    assert noise_of(found, half, second) != noise_of(found, first, second)
    assert noise_of(found, {}, second) == 0
