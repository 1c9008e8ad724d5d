"""What holds of every search space and every point in it, whatever is drawn."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from agentmerge.config import GenomeConfig
from agentmerge.errors import ConfigError
from agentmerge.methods import METHODS, SUM_NORMALIZED
from agentmerge.recipe import Recipe
from agentmerge.space import seeds
from agentmerge.space.grouped import SearchSpace
from agentmerge.testing.space_suite import comes_back

#: The documented upper bound of task-vector weights (docs/config.md).
TASK_VECTOR_UPPER = 1.5

KINDS = ("self_attn.q_proj", "mlp.up_proj", "input_layernorm")
METHOD_NAMES = ("linear", "task_arithmetic", "ties", "dare_ties", "slerp")


@st.composite
def spaces(draw: st.DrawFn) -> SearchSpace:
    layers = draw(st.sampled_from([2, 4, 6]))
    method = draw(st.sampled_from(METHOD_NAMES))
    plain = method == "slerp"
    genome = GenomeConfig(
        models=("org/a", "b", "./c")[: draw(st.integers(2, 3))],
        merge_method=method,
        base_model="base" if METHODS[method].needs_base else None,
        layer_granularity=draw(
            st.sampled_from([n for n in range(layers + 1) if n == 0 or layers % n == 0])
        ),
        normalize=draw(st.sampled_from([None, True, False])),
        allow_negative_weights=draw(st.booleans()),
        smooth=not plain and draw(st.booleans()),
        filters=() if plain else draw(st.sampled_from([(), ("mlp",), ("self_attn", "mlp")])),
    )
    return SearchSpace(genome, layers, merge_seed=draw(st.integers(0, 3)))


#: Corners, middles and anything between; a box is searched to its walls.
coordinates = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0.0, 1.0))


@st.composite
def points(draw: st.DrawFn) -> tuple[SearchSpace, tuple[float, ...]]:
    space = draw(spaces())
    size = space.dimensions
    return space, tuple(draw(st.lists(coordinates, min_size=size, max_size=size)))


def values(recipe: Recipe, layers: int) -> list[Any]:
    """What every tensor is made from."""
    found = []
    for layer in range(layers):
        for kind in KINDS:
            effective = recipe.effective(f"model.layers.{layer}.{kind}.weight", layer)
            found.append((effective.sources, effective.shared))
    return found


def has_weight(space: SearchSpace, point: tuple[float, ...]) -> bool:
    """No layer group whose weights add up to nothing: those are refused, by a rule of their own."""
    sums: dict[Any, float] = {}
    for axis, x in zip(space.axes, point, strict=True):
        if axis.parameter == "weight":
            key = (axis.group, axis.filter)
            sums[key] = sums.get(key, 0.0) + axis.low + x * (axis.high - axis.low)
    return all(abs(total) > 0.05 for total in sums.values())


@given(points())
@settings(max_examples=150, deadline=None)
def test_vector_to_recipe_to_vector_to_recipe_is_exact(
    drawn: tuple[SearchSpace, tuple[float, ...]],
) -> None:
    space, point = drawn
    recipe = comes_back(space, point)
    assert Recipe.parse(recipe.to_yaml()) == recipe


@given(points())
@settings(max_examples=60, deadline=None)
def test_without_normalize_the_vector_itself_comes_back(
    drawn: tuple[SearchSpace, tuple[float, ...]],
) -> None:
    space, point = drawn
    assume(not space.method.pairwise and not space.genome.normalizes)
    back = space.vector(space.recipe(point))
    assert back == pytest.approx(point, abs=1e-11)


@given(points())
@settings(max_examples=60, deadline=None)
def test_every_value_stays_within_its_bounds(
    drawn: tuple[SearchSpace, tuple[float, ...]],
) -> None:
    space, point = drawn
    assume(space.genome.merge_method not in SUM_NORMALIZED or has_weight(space, point))
    upper = TASK_VECTOR_UPPER if METHODS[space.genome.merge_method].needs_base else 1.0
    lower = -upper if space.genome.allow_negative_weights else 0.0
    if space.genome.normalizes and space.genome.merge_method in SUM_NORMALIZED:
        lower = -upper  # a common sign is taken out with the scale
    for sources, shared in values(space.recipe(point), space.num_layers):
        assert 0.0 <= dict(shared).get("t", 0.0) <= 1.0
        for _, _, own in sources:
            assert lower <= dict(own).get("weight", 0.0) <= upper
            assert 0.0 <= dict(own).get("density", 0.0) <= 1.0


@given(spaces())
@settings(max_examples=80, deadline=None)
def test_a_parents_end_point_is_that_parent_alone(space: SearchSpace) -> None:
    for name, recipe, point in seeds.parents(space):
        if point is None:
            assert name == space.genome.base_model or space.method.pairwise
            continue
        assert space.recipe(point) == recipe
        for sources, shared in values(recipe, space.num_layers):
            if space.method.pairwise:
                share = dict(shared)["t"]
                assert share in (0.0, 1.0)
                assert sources[int(share)][0] == name
                continue
            weights = {model: dict(own)["weight"] for model, _, own in sources if own}
            expected = {model: float(model == name) for model in weights}
            assert weights == expected
            assert {dict(own).get("density", 1.0) for _, _, own in sources if own} <= {1.0}


@given(spaces())
@settings(max_examples=60, deadline=None)
def test_freedoms_are_the_dimensions_that_change_the_merge(space: SearchSpace) -> None:
    scaled = space.genome.normalizes and not space.method.pairwise
    places = len(space.filters) * (1 if space.genome.smooth else space.groups)
    assert space.freedoms == space.dimensions - (places if scaled else 0)
    assert len({axis.name for axis in space.axes}) == space.dimensions


@given(points(), st.floats(0.2, 0.9))
@settings(max_examples=80, deadline=None)
def test_under_normalize_scaled_weights_are_the_same_point(
    drawn: tuple[SearchSpace, tuple[float, ...]], scale: float
) -> None:
    space, point = drawn
    genome = space.genome
    assume(genome.normalizes and not space.method.pairwise and not genome.allow_negative_weights)
    rounded = [round(x, 3) for x in point]
    scale = round(scale, 2)
    scaled = [
        x * scale if axis.parameter == "weight" else x
        for axis, x in zip(space.axes, rounded, strict=True)
    ]
    assert space.recipe(scaled).hash() == space.recipe(rounded).hash()


@pytest.mark.parametrize("step", [3, 5, 9])
def test_a_granularity_that_does_not_divide_names_the_legal_values(step: int) -> None:
    genome = GenomeConfig(models=("a", "b"), merge_method="linear", layer_granularity=step)
    with pytest.raises(ConfigError) as caught:
        SearchSpace(genome, 8)
    text = str(caught.value)
    assert f"layer_granularity {step}" in text
    assert "8 layers" in text
    assert "[1, 2, 4, 8]" in text


def test_recipes_outside_the_space_have_no_point() -> None:
    genome = GenomeConfig(
        models=("a", "b"), base_model="base", merge_method="task_arithmetic", layer_granularity=2
    )
    space = SearchSpace(genome, 4)

    def recipe(method: str, *weights: Any, **rest: Any) -> Recipe:
        models = [
            {"model": model, "parameters": {"weight": weight}}
            for model, weight in zip(("a", "b"), weights, strict=True)
        ]
        return Recipe.parse({"merge_method": method, "models": models} | rest)

    base = {"base_model": "base"}
    assert space.vector(recipe("task_arithmetic", 0.3, 0.6, **base)) == pytest.approx(
        (0.2, 0.4) * 2
    )
    outside = [
        recipe("linear", 0.3, 0.6),
        recipe("task_arithmetic", 0.3, 1.7, **base),
        recipe("task_arithmetic", 0.3, -0.1, **base),
        recipe("task_arithmetic", 0.3, [0.1, 0.6], **base),
        recipe("task_arithmetic", 0.3, 0.6, base_model="another"),
        recipe("task_arithmetic", 0.3, 0.6, **base, parameters={"lambda": 0.5}),
        recipe("task_arithmetic", 0.3, [{"filter": "mlp", "value": 1}, {"value": 0.5}], **base),
    ]
    assert [space.vector(found) for found in outside] == [None] * len(outside)


def test_slerp_reaches_every_pair_in_every_group() -> None:
    genome = GenomeConfig(models=("a", "b", "c"), merge_method="slerp", layer_granularity=2)
    space = SearchSpace(genome, 4)
    assert space.dimensions == 6
    pairs = set()
    for base in (0.1, 0.5, 0.9):
        for partner in (0.2, 0.8):
            recipe = space.recipe((base, partner, 0.25, 0.1, 0.2, 0.75))
            first = recipe.slices[0]
            pairs.add((first.base_model, *(s.model for s in first.sources)))
            assert space.recipe(space.vector(recipe) or ()) == recipe
    expected = {(x, x, y) for x in "abc" for y in "abc" if x != y}
    assert pairs == expected
