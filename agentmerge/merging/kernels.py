"""The merge methods, as pure functions on one tensor: the readable ones, which faster ones equal.

A kernel takes the base's tensor (None for linear), the other sources as ``Operand``s, the shared
parameters, and the dtype of the result. It knows no names, files or recipes, and changes no input.

Formulas are mergekit 0.1.5's. What differs is precision: values are taken as stored, computed one
width wider (float16 and bfloat16 in float32, float32 in float64) and rounded once, so a result is
at least as near to the formula's exact value as mergekit's, which rounds after every operation.

Rules at the edges; no finite input makes a kernel raise:
    end points: where the formula leaves one source at factor 1 (one weight that is not zero, at
        density 1, times lambda; slerp at t 0 or 1), the result is that source bit for bit;
    nothing added: all weights zero, all densities zero, or lambda zero give the base bit for bit
        (linear has no base: zeros);
    density: 1 or more keeps everything and rescales nothing; 0 or less keeps nothing; in ties any
        other keeps int(density * elements) elements, and at least one; among equal magnitudes the
        first ones in memory; dare_ties keeps what the mask says, which may be nothing;
    rescale: kept values are multiplied so that their L1 norm is what it was before, unless
        either norm is below 1e-7;
    normalize: ties and dare_ties divide each element by the sum of the weights that agree with its
        sign; linear and task_arithmetic by the sum of all. A sum that cancels (at most 1e-6 of the
        sum of absolute weights) is not divided by;
    slerp: vectors shorter than 1e-8 count as they are, without being brought to length one; an
        absolute cosine above 0.9995 is interpolated linearly.

The random mask of DARE keeps element ``i`` (row-major in the whole stored tensor) where
``h(i) / 2**32 < density``. With k0, k1 the first two little-endian 32-bit words of
SHA-256("{key}\\n{i >> 32}") and all arithmetic modulo 2**32:
    h = (i + k0);  h ^= h >> 16;  h *= 0x21f0aaad;  h ^= k1;
    h ^= h >> 15;  h *= 0x735a2d97;  h ^= h >> 15
(the "lowbias32" hash of C. Wellons' hash prospector, with a second key). So a mask depends on
the key alone, grows with density without losing an element, and is the same on every device.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from agentmerge.recipe import CANCEL_SHARE

#: Elements worked on at a time in the host's memory: few enough that the wide intermediates stay
#: in the cache.
BLOCK = 1 << 16
#: The same on a device, where each operation is a launch of some microseconds: so many that moving
#: them takes ten times as long, and few enough that the intermediates take a gigabyte at most.
DEVICE_BLOCK = 1 << 24
#: Bits of a magnitude that one pass over a device's tensor decides.
_DIGIT = 11
_MOST = 2**63 - 1

_NORM_FLOOR = 1e-7
_SLERP_LINEAR_COSINE = 0.9995
_SLERP_SHORT = 1e-8


@dataclass(frozen=True, slots=True)
class Operand:
    """A source that is not the base, and its own parameters; ``key`` seeds its random mask.

    pair: names the tensor and the base's, for what may be remembered of the two; "" for nothing.
    values: all that it has, by name, where the method is not ours (``foreign.py``).
    """

    tensor: torch.Tensor
    weight: float = 0.0
    density: float = 1.0
    key: str = ""
    gamma: float = 0.0
    epsilon: float = 0.0
    pair: str = ""
    scale: float = 1.0
    values: tuple[tuple[str, float], ...] = ()


Operands = Sequence[Operand]
#: The parameters of the whole merge, by name.
Shared = Mapping[str, float]


class Kernel(Protocol):
    """One merge method on one tensor; returns a fresh tensor of dtype ``out``."""

    def __call__(
        self, base: torch.Tensor | None, operands: Operands, shared: Shared, out: torch.dtype
    ) -> torch.Tensor: ...


def linear(
    base: torch.Tensor | None, operands: Operands, shared: Shared, out: torch.dtype
) -> torch.Tensor:
    """The weighted sum; with ``normalize``, the weighted mean."""
    live, factors = scaled(operands, shared)
    if factors == [1.0]:
        return copied(live[0].tensor, out)
    if not live:
        return empty_as(operands[0].tensor, out).zero_()
    result = empty_as(live[0].tensor, out)
    working = working_dtype([operand.tensor for operand in live])
    flat = [operand.tensor.reshape(-1) for operand in live]
    for block in blocks(result.numel(), result.device):
        total = flat[0][block].to(working, copy=True).mul_(factors[0])
        for tensor, factor in zip(flat[1:], factors[1:], strict=True):
            total.add_(tensor[block], alpha=factor)
        result.view(-1)[block] = total
    return result


def slerp(
    base: torch.Tensor | None, operands: Operands, shared: Shared, out: torch.dtype
) -> torch.Tensor:
    """From the base at t 0 to the one operand at t 1 along the arc between their directions."""
    start, end, t = present(base), operands[0].tensor, shared["t"]
    if t in (0.0, 1.0):
        return copied(end if t else start, out)
    a, b = start.reshape(-1), end.reshape(-1)
    to_a, to_b = arc_shares(t, cosine(a, b))
    result, working = empty_as(start, out), working_dtype([start, end])
    for block in blocks(result.numel(), result.device):
        total = a[block].to(working, copy=True).mul_(to_a)
        result.view(-1)[block] = total.add_(b[block], alpha=to_b)
    return result


def task_arithmetic(
    base: torch.Tensor | None, operands: Operands, shared: Shared, out: torch.dtype
) -> torch.Tensor:
    """The base plus the weighted sum of the task vectors (operand minus base)."""
    base = present(base)
    live, factors = scaled(operands, shared)
    factors = [factor * shared["lambda"] for factor in factors]
    if factors == [1.0]:
        return copied(live[0].tensor, out)
    if not any(factors):
        return copied(base, out)
    result = empty_as(base, out)
    working = working_dtype([base, *(operand.tensor for operand in live)])
    ground, flat = base.reshape(-1), [operand.tensor.reshape(-1) for operand in live]
    for block in blocks(result.numel(), result.device):
        origin = ground[block].to(working)
        total = torch.zeros_like(origin)
        for tensor, factor in zip(flat, factors, strict=True):
            total.add_(tensor[block].to(working).sub(origin), alpha=factor)
        result.view(-1)[block] = total.add_(origin)
    return result


def ties(
    base: torch.Tensor | None, operands: Operands, shared: Shared, out: torch.dtype
) -> torch.Tensor:
    """Task vectors trimmed to their largest elements, then summed where they agree in sign."""
    base = present(base)
    masks = [magnitude_mask(base, operand.tensor, operand.density) for operand in operands]
    return sign_consensus(base, operands, masks, shared, out)


def dare_ties(
    base: torch.Tensor | None, operands: Operands, shared: Shared, out: torch.dtype
) -> torch.Tensor:
    """Task vectors with elements dropped at random, then summed where they agree in sign."""
    base = present(base)
    masks = [
        random_mask(operand.key, base.numel(), operand.density, base.device) for operand in operands
    ]
    return sign_consensus(base, operands, masks, shared, out)


def passthrough(
    base: torch.Tensor | None,
    operands: Sequence[Operand],
    shared: Mapping[str, float],
    out: torch.dtype,
) -> torch.Tensor:
    """The one source, times its scale: in float32 (float64 where it is stored so), as torch's own
    product is, so that mergekit's has the same bits."""
    tensor, scale = operands[0].tensor, operands[0].scale
    if scale == 1.0:
        return copied(tensor, out)
    result, flat = empty_as(tensor, out), tensor.reshape(-1)
    working = torch.promote_types(tensor.dtype, torch.float32)
    for block in blocks(result.numel(), result.device):
        result.view(-1)[block] = flat[block].to(working, copy=True).mul_(scale)
    return result


