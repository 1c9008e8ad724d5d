"""Where a space's axes are: groups of whole layers, or knots of a line through the depth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from agentmerge.config import GenomeConfig
from agentmerge.contracts.space import Axis
from agentmerge.errors import ConfigError
from agentmerge.methods import METHODS, Method
from agentmerge.recipe import Recipe, Slice


@dataclass(frozen=True)
class LayerGroups:
    """A genome on a family: what its axes are laid over. num_layers: the parents' depth."""

    genome: GenomeConfig
    num_layers: int

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
        return self.genome.experts

    @property
    def method(self) -> Method:
        return METHODS[self.genome.merge_method]

    def layers(self, group: int) -> tuple[int, int]:
        step = self.genome.layer_granularity or self.num_layers
        return group * step, (group + 1) * step

    def read_at(self, group: int) -> tuple[int, int]:
        """The layers that stand for a group: its own, or its knot's place on the line."""
        if not self.genome.smooth:
            return self.layers(group)
        knot = round(group * (self.num_layers - 1) / max(self.groups - 1, 1))
        return knot, knot + 1

    def layers_text(self, group: int) -> str:
        first, last = self.layers(group)
        if self.genome.smooth:
            return f"knot {group + 1}/{self.groups}"
        return f"layers {first}-{last - 1}"


def covering(recipe: Recipe, first: int, last: int) -> Slice | None:
    """The slice that holds all of these layers."""
    for piece in recipe.slices:
        layers = piece.sources[0].layer_range
        if layers and layers[0] <= first and last <= layers[1]:
            return piece
    return None


def same_merge(one: Recipe, other: Recipe) -> bool:
    """Equal but for what does not change the weights' formula (output dtype, tokenizer)."""

    def formula(recipe: Recipe) -> tuple[object, ...]:
        shared = recipe.base_model, recipe.parameters, recipe.merge_seed, recipe.merges
        return recipe.merge_method, recipe.slices, *shared

    return formula(one) == formula(other)


def neutral(axis: Axis) -> float:
    """Where an axis leaves the others' values as they are, or else its middle."""
    if axis.usual is not None:
        return min(max(axis.unit(axis.usual), 0.0), 1.0)
    if axis.kind == "share":
        return 0.0
    plain = {"density": 1.0, "lambda": 1.0, "gamma": 0.0, "select_topk": 1.0}
    return axis.unit(plain[axis.parameter]) if axis.parameter in plain else 0.5


def along(axes: tuple[Axis, ...], values: Callable[[Axis], float | None]) -> tuple[float, ...]:
    """A point of these values, neutral where there is none."""
    found = ((axis, values(axis)) for axis in axes)
    return tuple(neutral(axis) if value is None else axis.unit(value) for axis, value in found)
