"""CMA-ES as mergekit-evolve 0.1.5 runs it: a rival for the search benchmark.

It begins by itself (``mergekit/evo/genome.py``, ``scripts/evolve.py``): every weight 1/n, every
density 1, sigma0 1/6 in the parameters' own units, cma's default population and no bounds. As
there, a negative value counts as its absolute one; beyond the end of an axis it is the axis's end,
where mergekit has none for weights. It is told what it asked. Knows no cheap rivals.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from agentmerge.contracts.advice import Guidance
from agentmerge.contracts.space import Space
from agentmerge.contracts.strategy import Observation, Proposal, RngFor, next_generation

SIGMA0 = 1 / 6


class MergekitEvolve:
    """One search: unlike a strategy of the product, it remembers its engine."""

    name = "cma_es_mergekit"

    def __init__(self) -> None:
        self._engine: Any = None
        self._asked: list[np.ndarray] = []

    def propose(
        self,
        space: Space,
        history: Sequence[Observation],
        guidance: Guidance | None,
        count: int,
        rng_for: RngFor,
    ) -> list[Proposal]:
        if self._engine is None:
            self._engine = _engine(space, rng_for)
        else:
            last = [o for o in history if o.generation == history[-1].generation]
            worst = min((o.score for o in history if o.score is not None), default=0.0)
            self._engine.tell(self._asked, [-(worst if o.score is None else o.score) for o in last])
        self._asked = self._engine.ask()
        generation = next_generation(history)
        assert generation, "the first points are known"
        return [Proposal(_inside(space, point), self.name) for point in self._asked[:count]]

    def population(self, dimensions: int) -> int:
        return 4 + int(3 * np.log(dimensions))  # cma's own


def _inside(space: Space, point: np.ndarray) -> tuple[float, ...]:
    values = np.minimum(abs(point), [axis.high for axis in space.axes])
    return tuple(axis.unit(float(x)) for axis, x in zip(space.axes, values, strict=True))


def _engine(space: Space, rng_for: RngFor) -> Any:
    import cma

    x0 = [1 / len(space.models) if axis.parameter == "weight" else 1.0 for axis in space.axes]
    rng = rng_for(1, 0, "cma")
    randn = rng.standard_normal
    options = {"randn": lambda *shape: randn(shape), "seed": np.nan, "verbose": -9}
    return cma.CMAEvolutionStrategy(x0, SIGMA0, options)
