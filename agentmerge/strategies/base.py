"""The contract of a search strategy: a pure function of an ordered history.

    propose(space, history, guidance, count, rng_for) -> list[Proposal]

It keeps no state between calls and reads no clock, so resuming, branching and replaying are exact
by construction, and any strategy can take over a search that another began. ``history`` is ordered
by (generation, slot), never by who finished first, and holds the seed population (generation 0).
Vectors are in the unit box; ``space`` alone knows real ranges. ``rng_for(slot, purpose)`` gives an
independent generator derived from (run seed, generation, slot, purpose).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from agentmerge.agents.schemas import Guidance
from agentmerge.genome import SearchSpace

#: Purpose codes of random generators; part of every stored search, so never renumber.
PURPOSES = {"sample": 0, "mutate": 1, "cma": 2, "seed": 3, "items": 4}

RngFor = Callable[[int, str], np.random.Generator]


def rng_factory(seed: int, generation: int) -> RngFor:
    """``rng_for`` of one generation: Generator(PCG64(SeedSequence([seed, gen, slot, code])))."""

    def rng_for(slot: int, purpose: str) -> np.random.Generator:
        entropy = [seed, generation, slot, PURPOSES[purpose]]
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))

    return rng_for


@dataclass(frozen=True, slots=True)
class Proposal:
    """One candidate to try.

    vector: the raw point in the unit box as the strategy drew it, or None for a recipe outside
        the space. It stays with the candidate: a strategy is told what it asked.
    recipe: mergekit YAML, only where there is no vector.
    operator: who made it ("parent", "uniform", "scale", "init", "random", "llm_evo", "cma_es"...).
    want: a score, or (for workers that can) a gradient.
    """

    vector: tuple[float, ...] | None
    operator: str
    recipe: str | None = None
    label: str = ""
    want: Literal["score", "gradient"] = "score"


@dataclass(frozen=True, slots=True)
class Observation:
    """A proposal with what came of it; ``score`` is None where the candidate failed.

    score: weighted sum of the tasks' metrics, higher is better (a task's weight may be negative).
    tasks: (task name, metric value), unweighted.
    """

    generation: int
    slot: int
    vector: tuple[float, ...] | None
    operator: str
    score: float | None
    tasks: tuple[tuple[str, float], ...] = ()
    recipe_hash: str = ""
    label: str = ""
    failure: str = ""


class Strategy(Protocol):
    name: str

    def propose(
        self,
        space: SearchSpace,
        history: Sequence[Observation],
        guidance: Guidance | None,
        count: int,
        rng_for: RngFor,
    ) -> list[Proposal]: ...

    def population(self, dimensions: int) -> int:
        """How many candidates a generation has unless the user says otherwise."""
        ...


def default_population(dimensions: int) -> int:
    """4 + round(3 ln d), as CMA-ES and LLM-Evo-Merge have it."""
    return 4 + round(3 * float(np.log(max(dimensions, 1))))
