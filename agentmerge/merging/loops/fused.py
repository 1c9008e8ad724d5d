"""The merge methods in one pass over memory, straight into the tensor that a merge is for.

The same formulas, precision and rules at the edges as ``kernels.py`` and ``sparse.py``, whose
results these equal; they differ in time only. What a task vector keeps is decided before the pass
(``orders.py``) or in it (hashes), so no mask is ever in memory, except where DARE rescales: there
one bit an element. For tensors in memory of the CPU; ``engines.py`` says when these serve.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from agentmerge.merging.kernels import (
    Operand,
    Operands,
    Shared,
    arc_shares,
    hash_keys,
    hash_limit,
    kept_count,
    present,
    restored,
    scaled,
)
from agentmerge.merging.loops.bodies import COUNTS, WORDS, Mask, loop_for
from agentmerge.merging.loops.lanes import WIDTH
from agentmerge.merging.loops.machine import Compiled
from agentmerge.merging.loops.orders import NOTHING, Cut, dtype_names, working_name
from agentmerge.merging.loops.remembered import Statistics
from agentmerge.merging.sparse import crumbs_window

#: As many as a pool may have. Beyond 16 some are out of the registers, which costs little beside
#: the torch path. Compiling a loop takes up to 1 s for 16 and up to 6 s for these; beyond them the
#: torch path serves.
MOST_EXPERTS = 64


@dataclass(frozen=True, slots=True)
class Whole:
    """All of a task vector is kept."""

    kind: Mask = "all"
    flips: tuple[int, ...] = ()

    def words(self, element: int, seen: Sequence[int]) -> tuple[int, ...]:
        """What a loop is given that begins at an element, when the mask's counts are these."""
        return (0,) * WORDS


@dataclass(frozen=True, slots=True)
class Window:
    """Kept is what is above one cut and not above another."""

    outer: Cut
    inner: Cut = NOTHING

    @property
    def kind(self) -> Mask:
        return "rank" if self.inner is NOTHING else "window"

    @property
    def flips(self) -> tuple[int, ...]:
        return self.outer.flips + self.inner.flips

    def words(self, element: int, seen: Sequence[int]) -> tuple[int, ...]:
        pairs = zip((self.outer, self.inner), seen, strict=True)
        return tuple(word for cut, n in pairs for word in (cut.bits, cut.kept_from(element, n)))


@dataclass(frozen=True, slots=True)
class Hashed:
    """Kept is what the keyed hash keeps."""

    first: int
    second: int
    limit: int
    kind: Mask = "hash"
    flips: tuple[int, ...] = ()

    def words(self, element: int, seen: Sequence[int]) -> tuple[int, ...]:
        return self.first, self.second, self.limit, 0


@dataclass(frozen=True, slots=True)
class Bits:
    """Kept is where a bit is set, as ``Loop.store_truth`` writes them."""

    bits: np.ndarray[tuple[int], np.dtype[np.uint8]]
    kind: Mask = "bits"
    flips: tuple[int, ...] = ()

    def words(self, element: int, seen: Sequence[int]) -> tuple[int, ...]:
        return (0,) * WORDS


AnyMask = Whole | Window | Hashed | Bits
MasksOf = Callable[[torch.Tensor, Sequence[Operand], Statistics], list[AnyMask]]


@dataclass(frozen=True, slots=True)
class Merge:
    """One tensor's merge. ``target`` is written; all are contiguous and of one size."""

    base: torch.Tensor | None
    operands: Operands
    shared: Shared
    target: torch.Tensor
    statistics: Statistics


#: A method: writes the target, and tells whether all of it is finite.
Fused = Callable[[Merge], bool]


def linear(merge: Merge) -> bool:
    live, factors = scaled(merge.operands, merge.shared)
    if factors == [1.0]:
        return _copied(merge, live[0].tensor)
    if not live:
        merge.target.zero_()
        return True
    return _weighted_sum(merge, [operand.tensor for operand in live], factors)


def slerp(merge: Merge) -> bool:
    start, end, t = present(merge.base), merge.operands[0], merge.shared["t"]
    if t in (0.0, 1.0):
        return _copied(merge, end.tensor if t else start)
    shares = arc_shares(t, merge.statistics.cosine(start, end))
    return _weighted_sum(merge, [start, end.tensor], shares)


