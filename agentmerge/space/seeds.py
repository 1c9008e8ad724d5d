"""The cheap rivals of a search: each parent alone, uniform merges along one scale, and where layers
may be searched two experts' layers in one model, and a model with its middle once more."""

from __future__ import annotations

from itertools import permutations

from agentmerge.methods import PASSTHROUGH
from agentmerge.recipe import Recipe, Setting, Slice, Source
from agentmerge.recipe.names import short_name
from agentmerge.space.grouped import SearchSpace
from agentmerge.space.groups import along

#: (label, recipe, its point or None where the space holds none).
Rival = tuple[str, Recipe, tuple[float, ...] | None]
#: A uniform merge whose weight rises with depth (LiNeS, arXiv 2410.17146): first and last layer's.
DEPTH_LINE = (0.4, 1.0)
#: Layers over which a sandwich goes from one expert to the other (arXiv 2410.01335).
TRANSITION = 2
#: More experts have too many pairs: then each has its neighbour inside.
FEW = 3
#: How strongly a middle runs the second time, damped as in arXiv 2605.23872.
STRENGTHS = (0.5, 1.0)


def parents(space: SearchSpace) -> list[Rival]:
    """Every parent, the base included."""
    names = list(space.pool or space.genome.models)
    if space.genome.base_model and space.genome.base_model not in names:
        names.insert(0, space.genome.base_model)
    found = []
    for name in names:
        # Of a pool a parent is itself and nothing else: no merge has all of them.
        point = None if space.pool else space.form.end_point(name)
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


def sandwiches(space: SearchSpace) -> list[Rival]:
    """The outer layers of one expert around the middle of another, for every pair of a few."""
    experts, last = space.models, space.num_layers - 1
    if last < 2:
        return []  # no layer is inside
    pairs = list(permutations(experts, 2))
    if len(experts) > FEW:
        pairs = list(zip(experts, (*experts[1:], experts[0]), strict=True))
    outer = max(1, space.num_layers // 4)
    steps = min(TRANSITION + 1, last // 2 - outer + 1)  # the innermost layers are of one expert
    found = []
    for inside, around in pairs:
        slices = []
        for layer in range(space.num_layers):
            within = min(layer, last - layer) - outer + 1
            share = min(1.0, max(0.0, within / steps))
            weights = dict.fromkeys(experts, 0.0) | {around: 1.0 - share, inside: share}
            slices.append(_slice(layer, layer + 1, weights))
        switch = (("normalize", Setting.scalar(float(space.genome.normalizes))),)
        recipe = Recipe("linear", tuple(slices), parameters=switch, dtype=space.dtype)
        label = f"sandwich {short_name(inside)} in {short_name(around)}"
        found.append(_rival(space, label, recipe))
    return found


def plain_stacks(space: SearchSpace) -> list[Rival]:
    """Each expert with its middle layers once more, damped and not, at most as deep as searched."""
    layers, outputs = space.genome.layers, space.outputs
    size = min(layers.most, space.num_layers // 2) if layers else 0
    if outputs is None or not size:
        return []
    start = (space.num_layers - size) // 2
    found: list[Rival] = []
    for model in space.models:
        for strength in STRENGTHS:
            again = tuple((output, (strength,)) for output in outputs)
            middle = (("scale", Setting((*again, (None, (1.0,))))),)
            slices = (
                Slice((Source(model, (0, start + size)),)),
                Slice((Source(model, (start, start + size), middle),)),
                Slice((Source(model, (start + size, space.num_layers)),)),
            )
            recipe = Recipe(PASSTHROUGH.name, slices, dtype=space.dtype)
            label = f"stack {short_name(model)} {strength:g}"
            found.append((label, recipe.canonical(space.num_layers), None))
    return found


def _slice(start: int, end: int, weights: dict[str, float]) -> Slice:
    return Slice(
        tuple(
            Source(model, (start, end), (("weight", Setting.scalar(weight)),))
            for model, weight in weights.items()
        )
    )


def _rival(space: SearchSpace, label: str, recipe: Recipe) -> Rival:
    canonical = recipe.canonical(space.num_layers)
    return label, canonical, space.vector(canonical)
