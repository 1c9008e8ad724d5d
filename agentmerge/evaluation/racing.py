"""Which items a candidate is asked first, and when it has shown enough to be dropped.

Every task's items have one order, drawn by their own hashes, so that all candidates of all
searches share it. A rung is the same fraction of every task in that order. On it a candidate is
paired item by item with the incumbent, and the question is whether it could still be as good on
*all* items. The answer is a test that may be looked at after every item (``evidence_against``).
Metrics that are no mean of numbers in [0, 1] have no such test: their tasks are asked in full on
the first rung.

Knows stored values and no worker; what is done with a loser is ``agentmerge.search.evaluate``.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from agentmerge.contracts.worker import ItemRef, ItemResult
from agentmerge.evaluation.tasks import Objective, ScoredTask, TaskSet, leaf_shares

#: lm-eval's metrics that give each item a number in [0, 1] and average them.
BOUNDED = frozenset(
    {"acc", "acc_bytes", "acc_mutual_info", "acc_norm", "em", "exact_match", "f1", "mc1", "mc2"}
)
#: Stakes of the gamblers whose mean wealth is the evidence, as shares of the most that is safe.
_STAKES = np.array([0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9])

#: What float sums make of a candidate that the best answers would make exactly equal.
ROUNDING = 1e-9

Results = Mapping[ItemRef, ItemResult]


@dataclass(frozen=True, slots=True)
class RacedTask:
    """One task of a race. weight: of its mean in the score, of any sign. differences: the
    candidate's value minus the incumbent's on the first items, each in [-1, 1]. total: its items.
    """

    weight: float
    differences: np.ndarray
    total: int


def evidence_against(tasks: Sequence[RacedTask], head_start: float = 0.0) -> float:
    """An e-process for "over all items, the candidate is at least as good as the incumbent".

    tasks: the first items of each task, the same fraction of each up to one item.
    head_start: what is known already of the score's difference, from tasks asked in full.

    Returns the largest wealth of the process so far: if the candidate is as good, the chance that
    this ever reaches 1 / alpha, however often it is looked at, is at most alpha over the draw of
    the order (Ville's inequality).

    The capital process of Waudby-Smith & Ramdas, "Estimating means of bounded random variables by
    betting" (JRSS-B 2024, arXiv 2010.09686), in its form for sampling without replacement: each
    bet is a factor 1 - stake * (z - m), where z is the weighted mean difference on one step's
    items, m the least it can be in expectation under the hypothesis given what was seen, and the
    stake at most 1 / (largest z - m). Wealth is the mean over gamblers with fixed stakes. A step
    takes one item of the smallest task and as many of each other as keep the fractions level;
    where they differ by less than an item, m is lowered by the most that this could matter.
    """
    steps = min(task.total for task in tasks)
    taken = min(((len(s.differences) + 1) * steps - 1) // s.total for s in tasks)
    weights = np.array([s.weight for s in tasks])
    totals = np.array([s.total for s in tasks])
    widest = float(np.abs(weights).sum())
    sums = [np.append(0.0, np.cumsum(s.differences)) for s in tasks]
    wealth, most = np.ones(len(_STAKES)), 1.0
    for step in range(taken):
        before, after = step * totals // steps, (step + 1) * totals // steps
        seen = np.array([sums[k][n] for k, n in enumerate(before)])
        fresh = np.array([sums[k][n] for k, n in enumerate(after)]) - seen
        left = totals - before
        ratio = float(np.median(totals / left))
        slack = float(np.abs(weights * (totals / left - ratio)).sum())
        least = -ratio * head_start - slack - float(weights @ (seen / left))
        room = widest - least
        if room < -ROUNDING:  # not even the best answers to all that is left would do
            return math.inf
        if room <= ROUNDING:  # only they would: a stake on anything else has no limit
            continue
        drawn = float(weights @ (fresh / (after - before)))
        wealth = wealth * (1.0 - _STAKES / room * (drawn - least))
        most = max(most, float(wealth.mean()))
    return most


@dataclass(frozen=True)
class Course:
    """A task set as races see it."""

    taskset: TaskSet

    @property
    def raceable(self) -> bool:
        return any(self._raced.values())

    def refs(self, rung: float) -> list[ItemRef]:
        """The items of a rung: that fraction of every task, all of tasks that cannot be raced."""
        found = []
        for task in self.taskset.tasks:
            order = self._order[task.name]
            count = self._count(task, rung) if task.name in self._raced else len(order)
            found += order[:count]
        return found

    def evidence(self, rung: float, mine: Results, incumbent: Results) -> tuple[float, float]:
        """(evidence against the candidate, its score minus the incumbent's) on a rung.

        No evidence where a value is outside [0, 1]: its metric is not what it is called.

        Raises:
            CandidateFailed: a metric that was asked in full is not finite.
        """
        tasks, fair = [], True
        for name, weight in self._raced.items():
            task = self.taskset.task(name)
            refs = self._order[name][: self._count(task, rung)]
            a = np.array([mine[ref].value for ref in refs])
            b = np.array([incumbent[ref].value for ref in refs])
            fair = fair and all(((v >= 0) & (v <= 1)).all() for v in (a, b))
            tasks.append(RacedTask(weight, a - b, len(self._order[name])))
        ahead = self._in_full(mine, incumbent) - self._in_full(incumbent, mine)
        total = ahead + sum(s.weight * float(s.differences.mean()) for s in tasks)
        return (evidence_against(tasks, ahead) if fair else 0.0), total

    def _in_full(self, results: Results, others: Results) -> float:
        """The part of a score that comes from tasks that are not raced, on items that both have."""
        total = 0.0
        for objective in self.taskset.objectives:
            for name, weight in _leaf_weights(self.taskset, objective).items():
                if name not in self._raced:
                    task = self.taskset.task(name)
                    refs = task.part("search")
                    both = [ref for ref in refs if ref in results and ref in others]
                    rows = [results[ref] for ref in both]
                    total += weight * self.taskset.aggregate(task, rows, both)
        return total

    def _count(self, task: ScoredTask, rung: float) -> int:
        """How many items of a raced task a rung has, by the steps of ``evidence_against``."""
        steps = min(len(self._order[name]) for name in self._raced)
        return math.ceil(rung * steps) * len(self._order[task.name]) // steps

    @cached_property
    def _order(self) -> dict[str, list[ItemRef]]:
        return {task.name: sorted(task.part("search"), key=_place) for task in self.taskset.tasks}

    @cached_property
    def _raced(self) -> dict[str, float]:
        """Weight in the score of each task of the objectives that can be raced."""
        found: dict[str, float] = {}
        for objective in self.taskset.objectives:
            bounded = all(self.taskset.task(leaf).metric in BOUNDED for leaf in objective.leaves)
            if bounded and self.taskset.is_mean(objective):
                found |= _leaf_weights(self.taskset, objective)
        return found


def _leaf_weights(taskset: TaskSet, objective: Objective) -> dict[str, float]:
    sizes = {name: len(taskset.task(name).search) for name in objective.leaves}
    shares = leaf_shares(objective.by_size, sizes)
    return {name: objective.signed_weight * share for name, share in shares.items()}


def _place(ref: ItemRef) -> tuple[str, int]:
    return hashlib.sha256(f"race:{ref.key}".encode()).hexdigest(), ref.index
