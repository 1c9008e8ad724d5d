"""A recipe means what mergekit says it means, and one merge has one hash."""

from __future__ import annotations

import copy
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from agentmerge.config import GenomeConfig
from agentmerge.errors import RecipeError, RecipeRejected
from agentmerge.methods import SUM_NORMALIZED
from agentmerge.recipe import Effective, Recipe
from agentmerge.space.grouped import SearchSpace
from agentmerge.system.yaml_text import dump_yaml

PUBLISHED = Path(__file__).parents[1] / "data" / "published-recipe.yml"
LAYERS = 4
NAMES = ("model.layers.{}.self_attn.q_proj.weight", "model.layers.{}.mlp.up_proj.weight")
OUTSIDE = (("model.embed_tokens.weight", False), ("model.norm.weight", True))

Values = tuple[dict[str, dict[str, float]], dict[str, float]]


# --- mergekit as the judge ------------------------------------------------------------------


def by_mergekit(body: dict[str, Any], tensor: str, layer: int | None, after: bool) -> Values:
    """({model: its parameters}, shared parameters), by mergekit's own reader and resolver."""
    from mergekit import merge_methods
    from mergekit.config import ConfigReader, MergeConfiguration
    from mergekit.parameter_resolver import resolve_parameters

    body = {key: value for key, value in copy.deepcopy(body).items() if key != "merge_seed"}
    if "models" in body:
        sources = [source | {"layer_range": [0, LAYERS]} for source in body.pop("models")]
        body["slices"] = [{"sources": sources}]
    config = MergeConfiguration.model_validate(body)
    piece, t = config.slices[-1 if after else 0], 0.0
    start = 0
    for candidate in config.slices if layer is not None else ():
        first, last = candidate.sources[0].layer_range
        if start <= layer < start + last - first:
            piece = candidate
            t = (layer - start) / (last - first - 1) if last - first > 1 else 1.0
        start += last - first
    reader = ConfigReader(config=config, t=t, slice_out=piece)
    spec = merge_methods.get(config.merge_method).spec
    shared, own = resolve_parameters(
        spec,
        tensor_name=tensor,
        inputs={source.model: tensor for source in piece.sources},
        sources=reader.parameter_sources,
        base_model=reader.base_model,
        t=t,
    )
    named = {model.model.path: values for model, values in own.items()}
    return named, shared


def ours(effective: Effective) -> Values:
    return {model: dict(own) for model, _, own in effective.sources}, dict(effective.shared)


def places() -> list[tuple[str, int | None, bool]]:
    found: list[tuple[str, int | None, bool]] = [(name, None, after) for name, after in OUTSIDE]
    return found + [(n.format(layer), layer, False) for layer in range(LAYERS) for n in NAMES]


def assert_same_values(body: dict[str, Any]) -> None:
    recipe = Recipe.parse(body)
    if "models" in body:
        recipe = recipe.canonical(LAYERS)  # how deep the models are is known from here on
    for tensor, layer, after in places():
        own, shared = ours(recipe.effective(tensor, layer, after=after))
        their_own, their_shared = by_mergekit(body, tensor, layer, after)
        for model, values in own.items():
            expected = {k: v for k, v in their_own[model].items() if k in values}
            assert values == pytest.approx(expected, rel=1e-12, abs=1e-15), (tensor, model)
        assert shared == pytest.approx({k: float(their_shared[k]) for k in shared}), tensor


def proportions(effective: Effective) -> Values:
    """The values with what normalize makes meaningless taken out: only ratios stay."""
    own, shared = ours(effective)
    own = {model: values for model, values in own.items() if values}
    if shared.get("normalize") and own:
        weights = [values["weight"] for values in own.values()]
        scale = max(map(abs, weights)) or 1.0
        if effective.method in SUM_NORMALIZED:
            scale = sum(weights)
        own = {m: values | {"weight": values["weight"] / scale} for m, values in own.items()}
    return own, shared


def assert_same_merge(one: Recipe, other: Recipe) -> None:
    for tensor, layer, after in places():
        own, shared = proportions(one.effective(tensor, layer, after=after))
        other_own, other_shared = proportions(other.effective(tensor, layer, after=after))
        assert own.keys() == other_own.keys()
        for model, values in own.items():
            assert values == pytest.approx(other_own[model], rel=1e-9, abs=1e-10), (tensor, model)
        assert shared == pytest.approx(other_shared), tensor


