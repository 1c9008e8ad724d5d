"""Which candidates are allowed: no task further below its best parent than the config permits.

A floor is set by the parents' own metrics on the search items, so it is known after generation 0. A
candidate's violation is what it lacks to its floors, in the metrics' own units; it is kept with the
candidate. Less violation ranks first, then more score. Answers may be bounded in length too: what
they lack is the share by which they are too long. What strategies learn from items have the
floors among them (``evidence.py``), so that they can predict what keeps them. Knows no strategy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from agentmerge.config import Constraint
from agentmerge.contracts.card import Compared
from agentmerge.contracts.operators import PARENT
from agentmerge.contracts.strategy import Observation
from agentmerge.evaluation.tasks import Objective
from agentmerge.ledger import Candidate

#: A strategy is told the score less this times the tasks' weights for each unit of violation.
PENALTY = 10.0
#: A drop of exactly ``max_drop`` is allowed, whatever float subtraction makes of it.
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Floor:
    """A task, and what its best parent has there. metric: in the task's own direction."""

    task: str
    max_drop: float
    higher_is_better: bool
    parent: Candidate
    metric: float

    @property
    def least(self) -> float:
        """The worst metric that is allowed, higher for better."""
        return (self.metric if self.higher_is_better else -self.metric) - self.max_drop

    def lacking(self, metric: float) -> float:
        """How far a metric is beyond the allowed drop, 0 where it is not."""
        sign = 1.0 if self.higher_is_better else -1.0
        beyond = self.least - sign * metric
        return beyond if beyond > _ROUNDING else 0.0

    def broken_by(self, tasks: Mapping[str, float], tokens: float | None) -> float:
        return self.lacking(tasks[self.task]) if self.task in tasks else 0.0


@dataclass(frozen=True, slots=True)
class Ceiling:
    """How long answers may be. most: tokens an item. parents: so many times the parents' mean,
    where that is what was asked."""

    most: float
    parents: float | None = None

    def lacking(self, tokens: float) -> float:
        """By what share answers are too long, 0 where they are not."""
        beyond = tokens / self.most - 1.0
        return beyond if beyond > _ROUNDING else 0.0

    def broken_by(self, tasks: Mapping[str, float], tokens: float | None) -> float:
        return 0.0 if tokens is None else self.lacking(tokens)


Limit = Floor | Ceiling


def floors(
    constraints: Sequence[Constraint],
    objectives: Sequence[Objective],
    candidates: Sequence[Candidate],
) -> list[Floor]:
    """One a constrained task; none where no parent was scored. A task's own wins over ``*``."""
    allowed = {c.task: c.max_drop for c in constraints}
    parents = _parents(candidates)
    found = []
    for objective in objectives:
        drop = allowed.get(objective.name, allowed.get("*"))
        if drop is None or not parents:
            continue
        sign = 1.0 if objective.higher_is_better else -1.0
        best = max(parents, key=lambda c: sign * dict(c.tasks)[objective.name])
        metric = dict(best.tasks)[objective.name]
        found.append(Floor(objective.name, drop, objective.higher_is_better, best, metric))
    return found


def ceilings(constraints: Sequence[Constraint], candidates: Sequence[Candidate]) -> list[Ceiling]:
    """The limit on answers' length, if there is one and what it is measured by is known."""
    lengths = [c.tokens for c in _parents(candidates) if c.tokens is not None]
    found = []
    for asked in (c.tokens for c in constraints if c.tokens is not None):
        if asked.most is not None:
            found.append(Ceiling(asked.most))
        elif asked.parents is not None and any(lengths):
            most = asked.parents * sum(lengths) / len(lengths)
            found.append(Ceiling(most, asked.parents))
    return found


def _parents(candidates: Sequence[Candidate]) -> list[Candidate]:
    return [c for c in candidates if c.operator == PARENT and c.score is not None and not c.prior]


def violation(
    found: Sequence[Limit], tasks: Mapping[str, float], tokens: float | None = None
) -> float:
    """What a candidate with these metrics, and answers so long, lacks, all limits together."""
    return sum(limit.broken_by(tasks, tokens) for limit in found)


def steepness(objectives: Sequence[Objective]) -> float:
    """What each unit of violation takes from the score that a strategy is told."""
    return PENALTY * sum(abs(objective.weight) for objective in objectives)


def penalised(history: Sequence[Observation], objectives: Sequence[Objective]) -> list[Observation]:
    """The history as strategies are told it: a violation lowers the score steeply.

    Linear, so that the way back is seen from afar, and the same for every generation, so that a
    strategy that is rebuilt from its history is told what it was told before.
    """
    steep = steepness(objectives)
    return [
        replace(o, score=o.score - steep * o.violation)
        if o.violation and o.score is not None
        else o
        for o in history
    ]


def kept(
    found: Sequence[Limit], answer: Compared, parents: Sequence[Compared]
) -> list[dict[str, Any]]:
    """The closing card's rows: each floor, what the answer has there, on search and sealed items.

    answer, parents: rows of the card; on sealed items the best parent is found anew.
    """
    rows: list[dict[str, Any]] = []
    for floor in found:
        if isinstance(floor, Ceiling):
            rows.append(_short_enough(floor, answer))
            continue
        metric = answer.tasks[floor.task]
        row = {
            "task": floor.task,
            "max_drop": floor.max_drop,
            "best_parent": floor.parent.label,
            "parent": floor.metric,
            "answer": metric,
            "kept": not floor.lacking(metric),
        }
        sealed = [p.sealed_tasks[floor.task] for p in parents if p.sealed_tasks]
        if sealed and answer.sealed_tasks:
            best = max(sealed) if floor.higher_is_better else min(sealed)
            mine = answer.sealed_tasks[floor.task]
            held = not replace(floor, metric=best).lacking(mine)
            row |= {"sealed_parent": best, "sealed_answer": mine, "sealed_kept": held}
        rows.append(row)
    return rows


def _short_enough(ceiling: Ceiling, answer: Compared) -> dict[str, Any]:
    row: dict[str, Any] = {"tokens": {"most": ceiling.most, "parents": ceiling.parents}}
    if answer.tokens is not None:
        row |= {"answer": answer.tokens, "kept": not ceiling.lacking(answer.tokens)}
    if answer.sealed_tokens is not None:
        held = not ceiling.lacking(answer.sealed_tokens)
        row |= {"sealed_answer": answer.sealed_tokens, "sealed_kept": held}
    return row
