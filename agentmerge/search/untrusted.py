"""A recipe from a text that a model or a client sent: this search's own parents, and no file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import yaml

from agentmerge.agents.schemas import SCALE, unit
from agentmerge.errors import RecipeError, RecipeRejected
from agentmerge.methods import RECIPE_METHODS
from agentmerge.recipe import Recipe, renamed
from agentmerge.recipe.names import short_name
from agentmerge.search.search import Search
from agentmerge.system.yaml_text import read_yaml

MAX_RECIPE_CHARS = 20_000
_RECIPE_KEYS = {"merge_method", "base_model", "models", "slices", "parameters"}
#: Written by exports and harmless: the search sets them itself.
_IGNORED_KEYS = {"dtype", "out_dtype", "merge_seed"}


def read_recipe(search: Search, text: str) -> tuple[Recipe, tuple[float, ...] | None]:
    """A recipe from untrusted text, in canonical form, and its point if the space holds it.

    Raises:
        UserError: not a recipe, or it names anything but this search's parents.
        RecipeRejected: a recipe that cannot be merged.
    """
    if len(text) > MAX_RECIPE_CHARS:
        raise RecipeError(f"the recipe has {len(text)} characters; {MAX_RECIPE_CHARS} are the most")
    space = search.present
    if text.lstrip().startswith("["):
        point = _point(text, space.dimensions)
        return space.recipe(point), point
    body = _plain_yaml(text)
    unknown = sorted(set(body) - _RECIPE_KEYS - _IGNORED_KEYS)
    if unknown:
        raise RecipeError(
            f"{unknown[0]!r} cannot be set here; use {', '.join(sorted(_RECIPE_KEYS))}"
        )
    body = {key: value for key, value in body.items() if key in _RECIPE_KEYS}
    body["dtype"] = space.dtype
    try:
        recipe = Recipe.parse(renamed(body, _full_names(search.identities)))
        strangers = sorted(set(recipe.models) - set(search.identities))
        if strangers:
            known = ", ".join(short_name(name) for name in search.identities)
            raise RecipeError(f"{strangers[0][:80]!r} is no model of this search; it has {known}")
        if RECIPE_METHODS[recipe.merge_method].random:
            recipe = replace(recipe, merge_seed=space.merge_seed)
        canonical = recipe.canonical(space.num_layers)
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise RecipeError(f"the recipe cannot be read: {error}") from None
    try:
        point_or_none = space.vector(canonical)
    except RecipeRejected:
        point_or_none = None  # outside this space: legal, and scored as it stands
    return canonical, point_or_none


def _point(text: str, dimensions: int) -> tuple[float, ...]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        raise RecipeError("the genome is not a JSON list of numbers") from None
    if len(values) != dimensions:
        raise RecipeError(f"the genome has {len(values)} numbers; give {dimensions}, one an axis")
    for value in values:
        fine = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not fine or not 0 <= value <= SCALE:  # NaN is in no range
            shown = "a list or mapping" if isinstance(value, (list, dict)) else repr(value)[:40]
            raise RecipeError(f"{shown} in the genome is not a number from 0 to {SCALE}")
    return tuple(unit(value) for value in values)


def _plain_yaml(text: str) -> dict[str, Any]:
    try:
        # An alias can make a short text a huge value; a recipe needs none.
        if any(isinstance(e, yaml.AliasEvent) for e in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise RecipeError("a recipe may not have YAML aliases (*name)")
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise RecipeError(f"the recipe is not YAML: {' '.join(str(error).split())[:200]}") from None
    body = read_yaml(text, "the recipe", RecipeError).value
    if not isinstance(body, dict) or not all(isinstance(key, str) for key in body):
        raise RecipeError("a recipe is a mapping with 'merge_method', or a JSON list of integers")
    return body


def _full_names(known: Iterable[str]) -> dict[str, str]:
    """Short name -> the config's, where only one model has it."""
    names = [*known]
    short = [short_name(name) for name in names]
    return {s: name for s, name in zip(short, names, strict=True) if short.count(s) == 1}
