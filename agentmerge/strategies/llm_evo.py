"""LLM-Evo-Merge's strategy: an advised mean plus Gaussian noise (after EvoLLM, arXiv 2402.18381).

The first population is uniform random. Each later one is noise around the mean that the proposer
advised (the mean of the last generation's four best where nobody did), with the controller's sigma.
Whole recipes that the proposer suggested take at most ``RECIPE_SHARE`` of the slots.

Once there are four to take a mean of, a chat model's mean has half of a generation and theirs the
other half; whose half was better has more of the next one (``trust``). So a model that is wrong
cannot spend the search.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from agentmerge.contracts.advice import Guidance
from agentmerge.contracts.operators import ADVICE, LLM_EVO
from agentmerge.contracts.space import Space
from agentmerge.contracts.strategy import (
    History,
    Observation,
    Proposal,
    RngFor,
    default_population,
    fittest,
    improved,
    next_generation,
)
from agentmerge.strategies.random import random_vectors

ELITES = 4
RECIPE_SHARE = 0.3
#: Operator of what was drawn around the elites' own mean beside a model's.
ELITE_MEAN = "elite_mean"
FIRST_TRUST, LEAST_TRUST, MOST_TRUST = 0.5, 0.125, 0.875
#: The seed program's step sizes, used where no controller set one.
SIGMA_LOW, SIGMA_HIGH = 0.05, 0.2


class LlmEvo:
    name = LLM_EVO
    needs_all = True
    heeds_advice = True

    def propose(
        self, space: Space, history: History, guidance: Guidance | None, count: int, rng_for: RngFor
    ) -> list[Proposal]:
        generation = next_generation(history)
        if generation == 0:
            vectors = random_vectors(space, generation, count, rng_for)
            return [Proposal(vector, "random") for vector in vectors]
        mean, elites = _mean(space, history, guidance), _vectors(fittest(history, ELITES))
        sigma = guidance.sigma if guidance and guidance.sigma is not None else _sigma(history)
        by_model = guidance is not None and guidance.source == "model" and guidance.mean is not None
        share = trust(history) if by_model and len(elites) == ELITES else 1.0
        most = int(count * min(RECIPE_SHARE, share))
        suggested = list(guidance.candidates if guidance else ())[:most]
        proposals = [Proposal(tuple(vector), ADVICE) for vector in suggested]
        advised = len(proposals) + int(share * (count - len(proposals)) + 0.5)
        for slot in range(len(proposals), count):
            mine = slot < advised
            centre = mean if mine else np.mean(elites, axis=0)
            noise = rng_for(generation, slot, "mutate").standard_normal(space.dimensions)
            child = np.clip(np.asarray(centre) + sigma * noise, 0.0, 1.0)
            operator = self.name if mine else ELITE_MEAN
            proposals.append(Proposal(tuple(float(x) for x in child), operator))
        return proposals

    def population(self, dimensions: int) -> int:
        return default_population(dimensions)


def _mean(space: Space, history: History, guidance: Guidance | None) -> tuple[float, ...]:
    if guidance and guidance.mean is not None:
        return guidance.mean
    last = [o for o in history if o.generation == history[-1].generation]
    elites = fittest(last, ELITES) or fittest(history, ELITES)
    if not elites:
        return (0.5,) * space.dimensions
    return tuple(float(x) for x in np.mean([o.vector or () for o in elites], axis=0))


def _vectors(observations: Sequence[Observation]) -> list[tuple[float, ...]]:
    return [o.vector for o in observations if o.vector is not None]


def trust(history: History) -> float:
    """A model's share of the next generation: more where the best around its mean was better than
    the best around the elites' own, generation by generation."""
    share = FIRST_TRUST
    for generation in sorted({o.generation for o in history}):
        mine, own = (
            [o.score for o in history
             if o.generation == generation and o.operator == operator and o.score is not None]
            for operator in (LlmEvo.name, ELITE_MEAN)
        )  # fmt: skip
        if mine and own:
            share = share * 1.5 if max(mine) > max(own) else share / 2
            share = min(max(share, LEAST_TRUST), MOST_TRUST)
    return share


def _sigma(history: History) -> float:
    return SIGMA_LOW if improved(history) else SIGMA_HIGH


STRATEGY = LlmEvo()
