"""What searches are held against: a space, first points that every arm gets, and what points show.

A problem answers from a cache where it can: its answers depend on the point and the seed alone, so
that what one arm asked costs the next one nothing. Knows no strategy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from agentmerge.contracts.strategy import Evidence, Items
from agentmerge.space import seeds
from agentmerge.space.grouped import SearchSpace


@dataclass(frozen=True, slots=True, eq=False)
class Shown:
    """A point's score (None: it failed), what its items showed, and the slope of a loss there."""

    score: float | None
    evidence: Evidence | None = None
    gradient: tuple[float, ...] | None = None
    loss: float | None = None


class Problem(Protocol):
    """tasks: their names, in the order of the items' numbers; all count the same. Vectors are in
    the unit box of ``space``. A score is what its items' values sum to, weighted."""

    name: str
    space: SearchSpace
    tasks: tuple[str, ...]

    def first_points(self) -> Sequence[tuple[str, str, tuple[float, ...]]]:
        """(operator, label, vector) of the cheap rivals, evaluated first by every arm."""
        ...

    def evaluate(self, vector: Sequence[float]) -> Shown: ...

    def gradient(self, vector: Sequence[float]) -> Shown:
        """As ``evaluate``, with the coefficients' gradient of a smooth score."""
        ...

    def sealed(self, vector: Sequence[float]) -> np.ndarray:
        """Weighted values of the sealed items: their sum is the sealed score."""
        ...


def first_points(space: SearchSpace) -> list[tuple[str, str, tuple[float, ...]]]:
    """The product's generation 0: parents, uniform merges along the scale, the depth line."""
    found = [("parent", label, point) for label, _, point in seeds.parents(space)]
    found.append(("uniform", "uniform", space.uniform()[1]))
    found += [("scale", label, point) for label, _, point in seeds.scale_points(space)]
    found += [("depth", label, point) for label, _, point in seeds.depth_line(space)]
    return [(operator, label, point) for operator, label, point in found if point is not None]


class KeptAnswers(ABC):
    """A problem whose items all count the same: each point is asked once, and what it showed kept.

    _items: what the search items are. _search: what ``_ask`` takes to ask them.
    """

    space: SearchSpace
    _items: Items
    _search: Any
    _known: dict[tuple[float, ...], Shown]

    @abstractmethod
    def _ask(self, vector: Sequence[float], items: Any) -> tuple[np.ndarray, np.ndarray]:
        """(values, margins) of the items at a point."""

    def first_points(self) -> list[tuple[str, str, tuple[float, ...]]]:
        return first_points(self.space)

    def evaluate(self, vector: Sequence[float]) -> Shown:
        key = tuple(float(x) for x in vector)
        if key not in self._known:
            self.known(key, *self._ask(key, self._search))
        return self._known[key]

    def known(self, vector: Sequence[float], values: np.ndarray, margins: np.ndarray) -> Shown:
        """What a point showed, kept: the values and margins of its search items."""
        shown = Shown(float(values.mean()), Evidence(self._items, margins, values))
        return self._known.setdefault(tuple(float(x) for x in vector), shown)

    def gradient(self, vector: Sequence[float]) -> Shown:
        """The score alone, where a problem has no gradients."""
        return self.evaluate(vector)
