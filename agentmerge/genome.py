"""The search space: a genome config on a family with so many layers, as a unit box.

``recipe(vector)`` and ``vector(recipe)`` go back and forth exactly: a recipe that the space made
comes back to itself, bit for bit in canonical form. Strategies see only the unit box; real ranges
are here. Knows no weights and no scores.

Bounds. A weight is in [0, 1] where only ratios matter (``normalize``) and for linear; in
[0, ``TASK_VECTOR_UPPER``] for task-vector methods without ``normalize``, since the best uniform
weight is often above 1 divided by the number of experts and can pass 1. ``allow_negative_weights``
mirrors the range. Density is in [0, 1]. slerp has t in [0, 1] a group, and with more than two
models also which two (base, partner).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from agentmerge.config import GenomeConfig
from agentmerge.errors import ConfigError, RecipeRejected
from agentmerge.methods import METHODS, SUM_NORMALIZED
from agentmerge.recipe import Recipe, Setting, Slice, Source, round12

TASK_VECTOR_UPPER = 1.5
SCALE_POINTS = (0.4, 0.55, 0.7, 0.85, 1.0)
DENSITY_POINTS = (0.1, 0.3, 0.5, 0.7, 0.9)
SLERP_POINTS = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True, slots=True)
class Axis:
    """One coordinate: a parameter of one model in one layer group under one filter."""

    name: str
    parameter: str
    group: int
    model: str | None
    filter: str | None
    low: float
    high: float

    def value(self, unit: float) -> float:
        return round12(self.low + unit * (self.high - self.low))

    def unit(self, value: float) -> float:
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class SearchSpace:
    """A genome on a family.

    num_layers: the parents' depth. dtype: what recipes carry (the parents' stored dtype).
    merge_seed: of random masks; part of every recipe that draws some.
    """

    genome: GenomeConfig
    num_layers: int
    dtype: str = "bfloat16"
    merge_seed: int = 0

    def __post_init__(self) -> None:
        step = self.genome.layer_granularity
        if step and self.num_layers % step:
            legal = [n for n in range(1, self.num_layers + 1) if self.num_layers % n == 0]
            raise ConfigError(
                f"genome.layer_granularity {step} does not divide the {self.num_layers} layers; "
                f"use 0 (one group) or one of {legal}"
            )

    @property
    def groups(self) -> int:
        step = self.genome.layer_granularity
        return self.num_layers // step if step else 1

    @property
    def filters(self) -> tuple[str | None, ...]:
        return (*self.genome.filters, None)

    @property
    def models(self) -> tuple[str, ...]:
        """The models that have axes: a task-vector method's base has no task vector."""
        if METHODS[self.genome.merge_method].needs_base:
            return tuple(m for m in self.genome.models if m != self.genome.base_model)
        return self.genome.models

    @property
    def is_slerp(self) -> bool:
        return self.genome.merge_method == "slerp"

    @cached_property
    def axes(self) -> tuple[Axis, ...]:
        """In the order group, model, filter, parameter."""
        return tuple(self._slerp_axes() if self.is_slerp else self._weight_axes())

    @property
    def dimensions(self) -> int:
        return len(self.axes)

    @property
    def freedoms(self) -> int:
        """Dimensions that change the merge: ``normalize`` makes one scale a filter redundant."""
        if self.is_slerp or not self.genome.normalizes:
            return self.dimensions
        return self.dimensions - len(self.filters) * (1 if self.genome.smooth else self.groups)

    def recipe(self, vector: Sequence[float]) -> Recipe:
        """The canonical recipe at a point of the unit box.

        Raises:
            RecipeRejected: weights that cancel under ``normalize``.
        """
        if len(vector) != self.dimensions or not all(0.0 <= x <= 1.0 for x in vector):
            raise RecipeRejected(
                f"a point of this space has {self.dimensions} values in [0, 1], not {list(vector)}"
            )
        values = [axis.value(float(x)) for axis, x in zip(self.axes, vector, strict=True)]
        return self._assemble(values).canonical(self.num_layers)

    def vector(self, recipe: Recipe) -> tuple[float, ...] | None:
        """The point of a recipe, or None where the recipe lies outside this space."""
        canonical = recipe.canonical(self.num_layers)
        values = self._slerp_values(canonical) if self.is_slerp else self._values(canonical)
        if values is None:
            return None
        point = tuple(axis.unit(v) for axis, v in zip(self.axes, values, strict=True))
        if not all(0.0 <= x <= 1.0 for x in point):
            return None
        return point if _same_merge(self.recipe(point), canonical) else None

    def parents(self) -> list[tuple[str, Recipe, tuple[float, ...] | None]]:
        """(label, recipe, point or None) of every parent, the base included."""
        names = list(self.genome.models)
        if self.genome.base_model and self.genome.base_model not in names:
            names.insert(0, self.genome.base_model)
        found = []
        for name in names:
            point = self._end_point(name)
            whole = Recipe.of_model(name, self.num_layers, self.dtype)
            recipe = self.recipe(point) if point else whole.canonical(self.num_layers)
            found.append((name, recipe, point))
        return found

    def uniform(self) -> tuple[Recipe, tuple[float, ...] | None]:
        """Every model with the same share, all of every task vector kept."""
        share = 1.0 / len(self.models)
        if self.is_slerp and len(self.models) > 2:
            weight = (("weight", Setting.scalar(share)),)
            sources = tuple(Source(m, (0, self.num_layers), weight) for m in self.models)
            recipe = Recipe("linear", (Slice(sources),), dtype=self.dtype)
            return recipe.canonical(self.num_layers), None
        return self._everywhere(weight=share, density=1.0, t=0.5)

    def scale_points(self) -> list[tuple[str, Recipe, tuple[float, ...] | None]]:
        """Five uniform merges along the method's one natural scale: weight, density or t."""
        if self.is_slerp:
            points = [("t", t) for t in SLERP_POINTS] if len(self.models) == 2 else []
        elif not self.genome.normalizes:
            points = [("weight", w) for w in SCALE_POINTS]
        elif any(axis.parameter == "density" for axis in self.axes):
            points = [("density", d) for d in DENSITY_POINTS]
        else:
            points = []  # normalize takes the scale out: every point would be the uniform merge
        found: list[tuple[str, Recipe, tuple[float, ...] | None]] = []
        for parameter, value in points:
            levels = {"weight": 1.0 / len(self.models), "density": 1.0, "t": 0.5, parameter: value}
            found.append((f"uniform {parameter} {value:g}", *self._everywhere(**levels)))
        return found

    def from_slerp_genes(self, genes: Sequence[Sequence[float]]) -> Recipe:
        """mergekit-evolve's slerp genes (groups x models), one way: the two largest a group."""
        pieces = []
        for group, row in enumerate(genes):
            first, second = sorted(range(len(row)), key=lambda i: -row[i])[:2]
            t = 1.0 / (1.0 + math.exp(row[first] - row[second]))
            names = self.genome.models
            pieces.append(self._slerp_piece(group, names[first], names[second], t))
        return self._whole(tuple(pieces)).canonical(self.num_layers)

    def _weight_axes(self) -> list[Axis]:
        genome = self.genome
        method = METHODS[genome.merge_method]
        upper = 1.0
        if method.needs_base and not genome.normalizes:
            upper = TASK_VECTOR_UPPER
        lower = -upper if genome.allow_negative_weights else 0.0
        axes = []
        for group in range(self.groups):
            for model in self.models:
                for filter_ in self.filters:
                    for parameter, _ in method.source_params:
                        low, high = (lower, upper) if parameter == "weight" else (0.0, 1.0)
                        where = f"{self.layers_text(group)} {short_name(model)}"
                        name = " ".join(x for x in (where, filter_, parameter) if x)
                        axes.append(Axis(name, parameter, group, model, filter_, low, high))
        return axes

    def _slerp_axes(self) -> list[Axis]:
        parameters = ["t"] if len(self.models) == 2 else ["base", "partner", "t"]
        return [
            Axis(f"{self.layers_text(group)} {p}", p, group, None, None, 0.0, 1.0)
            for group in range(self.groups)
            for p in parameters
        ]

    def layers_text(self, group: int) -> str:
        first, last = self._range(group)
        if self.genome.smooth:
            return f"knot {group + 1}/{self.groups}"
        return f"layers {first}-{last - 1}"

    def _range(self, group: int) -> tuple[int, int]:
        step = self.genome.layer_granularity or self.num_layers
        return group * step, (group + 1) * step

    def _whole(self, slices: tuple[Slice, ...]) -> Recipe:
        genome = self.genome
        method = METHODS[genome.merge_method]
        normalize = Setting.scalar(float(genome.normalizes))
        return Recipe(
            genome.merge_method,
            slices,
            genome.base_model if method.needs_base else None,
            () if self.is_slerp else (("normalize", normalize),),
            self.dtype,
            tokenizer_source=genome.tokenizer_source,
            merge_seed=self.merge_seed if method.random else None,
        )

    def _assemble(self, values: list[float]) -> Recipe:
        if self.is_slerp:
            return self._whole(tuple(self._slerp_pieces(values)))
        by_place: dict[tuple[int, str | None, str], list[tuple[str | None, float]]] = {}
        for axis, value in zip(self.axes, values, strict=True):
            key = (axis.group, axis.model, axis.parameter)
            by_place.setdefault(key, []).append((axis.filter, value))
        method = METHODS[self.genome.merge_method]
        names = [name for name, _ in method.source_params]
        if self.genome.smooth:
            sources = [
                Source(
                    model,
                    (0, self.num_layers),
                    tuple((p, self._knots(by_place, model, p)) for p in names),
                )
                for model in self.models
            ]
            return self._whole((Slice(tuple(sources)),))
        slices = []
        for group in range(self.groups):
            sources = [
                Source(
                    model,
                    self._range(group),
                    tuple(
                        (p, Setting(tuple((f, (v,)) for f, v in by_place[group, model, p])))
                        for p in names
                    ),
                )
                for model in self.models
            ]
            slices.append(Slice(tuple(sources)))
        return self._whole(tuple(slices))

    def _knots(
        self,
        by_place: dict[tuple[int, str | None, str], list[tuple[str | None, float]]],
        model: str,
        parameter: str,
    ) -> Setting:
        rows = [dict(by_place[group, model, parameter]) for group in range(self.groups)]
        return Setting(tuple((f, tuple(row[f] for row in rows)) for f in self.filters))

    def _slerp_pieces(self, values: list[float]) -> list[Slice]:
        width = len(self.axes) // self.groups
        pieces = []
        for group in range(self.groups):
            row = values[group * width : (group + 1) * width]
            if width == 1:
                base, partner = self.models
            else:
                base = self.models[_index(row[0], len(self.models))]
                others = [m for m in self.models if m != base]
                partner = others[_index(row[1], len(others))]
            pieces.append(self._slerp_piece(group, base, partner, row[-1]))
        return pieces

    def _slerp_piece(self, group: int, base: str, partner: str, t: float) -> Slice:
        layers = self._range(group)
        sources = (Source(base, layers), Source(partner, layers))
        return Slice(sources, base, (("t", Setting.scalar(t)),))

    def _values(self, recipe: Recipe) -> list[float] | None:
        if recipe.merge_method != self.genome.merge_method:
            return None
        values = []
        for axis in self.axes:
            first, last = self._range(axis.group)
            if self.genome.smooth:
                first, last = 0, self.num_layers
            setting = _setting(recipe, axis, first, last)
            if setting is None:
                return None
            found = [v for f, v in setting.entries if f == axis.filter or f is None]
            if not found:
                return None
            knots = found[0]
            if self.genome.smooth and len(knots) not in (1, self.groups):
                return None
            values.append(knots[axis.group if len(knots) > 1 and self.genome.smooth else 0])
        return values

    def _slerp_values(self, recipe: Recipe) -> list[float] | None:
        if recipe.merge_method != "slerp":
            return None
        values: list[float] = []
        width = len(self.axes) // self.groups
        for group in range(self.groups):
            piece = _covering(recipe, *self._range(group))
            if piece is None or piece.base_model is None:
                return None
            partners = [s.model for s in piece.sources if s.model != piece.base_model]
            t = dict(piece.parameters)["t"].at("", 0.0)
            known = {piece.base_model, *partners} <= set(self.models)
            if len(partners) != 1 or t is None or not known:
                return None
            if width == 1:
                if piece.base_model != self.models[0]:
                    return None
                values.append(t)
            else:
                others = [m for m in self.models if m != piece.base_model]
                base = (self.models.index(piece.base_model) + 0.5) / len(self.models)
                values += [base, (others.index(partners[0]) + 0.5) / len(others), t]
        return values

    def _end_point(self, name: str) -> tuple[float, ...] | None:
        """The point whose merge is this parent bit for bit, if the space holds one."""
        if self.is_slerp:
            return self._slerp_end_point(name)
        needs_base = METHODS[self.genome.merge_method].needs_base
        if name not in self.models and not (needs_base and name == self.genome.base_model):
            return None
        zero_sum = name not in self.models and self.genome.normalizes
        if zero_sum and self.genome.merge_method in SUM_NORMALIZED:
            return None  # all weights zero: nothing to divide by
        point = []
        for axis in self.axes:
            value = 1.0 if axis.parameter == "density" or axis.model == name else 0.0
            point.append(axis.unit(value))
        return tuple(point)

    def _slerp_end_point(self, name: str) -> tuple[float, ...] | None:
        if name not in self.models:
            return None
        index = self.models.index(name)
        if len(self.models) == 2:
            return (float(index),) * self.groups
        return ((index + 0.5) / len(self.models), 0.5 / (len(self.models) - 1), 0.0) * self.groups

    def _everywhere(self, **levels: float) -> tuple[Recipe, tuple[float, ...]]:
        point = tuple(axis.unit(levels[axis.parameter]) for axis in self.axes)
        return self.recipe(point), point


def short_name(model: str) -> str:
    """The last part of a model's name or path, for people and prompts."""
    return model.rstrip("/").rsplit("/", 1)[-1]


def _index(unit: float, count: int) -> int:
    return min(int(unit * count), count - 1)


def _covering(recipe: Recipe, first: int, last: int) -> Slice | None:
    for piece in recipe.slices:
        layers = piece.sources[0].layer_range
        if layers and layers[0] <= first and last <= layers[1]:
            return piece
    return None


def _setting(recipe: Recipe, axis: Axis, first: int, last: int) -> Setting | None:
    piece = _covering(recipe, first, last)
    for source in piece.sources if piece else ():
        if source.model == axis.model:
            return dict(source.parameters).get(axis.parameter)
    return None


def _same_merge(one: Recipe, other: Recipe) -> bool:
    """Equal but for what does not change the weights' formula (output dtype, tokenizer)."""
    return (one.slices, one.base_model, one.parameters, one.merge_seed) == (
        other.slices,
        other.base_model,
        other.parameters,
        other.merge_seed,
    )
