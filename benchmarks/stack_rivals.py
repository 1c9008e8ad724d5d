"""What others search stacks of layers with, on the path form: a genetic algorithm, and CatCMA.

Both begin at the weight answer, as ours do, and are told what they asked. The genetic algorithm:
tournaments of three, uniform crossover by position, one switch in ``FLIPS`` turned and scales moved
by ``STEP``, the best 18 of all bred. CatCMA (Hamano et al., arXiv 2405.09962; package ``cmaes``):
switches are its categories, scales its continuous variables. Knows points of the unit box alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from agentmerge.contracts.advice import Guidance
from agentmerge.contracts.space import Space
from agentmerge.contracts.strategy import (
    Observation,
    Proposal,
    RngFor,
    default_population,
    fittest,
    next_generation,
)

SIZE, BRED, RIVALS = 16, 18, 3
STEP, CROSSED = 0.1, 0.7
#: Switches that a child turns, in the mean.
FLIPS = 1.0
#: Of CatCMA: how sure the switches are at first, and how far scales are drawn.
SURE, SIGMA = 0.9, 0.1

History = Sequence[Observation]


class Genetic:
    """A pure function of the history, as the product's strategies are."""

    name = "genetic"

    def propose(
        self,
        space: Space,
        history: History,
        guidance: Guidance | None,
        count: int,
        rng_for: RngFor,
    ) -> list[Proposal]:
        switches = _switches(space)
        rng = rng_for(next_generation(history), 0, "mutate")
        parents = [np.array(o.vector) for o in fittest(history, BRED)]
        found = []
        for _ in range(count):
            # the pool is sorted, so that the smallest of some draws is the winner of their contest
            one, other = (parents[rng.integers(len(parents), size=RIVALS).min()] for _ in "ab")
            child = one.copy()
            if rng.random() < CROSSED:
                taken = np.repeat(rng.random(len(child) // 2) < 0.5, 2)
                child[taken] = other[taken]
            turned = switches & (rng.random(len(child)) < FLIPS / max(1, switches.sum()))
            child[turned] = 1.0 - child[turned]
            scales = ~switches
            child[scales] += STEP * rng.standard_normal(int(scales.sum()))
            found.append(Proposal(tuple(np.clip(child, 0.0, 1.0).tolist()), self.name))
        return found

    def population(self, dimensions: int) -> int:
        return SIZE


class CatCma:
    """One search: unlike a strategy of the product, it remembers its engine."""

    name = "catcma"

    def __init__(self) -> None:
        self._engine: Any = None
        self._asked: list[tuple[np.ndarray, np.ndarray]] = []

    def propose(
        self,
        space: Space,
        history: History,
        guidance: Guidance | None,
        count: int,
        rng_for: RngFor,
    ) -> list[Proposal]:
        switches = _switches(space)
        if self._engine is None:
            self._engine = _engine(np.array(fittest(history, 1)[0].vector), switches, rng_for)
        else:
            last = [o for o in history if o.generation == history[-1].generation]
            told = [(x, -(o.score or 0.0)) for x, o in zip(self._asked, last, strict=False)]
            if len(told) == self._engine.population_size:
                self._engine.tell(told)
        self._asked = [self._engine.ask() for _ in range(self._engine.population_size)]
        found = []
        for scales, chosen in self._asked[:count]:
            point = np.empty(space.dimensions)
            point[~switches] = np.clip(scales, 0.0, 1.0)
            point[switches] = np.where(chosen[:, 1], 0.75, 0.25)
            found.append(Proposal(tuple(point.tolist()), self.name))
        return found

    def population(self, dimensions: int) -> int:
        return default_population(dimensions)


def _switches(space: Space) -> np.ndarray:
    return np.array([axis.kind == "bool" for axis in space.axes])


def _engine(start: np.ndarray, switches: np.ndarray, rng_for: RngFor) -> Any:
    from cmaes import CatCMA

    on = start[switches] >= 0.5
    chances = np.where(on[:, None], [1 - SURE, SURE], [SURE, 1 - SURE])
    scales = int((~switches).sum())
    return CatCMA(
        mean=start[~switches],
        sigma=SIGMA,
        bounds=np.tile([0.0, 1.0], (scales, 1)),
        cat_num=np.full(len(on), 2),
        cat_param=chances,
        population_size=default_population(len(start)),
        seed=int(rng_for(1, 0, "cma").integers(2**31)),
    )
