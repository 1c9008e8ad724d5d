"""What a recipe makes of every tensor of a layout, settled before any weight is read.

It knows recipes and layouts. It knows no weights, no torch, and not how a method is computed.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from agentmerge.errors import RecipeRejected
from agentmerge.methods import RECIPE_METHODS
from agentmerge.parents.headers import DTYPES
from agentmerge.parents.layout import Layout, TensorSpec
from agentmerge.parents.naming import at_layer
from agentmerge.recipe import Effective, Recipe
from agentmerge.recipe.copying import stacked_layers


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """How one tensor is made.

    inputs: (model, the name of the tensor it gives) of each of ``effective.sources``, in order.
    dtype: of the result, as torch calls it.
    first: of an input that is itself merged, how, and by which seed; an entry an input, or none.
    """

    spec: TensorSpec
    effective: Effective
    inputs: tuple[tuple[str, str], ...]
    dtype: str
    first: tuple[tuple[TensorPlan, int | None] | None, ...] = ()


@dataclass(frozen=True)
class MergePlan:
    """Every tensor of a merge, in the layout's order; ``merge_seed`` draws the random masks.

    layers: of a stack, which of the parents' layers each one is made of; None of a merge of weights
        in their places.
    """

    tensors: tuple[TensorPlan, ...]
    merge_seed: int | None
    layers: tuple[int, ...] | None = None

    @cached_property
    def by_name(self) -> dict[str, TensorPlan]:
        return {item.spec.name: item for item in self.tensors}

    @cached_property
    def digest(self) -> str:
        """SHA-256 over all that decides the merged weights, except the parents'; 16 hex digits."""
        body = [_decides(item) for item in self.tensors]
        first = [made[0] for item in self.tensors for made in item.first if made]
        methods = {item.effective.method for item in (*self.tensors, *first)}
        codes = {RECIPE_METHODS[method].digest for method in methods} - {""}
        text = json.dumps([self.merge_seed, body, *sorted(codes)], separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _decides(item: TensorPlan) -> tuple[Any, ...]:
    """All that decides a tensor, except the parents' own."""
    first = [made and (_decides(made[0]), made[1]) for made in item.first]
    return (
        item.spec.name,
        item.spec.shape,
        item.dtype,
        item.effective.method,
        item.effective.base_model,
        item.inputs,
        [own for _, _, own in item.effective.sources],
        item.effective.shared,
        *([first] if first else ()),
    )


def plan(recipe: Recipe, layout: Layout, *, dtype: str | None = None) -> MergePlan:
    """The plan of ``recipe``, which must be canonical (``Recipe.canonical``).

    dtype: of the merged tensors where the recipe names none; by default each tensor's stored one.

    Raises:
        RecipeRejected: a model, layer or dtype that is not there, sources that a method cannot
            merge, weights that cancel.
        ValueError: the recipe is not canonical, which is a caller's mistake.
    """
    if any(source.layer_range is None for piece in recipe.slices for source in piece.sources):
        raise ValueError("the recipe is not canonical; call recipe.canonical(num_layers) first")
    _check_sources(recipe, layout)
    wanted = _checked_dtype(recipe.out_dtype or recipe.dtype or dtype)
    layers = stacked_layers(recipe, layout.num_layers)
    if layers is not None and layout.fixed:
        raise RecipeRejected(f"these models' layers cannot be stacked: {layout.fixed}")
    merges = {name: plan(merge, layout, dtype=dtype) for name, merge in recipe.merges}
    tensors = []
    for spec in (layout if layers is None else layout.at_depth(layers)).tensors:
        effective = recipe.effective(spec.name, spec.layer, after=spec.after)
        inputs = tuple(
            (model, _input_name(spec, layer, layout)) for model, layer, _ in effective.sources
        )
        first = tuple(
            (merges[model].by_name[name], merges[model].merge_seed) if model in merges else None
            for model, name in inputs
        )
        first = first if any(first) else ()
        tensors.append(TensorPlan(spec, effective, inputs, wanted or spec.dtype, first))
    return MergePlan(tuple(tensors), recipe.merge_seed, layers)


def _check_sources(recipe: Recipe, layout: Layout) -> None:
    unknown = [name for name in recipe.models if name not in layout.parents]
    if unknown:
        known = ", ".join(map(repr, layout.parents))
        raise RecipeRejected(f"the recipe names {unknown[0]!r}; the models are {known}")
    method = RECIPE_METHODS[recipe.merge_method]
    for index, piece in enumerate(recipe.slices):
        names = [source.model for source in piece.sources]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise RecipeRejected(f"slice {index} names {twice!r} twice; name each model once")
        base = piece.base_model or recipe.base_model
        if method.pairwise and (len(names) != 2 or base not in names):
            raise RecipeRejected(
                f"slice {index} gives {method.name} {names} with base_model {base!r}; it needs two "
                "models, one of them the base_model"
            )
        if method.sets_apart(base) and base not in names:
            raise RecipeRejected(f"slice {index} has no source for its base_model {base!r}")
        others = len(names) - method.sets_apart(base)
        # least 1 is not asked for: nothing besides the base is the base
        if others < method.least > 1 or others > (method.most or others):
            bound = f"exactly {method.most}" if method.most else f"at least {method.least}"
            raise RecipeRejected(
                f"slice {index} gives {method.name} {others} models besides a base; it merges "
                f"{bound}"
            )


def _checked_dtype(name: str | None) -> str | None:
    if name is None:
        return None
    short = name.removeprefix("torch.")
    if short not in DTYPES.values():
        raise RecipeRejected(f"dtype {name!r} is not one of {', '.join(DTYPES.values())}")
    return short


def _input_name(spec: TensorSpec, layer: int | None, layout: Layout) -> str:
    """What the tensor is called in the layer it is taken from."""
    if layer is None or layer == spec.layer:
        return spec.name
    name = at_layer(spec.name, layer)
    given = layout.by_name.get(name)
    if given is None or given.shape != spec.shape:
        raise RecipeRejected(
            f"layer {layer} has no tensor like {spec.name!r} of shape {list(spec.shape)}, so it "
            f"cannot become layer {spec.layer}"
        )
    return name
