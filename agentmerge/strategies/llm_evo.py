"""LLM-Evo-Merge's strategy: an advised mean plus Gaussian noise (after EvoLLM, arXiv 2402.18381).

The first population is uniform random. Each later one is noise around the mean that the proposer
advised (the mean of the last generation's four best where nobody did), with the controller's sigma.
Whole recipes that the proposer suggested take at most ``RECIPE_SHARE`` of the slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from agentmerge.agents.schemas import Guidance
from agentmerge.genome import SearchSpace
from agentmerge.strategies.base import (
    Observation,
    Proposal,
    RngFor,
    default_population,
    fittest,
    next_generation,
)
from agentmerge.strategies.random import random_vectors

ELITES = 4
RECIPE_SHARE = 0.3
#: The seed program's step sizes, used where no controller set one.
SIGMA_LOW, SIGMA_HIGH = 0.05, 0.2


class LlmEvo:
    name = "llm_evo"
    heeds_advice = True

    def propose(
        self,
        space: SearchSpace,
        history: Sequence[Observation],
        guidance: Guidance | None,
        count: int,
        rng_for: RngFor,
    ) -> list[Proposal]:
        generation = next_generation(history)
        if generation == 0:
            vectors = random_vectors(space, generation, count, rng_for)
            return [Proposal(vector, "random") for vector in vectors]
        mean = _mean(space, history, guidance)
        sigma = guidance.sigma if guidance and guidance.sigma is not None else _sigma(history)
        suggested = list(guidance.candidates if guidance else ())[: int(count * RECIPE_SHARE)]
        proposals = [Proposal(tuple(vector), "agent") for vector in suggested]
        for slot in range(len(proposals), count):
            noise = rng_for(generation, slot, "mutate").standard_normal(space.dimensions)
            child = np.clip(np.asarray(mean) + sigma * noise, 0.0, 1.0)
            proposals.append(Proposal(tuple(float(x) for x in child), self.name))
        return proposals

    def population(self, dimensions: int) -> int:
        return default_population(dimensions)


def _mean(
    space: SearchSpace, history: Sequence[Observation], guidance: Guidance | None
) -> tuple[float, ...]:
    if guidance and guidance.mean is not None:
        return guidance.mean
    last = [o for o in history if o.generation == history[-1].generation]
    elites = fittest(last, ELITES) or fittest(history, ELITES)
    if not elites:
        return (0.5,) * space.dimensions
    return tuple(float(x) for x in np.mean([o.vector or () for o in elites], axis=0))


def _sigma(history: Sequence[Observation]) -> float:
    return SIGMA_LOW if improved(history) else SIGMA_HIGH


def improved(history: Sequence[Observation]) -> bool:
    """Did the last generation beat all before it? Generation 0 counts as an improvement."""
    last = history[-1].generation
    new = [o.score for o in history if o.score is not None and o.generation == last]
    old = [o.score for o in history if o.score is not None and o.generation < last]
    return bool(new) and (not old or max(new) > max(old))


STRATEGY = LlmEvo()