# --- building recipes -----------------------------------------------------------------------


def source(model: str, layers: tuple[int, int] = (0, LAYERS), **parameters: Any) -> dict[str, Any]:
    body: dict[str, Any] = {"model": model, "layer_range": list(layers)}
    return body | ({"parameters": parameters} if parameters else {})


def sliced(*slices: dict[str, Any], method: str = "linear", **rest: Any) -> dict[str, Any]:
    return {"merge_method": method, "slices": list(slices)} | rest


def piece(*sources: dict[str, Any], **rest: Any) -> dict[str, Any]:
    return {"sources": list(sources)} | rest


def of_filters(mlp: Any, rest: Any) -> list[dict[str, Any]]:
    return [{"filter": "mlp", "value": mlp}, {"value": rest}]


TABLE: dict[str, dict[str, Any]] = {
    "one value for all": sliced(piece(source("a"), source("b")), parameters={"weight": 0.5}),
    "source beats slice beats whole": sliced(
        piece(source("a", weight=0.1), source("b"), parameters={"weight": 0.2}),
        parameters={"weight": 0.3},
    ),
    "slice beats whole": sliced(
        piece(source("a", (0, 2)), source("b", (0, 2)), parameters={"weight": 0.2}),
        piece(source("a", (2, 4)), source("b", (2, 4))),
        parameters={"weight": 0.3},
    ),
    "filters, first match wins": sliced(
        piece(
            source(
                "a",
                weight=[
                    {"filter": "self_attn", "value": 0.1},
                    {"filter": "q_proj", "value": 0.9},
                    {"value": 0.4},
                ],
            ),
            source("b", weight=0.5),
        )
    ),
    "a star is no filter": sliced(
        piece(source("a", weight=[{"filter": "*", "value": 0.1}]), source("b", weight=0.5))
    ),
    "what no filter matches falls through": sliced(
        piece(
            source("a", weight=[{"filter": "mlp", "value": 0.1}]),
            source("b"),
            parameters={"weight": [{"filter": "self_attn", "value": 0.7}]},
        ),
        parameters={"weight": 0.3},
    ),
    "gradients run over a slice": sliced(
        piece(source("a", weight=[0.0, 0.5, 1.0]), source("b", weight=[1.0, 0.2]))
    ),
    "a gradient within a filter": sliced(
        piece(source("a", weight=of_filters([0.0, 1.0], 0.3)), source("b", weight=0.5))
    ),
    "one-layer slices take a gradient's end": sliced(
        *(
            piece(source("a", (n, n + 1), weight=[0.2, 0.8]), source("b", (n, n + 1), weight=0.5))
            for n in range(LAYERS)
        )
    ),
    "a single filter as a mapping": sliced(
        piece(source("a", weight={"filter": "mlp", "value": 0.1}), source("b")),
        parameters={"weight": 0.3},
    ),
    "numbers written as text": sliced(piece(source("a", weight="2e-1"), source("b", weight="0.5"))),
    "models": {
        "merge_method": "linear",
        "parameters": {"normalize": False},
        "models": [
            {"model": "a", "parameters": {"weight": [0.1, 0.9]}},
            {"model": "b", "parameters": {"weight": 0.4}},
        ],
    },
    "task vectors, base among the sources": sliced(
        piece(source("base"), source("a", weight=0.5), source("b", weight=-0.2)),
        method="task_arithmetic",
        base_model="base",
        parameters={"normalize": False, "lambda": 0.7},
    ),
    "densities and their default": sliced(
        piece(source("a", weight=0.5, density=0.3), source("b", weight=0.7)),
        method="ties",
        base_model="base",
        parameters={"int8_mask": True},
    ),
    "dare": sliced(
        piece(source("a", weight=0.5, density=[0.3, 0.6]), source("b", weight=0.7, density=0.9)),
        method="dare_ties",
        base_model="base",
    ),
    "slerp": sliced(
        piece(source("a"), source("b"), parameters={"t": of_filters([0.1, 0.9], 0.4)}),
        method="slerp",
        base_model="a",
    ),
    "slerp, whole": sliced(
        piece(source("a"), source("b")), method="slerp", base_model="a", parameters={"t": 0.3}
    ),
}

