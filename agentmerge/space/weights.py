"""Axes of every method but slerp: a weight and the like a model, and the whole merge's own.

A weight is in [0, 1] where only ratios matter (``normalize``) and for linear; in [0, 1.5] for
task-vector methods without ``normalize``, since the best uniform weight is often above 1 divided by
the number of experts and can pass 1. ``allow_negative_weights`` mirrors the range. della's epsilon
is searched as a share of the largest one its density allows, so that every point is a legal recipe.
A method that puts one model onto a base has an axis for which one, where there are several.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from agentmerge.contracts.space import Axis, index_at, inside_unit
from agentmerge.errors import ConfigError
from agentmerge.methods import EPSILON_REACH, RECIPE_METHODS, SUM_NORMALIZED, Parameter
from agentmerge.recipe import Parameters, Recipe, Setting, Slice, Source, round12
from agentmerge.recipe.names import short_name
from agentmerge.space.groups import LayerGroups, along, covering

SCALE_POINTS = (0.4, 0.55, 0.7, 0.85, 1.0)
DENSITY_POINTS = (0.1, 0.3, 0.5, 0.7, 0.9)

#: (group, model, parameter, filter) -> value.
Values = dict[tuple[int, str | None, str, str | None], float]


@dataclass(frozen=True)
class WeightForm:
    """Axes in the order group, model, filter, parameter; the whole merge's own after the models."""

    on: LayerGroups

    def __post_init__(self) -> None:
        if self.on.method.pairwise:
            raise ConfigError(
                f"genome.space 'weights' has a weight a model, and {self.on.method.name} has none; "
                "leave genome.space out"
            )

    @property
    def mixes_all(self) -> bool:
        """Whether a point may hold every model with the same share."""
        return not self.picks_partner

    @property
    def picks_partner(self) -> bool:
        """One model a group goes onto the base, and there are several to choose from."""
        return self.on.method.most == 1 and len(self.on.models) > 1

    @property
    def shared(self) -> tuple[Parameter, ...]:
        """The parameters of the whole merge that have axes: by default, or ``genome.evolve``."""
        return self.on.genome.evolved

    @property
    def has_depth_line(self) -> bool:
        """Whether weights may rise with depth, and change the merge."""
        return self.on.groups > 1 and not self.on.genome.normalizes and self._weighs

    @property
    def _weighs(self) -> bool:
        return any(parameter.name == "weight" for parameter in self.on.method.source)

    @property
    def redundant(self) -> int:
        """Dimensions that change no merge.

        ``normalize`` makes one scale a filter redundant; so does lambda beside the weights.
        """
        ours = self.on.method.engine != "foreign"
        scales = ours and any(p.name == "lambda" for p in self.shared)
        scaled = self.on.genome.normalizes or scales
        if not self.on.method.source or not scaled:
            return 0
        return len(self.on.filters) * (1 if self.on.genome.smooth else self.on.groups)

    @property
    def only_ratios(self) -> bool:
        """Whether a point and its multiples are one merge, weight by weight of a group's filter."""
        return self._weighs and self.on.genome.normalizes and not self.picks_partner

    @property
    def scale(self) -> tuple[str, tuple[float, ...]]:
        """A uniform merge's one natural scale, and its points; none where it has none."""
        if self._weighs and not self.on.genome.normalizes:
            return "weight", SCALE_POINTS
        searched = {axis.parameter for axis in self.axes}
        for parameter in ("select_topk", "density"):
            if parameter in searched:
                return parameter, DENSITY_POINTS
        return "", ()  # normalize takes the scale out: every point would be the uniform merge

    @cached_property
    def axes(self) -> tuple[Axis, ...]:
        axes = []
        for group in range(self.on.groups):
            for model in self.on.models:
                for filter_ in self.on.filters:
                    for parameter in self.on.method.source:
                        axes.append(self._axis(parameter, group, model, filter_))
            if self.picks_partner:
                name = f"{self.on.layers_text(group)} partner"
                axes.append(Axis(name, "partner", group, None, None, 0.0, 1.0))
            for filter_ in self.on.filters:
                axes += [self._axis(parameter, group, None, filter_) for parameter in self.shared]
        return tuple(axes)

    def _axis(
        self, parameter: Parameter, group: int, model: str | None, filter_: str | None
    ) -> Axis:
        who = None if model is None else short_name(model)
        what = f"{parameter.name} share" if parameter.kind == "share" else parameter.name
        name = " ".join(x for x in (self.on.layers_text(group), who, filter_, what) if x)
        low, high = parameter.low, parameter.high
        if parameter.name == "weight":
            high = 1.0 if self.on.genome.normalizes else high
            low = -high if self.on.genome.allow_negative_weights else low
        usual = parameter.default if self.on.method.engine == "foreign" else None
        return Axis(name, parameter.name, group, model, filter_, low, high, parameter.kind, usual)

    def slices(self, values: list[float]) -> list[Slice]:
        place: Values = {}
        for axis, value in zip(self.axes, values, strict=True):
            place[axis.group, axis.model, axis.parameter, axis.filter] = value
        for axis in self.axes:
            if axis.kind == "share":
                at = axis.group, axis.model, axis.parameter, axis.filter
                largest = _largest_epsilon(place[axis.group, axis.model, "density", axis.filter])
                place[at] = round12(place[at] * largest)
        every = tuple(range(self.on.groups))
        slices = []
        for groups in [every] if self.on.genome.smooth else [(group,) for group in every]:
            layers = self._span(groups[0])
            models = self.on.models
            if self.picks_partner:
                models = (models[index_at(place[groups[0], None, "partner", None], len(models))],)
            source = self.on.method.source
            own = tuple(
                Source(model, layers, self._settings(place, groups, model, source))
                for model in models
            )
            shared = self._settings(place, groups, None, self.shared)
            slices.append(Slice(own, parameters=shared))
        return slices

    def _span(self, group: int) -> tuple[int, int]:
        """The layers of a group's slice."""
        return (0, self.on.num_layers) if self.on.genome.smooth else self.on.layers(group)

    def _settings(
        self,
        place: Mapping[tuple[int, str | None, str, str | None], float],
        groups: tuple[int, ...],
        model: str | None,
        parameters: tuple[Parameter, ...],
    ) -> Parameters:
        """One value a filter, or with ``smooth`` one knot a group."""

        def knots(name: str, filter_: str | None) -> tuple[float, ...]:
            return tuple(place[group, model, name, filter_] for group in groups)

        return tuple(
            (p.name, Setting(tuple((f, knots(p.name, f)) for f in self.on.filters)))
            for p in parameters
        )

    def values(self, recipe: Recipe) -> list[float] | None:
        """What ``slices`` made a canonical recipe of; None where it has none."""
        values: list[float] = []
        for axis in self.axes:
            partner = axis.parameter == "partner"
            value = self._partner(recipe, axis) if partner else self._read(recipe, axis)
            if value is not None and axis.kind == "share":
                density = self._read(recipe, replace(axis, parameter="density"))
                largest = _largest_epsilon(density or 0.0)
                value = inside_unit(value / largest) if largest else 0.0
            if value is None:
                return None
            values.append(value)
        return values

    def _read(self, recipe: Recipe, axis: Axis) -> float | None:
        """The value that a recipe has for an axis's parameter, or None where it has none."""
        smooth = self.on.genome.smooth
        setting = _setting(recipe, axis, covering(recipe, *self._span(axis.group)))
        found = [v for f, v in setting.entries if f in (axis.filter, None)] if setting else []
        if not found:
            return None
        knots = found[0]
        if smooth and len(knots) not in (1, self.on.groups):
            return None
        return knots[axis.group if len(knots) > 1 and smooth else 0]

    def _partner(self, recipe: Recipe, axis: Axis) -> float | None:
        piece = covering(recipe, *self.on.layers(axis.group))
        base = self.on.genome.base_model
        names = [s.model for s in piece.sources if s.model != base] if piece else []
        if len(names) != 1 or names[0] not in self.on.models:
            return None
        return (self.on.models.index(names[0]) + 0.5) / len(self.on.models)

    def end_point(self, name: str) -> tuple[float, ...] | None:
        """The point whose merge is this parent bit for bit, if the space holds one."""
        method, genome = self.on.method, self.on.genome
        if method.engine == "foreign" and not (self._weighs and method.identity):
            return None
        is_base = name not in self.on.models and name == genome.base_model
        if not (name in self.on.models or (is_base and method.needs_base)):
            return None
        if not method.source:
            return self._nothing_added() if is_base else None
        if is_base and genome.normalizes and method.name in SUM_NORMALIZED:
            return None  # all weights zero: nothing to divide by
        return along(
            self.axes,
            lambda axis: float(axis.model == name) if axis.parameter == "weight" else None,
        )

    def _nothing_added(self) -> tuple[float, ...] | None:
        if not any(parameter.name == "select_topk" for parameter in self.on.method.shared):
            return None
        return (0.0,) * len(self.axes)  # select_topk of nothing


def _largest_epsilon(density: float) -> float:
    """0 for densities so small that rounding would make the epsilon as large."""
    least = min(density, 1.0 - density)
    return EPSILON_REACH * least if least > 1e-300 else 0.0


def _setting(recipe: Recipe, axis: Axis, piece: Slice | None) -> Setting | None:
    if axis.model is None and piece is not None:
        default = dict(RECIPE_METHODS[recipe.merge_method].shared_params)[axis.parameter]
        fallback = None if default is None else Setting.scalar(default)
        scopes = dict(recipe.parameters) | dict(piece.parameters)
        return scopes.get(axis.parameter, fallback)
    for source in piece.sources if piece else ():
        if source.model == axis.model:
            return dict(source.parameters).get(axis.parameter)
    return None
