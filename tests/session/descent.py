"""A search that follows gradients, as a plugin would ship it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from agentmerge.contracts.advice import Guidance
from agentmerge.contracts.strategy import Observation, Proposal, RngFor, fittest
from agentmerge.space.grouped import SearchSpace


class Descent:
    """Steps of a tenth against the last gradient; the first is taken at the best point known."""

    name = "descent"

    def propose(
        self,
        space: SearchSpace,
        history: Sequence[Observation],
        guidance: Guidance | None,
        count: int,
        rng_for: RngFor,
    ) -> list[Proposal]:
        if not history:
            return []
        known = [o for o in history if o.gradient is not None]
        if not known:
            return [Proposal(fittest(history, 1)[0].vector, "descent", want="gradient")]
        slope = np.array(known[-1].gradient)
        point = np.array(known[-1].vector) - 0.1 * slope / (np.abs(slope).max() or 1.0)
        return [Proposal(tuple(np.clip(point, 0.0, 1.0)), "descent", want="gradient")]

    def population(self, dimensions: int) -> int:
        return 1


STRATEGY = Descent()