def task_arithmetic(merge: Merge) -> bool:
    live, factors = scaled(merge.operands, merge.shared)
    return _added(merge, live, [Whole() for _ in live], factors)


def masked_sum(merge: Merge, masks_of: MasksOf) -> bool:
    live, factors = scaled(merge.operands, merge.shared)
    rows = [(o, f) for o, f in zip(live, factors, strict=True) if o.density > 0]
    live, factors = [o for o, _ in rows], [f for _, f in rows]
    if not live or not merge.shared["lambda"]:
        return _copied(merge, present(merge.base))
    masks = masks_of(present(merge.base), live, merge.statistics)
    if merge.shared["rescale"]:
        scales, masks = rescaling(merge, live, masks)
        factors = [factor * scale for factor, scale in zip(factors, scales, strict=True)]
    return _added(merge, live, masks, factors)


def consensus(merge: Merge, masks_of: MasksOf) -> bool:
    """As ``kernels.sign_consensus``."""
    base, shared = present(merge.base), merge.shared
    live = [operand for operand in merge.operands if operand.weight and operand.density > 0]
    normalize, amount = bool(shared["normalize"]), shared["lambda"]
    if not live or not amount:
        return _copied(merge, base)
    masks = masks_of(base, live, merge.statistics)
    alone = len(live) == 1 and masks[0].kind == "all"
    if alone and amount * (1.0 if normalize else live[0].weight) == 1.0:
        return _copied(merge, live[0].tensor)
    scales = [1.0 for _ in live]
    if shared["rescale"]:
        scales, masks = rescaling(merge, live, masks)
    weights = [operand.weight for operand in live]
    factors = [weight * scale for weight, scale in zip(weights, scales, strict=True)]
    cancels = normalize and min(weights) < 0 < max(weights)
    reals = [amount, *factors, *weights]
    return _masked(merge, "consensus", live, masks, reals, normalize, cancels)


def ranked(base: torch.Tensor, operands: Operands, known: Statistics) -> list[AnyMask]:
    """The largest elements, as ties keeps them."""
    count = base.numel()
    part = [operand for operand in operands if operand.density < 1]
    found = iter(known.cuts(base, part, [kept_count(o.density, count) for o in part]))
    return [Window(next(found)) if operand.density < 1 else Whole() for operand in operands]


def hashed(base: torch.Tensor, operands: Operands, known: Statistics) -> list[AnyMask]:
    """What DARE keeps."""
    return [
        Hashed(*hash_keys(operand.key), hash_limit(operand.density))
        if operand.density < 1
        else Whole()
        for operand in operands
    ]


def crumbs(base: torch.Tensor, operands: Operands, known: Statistics) -> list[AnyMask]:
    """What Model Breadcrumbs keeps."""
    part = [operand for operand in operands if operand.density < 1]
    windows = [crumbs_window(operand, base.numel()) for operand in part]
    outer = known.cuts(base, part, [window[0] for window in windows])
    inner = known.cuts(base, part, [window[1] for window in windows])
    found = iter([Window(*pair) for pair in zip(outer, inner, strict=True)])
    return [next(found) if operand.density < 1 else Whole() for operand in operands]


def _method(how: Callable[[Merge, MasksOf], bool], masks_of: MasksOf) -> Fused:
    return lambda merge: how(merge, masks_of)


#: What each method that elects signs keeps.
CONSENSUS: dict[str, MasksOf] = {
    "ties": ranked,
    "dare_ties": hashed,
    "breadcrumbs_ties": crumbs,
}
FUSED: dict[str, Fused] = {
    "linear": linear,
    "slerp": slerp,
    "task_arithmetic": task_arithmetic,
    "dare_linear": _method(masked_sum, hashed),
    "breadcrumbs": _method(masked_sum, crumbs),
    **{name: _method(consensus, masks_of) for name, masks_of in CONSENSUS.items()},
}


def _copied(merge: Merge, tensor: torch.Tensor) -> bool:
    """The target is that tensor; bit for bit, where the dtype is the same."""
    merge.target.copy_(tensor)
    return tensor.dtype == merge.target.dtype or bool(torch.isfinite(merge.target).all())


def _weighted_sum(merge: Merge, tensors: Sequence[torch.Tensor], factors: Sequence[float]) -> bool:
    target = merge.target
    stored = dtype_names(target, target, *tensors)
    loop = loop_for("weighted_sum", stored, working_name(*tensors), len(tensors))
    addresses = [target.data_ptr(), 0, *(tensor.data_ptr() for tensor in tensors)]
    _, (broken,) = loop(0, target.numel(), addresses, factors)
    return not broken


