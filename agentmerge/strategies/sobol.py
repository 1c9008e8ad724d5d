"""Scrambled Sobol points (Owen 1998; scipy's generator): random search that leaves no holes.

One sequence a run: how many of its points were drawn before is read from the history, and its
scrambling comes from the run's seed alone.
"""

from __future__ import annotations

import warnings

from agentmerge.contracts.advice import Guidance
from agentmerge.contracts.space import Space
from agentmerge.contracts.strategy import History, Proposal, RngFor, default_population


class Sobol:
    name = "sobol"

    def propose(
        self, space: Space, history: History, guidance: Guidance | None, count: int, rng_for: RngFor
    ) -> list[Proposal]:
        drawn = sum(o.operator == self.name for o in history)
        points = sobol_points(space.dimensions, drawn, count, rng_for)
        return [Proposal(point, self.name) for point in points]

    def population(self, dimensions: int) -> int:
        return default_population(dimensions)


def sobol_points(
    dimensions: int, skip: int, count: int, rng_for: RngFor
) -> list[tuple[float, ...]]:
    """Points ``skip`` to ``skip + count`` of the run's scrambled sequence, in the unit box."""
    from scipy.stats import qmc

    if count == 0:
        return []
    engine = qmc.Sobol(dimensions, scramble=True, rng=rng_for(0, 0, "sample"))
    if skip:
        engine.fast_forward(skip)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a count is no power of two is no news here
        return [tuple(float(x) for x in point) for point in engine.random(count)]


STRATEGY = Sobol()
