"""Uniform random search: the null that any strategy must beat."""

from __future__ import annotations

from agentmerge.contracts.advice import Guidance
from agentmerge.contracts.space import Space
from agentmerge.contracts.strategy import (
    History,
    Proposal,
    RngFor,
    default_population,
    next_generation,
)


def random_vectors(
    space: Space, generation: int, count: int, rng_for: RngFor
) -> list[tuple[float, ...]]:
    return [
        tuple(float(x) for x in rng_for(generation, slot, "sample").random(space.dimensions))
        for slot in range(count)
    ]


class Random:
    name = "random"

    def propose(
        self, space: Space, history: History, guidance: Guidance | None, count: int, rng_for: RngFor
    ) -> list[Proposal]:
        vectors = random_vectors(space, next_generation(history), count, rng_for)
        return [Proposal(vector, self.name) for vector in vectors]

    def population(self, dimensions: int) -> int:
        return default_population(dimensions)


STRATEGY = Random()
