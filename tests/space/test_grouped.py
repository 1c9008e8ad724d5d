"""Recipe -> vector -> recipe is exact, over every kind of space."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from agentmerge.config import GenomeConfig
from agentmerge.errors import ConfigError, RecipeRejected
from agentmerge.space import seeds
from agentmerge.space.grouped import SearchSpace
from agentmerge.testing import SpaceSuite
from agentmerge.testing.space_suite import comes_back

METHODS = ("linear", "task_arithmetic", "ties", "dare_ties", "slerp")


def space_of(method: str, layers: int = 4, **genome: object) -> SearchSpace:
    genome = {"models": ("a", "b"), "merge_method": method} | genome
    if method not in ("linear", "slerp"):
        genome.setdefault("base_model", "base")
    return SearchSpace(GenomeConfig(**genome), layers)


def spaces() -> list[SearchSpace]:
    found = []
    for method, step, smooth, filters, negative, normalize, models in itertools.product(
        METHODS,
        (0, 1, 2),
        (False, True),
        ((), ("self_attn", "mlp")),
        (False, True),
        (None, True, False),
        (("a", "b"), ("a", "b", "c")),
    ):
        if method == "slerp" and (smooth or filters or negative):
            continue
        found.append(
            space_of(
                method,
                models=models,
                layer_granularity=step,
                smooth=smooth,
                filters=filters,
                allow_negative_weights=negative,
                normalize=normalize,
            )
        )
    return found


def test_recipe_to_vector_to_recipe_is_exact() -> None:
    rng = np.random.default_rng(0)
    checked = 0
    for space in spaces():
        comes_back(space, rng.random(space.dimensions).tolist())
        checked += 1
    assert checked > 500


def test_seeds_lie_where_they_say() -> None:
    for space in spaces():
        merges = [*seeds.scale_points(space), *seeds.depth_line(space)]
        for _, recipe, point in [*seeds.parents(space), ("uniform", *space.uniform()), *merges]:
            if point is not None:
                assert space.recipe(point) == recipe
                assert space.vector(recipe) is not None
        based = space.genome.base_model is not None
        assert len(seeds.parents(space)) == len(space.models) + based


def test_bounds() -> None:
    weights = {a.high for a in space_of("task_arithmetic").axes}
    assert weights == {1.5}
    assert {a.high for a in space_of("task_arithmetic", normalize=True).axes} == {1.0}
    negative = space_of("linear", allow_negative_weights=True)
    assert {(a.low, a.high) for a in negative.axes} == {(-1.0, 1.0)}
    densities = [a for a in space_of("ties").axes if a.parameter == "density"]
    assert {(a.low, a.high) for a in densities} == {(0.0, 1.0)}


def test_negative_weights_reach_the_recipe() -> None:
    space = space_of("task_arithmetic", allow_negative_weights=True)
    recipe = space.recipe([0.0] * space.dimensions)
    effective = recipe.effective("model.layers.0.mlp.up_proj.weight", 0)
    assert dict(effective.sources[0][2])["weight"] == -1.5


def test_freedoms_leave_out_what_normalize_makes_redundant() -> None:
    space = space_of("ties", layer_granularity=1, filters=("mlp",))
    assert space.dimensions == 4 * 2 * 2 * 2
    assert space.freedoms == space.dimensions - 4 * 2
    smooth = space_of("ties", layer_granularity=1, filters=("mlp",), smooth=True)
    assert smooth.freedoms == smooth.dimensions - 2


def test_a_base_among_the_models_has_no_axis_of_its_own() -> None:
    space = space_of("task_arithmetic", models=("a", "base", "b"))
    assert space.models == ("a", "b")
    assert len(seeds.parents(space)) == 3


def test_granularity_that_does_not_divide_names_those_that_do() -> None:
    with pytest.raises(ConfigError, match=r"3 does not divide the 4 layers.*\[1, 2, 4\]"):
        space_of("linear", layer_granularity=3)


def test_a_point_outside_the_box_is_refused() -> None:
    with pytest.raises(RecipeRejected, match="2 values in"):
        space_of("task_arithmetic").recipe([0.5, 1.5])


class TestGrouped(SpaceSuite):
    @pytest.fixture(params=METHODS)
    def space(self, request: pytest.FixtureRequest) -> SearchSpace:
        plain = request.param == "slerp"
        return space_of(
            request.param,
            models=("a", "b", "c"),
            layer_granularity=2,
            filters=() if plain else ("self_attn", "mlp"),
            allow_negative_weights=not plain,
        )
