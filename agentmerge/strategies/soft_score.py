"""From what items show to a score that is smooth, with its slope; and the scale of each item.

An item with a margin counts as right with probability Phi(margin / softening). Another counts with
its value, told to the model as its logarithm where it has one sign and spans decades (a
perplexity), and with a fence against the far worse, since one broken merge would otherwise bend
every length scale. What a constraint asks for is part of the score: each task's metric is predicted
too. Knows numbers only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import ndtr

from agentmerge.contracts.strategy import Bound

#: Widths of a step from margin to right, in nats, that are tried; the most likely is used.
SOFTENINGS = (0.5, 0.7, 1.0, 1.4, 2.0, 3.0, 4.0)
#: From this ratio on between an item's values, they are told as logarithms.
DECADES = 10.0
#: How far worse than the median a value may look, in quartiles of all distances from it.
FENCE = 30.0
#: Largest value, or its inverse, that any arithmetic meets.
LARGEST = 1e100
#: A bound is moved by how far soft metrics are from true ones at so many candidates near it.
NEAR = 5


@dataclass(frozen=True, eq=False)
class SoftScore:
    """weight, margins: (m,); softening: (m,), in nats. decades: (m,) 0 where a signal is the value
    itself, 1 or -1 where it is the logarithm of the value or of minus the value. tokens: as
    ``Items`` has them."""

    weight: np.ndarray
    margins: np.ndarray
    softening: np.ndarray
    decades: np.ndarray
    bounds: tuple[Bound, ...] = ()
    tokens: np.ndarray | None = None

    def values(self, signals: np.ndarray) -> np.ndarray:
        """What is expected of each item, (..., m) -> (..., m)."""
        if self.margins.all():  # most of what a search thinks about
            right: np.ndarray = ndtr(signals / self.softening)
            return right
        found = np.where(self.margins, ndtr(signals / self.softening), signals)
        if self.decades.any():
            most = np.log(LARGEST)
            found = np.where(
                self.decades != 0, self.decades * np.exp(np.clip(signals, -most, most)), found
            )
        return found

    def __call__(self, signals: np.ndarray) -> np.ndarray:
        """(..., m) -> (...)."""
        values = self.values(signals)
        found: np.ndarray = values @ self.weight
        for bound in self.bounds:
            found = found - bound.steep * np.maximum(bound.lacking(values), 0.0)
        return found

    def length(self, signals: np.ndarray) -> np.ndarray:
        """Tokens an item, (..., m) -> (...), where they are an objective."""
        found: np.ndarray = np.maximum(self.values(signals) @ self.tokens, 0.0)
        return found

    def length_slope(self, signals: np.ndarray) -> np.ndarray:
        """d length / d signal, (m,) -> (m,)."""
        found: np.ndarray = self.tokens * self._rise(signals, self.values(signals))
        return found

    def _rise(self, signals: np.ndarray, values: np.ndarray) -> np.ndarray:
        """d value / d signal, (m,) -> (m,)."""
        bell = np.exp(-0.5 * (signals / self.softening) ** 2) / np.sqrt(2 * np.pi) / self.softening
        found: np.ndarray = np.where(
            self.margins, bell, np.where(self.decades != 0, values, 1.0)
        )  # fmt: skip
        return found

    def slope(self, signals: np.ndarray) -> np.ndarray:
        """d score / d signal, (m,) -> (m,)."""
        # Where nothing bends or bounds values, nobody looks at them.
        values = self.values(signals) if self.bounds or self.decades.any() else signals
        pull = self.weight
        for bound in self.bounds:
            if bound.lacking(values) > 0:
                pull = pull + bound.steep * bound.sign * bound.share
        found: np.ndarray = pull * self._rise(signals, values)
        return found


def directions(
    weight: np.ndarray, bounds: Sequence[Bound], tokens: np.ndarray | None = None
) -> np.ndarray:
    """(m,) 1 where a higher value is better for the score, -1 where a lower one is, or fewer."""
    pull = weight + sum(bound.steep * bound.sign * bound.share for bound in bounds)
    pull = pull if tokens is None else pull - tokens
    return np.where(pull < 0, -1.0, 1.0)


def scaled(values: np.ndarray, better: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(signals (n, m), decades (m,)) of values (n, m), NaN where there are none.

    better: as ``directions`` has it. Values between 0 and 1 are left as they are.
    """
    signals = np.clip(values, -LARGEST, LARGEST)
    low, high = (f(signals, axis=0) for f in (np.fmin.reduce, np.fmax.reduce))
    wild = (low < 0) | (high > 1)
    decades = np.zeros(len(better))
    decades[(low > 0) & (high > DECADES * low)] = 1.0
    decades[(high < 0) & (low < DECADES * high)] = -1.0
    for column in np.flatnonzero(wild | (decades != 0)):
        seen = np.isfinite(signals[:, column])
        found, way = signals[seen, column], better[column]
        if decades[column]:
            found = np.log(np.maximum(abs(found), 1 / LARGEST))
            way = way * decades[column]
        signals[seen, column] = way * _fenced(way * found)
    return signals, decades


def _fenced(values: np.ndarray) -> np.ndarray:
    """Values, higher is better, of which none is far worse than most."""
    away = abs(values - np.median(values))
    if not away.any():
        return values
    found: np.ndarray = np.maximum(
        values, np.median(values) - FENCE * np.quantile(away[away > 0], 0.25)
    )
    return found


def softening_of(signals: np.ndarray, right: np.ndarray) -> float:
    """The width under which margins say best which items are right; both (n, items)."""
    likely = [
        np.log(np.clip(ndtr(np.where(right, signals, -signals) / soft), 1e-6, 1.0)).sum()
        for soft in SOFTENINGS
    ]
    return SOFTENINGS[int(np.argmax(likely))]


def calibrated(bound: Bound, soft: np.ndarray, true: np.ndarray) -> Bound:
    """The bound on soft metrics that stands for one on true ones. soft, true: values (n, m)."""
    near = np.argsort(abs(bound.lacking(true)), kind="stable")[:NEAR]
    gap = float((bound.lacking(true) - bound.lacking(soft))[near].mean())
    return replace(bound, least=bound.least + gap)
