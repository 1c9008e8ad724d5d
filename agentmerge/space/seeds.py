"""The cheap rivals of a search: each parent alone, and uniform merges along one scale."""

from __future__ import annotations

from agentmerge.recipe import Recipe
from agentmerge.space.grouped import SearchSpace
from agentmerge.space.groups import along

#: (label, recipe, its point or None where the space holds none).
Rival = tuple[str, Recipe, tuple[float, ...] | None]
#: A uniform merge whose weight rises with depth (LiNeS, arXiv 2410.17146): first and last layer's.
DEPTH_LINE = (0.4, 1.0)


def parents(space: SearchSpace) -> list[Rival]:
    """Every parent, the base included."""
    names = list(space.genome.models)
    if space.genome.base_model and space.genome.base_model not in names:
        names.insert(0, space.genome.base_model)
    found = []
    for name in names:
        point = space.form.end_point(name)
        whole = Recipe.of_model(name, space.num_layers, space.dtype)
        recipe = space.recipe(point) if point else whole.canonical(space.num_layers)
        found.append((name, recipe, point))
    return found


def scale_points(space: SearchSpace) -> list[Rival]:
    """Five uniform merges along the method's one natural scale: weight, density or t."""
    parameter, values = space.form.scale
    return [
        (f"uniform {parameter} {value:g}", *space.everywhere(**{parameter: value}))
        for value in values
    ]


def depth_line(space: SearchSpace) -> list[Rival]:
    """Uniform merges whose weight rises with depth, where layers have weights of their own."""
    if not space.form.has_depth_line:
        return []
    low, high = DEPTH_LINE
    last = space.groups - 1
    point = along(
        space.axes,
        lambda axis: low + (high - low) * axis.group / last if axis.parameter == "weight" else None,
    )
    return [(f"uniform weight {low:g} to {high:g} by depth", space.recipe(point), point)]
