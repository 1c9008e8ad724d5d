"""What every strategy promises, on every strategy that ships; and what only some do."""

from __future__ import annotations

from importlib.metadata import entry_points

import numpy as np
import pytest

from agentmerge.contracts.strategy import Observation, Strategy, rng_factory
from agentmerge.plugins import known, load
from agentmerge.testing import StrategySuite
from agentmerge.testing.strategy_suite import fitness, search, space

NAMES = sorted(known("agentmerge.strategies"))


class TestStrategies(StrategySuite):
    predecessors = NAMES

    @pytest.fixture(params=NAMES)
    def strategy(self, request: pytest.FixtureRequest) -> Strategy:
        return load("agentmerge.strategies", request.param)

    def is_chance(self, strategy: Strategy) -> bool:
        return strategy.name in ("random", "sobol", "tpe")

    def counts_tries(self, strategy: Strategy) -> bool:
        return strategy.name == "sobol"


def test_cma_es_one_at_a_time_is_told_what_a_population_is() -> None:
    """Asked for one at a time it gains as it does in populations: none of them stays untold."""
    strategy = load("agentmerge.strategies", "cma_es")
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
            max(o.score for o in search(load("agentmerge.strategies", name), 15, seed=s))
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
