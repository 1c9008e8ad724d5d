"""A live model with other layers than its own: a stack of its parents', on their own parameters.

Every place of the stack has modules of its own, since caches know layers by their number, and takes
the parents' tensors as they lie in memory. Copies are made only of what a recipe scales, of other
dtypes, and where the parents are not on the model's device; they go with the next load. Settings
of single layers come with the modules they were read for, and into the model's config. It knows one
model and one family; ``live.py`` is for merges of weights, which come back untouched.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from agentmerge.errors import CandidateFailed, RunFailed
from agentmerge.merging.digests import digest_of_lines, tensor_line
from agentmerge.merging.family import Family
from agentmerge.merging.live import Loaded
from agentmerge.merging.plan import MergePlan, TensorPlan
from agentmerge.parents.depth import followed
from agentmerge.parents.naming import at_layer
from agentmerge.workers.targets import home_of

#: What transformers' modules call the number of their layer.
_NUMBERS = ("layer_idx", "layer_index", "layer_id", "layer_number")


@dataclass(frozen=True, slots=True)
class _Part:
    """Where a tensor of the files is in a live parameter (or buffer): all of it, or a view."""

    name: str
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def of(self, parameter: torch.Tensor) -> torch.Tensor:
        at = parameter.storage_offset() + self.offset
        return parameter.detach().as_strided(self.size, self.stride, at)

    def is_whole(self, parameter: torch.Tensor) -> bool:
        return not self.offset and (self.size, self.stride) == (
            tuple(parameter.shape),
            parameter.stride(),
        )


class LiveStack:
    """See the module's head.

    live: every tensor of the family's layout as the part of the model that it is.
    """

    def __init__(self, model: Any, family: Family, live: Mapping[str, torch.Tensor]) -> None:
        self._model = model
        self._family = family
        self._parts: dict[int, list[_Part]] = {}
        starts = {home_of(t): int(t.storage_offset()) for t in _stored(model)}
        for name, target in live.items():
            home = home_of(target)
            offset = int(target.storage_offset()) - starts.get(home, 0)
            part = _Part(name, tuple(target.shape), target.stride(), offset)
            self._parts.setdefault(home, []).append(part)
        self._list = _layer_list(model, family, live)
        self._undo: list[Callable[[], None]] = []
        #: Lines of parents' own tensors as they were first seen.
        self._known: dict[tuple[str, str], str] = {}

    def load(self, merge_plan: MergePlan) -> Loaded:
        """Make the model the stack of ``merge_plan``; after an error it has its own layers.

        Raises:
            CandidateFailed: a tensor holds a number that is not finite, or transformers keeps this
                model's layers otherwise than in a list.
            RunFailed: what is live afterwards is not what the parents were.
        """
        self.clear()
        try:
            return self._load(merge_plan, merge_plan.layers or ())
        except BaseException:
            self.clear()
            raise

    def clear(self) -> None:
        """Give the model its own layers back, and free what was copied."""
        while self._undo:
            self._undo.pop()()

    def _load(self, merge_plan: MergePlan, layers: Sequence[int]) -> Loaded:
        if self._list is None:
            raise CandidateFailed(
                f"transformers keeps the layers of {type(self._model).__name__} otherwise than in "
                "a list of their own; score stacks with worker.kind: disk"
            )
        owner, name = self._list
        own = getattr(owner, name)
        items = {item.spec.name: item for item in merge_plan.tensors}
        placed = _Placed(self._family, items, merge_plan.merge_seed, self._parts, self._known)
        for module in _outside(self._model, own):
            placed.fill(module, None, self._undo.append)
        positions = []
        for place, layer in enumerate(layers):
            positions.append(_own_modules(own[layer], layer, place))
            for module in positions[-1].modules():
                placed.fill(module, place)
        self._swap(owner, name, torch.nn.ModuleList(positions))
        text = self._model.config.get_text_config(decoder=True)
        settings = {"num_hidden_layers": len(layers)}
        for key, value in (settings | followed(text.to_dict(), len(own), layers)).items():
            self._swap(text, key, value)
        self._family.verify()
        return placed.proof()

    def _swap(self, owner: Any, name: str, value: Any) -> None:
        before = getattr(owner, name)
        self._undo.append(lambda: setattr(owner, name, before))
        setattr(owner, name, value)


class _Placed:
    """The tensors of one stack, as they are put into modules."""

    def __init__(
        self,
        family: Family,
        items: Mapping[str, TensorPlan],
        merge_seed: int | None,
        parts: Mapping[int, Sequence[_Part]],
        known: dict[tuple[str, str], str],
    ) -> None:
        self._family, self._items, self._seed = family, items, merge_seed
        self._parts, self._known = parts, known
        self._new: dict[tuple[int, int | None], torch.Tensor] = {}
        self._copies: dict[Any, torch.Tensor] = {}
        self._lines: dict[str, str] = {}
        self._where: dict[str, tuple[dict[str, Any], str, _Part]] = {}

    def fill(
        self,
        module: torch.nn.Module,
        place: int | None,
        remember: Callable[[Callable[[], None]], None] = lambda undo: None,
    ) -> None:
        """Put the stack's tensors into a module (not those in it). place: the layer that it is a
        part of, or None outside. remember: takes what puts the module's own back."""
        stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for kept in stores:
            for key, before in [*kept.items()]:
                parts = [] if before is None else self._parts.get(home_of(before), [])
                if not parts:
                    continue
                made = self._made(before, parts, place)
                remember(partial(kept.__setitem__, key, before))
                is_parameter = isinstance(before, torch.nn.Parameter)
                kept[key] = torch.nn.Parameter(made, requires_grad=False) if is_parameter else made
                for part in parts:
                    self._where[_placed_name(part, place)] = (kept, key, part)

    def _made(
        self, before: torch.Tensor, parts: Sequence[_Part], place: int | None
    ) -> torch.Tensor:
        """What stands for a parameter; for one that is tied, the same for all of its names."""
        key = home_of(before), place
        if key not in self._new:
            items = [self._items[_placed_name(part, place)] for part in parts]
            if len(parts) == 1 and parts[0].is_whole(before):
                self._new[key] = self._tensor(items[0], before)
            else:
                self._new[key] = before.detach().clone()
                for item, part in zip(items, parts, strict=True):
                    self._write(item, part.of(self._new[key]))
        return self._new[key]

    def _tensor(self, item: TensorPlan, like: torch.Tensor) -> torch.Tensor:
        """The parent's own, where it is what the plan says; else one copy for all places."""
        (source,), scale = item.inputs, dict(item.effective.sources[0][2]).get("scale", 1.0)
        own = self._family.tensor(*source)
        plain = scale == 1.0 and str(own.dtype) == f"torch.{item.dtype}" == str(like.dtype)
        if plain and self._family.is_resident and own.device == like.device:
            line = tensor_line(item.spec.name, own)
            self._lines[item.spec.name] = line
            seen = self._known.setdefault(source, line.partition(" ")[2])
            if seen != line.partition(" ")[2]:
                raise RunFailed(
                    f"{source[1]!r} of {source[0]!r} is no longer what it was in memory: memory is "
                    "faulty or something else writes to the parents"
                )
            return own
        key = (source, scale, item.dtype, like.dtype)
        if key not in self._copies:
            self._copies[key] = torch.empty(own.shape, dtype=like.dtype, device=like.device)
            self._write(item, self._copies[key])
        else:
            self._lines[item.spec.name] = tensor_line(item.spec.name, self._copies[key])
        return self._copies[key]

    def _write(self, item: TensorPlan, target: torch.Tensor) -> None:
        self._family.merge_into(item, self._seed, target)
        self._lines[item.spec.name] = tensor_line(item.spec.name, target)

    def proof(self) -> Loaded:
        """Every tensor of the plan, as read back from where it was put."""
        if missing := self._items.keys() - self._where.keys():
            raise RunFailed(f"the stack left {len(missing)} tensors out: {sorted(missing)[:3]}")
        lines = {
            name: tensor_line(name, part.of(kept[key]))
            for name, (kept, key, part) in self._where.items()
        }
        if wrong := [name for name, line in lines.items() if self._lines[name] != line]:
            raise RunFailed(
                f"{len(wrong)} live tensors are not those of the stack, the first is {wrong[0]}: "
                "memory is faulty or something else writes to the model"
            )
        return Loaded(digest_of_lines(lines.values()), len(lines), len(self._copies))


