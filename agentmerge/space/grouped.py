"""The search space: a genome config on a family with so many layers, as a unit box.

``recipe(vector)`` and ``vector(recipe)`` go back and forth exactly: a recipe that the space made
comes back to itself, bit for bit in canonical form. Strategies see only the unit box; real ranges
are here. Knows no weights and no scores.

Bounds are the table's (``methods.py``). A weight is in [0, 1] where only ratios matter
(``normalize``) and for linear; in [0, 1.5] for task-vector methods without ``normalize``, since the
best uniform weight is often above 1 divided by the number of experts and can pass 1.
``allow_negative_weights`` mirrors the range. Other parameters lie on a straight or a logarithmic
scale, or as equal parts of the axis where they are whole numbers. della's epsilon is
searched as a share of the largest one its density allows, so that every point is a legal recipe.
slerp has t in [0, 1] a group, and with more than two models also which two (base, partner); a
method that puts one model onto a base has an axis for which one, where there are several.
Parameters of a whole merge, searched by a method's default or by ``genome.evolve``, have an axis a
group and filter, after those of the models.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from agentmerge.config import GenomeConfig
from agentmerge.contracts.space import Axis, index_at, inside_unit
from agentmerge.errors import ConfigError, RecipeRejected
from agentmerge.methods import EPSILON_REACH, METHODS, SUM_NORMALIZED, Method, Parameter
from agentmerge.recipe import Effective, Parameters, Recipe, Setting, Slice, Source, round12

SCALE_POINTS = (0.4, 0.55, 0.7, 0.85, 1.0)
DENSITY_POINTS = (0.1, 0.3, 0.5, 0.7, 0.9)
SLERP_POINTS = (0.1, 0.3, 0.5, 0.7, 0.9)
#: A uniform merge whose weight rises with depth (LiNeS, arXiv 2410.17146): first and last layer's.
DEPTH_LINE = (0.4, 1.0)

#: How far a point that is no merge is moved towards the uniform one, until it is one.
_TOWARDS_UNIFORM = (1e-3, 0.01, 0.1, 0.5)


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

    @cached_property
    def key(self) -> str:
        """What tells this space from others of the same parents: candidates carry it."""
        body = json.dumps([self.genome.model_dump(mode="json"), self.num_layers], sort_keys=True)
        return hashlib.sha256(body.encode()).hexdigest()[:12]

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
        return self.genome.experts

    @property
    def method(self) -> Method:
        return METHODS[self.genome.merge_method]

    @property
    def is_slerp(self) -> bool:
        return self.method.pairwise

    @property
    def picks_partner(self) -> bool:
        """One model a group goes onto the base, and there are several to choose from."""
        return self.method.most == 1 and len(self.models) > 1

    @cached_property
    def shared(self) -> tuple[Parameter, ...]:
        """The parameters of the whole merge that have axes."""
        return self.genome.evolved

    @cached_property
    def axes(self) -> tuple[Axis, ...]:
        """In the order group, model, filter, parameter; the whole merge's own after the models."""
        return tuple(self._slerp_axes() if self.is_slerp else self._weight_axes())

    @property
    def dimensions(self) -> int:
        return len(self.axes)

    @property
    def freedoms(self) -> int:
        """Dimensions that change the merge: ``normalize`` makes one scale a filter redundant.

        So does a lambda that is searched beside the weights.
        """
        scaled = self.genome.normalizes or any(p.name == "lambda" for p in self.shared)
        if self.is_slerp or not self.method.source or not scaled:
            return self.dimensions
        return self.dimensions - len(self.filters) * (1 if self.genome.smooth else self.groups)

    @property
    def only_ratios(self) -> bool:
        """Whether a point and its multiples are one merge, weight by weight of a group's filter."""
        weighs = any(axis.parameter == "weight" for axis in self.axes)
        return weighs and self.genome.normalizes and not self.picks_partner

    def legal(self, vector: Sequence[float]) -> bool:
        """Whether a point is a merge at all: weights that cancel under ``normalize`` are none."""
        if not self.only_ratios:
            return True
        try:
            recipe = self.recipe(vector)
            for layer in range(self.num_layers):
                for filter_ in self.filters:
                    recipe.effective(filter_ or "", layer)
        except RecipeRejected:
            return False
        return True

    def made_legal(self, vector: Sequence[float]) -> tuple[float, ...]:
        """The point itself, or where it is no merge, one a little nearer to the uniform merge."""
        uniform = self.uniform()[1]
        if uniform is None or self.legal(vector):
            return tuple(vector)
        for share in _TOWARDS_UNIFORM:
            found = tuple(x + share * (u - x) for x, u in zip(vector, uniform, strict=True))
            if self.legal(found):
                return found
        return uniform

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
        if canonical.merge_method != self.genome.merge_method:
            return None
        values = self._slerp_values(canonical) if self.is_slerp else self._values(canonical)
        if values is None:
            return None
        point = tuple(axis.unit(v) for axis, v in zip(self.axes, values, strict=True))
        if not all(0.0 <= x <= 1.0 for x in point):
            return None
        return point if _same_merge(self.recipe(point), canonical) else None

    def nearest(self, recipe: Recipe) -> tuple[float, ...]:
        """The point most like a recipe of another space.

        Where both have a parameter of a model, it keeps its value, the mean over a group's layers;
        slerp's t and two weights stand for each other. The rest is neutral.
        """
        canonical = recipe.canonical(self.num_layers)
        return tuple(self._like(canonical, axis) for axis in self.axes)

    def _like(self, recipe: Recipe, axis: Axis) -> float:
        found = []
        for layer in range(*self._layers(axis.group)):
            try:
                value = self._carried(recipe.effective(axis.filter or "", layer), axis)
            except RecipeRejected:
                value = None
            if value is not None:
                found.append(value)
        if not found:
            return _neutral(axis)
        return min(max(axis.unit(statistics.fmean(found)), 0.0), 1.0)

    def _carried(self, made: Effective, axis: Axis) -> float | None:
        """What a tensor's recipe says of an axis, or None."""
        shared = dict(made.shared)
        if axis.model is None and axis.parameter != "t":
            return shared.get(axis.parameter)
        weights = {model: dict(own).get("weight") for model, _, own in made.sources}
        if "t" in shared and len(weights) == 2:
            base = made.base_model
            weights = {m: 1 - shared["t"] if m == base else shared["t"] for m in weights}
        if axis.parameter == "weight":
            # A model that is not there adds nothing.
            return weights.get(str(axis.model), 0.0)
        if axis.parameter == "t":
            pair = [abs(weights.get(model) or 0.0) for model in self.models]
            return pair[1] / math.fsum(pair) if len(pair) == 2 and any(pair) else None
        own = {model: dict(values) for model, _, values in made.sources}
        return own.get(str(axis.model), {}).get(axis.parameter)

    def _layers(self, group: int) -> tuple[int, int]:
        """The layers that stand for a group: its own, or its knot's place on the line."""
        if not self.genome.smooth:
            return self._range(group)
        knot = round(group * (self.num_layers - 1) / max(self.groups - 1, 1))
        return knot, knot + 1

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
        if (self.is_slerp and len(self.models) > 2) or self.picks_partner:
            weight = (("weight", Setting.scalar(share)),)
            sources = tuple(Source(m, (0, self.num_layers), weight) for m in self.models)
            recipe = Recipe("linear", (Slice(sources),), dtype=self.dtype)
            return recipe.canonical(self.num_layers), None
        return self._everywhere(weight=share)

    def scale_points(self) -> list[tuple[str, Recipe, tuple[float, ...] | None]]:
        """Five uniform merges along the method's one natural scale: weight, density or t."""
        if self.is_slerp:
            points = [("t", t) for t in SLERP_POINTS] if len(self.models) == 2 else []
        elif self.method.source and not self.genome.normalizes:
            points = [("weight", w) for w in SCALE_POINTS]
        elif any(axis.parameter == "select_topk" for axis in self.axes):
            points = [("select_topk", d) for d in DENSITY_POINTS]
        elif any(axis.parameter == "density" for axis in self.axes):
            points = [("density", d) for d in DENSITY_POINTS]
        else:
            points = []  # normalize takes the scale out: every point would be the uniform merge
        found: list[tuple[str, Recipe, tuple[float, ...] | None]] = []
        for parameter, value in points:
            levels = {"weight": 1.0 / len(self.models), parameter: value}
            found.append((f"uniform {parameter} {value:g}", *self._everywhere(**levels)))
        return found

    def depth_line(self) -> list[tuple[str, Recipe, tuple[float, ...] | None]]:
        """Uniform merges whose weight rises with depth, where layers have weights of their own."""
        if self.groups == 1 or self.genome.normalizes or self.is_slerp or not self.method.source:
            return []
        low, high = DEPTH_LINE
        point = tuple(
            axis.unit(low + (high - low) * axis.group / (self.groups - 1))
            if axis.parameter == "weight"
            else _neutral(axis)
            for axis in self.axes
        )
        return [(f"uniform weight {low:g} to {high:g} by depth", self.recipe(point), point)]

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
        axes = []
        for group in range(self.groups):
            for model in self.models:
                for filter_ in self.filters:
                    for parameter in self.method.source:
                        axes.append(self._axis(parameter, group, model, filter_))
            if self.picks_partner:
                name = f"{self.layers_text(group)} partner"
                axes.append(Axis(name, "partner", group, None, None, 0.0, 1.0))
            for filter_ in self.filters:
                axes += [self._axis(parameter, group, None, filter_) for parameter in self.shared]
        return axes

    def _axis(
        self, parameter: Parameter, group: int, model: str | None, filter_: str | None
    ) -> Axis:
        who = None if model is None else short_name(model)
        what = f"{parameter.name} share" if parameter.kind == "share" else parameter.name
        name = " ".join(x for x in (self.layers_text(group), who, filter_, what) if x)
        low, high = parameter.low, parameter.high
        if parameter.name == "weight":
            high = 1.0 if self.genome.normalizes else high
            low = -high if self.genome.allow_negative_weights else 0.0
        return Axis(name, parameter.name, group, model, filter_, low, high, parameter.kind)

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
        method = self.method
        switch, value = method.normalize_param, Setting.scalar(float(genome.normalizes))
        return Recipe(
            genome.merge_method,
            slices,
            genome.base_model if method.base != "ignored" else None,
            () if switch is None else ((switch, value),),
            self.dtype,
            tokenizer_source=genome.tokenizer_source,
            chat_template=genome.recipe_template,
            merge_seed=self.merge_seed if method.random else None,
        )

    def _assemble(self, values: list[float]) -> Recipe:
        if self.is_slerp:
            return self._whole(tuple(self._slerp_pieces(values)))
        place: dict[tuple[int, str | None, str, str | None], float] = {}
        for axis, value in zip(self.axes, values, strict=True):
            place[axis.group, axis.model, axis.parameter, axis.filter] = value
        for axis in self.axes:
            if axis.kind == "share":
                at = axis.group, axis.model, axis.parameter, axis.filter
                largest = _largest_epsilon(place[axis.group, axis.model, "density", axis.filter])
                place[at] = round12(place[at] * largest)
        spans = [tuple(range(self.groups))] if self.genome.smooth else list(self._each_group())
        slices = []
        for groups in spans:
            layers = (0, self.num_layers) if self.genome.smooth else self._range(groups[0])
            models = self.models
            if self.picks_partner:
                models = (models[index_at(place[groups[0], None, "partner", None], len(models))],)
            own = tuple(
                Source(model, layers, self._settings(place, groups, model, self.method.source))
                for model in models
            )
            slices.append(
                Slice(own, parameters=self._settings(place, groups, None, self.shared)),
            )
        return self._whole(tuple(slices))

    def _each_group(self) -> Iterator[tuple[int, ...]]:
        for group in range(self.groups):
            yield (group,)

    def _settings(
        self,
        place: Mapping[tuple[int, str | None, str, str | None], float],
        groups: tuple[int, ...],
        model: str | None,
        parameters: tuple[Parameter, ...],
    ) -> Parameters:
        """One value a filter, or with ``smooth`` one knot a group."""
        return tuple(
            (
                p.name,
                Setting(
                    tuple(
                        (f, tuple(place[group, model, p.name, f] for group in groups))
                        for f in self.filters
                    )
                ),
            )
            for p in parameters
        )

    def _slerp_pieces(self, values: list[float]) -> list[Slice]:
        width = len(self.axes) // self.groups
        pieces = []
        for group in range(self.groups):
            row = values[group * width : (group + 1) * width]
            if width == 1:
                base, partner = self.models
            else:
                base = self.models[index_at(row[0], len(self.models))]
                others = [m for m in self.models if m != base]
                partner = others[index_at(row[1], len(others))]
            pieces.append(self._slerp_piece(group, base, partner, row[-1]))
        return pieces

    def _slerp_piece(self, group: int, base: str, partner: str, t: float) -> Slice:
        layers = self._range(group)
        sources = (Source(base, layers), Source(partner, layers))
        return Slice(sources, base, (("t", Setting.scalar(t)),))

    def _values(self, recipe: Recipe) -> list[float] | None:
        values: list[float] = []
        for axis in self.axes:
            value = self._partner(recipe, axis) if axis.parameter == "partner" else None
            if axis.parameter != "partner":
                value = self._read(recipe, axis)
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
        first, last = self._range(axis.group)
        if self.genome.smooth:
            first, last = 0, self.num_layers
        setting = _setting(recipe, axis, first, last)
        found = [v for f, v in setting.entries if f in (axis.filter, None)] if setting else []
        if not found:
            return None
        knots = found[0]
        if self.genome.smooth and len(knots) not in (1, self.groups):
            return None
        return knots[axis.group if len(knots) > 1 and self.genome.smooth else 0]

    def _partner(self, recipe: Recipe, axis: Axis) -> float | None:
        piece = _covering(recipe, *self._range(axis.group))
        base = self.genome.base_model
        names = [s.model for s in piece.sources if s.model != base] if piece else []
        if len(names) != 1 or names[0] not in self.models:
            return None
        return (self.models.index(names[0]) + 0.5) / len(self.models)

    def _slerp_values(self, recipe: Recipe) -> list[float] | None:
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
        is_base = name not in self.models and name == self.genome.base_model
        if not (name in self.models or (is_base and self.method.needs_base)):
            return None
        if not self.method.source:
            return self._nothing_added() if is_base else None
        if is_base and self.genome.normalizes and self.method.name in SUM_NORMALIZED:
            return None  # all weights zero: nothing to divide by
        return tuple(
            axis.unit(float(axis.model == name)) if axis.parameter == "weight" else _neutral(axis)
            for axis in self.axes
        )

    def _nothing_added(self) -> tuple[float, ...] | None:
        if self.method.name != "sce":
            return None
        return (0.0,) * self.dimensions  # select_topk of nothing

    def _slerp_end_point(self, name: str) -> tuple[float, ...] | None:
        if name not in self.models:
            return None
        index = self.models.index(name)
        if len(self.models) == 2:
            return (float(index),) * self.groups
        return ((index + 0.5) / len(self.models), 0.5 / (len(self.models) - 1), 0.0) * self.groups

    def _everywhere(self, **levels: float) -> tuple[Recipe, tuple[float, ...]]:
        point = tuple(
            axis.unit(levels[axis.parameter]) if axis.parameter in levels else _neutral(axis)
            for axis in self.axes
        )
        return self.recipe(point), point


