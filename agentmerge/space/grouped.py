"""The search space: a genome config on a family with so many layers, as a unit box.

``recipe(vector)`` and ``vector(recipe)`` go back and forth exactly: a recipe that the space made
comes back to itself, bit for bit in canonical form. Strategies see only the unit box; real ranges
are the axes' (``weights.py``, ``slerp.py``, ``layers.py``), and their bounds the table's
(``methods.py``). Knows no weights and no scores.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from agentmerge import plugins
from agentmerge.contracts.space import Axis, SpaceForm
from agentmerge.errors import RecipeRejected
from agentmerge.methods import METHODS, Method
from agentmerge.recipe import Effective, Recipe, Setting, Slice, Source
from agentmerge.space.groups import LayerGroups, along, neutral, same_merge
from agentmerge.space.layers import LayersForm

#: How far a point that is no merge is moved towards the uniform one, until it is one.
_TOWARDS_UNIFORM = (1e-3, 0.01, 0.1, 0.5)


@dataclass(frozen=True)
class SearchSpace(LayerGroups):
    """A genome on a family.

    num_layers: the parents' depth. dtype: what recipes carry (the parents' stored dtype).
    merge_seed: of random masks; part of every recipe that draws some. outputs: what is in the names
    of the tensors by which a layer's attention and its mlp add to the stream; None where layers
    are not searched. under: the merge that a space of layers is about; None of a space of weights.
    pool: all experts, where merges have some of them; the genome's models are then those.
    """

    dtype: str = "bfloat16"
    merge_seed: int = 0
    outputs: tuple[str, str] | None = None
    under: Recipe | None = None
    pool: tuple[str, ...] = ()

    @cached_property
    def stacks(self) -> LayersForm | None:
        """The form of a space of layers."""
        if self.under is None or self.outputs is None:
            return None
        return LayersForm(self, self.under, self.outputs)

    @cached_property
    def deeper(self) -> int:
        """How many layers a stack may have beyond the models' own; 0 where none is searched."""
        if self.outputs is None:
            return 0
        over = self.stacks or replace(self, under=self.uniform()[0]).stacks
        return 0 if over is None else max(0, over.depth - self.num_layers)

    @cached_property
    def form(self) -> SpaceForm:
        if self.stacks is not None:
            return self.stacks
        made: SpaceForm = plugins.load("agentmerge.spaces", self.genome.form)(self)
        return made

    @cached_property
    def key(self) -> str:
        """What tells this space from others of the same parents: candidates carry it."""
        layers = None if self.under is not None else {"layers"}  # weights are what they were
        parts: list[Any] = [self.genome.model_dump(mode="json", exclude=layers), self.num_layers]
        if self.under is not None:
            parts += [self.under.to_dict(), self.outputs]
        body = json.dumps(parts, sort_keys=True)
        return hashlib.sha256(body.encode()).hexdigest()[:12]

    @property
    def method(self) -> Method:
        """What a point's recipe is; of a space of layers not what lies under it."""
        return METHODS["linear"] if self.stacks else super().method

    @property
    def about(self) -> str:
        return "" if self.stacks is None else self.stacks.about

    @property
    def groups(self) -> int:
        return super().groups if self.stacks is None else len(self.stacks.positions)

    @property
    def filters(self) -> tuple[str | None, ...]:
        if self.stacks is None:
            return super().filters
        return (*self.stacks.outputs, None)

    @property
    def axes(self) -> tuple[Axis, ...]:
        return self.form.axes

    @property
    def dimensions(self) -> int:
        return len(self.axes)

    @property
    def freedoms(self) -> int:
        """Dimensions that change the merge."""
        return self.dimensions - self.form.redundant

    @property
    def only_ratios(self) -> bool:
        return self.form.only_ratios

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
        """The point itself, or where it is no merge, one a little nearer to the uniform merge; of a
        space of layers, the point that says what runs."""
        if self.stacks is not None:
            return self._point(self.stacks.projected(self._values(vector)))
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
        values = self._values(vector)
        if self.stacks is not None:
            return self.stacks.recipe(values).canonical(self.num_layers)
        return self._whole(tuple(self.form.slices(values))).canonical(self.num_layers)

    def shallower(self, vector: Sequence[float]) -> tuple[float, ...] | None:
        """The point of a stack without its weakest layer; None where nothing can go."""
        found = None if self.stacks is None else self.stacks.thinner(self._values(vector))
        return None if found is None else self._point(found)

    def slope_recipe(self, vector: Sequence[float]) -> Recipe:
        """The recipe that a gradient at a point is asked of: the point's, but that layers which are
        absent from a stack are there at a scale of 0, since they have slopes too."""
        if self.stacks is None:
            return self.recipe(vector)
        return self.stacks.everything(self._values(vector)).canonical(self.num_layers)

    def _values(self, vector: Sequence[float]) -> list[float]:
        if len(vector) != self.dimensions or not all(0.0 <= x <= 1.0 for x in vector):
            raise RecipeRejected(
                f"a point of this space has {self.dimensions} values in [0, 1], not {list(vector)}"
            )
        return [axis.value(float(x)) for axis, x in zip(self.axes, vector, strict=True)]

    def _point(self, values: Sequence[float]) -> tuple[float, ...]:
        return tuple(axis.unit(v) for axis, v in zip(self.axes, values, strict=True))

    def vector(self, recipe: Recipe) -> tuple[float, ...] | None:
        """The point of a recipe, or None where the recipe lies outside this space."""
        canonical = recipe.canonical(self.num_layers)
        if self.pool and self.stacks is None and (alone := self._alone(canonical)):
            return self.form.end_point(alone)
        if self.stacks is None and canonical.merge_method != self.genome.merge_method:
            return None
        values = self.form.values(canonical)
        if values is None:
            return None
        point = self._point(values)
        if not all(0.0 <= x <= 1.0 for x in point):
            return None
        return point if same_merge(self.recipe(point), canonical) else None

    def _alone(self, canonical: Recipe) -> str | None:
        """The parent that a recipe is, as generation 0 of a pool has each."""
        name = next(iter(canonical.models), "")
        whole = Recipe.of_model(name, self.num_layers, self.dtype).canonical(self.num_layers)
        return name if same_merge(whole, canonical) else None

    def nearest(self, recipe: Recipe) -> tuple[float, ...]:
        """The point most like a recipe of another space.

        Where both have a parameter of a model, it keeps its value, the mean over a group's layers;
        slerp's t and two weights stand for each other. The rest is neutral; in a space of layers
        everything but its own stacks is.
        """
        if self.stacks is not None:
            return self.vector(recipe) or self.stacks.neutral()
        canonical = recipe.canonical(self.num_layers)
        return tuple(self._like(canonical, axis) for axis in self.axes)

    def _like(self, recipe: Recipe, axis: Axis) -> float:
        found = []
        for layer in range(*self.read_at(axis.group)):
            try:
                value = self._carried(recipe.effective(axis.filter or "", layer), axis)
            except RecipeRejected:
                value = None
            if value is not None:
                found.append(value)
        if not found:
            return neutral(axis)
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

    def uniform(self) -> tuple[Recipe, tuple[float, ...] | None]:
        """Every model with the same share, all of every task vector kept; of a space of layers, the
        merge that lies under it."""
        if self.stacks is not None:
            return self.stacks.under, self.stacks.neutral()
        if self.form.mixes_all:
            return self.everywhere()
        weight = (("weight", Setting.scalar(1.0 / len(self.models))),)
        sources = tuple(Source(m, (0, self.num_layers), weight) for m in self.models)
        recipe = Recipe("linear", (Slice(sources),), dtype=self.dtype)
        return recipe.canonical(self.num_layers), None

    def everywhere(self, **levels: float) -> tuple[Recipe, tuple[float, ...]]:
        """The uniform merge with some parameters at other levels, the same in every place."""
        levels = {"weight": 1.0 / len(self.models)} | levels
        point = along(self.axes, lambda axis: levels.get(axis.parameter))
        return self.recipe(point), point

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
