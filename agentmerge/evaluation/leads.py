"""How far candidates are ahead of each other beyond the noise of the items, from stored results.

Every metric that can be a score is resampled as what it is: means and lm-eval's perplexities, F1
and MCC as arithmetic on counts of items, any other aggregation by calling it on the items drawn.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from agentmerge.contracts.strategy import Observation
from agentmerge.contracts.worker import ItemRef, ItemResult
from agentmerge.evaluation.aggregation import (
    OF_VALUES,
    WITH_STATICS,
    Aggregation,
    aggregation_of,
)
from agentmerge.evaluation.statistics import (
    MIN_ITEMS,
    RESAMPLES,
    Interval,
    Leads,
    Metric,
    PairedTask,
    leads,
    mean,
)
from agentmerge.evaluation.tasks import Objective, Part, ScoredTask, TaskSet, leaf_shares

Results = Mapping[ItemRef, ItemResult]

#: Most tries that are counted.
MAX_TRIED = 1000
#: The same where an aggregation has to be called for each of them and each resample.
MAX_TRIED_CALLED, RESAMPLES_CALLED = 20, 500


def lead(
    taskset: TaskSet, mine: Results, theirs: Results | None, seed: int, part: Part = "search"
) -> Interval | None:
    """How far one is ahead of another (of nothing: its score), paired by item.

    Items count that both have. None where they are too few for an interval, or a task has none.
    """
    found = _leads(taskset, taskset.objectives, [mine], theirs, seed, part)
    return None if found is None else found.interval()


def least_leads(
    taskset: TaskSet, tried: Sequence[Results], theirs: Results, seed: int, part: Part = "search"
) -> list[float] | None:
    """Lower ends of how far each of those tried is ahead, that hold for all at once (97.5 %).

    So what is said of one that was chosen among them counts how many there were. None with too few
    items; minus infinity where nothing can be said.
    """
    found = _leads(taskset, taskset.objectives, tried, theirs, seed, part)
    return None if found is None else found.at_least().tolist()


def counted(taskset: TaskSet, size: int) -> list[int]:
    """Which of so many tries, ranked, are counted: the best, and of the others some of every rank.

    Neighbours are alike, and all of ten thousand would not fit into memory with their items.
    """
    most = MAX_TRIED_CALLED if _called(taskset) else MAX_TRIED
    if size <= most:
        return list(range(size))
    best = most // 2
    return [*range(best), *np.linspace(best, size - 1, most - best).astype(int).tolist()]


@dataclass(frozen=True)
class PairedNoise:
    """One standard error of the difference of two scores, over the search items that both have.

    Of means it is known from the items' differences; of what is no mean (a perplexity, an F1), from
    a bootstrap of the metric itself, with as few items as there are.

    known: recipe hash -> what is known of its search items. Of two merges that have all of them the
    error is found once: a history is told again and again.
    """

    taskset: TaskSet
    known: Callable[[str], Results]
    _found: dict[tuple[str, str], float] = field(default_factory=dict)

    def __call__(self, a: Observation, b: Observation) -> float:
        pair = (a.recipe_hash, b.recipe_hash)
        if pair in self._found:
            return self._found[pair]
        mine, theirs = map(self.known, pair)
        found = math.sqrt(self._variance(mine, theirs)) if mine and theirs else 0.0
        if len(mine) == len(theirs) == len(set(self.taskset.refs("search"))):
            self._found[pair] = found
        return found

    def _variance(self, mine: Results, theirs: Results) -> float:
        variance, others = 0.0, []
        for objective in self.taskset.objectives:
            if not self.taskset.is_mean(objective):
                others.append(objective)
                continue
            parts = {name: self.taskset.task(name).part("search") for name in objective.leaves}
            sizes = {name: len(refs) for name, refs in parts.items()}
            for name, share in leaf_shares(objective.by_size, sizes).items():
                both = [ref for ref in parts[name] if ref in mine and ref in theirs]
                gaps = [mine[ref].value - theirs[ref].value for ref in both]
                if len(gaps) > 1:
                    weight = objective.signed_weight * share
                    variance += weight**2 * statistics.variance(gaps) / len(gaps)
        found = _leads(self.taskset, others, [mine], theirs, 0, "search", least=1)
        return variance if found is None else variance + float(found.draws.var())


def _leads(
    taskset: TaskSet,
    objectives: Sequence[Objective],
    mine: Sequence[Results],
    theirs: Results | None,
    seed: int,
    part: Part,
    least: int = MIN_ITEMS,
) -> Leads | None:
    """None where there are fewer items than ``least``, or some task has none that all have."""
    paired = []
    for objective in objectives:
        shared = {
            name: [
                ref
                for ref in taskset.task(name).part(part)
                if (theirs is None or ref in theirs) and all(ref in one for one in mine)
            ]
            for name in objective.leaves
        }
        if not all(shared.values()):
            return None
        shares = leaf_shares(objective.by_size, {n: len(refs) for n, refs in shared.items()})
        for name, refs in shared.items():
            weight = objective.signed_weight * shares[name]
            paired.append(_paired_task(taskset, taskset.task(name), weight, refs, mine, theirs))
    resamples = RESAMPLES_CALLED if _called(taskset) else RESAMPLES
    return leads(paired, seed, resamples, least) if paired else None


def _paired_task(
    taskset: TaskSet,
    task: ScoredTask,
    weight: float,
    refs: Sequence[ItemRef],
    mine: Sequence[Results],
    theirs: Results | None,
) -> PairedTask:
    statics = None
    if task.rebuild == "whole":
        return _paired_whole(taskset, task, weight, refs, mine, theirs)
    if task.rebuild in WITH_STATICS:
        place = {ref: i for i, ref in enumerate(task.items)}
        statics = np.array([task.statics[place[ref]] for ref in refs], float)
    return PairedTask(
        weight,
        np.array([[one[ref].value for one in mine] for ref in refs], float),
        None if theirs is None else np.array([theirs[ref].value for ref in refs], float),
        _metric(taskset, task)
        or _calling(taskset.aggregations[task.name], task.rebuild == "class"),
        statics,
        labels=task.rebuild == "class",
    )


def _paired_whole(
    taskset: TaskSet,
    task: ScoredTask,
    weight: float,
    refs: Sequence[ItemRef],
    mine: Sequence[Results],
    theirs: Results | None,
) -> PairedTask:
    """Values are places in a table of what the items gave, from the worst alone to the best."""
    every = [*mine, *([] if theirs is None else [theirs])]
    worth = {one[ref].whole: one[ref].value for ref in refs for one in every}
    sign = 1.0 if task.higher_is_better else -1.0
    table = sorted(worth, key=lambda text: (sign * worth[text], text))
    place = {text: float(i) for i, text in enumerate(table)}
    combine = taskset.aggregations[task.name]

    def drawn(places: list[float]) -> float:
        return float(combine([table[min(max(int(p), 0), len(table) - 1)] for p in places]))

    return PairedTask(
        weight,
        np.array([[place[one[ref].whole] for one in mine] for ref in refs], float),
        None if theirs is None else np.array([place[theirs[ref].whole] for ref in refs], float),
        _calling(drawn),
    )


def _called(taskset: TaskSet) -> bool:
    """Whether some metric is nothing but a function to call."""
    return any(_metric(taskset, task) is None for task in taskset.tasks)


def _metric(taskset: TaskSet, task: ScoredTask) -> Metric | None:
    """A task's metric as arithmetic on counts; None where its aggregation is not known."""
    function = taskset.aggregations.get(task.name)
    found = aggregation_of(function)
    if task.rebuild in OF_VALUES and found.mean:
        return mean
    if found == Aggregation():  # a task's own, whatever it is called
        return None
    return _ARITHMETIC.get((task.rebuild, getattr(function, "__name__", "")))