def short_name(model: str) -> str:
    """The last part of a model's name or path, for people and prompts."""
    return "+".join(part.rstrip("/").rsplit("/", 1)[-1] for part in model.split("+"))


def public_names(models: Iterable[str]) -> dict[str, str]:
    """Names to publish: of a local folder the end of its path that tells it from the others, which
    is mostly its own name; hub ids as they are."""
    names = list(dict.fromkeys(models))
    found: dict[str, str] = {}
    for model in names:
        others = [name for name in names if name != model]
        depth = 1
        while depth < model.count("/") and _end(model, depth) in [_end(o, depth) for o in others]:
            depth += 1
        found[model] = _end(model, depth)
    return found


def _end(model: str, depth: int) -> str:
    """A model's name with its local paths cut to so many parts."""
    return "+".join(
        "/".join(part.rstrip("/").split("/")[-depth:]) if part.startswith(("/", "~", ".")) else part
        for part in model.split("+")
    )


def _neutral(axis: Axis) -> float:
    """Where an axis leaves the others' values as they are, or else its middle."""
    if axis.kind == "share":
        return 0.0
    plain = {"density": 1.0, "lambda": 1.0, "gamma": 0.0, "select_topk": 1.0}
    return axis.unit(plain[axis.parameter]) if axis.parameter in plain else 0.5


def _largest_epsilon(density: float) -> float:
    """0 for densities so small that rounding would make the epsilon as large."""
    least = min(density, 1.0 - density)
    return EPSILON_REACH * least if least > 1e-300 else 0.0


def _covering(recipe: Recipe, first: int, last: int) -> Slice | None:
    for piece in recipe.slices:
        layers = piece.sources[0].layer_range
        if layers and layers[0] <= first and last <= layers[1]:
            return piece
    return None


def _setting(recipe: Recipe, axis: Axis, first: int, last: int) -> Setting | None:
    piece = _covering(recipe, first, last)
    if axis.model is None and piece is not None:
        default = dict(METHODS[recipe.merge_method].shared_params)[axis.parameter]
        fallback = None if default is None else Setting.scalar(default)
        scopes = dict(recipe.parameters) | dict(piece.parameters)
        return scopes.get(axis.parameter, fallback)
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
