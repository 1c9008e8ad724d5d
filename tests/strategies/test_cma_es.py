"""CMA-ES goes on from an engine that it has kept as if it had replayed the whole search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import cma
import pytest

from agentmerge.contracts.strategy import Observation, rng_factory
from agentmerge.strategies import cma_es
from tests.strategies.test_population import SPACE, begun, fitness

GENERATIONS = 24


def asked(history: Sequence[Observation], count: int, seed: int = 5) -> list[tuple[float, ...]]:
    found = cma_es.STRATEGY.propose(SPACE, tuple(history), None, count, rng_factory(seed))
    return [p.vector for p in found if p.vector is not None]


def replayed(history: Sequence[Observation], count: int, seed: int = 5) -> list[tuple[float, ...]]:
    """The same by an engine of its own; what was kept is kept."""
    kept = dict(cma_es._plays)
    cma_es._plays.clear()
    found = asked(history, count, seed)
    cma_es._plays.clear()
    cma_es._plays.update(kept)
    return found


def told(history: list[Observation], points: Sequence[tuple[float, ...]]) -> list[Observation]:
    """With a generation more: every fifth candidate failed, and all of the sixth generation."""
    generation = history[-1].generation + 1
    return history + [
        Observation(
            generation,
            slot,
            point,
            "cma_es",
            None if (generation + slot) % 5 == 0 or generation == 6 else fitness(point),
        )
        for slot, point in enumerate(points)
    ]


@pytest.mark.filterwarnings("ignore:orphanated injected solution")  # two were asked, one told
@pytest.mark.parametrize("count", [1, 2, 7])
def test_every_generation_is_what_a_replay_says(count: int) -> None:
    cma_es._plays.clear()
    history = begun()
    for generation in range(GENERATIONS):
        points = asked(history, count)
        assert points == replayed(history, count)
        assert points == asked(history, count), "a node may run twice"
        assert asked(history, count, seed=6) == replayed(history, count, seed=6) != points
        history = told(history, points[: count - (generation == 9 and count > 1)])


def test_a_past_that_came_otherwise_is_replayed() -> None:
    cma_es._plays.clear()
    history = begun()
    for _ in range(6):
        history = told(history, asked(history, 5))
    worse = [*history[:-1], replace(history[-1], score=-9.0)]
    elsewhere = [*history, Observation(7, 0, (0.5,) * 4, "random", 9.0)]
    for past in (worse, elsewhere, history[:-5], history[:-2], history):
        assert asked(past, 5) == replayed(past, 5)


def test_a_generation_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cma_es._plays.clear()
    asks, plain = [0], cma.CMAEvolutionStrategy.ask

    def counted(engine, *args, **more):
        asks[0] += 1
        return plain(engine, *args, **more)

    monkeypatch.setattr(cma.CMAEvolutionStrategy, "ask", counted)
    history = begun()
    for _ in range(GENERATIONS):
        history = told(history, asked(history, 5))
    assert asks[0] == GENERATIONS
    for seed in range(20):
        asked(begun(), 5, seed)
    assert len(cma_es._plays) == cma_es.KEPT
