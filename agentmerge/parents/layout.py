"""What a family of parents has in common: the tensors that a merge of them must make.

It reads configs and safetensors headers, and finds every reason why the models cannot be merged
with each other. The tensor list comes from the files, never from a table of architectures. Weights
are read only to see whether a head that should be tied is the embedding, and only where nothing
else speaks against the merge. It knows no recipe and no torch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from agentmerge.errors import ParentError
from agentmerge.parents.checkpoint import HEADS, Checkpoint, is_one_of
from agentmerge.parents.depth import why_fixed
from agentmerge.parents.differences import Member, differences, is_after, name_position
from agentmerge.parents.naming import at_layer


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of the merged model.

    layer: the output layer, None outside the layers; there ``after`` tells the final norm and the
        head from the embeddings. dtype: torch's name of the stored one, the widest if parents
        differ.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    layer: int | None
    after: bool


@dataclass(frozen=True)
class Layout:
    """What every merge of a family is made of.

    tensors: in order, embeddings first, head last. dtype: the one that holds most elements.
    tied: the head is the embedding and so is not in ``tensors``.
    parents: the names that a recipe may use. first: the one the others were compared with, whose
        names the tensors have. carried: the tensors of ``first`` outside its text model, which
        every merge takes over as they are. fixed: why layers cannot be moved, left out or repeated;
        "" where they can.
    """

    tensors: tuple[TensorSpec, ...]
    num_layers: int
    dtype: str
    tied: bool
    parents: tuple[str, ...]
    first: str = ""
    carried: tuple[str, ...] = ()
    fixed: str = ""

    @cached_property
    def by_name(self) -> dict[str, TensorSpec]:
        return {spec.name: spec for spec in self.tensors}

    def of_most(self, most: int | None) -> Layout:
        """Of so many parents, where only so many are merged at a time; None for all."""
        return replace(self, parents=self.parents[:most])

    @property
    def parameters(self) -> int:
        """How many numbers a merged model has."""
        return sum(math.prod(spec.shape) for spec in self.tensors)

    @property
    def layer_parameters(self) -> int:
        """How many of them are in its layers."""
        return sum(math.prod(spec.shape) for spec in self.tensors if spec.layer is not None)

    def at_depth(self, layers: Sequence[int]) -> Layout:
        """Of a model whose layer k is such a one as layer ``layers[k]`` here."""
        own: dict[int, list[TensorSpec]] = {}
        for spec in self.tensors:
            if spec.layer is not None:
                own.setdefault(spec.layer, []).append(spec)
        moved = [spec for spec in self.tensors if spec.layer is None]
        for place, layer in enumerate(layers):
            moved += [replace(s, name=at_layer(s.name, place), layer=place) for s in own[layer]]
        tensors = tuple(sorted(moved, key=lambda spec: name_position(spec.name)))
        return replace(self, tensors=tensors, num_layers=len(layers))


def read_layout(parents: Mapping[str, Path | Checkpoint], base: str | None = None) -> Layout:
    """The layout of a family.

    parents: the user's model name -> local directory, or what was read from one. base: the one
        the others are compared with, by default the first.

    Raises:
        ParentError: every reason why these models cannot be merged, one a line.
    """
    found, faults = _survey(parents, base)
    if faults:
        raise ParentError("\n".join(faults))
    first = found[0]
    specs = []
    for name, header in first.tensors.items():
        dtype = header.dtype
        for other in found[1:]:
            dtype = _wider(dtype, other.tensors[name].dtype)
        index = first.checkpoint.layer_of(name)
        specs.append(TensorSpec(name, header.shape, dtype, index, is_after(name, index)))
    sizes: Counter[str] = Counter()
    for spec in specs:
        sizes[spec.dtype] += math.prod(spec.shape)
    return Layout(
        tensors=tuple(sorted(specs, key=lambda spec: name_position(spec.name))),
        num_layers=first.checkpoint.depth,
        dtype=sizes.most_common(1)[0][0],
        tied=bool(first.tied),
        parents=tuple(parents),
        first=first.name,
        carried=first.checkpoint.carried,
        fixed=why_fixed(first.checkpoint.config, first.checkpoint.depth),
    )


def layout_faults(parents: Mapping[str, Path | Checkpoint], base: str | None = None) -> list[str]:
    """Every reason why these models cannot be merged, one sentence each; empty if there is none."""
    return _survey(parents, base)[1]


def _survey(
    parents: Mapping[str, Path | Checkpoint], base: str | None
) -> tuple[list[Member], list[str]]:
    """The parents, the base or else the first in front, and every fault."""
    if not parents or (base is not None and base not in parents):
        return [], [f"base model {base!r} is not among the models {', '.join(map(repr, parents))}"]
    names = sorted(parents, key=lambda name: name != (base or next(iter(parents))))
    checkpoints, faults = {}, []
    for name in names:
        given = parents[name]
        try:
            read = given if isinstance(given, Checkpoint) else Checkpoint.read(given)
            faults += [f"{name}: {fault}" for fault in read.faults()]
            checkpoints[name] = read
        except ParentError as error:
            faults.append(f"{name}: {error}")
    found, more = _compared(checkpoints, compare=False)
    if faults or more:
        return found, faults + more
    return _compared(checkpoints, compare=True)


def _compared(
    checkpoints: Mapping[str, Checkpoint], *, compare: bool
) -> tuple[list[Member], list[str]]:
    """Each model with the tensors of its text part under the first one's names, and the faults of
    tying and all differences. compare: read heads that should be tied."""
    found: list[Member] = []
    faults = []
    names: Mapping[str, str] = {}
    for name, checkpoint in checkpoints.items():
        tied, tying_faults = checkpoint.tying(compare=compare)
        faults += [f"{name}: {fault}" for fault in tying_faults]
        if not found:
            names = checkpoint.text
        tensors = {
            names.get(inner, own): checkpoint.tensors[own]
            for inner, own in checkpoint.text.items()
            if tied is False or not is_one_of(own, HEADS)
        }
        if tensors:  # else it was said that the text model cannot be found
            found.append(Member(name, checkpoint, tensors, tied))
    for other in found[1:]:
        faults += differences(found[0], other)
    return found, faults


def _wider(one: str, two: str) -> str:
    """The narrowest dtype that holds both exactly."""
    if one == two:
        return one
    if {one, two} == {"float16", "bfloat16"}:
        return "float32"
    return max(one, two, key=("bfloat16", "float16", "float32", "float64").index)
