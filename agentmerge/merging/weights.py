"""Where a family's weights are while it merges: in their files, or in memory.

``ParentFiles`` maps one tensor at a time; ``Resident`` holds those of the parents that it is told
to keep. Both give the same bits.
It knows files, devices and tensors; it knows no recipe, no method, and not which of the two fits.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from agentmerge.errors import ParentError, RunFailed
from agentmerge.merging.scratch import size_bytes, slabs
from agentmerge.parents.headers import (
    TensorHeader,
    content_fingerprint,
    read_headers,
    safetensors_files,
    stamp_of,
)
from agentmerge.parents.layout import Layout
from agentmerge.parents.low_rank import Adaptation, Factors, adaptation_of


class TensorSource(Protocol):
    """Where a merge reads its parents from.

    ``identities`` maps each model's name to its content fingerprint.
    """

    @property
    def identities(self) -> Mapping[str, str]: ...

    def tensor(self, model: str, name: str) -> torch.Tensor:
        """A parent's tensor, as stored; the caller must not change it."""
        ...


class ParentSource(TensorSource, Protocol):
    """A source that knows whether it was changed."""

    def verify(self) -> None:
        """Raises RunFailed where what was read may not be what ``identities`` are of."""
        ...


class FamilySource(ParentSource, Protocol):
    """A source that a family is made of."""

    @property
    def size_bytes(self) -> int:
        """What is in memory of the parents."""
        ...

    def keep(self, models: Collection[str]) -> None:
        """These are merged next: what is in memory of others goes.

        Raises:
            RunFailed: a file was removed or changed.
        """
        ...

    def keeps(self, model: str, name: str) -> bool:
        """Whether ``tensor`` gives the same memory until the next ``keep``."""
        ...


class ParentFiles:
    """Parents read tensor by tensor from their files.

    A tensor is a mapping of its own bytes and nothing else, gone with the tensor: pages that are in
    the system's cache are not copied, several processes share them, and no more address space is
    taken than what is in use. Every read makes sure that the file is still the one that was
    identified.

    Raises:
        ParentError: a model cannot be read.
    """

    def __init__(self, paths: Mapping[str, Path], device: str = "cpu") -> None:
        self.device = device
        # Before the contents are looked at: a change after this line is noticed.
        self._stamps = {
            file: stamp_of(file.stat())
            for path in paths.values()
            for file in safetensors_files(path)
        }
        self.identities = {name: content_fingerprint(path) for name, path in paths.items()}
        self._headers = {name: read_headers(path) for name, path in paths.items()}

    def tensor(self, model: str, name: str) -> torch.Tensor:
        """As stored, on ``device``.

        Raises:
            RunFailed: the file is gone, or is another one than when this was opened.
        """
        return self._mapped(self._headers[model][name]).to(self.device)

    @property
    def size_bytes(self) -> int:
        return 0

    def keep(self, models: Collection[str]) -> None:
        """Nothing of any model is in memory."""

    def keeps(self, model: str, name: str) -> bool:
        return False

    def verify(self) -> None:
        """Raises RunFailed where a file was removed or changed since this was opened."""
        for file, stamp in self._stamps.items():
            try:
                found = stamp_of(file.stat())
            except OSError as error:
                raise _gone(file, error) from None
            if found != stamp:
                raise _changed(file)

    def _mapped(self, header: TensorHeader) -> torch.Tensor:
        dtype = getattr(torch, header.dtype)
        size_bytes = header.end - header.start
        try:
            descriptor = os.open(header.file, os.O_RDONLY)
        except OSError as error:
            raise _gone(header.file, error) from None
        try:
            if stamp_of(os.fstat(descriptor)) != self._stamps[header.file]:
                raise _changed(header.file)
            if not size_bytes:
                return torch.empty(header.shape, dtype=dtype)
            lead = header.start % mmap.ALLOCATIONGRANULARITY
            # Copy on write: whatever is done to the tensor, the file stays as it is.
            view = mmap.mmap(
                descriptor,
                lead + size_bytes,
                access=mmap.ACCESS_COPY,
                offset=header.start - lead,
            )
        finally:
            os.close(descriptor)
        raw = torch.frombuffer(view, dtype=torch.uint8, offset=lead, count=size_bytes)
        if header.start % dtype.itemsize:
            raw = raw.clone()  # an old file, whose tensors are not aligned
        return raw.view(dtype).reshape(header.shape)


@dataclass(frozen=True, slots=True)
class Upon:
    """A parent that is another model with an adapter: its name in the source, and the factors."""

    model: str
    factors: Mapping[str, Factors]


@dataclass(frozen=True, slots=True)
class _LowRank:
    """A tensor that is made whenever it is asked for. ground: in the memory of the model that it
    is added to."""

    ground: torch.Tensor
    factors: Factors


