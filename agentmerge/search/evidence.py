"""What candidates showed item by item, as the arrays that strategies learn from.

Where an objective is a mean over items, each item stands for itself: its signal is the margin if
every candidate has one there and the value says right or wrong, else the value. An objective that
is no mean (a perplexity, an F1) is one item with the metric as its value. The loser of a race has
the items of its rung, whatever else the ledger holds of it; a candidate from before a branch that
asks something else has what is asked still. Where answers' length matters, the tokens of what is
generated are items too, which add nothing to the score. Pays for nothing; knows no strategy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from agentmerge.contracts.strategy import Bound, Evidence, History, Items, Observation
from agentmerge.contracts.worker import ItemRef, ItemResult
from agentmerge.evaluation.racing import Course
from agentmerge.evaluation.tasks import Score, TaskSet, leaf_shares
from agentmerge.search.constraints import Ceiling, Limit, steepness, violation

Results = Mapping[ItemRef, ItemResult]


@dataclass(frozen=True)
class ItemTable:
    """Histories with their items, reading each candidate's results once.

    known: recipe hash -> what the ledger has of its search items. counted: whether lengths matter;
    traded: whether short answers are an objective.
    """

    taskset: TaskSet
    known: Callable[[str], Results]
    counted: bool = False
    traded: bool = False
    _read: dict[Any, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    def of(self, history: History, floors: Sequence[Limit] = ()) -> list[Observation]:
        """The same history; what was scored has its evidence, all with the same items.

        floors: what candidates must keep; the items say what it is made of.
        """
        scored = [o for o in history if not (o.failed or o.pending)]
        if not scored:
            return list(history)
        for observation in scored:
            if _key(observation) not in self._read:
                self._read[_key(observation)] = self._columns(observation)
        values, margins = (np.stack([self._read[_key(o)][part] for o in scored]) for part in (0, 1))
        binary = np.isin(values, (0.0, 1.0)) | np.isnan(values)
        usable = (np.isfinite(margins) | np.isnan(values)).all(0) & binary.all(0)
        task, share, documents = _layout(self.taskset, self.counted)
        objectives = self.taskset.objectives
        weight = share * np.array([*(o.signed_weight for o in objectives), 0.0])[task]
        bounds = tuple(self._bound(floor, task, share) for floor in floors)
        shows = usable & np.isfinite(margins).any(0)
        tokens = np.where(task == len(objectives), share, 0.0) if self.counted else None
        items = Items(task, weight, shows, documents, bounds, tokens, self.traded)
        signals = np.where(items.margins, margins, values)
        found = iter(zip(signals, values, strict=True))
        return [
            o if o.failed or o.pending else replace(o, evidence=Evidence(items, *next(found)))
            for o in history
        ]

    def _bound(self, floor: Limit, task: np.ndarray, share: np.ndarray) -> Bound:
        if isinstance(floor, Ceiling):
            lengths = np.where(task == len(self.taskset.objectives), share / floor.most, 0.0)
            return Bound(lengths, -1.0, -1.0, steepness(self.taskset.objectives))
        names = [objective.name for objective in self.taskset.objectives]
        mine = np.where(task == names.index(floor.task), share, 0.0)
        sign = 1.0 if floor.higher_is_better else -1.0
        return Bound(mine, sign, floor.least, steepness(self.taskset.objectives))

    @cached_property
    def _course(self) -> Course:
        return Course(self.taskset)

    def _columns(self, observation: Observation) -> tuple[np.ndarray, np.ndarray]:
        """(values, margins) in the order of ``_layout``; NaN where there are none."""
        results = self.known(observation.recipe_hash)
        if observation.censored:
            rung = self._course.refs(observation.rung)
            results = {ref: results[ref] for ref in rung if ref in results}
        metrics = {} if observation.prior else dict(observation.tasks)
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
        for task in self.taskset.generating if self.counted else ():
            for ref in task.part("search"):
                result = results.get(ref)
                none = result is None or result.tokens is None
                values.append(np.nan if none or result is None else float(result.tokens or 0))
                margins.append(np.nan)
        return np.array(values, float), np.array(margins, float)


def _key(observation: Observation) -> tuple[str, float, bool]:
    return observation.recipe_hash, observation.rung, observation.prior


def comparable(
    history: History, now: Callable[[str], Score | None], bounds: Sequence[Limit] = ()
) -> list[Observation]:
    """The same history; what other settings asked for has its score under the present ones, or
    none, and no gradient.

    now: recipe hash -> that score, None where it is not known. bounds: the present floors.
    """
    return [_as_now(o, now(o.recipe_hash), bounds) if o.prior else o for o in history]


def _as_now(o: Observation, score: Score | None, bounds: Sequence[Limit]) -> Observation:
    o = replace(o, score=None, gradient=None, loss=None, violation=0.0, tokens=None)
    if score is None:
        return o
    lacks = violation(bounds, dict(score.tasks))
    return replace(o, score=score.value, tasks=score.tasks, rung=1.0, violation=lacks)


def _layout(taskset: TaskSet, counted: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(objective's number, share in its metric, documents it stands for) of each item.

    counted: with the lengths of what is generated, after all objectives, whose mean is theirs.
    """
    tasks: list[int] = []
    shares: list[float] = []
    documents: list[int] = []
    for number, objective in enumerate(taskset.objectives):
        sizes = {leaf: len(taskset.task(leaf).part("search")) for leaf in objective.leaves}
        if not taskset.is_mean(objective):
            tasks.append(number)
            shares.append(1.0)
            documents.append(sum(sizes.values()))
            continue
        for leaf, share in leaf_shares(objective.by_size, sizes).items():
            size = sizes[leaf]
            tasks += [number] * size
            shares += [share / size] * size
            documents += [1] * size
    lengths = sum(len(task.part("search")) for task in taskset.generating) if counted else 0
    tasks += [len(taskset.objectives)] * lengths
    shares += [1.0 / max(lengths, 1)] * lengths
    documents += [1] * lengths
    return np.array(tasks, int), np.array(shares, float), np.array(documents, float)