BELOW_THE_WHOLE = {
    "lambda of a slice": sliced(
        piece(source("a", weight=0.5), parameters={"lambda": 0.5}),
        method="task_arithmetic",
        base_model="base",
    ),
    "normalize of a slice": sliced(
        piece(source("a", weight=0.9), source("b", weight=0.3), parameters={"normalize": False})
    ),
    "normalize of a filter": sliced(
        piece(source("a", weight=0.9), source("b", weight=0.3)),
        parameters={"normalize": of_filters(False, True)},
    ),
    "t of a filter in a slice, t of the whole": sliced(
        piece(source("a"), source("b"), parameters={"t": [{"filter": "mlp", "value": 0.3}]}),
        method="slerp",
        base_model="a",
        parameters={"t": 0.7},
    ),
    "one filter at two levels": sliced(
        piece(source("a", weight=[{"filter": "mlp", "value": 0.3}]), source("b", weight=0.5)),
        parameters={"weight": of_filters(0.9, 0.5)},
    ),
}
ALL = TABLE | BELOW_THE_WHOLE


@pytest.mark.parametrize("name", ALL)
def test_values_are_mergekits(name: str) -> None:
    assert_same_values(ALL[name])


values = st.floats(-1.0, 1.5).map(lambda v: round(v, 3)).filter(lambda v: abs(v) > 1e-2)
shares = st.floats(0.05, 1.0).map(lambda v: round(v, 3))


@st.composite
def one_setting(draw: st.DrawFn, numbers: st.SearchStrategy[float], names: list[str]) -> Any:
    plain = st.one_of(numbers, st.lists(numbers, min_size=1, max_size=4))
    filters = st.lists(st.sampled_from(names), unique=True, max_size=2)
    chosen = draw(filters)
    if not chosen:
        return draw(plain)
    entries: list[dict[str, Any]] = [{"filter": f, "value": draw(plain)} for f in chosen]
    return entries + ([{"value": draw(plain)}] if draw(st.booleans()) else [])


@st.composite
def recipes(draw: st.DrawFn, *, nested: bool = True) -> dict[str, Any]:
    """Any recipe of two or three experts with every required value somewhere.

    nested: some filters match a part of what another matches.
    """
    names = ["mlp", "self_attn", *(["q_proj"] if nested else [])]
    method = draw(st.sampled_from(["linear", "task_arithmetic", "ties", "dare_ties"]))
    models = ["a", "b", "c"][: draw(st.integers(2, 3))]
    cuts = draw(st.sampled_from([(0, 4), (0, 2, 4), (0, 1, 4), (0, 1, 2, 3, 4)]))
    with_density = method in ("ties", "dare_ties")

    def parameters() -> dict[str, Any]:
        body = {}
        if draw(st.booleans()):
            body["weight"] = draw(one_setting(values, names))
        if with_density and draw(st.booleans()):
            body["density"] = draw(one_setting(shares, names))
        return body

    slices = []
    for first, last in pairwise(cuts):
        body = piece(*(source(m, (first, last), **parameters()) for m in models))
        slices.append(body | {"parameters": parameters()})
    whole: dict[str, Any] = {"weight": draw(values)}
    if draw(st.booleans()):
        whole["normalize"] = draw(st.booleans())
    found = sliced(*slices, method=method, parameters=whole)
    return found if method == "linear" else found | {"base_model": "base"}


def cancels(recipe: Recipe) -> bool:
    """Whether some tensor's weights nearly cancel: a merge that normalize may refuse."""
    try:
        effective = [recipe.effective(name, layer, after=after) for name, layer, after in places()]
    except RecipeRejected:
        return True
    for found in effective:
        weights = [dict(own)["weight"] for _, _, own in found.sources if own]
        if abs(sum(weights)) < 0.05 * sum(map(abs, weights)):
            return True
    return False


