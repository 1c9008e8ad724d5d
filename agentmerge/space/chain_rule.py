"""A merge's gradient, read in the coordinates of a search space: the chain rule.

A worker tells the slope in each tensor's own weights. An axis reaches a tensor by its layer group
(or as one knot of a line through the layers), its filter and its model; canonical form may have
divided the weights that the axis gave. It knows spaces and plain numbers, no weights and no torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from agentmerge.contracts.space import Axis, Space
from agentmerge.contracts.worker import Gradient, TensorSlope
from agentmerge.recipe import Setting
from agentmerge.space.grouped import SearchSpace


def differentiable_axes(space: Space) -> tuple[bool, ...]:
    """Which axes a gradient says something about: weights and lambda of methods that have a slope,
    and scales of layers.

    Densities and the like choose elements, and a choice has no slope.
    """
    possible = space.method.differentiable
    return tuple(
        possible and axis.parameter in ("weight", "lambda", "scale") for axis in space.axes
    )


def unit_gradient(
    space: SearchSpace, vector: Sequence[float], gradient: Gradient
) -> tuple[float, ...]:
    """d loss / d coordinate of the unit box at ``vector``, one number an axis, 0 without a slope.

    gradient: of ``space.slope_recipe(vector)``, from any space with a point there.
    """
    slopes = differentiable_axes(space)
    values = [axis.value(float(x)) for axis, x in zip(space.axes, vector, strict=True)]
    if space.stacks is not None:
        own = space.stacks.slopes(values, gradient)
        return tuple(x * (a.high - a.low) for x, a in zip(own, space.axes, strict=True))
    canonical = space.recipe(vector)
    found = [0.0] * space.dimensions
    for tensor in gradient.tensors:
        shares = _shares(space, tensor)
        reached = [
            (i, axis, shares[axis.group])
            for i, axis in enumerate(space.axes)
            if slopes[i] and axis.group in shares and axis.filter == _filter(space, tensor.tensor)
        ]
        given: dict[str, float] = {}
        for i, axis, share in reached:
            if axis.model is not None:
                given[axis.model] = given.get(axis.model, 0.0) + share * values[i]
        made = canonical.effective(tensor.tensor, tensor.layer, after=tensor.after)
        divided = _divisor(
            given, {name: dict(own)["weight"] for name, _, own in made.sources if own}
        )
        for i, axis, share in reached:
            found[i] += _slope(tensor, axis, divided) * share * (axis.high - axis.low)
    return tuple(found)


def _slope(tensor: TensorSlope, axis: Axis, divided: float) -> float:
    if axis.model is None:
        return tensor.scale
    return dict(tensor.weights).get(axis.model, 0.0) / divided


def _divisor(given: dict[str, float], made: dict[str, float]) -> float:
    """What canonical form divided a tensor's weights by; 1 where it left them alone."""
    largest = max(made, key=lambda name: abs(made[name]), default=None)
    if largest is None or not made[largest] or not given.get(largest):
        return 1.0
    return given[largest] / made[largest]


def _filter(space: Space, tensor: str) -> str | None:
    """The first filter that matches, as ``Setting.at`` has it."""
    return next(name for name in space.filters if name is None or name in tensor)


def _shares(space: Space, tensor: TensorSlope) -> dict[int, float]:
    """Layer group -> its share of the tensor's values; with ``smooth``, the knots about its place.

    Places are ``Recipe.effective``'s: what lies outside the layers belongs to the first group, or
    behind them to the last; a line gives it its first value.
    """
    last = space.groups - 1
    if not space.genome.smooth:
        if tensor.layer is None:
            return {last if tensor.after else 0: 1.0}
        return {tensor.layer * space.groups // space.num_layers: 1.0}
    depth = space.num_layers - 1
    place = 0.0 if tensor.layer is None else (tensor.layer / depth if depth else 1.0)
    shares = {}
    for knot in range(space.groups):
        only = tuple(float(i == knot) for i in range(space.groups))
        share = Setting(((None, only),)).at("", place)
        if share:
            shares[knot] = share
    return shares
