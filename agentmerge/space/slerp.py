"""Axes of slerp: t a layer group, and with more than two models also which two."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from agentmerge.contracts.space import Axis, index_at
from agentmerge.errors import ConfigError
from agentmerge.recipe import Recipe, Setting, Slice, Source
from agentmerge.space.groups import LayerGroups, covering

POINTS = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class SlerpForm:
    """Of two models t alone; of more, base and partner as equal parts of an axis each, then t.

    Answers what ``WeightForm`` does.
    """

    on: LayerGroups

    def __post_init__(self) -> None:
        if not self.on.method.pairwise:
            raise ConfigError(
                f"genome.space 'slerp' has a t for two models, and {self.on.method.name} has none; "
                "leave genome.space out"
            )

    has_depth_line = False
    redundant = 0
    only_ratios = False

    @property
    def mixes_all(self) -> bool:
        return len(self.on.models) == 2

    @property
    def scale(self) -> tuple[str, tuple[float, ...]]:
        return "t", POINTS if self.mixes_all else ()

    @cached_property
    def axes(self) -> tuple[Axis, ...]:
        parameters = ["t"] if self.mixes_all else ["base", "partner", "t"]
        return tuple(
            Axis(f"{self.on.layers_text(group)} {p}", p, group, None, None, 0.0, 1.0)
            for group in range(self.on.groups)
            for p in parameters
        )

    def slices(self, values: list[float]) -> list[Slice]:
        models = self.on.models
        pieces = []
        for group, row in self._rows(values):
            base, partner = models if self.mixes_all else _picked(models, row[0], row[1])
            layers = self.on.layers(group)
            sources = (Source(base, layers), Source(partner, layers))
            pieces.append(Slice(sources, base, (("t", Setting.scalar(row[-1])),)))
        return pieces

    def _rows(self, values: list[float]) -> Iterator[tuple[int, list[float]]]:
        width = len(values) // self.on.groups
        for group in range(self.on.groups):
            yield group, values[group * width : (group + 1) * width]

    def values(self, recipe: Recipe) -> list[float] | None:
        values: list[float] = []
        models = self.on.models
        for group in range(self.on.groups):
            piece = covering(recipe, *self.on.layers(group))
            if piece is None or piece.base_model is None:
                return None
            partners = [s.model for s in piece.sources if s.model != piece.base_model]
            t = dict(piece.parameters)["t"].at("", 0.0)
            known = {piece.base_model, *partners} <= set(models)
            if len(partners) != 1 or t is None or not known:
                return None
            if self.mixes_all:
                if piece.base_model != models[0]:
                    return None
                values.append(t)
            else:
                others = [m for m in models if m != piece.base_model]
                base = (models.index(piece.base_model) + 0.5) / len(models)
                values += [base, (others.index(partners[0]) + 0.5) / len(others), t]
        return values

    def end_point(self, name: str) -> tuple[float, ...] | None:
        models = self.on.models
        if name not in models:
            return None
        index = models.index(name)
        if self.mixes_all:
            return (float(index),) * self.on.groups
        return ((index + 0.5) / len(models), 0.5 / (len(models) - 1), 0.0) * self.on.groups


def _picked(models: tuple[str, ...], first: float, second: float) -> tuple[str, str]:
    base = models[index_at(first, len(models))]
    others = [m for m in models if m != base]
    return base, others[index_at(second, len(others))]
