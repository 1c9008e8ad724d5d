"""(1+1)-ES with the one-fifth success rule (Rechenberg 1973; constants of Kern et al. 2004).

One child at a time of the best point so far. The step grows where a child is better than its
parent and shrinks where it is not, so that about one in five succeeds; its size is a fold over the
history. A population above one gives so many children of the same parent, which is never one of the
models that are merged (``starting.py``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from agentmerge.contracts.advice import Guidance
from agentmerge.contracts.space import Space
from agentmerge.contracts.strategy import (
    History,
    Observation,
    Proposal,
    RngFor,
    fittest,
    next_generation,
)
from agentmerge.strategies.starting import merges

SIGMA0 = 0.2
SIGMA_LEAST, SIGMA_MOST = 1e-3, 0.5


class OnePlusOne:
    name = "one_plus_one"

    def __init__(self, anywhere: bool = False) -> None:
        """anywhere: whether it may go on from a parent too, as a step of another search."""
        self.anywhere = anywhere

    def propose(
        self, space: Space, history: History, guidance: Guidance | None, count: int, rng_for: RngFor
    ) -> list[Proposal]:
        generation = next_generation(history)
        if generation == 0:
            return []
        if not self.anywhere:

            def drawn(start: tuple[float, ...], first: Observation) -> tuple[float, ...]:
                return mutated(start, SIGMA0, first.generation, first.slot, rng_for)

            own = (o for o in history if o.operator == self.name and not o.prior)
            history = merges(space, history, next(own, None), drawn)
        best = fittest(history, 1)
        parent = best[0].vector if best and best[0].vector else (0.5,) * space.dimensions
        sigma = step_size(history, self.name, space.dimensions)
        return [
            Proposal(mutated(parent, sigma, generation, slot, rng_for), self.name)
            for slot in range(count)
        ]

    def population(self, dimensions: int) -> int:
        return 1


def step_size(history: History, operator: str, dimensions: int) -> float:
    """Sigma after every child of ``operator``: up by a success, down a quarter as far by a failure.

    A success is a score above every one before its generation; what was asked under other settings
    is neither.
    """
    log_sigma, best, before = math.log(SIGMA0), -math.inf, -math.inf
    damping, generation = 1.0 + dimensions / 3.0, -1
    for observation in history:
        if observation.pending:
            continue
        if observation.generation != generation:
            generation, before = observation.generation, best
        score = -math.inf if observation.score is None else observation.score
        if observation.operator == operator and not observation.prior:
            log_sigma += (1.0 if score > before else -0.25) / damping
        best = max(best, score)
    return min(max(math.exp(log_sigma), SIGMA_LEAST), SIGMA_MOST)


def mutated(
    parent: Sequence[float], sigma: float, generation: int, slot: int, rng_for: RngFor
) -> tuple[float, ...]:
    """A child at normal distance ``sigma`` a coordinate, reflected at the box's sides."""
    noise = rng_for(generation, slot, "mutate").standard_normal(len(parent))
    child = np.asarray(parent) + sigma * noise
    return tuple(float(x) for x in reflected(child))


def reflected(points: np.ndarray) -> np.ndarray:
    """Points folded back into [0, 1], so that the sides collect nothing."""
    folded: np.ndarray = np.clip(1.0 - np.abs(1.0 - np.mod(points, 2.0)), 0.0, 1.0)
    return folded


STRATEGY = OnePlusOne()
