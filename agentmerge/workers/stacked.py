"""A live model with other layers than its own: a stack of its parents' layers and of merged ones.

Every place of the stack has modules and parameters of its own, since caches know layers by their
number and gradients are of one place. A parameter that is a parent's own tensor is in the parent's
memory; what is merged or scaled, of other dtypes, or of parents that are not on the model's device
is made once for all places that say the same, and kept for the next stack that says it again: what
is merged in the model's own tensor of that layer, unless another place has it, else in new memory.
Settings of single layers come with the modules they were read for, and into the model's config. It
knows one model and one family; ``live.py``, for merges in their places, is told what was lent.
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
from agentmerge.methods import LINEAR, PASSTHROUGH, RECIPE_METHODS
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


@dataclass(frozen=True, slots=True)
class _Copy:
    """A tensor that was made, and the line (without the name) of each part that was written.

    home: of the model's own tensor, where it is in that; None of new memory.
    """

    tensor: torch.Tensor
    said: tuple[str, ...]
    home: int | None


@dataclass(frozen=True, slots=True)
class _Placed:
    """A tensor of the stack where it is: the module's own store, its key there, and the part."""

    name: str
    store: dict[str, Any]
    key: str
    part: _Part

    @property
    def whole(self) -> torch.Tensor:
        found: torch.Tensor = self.store[self.key]
        return found


class LiveStack:
    """See the module's head.

    live: every tensor of the family's layout as the part of the model that it is. lent: told which
        of them a stack writes over; without it none is.
    """

    def __init__(
        self,
        model: Any,
        family: Family,
        live: Mapping[str, torch.Tensor],
        lent: Callable[[list[str]], None] | None = None,
    ) -> None:
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
        self._lent = lent
        self._undo: list[Callable[[], None]] = []
        self._copies: dict[Any, _Copy] = {}
        #: Lines of parents' own tensors, without the name, as they were first seen.
        self._known: dict[tuple[str, str], str] = {}
        self._placed: list[_Placed] = []

    def load(self, merge_plan: MergePlan) -> Loaded:
        """Make the model the stack of ``merge_plan``; after an error it has its own layers.

        Raises:
            CandidateFailed: a tensor holds a number that is not finite, or transformers keeps this
                model's layers otherwise than in a list.
            RunFailed: what is live afterwards is not what the parents were.
        """
        self.restore()
        try:
            return self._load(merge_plan, merge_plan.layers or ())
        except BaseException:
            self.clear()
            raise

    def clear(self) -> None:
        """Give the model its own layers back, and free what was copied."""
        self.restore()
        self._copies = {}

    def parts(self) -> list[tuple[torch.nn.Parameter, dict[str, tuple[Any, ...]]]]:
        """Of the stack that is loaded: what each parameter holds, as ``targets.parts_of`` says it;
        a tensor that is tied, by each of its parameters."""
        found: dict[int, tuple[torch.nn.Parameter, dict[str, tuple[Any, ...]]]] = {}
        for placed in self._placed:
            if isinstance(placed.whole, torch.nn.Parameter):
                part = placed.part
                _, parts = found.setdefault(id(placed.whole), (placed.whole, {}))
                parts[placed.name] = part.size, part.stride, part.offset
        return list(found.values())

    def restore(self) -> None:
        """Give the model its own layers back; what was copied is kept for the next stack."""
        self._placed = []
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
        made = _Filling(
            self._family, merge_plan, self._parts, self._copies, self._known, self._lent
        )
        self._copies = made.copies
        for module in _outside(self._model, own):
            made.fill(module, None, self._undo.append)
        positions = []
        for place, layer in enumerate(layers):
            positions.append(_own_modules(own[layer], layer, place))
            for module in positions[-1].modules():
                made.fill(module, place)
        self._swap(owner, name, torch.nn.ModuleList(positions))
        text = self._model.config.get_text_config(decoder=True)
        settings = {"num_hidden_layers": len(layers)}
        for key, value in (settings | followed(text.to_dict(), len(own), layers)).items():
            self._swap(text, key, value)
        self._family.verify()
        loaded = made.proof()
        self._placed = made.placed
        return loaded

    def _swap(self, owner: Any, name: str, value: Any) -> None:
        before = getattr(owner, name)
        self._undo.append(lambda: setattr(owner, name, before))
        setattr(owner, name, value)