def _placed_name(part: _Part, place: int | None) -> str:
    return part.name if place is None else at_layer(part.name, place)


def _own_modules(layer: torch.nn.Module, number: int, place: int) -> torch.nn.Module:
    """The same modules once more, on the same tensors and config, as the layer of another place."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in _stored(layer)}
    for module in layer.modules():
        for value in vars(module).values():
            if hasattr(value, "to_dict") and hasattr(value, "model_type"):  # a config
                memo[id(value)] = value
    made: torch.nn.Module = copy.deepcopy(layer, memo)
    for module in made.modules():
        for name in _NUMBERS:
            if vars(module).get(name) == number:
                setattr(module, name, place)
    return made


def _stored(module: Any) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _outside(model: Any, layers: torch.nn.Module) -> Iterator[torch.nn.Module]:
    inside = set(map(id, layers.modules()))
    return (module for module in model.modules() if id(module) not in inside)


def _layer_list(
    model: Any, family: Family, live: Mapping[str, torch.Tensor]
) -> tuple[Any, str] | None:
    """(module, name of its list) where the model has exactly the family's layers."""
    homes: list[set[int]] = [set() for _ in range(family.layout.num_layers)]
    for spec in family.layout.tensors:
        if spec.layer is not None:
            homes[spec.layer].add(home_of(live[spec.name]))
    for owner in model.modules():
        for name, inner in owner.named_children():
            if not isinstance(inner, torch.nn.ModuleList) or len(inner) != len(homes):
                continue
            held = [set(map(home_of, _stored(layer))) for layer in inner]
            if all(own <= there for own, there in zip(homes, held, strict=True)):
                return owner, name
    return None