KERNELS: dict[str, Kernel] = {
    "passthrough": passthrough,
    "linear": linear,
    "slerp": slerp,
    "task_arithmetic": task_arithmetic,
    "ties": ties,
    "dare_ties": dare_ties,
}


def sign_consensus(
    base: torch.Tensor,
    operands: Operands,
    masks: Sequence[torch.Tensor | None],
    shared: Shared,
    out: torch.dtype,
) -> torch.Tensor:
    """The base plus the masked, weighted task vectors, each element from those of its sign.

    masks: one flat boolean tensor an operand, None where all of it is kept. The sign of an element
    is that of the weighted sum (zero counts as positive).
    """
    pairs = [
        (operand, mask)
        for operand, mask in zip(operands, masks, strict=True)
        if operand.weight and operand.density > 0
    ]
    normalize, amount = bool(shared["normalize"]), shared["lambda"]
    if not pairs or not amount:
        return copied(base, out)
    if len(pairs) == 1 and pairs[0][1] is None:
        factor = amount * (1.0 if normalize else pairs[0][0].weight)
        if factor == 1.0:
            return copied(pairs[0][0].tensor, out)
    result = empty_as(base, out)
    working = working_dtype([base, *(operand.tensor for operand, _ in pairs)])
    ground, flat = base.reshape(-1), [operand.tensor.reshape(-1) for operand, _ in pairs]
    factors = [operand.weight for operand, _ in pairs]
    if shared["rescale"]:
        scales = rescalings(ground, flat, [mask for _, mask in pairs], working)
        factors = [factor * scale for factor, scale in zip(factors, scales, strict=True)]
    weights = torch.tensor(
        [[operand.weight] for operand, _ in pairs], dtype=working, device=base.device
    )
    for block in blocks(result.numel(), result.device):
        origin = ground[block].to(working)
        deltas = origin.new_empty((len(pairs), origin.numel()))
        for row, tensor, (_, mask), factor in zip(deltas, flat, pairs, factors, strict=True):
            torch.sub(tensor[block].to(working), origin, out=row).mul_(factor)
            if mask is not None:
                row.masked_fill_(~mask[block], 0)
        sign = torch.where(summed(deltas) >= 0, 1.0, -1.0).to(working)
        deltas.mul_(sign)  # now an element agrees where it is positive
        total = summed(deltas.clamp(min=0)).mul_(sign)
        if normalize:
            total.div_(divisor(weights * (deltas > 0)))
        result.view(-1)[block] = total.mul_(amount).add_(origin)
    return result


