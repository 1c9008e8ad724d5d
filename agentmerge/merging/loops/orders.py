"""Which elements of a task vector are its k largest, for any k, without sorting again.

An ``Order`` is made once for a tensor and its base: the magnitudes are sorted, and some thousand
of them kept. For a k it brackets the k-th largest magnitude. Where that is one of those kept, all
is known; else one pass over the tensors collects the few elements in the bracket, and only those
are ranked. The answer is a ``Cut``: a threshold, and which elements that equal it are kept.

Ranks are those of ``kernels.largest_mask``: by magnitude in float32, then in float64, then the
first in memory; zeros are never kept. It knows tensors in memory of the CPU, and no methods.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from agentmerge.errors import RunFailed
from agentmerge.merging.kernels import working_dtype
from agentmerge.merging.loops.bodies import loop_for

#: Magnitudes kept of a tensor; a bracket holds one element in so many.
KEPT = 1 << 14
#: Bytes of one kept magnitude: itself, and how many elements are below and up to it.
_KEPT_BYTES = 20
#: Magnitudes that float32 does not hold, of a tensor; where there are more, all may be such.
_MOST_INEXACT = 1 << 14
_BUILD_BLOCK = 1 << 20
#: More than any number of elements, and no magnitude's bits.
EVERY = 0xFFFF_FFFF

Places = npt.NDArray[np.int64]
Sizes = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Cut:
    """Kept is what is larger than a magnitude, and some of what equals it.

    bits: of the magnitude, in float32. first: so many equal ones are kept, the first in memory.
    flips: elements from which on equal ones are no longer kept, are kept again, and so on.
    """

    bits: int
    first: int = EVERY
    flips: tuple[int, ...] = ()

    def kept_from(self, element: int, seen: int) -> int:
        """How many equal ones are kept from this element to the next flip, after so many."""
        return 0 if bisect_right(self.flips, element) % 2 else max(0, self.first - seen)


#: No magnitude has these bits.
NOTHING = Cut(EVERY)
_NO_BITS = (EVERY, 0)


@dataclass(frozen=True, slots=True)
class Bracket:
    """Elements with bits ``low`` to ``high``, ``count`` of them, of which the ``keep`` largest."""

    low: int
    high: int
    count: int
    keep: int


@dataclass
class Order:
    """Magnitudes of a task vector, ascending and distinct, with how many are below and up to each.

    bits: of the magnitudes, in float32.
    inexact: bits of the magnitudes of which float32 does not hold every element's exactly; None
        where those are too many.
    """

    count: int
    bits: npt.NDArray[np.uint32]
    below: Places
    upto: Places
    inexact: npt.NDArray[np.uint32] | None

    @classmethod
    def of(cls, base: torch.Tensor, tensor: torch.Tensor) -> Order:
        """Takes 4 bytes an element while it works."""
        sizes = np.empty(tensor.numel(), np.float32)
        ground, flat, view = base.reshape(-1), tensor.reshape(-1), torch.from_numpy(sizes)
        for start in range(0, len(sizes), _BUILD_BLOCK):
            block = slice(start, start + _BUILD_BLOCK)
            torch.sub(flat[block].float(), ground[block].float(), out=view[block]).abs_()
        sizes.sort()
        step = max(1, -(-len(sizes) // KEPT))
        values = np.unique(np.append(sizes[::step], sizes[-1:]))
        return cls(
            len(sizes),
            values.view(np.uint32),
            np.searchsorted(sizes, values, "left"),
            np.searchsorted(sizes, values, "right"),
            _inexact(base, tensor),
        )

    def _is_exact(self, bits: int) -> bool:
        """Whether elements whose magnitude has these bits are surely equal, in float64 too."""
        return self.inexact is not None and not np.any(self.inexact == bits)

    @property
    def size_bytes(self) -> int:
        noted = 0 if self.inexact is None else self.inexact.nbytes
        return self.bits.nbytes + self.below.nbytes + self.upto.nbytes + noted

    def bracket(self, keep: int) -> Cut | Bracket:
        """Where the ``keep``-th largest magnitude is; a Cut where that is known already."""
        if keep <= 0:
            return NOTHING
        place = self.count - min(keep, self.count)  # of the smallest kept, in ascending order
        at = int(self.below.searchsorted(place, "right")) - 1
        bits, below, upto = int(self.bits[at]), int(self.below[at]), int(self.upto[at])
        if place >= upto:
            above, until = int(self.bits[at + 1]), int(self.below[at + 1])
            return Bracket(bits + 1, above - 1, until - upto, until - place)
        if bits == 0:
            return Cut(0, 0)
        if place == below:
            return Cut(bits)
        if self._is_exact(bits):
            return Cut(bits, upto - place)
        return Bracket(bits, bits, upto - below, upto - place)


def order_bytes(elements: int) -> int:
    """The most that the order of a tensor of so many elements takes for as long as it is kept."""
    return _KEPT_BYTES * min(elements, KEPT + 1) + 4 * min(elements, _MOST_INEXACT)


def cuts(
    base: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    orders: Sequence[Order],
    keeps: Sequence[int],
) -> list[Cut]:
    """For each tensor, the cut that keeps its so many largest elements."""
    found = [order.bracket(keep) for order, keep in zip(orders, keeps, strict=True)]
    settled = [cut for cut in found if isinstance(cut, Cut)]
    if len(settled) == len(found):
        return settled
    return [
        cut if isinstance(cut, Cut) else _ranked(noted, cut.keep)
        for cut, noted in zip(found, _noted(base, tensors, found), strict=True)
    ]


def _noted(
    base: torch.Tensor, tensors: Sequence[torch.Tensor], brackets: Sequence[Cut | Bracket]
) -> list[_Notes]:
    """The elements in each tensor's bracket; one pass for all.

    It takes the settled ones along, so that one loop serves, compiled once.
    """
    notes: list[_Notes] = []
    words: list[int] = []
    for bracket in brackets:
        inside, count = _NO_BITS, 0
        if isinstance(bracket, Bracket):
            inside, count = (bracket.low, bracket.high - bracket.low), bracket.count
        notes.append(_Notes.room(count))
        words += (*inside, count)
    stored, working = dtype_names(base, base, *tensors), working_name(base, *tensors)
    loop = loop_for("between", stored, working, len(tensors))
    addresses = [0, base.data_ptr(), *(tensor.data_ptr() for tensor in tensors)]
    addresses += [address for note in notes for address in note.addresses]
    _, found = loop(0, base.numel(), addresses, words=words, counts=len(tensors))
    return [note.filled(count) for note, count in zip(notes, found, strict=True)]


@dataclass(frozen=True, slots=True)
class _Notes:
    """What the loop ``between`` notes of one tensor's elements, in memory order."""

    places: Places
    sizes: Sizes
    exact: Sizes

    @classmethod
    def room(cls, elements: int) -> _Notes:
        size = elements + 1
        return cls(np.empty(size, np.int64), np.empty(size), np.empty(size))

    @property
    def addresses(self) -> list[int]:
        return [column.ctypes.data for column in (self.places, self.sizes, self.exact)]

    def filled(self, count: int) -> _Notes:
        """Raises RunFailed where as many were not found as there is room for."""
        if count != len(self.places) - 1:
            raise RunFailed(
                "a parent's tensor is not the one whose magnitudes were ranked: its file was "
                "overwritten while merges were read from it; put the old file back and resume"
            )
        return _Notes(self.places[:count], self.sizes[:count], self.exact[:count])


