"""Recipes of layers in any order, number and strength: of one model each, or merged."""

from __future__ import annotations

from typing import Any

import pytest

from agentmerge.errors import RecipeError, RecipeRejected
from agentmerge.recipe import MOST_LAYERS, Recipe
from agentmerge.recipe.copying import stacked_layers


def cut(model: str, start: int, end: int, **parameters: Any) -> dict[str, Any]:
    source: dict[str, Any] = {"model": model, "layer_range": [start, end]}
    return {"sources": [source | ({"parameters": parameters} if parameters else {})]}


def of(*slices: dict[str, Any], **whole: Any) -> Recipe:
    return Recipe.parse({"merge_method": "passthrough", "slices": list(slices)} | whole)


def test_one_form_and_back() -> None:
    recipe = of(
        cut("a", 0, 2),
        cut("a", 2, 3, scale=1),
        cut("b", 1, 3, scale=[{"filter": "o_proj", "value": 1 / 3}]),
        cut("a", 0, 1, scale=[{"filter": "mlp", "value": 1.0}]),
        base_model="base",
        dtype="bfloat16",
    ).canonical(4)
    assert recipe.canonical(4) == recipe
    assert Recipe.parse(recipe.to_yaml()).canonical(4) == recipe
    assert stacked_layers(recipe, 4) == (0, 1, 2, 1, 2, 0)
    assert recipe.models == ("a", "b")
    body = recipe.to_dict()
    assert body["slices"] == [
        {"sources": [{"model": "a", "layer_range": [0, 3]}]},
        cut("b", 1, 3, scale=[{"filter": "o_proj", "value": 0.333333333333}, {"value": 1.0}]),
        {"sources": [{"model": "a", "layer_range": [0, 1]}]},
    ]
    assert "base_model" not in body


def test_what_keeps_the_depth_and_scales_nothing_is_the_linear_merge_that_it_was() -> None:
    copied = of(cut("a", 0, 1), cut("b", 1, 2, scale=1.0), base_model="b").canonical(2)
    linear = {
        "merge_method": "linear",
        "slices": [cut("a", 0, 1, weight=1.0), cut("b", 1, 2, weight=1.0)],
    }
    assert copied == Recipe.parse(linear).canonical(2)
    assert copied.hash() == "fecae8a39eda15b0"
    whole = Recipe.parse({"merge_method": "passthrough", "models": [{"model": "b"}]})
    assert whole.canonical(2).hash() == Recipe.of_model("b", 2).canonical(2).hash()


def test_every_layer_place_and_scale_counts() -> None:
    stacks = [
        of(cut("a", 0, 2), cut("a", 1, 2)),
        of(cut("a", 0, 2), cut("a", 0, 1)),
        of(cut("a", 0, 2), cut("b", 1, 2)),
        of(cut("a", 0, 1), cut("a", 1, 2), cut("a", 1, 2, scale=0.5)),
        of(cut("a", 0, 2), cut("a", 1, 2), parameters={"scale": 0.5}),
        of(cut("a", 0, 1)),
        of(cut("a", 0, 2, scale=0.5)),
        of(cut("a", 0, 2)),
    ]
    assert len({recipe.canonical(2).hash() for recipe in stacks}) == len(stacks)


