"""passthrough: layers of one model a slice, in any order, number and strength."""

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
    assert stacked_layers(recipe) == (0, 1, 2, 1, 2, 0)
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


def test_merges_of_weights_keep_the_depth() -> None:
    body = {"merge_method": "linear", "slices": [cut("a", 0, 2, weight=1)] * 2}
    with pytest.raises(RecipeRejected, match="make 4 layers and the models have 2; only passthr"):
        Recipe.parse(body).canonical(2)