@given(recipes())
@settings(max_examples=60, deadline=None)
def test_values_of_any_recipe_are_mergekits(body: dict[str, Any]) -> None:
    assume(not cancels(Recipe.parse(body)))
    assert_same_values(body)


#: One value for two layers is a list in one slice and a filter's in the other.
LISTED = sliced(
    piece(source("a", (0, 2)), source("b", (0, 2))),
    piece(
        source("a", (2, 4)),
        source("b", (2, 4), weight=[{"filter": "mlp", "value": [1.0]}]),
    )
    | {"parameters": {"weight": [{"filter": "self_attn", "value": [0.5, 0.5]}]}},
    method="ties",
    parameters={"weight": 0.5},
) | {"base_model": "base"}


@given(recipes())
@example(LISTED)
@settings(max_examples=100, deadline=None)
def test_the_canonical_form_is_the_same_merge(body: dict[str, Any]) -> None:
    recipe = Recipe.parse(body)
    assume(not cancels(recipe))
    canonical = recipe.canonical(LAYERS)
    assert canonical.canonical(LAYERS) == canonical
    assert Recipe.parse(canonical.to_yaml()) == canonical
    assert Recipe.parse(canonical.to_yaml()).canonical(LAYERS).hash() == canonical.hash()
    assert_same_merge(canonical, recipe)


@given(recipes())
@settings(max_examples=30, deadline=None)
def test_yaml_brings_back_an_equal_recipe(body: dict[str, Any]) -> None:
    recipe = Recipe.parse(body)
    assert Recipe.parse(recipe.to_yaml()) == recipe
    assert Recipe.parse(yaml.safe_dump(body, sort_keys=False)) == recipe


@pytest.mark.parametrize("name", TABLE)
def test_table_survives_its_canonical_form(name: str) -> None:
    if "models" in TABLE[name]:
        assert_same_values(TABLE[name])  # the canonical form is what mergekit is asked of
        return
    recipe = Recipe.parse(TABLE[name])
    canonical = recipe.canonical(LAYERS)
    assert canonical.canonical(LAYERS) == canonical
    assert_same_merge(canonical, recipe)


def test_a_filter_within_anothers_keeps_its_value_under_normalize() -> None:
    """model.layers.0.self_attn.q_proj is "q_proj" to one source and "self_attn" to the other."""
    body = sliced(
        piece(
            source("a", weight=[{"filter": "self_attn", "value": 0.5}, {"value": 1.0}]),
            source(
                "b",
                weight=[
                    {"filter": "q_proj", "value": 1.0},
                    {"filter": "self_attn", "value": 0.25},
                    {"value": 0.75},
                ],
            ),
        )
    )
    recipe = Recipe.parse(body)
    canonical = recipe.canonical(LAYERS)
    assert canonical.canonical(LAYERS) == canonical
    assert_same_merge(canonical, recipe)


@pytest.mark.parametrize("name", BELOW_THE_WHOLE)
def test_values_set_below_the_whole_survive_the_canonical_form(name: str) -> None:
    recipe = Recipe.parse(BELOW_THE_WHOLE[name])
    canonical = recipe.canonical(LAYERS)
    assert canonical.canonical(LAYERS) == canonical
    assert_same_merge(canonical, recipe)


# --- one merge, one hash --------------------------------------------------------------------


def hash_of(body: dict[str, Any]) -> str:
    return Recipe.parse(body).canonical(LAYERS).hash()


PLAIN = sliced(piece(source("a", weight=0.8), source("b", weight=0.4)))
DARE = sliced(
    piece(source("a", weight=0.8, density=0.5), source("b", weight=0.4, density=0.5)),
    method="dare_ties",
    base_model="base",
)

