"""Recipes in two stages, as ``mergekit-multi`` reads them: merges under names, and one over them.

A YAML text of several documents; those with a ``name`` are merged first, and the last (or the one
without a name) names them as it names models. Written as one mapping, the named ones are a list
under ``merges``. The last is linear or passthrough, the methods that say which layers there are and
how strongly. Knows no file, and nothing of how a method is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from agentmerge.errors import RecipeError, RecipeRejected
from agentmerge.methods import LINEAR, PASSTHROUGH
from agentmerge.recipe.copying import stacked_layers
from agentmerge.recipe.parts import Body, Setting

B = TypeVar("B", bound=Body)

#: Where a mapping has what comes first.
MERGES = "merges"
#: What canonical form calls it.
NAME = "merge"
_OVER = (LINEAR.name, PASSTHROUGH.name)


def as_mapping(documents: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The one mapping of several documents.

    Raises:
        RecipeError: it cannot be told which comes last, or first stages are said in two ways.
    """
    unnamed = [index for index, body in enumerate(documents) if "name" not in body]
    if len(unnamed) > 1:
        raise RecipeError(
            f"{len(unnamed)} of the recipe's documents have no 'name'; the one that all are merged "
            "into has none, and each of the others needs one"
        )
    last = unnamed[0] if unnamed else len(documents) - 1
    others = [body for index, body in enumerate(documents) if index != last]
    whole = {key: value for key, value in documents[last].items() if key != "name"}
    if others and MERGES in whole:
        raise RecipeError(
            "the recipe has documents with a 'name', and its last one has 'merges' too; write all "
            "first stages in one of the two ways"
        )
    return {MERGES: others, **whole} if others else documents[last]


def as_documents(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The documents of one mapping, the last of them without a name; each with the tokenizer that
    the parents are aligned to, since mergekit merges them one by one."""
    last = {key: value for key, value in body.items() if key != MERGES}
    source = {key: last[key] for key in ("tokenizer_source",) if key in last}
    return [*(merge | source for merge in body.get(MERGES, ())), last]


def read_merges(raw: Any, parse: Callable[[Mapping[str, Any]], B]) -> tuple[tuple[str, B], ...]:
    """What is merged first, by name.

    Raises:
        RecipeError: naming what cannot be read.
    """
    if not isinstance(raw, list | tuple):
        raise RecipeError(f"merges must be a list of recipes with a 'name', not {raw!r}")
    found: dict[str, B] = {}
    for body in raw:
        name = body.get("name") if isinstance(body, Mapping) else None
        if not isinstance(name, str) or not name:
            raise RecipeError(f"a recipe of merges needs a 'name', and {name!r} is none")
        if name in found:
            raise RecipeError(f"two merges are called {name!r}; give each its own name")
        if MERGES in body:
            raise RecipeError(f"merges are read in two stages, and {name!r} has merges of its own")
        found[name] = parse({key: value for key, value in body.items() if key != "name"})
    for name, merge in found.items():
        for model in named(merge):
            if model in found:
                raise RecipeError(
                    f"merges are read in two stages, and {name!r} is made of {model!r}, which is a "
                    "merge too"
                )
    return tuple(found.items())


def over(recipe: B, merges: tuple[tuple[str, B], ...]) -> B:
    """``recipe`` as what is made of ``merges``.

    Raises:
        RecipeError: its method cannot be.
    """
    if recipe.merge_method not in _OVER:
        raise RecipeError(
            f"the last merge of two stages is {' or '.join(_OVER)}, and not {recipe.merge_method}"
        )
    tokenizers = (merge.tokenizer_source for _, merge in merges)
    source = recipe.tokenizer_source or next(filter(None, tokenizers), None)
    notes = [f"{name}: {note}" for name, merge in merges for note in merge.notes]
    notes += [f"nothing is made of {n!r}" for n, _ in merges if n not in named(recipe)]
    return replace(recipe, merges=merges, tokenizer_source=source, notes=(*recipe.notes, *notes))


def named(recipe: Body) -> tuple[str, ...]:
    """Every name that a recipe's own slices give, in order, the base last if only there."""
    names = [source.model for piece in recipe.slices for source in piece.sources]
    names += [piece.base_model for piece in recipe.slices if piece.base_model]
    names += [recipe.base_model] if recipe.base_model else []
    return tuple(dict.fromkeys(names))


def with_names(recipe: B, new: Callable[[str], str]) -> B:
    """The same slices of models under other names."""

    def of(name: str | None) -> str | None:
        return None if name is None else new(name)

    slices = tuple(
        replace(
            piece,
            base_model=of(piece.base_model),
            sources=tuple(replace(s, model=new(s.model)) for s in piece.sources),
        )
        for piece in recipe.slices
    )
    return replace(recipe, slices=slices, base_model=of(recipe.base_model))


def one_form(recipe: B, canonical: Callable[[B], B], num_layers: int) -> B:
    """``recipe``, whose own slices are canonical, with its merges in their one form: under fixed
    names, in the order in which they are named, without those that nothing is made of. What only
    hands a merge on is that merge.

    Raises:
        RecipeRejected: a merge has other layers than its models.
    """
    own = dict(recipe.merges)
    used = [name for name in named(recipe) if name in own]
    models = {model for name in used for model in named(own[name])} | set(named(recipe))
    merges = {}
    for index, name in enumerate(used):
        made = canonical(own[name])
        if stacked_layers(made, num_layers) is not None:
            raise RecipeRejected(
                f"the first stage {name!r} has other layers than its models; say which layers "
                "there are in the last"
            )
        new = NAME if len(used) == 1 else f"{NAME}-{index + 1}"
        while new in models - set(used):
            new += "_"
        merges[name] = new, replace(made, chat_template=None, tokenizer_source=None, notes=())
    in_place = stacked_layers(recipe, num_layers) is None
    if len(used) == 1 and in_place and _hands_on(recipe, used[0], merges[used[0]][1]):
        return replace(
            merges[used[0]][1],
            tokenizer_source=recipe.tokenizer_source,
            chat_template=recipe.chat_template,
            notes=recipe.notes,
        )
    renamed = with_names(recipe, lambda name: merges[name][0] if name in merges else name)
    return replace(renamed, merges=tuple(merges.values()))


def _hands_on(recipe: Body, name: str, merge: Body) -> bool:
    whole = (("weight", Setting.scalar(1.0)),)
    rest = [source.parameters for piece in recipe.slices for source in piece.sources]
    return (
        recipe.merge_method == LINEAR.name
        and [source.model for piece in recipe.slices for source in piece.sources] == [name]
        and rest == [whole]
        and (recipe.out_dtype or recipe.dtype) == (merge.out_dtype or merge.dtype)
    )
