"""Searches from point to point begin at a merge; those that began at a parent go on as they did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import cma
import numpy as np
import pytest

from agentmerge.contracts.operators import INIT, PARENT
from agentmerge.contracts.strategy import Observation, default_population, rng_factory
from agentmerge.search.trials import seen_from
from agentmerge.strategies import cma_es
from tests.strategies.test_population import SPACE, strategy

RIVALS = ("cma_es", "one_plus_one")
SEED = 3
#: Far better than anything near it, as a parent is where experts interfere.
CORNER = (1.0, 0.0, 1.0, 0.0)


def score(vector: tuple[float, ...]) -> float:
    if vector == CORNER:
        return 0.5
    return 0.45 - float(((np.asarray(vector) - 0.6) ** 2).sum())


def known(operator: str) -> list[Observation]:
    """Generation 0, its best made by ``operator``."""
    return [
        Observation(0, slot, point, made, score(point))
        for slot, (point, made) in enumerate(
            [
                ((0.0,) * 4, PARENT),
                (CORNER, operator),
                ((0.3,) * 4, "uniform"),
                ((0.4,) * 4, "scale"),
            ]
        )
    ]


def asked(name: str, history: Sequence[Observation], count: int) -> list[tuple[float, ...]]:
    found = strategy(name).propose(SPACE, tuple(history), None, count, rng_factory(SEED))
    return [p.vector for p in found if p.vector is not None]


def searched(name: str, operator: str, count: int, generations: int = 12) -> list[Observation]:
    history = known(operator)
    for generation in range(1, generations + 1):
        history += [
            Observation(generation, slot, point, name, score(point))
            for slot, point in enumerate(asked(name, history, count))
        ]
    return history


@pytest.mark.parametrize("count", [1, 6])
@pytest.mark.parametrize("name", RIVALS)
def test_it_begins_at_the_best_merge_that_is_no_parent(name: str, count: int) -> None:
    history = searched(name, PARENT, count)
    without = [replace(o, score=None) if o.operator == PARENT else o for o in history]
    for generation in range(1, 12):
        past = [o for o in history if o.generation < generation]
        hidden = [o for o in without if o.generation < generation]
        assert asked(name, past, count) == asked(name, hidden, count)
    best = max(o.score or -9.0 for o in history[4:])
    assert best > score((0.4,) * 4), "it climbs from the merge"


@pytest.mark.parametrize("count", [1, 6])
@pytest.mark.parametrize("name", RIVALS)
def test_a_search_that_began_at_a_parent_goes_on_as_it_did(name: str, count: int) -> None:
    """A warm start may be anywhere: with it in the parent's place the search begins there."""
    then = [
        replace(o, operator=PARENT) if o.operator == INIT else o
        for o in searched(name, INIT, count)
    ]
    now = searched(name, PARENT, count)
    assert [o.vector for o in then[4:]] != [o.vector for o in now[4:]]
    for history in (then, now):
        for place in range(5, len(history)):  # stopped anywhere, inside a population as well
            if history[place].slot:
                continue
            rest = [o.vector for o in history if o.generation == history[place].generation]
            assert asked(name, history[:place], count) == rest


@pytest.mark.parametrize("name", RIVALS)
def test_in_another_space_of_a_branch_it_begins_at_a_merge_too(name: str) -> None:
    """A branch that asks something else scores parents anew, later than generation 0; what was made
    in the other space is named otherwise there, parents are not."""
    past = [replace(o, score=None, prior=True) for o in known(PARENT)]
    anew = [replace(o, generation=4) for o in known(PARENT)]
    begun = [replace(o, space="first") for o in (*past, *anew)]
    here: Any = SimpleNamespace(key="second")
    seen = seen_from(begun, here, lambda o: o.vector)
    assert {o.operator for o in seen if o.generation == 4} == {PARENT, "carried"}
    without = [replace(o, score=None) if o.operator == PARENT else o for o in seen]
    assert asked(name, seen, 3) == asked(name, without, 3)
    only = [o for o in seen if o.operator == PARENT]
    assert asked(name, only, 3) != asked(name, without, 3), "where there is nothing else, there"


@pytest.mark.parametrize("name", RIVALS)
def test_where_only_parents_were_scored_it_begins_at_the_best(name: str) -> None:
    history = [replace(o, operator=PARENT) for o in known(PARENT)]
    assert len(asked(name, history, 3)) == 3


@pytest.mark.parametrize("start", [(0.5,) * 4, (1.0, 0.0, 0.002, 0.97), (0.0,) * 4])
def test_cma_es_is_pycma_with_its_own_bounds(start: tuple[float, ...]) -> None:
    """The same numbers give the same points as pycma run plainly, at the box's sides too."""
    cma_es._plays.clear()
    size, rng_for = default_population(4), rng_factory(SEED)
    numbers: list[np.random.Generator] = []
    plain = cma.CMAEvolutionStrategy(
        np.clip(start, 1e-3, 1 - 1e-3),
        1 / 6,
        {
            "bounds": [0, 1],
            "popsize": size,
            "seed": np.nan,
            "randn": lambda *shape: numbers[-1].standard_normal(shape),
            "verbose": -9,
        },
    )
    history = [Observation(0, 0, start, "uniform", -9.0)]
    for generation in range(1, 40):
        numbers.append(rng_for(generation, 0, "cma"))
        points = plain.ask()
        assert asked("cma_es", history, size) == [tuple(map(float, p)) for p in points]
        # The best lies beyond a corner, so that the search presses against two sides.
        costs = [float(((p - np.array([1.2, -0.2, 0.5, 0.5])) ** 2).sum()) for p in points]
        plain.tell(points, costs)
        history += [
            Observation(generation, slot, tuple(map(float, p)), "cma_es", -cost)
            for slot, (p, cost) in enumerate(zip(points, costs, strict=True))
        ]
    last = np.array([o.vector for o in history[-size:]])
    assert ((last >= 0) & (last <= 1)).all()
    assert abs(last.mean(0) - [1, 0, 0.5, 0.5]).max() < 0.05
