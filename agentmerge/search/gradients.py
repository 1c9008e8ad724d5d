"""Gradients for a search: what is asked of which items, once, and kept in the ledger.

The loss mixes tasks as the objective does, so that its slope points where the score should go. A
gradient is kept tensor by tensor under the parents' fingerprints, so that any search space and any
later search can read it. Knows no strategy; the chain rule is ``strategies.chain_rule``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Protocol

from agentmerge.contracts.worker import EngineInfo, Gradient, ItemRef, Loss
from agentmerge.evaluation.tasks import ScoredTask, TaskSet
from agentmerge.ledger import GradientKey, Ledger
from agentmerge.recipe import Recipe


class GradientPool(Protocol):
    """The worker pool, as gradients need it."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def differentiates(self) -> bool: ...

    def gradient(
        self,
        recipe: Recipe,
        refs: Sequence[ItemRef],
        loss: Loss,
        weights: Sequence[float],
        wanted: Callable[[], bool] = ...,
    ) -> tuple[Gradient, float]: ...


@dataclass(frozen=True, slots=True)
class Gradients:
    """The one way to a search's gradients. identities: model name -> content fingerprint."""

    ledger: Ledger
    taskset: TaskSet
    pool: GradientPool
    identities: Mapping[str, str]

    @property
    def possible(self) -> bool:
        """Whether the workers have gradients, and a task with any weight has gold answers."""
        return self.pool.differentiates and bool(item_weights(self.taskset))

    def ask(
        self,
        recipe: Recipe,
        recipe_hash: str,
        loss: Loss,
        wanted: Callable[[], bool] = lambda: True,
    ) -> tuple[GradientKey, Gradient, float]:
        """(key, gradient over the search items, seconds); from the ledger where it is, unsaved
        where it is new.

        Raises:
            CandidateFailed, NotBegun, WorkerLost: as the pool does.
        """
        weights = item_weights(self.taskset)
        key = GradientKey(recipe_hash, self.pool.info, self._question(weights, loss))
        known = self.ledger.gradient(key)
        seconds = 0.0
        if known is None:
            found, seconds = self.pool.gradient(
                recipe, list(weights), loss, list(weights.values()), wanted
            )
            known = renamed(found, self.identities)
        return key, known, seconds

    def named(self, gradient: Gradient) -> Gradient:
        """A kept gradient under this search's names of the models."""
        return renamed(gradient, {value: name for name, value in self.identities.items()})

    def _question(self, weights: Mapping[ItemRef, float], loss: Loss) -> str:
        protocols = {task.name: task.protocol_hash for task in self.taskset.tasks}
        body = [(protocols[ref.task], ref.key, weight) for ref, weight in weights.items()]
        return sha256(json.dumps([loss, body]).encode()).hexdigest()[:32]


def item_weights(taskset: TaskSet) -> dict[ItemRef, float]:
    """What each search item's loss counts: its share of the objective, negative where a task's
    metric should fall. Tasks without a gold answer or without weight are not there."""
    found: dict[ItemRef, float] = {}
    for objective in taskset.objectives:
        parts = {name: taskset.task(name).part("search") for name in objective.leaves}
        total = sum(map(len, parts.values()))
        for name, items in parts.items():
            share = 1.0 / total if objective.by_size else 1.0 / (len(parts) * len(items))
            # A metric that should be low (a perplexity) falls as the gold text gets likelier.
            weight = objective.weight if objective.higher_is_better else abs(objective.weight)
            if weight and _has_gold(taskset.task(name)):
                for ref in items:
                    found[ref] = found.get(ref, 0.0) + weight * share
    return found


def renamed(gradient: Gradient, names: Mapping[str, str]) -> Gradient:
    tensors = tuple(
        replace(t, weights=tuple((names.get(model, model), slope) for model, slope in t.weights))
        for t in gradient.tensors
    )
    return replace(gradient, tensors=tensors)


def _has_gold(task: ScoredTask) -> bool:
    return task.margin_kind is not None or task.output_type.startswith("loglikelihood")
