"""A space of layers: a point is one stack, and the way there and back is exact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agentmerge.config import GenomeConfig, LayersConfig
from agentmerge.contracts.advice import StructuralMove
from agentmerge.contracts.worker import Gradient, TensorSlope
from agentmerge.errors import UserError
from agentmerge.merging.family import Family
from agentmerge.methods import RECIPE_METHODS
from agentmerge.recipe import Recipe
from agentmerge.space.chain_rule import differentiable_axes, unit_gradient
from agentmerge.space.grouped import SearchSpace
from agentmerge.space.layers import DEAD
from agentmerge.space.moves import moved
from agentmerge.testing.space_suite import SpaceSuite, drawn
from tests.merging.stack_cases import write_family

OUTPUTS = ("self_attn.o_proj", "mlp.down_proj")


def layered(
    layers: dict[str, Any] | None = None, *, depth: int = 4, answer: float = 0.4, **genome: Any
) -> SearchSpace:
    """The space of layers over a point of a space of weights."""
    body = {"models": ("a", "b"), "base_model": "base", "merge_method": "task_arithmetic"}
    made = GenomeConfig(**{**body, **genome}, layers=LayersConfig(**(layers or {})))
    weights = SearchSpace(made, depth, "float32", outputs=OUTPUTS)
    rng = np.random.default_rng(int(answer * 100))
    under = weights.recipe(tuple(rng.random(weights.dimensions)))
    return SearchSpace(made, depth, "float32", outputs=OUTPUTS, under=under)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "experts": ({}, {}),
    "all there may be": ({"insert": ("merge", "experts", "base"), "most": 99}, {}),
    "few": ({"most": 1}, {}),
    "skip": ({"skip": True, "insert": ("merge", "a"), "most": 2}, {}),
    "skip alone": ({"skip": True, "most": 0}, {}),
    "other scales": ({"scales": (-0.3, 1.1)}, {}),
    "linear": ({"skip": True}, {"merge_method": "linear", "base_model": None}),
    "filters": (
        {"skip": True, "insert": "merge"},
        {"filters": ("self_attn", "mlp"), "layer_granularity": 2, "normalize": True},
    ),
    "filter of whole layers": ({"skip": True, "insert": "merge"}, {"filters": ("layers",)}),
    "filter of an ending": ({"insert": "merge"}, {"filters": ("proj.weight", "mlp")}),
    "smooth": ({"insert": ("merge", "b")}, {"smooth": True, "layer_granularity": 1}),
    "lambda": ({}, {"evolve": ("lambda",)}),
    "ties": ({"skip": True, "insert": ("merge", "a")}, {"merge_method": "ties"}),
    "dare": ({}, {"merge_method": "dare_ties", "layer_granularity": 2, "filters": ("mlp",)}),
    "slerp": ({"most": 2}, {"merge_method": "slerp", "base_model": None, "layer_granularity": 1}),
    "nuslerp": ({"insert": "merge"}, {"merge_method": "nuslerp", "base_model": None}),
    "path of ties": ({"path": True, "most": 3}, {"merge_method": "ties"}),
    "path": ({"path": True, "most": 6}, {}),
    "repeated path": ({"path": True, "repeats": 2, "insert": ("a", "merge"), "most": 3}, {}),
}


@pytest.mark.parametrize("case", CASES)
class TestLayers(SpaceSuite):
    @pytest.fixture
    def space(self, case: str) -> SearchSpace:  # type: ignore[override]
        layers, genome = CASES[case]
        return layered(layers, **genome)

    def test_the_neutral_point_is_the_merge_under_it(self, space: SearchSpace) -> None:
        assert space.stacks is not None
        assert space.under is not None
        point = space.stacks.neutral()
        assert space.recipe(point) == space.under
        assert space.vector(space.under) == space.made_legal(point) == point
        assert space.uniform() == (space.under, point)

    def test_no_stack_is_deeper_than_it_may_be(self, space: SearchSpace) -> None:
        assert space.stacks is not None
        depths = [depth_of(space.recipe(point)) for point in drawn(space)]
        assert max(depths) <= space.stacks.depth <= 4 + space.stacks.settings.most
        assert min(depths) >= 2

    def test_the_first_and_the_last_layer_are_the_merges(self, space: SearchSpace) -> None:
        for point in drawn(space):
            recipe = space.recipe(point)
            for ours, theirs, after in ((0, 0, False), (depth_of(recipe) - 1, 3, True)):
                for name in ("embed_tokens", "self_attn.q_proj", "mlp.down_proj"):
                    at = None if name == "embed_tokens" else ours
                    under = None if name == "embed_tokens" else theirs
                    own = weights(space.under, name, under, after)
                    want = {"a merge": 1.0} if recipe.merges else own
                    assert weights(recipe, name, at, after) == pytest.approx(want, abs=1e-9)

    def test_a_vector_comes_back(self, space: SearchSpace) -> None:
        for point in drawn(space):
            assert space.vector(space.recipe(point)) == pytest.approx(point, abs=1e-9)

    def test_what_a_gradient_is_asked_of_is_the_same_stack(self, space: SearchSpace) -> None:
        """The point's layers in their order, and between them layers whose scales are 0."""
        for point in drawn(space):
            whole, mine = space.slope_recipe(point), space.recipe(point)
            found = [row for row in layers_of(whole) if row[1] != (0.0, 0.0)]
            own = layers_of(mine) if mine != space.under else found
            assert [row[0] for row in found] == [row[0] for row in own]
            assert np.allclose([row[1] for row in found], [row[1] for row in own])