def test_filters_look_at_the_layer_that_is_taken() -> None:
    """As mergekit does: the name of the tensor in the model that gives it."""
    third = of(
        cut("a", 0, 2), cut("a", 2, 3, scale=[{"filter": "layers.2.mlp", "value": 0.5}])
    ).canonical(4)
    moved = of(cut("a", 2, 3, scale=[{"filter": "layers.2.mlp", "value": 0.5}])).canonical(4)
    for recipe, place in ((third, 2), (moved, 0)):
        made = recipe.effective(f"model.layers.{place}.mlp.up_proj.weight", place)
        assert made.sources == (("a", 2, (("scale", 0.5),)),)
        other = recipe.effective(f"model.layers.{place}.self_attn.q_proj.weight", place)
        assert other.sources == (("a", 2, (("scale", 1.0),)),)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"slices": [{"sources": cut("a", 0, 2)["sources"] * 2}]}, "passthrough copies one"),
        ({"models": [{"model": "a"}, {"model": "b"}]}, "passthrough copies one"),
        ({"slices": [cut("a", 0, 2, scale="much")]}, "'much' is not a number"),
    ],
)
def test_what_mergekit_would_not_make_either_is_refused(body: Any, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        Recipe.parse({"merge_method": "passthrough"} | body)


def test_no_stack_is_deeper_than_any_model() -> None:
    with pytest.raises(RecipeRejected, match="more than any model has"):
        of(*[cut("a", 0, MOST_LAYERS)] * 2).canonical(MOST_LAYERS)


def merged(*layers: int, **weights: float) -> dict[str, Any]:
    """A slice of several models' layers from the first to before the second."""
    parts = [cut(model, *layers, weight=weight) for model, weight in weights.items()]
    return {"sources": [source for part in parts for source in part["sources"]]}


def linear(*slices: dict[str, Any], normalize: bool) -> Recipe:
    body = {"merge_method": "linear", "slices": list(slices)}
    return Recipe.parse(body | {"parameters": {"normalize": normalize}})


DAMPED = [{"filter": "o_proj", "value": 0.31}, {"filter": "down_proj", "value": -0.2}, {"value": 1}]


def test_merged_and_copied_layers_in_one_recipe() -> None:
    """A merge of task vectors, as linear with what is left for the base, and layers between."""
    weights = {"base": -0.2, "a": 0.5, "b": 0.7}
    recipe = linear(
        merged(0, 1, **weights),
        cut("a", 0, 1, weight=DAMPED),
        merged(1, 2, **weights),
        merged(2, 3, **weights),
        merged(1, 2, **weights),
        cut("b", 2, 3, weight=DAMPED),
        merged(3, 4, **weights),
        normalize=False,
    ).canonical(4)
    assert recipe.canonical(4) == recipe
    assert Recipe.parse(recipe.to_yaml()).canonical(4) == recipe
    assert len(recipe.slices) == 6, "neighbours that say the same are one"
    assert stacked_layers(recipe, 4) == (0, 0, 1, 2, 1, 2, 3)
    made = recipe.effective("model.layers.1.mlp.down_proj.weight", 1)
    assert made.sources == (("a", 0, (("weight", -0.2),)),)
    made = recipe.effective("model.layers.4.mlp.down_proj.weight", 4)
    assert made.sources == tuple((m, 1, (("weight", w),)) for m, w in weights.items())
    head = recipe.effective("lm_head.weight", None, after=True)
    assert head.sources == tuple((m, None, (("weight", w),)) for m, w in weights.items())


def test_only_ratios_count_in_every_layer_with_normalize() -> None:
    one, other = (
        linear(merged(0, 2, a=w, b=2 * w), cut("a", 1, 2, weight=w), normalize=True).canonical(2)
        for w in (0.2, 0.7)
    )
    assert one == other
    assert one.slices[1].sources[0].parameters == cut_parameters("a", 1.0)


def cut_parameters(model: str, weight: float) -> Any:
    return linear(cut(model, 0, 1, weight=weight), normalize=False).slices[0].sources[0].parameters


def test_layers_in_their_places_are_no_stack() -> None:
    in_place = linear(merged(0, 1, a=0.3, b=0.7), cut("b", 1, 2, weight=1), normalize=False)
    assert stacked_layers(in_place.canonical(2), 2) is None
    assert stacked_layers(in_place.canonical(3), 3) == (0, 1), "one is left out"
    moved = linear(cut("b", 1, 2, weight=1), cut("b", 0, 1, weight=1), normalize=False)
    assert stacked_layers(moved.canonical(2), 2) == (1, 0)


def test_every_method_may_stack_what_it_merges() -> None:
    sources = merged(0, 2, a=0.3, b=0.7)["sources"]
    body = {"merge_method": "ties", "base_model": "base", "slices": [{"sources": sources}] * 2}
    recipe = Recipe.parse(body).canonical(2)
    assert stacked_layers(recipe, 2) == (0, 1, 0, 1)
    assert Recipe.parse(recipe.to_yaml()).canonical(2) == recipe
