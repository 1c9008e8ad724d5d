"""A user's population and an agent's advice reach every strategy, and seeds keep streams apart."""

from __future__ import annotations

import numpy as np
import pytest

from agentmerge import plugins
from agentmerge.config import GenomeConfig
from agentmerge.contracts.advice import Guidance
from agentmerge.contracts.strategy import (
    PURPOSES,
    Observation,
    Proposal,
    Strategy,
    default_population,
    fittest,
    improved,
    rng_factory,
)
from agentmerge.space.grouped import SearchSpace

NAMES = sorted(plugins.known("agentmerge.strategies"))
SPACE = SearchSpace(
    GenomeConfig(
        models=("a", "b"),
        base_model="base",
        merge_method="task_arithmetic",
        layer_granularity=2,
    ),
    4,
)
CENTRE = np.array([0.3, 0.4, 0.5, 0.6])
EVALUATIONS = 150


def strategy(name: str) -> Strategy:
    found: Strategy = plugins.load("agentmerge.strategies", name)
    return found


def fitness(vector: tuple[float, ...]) -> float:
    return -float(((np.asarray(vector) - CENTRE) ** 2).sum())


def begun() -> list[Observation]:
    middle = SPACE.uniform()[1]
    assert middle is not None
    return [Observation(0, 0, middle, "uniform", fitness(middle))]


def sphere(name: str, count: int, seed: int, evaluations: int = EVALUATIONS) -> list[Observation]:
    """A search on a sphere whose user asked for ``count`` candidates a generation."""
    history = begun()
    while len(history) + count <= evaluations + 1:
        asked = strategy(name).propose(SPACE, tuple(history), None, count, rng_factory(seed))
        generation = history[-1].generation + 1
        history += [
            Observation(generation, slot, p.vector, p.operator, fitness(p.vector or ()))
            for slot, p in enumerate(asked)
        ]
    return history


def best(history: list[Observation]) -> float:
    return max(o.score for o in history if o.score is not None)


@pytest.mark.parametrize(
    "count",
    [
        5,
        7,
        default_population(4),
    ],
)
def test_cma_es_learns_whatever_the_population(count: int) -> None:
    """150 evaluations of a four-dimensional sphere; a search that learns contracts around it."""
    searches = [sphere("cma_es", count, seed) for seed in range(3)]
    rivals = [best(sphere("random", count, seed)) for seed in range(3)]
    found = float(np.median([best(history) for history in searches]))
    assert found > 0.1 * float(np.median(rivals))
    assert found > -2e-3
    last = [o.vector for o in searches[0] if o.generation == searches[0][-1].generation]
    assert float(np.std(last, axis=0).mean()) < 0.05, "the step has not shrunk"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [12, 20])
def test_a_larger_population_is_a_larger_population(name: str, count: int) -> None:
    history = tuple(begun())
    expected = 1 if name == "gradient" else count  # a descent has one next step
    assert len(strategy(name).propose(SPACE, history, None, count, rng_factory(0))) == expected


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [0, 1, 2, 3, 8])
@pytest.mark.parametrize(
    "guidance",
    [
        None,
        Guidance(),
        Guidance(mean=(0.0, 1.0, 0.0, 1.0), source="model"),
        Guidance(candidates=((1.0,) * 4,) * 4, source="model"),
        Guidance(mean=(0.5,) * 4, candidates=((0.0,) * 4,), sigma=5.0, source="model"),
    ],
    ids=["none", "empty", "mean", "candidates", "a step beyond the box"],
)
def test_no_advice_breaks_the_contract(name: str, count: int, guidance: Guidance | None) -> None:
    history = tuple(sphere(name, 8, 1, 24))
    one, two = (
        strategy(name).propose(SPACE, history, guidance, count, rng_factory(0)) for _ in range(2)
    )
    assert one == two
    assert len(one) == count
    for proposal in one:
        assert isinstance(proposal, Proposal)
        assert proposal.vector is not None
        assert len(proposal.vector) == SPACE.dimensions
        assert all(0.0 <= x <= 1.0 for x in proposal.vector)
        assert SPACE.recipe(proposal.vector)


def test_a_model_that_is_wrong_cannot_spend_the_search() -> None:
    """llm_evo with a model whose mean is always a far corner, and with one that knows the place."""

    def shares_and_best(mean: tuple[float, ...]) -> tuple[list[int], float]:
        history, shares = begun(), []
        for generation in range(1, 9):
            guidance = Guidance(mean=mean, sigma=0.1, source="model")
            asked = strategy("llm_evo").propose(SPACE, tuple(history), guidance, 8, rng_factory(0))
            shares.append(sum(p.operator == "llm_evo" for p in asked))
            history += [
                Observation(generation, slot, p.vector, p.operator, fitness(p.vector or ()))
                for slot, p in enumerate(asked)
            ]
        return shares, fittest(history, 1)[0].score or 0.0

    shares, misled = shares_and_best((1.0, 0.0, 1.0, 0.0))
    assert shares == [8, 4, 2, 1, 1, 1, 1, 1], "all until there are four to take a mean of"
    shares, told = shares_and_best(tuple(float(x) for x in CENTRE))
    assert shares[:2] == [8, 4]
    assert misled > fitness(begun()[0].vector or ()), "rules went on beside it"
    assert told > misled


