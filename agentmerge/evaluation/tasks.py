"""What every candidate is asked: objectives, their tasks and items, and how values become a score.

A task's items are in one fixed order, the same for every candidate, and each is either a search
item or a sealed one. Knows lm-eval's rules of aggregation by name only; finding and rendering the
tasks is ``loading.py`` and ``rendering.py``, asking a model is ``scoring.py``. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from agentmerge.contracts.worker import ItemRef, ItemResult
from agentmerge.errors import AnswerRefused, CandidateFailed, TaskError
from agentmerge.evaluation.aggregation import OF_VALUES, WITH_STATICS, Rebuild, aggregation_of

if TYPE_CHECKING:
    from agentmerge.evaluation.playing import JudgedTask
    from agentmerge.evaluation.rendering import Asked, ServedTask

Part = Literal["search", "sealed"]
MarginKind = Literal["choice", "token"]


@dataclass(frozen=True, slots=True)
class ScoredTask:
    """One lm-eval task (a leaf, never a group) with the items that are asked.

    search, sealed: positions in ``items``, disjoint; together all of them but what an earlier
        search saw (``splitting.unsealed``). Where other tasks are sealed and this one has too few
        items for it, its search items stand for both.
    protocol_hash: everything about how it is asked that is not an item.
    rebuild: how the metric comes back from stored values: "plain" (values), "weighted"
        (log-likelihoods, with the counts of words or bytes in ``statics``), "class" (predicted
        classes, with the gold ones in ``statics``), "one_hot" (squared distances from the right
        answer), "whole" (``ItemResult.whole``).
    objective: the entry of the config it belongs to; its own name unless that is a group.
    """

    name: str
    weight: float
    metric: str
    filter: str
    higher_is_better: bool
    output_type: str
    margin_kind: MarginKind | None
    protocol_hash: str
    items: tuple[ItemRef, ...]
    search: tuple[int, ...]
    sealed: tuple[int, ...] = ()
    rebuild: Rebuild = "plain"
    statics: tuple[float, ...] = ()
    objective: str = ""

    def part(self, part: Part) -> tuple[ItemRef, ...]:
        return tuple(self.items[i] for i in (self.search if part == "search" else self.sealed))


@dataclass(frozen=True, slots=True)
class Objective:
    """One entry of the config: a task, or a group of leaf tasks and how lm-eval averages them."""

    name: str
    weight: float
    higher_is_better: bool
    leaves: tuple[str, ...]
    by_size: bool = False

    @property
    def signed_weight(self) -> float:
        """Lower-is-better metrics with a positive weight count against; a negative one stands."""
        return self.weight if self.higher_is_better or self.weight < 0 else -self.weight


@dataclass(frozen=True, slots=True)
class Score:
    """value: weighted sum, higher is better. tasks: (objective, metric), unweighted."""

    value: float
    tasks: tuple[tuple[str, float], ...]


def _mean(values: list[Any]) -> Any:
    return sum(values) / len(values)


@dataclass(frozen=True)
class TaskSet:
    """All objectives of a search.

    notes: what a reader of the results must know (sealing off, no chat template, ...).
    aggregations: leaf task -> lm-eval's own aggregation function; a plain mean where it is absent.
    asked: leaf task -> the rendered requests; empty where nothing is asked of a real model.
    protocols: leaf task -> what its ``protocol_hash`` is the hash of, for the record.
    judged: of the leaf tasks those whose answers a judge grades, and how they are played.
    served: leaf task -> the program that asks the live candidate itself.
    """

    tasks: tuple[ScoredTask, ...]
    objectives: tuple[Objective, ...]
    notes: tuple[str, ...] = ()
    aggregations: Mapping[str, Callable[[list[Any]], Any]] = field(default_factory=dict, repr=False)
    asked: Mapping[str, Asked] = field(default_factory=dict, repr=False)
    protocols: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, repr=False)
    judged: Mapping[str, JudgedTask] = field(default_factory=dict, repr=False)
    served: Mapping[str, ServedTask] = field(default_factory=dict, repr=False)

    def task(self, name: str) -> ScoredTask:
        for task in self.tasks:
            if task.name == name:
                return task
        raise TaskError(f"no task {name!r} here; there are {', '.join(t.name for t in self.tasks)}")

    def refs(self, part: Part = "search") -> tuple[ItemRef, ...]:
        """Every item of a part, task by task, in the fixed order."""
        return tuple(ref for task in self.tasks for ref in task.part(part))

    def is_mean(self, objective: Objective) -> bool:
        """Whether an objective is a mean over items, so that an item's value adds to the score.

        Where it is not (a perplexity, an F1), only the whole metric says something.
        """
        return all(
            self.task(leaf).rebuild in OF_VALUES
            and aggregation_of(self.aggregations.get(leaf)).mean
            for leaf in objective.leaves
        )

    def item_sign(self, task: ScoredTask) -> float | None:
        """1 where a higher stored value of an item is better, -1 where a lower one is.

        None where a value says nothing by itself (a predicted class).
        """
        if task.rebuild == "class":
            return None
        falls = aggregation_of(self.aggregations.get(task.name)).falls or task.rebuild == "weighted"
        return 1.0 if task.higher_is_better != falls else -1.0

    def aggregate(
        self,
        task: ScoredTask,
        results: Sequence[ItemResult],
        items: Sequence[ItemRef] | None = None,
    ) -> float:
        """The task's metric from stored values alone, by lm-eval's own aggregation.

        items: which item each result belongs to; by default the search items, in order.

        Raises:
            CandidateFailed: the metric is not finite.
            AnswerRefused: the aggregation raised.
        """
        items = task.part("search") if items is None else items
        if len(items) != len(results) or not results:
            raise ValueError(f"{task.name}: {len(results)} results for {len(items)} items")
        # lm-eval adds up in the order of the documents: so do we, to the last bit.
        order = sorted(range(len(items)), key=lambda i: items[i].index)
        values: list[Any] = [results[i].value for i in order]
        if task.rebuild == "whole":
            values = [results[i].whole for i in order]
        if task.rebuild in WITH_STATICS:
            place = {ref: i for i, ref in enumerate(task.items)}
            statics = [task.statics[place[items[i]]] for i in order]
            if task.rebuild == "weighted":
                values = [(v, int(s)) for v, s in zip(values, statics, strict=True)]
            else:
                values = [(int(s), int(v)) for v, s in zip(values, statics, strict=True)]
        try:
            combine: Callable[[list[Any]], Any] = self.aggregations.get(task.name, _mean)
            metric = float(combine(values))
        except OverflowError:  # a perplexity beyond any float
            metric = math.inf
        except Exception as error:  # the author's own code, or scikit-learn's
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise AnswerRefused(
                f"the aggregation of {task.metric} of task {task.name!r} raised {reason}, at the "
                f"values {str(values)[:200]}"
            ) from error
        if not math.isfinite(metric):
            raise CandidateFailed(f"{task.metric} of task {task.name!r} is {metric}")
        return metric

    def combine(
        self, leaves: Mapping[str, float], sizes: Mapping[str, int] | None = None
    ) -> dict[str, float]:
        """Metrics of leaf tasks -> metrics of objectives; groups by lm-eval's rule.

        sizes: items a leaf, for groups weighted by size; by default those of the search part.
        """
        scores = {}
        for objective in self.objectives:
            share = {
                name: (sizes[name] if sizes else len(self.task(name).search))
                if objective.by_size
                else 1
                for name in objective.leaves
            }
            total = sum(leaves[name] * share[name] for name in objective.leaves)
            scores[objective.name] = total / sum(share.values())
        return scores

    def objective(self, task_scores: Mapping[str, float]) -> float:
        """The weighted sum of the objectives' metrics, higher is better."""
        return sum(o.signed_weight * task_scores[o.name] for o in self.objectives)

    @property
    def generating(self) -> tuple[ScoredTask, ...]:
        """The tasks whose answers are generated, and so have a length."""
        return tuple(task for task in self.tasks if task.output_type == "generate_until")

    def tokens(self, results: Mapping[ItemRef, ItemResult], part: Part = "search") -> float | None:
        """Generated tokens an item, of the tasks that generate; None where none does, or of some
        item nobody counted."""
        counts = self.lengths(results, part)
        known = [count for count in counts if count is not None]
        return sum(known) / len(known) if known and len(known) == len(counts) else None

    def lengths(self, results: Mapping[ItemRef, ItemResult], part: Part) -> list[int | None]:
        """Generated tokens of each item that has a result, of the tasks that generate."""
        refs = [ref for task in self.generating for ref in task.part(part) if ref in results]
        return [results[ref].tokens for ref in refs]

    def score(
        self,
        results: Mapping[ItemRef, ItemResult],
        part: Part = "search",
        beside: tuple[Mapping[str, float], Mapping[ItemRef, ItemResult]] | None = None,
    ) -> Score:
        """Everything above in one: items' results -> score.

        beside: another candidate's metrics and results. Where an item has no verdict, a task's
            metric is that one's and how far this one is ahead on the items that both have, so that
            who misses hard items is no better for it. Without, it is that of the items there are.

        Raises:
            KeyError: an item of the part has no result; of a judged task, where one that is left
                out is without a verdict, none.
            CandidateFailed: a metric is not finite, or a task's items are all without a verdict.
        """
        leaves, sizes = {}, {}
        for task in self.tasks:
            items = task.part(part)
            if not items:
                raise ValueError(f"task {task.name!r} has no {part} items")
            there = [ref for ref in items if not self._is_missing(task, results, ref)]
            if not there:
                raise CandidateFailed(f"the judge of task {task.name!r} gave no verdict")
            leaves[task.name] = self.aggregate(task, [results[ref] for ref in there], there)
            if len(there) < len(items) and beside is not None:
                metrics, theirs = beside
                both = [ref for ref in there if ref in theirs]
                if both:
                    mine, other = (
                        self.aggregate(task, [rows[ref] for ref in both], both)
                        for rows in (results, theirs)
                    )
                    leaves[task.name] = metrics[task.objective] + mine - other
            sizes[task.name] = len(items)
        scores = self.combine(leaves, sizes)
        return Score(self.objective(scores), tuple(scores.items()))

    def _is_missing(
        self, task: ScoredTask, results: Mapping[ItemRef, ItemResult], ref: ItemRef
    ) -> bool:
        absent = task.name in self.judged and ref not in results
        return absent or results[ref].missing


def leaf_shares(by_size: bool, sizes: Mapping[str, int]) -> dict[str, float]:
    """What each leaf task counts in its objective's metric; together 1. sizes: items of each."""
    total = sum(sizes.values())
    return {n: size / total if by_size else 1 / len(sizes) for n, size in sizes.items()}