def _ranked(noted: _Notes, keep: int) -> Cut:
    """The cut after the ``keep`` largest of some elements, all others being larger or smaller."""
    places, sizes, exact = noted.places, noted.sizes, noted.exact
    # Elements that are equal in float64 are equal in float32: what it cannot hold is far below.
    threshold = sizes[0]
    if sizes.min() != sizes.max():
        ranking = np.argsort(-exact, kind="stable")
        threshold = sizes[ranking[keep - 1]]
    bits = int(threshold.astype(np.float32).view(np.uint32))
    equal = np.flatnonzero(sizes == threshold)
    left = keep - np.count_nonzero(sizes > threshold)
    if left == len(equal):
        return Cut(bits)
    tied = exact[equal]
    if tied.min() == tied.max():
        return Cut(bits, int(left))
    kept = np.zeros(len(equal), bool)
    kept[np.argsort(-tied, kind="stable")[:left]] = True
    changes = np.flatnonzero(np.diff(kept, prepend=True))
    return Cut(bits, flips=tuple(places[equal[changes]].tolist()))


def _inexact(base: torch.Tensor, tensor: torch.Tensor) -> npt.NDArray[np.uint32] | None:
    stored, working = dtype_names(base, base, tensor), working_name(base, tensor)
    addresses = [0, base.data_ptr(), tensor.data_ptr()]
    _, (count,) = loop_for("inexact", stored, working, False)(0, base.numel(), addresses)
    if count > _MOST_INEXACT:
        return None
    noted = _Notes.room(count)
    collect = loop_for("inexact", stored, working, True)
    _, (found,) = collect(0, base.numel(), addresses + noted.addresses, words=[count])
    return np.unique(noted.filled(found).sizes.astype(np.float32)).view(np.uint32)


def dtype_names(*tensors: torch.Tensor) -> tuple[str, ...]:
    return tuple(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)


def working_name(*tensors: torch.Tensor) -> str:
    return str(working_dtype(tensors)).removeprefix("torch.")
