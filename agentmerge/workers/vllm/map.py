"""Where a checkpoint's tensors lie inside a vLLM model, recorded from the model's own loader.

vLLM fuses and shards weights: q, k and v of a checkpoint are rows of one ``qkv_proj``, and a rank
of a tensor-parallel engine has some of them. ``record`` runs ``model.load_weights`` once on
tensors without memory, lets no copy happen, and keeps for each name which part of it goes to which
part of which parameter. With that, tensors can be written in place and read back. It knows copies
between tensors; it imports nothing of vLLM and knows no recipe.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Parameters = Mapping[str, torch.Tensor]


_WHAT_LOADERS_RAISE = (
    RuntimeError,  # NotImplementedError is one: numbers are asked of a tensor that has none
    ValueError,
    KeyError,
    AssertionError,
    AttributeError,
    TypeError,
)


class Unmappable(Exception):
    """This model's loader does more than copy parts of tensors; the message says what."""


@dataclass(frozen=True, slots=True)
class Region:
    """A part of a tensor: size and strides, and where it begins, in elements."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.as_strided(self.size, self.stride, tensor.storage_offset() + self.offset)


@dataclass(frozen=True, slots=True)
class Piece:
    """``source`` of a checkpoint's tensor goes to ``target`` of the live parameter."""

    source: Region
    parameter: str
    target: Region


@dataclass(frozen=True)
class WeightMap:
    """pieces: of every tensor of a checkpoint, by name. shapes: the checkpoint's."""

    pieces: Mapping[str, tuple[Piece, ...]]
    shapes: Mapping[str, tuple[int, ...]]

    def is_whole(self, name: str) -> bool:
        """Whether the tensor lies in one piece: a view of the live weights is the tensor."""
        return len(self.pieces[name]) == 1 and self.pieces[name][0].source.size == self.shapes[name]

    def write(self, name: str, tensor: torch.Tensor, live: Parameters) -> None:
        """Copy ``tensor`` (contiguous, of the recorded shape) into the live parameters."""
        for piece in self.pieces[name]:
            piece.target.of(live[piece.parameter]).copy_(piece.source.of(tensor))

    def parts(self, name: str, tensor: torch.Tensor) -> Iterator[torch.Tensor]:
        """What of ``tensor`` this rank holds, piece by piece."""
        return (piece.source.of(tensor) for piece in self.pieces[name])

    def live_parts(self, name: str, live: Parameters) -> Iterator[torch.Tensor]:
        """The same pieces as they are in the live parameters."""
        return (piece.target.of(live[piece.parameter]) for piece in self.pieces[name])


def record(model: Any, specs: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> WeightMap:
    """Run the loader of ``model`` on a checkpoint of these tensors without a copy being made.

    model: a vLLM model whose parameters are loaded and not packed. specs: shape and dtype of every
    tensor of a whole checkpoint. They are stood for by tensors without memory: where a copy would
    go is all that is looked at.

    Raises:
        Unmappable: a tensor that is not copied, one that is changed on the way, a parameter that
            is written twice, or one of which a part is never written.
    """
    tensors = {
        name: torch.empty(shape, dtype=dtype, device="meta")
        for name, (shape, dtype) in specs.items()
    }
    watcher = _Watcher(tensors, dict(model.named_parameters()))
    try:
        with torch.no_grad(), watcher:
            model.load_weights(iter(tensors.items()))
    except _WHAT_LOADERS_RAISE as error:
        raise Unmappable(f"its loader cannot be run again ({error})") from error
    missing = sorted(tensors.keys() - watcher.pieces.keys())
    if missing:
        raise Unmappable(f"its loader copies no part of {missing[0]!r} as it is")
    watcher.check_cover()
    pieces = {name: tuple(found) for name, found in watcher.pieces.items()}
    return WeightMap(pieces, {name: tuple(tensor.shape) for name, tensor in tensors.items()})


class _Watcher(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes copies from known tensors into known parameters instead of making them."""

    def __init__(self, tensors: Parameters, parameters: Parameters) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.pieces: dict[str, list[Piece]] = {}
        self._parameters = parameters
        # A view has its tensor's storage, and a storage without memory is told by what it is.
        self._sources = {_storage(tensor): name for name, tensor in tensors.items()}
        self._targets = _Places(parameters)
        self._padding: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            found = self._targets.of(args[0])
            if found is not None:
                self._note(*found, args[0], args[1])
                return args[0]
        elif func in (torch.ops.aten.fill_.Scalar, torch.ops.aten.zero_.default):
            found = self._targets.of(args[0])
            if found is not None:
                self._padding[found[0]] += args[0].numel()
        elif func is torch.ops.aten._to_copy.default and _storage(args[0]) in self._sources:
            wanted = (kwargs or {}).get("dtype")
            if wanted in (None, args[0].dtype):  # to another device: the same numbers
                return args[0].as_strided(args[0].size(), args[0].stride())
        return func(*args, **(kwargs or {}))

    def _note(
        self, parameter: str, offset: int, target: torch.Tensor, source: torch.Tensor
    ) -> None:
        name = self._sources.get(_storage(source))
        if name is None:
            raise Unmappable(f"its loader changes what it copies into {parameter!r}")
        if source.shape != target.shape:
            raise Unmappable(f"its loader spreads {name!r} over {parameter!r}")
        size, begin = tuple(source.shape), int(source.storage_offset())
        self.pieces.setdefault(name, []).append(
            Piece(
                Region(size, tuple(source.stride()), begin),
                parameter,
                Region(size, tuple(target.stride()), offset),
            )
        )

    def check_cover(self) -> None:
        """Every number of every parameter is written once, or filled as padding."""
        written = Counter(self._padding)
        for found in self.pieces.values():
            for piece in found:
                written[piece.parameter] += _numel(piece.target)
        for name, parameter in self._parameters.items():
            if written[name] != parameter.numel():
                raise Unmappable(
                    f"its loader writes {written[name]} of the {parameter.numel()} numbers of "
                    f"{name!r}"
                )


class _Places:
    """Which of several tensors a view belongs to, by address."""

    def __init__(self, tensors: Parameters) -> None:
        self._spans = sorted(
            (tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, name)
            for name, tensor in tensors.items()
            if tensor.numel()
        )
        self._starts = [start for start, _, _ in self._spans]

    def of(self, view: torch.Tensor) -> tuple[str, int] | None:
        """(name, offset in elements) of the tensor that ``view`` lies in."""
        place = bisect_right(self._starts, view.data_ptr()) - 1
        if place < 0 or not view.numel():
            return None
        start, end, name = self._spans[place]
        offset = view.data_ptr() - start
        return (name, offset // view.element_size()) if view.data_ptr() < end else None


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _numel(region: Region) -> int:
    return torch.Size(region.size).numel()