def magnitude_mask(base: torch.Tensor, tensor: torch.Tensor, density: float) -> torch.Tensor | None:
    """Where the task vector is among its ``density`` largest elements; flat, None for all.

    Elements that are zero are left out: keeping them would change nothing.
    """
    count = tensor.numel()
    if density >= 1 or count == 0:
        return None
    return largest_mask(base, tensor, kept_count(density, count))


def kept_count(density: float, count: int) -> int:
    """How many of ``count`` elements ties keeps, below density 1."""
    return max(1, int(density * count)) if density > 0 else 0


def largest_mask(base: torch.Tensor, tensor: torch.Tensor, keep: int) -> torch.Tensor:
    """Where the task vector is among its ``keep`` largest elements, zeros left out; flat.

    Ranks are by magnitude in float32, then in float64, then the first in memory.
    """
    ground, flat = base.reshape(-1), tensor.reshape(-1)
    keep = min(keep, flat.numel())
    if keep <= 0:
        return torch.zeros(flat.numel(), dtype=torch.bool, device=flat.device)
    if is_host(flat.device):
        return _largest_in_host(ground, flat, keep)
    return _largest_on_device(ground, flat, keep)


def _largest_in_host(ground: torch.Tensor, flat: torch.Tensor, keep: int) -> torch.Tensor:
    # Narrow, since selecting is what takes the time; rounding keeps the order up to equality.
    size = _magnitudes(ground, flat)
    at = size.numel() - keep
    smallest = float(np.partition(size.numpy(), at)[at])  # ten times faster than torch's
    mask = size > smallest
    if smallest > 0:  # where it is zero, what is left to keep adds nothing
        equal = torch.nonzero(size == smallest).reshape(-1)
        exact = (flat[equal].double() - ground[equal].double()).abs()
        order = torch.argsort(exact, descending=True, stable=True)
        mask[equal[order[: keep - int(mask.sum())]]] = True
    return mask


def _largest_on_device(ground: torch.Tensor, flat: torch.Tensor, keep: int) -> torch.Tensor:
    """Block by block, so that nothing is as large as the tensor but the mask.

    torch's own selection needs the tensor several times and reads it with one of the device's
    processors, and its ``nonzero`` refuses tensors of more than 2**31 elements.
    """
    mask = torch.empty(flat.numel(), dtype=torch.bool, device=flat.device)
    spans = [*blocks(flat.numel(), flat.device)]
    nothing = torch.full((), -1, dtype=torch.int64, device=flat.device)

    def rough(span: slice) -> torch.Tensor:
        return _bits(_magnitudes(ground[span], flat[span]))

    smallest, left, equal = _kth_largest(rough, spans, keep, flat.device)
    if smallest == 0 or left == equal:  # zeros add nothing
        for span in spans:
            torch.ge(rough(span), max(1, smallest), out=mask[span])
        return mask

    def exact(span: slice) -> torch.Tensor:
        """Of those that are equal so far; of others, less than any."""
        size = _bits(flat[span].double().sub_(ground[span]).abs_())
        return torch.where(rough(span) == smallest, size, nothing)

    ends = torch.tensor([-1, -_MOST], device=flat.device)  # the largest, and minus the least
    for span in spans:
        size = exact(span)
        found = size.amax(), size.masked_fill(size < 0, _MOST).neg_().amax()
        torch.maximum(ends, torch.stack(found), out=ends)
    threshold, negated = ends.tolist()
    if threshold != -negated:
        threshold, left, _ = _kth_largest(exact, spans, left, flat.device)
    seen = torch.zeros_like(nothing)
    for span in spans:
        size = exact(span)
        tied = size == threshold
        first = tied.cumsum(0).add_(seen) <= left
        seen += tied.sum()
        mask[span] = (rough(span) > smallest) | (size > threshold) | (tied & first)
    return mask


