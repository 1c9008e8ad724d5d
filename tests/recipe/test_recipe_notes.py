"""Keys of a recipe that do nothing are named, with the place where they would do something."""

from __future__ import annotations

import pytest

from agentmerge.config import SearchConfig
from agentmerge.recipe import Recipe
from agentmerge.recipe.cancelling import cancelling_notes

ONE = "{model: a, parameters: {weight: 1}}"


@pytest.mark.parametrize(
    ("text", "notes"),
    [
        (
            "merge_method: sce\nbase_model: base\nmodels: [{model: a}, {model: b}]\n"
            "select_topk: 0.15\ndype: float32",
            [
                "select_topk does nothing; write it under parameters:",
                "dype does nothing; did you mean 'dtype'?",
            ],
        ),
        (
            "merge_method: ties\nbase_model: base\n"
            "models: [{model: a, density: 0.5, parameters: {weight: 1}}]",
            ["models[0].density does nothing; write it under parameters:"],
        ),
        (
            "merge_method: slerp\nbase_model: a\nslices: [{sources: [{model: a, layer_range: "
            "[0, 2], parameters: {t: 0.1}}, {model: b, layer_range: [0, 2]}]}]",
            [
                "slices[0].sources[0].parameters.t does nothing: it is a parameter of the whole "
                "merge or of a slice, not of one model"
            ],
        ),
        (
            f"merge_method: linear\nmodels: [{ONE}]\nparameters: {{densty: 0.5, normalise: true}}",
            [
                "parameters.densty does nothing: linear reads weight, normalize",
                "parameters.normalise does nothing; did you mean 'normalize'?",
            ],
        ),
        (
            f"merge_method: ties\nbase_model: base\nmodels: [{ONE}, "
            "{model: base, parameters: {weight: 1}}]",
            ["models[1].parameters does nothing: the base_model has none of its own"],
        ),
        (
            f"merge_method: linear\nmodules: {{default: {{models: [{ONE}], paramters: {{}}}}}}",
            ["modules.default.paramters does nothing; did you mean 'parameters'?"],
        ),
        (
            f"merge_method: linear\nmodels: [{ONE}]\nparameters: {{normalize: true}}\n"
            "parameters: {normalize: false}",
            ["parameters is written on lines 3 and 4: the last one counts; remove one"],
        ),
        (
            "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1, weight: 2}}]",
            [
                "models.0.parameters.weight is written twice on line 2: the last one counts; "
                "remove one"
            ],
        ),
    ],
)
def test_what_does_nothing_is_named(text: str, notes: list[str]) -> None:
    assert list(Recipe.parse(text).notes) == notes


def test_a_key_in_every_slice_is_named_once() -> None:
    piece = "{sources: [{model: a, layer_range: [0, 2], weigth: 1}]}"
    text = f"merge_method: linear\nparameters: {{weight: 1}}\nslices: [{piece}, {piece}, {piece}]"
    (note,) = Recipe.parse(text).notes
    assert note.startswith("slices[0].sources[0].weigth does nothing")
    assert note.endswith("(and 2 more)")


def test_mergekits_own_keys_get_no_word() -> None:
    text = (
        "merge_method: della\nbase_model: base\ndtype: bfloat16\nout_dtype: float32\n"
        "tokenizer_source: base\nchat_template: auto\nslices: [{base_model: base, parameters: "
        "{lambda: 1}, sources: [{model: a, layer_range: [0, 2], parameters: {weight: 1, "
        "density: 0.5, epsilon: 0.1}}, {model: base, layer_range: [0, 2]}]}]\n"
        "parameters: {int8_mask: true, normalize: true, rescale: false}"
    )
    assert Recipe.parse(text).notes == ()


def test_notes_make_no_other_recipe() -> None:
    text = f"merge_method: linear\nmodels: [{ONE}]"
    plain, strange = Recipe.parse(text), Recipe.parse(text + "\nname: mine")
    assert strange.notes
    assert plain == strange
    assert plain.canonical(2).hash() == strange.canonical(2).hash()


def two(method: str, first: str, second: str, shared: str) -> Recipe:
    return Recipe.parse(
        f"merge_method: {method}\nbase_model: base\nmodels: [{{model: a, parameters: {{weight: "
        f"{first}}}}}, {{model: b, parameters: {{weight: {second}}}}}]\nparameters: {{{shared}}}"
    ).canonical(4)


@pytest.mark.parametrize(
    ("method", "first", "second", "shared", "told"),
    [
        ("ties", "1", "-0.9875", "normalize: true", "may count 80 times"),
        ("della", "1", "[0.5, -0.99]", "normalize: true", "may count 100 times"),
        ("dare_ties", "[{filter: mlp, value: -0.95}, {value: 1}]", "1", "normalize: 1", "20 times"),
        ("ties", "1", "-0.9875", "normalize: false", ""),
        ("ties", "1", "0.9875", "normalize: true", ""),
        ("ties", "1", "-0.2", "normalize: true", ""),
    ],
)
def test_weights_that_nearly_cancel_are_told(
    method: str, first: str, second: str, shared: str, told: str
) -> None:
    notes = cancelling_notes(two(method, first, second, shared))
    assert [told in note for note in notes] == ([True] if told else [])


def test_a_search_that_may_make_them_is_told() -> None:
    text = (
        "genome: {models: [a, b], base_model: base, merge_method: ties, "
        "allow_negative_weights: true}\ntasks: [x]\n"
    )
    assert "then count many times" in SearchConfig.from_text(text).notices[0]
    calm = text.replace("merge_method: ties", "merge_method: ties, normalize: false")
    assert SearchConfig.from_text(calm).notices == ()