def weights(recipe: Recipe | None, name: str, layer: int | None, after: bool) -> dict[str, float]:
    """As a linear merge that divides by nothing has them."""
    assert recipe is not None
    made = recipe.effective(name, layer, after=after)
    if RECIPE_METHODS[made.method].name not in ("linear", "task_arithmetic"):
        return {"a merge": 1.0}
    shared = dict(made.shared)
    own = {model: dict(values)["weight"] for model, _, values in made.sources if values}
    divisor = sum(own.values()) if shared.get("normalize") else 1.0
    own = {model: shared.get("lambda", 1.0) * weight / divisor for model, weight in own.items()}
    if recipe.merges:  # made first
        own = {"a merge" if model == "merge" else model: weight for model, weight in own.items()}
    if made.method == "task_arithmetic":
        own["base"] = 1.0 - sum(own.values())
    return {model: weight for model, weight in own.items() if abs(weight) > 1e-12}


def depth_of(recipe: Recipe) -> int:
    return sum(
        layers[1] - layers[0]
        for layers in (s.sources[0].layer_range for s in recipe.slices)
        if layers
    )


def layers_of(recipe: Recipe) -> list[tuple[Any, tuple[float, ...]]]:
    """(models and layer, what either output weighs) of each layer."""
    found = []
    for layer in range(depth_of(recipe)):
        made = recipe.effective(f"model.layers.{layer}.self_attn.q_proj.weight", layer)
        sums = [
            sum(weights(recipe, f"model.layers.{layer}.{name}.weight", layer, False).values())
            for name in OUTPUTS
        ]
        found.append((tuple(source[:2] for source in made.sources), tuple(sums)))
    return found


def test_positions_are_where_the_design_has_them() -> None:
    stacks = layered().stacks
    assert stacks is not None
    row = " ".join(f"{p.model or 'm'}{p.layer}" for p in stacks.positions)
    assert row == "m0 a0 b0 m1 a1 b1 m2 a2 b2 a3 b3 m3"
    assert len(stacks.axes) == 16, "both scales of eight places"
    path = layered({"path": True, "insert": "b", "repeats": 2}).stacks
    assert path is not None
    row = " ".join(f"{p.model or 'm'}{p.layer}" for p in path.positions)
    assert row == "m0 m1 m2 m3 b0 b1 b2 b3 m0 m1 m2 m3 b0 b1 b2 b3 m3"
    assert [p.layer for p in path.positions if p.home] == [0, 1, 2, 3]