def _kth_largest(
    bits_of: Callable[[slice], torch.Tensor], spans: Sequence[slice], k: int, device: torch.device
) -> tuple[int, int, int]:
    """The k-th largest of some integers, how many equal ones are among the k, and in all.

    Digit by digit from the highest: each pass counts how many of those that agree so far have each
    digit. bits_of: a block's; those below zero are not there.
    """
    known, left, count = 0, k, 0
    high = 8 * bits_of(slice(0, 0)).element_size() - 1
    while high:
        shift = max(0, high - _DIGIT)
        size = 1 << (high - shift)
        counts = torch.zeros(size + 1, dtype=torch.int64, device=device)
        for span in spans:
            bits = bits_of(span)
            digits = (bits >> shift) & (size - 1)
            digits.masked_fill_((bits >> (high - 1) >> 1) != known, size)
            counts += torch.bincount(digits, minlength=size + 1)
        digit, found = size, counts[:-1].tolist()
        while left > 0:
            digit -= 1
            left -= found[digit]
        count = found[digit]
        left, known, high = left + count, known << (high - shift) | digit, shift
    return known, left, count


def _magnitudes(ground: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
    """Of a task vector; in float32, but of float64 in float64."""
    working = torch.float64 if flat.dtype == torch.float64 else torch.float32
    return flat.to(working).sub(ground).abs_()


def _bits(magnitudes: torch.Tensor) -> torch.Tensor:
    """As integers, which are in the same order."""
    return magnitudes.view(torch.int64 if magnitudes.dtype == torch.float64 else torch.int32)


def random_mask(
    key: str, count: int, density: float, device: torch.device | str = "cpu"
) -> torch.Tensor | None:
    """The keyed mask of the module's head over ``count`` elements; flat, None for all of them."""
    if density >= 1:
        return None
    mask = torch.zeros(count, dtype=torch.bool, device=device)
    if density <= 0:
        return mask
    # Torch has no unsigned comparison: flipping the top bit turns it into the signed one.
    limit = hash_limit(density) - 2**31
    for block, h in hashes(key, count, device):
        torch.le(h, limit, out=mask[block])
    return mask


def hashes(
    key: str, count: int, device: torch.device | str = "cpu", start: int = 0
) -> Iterator[tuple[slice, torch.Tensor]]:
    """The hash of the module's head of the elements from ``start`` to ``count``, block by block,
    less 2**31 (as int32)."""
    longest = min(block_size(device), count - start)
    counter = torch.arange(longest, dtype=torch.int32, device=device)
    for block in blocks(count, device, start):
        k0, k1 = hash_keys(key, block.start >> 32)
        start = (block.start + k0) & 0xFFFFFFFF
        h = counter[: block.stop - block.start] + _signed(start)
        h ^= (h >> 16) & 0xFFFF
        h *= 0x21F0AAAD
        h ^= _signed(k1)
        h ^= (h >> 15) & 0x1FFFF
        h *= 0x735A2D97
        h ^= (h >> 15) & 0x1FFFF
        h ^= _signed(1 << 31)
        yield block, h


def hash_keys(key: str, high: int = 0) -> tuple[int, int]:
    """The hash's two words for elements whose number has these upper bits."""
    words = hashlib.sha256(f"{key}\n{high}".encode()).digest()
    return int.from_bytes(words[:4], "little"), int.from_bytes(words[4:8], "little")


def hash_limit(density: float) -> int:
    """The largest hash that a density above 0 keeps."""
    return min(math.ceil(density * 2**32), 2**32) - 1


def scaled(operands: Operands, shared: Shared) -> tuple[list[Operand], list[float]]:
    """The operands whose weight is not zero, and their weights, brought to sum 1 if asked."""
    live = [operand for operand in operands if operand.weight]
    weights = [operand.weight for operand in live]
    if not shared["normalize"] or not live:
        return live, weights
    total = math.fsum(weights)
    if abs(total) <= CANCEL_SHARE * math.fsum(map(abs, weights)):
        return live, weights
    return live, [weight / total for weight in weights]


def divisor(agreeing_weights: torch.Tensor) -> torch.Tensor:
    """Each column's sum, or 1 where it is nothing."""
    total = summed(agreeing_weights)
    nothing = total.abs() <= CANCEL_SHARE * summed(agreeing_weights.abs())
    return total.mul_(~nothing).add_(nothing)


def summed(rows: torch.Tensor) -> torch.Tensor:
    """Over the first dimension, one row after the other: torch's own order varies with its size."""
    total = rows[0].clone()
    for row in rows[1:]:
        total.add_(row)
    return total


def rescalings(
    ground: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor | None],
    working: torch.dtype,
) -> list[float]:
    """What brings each masked task vector back to its L1 norm; tensors and masks are flat."""
    norms = torch.zeros((len(tensors), 2), dtype=torch.float64, device=ground.device)
    for (before, after), tensor, mask in zip(norms, tensors, masks, strict=True):
        if mask is None:
            continue
        for block in blocks(ground.numel(), ground.device):
            size = tensor[block].to(working).sub(ground[block]).abs_()
            before += size.sum(dtype=torch.float64)
            after += size.mul_(mask[block]).sum(dtype=torch.float64)
    return [
        1.0 if mask is None else restored(*pair)
        for mask, pair in zip(masks, norms.tolist(), strict=True)
    ]


