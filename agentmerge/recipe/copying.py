"""passthrough recipes: each layer as one model has it, in any order and number.

Of those that keep the depth and scale nothing, a linear merge of one model a slice copies the same,
bit for bit, and that is their one form: what it always was. Knows no depth but what it is told.
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


def stacked_layers(recipe: Body) -> tuple[int, ...] | None:
    """Of a canonical passthrough recipe: which of its model's layers each layer is. None of a merge
    of weights, which keeps the models' layers."""
    if recipe.merge_method != PASSTHROUGH.name:
        return None
    ranges = [piece.sources[0].layer_range or (0, 0) for piece in recipe.slices]
    return tuple(layer for start, end in ranges for layer in range(start, end))
