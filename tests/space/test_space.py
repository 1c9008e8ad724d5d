"""The search space: recipe and vector go back and forth, and what a genome may ask for."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentmerge.config import GenomeConfig, SearchConfig
from agentmerge.errors import ConfigError, RecipeRejected, UserError
from agentmerge.methods import METHODS
from agentmerge.recipe import Recipe
from agentmerge.space import seeds
from agentmerge.space.grouped import SearchSpace
from agentmerge.testing.space_suite import comes_back

LAYERS = 4
bounded = settings(max_examples=400, deadline=None, derandomize=True)


@st.composite
def spaces(draw: st.DrawFn) -> SearchSpace:
    name = draw(st.sampled_from(sorted(METHODS)))
    method = METHODS[name]
    count = method.most if method.most == 2 else draw(st.integers(max(2, method.least), 3))
    base = (
        "base" if method.needs_base or (method.base == "optional" and draw(st.booleans())) else None
    )
    models = tuple("abc"[:count])
    if base and draw(st.booleans()):
        models = (base, *models)
    evolvable = [p for p in method.shared if p.name not in ("normalize", "normalize_weights")]
    evolve = () if name == "slerp" else tuple(p.name for p in evolvable if draw(st.booleans()))
    moved = [p for p in evolvable if p.searched or p.name in evolve]
    plain = name == "slerp" or method.most == 1 or any(p.whole for p in moved)
    filterable = name != "slerp" and (method.source or moved)
    genome = GenomeConfig(
        models=models,
        merge_method=name,
        base_model=base,
        layer_granularity=draw(st.sampled_from([0, 1, 2])),
        normalize=draw(st.sampled_from([None, True, False])) if method.normalize_param else None,
        allow_negative_weights=draw(st.booleans()),
        smooth=not plain and draw(st.booleans()),
        filters=draw(st.sampled_from([(), ("mlp",), ("mlp", "self_attn")])) if filterable else (),
        evolve=evolve,
    )
    return SearchSpace(genome, LAYERS)


units = st.one_of(st.sampled_from([0.0, 1.0, 0.5]), st.floats(0, 1))


@bounded
@given(spaces(), st.data())
def test_a_recipe_of_the_space_comes_back_to_itself(
    space: SearchSpace, data: st.DataObject
) -> None:
    point = data.draw(st.lists(units, min_size=space.dimensions, max_size=space.dimensions))
    assert space.dimensions > 0
    assert 0 < space.freedoms <= space.dimensions
    assert len({axis.name for axis in space.axes}) == space.dimensions
    try:
        recipe = space.recipe(point)
    except RecipeRejected:
        return
    assert comes_back(space, point) == recipe
    for layer in range(LAYERS):
        try:
            effective = recipe.effective(f"model.layers.{layer}.mlp.up_proj.weight", layer)
        except RecipeRejected as error:
            assert_only_sums_cancel(str(error))
            return
        for _, _, own in effective.sources:
            values = dict(own)
            if "epsilon" in values and 0 < values["density"] < 1:
                assert values["density"] + values["epsilon"] < 1
                assert values["density"] - values["epsilon"] > 0


def assert_only_sums_cancel(refused: str) -> None:
    """The one reason for which a point of a space can be refused."""
    assert "add up to nothing" in refused


@bounded
@given(spaces())
def test_parents_and_plain_merges_are_recipes_of_the_space(space: SearchSpace) -> None:
    found = [*seeds.parents(space), ("uniform", *space.uniform()), *seeds.scale_points(space)]
    for label, recipe, point in found:
        assert recipe.canonical(LAYERS) == recipe, label
        if point is not None:
            assert space.recipe(point) == recipe, label
            back = space.vector(recipe)
            assert back is not None, label
            assert space.recipe(back) == recipe, label


def test_each_axis_moves_the_recipe() -> None:
    for name, method in METHODS.items():
        if name == "slerp":
            continue
        switches = ("normalize", "normalize_weights", "nuslerp_row_wise")
        evolve = tuple(p.name for p in method.shared if p.name not in switches)
        genome = GenomeConfig(
            models=("a", "b"),
            merge_method=name,
            base_model="base" if method.base != "ignored" else None,
            layer_granularity=2,
            evolve=evolve,
        )
        space = SearchSpace(genome, LAYERS)
        centre = [0.4 + 0.01 * i / space.dimensions for i in range(space.dimensions)]
        recipe = space.recipe(centre)
        wanted = {p.name for p in method.source} | set(evolve)
        if method.most == 1:
            wanted.add("partner")
        assert {axis.parameter for axis in space.axes} == wanted
        for index, axis in enumerate(space.axes):
            moved = space.recipe([*centre[:index], 0.9, *centre[index + 1 :]])
            assert moved != recipe, axis.name


def text_of(method: str, **keys: object) -> str:
    body = {"merge_method": method, "models": ["a", "b"], "base_model": "base"} | keys
    return f"genome: {body}\ntasks: [t]".replace("None", "null").replace("True", "true")


@pytest.mark.parametrize(
    ("method", "keys", "words"),
    [
        ("nuslerp", {"models": ["a", "b", "c"]}, "models has 3 besides the base, and nuslerp"),
        ("nuslerp", {"models": ["base", "b"]}, "models has 1 besides the base, and nuslerp merges"),
        ("model_stock", {"models": ["base", "b"]}, "model_stock needs at least 2"),
        ("model_stock", {"base_model": None}, "base_model is missing"),
        ("sce", {"base_model": None}, "base_model is missing"),
        ("arcee_fusion", {"models": ["a"]}, "nothing to search"),
        ("arcee_fusion", {"filters": ["mlp"]}, "filters is not possible"),
        ("arcee_fusion", {"smooth": True}, "a choice between models, cannot be interpolated"),
        ("karcher", {"smooth": True}, "max_iter, a whole number, cannot be interpolated"),
        ("karcher", {"normalize": True}, "normalize is not possible with karcher"),
        ("nuslerp", {"evolve": ["lambda"]}, "evolve names 'lambda', and nuslerp can evolve nusl"),
        ("linear", {"evolve": ["normalize"]}, "linear can evolve nothing"),
        ("slerp", {"evolve": ["t"], "base_model": None}, "slerp can evolve nothing"),
        ("ties", {"evolve": ["rescale"], "smooth": True}, "rescale, a whole number"),
    ],
)
def test_genomes_that_are_refused(method: str, keys: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        SearchConfig.from_text(text_of(method, **keys))


def test_one_model_onto_a_base_is_enough_for_nearswap() -> None:
    config = SearchConfig.from_text(text_of("nearswap", models=["a"], filters=["mlp"]))
    space = SearchSpace(config.genome, LAYERS)
    assert [axis.name for axis in space.axes] == ["layers 0-3 mlp t", "layers 0-3 t"]
    assert [axis.kind for axis in space.axes] == ["log", "log"]
    assert space.recipe([0.0, 1.0]).effective("mlp", 0).shared == (("t", 1e-6),)


def test_lambda_is_searched_where_it_is_asked_for() -> None:
    plain = SearchSpace(GenomeConfig(**_TIES), LAYERS)
    asked = SearchSpace(GenomeConfig(**_TIES, evolve=("lambda",)), LAYERS)
    assert asked.dimensions == plain.dimensions + 2
    assert asked.freedoms == plain.freedoms + 2
    recipe = asked.recipe([0.5] * 8 + [0.5] + [0.5])
    assert "lambda" not in recipe.to_yaml(), "1 is the default"
    assert asked.vector(recipe) is not None
    recipe = asked.recipe([0.5] * 4 + [0.25] + [0.5] * 4 + [0.75])
    assert [dict(piece.parameters)["lambda"].to_yaml() for piece in recipe.slices] == [0.5, 1.5]
    assert plain.vector(recipe) is None


_TIES = {
    "models": ("a", "b"),
    "merge_method": "ties",
    "base_model": "base",
    "layer_granularity": 2,
}


def test_an_epsilon_that_mergekit_refuses_is_refused() -> None:
    text = (
        "merge_method: della\nbase_model: base\nmodels: [{model: a}, {model: base}]\n"
        "parameters: {weight: 1, density: 0.9, epsilon: %s}"
    )
    recipe = Recipe.parse(text % 0.15).canonical(LAYERS)
    with pytest.raises(RecipeRejected, match=r"epsilon 0.15 of 'a' .* use one from 0 to below 0.1"):
        recipe.effective("x", 0)
    Recipe.parse(text % 0.05).canonical(LAYERS).effective("x", 0)
    whole = Recipe.parse((text % 0.15).replace("0.9", "1.0")).canonical(LAYERS)
    assert whole == Recipe.parse((text % 0.01).replace("0.9", "1.0")).canonical(LAYERS)


def test_a_shared_parameter_of_a_slice_is_kept() -> None:
    """It decides the merge as mergekit makes it, so it decides the hash."""
    text = """