def _added(
    merge: Merge, live: Sequence[Operand], masks: Sequence[AnyMask], factors: Sequence[float]
) -> bool:
    """The base plus the masked task vectors, by their factors and lambda."""
    factors = [factor * merge.shared["lambda"] for factor in factors]
    if not any(factors):
        return _copied(merge, present(merge.base))
    if factors == [1.0] and masks[0].kind == "all":
        return _copied(merge, live[0].tensor)
    return _masked(merge, "added", live, masks, factors)


def _masked(
    merge: Merge,
    name: str,
    live: Sequence[Operand],
    masks: Sequence[AnyMask],
    reals: Sequence[float],
    *how: bool,
) -> bool:
    """Run a loop over task vectors into the target."""
    base, target = present(merge.base), merge.target
    tensors = [operand.tensor for operand in live]
    loop = loop_for(
        name,
        dtype_names(target, base, *tensors),
        working_name(base, *tensors),
        tuple(mask.kind for mask in masks),
        *how,
    )
    addresses = [target.data_ptr(), base.data_ptr(), *(tensor.data_ptr() for tensor in tensors)]
    addresses += [mask.bits.ctypes.data if isinstance(mask, Bits) else 0 for mask in masks]
    return not run(loop, target.numel(), masks, addresses, reals)[1]


def rescaling(
    merge: Merge, live: Sequence[Operand], masks: Sequence[AnyMask]
) -> tuple[list[float], list[AnyMask]]:
    """What brings each masked task vector back to its L1 norm; and the masks, decided."""
    base, count = present(merge.base), len(live)
    tensors = [operand.tensor for operand in live]
    before = [merge.statistics.norm(operand.pair) for operand in live]
    whole = None in before
    decided: list[AnyMask] = [
        Bits(np.empty(base.numel() // 8 + 64, np.uint8)) if mask.kind == "hash" else mask
        for mask in masks
    ]
    kinds = tuple(mask.kind for mask in masks)
    stored, working = dtype_names(base, base, *tensors), working_name(base, *tensors)
    loop = loop_for("norms", stored, working, kinds, whole)
    addresses = [0, base.data_ptr(), *(tensor.data_ptr() for tensor in tensors)]
    addresses += [mask.bits.ctypes.data if isinstance(mask, Bits) else 0 for mask in decided]
    sums, _ = run(loop, base.numel(), masks, addresses, sums=2 * count)
    if whole:
        before = [*sums[count:]]
        for operand, norm in zip(live, sums[count:], strict=True):
            merge.statistics.keep_norm(operand.pair, norm)
    scales = [
        1.0 if mask.kind == "all" else restored(norm or 0.0, after)
        for mask, norm, after in zip(masks, before, sums, strict=False)
    ]
    return scales, decided


def run(
    loop: Compiled,
    count: int,
    masks: Sequence[AnyMask],
    addresses: Sequence[int],
    reals: Sequence[float] = (),
    *,
    sums: int = 0,
    writes_bits: bool = False,
) -> tuple[list[float], int]:
    """Run a loop over task vectors of so many elements: its sums, and its count 0.

    It runs in stretches of memory in which no mask flips. A loop that writes bits writes those of
    ``WIDTH`` elements at once, so from a flip to the next multiple of it is a stretch of its own,
    which is too short for that. (Masks of kind hash, whose bits ``norms`` writes, never flip, and
    no method mixes them with others.)
    """
    cuts = {flip for mask in masks for flip in mask.flips}
    if writes_bits:
        cuts |= {-(-flip // WIDTH) * WIDTH for flip in cuts}
    inner = sorted(cut for cut in cuts if 0 < cut < count)
    totals, counts = np.zeros(sums), [0] * (1 + COUNTS * len(masks))
    for start, stop in pairwise([0, *inner, count]):
        words: list[int] = []
        for k, mask in enumerate(masks):
            words += mask.words(start, counts[1 + COUNTS * k :][:COUNTS])
        more, found = loop(start, stop, addresses, reals, words, sums=sums, counts=len(counts))
        totals += more[:sums]
        counts = [old + new for old, new in zip(counts, found, strict=True)]
    return totals.tolist(), counts[0]
