"""The dimension ladder's rungs: inside the box, and one within the other."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from agentmerge.config import GenomeConfig
from agentmerge.space.grouped import SearchSpace
from agentmerge.space.subspaces import rungs


def space_of(method: str, layers: int = 4, **changes) -> SearchSpace:
    models = ("north", "south", "west")[: 2 if method == "slerp" else 3]
    genome = GenomeConfig(
        models=models, base_model="base", merge_method=method, layer_granularity=1, **changes
    )
    return SearchSpace(genome, layers, "float32")


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "slerp", "dare_ties"])
def test_rungs_lie_one_within_the_other(method: str) -> None:
    space = space_of(method)
    found = rungs(space)
    assert len(found) == 3
    assert np.array_equal(found[-1], np.eye(space.dimensions))
    for basis in found:
        assert np.all(basis >= 0)
        assert basis.sum(0) == pytest.approx(1.0)
    for lower, upper in itertools.pairwise(found):
        assert len(lower) < len(upper)
        points = np.random.default_rng(0).random((20, len(lower))) @ lower
        again = points @ np.linalg.pinv(upper) @ upper
        assert again == pytest.approx(points)


def test_the_first_rung_is_one_value_a_model() -> None:
    space = space_of("task_arithmetic", filters=("mlp",))
    point = np.array([0.2, 0.5, 0.8]) @ rungs(space)[0]
    told = {axis.model: x for axis, x in zip(space.axes, point, strict=True)}
    assert told == pytest.approx({"north": 0.2, "south": 0.5, "west": 0.8})
    assert len(set(point)) == 3


@pytest.mark.parametrize(("filters", "sizes"), [((), [2]), (("mlp",), [2, 4])])
def test_one_group_has_no_line(filters: tuple[str, ...], sizes: list[int]) -> None:
    genome = GenomeConfig(
        models=("north", "south"),
        base_model="base",
        merge_method="task_arithmetic",
        filters=filters,
    )
    assert [len(basis) for basis in rungs(SearchSpace(genome, 4, "float32"))] == sizes


def test_filters_move_together_below_the_whole_space() -> None:
    space = space_of("task_arithmetic", filters=("self_attn", "mlp"))
    assert [len(basis) for basis in rungs(space)] == [3, 6, 12, 36]
    point = np.linspace(0, 1, 12) @ rungs(space)[2]
    told: dict[tuple[str | None, int], set[float]] = {}
    for axis, x in zip(space.axes, point, strict=True):
        told.setdefault((axis.model, axis.group), set()).add(float(x))
    assert all(len(values) == 1 for values in told.values())
    assert len(told) == 12
