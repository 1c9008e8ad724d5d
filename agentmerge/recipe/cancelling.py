"""Weights of both signs that nearly cancel where a method divides by their sum.

ties and its kin divide each element by the weights that agree in its sign. Weights of one sign make
a mean of it; 1 and -0.98 a task vector that counts 50 times. mergekit makes that merge, and so do
we; it is told. Sums of all weights that cancel are refused elsewhere (``Recipe.effective``).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

from agentmerge.methods import RECIPE_METHODS, divides_by_agreeing

if TYPE_CHECKING:
    from agentmerge.recipe import Recipe

#: Times that a task vector may count before it is told.
TOLD_FROM = 10.0
#: Sources beyond which subsets are no longer looked at one by one.
_MOST = 10
#: As in ``CANCEL_SHARE``: what cancels further is not divided by.
_NOTHING = 1e-6


def cancelling_notes(recipe: Recipe) -> list[str]:
    """At most one sentence on a canonical recipe, and on each that is merged before it: the worst
    of its slices, filters and ends."""
    first = [note for _, merge in recipe.merges for note in cancelling_notes(merge)]
    method = RECIPE_METHODS[recipe.merge_method]
    switch = method.normalize_param
    if switch is None or not divides_by_agreeing(method):
        return first
    worst: tuple[float, list[float]] = (1.0, [])
    for piece in recipe.slices:
        settings = [dict(s.parameters)["weight"] for s in piece.sources if s.parameters]
        filters = {name for setting in settings for name in setting.filters}
        for name in filters | {None}:
            for t in (0.0, 1.0):
                weights = [value for s in settings if (value := s.at(name or "", t))]
                if recipe.shared(switch, piece, name or "", t):
                    worst = max(worst, (_times(weights), weights))
    times, weights = worst
    if times < TOLD_FROM:
        return first
    said = ", ".join(f"{weight:g}" for weight in weights)
    return [
        *first,
        f"the weights {said} nearly cancel where {method.name} divides by those that agree in "
        f"sign: task vectors may count {times:.0f} times; set {switch}: false or change a weight",
    ]


def _times(weights: Sequence[float]) -> float:
    """How often a task vector may count: the largest share of a sum of some of the weights."""
    if not any(w > 0 for w in weights) or not any(w < 0 for w in weights):
        return 1.0
    sizes = range(2, len(weights) + 1) if len(weights) <= _MOST else (2, len(weights))
    found = 1.0
    for size in sizes:
        for some in combinations(weights, size):
            total, whole = abs(sum(some)), sum(map(abs, some))
            if total > _NOTHING * whole:
                found = max(found, max(map(abs, some)) / total)
    return found
