"""Spaces in which only ratios of weights matter: one point for all that are the same merge.

With ``normalize`` the weights of a layer group under a filter are divided by their sum, so a point
and its multiples are one merge, and at zero there is nothing to divide by. The point that stands
for all has its largest weight at 1, on faces of the unit box. Knows spaces and plain numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from agentmerge.contracts.space import Space

#: Below this a block of weights has no ratio.
_NOTHING = 1e-9


@dataclass(frozen=True, eq=False)
class Ratios:
    """blocks: the axes whose weights share a scale. low: of their range; it ends at 1."""

    blocks: tuple[np.ndarray, ...] = ()
    low: float = 0.0

    @classmethod
    def of(cls, space: Space) -> Ratios:
        if not space.only_ratios:
            return cls()
        found: dict[tuple[int, str | None], list[int]] = {}
        low = 0.0
        for i, axis in enumerate(space.axes):
            if axis.parameter == "weight":
                group = 0 if space.genome.smooth else axis.group
                found.setdefault((group, axis.filter), []).append(i)
                low = axis.low
        return cls(tuple(np.array(block) for block in found.values()), low)

    def representative(self, points: np.ndarray) -> np.ndarray:
        """(n, d) -> (n, d), the same merges."""
        found = np.array(points, dtype=float)
        for block in self.blocks:
            weights = self.low + found[:, block] * (1 - self.low)
            largest = self._largest(weights)
            ratios = weights / np.where(abs(largest) > _NOTHING, largest, 1.0)
            units = (ratios - self.low) / (1 - self.low)
            found[:, block] = np.where(abs(largest) > _NOTHING, units, found[:, block])
        return np.clip(found, 0.0, 1.0)

    def pulled_back(self, point: np.ndarray, slope: np.ndarray) -> np.ndarray:
        """d f / d point, where ``slope`` is f's at the point's representative."""
        found = np.array(slope, dtype=float)
        for block in self.blocks:
            weights = self.low + point[block] * (1 - self.low)
            place = int(np.argmax(abs(weights)))
            largest = weights[place]
            if abs(largest) <= _NOTHING:
                found[block] = 0.0
                continue
            others = slope[block] / largest
            others[place] = 0.0
            found[block] = others
            found[block[place]] = -float(others @ weights) / largest
        return found

    @staticmethod
    def _largest(weights: np.ndarray) -> np.ndarray:
        place = abs(weights).argmax(1)[:, None]
        found: np.ndarray = np.take_along_axis(weights, place, 1)
        return found


#: Where every weight counts for itself.
EVERYTHING = Ratios()