def restored(before: float, after: float) -> float:
    """The factor between two L1 norms; 1 where either is next to nothing."""
    return 1.0 if before < _NORM_FLOOR or after < _NORM_FLOOR else before / after


def arc_shares(t: float, cosine: float) -> tuple[float, float]:
    """What slerp multiplies its start and its end by."""
    if abs(cosine) > _SLERP_LINEAR_COSINE:
        return 1.0 - t, t
    angle = math.acos(cosine)
    return math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    # Plain float64 sums: nothing a stored float32 can hold overflows or cancels them to noise.
    sums = torch.zeros(3, dtype=torch.float64, device=a.device)
    for block in blocks(a.numel(), a.device):
        x, y = a[block].double(), b[block].double()
        for total, one, other in zip(sums, (x, y, x), (x, y, y), strict=True):
            total += one.dot(other)
    squares_a, squares_b, product = map(float, sums.tolist())
    length_a, length_b = math.sqrt(squares_a), math.sqrt(squares_b)
    for length in (length_a, length_b):
        product /= length if length > _SLERP_SHORT else 1.0
    return min(max(product, -1.0), 1.0)


def is_host(device: torch.device | str) -> bool:
    """Whether a device's memory is the machine's own, where an operation costs no launch."""
    return torch.device(device).type == "cpu"


def block_size(device: torch.device | str) -> int:
    """Elements worked on at a time; a power of two."""
    return BLOCK if is_host(device) else DEVICE_BLOCK


def blocks(count: int, device: torch.device | str, start: int = 0) -> Iterator[slice]:
    """The elements from ``start`` to ``count`` in order, so many at a time as suit a device.

    All but the first begin at a multiple of ``block_size``, so that none holds one of 2**32.
    """
    step = block_size(device)
    while start < count:
        stop = min((start // step + 1) * step, count)
        yield slice(start, stop)
        start = stop


def working_dtype(tensors: Sequence[torch.Tensor]) -> torch.dtype:
    """One width wider than the widest is stored."""
    narrow = all(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in tensors)
    return torch.float32 if narrow else torch.float64


def empty_as(like: torch.Tensor, out: torch.dtype) -> torch.Tensor:
    """Contiguous, whatever the strides of ``like``."""
    return torch.empty(like.shape, dtype=out, device=like.device)


def copied(tensor: torch.Tensor, out: torch.dtype) -> torch.Tensor:
    return tensor.to(out, copy=True)


def present(base: torch.Tensor | None) -> torch.Tensor:
    if base is None:
        raise TypeError("this merge method needs a base tensor")
    return base


def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word
