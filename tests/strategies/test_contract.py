"""One suite for every strategy: a pure function of history, in the unit box."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import entry_points

import numpy as np
import pytest

from agentmerge import plugins
from agentmerge.config import GenomeConfig
from agentmerge.contracts.strategy import Observation, Strategy, rng_factory
from agentmerge.space.grouped import SearchSpace
from tests.strategies.objectives import KINDS, Objective

NAMES = sorted(plugins.known("agentmerge.strategies"))


@pytest.fixture(params=NAMES)
def strategy(request: pytest.FixtureRequest) -> Strategy:
    return plugins.load("agentmerge.strategies", request.param)


def space(dimensions: int = 4) -> SearchSpace:
    models = ("a", "b") if dimensions > 1 else ("a", "base")
    genome = GenomeConfig(
        models=models,
        base_model="base",
        merge_method="task_arithmetic",
        layer_granularity=2 if dimensions > 2 else 0,
    )
    found = SearchSpace(genome, 4)
    assert found.dimensions == dimensions
    return found


def fitness(vector: tuple[float, ...]) -> float:
    return -sum((x - 0.3 - 0.1 * i) ** 2 for i, x in enumerate(vector))


def search(
    strategy: Strategy,
    generations: int,
    dimensions: int = 4,
    seed: int = 0,
    fail: bool = False,
    history: tuple[Observation, ...] = (),
) -> tuple[Observation, ...]:
    """Drive a strategy; candidates whose first value is above 0.9 fail where ``fail``."""
    there = space(dimensions)
    found = list(history)
    if not found:
        points = [p for _, _, p in there.parents() if p] + [there.uniform()[1]]
        found = [
            Observation(0, slot, point, "parent", fitness(point))
            for slot, point in enumerate(points)
            if point
        ]
    for _ in range(generations):
        count = strategy.population(dimensions)
        asked = strategy.propose(there, tuple(found), None, count, rng_factory(seed))
        generation = found[-1].generation + 1
        for slot, proposal in enumerate(asked):
            vector = proposal.vector
            assert vector is not None
            bad = fail and vector[0] > 0.5
            score = None if bad else fitness(vector)
            found.append(Observation(generation, slot, vector, proposal.operator, score))
    return tuple(found)


def test_same_history_same_proposals(strategy: Strategy) -> None:
    first = search(strategy, 4)
    search(strategy, 2, seed=9)
    assert search(strategy, 4) == first


def test_resumed_anywhere_it_goes_the_same_way(strategy: Strategy) -> None:
    whole = search(strategy, 5)
    for stop in range(1, 5):
        part = tuple(o for o in whole if o.generation <= stop)
        assert search(strategy, 5 - stop, history=part) == whole


def test_the_global_generator_is_left_alone(strategy: Strategy) -> None:
    np.random.seed(3)
    before = np.random.get_state()[1].tolist()
    search(strategy, 2)
    assert np.random.get_state()[1].tolist() == before


def test_seeds_make_a_difference(strategy: Strategy) -> None:
    assert search(strategy, 2, seed=1) != search(strategy, 2, seed=2)


def test_it_stays_in_the_unit_box(strategy: Strategy) -> None:
    for observation in search(strategy, 6):
        assert all(0.0 <= x <= 1.0 for x in observation.vector or ())


def test_failures_are_lived_with(strategy: Strategy) -> None:
    one_by_one = strategy.population(4) == 1
    found = search(strategy, 30 if one_by_one else 6, fail=True)
    assert any(o.score is None for o in found)
    assert all(np.isfinite(o.vector).all() for o in found)


def test_a_generation_in_which_all_fail(strategy: Strategy) -> None:
    history = search(strategy, 1)
    last = history[-1].generation
    broken = tuple(
        Observation(o.generation, o.slot, o.vector, o.operator, None) if o.generation == last else o
        for o in history
    )
    assert len(search(strategy, 2, history=broken)) > len(broken)


def test_any_strategy_takes_over(strategy: Strategy) -> None:
    for other in NAMES:
        begun = search(plugins.load("agentmerge.strategies", other), 3)
        assert search(strategy, 2, history=begun)[-1].generation == begun[-1].generation + 2


def test_a_cut_generation_and_a_small_budget(strategy: Strategy) -> None:
    history = search(strategy, 3)[:-2]
    asked = strategy.propose(space(), history, None, 2, rng_factory(0))
    assert len(asked) == 2
    assert strategy.propose(space(), history, None, 0, rng_factory(0)) == []


def test_one_dimension(strategy: Strategy) -> None:
    found = search(strategy, 3, dimensions=1)
    assert all(len(o.vector or ()) == 1 for o in found)


def driven(
    strategy: Strategy, objective: Objective, evaluations: int, past: tuple[Observation, ...] = ()
) -> tuple[Observation, ...]:
    """A search of an objective that fails in places."""
    there = space()
    points = [p for _, _, p in [*there.parents(), *there.scale_points()] if p]
    found = list(past) or [
        objective.observe(0, slot, point, "scale", fail=True) for slot, point in enumerate(points)
    ]
    while len(found) < evaluations:
        count = min(strategy.population(4), evaluations - len(found))
        asked = strategy.propose(there, tuple(found), None, count, rng_factory(3))
        if not asked:
            break
        generation = found[-1].generation + 1
        for slot, proposal in enumerate(asked):
            assert proposal.vector is not None
            assert all(0.0 <= x <= 1.0 for x in proposal.vector)
            found.append(
                objective.observe(generation, slot, proposal.vector, proposal.operator, fail=True)
            )
    return tuple(found)


@pytest.mark.parametrize("kind", KINDS)
def test_it_gains_whatever_the_objective_is_like(strategy: Strategy, kind: str) -> None:
    objective = Objective(kind, (0.3, 0.45, 0.6, 0.4))
    found = driven(strategy, objective, 26)
    rivals = [o.score for o in found if o.generation == 0 and o.score is not None]
    own = [o.score for o in found if o.generation > 0 and o.score is not None]
    assert any(o.score is None for o in found), "nothing failed"
    learns = getattr(strategy, "uses_items", False)  # the others have hardly begun by then
    if strategy.name not in ("random", "sobol", "tpe"):  # points of chance, by then
        assert max(own) > (max(rivals) if learns else np.median(rivals))
    part = tuple(o for o in found if o.generation <= found[-1].generation // 2)
    assert driven(strategy, objective, 26, part) == found


def test_what_was_scored_under_other_settings_is_no_failure(strategy: Strategy) -> None:
    """A branch that asks something else: candidates of before have evidence and no score."""
    objective = Objective("margins", (0.3, 0.45, 0.6, 0.4))
    before = [
        replace(o, score=None, prior=True)
        for o in driven(strategy, objective, 26)
        if o.score is not None
    ]
    again = before[-1].generation + 1
    rivals = [
        objective.observe(again, slot, point, "scale")
        for slot, (_, _, point) in enumerate(space().scale_points())
        if point
    ]
    count = strategy.population(4)
    asked = strategy.propose(space(), (*before, *rivals), None, count, rng_factory(3))
    assert len(asked) == count
    without = strategy.propose(space(), tuple(rivals), None, count, rng_factory(3))
    if not getattr(strategy, "uses_items", False) and strategy.name != "sobol":
        assert asked == without, "what has no score was taken for something"


def test_cma_es_one_at_a_time_is_told_what_a_population_is() -> None:
    """Asked for one at a time it gains as it does in populations: none of them stays untold."""
    strategy = plugins.load("agentmerge.strategies", "cma_es")
    size = strategy.population(4)
    there, found = space(), list(search(strategy, 0))
    for _ in range(12 * size):
        (asked,) = strategy.propose(there, tuple(found), None, 1, rng_factory(0))
        point = asked.vector or ()
        found.append(
            Observation(found[-1].generation + 1, 0, point, asked.operator, fitness(point))
        )
    own = [o.score for o in found if o.generation > 0]
    assert len({o.vector for o in found}) == len(found)
    assert np.median(own[-size:]) > np.median(own[:size]) + 0.02
    assert max(own) > -1e-2


def test_cma_es_beats_random_on_a_sphere() -> None:
    best = {}
    for name in ("cma_es", "random"):
        runs = [
            max(o.score for o in search(plugins.load("agentmerge.strategies", name), 15, seed=s))
            for s in range(5)
        ]
        best[name] = float(np.median(runs))
    assert best["cma_es"] > best["random"]
    assert best["cma_es"] > -1e-3


def test_built_ins_and_plugins_share_one_door() -> None:
    assert set(NAMES) >= {
        "cma_es", "llm_evo", "margins", "null_llm", "one_plus_one", "random", "sobol", "tpe",
    }  # fmt: skip
    assert set(NAMES) >= {p.name for p in entry_points(group="agentmerge.strategies")}