EQUAL = {
    "models for slices": (
        PLAIN,
        {
            "merge_method": "linear",
            "models": [
                {"model": "a", "parameters": {"weight": 0.8}},
                {"model": "b", "parameters": {"weight": 0.4}},
            ],
        },
    ),
    "pushed-down parameters": (
        PLAIN,
        sliced(piece(source("a"), source("b", weight=0.4)), parameters={"weight": 0.8}),
    ),
    "scaled weights under normalize": (
        PLAIN,
        sliced(piece(source("a", weight=0.2), source("b", weight=0.1))),
    ),
    "weights of the other sign under normalize": (
        PLAIN,
        sliced(piece(source("a", weight=-0.8), source("b", weight=-0.4))),
    ),
    "split slices": (
        PLAIN,
        sliced(
            piece(source("a", (0, 1), weight=0.8), source("b", (0, 1), weight=0.4)),
            piece(source("a", (1, 4), weight=0.4), source("b", (1, 4), weight=0.2)),
        ),
    ),
    "int8_mask": (PLAIN, PLAIN | {"parameters": {"int8_mask": True}}),
    "a parameter of another method": (PLAIN, PLAIN | {"parameters": {"t": 0.5}}),
    "normalize at its default": (PLAIN, PLAIN | {"parameters": {"normalize": 1.0}}),
    "filters that say the same": (
        PLAIN,
        sliced(piece(source("a", weight=of_filters(0.8, 0.8)), source("b", weight=0.4))),
    ),
    "a flat gradient": (
        PLAIN,
        sliced(piece(source("a", weight=[0.8, 0.8]), source("b", weight=0.4))),
    ),
    "the base written as a source": (
        DARE,
        DARE | {"slices": [piece(*DARE["slices"][0]["sources"], source("base"))]},
    ),
    "digits beyond the twelfth": (
        PLAIN,
        sliced(piece(source("a", weight=0.8 + 1e-14), source("b", weight=0.4))),
    ),
    "density above one": (
        sliced(piece(source("a", weight=1, density=1.0)), method="ties", base_model="base"),
        sliced(piece(source("a", weight=1, density=7.0)), method="ties", base_model="base"),
    ),
    "the base named by its slice": (
        DARE,
        DARE | {"slices": [DARE["slices"][0] | {"base_model": "base"}]},
    ),
}

DIFFERENT = {
    "weights": sliced(piece(source("a", weight=0.8), source("b", weight=0.5))),
    "scaled weights without normalize": PLAIN | {"parameters": {"normalize": False}},
    "swapped models": sliced(piece(source("a", weight=0.4), source("b", weight=0.8))),
    "one weight's sign": sliced(piece(source("a", weight=0.8), source("b", weight=-0.4))),
    "another model": sliced(piece(source("a", weight=0.8), source("c", weight=0.4))),
    "a gradient": sliced(piece(source("a", weight=[0.8, 0.7]), source("b", weight=0.4))),
    "a filter": sliced(piece(source("a", weight=of_filters(0.7, 0.8)), source("b", weight=0.4))),
    "other layers": sliced(
        piece(source("a", (0, 2), weight=0.8), source("b", (0, 2), weight=0.4)),
        piece(source("a", (0, 2), weight=0.8), source("b", (0, 2), weight=0.4)),
    ),
    "output dtype": PLAIN | {"dtype": "bfloat16"},
    "method": DARE,
    "merge seed": DARE | {"merge_seed": 1},
    "rescale": DARE | {"parameters": {"rescale": False}},
    "lambda": DARE | {"parameters": {"lambda": 0.5}},
    "base": DARE | {"base_model": "other"},
}


@pytest.mark.parametrize("name", EQUAL)
def test_equal_merges_have_one_hash(name: str) -> None:
    one, other = EQUAL[name]
    assert hash_of(one) == hash_of(other)


def test_different_merges_have_different_hashes() -> None:
    hashes = {name: hash_of(body) for name, body in (DIFFERENT | {"plain": PLAIN}).items()}
    assert len(set(hashes.values())) == len(hashes), hashes


def test_scale_matters_without_normalize() -> None:
    halved = sliced(piece(source("a", weight=0.4), source("b", weight=0.2)))
    off = {"parameters": {"normalize": False}}
    assert hash_of(PLAIN | off) != hash_of(halved | off)


def test_a_moved_model_stays_itself() -> None:
    moved = sliced(piece(source("/disk/a", weight=0.8), source("/disk/b", weight=0.4)))
    here = Recipe.parse(PLAIN).canonical(LAYERS).hash({"a": "fa", "b": "fb"})
    there = Recipe.parse(moved).canonical(LAYERS).hash({"/disk/a": "fa", "/disk/b": "fb"})
    assert here == there
    assert here != Recipe.parse(PLAIN).canonical(LAYERS).hash({"a": "fa", "b": "changed"})


