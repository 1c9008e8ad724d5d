"""The cheap rivals of layers: sandwiches of two experts, and plain stacks."""

from __future__ import annotations

import pytest

from agentmerge.config import GenomeConfig
from agentmerge.recipe import Recipe
from agentmerge.space.grouped import SearchSpace
from agentmerge.space.seeds import plain_stacks, sandwiches

OUTPUTS = ("o_proj", "down_proj")


def space(depth: int, models: tuple[str, ...] = ("a", "b"), **genome: object) -> SearchSpace:
    body = {"models": models, "base_model": "base", "merge_method": "task_arithmetic"} | genome
    return SearchSpace(GenomeConfig(**body), depth, "float32", outputs=OUTPUTS)


def weights(recipe: Recipe, layers: int) -> list[dict[str, float]]:
    return [
        {m: dict(own)["weight"] for m, _, own in recipe.effective("q_proj", layer).sources}
        for layer in range(layers)
    ]


def test_a_sandwich_goes_from_one_expert_to_the_other_and_back() -> None:
    found = {label: weights(recipe, 12) for label, recipe, _ in sandwiches(space(12))}
    assert list(found) == ["sandwich a in b", "sandwich b in a"]
    inside = [layer.get("a", 0.0) for layer in found["sandwich a in b"]]
    assert inside == pytest.approx([0, 0, 0, 1 / 3, 2 / 3, 1, 1, 2 / 3, 1 / 3, 0, 0, 0])
    for one, other in zip(*found.values(), strict=True):
        assert sum(one.values()) == pytest.approx(1.0)
        assert one.get("a", 0.0) == pytest.approx(other.get("b", 0.0))


@pytest.mark.parametrize(
    ("depth", "inside"),
    [
        (3, [0, 1, 0]),
        (4, [0, 1, 1, 0]),
        (5, [0, 0.5, 1, 0.5, 0]),
        (8, [0, 0, 0.5, 1, 1, 0.5, 0, 0]),
        (10, [0, 0, 1 / 3, 2 / 3, 1, 1, 2 / 3, 1 / 3, 0, 0]),
    ],
)
def test_a_shallow_sandwich_too_has_the_others_middle(depth: int, inside: list[float]) -> None:
    found = weights(sandwiches(space(depth))[0][1], depth)
    assert [layer.get("a", 0.0) for layer in found] == pytest.approx(inside)


def test_of_many_experts_each_has_its_neighbour_inside() -> None:
    assert len(sandwiches(space(12, ("a", "b", "c")))) == 6
    many = sandwiches(space(12, ("a", "b", "c", "d")))
    assert [label for label, *_ in many][-1] == "sandwich d in a"
    assert len(many) == 4
    assert sandwiches(space(2)) == [], "no layer is inside"


def test_a_linear_space_has_its_sandwiches_as_points() -> None:
    linear = space(4, merge_method="linear", base_model=None, layer_granularity=1)
    for _, recipe, point in sandwiches(linear):
        assert point is not None
        assert linear.recipe(point) == recipe


def test_a_plain_stack_runs_the_middle_once_more() -> None:
    deep = space(12, layers=4)
    found = {label: recipe for label, recipe, _ in plain_stacks(deep)}
    assert list(found) == ["stack a 0.5", "stack a 1", "stack b 0.5", "stack b 1"]
    half = found["stack a 0.5"].canonical(12)
    ranges = [piece.sources[0].layer_range for piece in half.slices]
    layers = [layer for start, end in ranges for layer in range(start, end)]
    assert layers == [*range(8), *range(4, 8), *range(8, 12)]
    scales = [
        dict(half.effective("mlp.down_proj", place).sources[0][2]).get("scale", 1.0)
        for place in range(16)
    ]
    assert scales == [1.0] * 8 + [0.5] * 4 + [1.0] * 4
    plain = dict(half.effective("mlp.up_proj", 9).sources[0][2])
    assert plain.get("scale", 1.0) == 1.0
    assert plain_stacks(space(12)) == [], "layers are not searched"
    assert len(plain_stacks(space(12, layers={"most": 2}))) == 4