class Resident:
    """Every tensor of a layout of the parents that are kept, copied out of ``source``; the others'
    are given out of ``source`` as they are.

    Of one that is another model with an adapter, that model is kept once for all of its adapters,
    and of it only what differs: factors, where they take less than half and give, here and on this
    device, the very bits that the source has.

    What happens later to files that ``source`` reads changes nothing where all models are kept;
    where some are, a file that was changed ends the merge.

    device: where tensors are given. home: where they are kept, ``device`` or "cpu"; from there they
        are copied over one by one, out of page-locked memory where the system has enough of it.
    models: those that are kept at first; by default all. upon: which are other models with
        adapters.
    """

    def __init__(
        self,
        source: ParentSource,
        layout: Layout,
        *,
        device: str = "cpu",
        home: str = "cpu",
        models: Collection[str] | None = None,
        upon: Mapping[str, Upon] | None = None,
    ) -> None:
        self.identities = dict(source.identities)
        self._source, self._layout, self._device, self._home = source, layout, device, home
        self._is_at_home = torch.device(home).type == torch.device(device).type
        self._upon = upon or {}
        self._weights: dict[str, dict[str, torch.Tensor | _LowRank]] = {}
        self.keep(layout.parents if models is None else models)

    @property
    def size_bytes(self) -> int:
        held = [tensor for weights in self._weights.values() for tensor in weights.values()]
        whole = {t.data_ptr(): t.nbytes for t in held if isinstance(t, torch.Tensor)}
        made = sum(t.factors.size_bytes for t in held if isinstance(t, _LowRank))
        return sum(whole.values()) + made

    def keep(self, models: Collection[str]) -> None:
        grounds = [self._upon[model].model for model in models if model in self._upon]
        wanted = dict.fromkeys((*grounds, *models))  # what others are upon comes first
        kept = {name: held for name, held in self._weights.items() if name in wanted}
        self._weights = dict(kept)
        for model in wanted:
            if model not in kept:
                kept[model] = self._taken(model, kept)
        if len(kept) > len(self._weights):
            self._source.verify()
        self._weights = kept

    def _taken(
        self, model: str, kept: Mapping[str, Mapping[str, torch.Tensor | _LowRank]]
    ) -> dict[str, torch.Tensor | _LowRank]:
        upon = self._upon.get(model)
        if upon is None:
            take = _kept if self._is_at_home else _kept_in_slabs
            return {**take(self._source, model, self._layout, self._home)}
        names = [spec.name for spec in self._layout.tensors]
        return {
            name: self._differing(
                self._source.tensor(model, name), kept[upon.model][name], upon.factors.get(name)
            )
            for name in names
        }

    def _differing(
        self, stored: torch.Tensor, ground: torch.Tensor | _LowRank, factors: Factors | None
    ) -> torch.Tensor | _LowRank:
        """What is kept of a tensor of a model with an adapter."""
        if isinstance(ground, torch.Tensor) and ground.shape == stored.shape:
            if factors is None and _same_bits(ground, stored.to(self._home)):
                return ground
            if factors is not None and 2 * factors.size_bytes < stored.nbytes:
                low = _LowRank(ground, factors.to(self._home))
                if _same_bits(self._made(low), stored.to(self._device)):
                    return low
        return stored.to(self._home, copy=True)

    def _made(self, low: _LowRank) -> torch.Tensor:
        return low.factors.to(self._device).added_to(low.ground.to(self._device))

    def keeps(self, model: str, name: str) -> bool:
        held = self._weights.get(model, {}).get(name)
        return self._is_at_home and isinstance(held, torch.Tensor)

    def tensor(self, model: str, name: str) -> torch.Tensor:
        if model not in self._weights:
            return self._source.tensor(model, name).to(self._device)
        held = self._weights[model][name]
        if isinstance(held, _LowRank):
            return self._made(held)
        return held.to(self._device, non_blocking=True)

    def verify(self) -> None:
        """A file that is read whole is looked at then; one of a parent that is not kept may have
        been changed since."""
        if not self._weights.keys() >= set(self._layout.parents):
            self._source.verify()


def upon_models(paths: Mapping[str, Path]) -> tuple[dict[str, Upon], dict[str, Path]]:
    """Which parents are other models with adapters, and the folders of such models as are no
    parents themselves, by names that no parent has.

    Raises:
        ParentError: a model cannot be read.
    """
    names = {content_fingerprint(path): name for name, path in paths.items()}
    upon: dict[str, Upon] = {}
    more: dict[str, Path] = {}
    for name, path in paths.items():
        found = adaptation_of(path)
        if found is None:
            continue
        model = names.get(found.identity)
        if model is None and _is_still(found):
            model = names[found.identity] = f"{found.model}\n"
            more[model] = found.model
        if model is not None:
            upon[name] = Upon(model, found.factors)
    # A model that is itself held as an adapter is no ground for another.
    return {name: own for name, own in upon.items() if own.model not in upon}, more


def _is_still(found: Adaptation) -> bool:
    try:
        return content_fingerprint(found.model) == found.identity
    except ParentError:
        return False


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype:
        return False
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return torch.equal(one.contiguous().view(words), other.contiguous().view(words))


def _kept(source: TensorSource, model: str, layout: Layout, home: str) -> dict[str, torch.Tensor]:
    return {
        spec.name: source.tensor(model, spec.name).to(home, copy=True) for spec in layout.tensors
    }


def _kept_in_slabs(
    source: TensorSource, model: str, layout: Layout, home: str
) -> dict[str, torch.Tensor]:
    """In page-locked memory, from which a device copies by itself and twice as fast."""
    places, sizes = slabs([size_bytes(spec) for spec in layout.tensors])
    memory = [_page_locked(size) for size in sizes]
    kept = {}
    for spec, (slab, start) in zip(layout.tensors, places, strict=True):
        tensor = source.tensor(model, spec.name)
        room = memory[slab][start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        kept[spec.name] = room.copy_(tensor)
    return kept


def _page_locked(size: int) -> torch.Tensor:
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    except RuntimeError:  # more than the system lets a process lock: slower, not wrong
        return torch.empty(size, dtype=torch.uint8)


def _gone(file: Path, error: OSError) -> RunFailed:
    return RunFailed(
        f"{file} was there when the search began and cannot be read now: {error.strerror}; put it "
        "back and resume"
    )


def _changed(file: Path) -> RunFailed:
    return RunFailed(
        f"{file} was changed while merges were read from it, so they are not of the parents that "
        "the search began with; put the old file back and resume"
    )
