"""CMA-ES (Hansen, arXiv 1604.00772) through the package ``cma``, rebuilt from history each time.

A call replays the whole search: the same asks with the same injected random numbers, then the
scores that came back. An engine that has played a beginning of it in this process goes on from
there, which gives the same numbers sooner. Only full populations of the present size are told,
failures as worse than the worst; a generation that the budget cut short is asked and not told.
Starts at the best merge that was known before its first own generation (``starting.py``). A user's
population is the one that is asked for, but of one: asked for one at a time, it collects its
default population over as many generations. Advice from agents is not used here (``llm_evo`` is the
strategy that follows it).
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from agentmerge.config import SearchSettings
from agentmerge.contracts.advice import Guidance
from agentmerge.contracts.space import Space
from agentmerge.contracts.strategy import (
    History,
    Observation,
    Proposal,
    RngFor,
    default_population,
    fittest,
    next_generation,
)
from agentmerge.strategies.starting import merges

SIGMA0 = 1 / 6
#: Engines that are kept to go on from.
KEPT = 8

#: The generation that was asked, and the costs that were told of it, if any were.
Step = tuple[int, list[float] | None]


class CmaEs:
    name = "cma_es"
    needs_all = True

    def __init__(self, sigma0: float = SIGMA0) -> None:
        self.sigma0 = sigma0

    def with_settings(self, search: SearchSettings) -> CmaEs:
        return CmaEs(search.sigma0)

    def propose(
        self, space: Space, history: History, guidance: Guidance | None, count: int, rng_for: RngFor
    ) -> list[Proposal]:
        generation = next_generation(history)
        if generation == 0 or count == 0:
            return []
        own = _populations(history, self.name)
        size, begun = _size(own, count), []
        if size == 1:
            size = default_population(space.dimensions)
            own = _collected(own, size)
            last = max(own, default=generation)
            if own and len(own[last]) < size:  # the population that is being asked
                generation, begun = last, own.pop(last)
        first = min((g for g, found in own.items() if len(found) == size), default=generation)
        x0 = self._start(space, history, first, own.get(first, begun), size, rng_for)
        steps = [
            (past, _costs(population) if len(population) == size else None)
            for past, population in sorted(own.items())
            if past >= first
        ]
        points = _played((x0, self.sigma0, size), rng_for, steps, generation)
        mine = [tuple(float(x) for x in point[: space.dimensions]) for point in points]
        return [Proposal(point, self.name) for point in mine[len(begun) : len(begun) + count]]

    def population(self, dimensions: int) -> int:
        return default_population(dimensions)

    def _start(
        self,
        space: Space,
        history: History,
        generation: int,
        population: Sequence[Observation],
        size: int,
        rng_for: RngFor,
    ) -> tuple[float, ...]:
        """The first mean. population: what is known of the first one, asked as ``generation``."""

        def drawn(x0: tuple[float, ...], first: Observation) -> tuple[float, ...]:
            play = _Play(*_engine(x0, self.sigma0, size), steps=[])
            play.ask(rng_for, first.generation)
            return tuple(play.points[0][: space.dimensions])

        before = [o for o in history if o.generation < generation]
        known = merges(space, before, population[0] if population else None, drawn)
        best = fittest(known, 1)
        return best[0].vector if best and best[0].vector else (0.5,) * space.dimensions


@dataclass
class _Play:
    """An engine and what it did so far: asked and told ``steps``, then asked ``generation``, which
    gave ``points``."""

    engine: Any
    feed: Callable[[np.random.Generator], None]
    steps: list[Step]
    generation: int | None = None
    points: Sequence[np.ndarray] = ()

    def leads_to(self, steps: list[Step], generation: int) -> bool:
        """Whether what it did is how these steps begin."""
        done = len(self.steps)
        coming = steps[done][0] if done < len(steps) else generation
        return self.steps == steps[:done] and self.generation in (None, coming)

    def ask(self, rng_for: RngFor, generation: int) -> None:
        if self.generation is None:
            self.feed(rng_for(generation, 0, "cma"))
            self.generation, self.points = generation, self.engine.ask()

    def tell(self, step: Step) -> None:
        if step[1] is not None:
            self.engine.tell(self.points, step[1])
        self.steps.append(step)
        self.generation = None


#: Engines by what they began with; each is taken out while it plays.
_plays: OrderedDict[Any, _Play] = OrderedDict()


def _played(
    begin: tuple[tuple[float, ...], float, int], rng_for: RngFor, steps: list[Step], generation: int
) -> Sequence[np.ndarray]:
    """The points of a generation after these steps."""
    key = (begin, repr(rng_for(0, 0, "cma").bit_generator.state))  # which says the run's seed
    play = _plays.pop(key, None)
    if play is None or not play.leads_to(steps, generation):
        play = _Play(*_engine(*begin), steps=[])
    for step in steps[len(play.steps) :]:
        play.ask(rng_for, step[0])
        play.tell(step)
    play.ask(rng_for, generation)
    points = play.points
    _plays[key] = play
    if len(_plays) > KEPT:
        _plays.popitem(last=False)
    return points


def _populations(history: History, name: str) -> dict[int, list[Observation]]:
    found: dict[int, list[Observation]] = {}
    for observation in history:
        if observation.operator == name and not observation.prior:
            found.setdefault(observation.generation, []).append(observation)
    return found


def _size(own: dict[int, list[Observation]], count: int) -> int:
    """The population: as many as are asked for, unless that is what a budget's end cut it to."""
    before = [len(found) for found in own.values()]
    return before[-1] if before and count < before[-1] else count


def _collected(own: dict[int, list[Observation]], size: int) -> dict[int, list[Observation]]:
    """Generations of one as populations of ``size``, the last one perhaps not full; each under the
    number of its first generation."""
    single = [(g, found[0]) for g, found in sorted(own.items()) if len(found) == 1]
    return {
        single[start][0]: [o for _, o in single[start : start + size]]
        for start in range(0, len(single), size)
    }


def _engine(x0: tuple[float, ...], sigma0: float, size: int) -> tuple[Any, Any]:
    """A CMA-ES whose normal numbers come from the generator last fed to it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import cma

    current: list[np.random.Generator] = []
    # cma has no one-dimensional mode: a second coordinate that nothing reads stands in.
    start = list(x0) if len(x0) > 1 else [*x0, 0.5]
    inside = np.clip(start, 1e-3, 1 - 1e-3)  # cma refuses a start on the boundary
    engine = cma.CMAEvolutionStrategy(
        inside,
        sigma0,
        {
            "bounds": [0.0, 1.0],
            "popsize": size,
            "seed": np.nan,  # leaves numpy's global generator alone
            "randn": lambda *shape: current[-1].standard_normal(shape),
            "verbose": -9,
            "maxiter": np.inf,
        },
    )
    return engine, current.append


def _costs(population: Sequence[Observation]) -> list[float] | None:
    """What a population is told; None where all of it failed."""
    known = [-o.score for o in population if o.score is not None]
    if not known:
        return None
    penalty = max(known) + (max(known) - min(known)) + 1e-9
    return [penalty if o.score is None else -o.score for o in population]


STRATEGY = CmaEs()
