"""What strategies and agents may ask of a search space: axes, and the way to a recipe and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from agentmerge.config import GenomeConfig
from agentmerge.methods import Kind, Method
from agentmerge.recipe import Recipe, Slice, round12

#: How far past an end of its axis a value may lie and still be that end, for rounding's sake.
_SLACK = 1e-9


@dataclass(frozen=True, slots=True)
class Axis:
    """One coordinate: a parameter of one model in one layer group under one filter.

    model: None for a parameter of the whole merge. kind: as ``methods.Parameter``'s; the
    value of a share is what its density has still to make a number of. usual: the default of a
    parameter of which nobody knows where it leaves the others as they are.
    """

    name: str
    parameter: str
    group: int
    model: str | None
    filter: str | None
    low: float
    high: float
    kind: Kind = "float"
    usual: float | None = None

    def value(self, unit: float) -> float:
        if self.kind in ("int", "bool"):
            return self.low + index_at(unit, int(self.high - self.low) + 1)
        if self.kind == "share":
            return unit  # rounded once the density has made an epsilon of it
        if self.kind == "log":
            return round12(self.low * (self.high / self.low) ** unit)
        return round12(self.low + unit * (self.high - self.low))

    def unit(self, value: float) -> float:
        if self.kind in ("int", "bool"):
            return (value - self.low + 0.5) / (self.high - self.low + 1)
        if self.kind == "log":
            if value <= 0:
                return -1.0
            return inside_unit(math.log(value / self.low) / math.log(self.high / self.low))
        return (value - self.low) / (self.high - self.low)


class Space(Protocol):
    """The unit box of a search. Vectors are raw: a value in [0, 1] an axis."""

    @property
    def genome(self) -> GenomeConfig: ...

    @property
    def num_layers(self) -> int: ...

    @property
    def key(self) -> str:
        """What tells this space from others of the same parents."""
        ...

    @property
    def axes(self) -> tuple[Axis, ...]: ...

    @property
    def dimensions(self) -> int: ...

    @property
    def groups(self) -> int: ...

    @property
    def filters(self) -> tuple[str | None, ...]: ...

    @property
    def models(self) -> tuple[str, ...]: ...

    @property
    def method(self) -> Method: ...

    @property
    def freedoms(self) -> int:
        """How many numbers tell one merge of the space from another."""
        ...

    @property
    def only_ratios(self) -> bool:
        """Whether a common factor of all weights changes nothing."""
        ...

    @property
    def about(self) -> str:
        """What its axes are, in words for a model; "" where the merge method says it."""
        ...

    def legal(self, vector: Sequence[float]) -> bool: ...

    def made_legal(self, vector: Sequence[float]) -> tuple[float, ...]: ...

    def recipe(self, vector: Sequence[float]) -> Recipe: ...

    def vector(self, recipe: Recipe) -> tuple[float, ...] | None: ...


class SpaceForm(Protocol):
    """What the axes of a space are, and how their values are written into a recipe and read again.

    A plugin's entry point is the class, built with what the axes are laid over: ``genome``,
    ``num_layers``, ``models`` (those that have axes), ``method``, ``filters``, and ``groups`` of
    whole layers with ``layers(group)`` (first, last + 1) and ``layers_text(group)``. A value is on
    its axis's own scale. ``agentmerge.testing.SpaceSuite`` judges the space that it makes.

    mixes_all: whether a point may hold every model with the same share.
    has_depth_line: whether weights may rise with depth, and change the merge.
    redundant: dimensions that change no merge.
    only_ratios: see ``Space``.
    scale: a uniform merge's one natural parameter and its points; ("", ()) where it has none.
    """

    @property
    def mixes_all(self) -> bool: ...

    @property
    def has_depth_line(self) -> bool: ...

    @property
    def redundant(self) -> int: ...

    @property
    def only_ratios(self) -> bool: ...

    @property
    def scale(self) -> tuple[str, tuple[float, ...]]: ...

    @property
    def axes(self) -> tuple[Axis, ...]: ...

    def slices(self, values: list[float]) -> list[Slice]:
        """The recipe's slices at these values, one an axis."""
        ...

    def values(self, recipe: Recipe) -> list[float] | None:
        """The values of a canonical recipe, one an axis; None where it has none in this form."""
        ...

    def end_point(self, name: str) -> tuple[float, ...] | None:
        """The point, in the unit box, that is one of the models alone; None where there is none."""
        ...


def inside_unit(unit: float) -> float:
    """``unit``, or the end of [0, 1] that it passes by a rounding error."""
    return min(max(unit, 0.0), 1.0) if -_SLACK <= unit <= 1.0 + _SLACK else unit


def index_at(unit: float, count: int) -> int:
    return min(int(unit * count), count - 1)
