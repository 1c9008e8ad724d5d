"""passthrough recipes that keep the depth: each layer as one model has it.

mergekit copies the tensors; a linear merge of one model copies them too, bit for bit, so that is
what such a recipe is read as. Knows no depth: what makes more or fewer layers is refused where the
models are known (``Recipe.canonical``).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from agentmerge.errors import RecipeError
from agentmerge.methods import Method, Parameter
from agentmerge.recipe.parts import Body, Setting

B = TypeVar("B", bound=Body)

COPYING = Method(
    "passthrough",
    "Each slice as one model has it.",
    (Parameter("scale", "What tensors are multiplied by.", 1.0),),
    (),
    "ignored",
    "https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md",
)


def copied_layers(recipe: B) -> B:
    """The linear recipe that copies what a passthrough recipe copies.

    Raises:
        RecipeError: two models in a slice, or a ``scale``.
    """
    scopes = [recipe.parameters]
    slices = []
    for index, piece in enumerate(recipe.slices):
        if len(piece.sources) != 1:
            raise RecipeError(
                f"slice {index} has {len(piece.sources)} sources, and passthrough copies one; "
                "merge them with linear"
            )
        (source,) = piece.sources
        scopes += [piece.parameters, source.parameters]
        weight = (("weight", Setting.scalar(1.0)),)
        slices.append(replace(piece, sources=(replace(source, parameters=weight),), parameters=()))
    if any("scale" in dict(scope) for scope in scopes):
        raise RecipeError(
            "passthrough with a scale is not supported; without one, layers are copied as they are"
        )
    return replace(
        recipe, merge_method="linear", slices=tuple(slices), base_model=None, parameters=()
    )
