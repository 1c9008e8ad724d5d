"""The trade between score and length: what nothing dominates, and the area that a point adds.

A point dominates another where it scores no less and is no longer, and is better in one of them.
The area that a front dominates is counted from a ``Worst`` that the parents set, so that it is the
same from the first candidate to the last; in two dimensions it is a sum of rectangles. Arrays and
numbers only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from agentmerge.contracts.operators import PARENT
from agentmerge.contracts.strategy import History, Observation

#: Points of a front that are shown, and asked the sealed items, at most.
SHOWN = 8
#: How far beyond the worst parent the area begins, as a share of what the parents differ by.
BEYOND = 0.1


@dataclass(frozen=True, slots=True)
class Worst:
    """From where a front's area counts. unit: how many tokens are as wide as 1."""

    score: float
    tokens: float
    unit: float

    @classmethod
    def of(
        cls, scores: Sequence[float] | np.ndarray, tokens: Sequence[float] | np.ndarray
    ) -> Worst:
        """A little beyond the worst of both, so that each of these adds to the area."""
        low, high = float(np.min(scores)), float(np.max(scores))
        short, long = float(np.min(tokens)), float(np.max(tokens))
        longest = long + BEYOND * ((long - short) or long or 1.0)
        least = low - BEYOND * ((high - low) or abs(high) or 1.0)
        return cls(least, longest, longest - short)


@dataclass(frozen=True, slots=True, eq=False)
class Front:
    """scores, savings: (k,) of what nothing dominates, by rising score: how far each is above the
    worst score, and how much shorter than the longest answer, in its unit. None is below 0."""

    worst: Worst
    scores: np.ndarray
    savings: np.ndarray

    @classmethod
    def of(cls, worst: Worst, scores: np.ndarray, tokens: np.ndarray) -> Front:
        kept = undominated(scores, tokens)[::-1]
        above, shorter = _from(worst, scores[kept], tokens[kept])
        inside = (above > 0) & (shorter > 0)
        return cls(worst, above[inside], shorter[inside])

    def told(self, score: float, tokens: float) -> Front:
        """With one more point."""
        found = self.points
        return Front.of(self.worst, *np.vstack([found, [score, tokens]]).T)

    @property
    def points(self) -> np.ndarray:
        """(k, 2) scores and tokens."""
        tokens = self.worst.tokens - self.savings * self.worst.unit
        return np.column_stack([self.scores + self.worst.score, tokens])

    @property
    def area(self) -> float:
        """What the front dominates, in score."""
        return float(np.diff(self.scores, prepend=0.0) @ self.savings)

    def added(self, scores: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """(c,) by how much each of (c,) points would enlarge the area."""
        above, shorter = _from(self.worst, scores, tokens)
        edges, levels = self._steps
        wide = np.diff(np.minimum(np.maximum(above, 0.0)[:, None], edges), axis=1)
        found: np.ndarray = (wide * np.maximum(shorter[:, None] - levels, 0.0)).sum(1)
        return found

    def slopes(self, score: float, tokens: float) -> tuple[float, float]:
        """(d added / d score, d added / d tokens) at one point."""
        above, shorter = (float(x) for x in _from(self.worst, score, tokens))
        edges, levels = self._steps
        if above <= 0.0:
            return 0.0, 0.0
        wide = np.diff(np.minimum(above, edges))
        step = int(np.searchsorted(edges, above, side="left")) - 1
        by_score = max(shorter - float(levels[step]), 0.0)
        return by_score, -float(wide[shorter > levels].sum()) / self.worst.unit

    @property
    def _steps(self) -> tuple[np.ndarray, np.ndarray]:
        """(edges (k + 2,) of the staircase along scores, its levels (k + 1,) between them)."""
        return np.concatenate([[0.0], self.scores, [np.inf]]), np.append(self.savings, 0.0)


def _from(worst: Worst, scores: np.ndarray | float, tokens: np.ndarray | float) -> tuple[
    np.ndarray, np.ndarray
]:  # fmt: skip
    return (
        np.asarray(scores) - worst.score,
        (worst.tokens - np.asarray(tokens)) / worst.unit,
    )


def undominated(scores: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Places of what nothing dominates, by falling score; of equals the first."""
    found, shortest = [], np.inf
    for place in np.lexsort((np.arange(len(scores)), tokens, -np.asarray(scores))):
        if tokens[place] < shortest:
            found.append(int(place))
            shortest = tokens[place]
    return np.array(found, int)


def worst_of(history: History) -> Worst | None:
    """What the parents set; None where none has both a score and a length."""
    parents = [o for o in history if o.operator == PARENT and _placed(o)]
    if not parents:
        return None
    return Worst.of(list(map(_unpunished, parents)), [o.tokens or 0.0 for o in parents])


def _unpunished(o: Observation) -> float:
    """A score without what a broken constraint took from the one that strategies are told: each
    expert is below a floor that another sets, and most of the area would lie below them all."""
    bounds = () if o.evidence is None else o.evidence.items.bounds
    return (o.score or 0.0) + (o.violation * bounds[0].steep if bounds else 0.0)


def by_area(history: History) -> list[Observation]:
    """The same history, each score replaced by the area of the front up to it, so that whatever
    asks what was gained hears of the front."""
    worst = worst_of(history)
    if worst is None:
        return list(history)
    front = Front(worst, np.zeros(0), np.zeros(0))
    found = []
    for o in history:
        if _placed(o) and not o.violation and o.score is not None and o.tokens is not None:
            front = front.told(o.score, o.tokens)
        found.append(o if o.score is None else replace(o, score=front.area))
    return found


def traded(history: History) -> bool:
    """Whether short answers are an objective too."""
    told = next((o.evidence for o in reversed(history) if o.evidence is not None), None)
    return told is not None and told.items.traded


def _placed(o: Observation) -> bool:
    return o.score is not None and o.tokens is not None and not o.prior and not o.censored