@given(st.lists(values, min_size=2, max_size=3), st.sampled_from([0.1, 0.25, 0.3, 1.7, 7.0]))
@settings(max_examples=60, deadline=None)
def test_any_scale_under_normalize_is_one_merge(weights: list[float], scale: float) -> None:
    def body(factor: float) -> dict[str, Any]:
        models = [source(f"m{i}", weight=w * factor) for i, w in enumerate(weights)]
        return sliced(piece(*models))

    if abs(sum(weights)) > 0.05:
        one, other = (Recipe.parse(body(f)).canonical(LAYERS) for f in (1.0, scale))
        assert one.hash() == other.hash()


# --- refusals -------------------------------------------------------------------------------

REFUSED = {
    "no mapping": ("[1, 2]", "must be a mapping"),
    "nothing": ("", "must be a mapping"),
    "no YAML": ("a: [", "not YAML"),
    "method": ("merge_method: breadcrumb\nmodels: [{model: a}]", "'breadcrumb' is not known"),
    "no method": ("models: [{model: a}]", "is not known; use one of"),
    "neither models nor slices": ("merge_method: linear", "either 'models:' or 'slices:'"),
    "both": ("merge_method: linear\nmodels: [{model: a}]\nslices: [{}]", "and not both"),
    "modules": ("merge_method: linear\nmodules: {x: {}}", "modules x is not supported"),
    "a source without a model": ("merge_method: linear\nmodels: [{weight: 1}]", "models[0] needs"),
    "slice without sources": ("merge_method: linear\nslices: [{}]", "slices[0] needs a list"),
    "slice source without layers": (
        "merge_method: linear\nslices: [{sources: [{model: a}]}]",
        "slices[0].sources[0] needs a 'layer_range'",
    ),
    "layers backwards": (
        "merge_method: linear\nslices: [{sources: [{model: a, layer_range: [3, 1]}]}]",
        "layer_range [3, 1] must be",
    ),
    "text for a number": (
        "merge_method: linear\nmodels: [{model: a, parameters: {weight: heavy}}]",
        "models[0].parameters.weight: 'heavy' is not a number",
    ),
    "not finite": (
        "merge_method: linear\nmodels: [{model: a, parameters: {weight: .nan}}]",
        "is not finite",
    ),
    "an empty gradient": (
        "merge_method: linear\nmodels: [{model: a, parameters: {weight: []}}]",
        "empty list",
    ),
    "a filter without a value": (
        "merge_method: linear\nmodels: [{model: a, parameters: {weight: [{filter: mlp}]}}]",
        "has no 'value'",
    ),
    "parameters as a list": (
        "merge_method: linear\nmodels: [{model: a, parameters: [1]}]",
        "must be a mapping",
    ),
    "lora": ("merge_method: linear\nmodels: [{model: {model: a, lora: b}}]", "is not supported"),
    # Wrong types where a list or an integer belongs.
    "layers as text": (
        "merge_method: linear\nslices: [{sources: [{model: a, layer_range: [x, 2]}]}]",
        "layer_range",
    ),
    "one number for layers": (
        "merge_method: linear\nslices: [{sources: [{model: a, layer_range: 3}]}]",
        "layer_range",
    ),
    "a number for slices": ("merge_method: linear\nslices: 3", "slices"),
    "a number for sources": ("merge_method: linear\nslices: [{sources: 3}]", "sources"),
    "text for the merge seed": (
        "merge_method: linear\nmerge_seed: x\nmodels: [{model: a}]",
        "merge_seed",
    ),
    "a number too large": (
        f"merge_method: linear\nmodels: [{{model: a, parameters: {{weight: 1{'0' * 400}}}}}]",
        "line 2: a whole number of more than 64 bits",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_place_and_the_reason(name: str) -> None:
    text, words = REFUSED[name]
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(text)
    assert words in str(caught.value)


def test_a_path_that_holds_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no recipe at"):
        Recipe.parse(tmp_path / "none.yml")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(RecipeError, match="not UTF-8 text"):
        Recipe.parse(tmp_path / "binary")


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=str(tmp_path)):
        Recipe.parse(tmp_path)


REJECTED = {
    "weights that cancel": (
        sliced(piece(source("a", weight=1.0), source("b", weight=-1.0))),
        "add up to nothing",
    ),
    "no weight": (sliced(piece(source("a", weight=1.0), source("b"))), "'b' has no 'weight'"),
    "slices of two lengths": (
        sliced(piece(source("a", (0, 4), weight=1.0), source("b", (0, 2), weight=1.0))),
        "same number of layers",
    ),
    "no base": (
        sliced(piece(source("a", weight=1.0)), method="ties"),
        "ties needs a base_model",
    ),
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejected_by_rule_before_any_worker(name: str) -> None:
    body, words = REJECTED[name]
    with pytest.raises(RecipeRejected) as caught:
        Recipe.parse(body).canonical(LAYERS).effective(NAMES[0].format(0), 0)
    assert words in str(caught.value)


# --- the published recipe -------------------------------------------------------------------


def published_space() -> SearchSpace:
    genome = GenomeConfig(
        models=("NCSOFT/Llama-VARCO-8B-Instruct", "akjindal53244/Llama-3.1-Storm-8B"),
        base_model="meta-llama/Llama-3.1-8B",
        merge_method="task_arithmetic",
        layer_granularity=2,
        normalize=True,
    )
    return SearchSpace(genome, 32)


def test_the_published_recipe_means_the_same_after_a_round_trip() -> None:
    recipe = Recipe.parse(PUBLISHED)
    canonical = recipe.canonical(32)
    again = Recipe.parse(canonical.to_yaml()).canonical(32)
    assert again == canonical
    for layer in range(32):
        before = proportions(recipe.effective("model.layers.x", layer))
        after = proportions(again.effective("model.layers.x", layer))
        assert before[0].keys() == after[0].keys()
        for model, found in before[0].items():
            assert found == pytest.approx(after[0][model], rel=1e-10)


def test_the_published_recipe_is_a_point_of_its_genome() -> None:
    space = published_space()
    recipe = Recipe.parse(PUBLISHED)
    point = space.vector(recipe)
    assert point is not None
    assert len(point) == space.dimensions == 32
    assert space.recipe(point).slices == recipe.canonical(32).slices
    assert space.recipe(point).hash() == recipe.canonical(32).hash()


def test_scaled_by_any_factor_the_published_recipe_is_the_same_merge() -> None:
    """Its weights have 16 digits: they must be scaled before they are rounded."""
    body = yaml.safe_load(PUBLISHED.read_text())
    for piece_ in body["slices"]:
        for source_ in piece_["sources"]:
            if "parameters" in source_:
                source_["parameters"]["weight"] *= 0.7
    scaled = Recipe.parse(body).canonical(32)
    assert scaled.hash() == Recipe.parse(PUBLISHED).canonical(32).hash()


def test_half_of_the_published_dimensions_are_redundant() -> None:
    space = published_space()
    assert space.dimensions - space.freedoms == 16


def test_a_text_is_what_yaml_writes_whatever_is_in_it() -> None:
    """Recipes are kept as text: libyaml writes them where it writes the same."""
    rng = random.Random(0)
    words = ["north", "/x/y-z", "org/name", "true", "1e3", "~", "x: y", "- z", "#c", "a b", "é", "",
             "a" * 90, "a b " * 30, "=", "<<", "*a", "!t", "tab\t", "nl\nx", ".5", "?"]  # fmt: skip

    def value(depth: int = 0) -> object:
        kind = rng.random()
        if depth < 4 and kind < 0.3:
            return [value(depth + 1) for _ in range(rng.randint(0, 4))]
        if depth < 4 and kind < 0.6:
            return {rng.choice(words): value(depth + 1) for _ in range(rng.randint(0, 4))}
        return rng.choice([rng.random(), rng.choice(words), 7, True, None, 1e-20, 1e22, -0.0])

    for _ in range(300):
        documents = [{"models": value(), "b": value()} for _ in range(rng.choice([1, 1, 2]))]
        expected = yaml.safe_dump_all(documents, sort_keys=False, allow_unicode=True)
        assert dump_yaml(documents) == expected
