"""A search strategy: a pure function of the history (see ``agentmerge.contracts.Strategy``)."""

from __future__ import annotations

from collections.abc import Sequence

from agentmerge.contracts import (
    Guidance,
    Observation,
    Proposal,
    RngFor,
    Space,
    default_population,
    fittest,
    next_generation,
)


class Halfway:
    """Goes half of the way from the best to where the agents would look, with a little noise."""

    name = "halfway"
    heeds_advice = True

    def propose(
        self,
        space: Space,
        history: Sequence[Observation],
        guidance: Guidance | None,
        count: int,
        rng_for: RngFor,
    ) -> list[Proposal]:
        generation = next_generation(history)
        best = fittest(history, 2)
        if not best:
            return []
        start = best[0].vector or ()
        goal = guidance.mean if guidance and guidance.mean else best[-1].vector or start
        proposals = []
        for slot in range(count):
            noise = rng_for(generation, slot, "mutate").normal(0.0, 0.1, space.dimensions)
            halfway = [(a + b) / 2 + n for a, b, n in zip(start, goal, noise, strict=True)]
            vector = tuple(float(min(max(x, 0.0), 1.0)) for x in halfway)
            proposals.append(Proposal(vector, self.name))
        return proposals

    def population(self, dimensions: int) -> int:
        return default_population(dimensions)


STRATEGY = Halfway()
