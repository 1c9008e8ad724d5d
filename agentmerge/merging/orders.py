"""Which elements of a task vector are its k largest, for any k, without sorting again.

An ``Order`` is made once for a tensor and its base: the magnitudes are sorted, and some thousand
of them kept. For a k it brackets the k-th largest magnitude; one pass over the tensors collects the
few elements in the bracket, and only those are ranked. The answer is a ``Cut``: a threshold, and
where in memory elements that equal it are kept.

Ranks are those of ``kernels.largest_mask``: by magnitude in float32, then in float64, then the
first in memory; zeros are never kept. It knows tensors in memory of the CPU, and no methods.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from agentmerge.merging.kernels import working_dtype
from agentmerge.merging.loops import loop_for

#: Magnitudes kept of a tensor; a bracket holds one element in so many.
KEPT = 1 << 14
#: Bytes of one kept magnitude: itself, and how many elements are below and up to it.
_KEPT_BYTES = 20
#: Equal magnitudes that are ranked at once; more of them are counted first.
_FEW = 1 << 14
_CHUNK = 1 << 18
_BUILD_BLOCK = 1 << 20

Places = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Cut:
    """Kept is what is larger than a magnitude, and of what equals it, some stretches of memory.

    bits: of the magnitude, in float32. flips: elements from which on equal ones are no longer
        kept, are kept again, and so on; from element 0 on they are.
    """

    bits: int
    flips: tuple[int, ...] = ()

    def bits_from(self, element: int) -> int:
        """The least bits that are kept from this element to the next flip."""
        return self.bits + bisect_right(self.flips, element) % 2


#: No magnitude has these bits.
NOTHING = Cut(0xFFFF_FFFF)
_NOT_ZERO = Cut(1)


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

    exact: of magnitudes that many elements share, whether float32 holds all of them exactly.
    """

    count: int
    values: npt.NDArray[np.float32]
    below: Places
    upto: Places
    exact: dict[int, bool] = field(default_factory=dict)

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
            values,
            np.searchsorted(sizes, values, "left"),
            np.searchsorted(sizes, values, "right"),
        )

    @property
    def size_bytes(self) -> int:
        return self.values.nbytes + self.below.nbytes + self.upto.nbytes

    def bracket(self, keep: int) -> Cut | Bracket:
        """Where the ``keep``-th largest magnitude is; a Cut where that is known already."""
        if keep <= 0:
            return NOTHING
        place = self.count - min(keep, self.count)  # of the smallest kept, in ascending order
        at = int(np.searchsorted(self.below, place, "right")) - 1
        bits = int(self.values[at : at + 1].view(np.uint32)[0])
        if place >= self.upto[at]:
            above = int(self.values[at + 1 : at + 2].view(np.uint32)[0])
            inside = int(self.below[at + 1] - self.upto[at])
            return Bracket(bits + 1, above - 1, inside, int(self.below[at + 1]) - place)
        if bits == 0:
            return _NOT_ZERO
        if place == self.below[at]:
            return Cut(bits)
        equal = int(self.upto[at] - self.below[at])
        return Bracket(bits, bits, equal, int(self.upto[at]) - place)


def order_bytes(elements: int) -> int:
    """The most that the order of a tensor of so many elements takes for as long as it is kept."""
    return _KEPT_BYTES * min(elements, KEPT + 1)


def cuts(
    base: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    orders: Sequence[Order],
    keeps: Sequence[int],
) -> list[Cut]:
    """For each tensor, the cut that keeps its so many largest elements."""
    found = [order.bracket(keep) for order, keep in zip(orders, keeps, strict=True)]
    for at, bracket in enumerate(found):
        if isinstance(bracket, Bracket) and bracket.low == bracket.high and bracket.count > _FEW:
            found[at] = _first_in_memory(base, tensors[at], orders[at], bracket)
    open_ = {at: bracket for at, bracket in enumerate(found) if isinstance(bracket, Bracket)}
    inside = _collected(base, [tensors[at] for at in open_], list(open_.values()))
    for (at, bracket), places in zip(open_.items(), inside, strict=True):
        found[at] = _ranked(base, tensors[at], places, bracket.keep)
    return [cut for cut in found if isinstance(cut, Cut)]


def _collected(
    base: torch.Tensor, tensors: Sequence[torch.Tensor], brackets: Sequence[Bracket]
) -> list[Places]:
    """The elements in each tensor's bracket, in memory order; one pass over all of them."""
    if not brackets:
        return []
    lists = [np.empty(bracket.count + 1, np.int64) for bracket in brackets]
    words = [word for b in brackets for word in (b.low, b.high - b.low)]
    loop = loop_for(
        "between", dtype_names(base, base, *tensors), working_name(base, *tensors), len(lists)
    )
    addresses = [0, base.data_ptr(), *(tensor.data_ptr() for tensor in tensors)]
    addresses += [list_.ctypes.data for list_ in lists]
    loop(0, base.numel(), addresses, words=words, counts=len(lists))
    return [list_[:-1] for list_ in lists]


def _ranked(base: torch.Tensor, tensor: torch.Tensor, places: Places, keep: int) -> Cut:
    """The cut after the ``keep`` largest of some elements, all others being larger or smaller."""
    at = torch.from_numpy(places)
    value, origin = tensor.reshape(-1)[at], base.reshape(-1)[at]
    size = (value.float() - origin.float()).abs().numpy()
    exact = (value.double() - origin.double()).abs().numpy()
    ranking = np.lexsort((places, -exact, -size))
    threshold = size[ranking[keep - 1]]
    equal = size == threshold
    kept = np.zeros(len(places), bool)
    kept[ranking[:keep]] = True
    return Cut(int(threshold.view(np.uint32)), _flips(places[equal], kept[equal]))


def _flips(places: Places, kept: npt.NDArray[np.bool_]) -> tuple[int, ...]:
    changes = np.flatnonzero(np.diff(kept, prepend=True))
    return tuple(int(place) for place in places[changes])


def _first_in_memory(
    base: torch.Tensor, tensor: torch.Tensor, order: Order, bracket: Bracket
) -> Cut | Bracket:
    """The cut among many elements of one magnitude; the bracket where float64 tells them apart."""
    loop = loop_for("equal_magnitudes", dtype_names(base, base, tensor), working_name(base, tensor))
    addresses = [0, base.data_ptr(), tensor.data_ptr()]
    total, words = base.numel(), [bracket.low]
    if bracket.low not in order.exact:
        _, (_, inexact) = loop(0, total, addresses, words=words, counts=2)
        order.exact[bracket.low] = not inexact
    if not order.exact[bracket.low]:
        return bracket
    left = bracket.keep
    for start in range(0, total, _CHUNK):
        stop = min(start + _CHUNK, total)
        _, (equal, _) = loop(start, stop, addresses, words=words, counts=2)
        if equal >= left:
            break
        left -= equal
    flat = [t.reshape(-1)[start:stop] for t in (base, tensor)]
    (places,) = _collected(flat[0], flat[1:], [Bracket(bracket.low, bracket.low, equal, left)])
    return Cut(bracket.low, (start + int(places[left - 1]) + 1,))


def dtype_names(*tensors: torch.Tensor) -> tuple[str, ...]:
    return tuple(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)


def working_name(*tensors: torch.Tensor) -> str:
    return str(working_dtype(tensors)).removeprefix("torch.")
