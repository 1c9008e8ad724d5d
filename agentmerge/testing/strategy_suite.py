"""What every strategy promises (``contracts/strategy.py``), as tests that its author inherits.

    class TestMine(StrategySuite):
        @pytest.fixture
        def strategy(self):
            return STRATEGY

A pure function of history, in the unit box, whatever the objective is like. It knows the contract,
and no strategy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from agentmerge.config import GenomeConfig
from agentmerge.contracts.strategy import Observation, Strategy, rng_factory
from agentmerge.plugins import load
from agentmerge.space import seeds
from agentmerge.space.grouped import SearchSpace
from agentmerge.testing.landscapes import KINDS, Landscape


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
    """Drive a strategy; candidates whose first value is above 0.5 fail where ``fail``."""
    there = space(dimensions)
    found = list(history)
    if not found:
        points = [p for _, _, p in seeds.parents(there) if p] + [there.uniform()[1]]
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


def driven(
    strategy: Strategy, objective: Landscape, evaluations: int, past: tuple[Observation, ...] = ()
) -> tuple[Observation, ...]:
    """A search of an objective that fails in places."""
    there = space()
    points = [p for _, _, p in [*seeds.parents(there), *seeds.scale_points(there)] if p]
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


class StrategySuite:
    """predecessors: strategies by name that the one takes over from."""

    predecessors: Sequence[str] = ("random", "cma_es", "margins", "llm_evo")

    @pytest.fixture
    def strategy(self) -> Strategy:
        raise NotImplementedError("override the fixture: it returns the strategy to judge")

    def is_chance(self, strategy: Strategy) -> bool:
        """Whether its first two dozen points are of chance, and owe no gain."""
        return False

    def counts_tries(self, strategy: Strategy) -> bool:
        """Whether its points follow from how many there were, as those of a sequence do."""
        return False

    def test_same_history_same_proposals(self, strategy: Strategy) -> None:
        first = search(strategy, 4)
        search(strategy, 2, seed=9)
        assert search(strategy, 4) == first

    def test_resumed_anywhere_it_goes_the_same_way(self, strategy: Strategy) -> None:
        whole = search(strategy, 5)
        for stop in range(1, 5):
            part = tuple(o for o in whole if o.generation <= stop)
            assert search(strategy, 5 - stop, history=part) == whole

    def test_the_global_generator_is_left_alone(self, strategy: Strategy) -> None:
        np.random.seed(3)
        before = np.random.random(8).tolist()
        np.random.seed(3)
        search(strategy, 2)
        assert np.random.random(8).tolist() == before

    def test_seeds_make_a_difference(self, strategy: Strategy) -> None:
        assert search(strategy, 2, seed=1) != search(strategy, 2, seed=2)

    def test_it_stays_in_the_unit_box(self, strategy: Strategy) -> None:
        for observation in search(strategy, 6):
            assert all(0.0 <= x <= 1.0 for x in observation.vector or ())

    def test_failures_are_lived_with(self, strategy: Strategy) -> None:
        one_by_one = strategy.population(4) == 1
        found = search(strategy, 30 if one_by_one else 6, fail=True)
        assert any(o.score is None for o in found)
        assert all(np.isfinite(o.vector or ()).all() for o in found)

    def test_a_generation_in_which_all_fail(self, strategy: Strategy) -> None:
        history = search(strategy, 1)
        last = history[-1].generation
        broken = tuple(
            Observation(o.generation, o.slot, o.vector, o.operator, None)
            if o.generation == last
            else o
            for o in history
        )
        assert len(search(strategy, 2, history=broken)) > len(broken)

    def test_any_strategy_takes_over(self, strategy: Strategy) -> None:
        for other in self.predecessors:
            begun = search(load("agentmerge.strategies", other), 3)
            assert search(strategy, 2, history=begun)[-1].generation == begun[-1].generation + 2

    def test_a_cut_generation_and_a_small_budget(self, strategy: Strategy) -> None:
        history = search(strategy, 3)[:-2]
        asked = strategy.propose(space(), history, None, 2, rng_factory(0))
        assert len(asked) == 2
        assert strategy.propose(space(), history, None, 0, rng_factory(0)) == []

    def test_one_dimension(self, strategy: Strategy) -> None:
        found = search(strategy, 3, dimensions=1)
        assert all(len(o.vector or ()) == 1 for o in found)

    @pytest.mark.parametrize("kind", KINDS)
    def test_it_gains_whatever_the_objective_is_like(self, strategy: Strategy, kind: str) -> None:
        objective = Landscape(kind, (0.3, 0.45, 0.6, 0.4))
        found = driven(strategy, objective, 26)
        rivals = [o.score for o in found if o.generation == 0 and o.score is not None]
        own = [o.score for o in found if o.generation > 0 and o.score is not None]
        assert any(o.score is None for o in found), "nothing failed"
        learns = getattr(strategy, "uses_items", False)  # the others have hardly begun by then
        if not self.is_chance(strategy):
            assert max(own) > (max(rivals) if learns else np.median(rivals))
        part = tuple(o for o in found if o.generation <= found[-1].generation // 2)
        assert driven(strategy, objective, 26, part) == found

    def test_what_was_scored_under_other_settings_is_no_failure(self, strategy: Strategy) -> None:
        """A branch that asks something else: candidates of before have evidence and no score."""
        objective = Landscape("margins", (0.3, 0.45, 0.6, 0.4))
        before = [
            replace(o, score=None, prior=True)
            for o in driven(strategy, objective, 26)
            if o.score is not None
        ]
        again = before[-1].generation + 1
        rivals = [
            objective.observe(again, slot, point, "scale")
            for slot, (_, _, point) in enumerate(seeds.scale_points(space()))
            if point
        ]
        count = strategy.population(4)
        asked = strategy.propose(space(), (*before, *rivals), None, count, rng_factory(3))
        assert len(asked) == count
        without = strategy.propose(space(), tuple(rivals), None, count, rng_factory(3))
        if not getattr(strategy, "uses_items", False) and not self.counts_tries(strategy):
            assert asked == without, "what has no score was taken for something"