def test_a_stack_is_one_mergekit_document() -> None:
    space = layered({"insert": "a"})
    assert space.stacks is not None
    values = [0.0] * space.dimensions
    values[2:4] = 0.31, -0.2  # of a's layer 1, after the merge's
    point = tuple(axis.unit(v) for axis, v in zip(space.axes, values, strict=True))
    text = space.recipe(point).to_dict()
    assert text["merge_method"] == "linear"
    assert text["parameters"] == {"normalize": 0.0}
    assert [len(piece["sources"]) for piece in text["slices"]] == [3, 1, 3], "runs are one slice"
    (own,) = text["slices"][1]["sources"]
    assert own["layer_range"] == [1, 2]
    assert own["parameters"]["weight"] == [
        {"filter": "self_attn.o_proj", "value": 0.31},
        {"filter": "mlp.down_proj", "value": -0.2},
        {"value": 1.0},
    ]


def test_the_weakest_are_left_out_and_what_is_near_nothing_is_nothing() -> None:
    space = layered({"most": 2})
    assert space.stacks is not None
    values = [0.0] * space.dimensions
    values[0], values[2], values[4], values[7] = 0.3, -0.2, 0.25, 0.9 * DEAD
    found = space.stacks.projected(values)
    assert {i: v for i, v in enumerate(found) if v} == {0: 0.3, 4: 0.25}


def test_a_repeat_of_the_merges_layer_stands_in_for_it() -> None:
    """With ``skip``: one of two equal layers is the first, whichever place it was drawn in."""
    space = layered({"skip": True, "insert": "merge", "most": 0})
    assert space.stacks is not None
    names = [axis.name for axis in space.axes]
    values = [0.0] * space.dimensions
    for part, value in (("attention", 0.4), ("mlp", 0.7)):
        values[names.index(f"place 3: merge's layer 1 {part}")] = value
    found = dict(zip(names, space.stacks.projected(values), strict=True))
    assert found["place 2: merge's layer 1 attention"] == 0.4
    assert found["place 3: merge's layer 1 mlp"] == 0.0