def _perplexity(counts: np.ndarray, values: np.ndarray, statics: np.ndarray | None) -> np.ndarray:
    found: np.ndarray = np.exp(-mean(counts, values, None))
    return found


def _nats(counts: np.ndarray, values: np.ndarray, statics: np.ndarray | None) -> np.ndarray:
    """Nats a word or a byte, of which ``statics`` says how many an item has."""
    assert statics is not None
    found: np.ndarray = -(counts @ values) / (counts @ statics)
    return found


def _weighted_perplexity(
    counts: np.ndarray, values: np.ndarray, statics: np.ndarray | None
) -> np.ndarray:
    found: np.ndarray = np.exp(_nats(counts, values, statics))
    return found


def _bits(counts: np.ndarray, values: np.ndarray, statics: np.ndarray | None) -> np.ndarray:
    return _nats(counts, values, statics) / math.log(2)


def _f1(counts: np.ndarray, values: np.ndarray, statics: np.ndarray | None) -> np.ndarray:
    """Of class 1; 0 where there is none of it, as scikit-learn has it."""
    assert statics is not None
    both = counts @ ((values == 1) & (statics == 1)).astype(float)
    either = counts @ (values == 1).astype(float) + counts @ (statics == 1).astype(float)
    found: np.ndarray = np.where(either > 0, 2 * both / np.maximum(either, 1.0), 0.0)
    return found


def _mcc(counts: np.ndarray, values: np.ndarray, statics: np.ndarray | None) -> np.ndarray:
    """Matthews' coefficient of any number of classes (Gorodkin 2004); 0 where it is undefined."""
    assert statics is not None
    size = counts.sum(1, keepdims=True)
    right = counts @ (values == statics).astype(float)
    said = [counts @ (values == one).astype(float) for one in np.union1d(values, statics)]
    true = [counts @ (statics == one).astype(float) for one in np.union1d(values, statics)]
    cross = right * size - sum(s * t for s, t in zip(said, true, strict=True))
    spread = (size**2 - sum(s * s for s in said)) * (size**2 - sum(t * t for t in true))
    found: np.ndarray = np.where(spread > 0, cross / np.sqrt(np.maximum(spread, 1e-300)), 0.0)
    return found


_ARITHMETIC: Mapping[tuple[str, str], Metric] = {
    ("plain", "perplexity"): _perplexity,
    ("weighted", "weighted_perplexity"): _weighted_perplexity,
    ("weighted", "bits_per_byte"): _bits,
    ("class", "f1_score"): _f1,
    ("class", "matthews_corrcoef"): _mcc,
}


def _calling(function: Callable[[list[Any]], Any], classes: bool = False) -> Metric:
    """A metric of which only the function is known."""

    def metric(counts: np.ndarray, values: np.ndarray, statics: np.ndarray | None) -> np.ndarray:
        found = np.empty((len(counts), values.shape[1]))
        for row, often in enumerate(counts.astype(int)):
            for column in range(values.shape[1]):
                drawn: list[Any] = np.repeat(values[:, column], often).tolist()
                if statics is not None:
                    known = np.repeat(statics[:, column], often).astype(int).tolist()
                    drawn = (
                        list(zip(known, map(int, drawn), strict=True))
                        if classes
                        else list(zip(drawn, known, strict=True))
                    )
                try:
                    found[row, column] = float(function(drawn))
                except (ArithmeticError, ValueError):
                    found[row, column] = math.nan
        return found

    return metric