merge_method: task_arithmetic
base_model: base
slices:
- sources: [{model: a, layer_range: [0, 2], parameters: {weight: 1}}]
  parameters: {lambda: %s}
- sources: [{model: a, layer_range: [2, 4], parameters: {weight: 1}}]
parameters: {lambda: 0.5}
"""
    same, other = (Recipe.parse(text % value).canonical(LAYERS) for value in (0.5, 0.7))
    assert len(same.slices) == 1
    assert dict(same.parameters)["lambda"].to_yaml() == 0.5
    assert dict(other.effective("x", 0).shared)["lambda"] == 0.7
    assert dict(other.effective("x", 3).shared)["lambda"] == 0.5
    assert other.canonical(LAYERS) == other


def test_a_form_is_of_a_method() -> None:
    assert SearchSpace(GenomeConfig(**_TIES, space="weights"), LAYERS).axes == (
        SearchSpace(GenomeConfig(**_TIES), LAYERS).axes
    )
    with pytest.raises(ConfigError, match="'slerp' has a t for two models, and ties has none"):
        _ = SearchSpace(GenomeConfig(**_TIES, space="slerp"), LAYERS).axes
    with pytest.raises(UserError, match="did you mean 'weights'"):
        _ = SearchSpace(GenomeConfig(**_TIES, space="weigths"), LAYERS).axes


def test_without_a_form_a_space_has_the_key_that_it_had() -> None:
    assert "space" not in GenomeConfig(**_TIES).model_dump()
    named = GenomeConfig(**_TIES, space="weights")
    assert GenomeConfig(**named.model_dump()) == named
    assert SearchSpace(named, LAYERS).key != SearchSpace(GenomeConfig(**_TIES), LAYERS).key


def test_what_no_knot_reads_is_zero_at_once() -> None:
    """A line from 0 to 0 is a 0, so that a canonical recipe is canonical once more."""
    ends = {"smooth": True, "layer_granularity": 2, "merge_method": "breadcrumbs"}
    space = SearchSpace(GenomeConfig(**_TIES | ends), LAYERS)
    for axis in range(space.dimensions):
        comes_back(space, [float(i == axis) for i in range(space.dimensions)])
