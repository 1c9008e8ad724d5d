"""Recipes of other layers than the models' own: which layers they read, and passthrough's form.

A passthrough slice is one model's layers. Where it keeps the depth and scales nothing, a linear
merge of one model a slice copies the same, bit for bit, and that is its one form: what it always
was. Knows no depth but what it is told.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from agentmerge.errors import RecipeError
from agentmerge.methods import PASSTHROUGH
from agentmerge.recipe.parts import Body, Setting

B = TypeVar("B", bound=Body)


def one_source_a_slice(recipe: B) -> B:
    """A passthrough recipe as it was written; its base, of which nothing is made, is gone.

    Raises:
        RecipeError: two models in a slice.
    """
    for index, piece in enumerate(recipe.slices):
        if len(piece.sources) != 1:
            raise RecipeError(
                f"slice {index} has {len(piece.sources)} sources, and passthrough copies one; "
                "merge them with linear"
            )
    slices = tuple(replace(piece, base_model=None) for piece in recipe.slices)
    return replace(recipe, slices=slices, base_model=None)


def as_linear(recipe: B) -> B:
    """The linear recipe that copies what a passthrough recipe without a scale copies."""
    weight = (("weight", Setting.scalar(1.0)),)
    slices = tuple(
        replace(piece, sources=(replace(piece.sources[0], parameters=weight),), parameters=())
        for piece in recipe.slices
    )
    return replace(recipe, merge_method="linear", slices=slices, parameters=())


def layers_read(recipe: Body) -> tuple[int, ...]:
    """Of a canonical recipe: which of the models' layers each layer is made of, by the first source
    of its slice where they read several."""
    ranges = [piece.sources[0].layer_range or (0, 0) for piece in recipe.slices]
    return tuple(layer for start, end in ranges for layer in range(start, end))


def stacked_layers(recipe: Body, num_layers: int) -> tuple[int, ...] | None:
    """The same of a stack: a passthrough recipe, or one that makes other layers than the models
    have, in another order or number. None of a merge of weights in their places."""
    layers = layers_read(recipe)
    in_place = layers == tuple(range(num_layers))
    return None if in_place and recipe.merge_method != PASSTHROUGH.name else layers
