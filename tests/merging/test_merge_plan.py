"""What a recipe makes of each tensor, and the recipes that no family can merge."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agentmerge.errors import RecipeRejected
from agentmerge.merging.plan import MergePlan, plan
from agentmerge.parents.layout import Layout, TensorSpec
from agentmerge.recipe import Recipe


def layout_of(layers: int = 4) -> Layout:
    specs = [TensorSpec("model.embed_tokens.weight", (9, 4), "bfloat16", None, False)]
    for layer in range(layers):
        for part in ("mlp.up_proj", "self_attn.q_proj"):
            name = f"model.layers.{layer}.{part}.weight"
            specs.append(TensorSpec(name, (4, 4), "bfloat16", layer, False))
    specs.append(TensorSpec("model.norm.weight", (4,), "float32", None, True))
    return Layout(tuple(specs), layers, "bfloat16", True, ("base", "a", "b"))


def planned(text: str, layout: Layout | None = None, **changes: object) -> MergePlan:
    layout = layout or layout_of()
    recipe = replace(Recipe.parse(text).canonical(layout.num_layers), **changes)
    return plan(recipe, layout)


TIES = """
merge_method: ties
base_model: base
slices:
- sources:
  - {model: a, layer_range: [0, 2], parameters: {weight: 1.0, density: [0.2, 0.8]}}
  - {model: b, layer_range: [0, 2], parameters: {weight: [{filter: mlp, value: 0.5}, {value: 1}]}}
- sources:
  - {model: a, layer_range: [2, 4], parameters: {weight: 0.25}}
  - {model: b, layer_range: [2, 4], parameters: {weight: 1.0}}
parameters: {density: 0.5, normalize: true}
"""


def test_every_tensor_has_its_own_values() -> None:
    items = {item.spec.name: item for item in planned(TIES).tensors}
    assert items.keys() == layout_of().by_name.keys()

    def values(name: str, source: int, parameter: str) -> float:
        return dict(items[name].effective.sources[source][2])[parameter]

    assert values("model.layers.0.mlp.up_proj.weight", 1, "weight") == 0.5
    assert values("model.layers.0.self_attn.q_proj.weight", 1, "weight") == 1.0
    assert values("model.layers.1.mlp.up_proj.weight", 0, "density") == 0.8
    assert values("model.embed_tokens.weight", 0, "density") == 0.2  # first slice, first value
    assert values("model.norm.weight", 0, "weight") == 0.25  # last slice
    assert [model for model, _ in items["model.norm.weight"].inputs] == ["a", "b", "base"]


def test_layers_may_come_from_elsewhere() -> None:
    text = """
merge_method: linear
slices:
- sources: [{model: a, layer_range: [2, 4], parameters: {weight: 1}}]
- sources: [{model: b, layer_range: [0, 2], parameters: {weight: 1}}]
"""
    made = [
        (item.spec.name, *item.inputs)
        for item in planned(text).tensors
        if "up_proj" in item.spec.name
    ]
    assert made == [
        (f"model.layers.{to}.mlp.up_proj.weight", (model, f"model.layers.{at}.mlp.up_proj.weight"))
        for to, model, at in [(0, "a", 2), (1, "a", 3), (2, "b", 0), (3, "b", 1)]
    ]


def test_dtypes() -> None:
    text = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]"
    assert {item.dtype for item in planned(text).tensors} == {"bfloat16", "float32"}
    assert {i.dtype for i in planned(text, dtype="float16").tensors} == {"float16"}
    both = planned(text, dtype="float16", out_dtype="torch.float32")
    assert {item.dtype for item in both.tensors} == {"float32"}
    layout = layout_of()
    recipe = Recipe.parse(text).canonical(4)
    assert {i.dtype for i in plan(recipe, layout, dtype="float64").tensors} == {"float64"}


def test_the_digest_is_of_all_that_decides_the_weights() -> None:
    first = planned(TIES).digest
    assert first == planned(TIES).digest
    assert first == planned(TIES.replace("ties\n", "ties\nparameters_of_others: 1\n")).digest
    for old, new in [
        ("weight: 0.25", "weight: 0.26"),
        ("normalize: true", "normalize: false"),
        ("filter: mlp", "filter: self_attn"),
        ("merge_method: ties", "merge_method: dare_ties"),
        ("merge_method: ties", "merge_method: ties\nout_dtype: float32"),
    ]:
        assert planned(TIES.replace(old, new)).digest != first
    dare = TIES.replace("merge_method: ties", "merge_method: dare_ties")
    seeded = dare.replace("base_model: base", "base_model: base\nmerge_seed: 1")
    assert planned(dare).digest != planned(seeded).digest


SLERP = "merge_method: slerp\nbase_model: {base}\nmodels: [{{model: a}}, {{model: {other}}}]"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (TIES.replace("{model: b", "{model: c"), "names 'c'; the models are 'base', 'a', 'b'"),
        (TIES.replace("base_model: base", "base_model: z"), "names 'z'"),
        (
            TIES.replace("{model: b, layer_range: [2, 4]", "{model: b, layer_range: [3, 5]"),
            "layers 3 to 5 of 'b', which has 4",
        ),
        (TIES.replace("{model: b", "{model: a"), "names 'a' twice"),
        (TIES.replace("base_model: base", "base_model: base\ndtype: int8"), "dtype 'int8'"),
        (SLERP.format(base="base", other="b"), "one of them the base_model"),
        (SLERP.format(base="a", other="a"), "names 'a' twice"),
        ("merge_method: slerp\nbase_model: a\nmodels: [{model: a}]", "it needs two models"),
        ("merge_method: slerp\nmodels: [{model: a}, {model: b}]", "base_model None"),
    ],
)
def test_recipes_that_are_refused(text: str, words: str) -> None:
    with pytest.raises(RecipeRejected, match=words):
        planned(text)


def test_layers_that_are_not_alike_cannot_change_places() -> None:
    layout = layout_of()
    specs = tuple(
        replace(spec, shape=(8, 4)) if spec.name == "model.layers.3.mlp.up_proj.weight" else spec
        for spec in layout.tensors
    )
    text = """
merge_method: linear
slices:
- sources:
  - {model: a, layer_range: [0, 4], parameters: {weight: 1}}
- sources:
  - {model: a, layer_range: [3, 4], parameters: {weight: 1}}
  - {model: b, layer_range: [2, 3], parameters: {weight: 1}}
"""
    with pytest.raises(RecipeRejected, match=r"layer 2 has no tensor like .* become layer 4"):
        planned(text, replace(layout, tensors=specs))


def test_a_recipe_that_is_not_canonical_is_the_callers_mistake() -> None:
    recipe = Recipe.parse("merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]")
    with pytest.raises(ValueError, match="not canonical"):
        plan(recipe, layout_of())
