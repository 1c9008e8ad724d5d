"""Recipes in two stages: merges under names, and one over them, as mergekit-multi reads them."""

from __future__ import annotations

from typing import Any

import pytest

from agentmerge.errors import RecipeError, RecipeRejected
from agentmerge.recipe import Recipe
from agentmerge.recipe.copying import layers_read

FIRST = """\
name: weights
merge_method: ties
base_model: base
models:
- {model: a, parameters: {weight: 0.5, density: 0.4}}
- {model: b, parameters: {weight: 0.7, density: 0.4}}
merge_seed: 3
"""
LAST = """\
merge_method: linear
parameters: {normalize: false}
slices:
- sources: [{model: weights, layer_range: [0, 2], parameters: {weight: 1}}]
- sources: [{model: a, layer_range: [1, 2]}]
  parameters: {weight: [{filter: o_proj, value: 0.3}, {filter: down_proj, value: 0}, {value: 1}]}
- sources: [{model: weights, layer_range: [1, 4], parameters: {weight: 1}}]
"""
#: A merge of a merge.
MORE = FIRST.replace("name: weights", "name: more").replace("model: b", "model: weights")
BOTH = f"{FIRST}---\n{LAST}"


def test_one_form_and_back() -> None:
    recipe = Recipe.parse(BOTH)
    assert recipe.models == ("a", "b", "base")
    made = recipe.canonical(4)
    assert made.canonical(4) == made
    text = made.to_yaml()
    assert text.count("\n---\n") == 1
    assert Recipe.parse(text).canonical(4) == made
    assert Recipe.parse(made.to_dict()).canonical(4) == made
    assert Recipe.parse(f"---\n{BOTH}---\n").canonical(4) == made
    ((name, first),) = made.merges
    assert name == "merge"
    assert first == Recipe.parse(FIRST.replace("name: weights\n", "")).canonical(4)
    found = made.effective("model.layers.3.mlp.up_proj.weight", 3)
    assert found.sources == (("merge", 1, (("weight", 1.0),)),)


def test_both_stages_are_written_with_the_tokenizer_that_both_are_of() -> None:
    made = Recipe.parse(f"{FIRST}tokenizer_source: union\n---\n{LAST}").canonical(4)
    assert made.tokenizer_source == "union"
    text = made.to_yaml()
    assert text.count("tokenizer_source: union") == 2
    assert Recipe.parse(text).canonical(4) == made
    assert Recipe.parse(text).canonical(4).hash() == made.hash()
    assert made.hash() == Recipe.parse(made.to_dict()).canonical(4).hash()


def test_names_and_order_and_what_nothing_is_made_of_change_no_merge() -> None:
    want = Recipe.parse(BOTH).canonical(4)
    other = BOTH.replace("weights", "merge_1")
    spare = FIRST.replace("weights", "spare").replace("0.5", "0.1")
    told = Recipe.parse(f"{spare}---\n{BOTH}")
    for recipe in (Recipe.parse(other), Recipe.parse(f"{LAST}---\n{FIRST}"), told):
        assert recipe.canonical(4) == want
        assert recipe.canonical(4).hash() == want.hash()
    assert "nothing is made of 'spare'" in told.notes
    for old, new in (("density: 0.4", "density: 0.5"), ("0.3}", "0.2}"), ("[1, 2]", "[2, 3]")):
        assert Recipe.parse(BOTH.replace(old, new)).canonical(4).hash() != want.hash()


def test_names_that_models_have_are_left_to_them() -> None:
    body = BOTH.replace("model: a,", "model: merge,")
    made = Recipe.parse(body).canonical(4)
    assert dict(made.merges).keys() == {"merge_"}
    assert "merge" in made.models
    renamed = made.renamed(lambda name: f"models/{name}")
    assert set(renamed.models) == {"models/base", "models/merge", "models/b"}
    assert dict(renamed.merges).keys() == {"merge_"}
    ids = {name: f"id-{name}" for name in made.models}
    moved = {f"models/{name}": value for name, value in ids.items()}
    assert made.hash(ids) == renamed.hash(moved)


def test_a_last_stage_that_hands_a_merge_on_is_that_merge() -> None:
    alone = Recipe.parse(FIRST).canonical(4)
    whole = "{model: weights, layer_range: [0, 4]}"
    for last in (
        f"merge_method: passthrough\nslices: [{{sources: [{whole}]}}]",
        "merge_method: passthrough\nmodels: [{model: weights}]",
        "merge_method: linear\nmodels: [{model: weights, parameters: {weight: 2}}]",
    ):
        assert Recipe.parse(f"{FIRST}---\n{last}").canonical(4) == alone
    half = (
        "merge_method: linear\ndtype: float16\nmodels: [{model: weights, parameters: {weight: 1}}]"
    )
    assert Recipe.parse(f"{FIRST}---\n{half}").canonical(4).merges


@pytest.mark.parametrize("layers", [(0, 3), (1, 3), (0, 4)])
def test_a_last_stage_that_takes_some_layers_makes_those(layers: tuple[int, int]) -> None:
    one = f"{{model: weights, layer_range: [{layers[0]}, {layers[1]}], parameters: {{weight: 1}}}}"
    made = Recipe.parse(f"{FIRST}---\nmerge_method: linear\nslices: [{{sources: [{one}]}}]")
    assert layers_read(made.canonical(4)) == tuple(range(*layers))


def test_a_name_alone_is_nothing() -> None:
    assert not Recipe.parse(FIRST).merges


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"{LAST}---\n{LAST}", "2 of the recipe's documents have no 'name'"),
        (f"{FIRST}---\n{FIRST}---\n{LAST}", "two merges are called 'weights'"),
        (BOTH.replace("merge_method: linear", "merge_method: ties"), "linear or passthrough"),
        (
            f"{FIRST}---\n{MORE}---\n{LAST}",
            "'more' is made of 'weights', which is a merge too",
        ),
        (f"{FIRST}---\n- 1", "must be a mapping"),
        (BOTH.replace("name: weights", "name: 3"), "needs a 'name', and 3 is none"),
        ("merges: 4\n" + LAST, "merges must be a list"),
        (f"{FIRST}---\nmerges: []\n{LAST}", "first stages in one of the two ways"),
    ],
)
def test_what_cannot_be_read(text: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        Recipe.parse(text)


def test_layers_are_said_in_the_last_stage() -> None:
    body: Any = {"model": "a", "layer_range": [1, 4], "parameters": {"weight": 1}}
    first = {"name": "weights", "merge_method": "linear", "slices": [{"sources": [body]}]}
    last = {"merge_method": "passthrough", "models": [{"model": "weights"}]}
    with pytest.raises(RecipeRejected, match="'weights' has other layers than its models"):
        Recipe.parse(last | {"merges": [first]}).canonical(4)