def test_llm_evo_goes_where_it_is_advised() -> None:
    mean = (0.1, 0.9, 0.1, 0.9)
    guidance = Guidance(mean=mean, sigma=1e-4, source="model")
    proposals = strategy("llm_evo").propose(SPACE, tuple(begun()), guidance, 8, rng_factory(0))
    assert {p.operator for p in proposals} == {"llm_evo"}
    for proposal in proposals:
        assert proposal.vector == pytest.approx(mean, abs=1e-3)
    assert len({p.vector for p in proposals}) == 8


def test_suggested_points_are_tried_as_they_are_in_under_a_third_of_the_slots() -> None:
    points = tuple((x / 10,) * 4 for x in range(1, 5))
    guidance = Guidance(candidates=points, source="model")
    proposals = strategy("llm_evo").propose(SPACE, tuple(begun()), guidance, 10, rng_factory(0))
    assert [p.vector for p in proposals if p.operator == "agent"] == list(points[:3])


def test_cma_es_asks_its_own_points_whatever_is_advised() -> None:
    """Advice that overwrote CMA-ES's samples poisoned it (SEARCH.md); llm_evo follows advice."""
    own = strategy("cma_es")
    count = own.population(SPACE.dimensions)
    guidance = Guidance(mean=(0.1, 0.9, 0.1, 0.9), source="model")
    asked = [
        own.propose(SPACE, tuple(begun()), advice, count, rng_factory(0))
        for advice in (guidance, None)
    ]
    assert asked[0] == asked[1]


@pytest.mark.parametrize("name", NAMES)
def test_candidates_outside_the_space_are_lived_with(name: str) -> None:
    """A warm start that is no point of the space has a score and no vector."""
    history = [
        Observation(0, 0, None, "init", 0.9),
        Observation(0, 1, None, "parent", None, failure="refused"),
    ]
    proposals = strategy(name).propose(SPACE, history, None, 8, rng_factory(0))
    assert len(proposals) == 8


def test_populations_are_the_papers() -> None:
    assert [default_population(d) for d in (1, 2, 4, 32, 128)] == [4, 6, 8, 14, 19]


def test_streams_are_apart_and_repeatable() -> None:
    def draw(seed: int, generation: int, slot: int, purpose: str) -> float:
        return float(rng_factory(seed)(generation, slot, purpose).random())

    seen = {
        draw(seed, generation, slot, purpose)
        for seed in range(3)
        for generation in range(3)
        for slot in range(3)
        for purpose in PURPOSES
    }
    assert len(seen) == 27 * len(PURPOSES)
    assert draw(1, 2, 0, "mutate") == draw(1, 2, 0, "mutate")


@pytest.mark.parametrize("seed", range(8))
def test_the_fittest_and_whether_the_last_improved_are_as_defined(seed: int) -> None:
    rng = np.random.default_rng(seed)
    history = [
        Observation(int(g), slot, (0.5,) if rng.random() < 0.9 else None, "random", score)
        for slot, g in enumerate(sorted(rng.integers(0, 6, size=20)))
        for score in [None if rng.random() < 0.2 else float(rng.integers(0, 5))]
    ]
    able = [o for o in history if o.vector is not None and o.score is not None]
    for count in (0, 1, 4, 30):
        ranked = sorted(able, key=lambda o: (-o.score, o.generation, o.slot))
        assert fittest(history, count) == ranked[:count]
    for end in range(1, len(history) + 1):
        told, last = history[:end], history[end - 1].generation
        new, old = ([o.score for o in told if o.score is not None and (o.generation == last) == own]
                    for own in (True, False))  # fmt: skip
        assert improved(told) == (bool(new) and (not old or max(new) > max(old)))


def test_fittest_breaks_ties_by_age_and_leaves_failures_out() -> None:
    vector = (0.5,) * 4
    history = [
        Observation(0, 0, vector, "x", 0.1),
        Observation(0, 1, vector, "x", None),
        Observation(0, 2, None, "x", 0.9),
        Observation(1, 0, vector, "x", 0.7),
        Observation(1, 1, vector, "x", 0.7),
    ]
    assert [(o.generation, o.slot) for o in fittest(history, 2)] == [(1, 0), (1, 1)]
    assert len(fittest(history, 9)) == 3
