"""A recipe's values by layer group, model and filter: what heat maps and comparisons are made of.

Values are the effective ones (after mergekit's precedence), read at the first layer of each group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from agentmerge.errors import AgentmergeError
from agentmerge.methods import RECIPE_METHODS
from agentmerge.recipe import Recipe
from agentmerge.recipe.copying import stacked_layers
from agentmerge.recipe.names import short_name
from agentmerge.space.grouped import SearchSpace

OTHER = "other tensors"

#: (model, parameter, filter): "all models" where shared; filter "" where the genome has none.
Row = tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class Grid:
    """columns: names of the layer groups. rows: a row's value a column, None where it has none."""

    columns: tuple[str, ...]
    rows: Mapping[Row, tuple[float | None, ...]]


def stack_depth(recipe: Recipe, num_layers: int) -> int:
    """How many layers a stack of layers has; 0 of a merge of weights in their places."""
    return len(stacked_layers(recipe, num_layers) or ())


def grid(space: SearchSpace, recipe: Recipe, depth: int = 0) -> Grid:
    """The values of any recipe of these models, on the layer groups of ``space``.

    depth: of the deepest stack that it is laid beside; stacks have a column a layer.
    """
    stacked = stack_depth(recipe, space.num_layers)
    starts, columns = _columns(space, max(depth, stacked))
    filters = [*(_outputs(recipe, space) if stacked else ()), *space.filters]
    searched = {axis.parameter for axis in space.axes if axis.model is None}
    rows: dict[Row, list[float | None]] = {}
    for filter_ in filters:
        tensor = filter_ or ""  # an empty name matches no filter
        for place, layer in enumerate(starts):
            try:
                found = recipe.effective(tensor, layer)
            except AgentmergeError:
                continue  # refused there; the grid shows a gap
            values: dict[tuple[str, str], float] = {}
            method = RECIPE_METHODS[found.method]
            for model, copied, own in found.sources:
                if method.sets_apart(found.base_model) and model == found.base_model:
                    continue
                for name, value in own:
                    values[short_name(model), name] = value
                if stacked and copied is not None:
                    row = rows.setdefault((short_name(model), "layer", ""), [None] * len(starts))
                    row[place] = copied
                if method.pairwise:
                    t = dict(found.shared)["t"]
                    values[short_name(model), "share"] = 1 - t if model == found.base_model else t
                elif not own:
                    values[short_name(model), "present"] = 1.0
            for name, value in found.shared:
                if name in searched and not method.pairwise:
                    values["all models", name] = value
            for (model, name), value in values.items():
                where = filter_ or (OTHER if space.genome.filters else "")
                row = rows.setdefault((model, name, where), [None] * len(starts))
                row[place] = value
    return Grid(tuple(columns), {key: tuple(row) for key, row in rows.items()})


def _outputs(recipe: Recipe, space: SearchSpace) -> list[str]:
    """Filters of a stack's own, such as those of its layers' outputs, that the genome has not."""
    parameters = [*recipe.parameters]
    for piece in recipe.slices:
        parameters += piece.parameters
        parameters += (own for source in piece.sources for own in source.parameters)
    found = dict.fromkeys(name for _, setting in parameters for name in setting.filters)
    return [name for name in found if name is not None and name not in space.filters]


def _columns(space: SearchSpace, depth: int) -> tuple[list[int], list[str]]:
    if depth or space.genome.smooth:
        layers = list(range(max(depth, space.num_layers)))
        return layers, [f"layer {layer}" for layer in layers]
    step = space.num_layers // space.groups
    starts = [group * step for group in range(space.groups)]
    if step == 1:
        return starts, [f"layer {layer}" for layer in starts]
    return starts, [f"layers {first}-{first + step - 1}" for first in starts]
