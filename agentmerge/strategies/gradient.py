"""Descent along coefficient gradients: Adam (Kingma & Ba 2015) from the best of the cheap rivals.

One backward pass gives the slope of a loss in every coordinate at once, for the price of three
scores. Each step is pulled towards where the descent began, since a loss over the search items is
not the aim itself. The optimiser is a fold over the gradients in the history. Where gradients were
asked for and none came, (1+1)-ES takes over.
"""

from __future__ import annotations

import numpy as np

from agentmerge.contracts.advice import Guidance
from agentmerge.contracts.space import Space
from agentmerge.contracts.strategy import History, Proposal, RngFor, first_generation, fittest
from agentmerge.strategies.one_plus_one import OnePlusOne

RATE, PULL = 0.06, 0.02
BETA1, BETA2 = 0.9, 0.99


class GradientSteps:
    name = "gradient"
    needs_all = True

    def propose(
        self, space: Space, history: History, guidance: Guidance | None, count: int, rng_for: RngFor
    ) -> list[Proposal]:
        if not history or count == 0:
            return []
        point = next_step(history)
        if point is None:
            return OnePlusOne().propose(space, history, guidance, count, rng_for)
        return [Proposal(point, self.name, want="gradient")]

    def population(self, dimensions: int) -> int:
        return 1


def next_step(history: History) -> tuple[float, ...] | None:
    """Where the next gradient is due; None where gradients were asked for and none came, or one
    is still to come."""
    own = [
        o
        for o in history
        if o.operator == GradientSteps.name and o.vector is not None and not o.prior
    ]
    steps = [o for o in own if o.gradient is not None]
    if (own and not steps) or any(o.pending for o in own):
        return None
    rivals = [o for o in history if o.generation == first_generation(history)]
    start = fittest(rivals, 1) or fittest(history, 1)
    if not steps:
        return start[0].vector if start else None
    home = np.array(steps[0].vector)
    mean = square = np.zeros(len(home))
    for step in steps:
        slope = np.array(step.gradient)
        mean = BETA1 * mean + (1 - BETA1) * slope
        square = BETA2 * square + (1 - BETA2) * slope**2
    mean = mean / (1 - BETA1 ** len(steps))
    square = square / (1 - BETA2 ** len(steps))
    point = np.array(steps[-1].vector)
    point = point - RATE * mean / (np.sqrt(square) + 1e-12) - PULL * (point - home)
    return tuple(float(x) for x in np.clip(point, 0.0, 1.0))


STRATEGY = GradientSteps()