@pytest.mark.parametrize(
    ("genome", "words"),
    [
        ({"depth": 1}, "a model of one layer has no place for another"),
    ],
)
def test_models_too_shallow_for_layers(genome: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        _ = layered(**genome).axes


def test_spaces_are_told_apart_and_weights_are_what_they_were() -> None:
    one, same, other = layered(), layered(), layered(answer=0.7)
    assert one.key == same.key != other.key
    body = {"models": ("a", "b"), "base_model": "base", "merge_method": "task_arithmetic"}
    plain = SearchSpace(GenomeConfig(**body), 4)
    assert SearchSpace(GenomeConfig(**body, layers=4), 4, outputs=OUTPUTS).key == plain.key


@pytest.mark.parametrize("case", ["path", "repeated path"])
def test_slopes_of_a_path_are_asked_of_a_stack_where_it_begins_too(case: str) -> None:
    """Where its weights can be said; a ties merge alone in its place is that merge."""
    layers, genome = CASES[case]
    space = layered(layers, **genome)
    start = space.uniform()[1]
    assert start is not None
    asked = space.slope_recipe(start)
    assert asked.merge_method == "linear"
    assert asked != space.under
    assert depth_of(asked) == depth_of(space.recipe(start))


@pytest.mark.parametrize("case", [case for case in CASES if "path" not in case])
def test_slopes_are_those_of_the_scales(case: str) -> None:
    """Of an invented loss that is linear in every tensor's weights: its differences are exact."""
    layers, genome = CASES[case]
    space = layered(layers, **genome)
    assert space.stacks is not None
    rng = np.random.default_rng(3)
    pull = {}

    def loss(recipe: Recipe) -> float:
        return sum(pull[key] * value for key, value in read(recipe))

    def read(recipe: Recipe) -> list[tuple[Any, float]]:
        found = []
        for layer in range(depth_of(recipe)):
            for output in OUTPUTS:
                name = f"model.layers.{layer}.{output}.weight"
                for model, _, own in recipe.effective(name, layer).sources:
                    found.append(((name, layer, model), dict(own)["weight"]))
        return found

    point = space.made_legal(rng.random(space.dimensions))
    whole = space.slope_recipe(point)
    pull = {key: rng.normal() for key, _ in read(whole)}
    rows: dict[Any, list[tuple[str, float]]] = {}
    for (name, layer, model), _ in read(whole):
        rows.setdefault((name, layer), []).append((model, pull[name, layer, model]))
    slopes = tuple(TensorSlope(n, layer, False, tuple(own)) for (n, layer), own in rows.items())
    found = unit_gradient(space, point, Gradient(0.0, 1, slopes))
    assert all(differentiable_axes(space))
    checked = 0
    for i in range(space.dimensions):
        step = 0.004
        ends = [[*point[:i], point[i] + side * step, *point[i + 1 :]] for side in (-1, 1)]
        inside = all(0 < end[i] < 1 for end in ends)
        if inside and present(space, point)[i] and len({present(space, end) for end in ends}) == 1:
            low, high = (loss(space.slope_recipe(end)) for end in ends)
            assert (high - low) / (2 * step) == pytest.approx(found[i], rel=1e-3, abs=1e-3)
            checked += abs(found[i]) > 1e-2
    assert checked >= 2


def present(space: SearchSpace, point: Sequence[float]) -> tuple[bool, ...]:
    """Which scales are not 0."""
    assert space.stacks is not None
    values = [axis.value(x) for axis, x in zip(space.axes, point, strict=True)]
    return tuple(map(bool, space.stacks.projected(values)))


@pytest.mark.parametrize("filters", ["layers", "proj.weight", "layers.1.self_attn", "mlp"])
@pytest.mark.parametrize(
    "layers", [{"skip": True}, {"insert": "merge"}, {"path": True, "insert": "merge"}]
)
def test_scaled_outputs_are_the_merges_own_scaled(
    tmp_path: Path, layers: dict[str, Any], filters: str
) -> None:
    """Whatever its filters go by: the rest of a name too, which an output's has not."""
    body = {"models": ("a", "b"), "base_model": "base", "merge_method": "task_arithmetic"}
    genome = GenomeConfig(**body, filters=(filters,), layers=LayersConfig(**layers))
    weights = SearchSpace(genome, 3, "float32", outputs=OUTPUTS)
    rng = np.random.default_rng(1)
    under = weights.recipe(tuple(rng.random(weights.dimensions)))
    space = SearchSpace(genome, 3, "float32", outputs=OUTPUTS, under=under)
    assert space.stacks is not None
    values = list(space.stacks.projected([0.0] * space.dimensions))
    place = next(
        i
        for i, p in enumerate(space.stacks.positions)
        if (p.model, p.layer) == (None, 1) and not p.fixed
    )
    for i, axis in enumerate(space.axes):
        if axis.group == place:
            values[i] = 1.0 if axis.parameter == "runs" else 0.5
    recipe = space.recipe(tuple(axis.unit(v) for axis, v in zip(space.axes, values, strict=True)))
    family = Family.open(write_family(tmp_path, "llama", names=("base", "a", "b")))
    merged, plain = dict(family.merge(recipe)), dict(family.merge(under))
    at = next(i for i, row in enumerate(layers_of(recipe)) if row[1] != layers_of(recipe)[0][1])
    for name in (*OUTPUTS, "self_attn.q_proj", "input_layernorm"):
        scale = 0.5 if name in OUTPUTS else 1.0
        want = plain[f"model.layers.1.{name}.weight"] * scale
        torch.testing.assert_close(merged[f"model.layers.{at}.{name}.weight"], want)


def test_layers_of_a_base_that_is_no_more_merged_stay_inserted() -> None:
    merged = {"models": ("a", "b", "c"), "base_model": "c", "merge_method": "linear"}
    space = replace(layered({"insert": "c"}, **merged), under=None)
    left = moved(space, StructuralMove("drop_model", "c")).genome
    assert left.models == ("a", "b")
    assert left.layers == LayersConfig(insert=("c",))
