"""What each task counts in a score, and how far two scores are apart by chance of the items."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from agentmerge.contracts.strategy import Observation
from agentmerge.contracts.worker import ItemRef, ItemResult
from agentmerge.evaluation.tasks import TaskSet

Results = Mapping[ItemRef, ItemResult]


def leaf_shares(by_size: bool, sizes: Mapping[str, int]) -> dict[str, float]:
    """What each leaf task counts in its objective's metric; together 1. sizes: items of each."""
    total = sum(sizes.values())
    return {n: size / total if by_size else 1 / len(sizes) for n, size in sizes.items()}


@dataclass(frozen=True)
class PairedNoise:
    """One standard error of the difference of two scores, item by item over the search items; 0
    where the score is no mean over items.

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
        if not all(map(self.taskset.is_mean, self.taskset.objectives)):
            return 0.0
        mine, theirs = map(self.known, pair)
        found = self._apart(mine, theirs) if mine and theirs else 0.0
        if len(mine) == len(theirs) == len(set(self.taskset.refs("search"))):
            self._found[pair] = found
        return found

    def _apart(self, mine: Results, theirs: Results) -> float:
        variance = 0.0
        for objective in self.taskset.objectives:
            parts = {name: self.taskset.task(name).part("search") for name in objective.leaves}
            sizes = {name: len(refs) for name, refs in parts.items()}
            for name, share in leaf_shares(objective.by_size, sizes).items():
                both = [ref for ref in parts[name] if ref in mine and ref in theirs]
                gaps = [mine[ref].value - theirs[ref].value for ref in both]
                if len(gaps) > 1:
                    weight = objective.signed_weight * share
                    variance += weight**2 * statistics.variance(gaps) / len(gaps)
        return math.sqrt(variance)