class _Filling:
    """The tensors of one stack, as they are put into modules.

    copies: what an earlier stack has left; what this one does not need is let go first.
    """

    def __init__(
        self,
        family: Family,
        merge_plan: MergePlan,
        parts: Mapping[int, Sequence[_Part]],
        copies: Mapping[Any, _Copy],
        known: dict[tuple[str, str], str],
        lent: Callable[[list[str]], None] | None,
    ) -> None:
        self._family, self._seed = family, merge_plan.merge_seed
        self._items = merge_plan.by_name
        self._parts, self._known, self._lent = parts, known, lent
        wanted = {_made_of(item, self._seed) for item in merge_plan.tensors}
        self.copies = {key: copy for key, copy in copies.items() if wanted.issuperset(key[0])}
        self.placed: list[_Placed] = []
        self._new: dict[tuple[int, int | None], torch.Tensor] = {}
        self._lines: dict[str, str] = {}
        self._rewritten = 0

    def fill(
        self,
        module: torch.nn.Module,
        place: int | None,
        remember: Callable[[Callable[[], None]], None] = lambda undo: None,
    ) -> None:
        """Put the stack's tensors into a module (not those in it). place: the layer that it is a
        part of, or None outside. remember: takes what puts the module's own back."""
        stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for store in stores:
            for key, before in [*store.items()]:
                parts = [] if before is None else self._parts.get(home_of(before), [])
                if not parts:
                    continue
                made = self._made(before, parts, place)
                remember(partial(store.__setitem__, key, before))
                is_parameter = isinstance(before, torch.nn.Parameter)
                store[key] = torch.nn.Parameter(made, requires_grad=False) if is_parameter else made
                for part in parts:
                    self.placed.append(_Placed(_placed_name(part, place), store, key, part))

    def _made(
        self, before: torch.Tensor, parts: Sequence[_Part], place: int | None
    ) -> torch.Tensor:
        """What stands for a parameter; for one that is tied, the same for all of its names."""
        key = home_of(before), place
        if key not in self._new:
            items = [self._items[_placed_name(part, place)] for part in parts]
            whole = len(parts) == 1 and parts[0].is_whole(before)
            own = self._own(items[0], before) if whole else None
            self._new[key] = self._copy(items, parts, before) if own is None else own
        return self._new[key]

    def _own(self, item: TensorPlan, like: torch.Tensor) -> torch.Tensor | None:
        """The parent's tensor, where it is what the plan says."""
        source = _copied_from(item)
        if source is None or not self._family.keeps(*source):
            return None
        own = self._family.tensor(*source)
        if own.device != like.device or not (
            str(own.dtype) == f"torch.{item.dtype}" == str(like.dtype)
        ):
            return None
        if source not in self._known:
            self._known[source] = tensor_line("", own)
        self._lines[item.spec.name] = self._known[source]
        return own

    def _copy(
        self, items: Sequence[TensorPlan], parts: Sequence[_Part], like: torch.Tensor
    ) -> torch.Tensor:
        """One for all places that are made alike; what no part has is as in ``like``."""
        key = (tuple(_made_of(item, self._seed) for item in items), like.dtype)
        if key not in self.copies:
            home: int | None = home_of(like)
            taken = home in {copy.home for copy in self.copies.values()}
            merged = any(len(item.inputs) > 1 or item.first for item in items)
            if self._lent is None or taken or not merged:
                home, tensor = None, like.detach().clone()
            else:
                self._lent([part.name for part in parts])
                tensor = like.detach()
            for item, part in zip(items, parts, strict=True):
                self._family.merge_into(item, self._seed, part.of(tensor))
                self._rewritten += 1
            said = tuple(tensor_line("", part.of(tensor)) for part in parts)
            self.copies[key] = _Copy(tensor, said, home)
        found = self.copies[key]
        for item, line in zip(items, found.said, strict=True):
            self._lines[item.spec.name] = line
        return found.tensor

    def proof(self) -> Loaded:
        """Every tensor of the plan, as read back from where it was put."""
        if missing := self._items.keys() - {placed.name for placed in self.placed}:
            raise RunFailed(f"the stack left {len(missing)} tensors out: {sorted(missing)[:3]}")
        read: dict[Any, str] = {}  # memory that several places share is read once
        lines = {}
        for placed in self.placed:
            where = (
                placed.whole.data_ptr(),
                placed.whole.dtype,
                placed.part.size,
                placed.part.stride,
                placed.part.offset,
            )
            if where not in read:
                read[where] = tensor_line("", placed.part.of(placed.whole))
            if read[where] != self._lines[placed.name]:
                raise RunFailed(self._changed(placed.name))
            lines[placed.name] = placed.name + read[where]
        return Loaded(digest_of_lines(lines.values()), len(lines), self._rewritten)

    def _changed(self, name: str) -> str:
        source = _copied_from(self._items[name])
        was = "what was merged" if source is None else f"what {source[1]!r} of {source[0]!r} was"
        return (
            f"the live {name!r} is not {was} in memory: memory is faulty, or something else "
            "writes to it"
        )


def _made_of(item: TensorPlan, merge_seed: int | None) -> Any:
    """What two tensors have in common that are made alike."""
    made = item.effective
    numbers = tuple(own for _, _, own in made.sources)
    if made.method == LINEAR.name and not any(dict(own)["weight"] for own in numbers):
        return item.spec.shape, item.dtype  # nothing, whoever adds it
    seed = merge_seed if RECIPE_METHODS[made.method].random else None
    how = (made.method, made.base_model, numbers, made.shared, item.dtype, seed)
    return item.inputs, item.first, how


def _copied_from(item: TensorPlan) -> tuple[str, str] | None:
    """Whose tensor a plan's tensor is, bit for bit; None of one that is computed."""
    effective = item.effective
    if item.first:
        return None
    values = [dict(own) for _, _, own in effective.sources]
    if effective.method == PASSTHROUGH.name:
        return item.inputs[0] if values[0]["scale"] == 1.0 else None
    if effective.method != LINEAR.name:
        return None
    live = [
        (given, own["weight"])
        for given, own in zip(item.inputs, values, strict=True)
        if own["weight"]
    ]
    plain = len(live) == 1 and (live[0][1] == 1.0 or dict(effective.shared)["normalize"])
    return live[0][0] if plain else None


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
