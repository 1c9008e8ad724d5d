"""Recipes in every form that mergekit reads: its merge, or a refusal in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from agentmerge.merging.family import Family
from agentmerge.methods import METHODS
from agentmerge.recipe import Recipe
from tests.merging.merge_cases import LAYERS, load_all

# said when mergekit is imported, of its own imports
pytestmark = pytest.mark.filterwarnings("ignore:numpy.core is deprecated:DeprecationWarning")


def of(model: str, *layers: int, **parameters: Any) -> dict[str, Any]:
    source: dict[str, Any] = {"model": model}
    source |= {"layer_range": list(layers)} if layers else {}
    return source | ({"parameters": parameters} if parameters else {})


def cut(*sources: dict[str, Any], **rest: Any) -> dict[str, Any]:
    return {"sources": list(sources)} | rest


FORMS: dict[str, dict[str, Any]] = {
    "slices of a module": {
        "merge_method": "ties",
        "base_model": "base",
        "modules": {
            "default": {
                "slices": [
                    cut(
                        of("a", 0, 2, weight=0.7, density=0.8),
                        of("b", 0, 2, weight=0.4, density=0.6),
                        of("base", 0, 2),
                    )
                ]
            }
        },
        "parameters": {"normalize": 1.0},
    },
    "models of a module, with parameters of their own scope": {
        "merge_method": "linear",
        "modules": {
            "default": {
                "models": [of("a", weight=0.2), of("b")],
                "parameters": {
                    "weight": [{"filter": "mlp", "value": [0.1, 0.9]}],
                    "normalize": False,
                },
            }
        },
        "parameters": {"weight": 0.5, "normalize": True},
    },
    "slerp with its base beside the models": {
        "merge_method": "slerp",
        "base_model": "base",
        "models": [of("a")],
        "parameters": {"t": [{"filter": "self_attn", "value": 0.2}, {"value": 0.45}]},
    },
    "slerp, the base last": {
        "merge_method": "slerp",
        "base_model": "a",
        "models": [of("b"), of("a")],
        "parameters": {"t": 0.3},
    },
    "a linear base beside the models": {
        "merge_method": "linear",
        "base_model": "base",
        "models": [of("a", weight=0.5), of("b")],
        "parameters": {"weight": 0.25},
    },
    "a slice of the base alone": {
        "merge_method": "ties",
        "base_model": "base",
        "slices": [
            cut(of("a", 0, 1, weight=0.8, density=0.5), of("base", 0, 1)),
            cut(of("base", 1, 2)),
        ],
    },
    "parameters of source, slice and merge at once": {
        "merge_method": "linear",
        "slices": [
            cut(of("a", 0, 1), of("b", 0, 1), parameters={"weight": 0.3}),
            cut(of("a", 1, 2, weight=[0.1, 0.9]), of("b", 1, 2, weight=[0.9, 0.1])),
        ],
        "parameters": {"weight": 1.0, "normalize": True},
        "dtype": "float32",
        "out_dtype": "bfloat16",
    },
    "layers copied from one model each": {
        "merge_method": "passthrough",
        "slices": [cut(of("a", 0, 1)), cut(of("b", 1, 2))],
        "dtype": "bfloat16",
    },
    "a whole model copied": {"merge_method": "passthrough", "models": [of("b")]},
    "a whole model scaled": {
        "merge_method": "passthrough",
        "base_model": "b",
        "models": [of("b", scale=[{"filter": "mlp", "value": [0.5, 1.5]}])],
    },
    "layers stacked and scaled": {
        "merge_method": "passthrough",
        "slices": [cut(of("a", 0, 2)), cut(of("b", 0, 2), parameters={"scale": 0.25})],
        "out_dtype": "bfloat16",
    },
}


def by_mergekit(body: dict[str, Any], paths: dict[str, Path], out: Path) -> dict[str, torch.Tensor]:
    """What mergekit makes of the very text."""
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import MergeOptions, run_merge

    def placed(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                key: str(paths[item]) if key in ("model", "base_model") else placed(item)
                for key, item in value.items()
            }
        return [placed(item) for item in value] if isinstance(value, list) else value

    options = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False)
    try:
        run_merge(MergeConfiguration.model_validate(placed(body)), str(out), options=options)
    finally:
        LoaderCache().flush_all()
        LoaderCache().loaders.clear()
    return load_all(out)


@pytest.mark.parametrize("form", FORMS)
def test_the_merge_is_mergekits(
    family_of: Callable[..., dict[str, Path]], tmp_path: Path, form: str
) -> None:
    paths, body = family_of(tied=False), FORMS[form]
    family = Family.open(paths, base="base")
    recipe = Recipe.parse(yaml.safe_dump(body, sort_keys=False)).canonical(LAYERS)
    ours, theirs = dict(family.merge(recipe)), by_mergekit(body, paths, tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6)
    again = Recipe.parse(recipe.to_yaml()).canonical(LAYERS)
    assert again == recipe
    assert again.hash() == recipe.hash()


def base_alone(method: str) -> dict[str, Any]:
    own = {"weight": 1.0, "density": 1.0, "gamma": 0.0, "epsilon": 0.1}
    shared = {"normalize": True, "normalize_weights": True, "lambda": 0.9}
    return {
        "merge_method": method,
        "base_model": "base",
        "models": [of("base", **own)],
        "parameters": shared | ({"t": 0.4} if method in ("slerp", "nearswap") else {}),
    }


@pytest.mark.parametrize(
    "method", [m.name for m in METHODS.values() if m.sets_apart("base") and m.least == 1]
)
def test_where_only_the_base_weighs_in_the_merge_is_the_base(
    family_of: Callable[..., dict[str, Path]], method: str
) -> None:
    paths = family_of()
    family = Family.open(paths, base="base")
    recipe = Recipe.parse(base_alone(method)).canonical(LAYERS)
    base = load_all(paths["base"])
    for name, tensor in family.merge(recipe):
        assert torch.equal(tensor, base[name])
