"""What candidates showed item by item, as the arrays that strategies learn from.

Where an objective is a mean over items, each item stands for itself: its signal is the margin if
every candidate has one there and the value says right or wrong, else the value. An objective that
is no mean (a perplexity, an F1) is one item with the metric as its value. The loser of a race has
the items of its rung, whatever else the ledger holds of it. Pays for nothing; knows no strategy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from agentmerge.evaluation.racing import Course
from agentmerge.evaluation.tasks import TaskSet
from agentmerge.strategies.base import Evidence, Items, Observation
from agentmerge.workers.base import ItemRef, ItemResult

Results = Mapping[ItemRef, ItemResult]


@dataclass(frozen=True)
class Witness:
    """Histories with their items, reading each candidate's results once.

    known: recipe hash -> what the ledger has of its search items.
    """

    taskset: TaskSet
    known: Callable[[str], Results]
    _read: dict[tuple[str, float], tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    def of(self, history: Sequence[Observation]) -> list[Observation]:
        """The same history; every scored observation has its evidence, all with the same items."""
        scored = [o for o in history if o.score is not None]
        if not scored:
            return list(history)
        for observation in scored:
            if _key(observation) not in self._read:
                self._read[_key(observation)] = self._columns(observation)
        values, margins = (np.stack([self._read[_key(o)][part] for o in scored]) for part in (0, 1))
        binary = np.isin(values, (0.0, 1.0)) | np.isnan(values)
        usable = (np.isfinite(margins) | np.isnan(values)).all(0) & binary.all(0)
        items = Items(*_layout(self.taskset), usable & np.isfinite(margins).any(0))
        signals = np.where(items.margins, margins, values)
        found = iter(zip(signals, values, strict=True))
        return [
            o if o.score is None else replace(o, evidence=Evidence(items, *next(found)))
            for o in history
        ]

    @cached_property
    def _course(self) -> Course:
        return Course(self.taskset)

    def _columns(self, observation: Observation) -> tuple[np.ndarray, np.ndarray]:
        """(values, margins) in the order of ``_layout``; NaN where there are none."""
        results = self.known(observation.recipe_hash)
        if observation.censored:
            results = {ref: results[ref] for ref in self._course.refs(observation.rung)}
        metrics = dict(observation.tasks)
        values: list[float] = []
        margins: list[float] = []
        for objective in self.taskset.objectives:
            if not self.taskset.is_mean(objective):
                values.append(metrics.get(objective.name, np.nan))
                margins.append(np.nan)
                continue
            for leaf in objective.leaves:
                for ref in self.taskset.task(leaf).part("search"):
                    result = results.get(ref)
                    values.append(np.nan if result is None else result.value)
                    none = result is None or result.margin is None
                    margins.append(np.nan if none or result is None else float(result.margin or 0))
        return np.array(values, float), np.array(margins, float)


def _key(observation: Observation) -> tuple[str, float]:
    return observation.recipe_hash, observation.rung


def _layout(taskset: TaskSet) -> tuple[np.ndarray, np.ndarray]:
    """(task number, weight) of each item."""
    tasks: list[int] = []
    weights: list[float] = []
    number = 0
    for objective in taskset.objectives:
        if not taskset.is_mean(objective):
            tasks.append(number)
            weights.append(objective.signed_weight)
            number += 1
            continue
        sizes = [len(taskset.task(leaf).part("search")) for leaf in objective.leaves]
        for size in sizes:
            share = size / sum(sizes) if objective.by_size else 1 / len(sizes)
            tasks += [number] * size
            weights += [objective.signed_weight * share / size] * size
            number += 1
    return np.array(tasks, int), np.array(weights, float)
