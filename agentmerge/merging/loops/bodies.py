"""The inner loops of the fast merges, as bodies for ``lanes``, and each one's machine code.

Formulas, order of operations and rules are those of ``kernels.py``, where they are explained. Here
are no tensors and no decisions: which loop runs on what is ``fused.py``. The arrays of a loop are:
0 the result, 1 the base, then the experts, then one more for each expert where a loop says so.

Masks, one kind for each expert, with four words and two counts each:
    all: no words are read;
    rank: the magnitude's bits are more than word 0, or equal it, the first word 1 times; count 0
        counts how often they equal it, as ``Loop.first_equal`` does;
    window: as rank, less what words 2 and 3 keep likewise, with count 1;
    hash: the hash of the element with keys word 0 and word 1 is at most word 2;
    bits: a bit an element, from the array after the experts' own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from threading import Lock
from typing import Literal

from agentmerge.merging.loops.lanes import Lanes, Loop
from agentmerge.merging.loops.machine import Compiled, compiled
from agentmerge.recipe import CANCEL_SHARE

Mask = Literal["all", "rank", "window", "hash", "bits"]

WORDS = 4
COUNTS = 2
CHECKSUM_PERIOD = 1 << 16

Body = Callable[[Loop], None]


def weighted_sum(experts: int) -> Body:
    """The result is the sum of number k times expert k."""

    def body(loop: Loop) -> None:
        total = loop.load(2) * loop.given_number(0)
        for k in range(1, experts):
            total = loop.fma(loop.load(2 + k), loop.given_number(k), total)
        loop.store(0, total)

    return body


def added(masks: Sequence[Mask]) -> Body:
    """The base plus the masked task vectors, each times its number."""

    def body(loop: Loop) -> None:
        origin, total = loop.load(1), loop.number(0.0)
        for k, mask in enumerate(masks):
            delta, kept = _task_vector(loop, origin, k, mask, len(masks))
            more = loop.fma(delta, loop.given_number(k), total)
            total = more if kept is None else loop.where(kept, more, total)
        loop.store(0, total + origin)

    return body


def consensus(masks: Sequence[Mask], normalize: bool, cancels: bool) -> Body:
    """The base plus the masked task vectors, each element from those of its sign.

    Numbers: lambda; each expert's factor; with ``normalize`` each expert's weight. cancels: weights
    have both signs, so that what agrees can cancel.
    """
    count = len(masks)

    def body(loop: Loop) -> None:
        origin, zero = loop.load(1), loop.number(0.0)
        parts = []
        for k, mask in enumerate(masks):
            delta, kept = _task_vector(loop, origin, k, mask, count)
            part = delta * loop.given_number(1 + k)
            parts.append(part if kept is None else loop.where(kept, part, zero))
        positive = sum(parts[1:], parts[0]) >= zero
        merged = divisor = size = zero
        for k, part in enumerate(parts):
            turned = loop.negated_unless(positive, part)  # what agrees is above zero
            merged = merged + loop.where(turned < zero, zero, turned)  # NaN goes on
            if normalize:
                weight, agrees = loop.given_number(1 + count + k), turned > zero
                divisor = loop.where(agrees, divisor + weight, divisor)
                if cancels:
                    size = loop.where(agrees, size + loop.absolute(weight), size)
        if normalize:
            least = size * loop.number(CANCEL_SHARE) if cancels else zero
            merged = merged / loop.where(loop.absolute(divisor) > least, divisor, loop.number(1.0))
        merged = loop.negated_unless(positive, merged)
        loop.store(0, merged * loop.given_number(0) + origin)

    return body


def norms(masks: Sequence[Mask], whole: bool) -> Body:
    """Sum k: the L1 norm of expert k's masked task vector; with ``whole``, then of the unmasked.

    What a hash keeps is also written, for masks of kind bits.
    """
    count = len(masks)

    def body(loop: Loop) -> None:
        origin, zero = loop.load(1), loop.number(0.0)
        for k, mask in enumerate(masks):
            delta, kept = _task_vector(loop, origin, k, mask, count)
            size = loop.absolute(delta)
            if whole:
                loop.add_to_sum(count + k, size)
            if kept is None:
                loop.add_to_sum(k, size)
                continue
            if mask == "hash":
                loop.store_truth(2 + count + k, kept)
            loop.add_to_sum(k, loop.where(kept, size, zero))

    return body


def agreement(masks: Sequence[Mask], live: Sequence[bool]) -> Body:
    """Writes where each expert's masked task vector has the sign that is elected, as bits.

    Numbers: what each is multiplied by. live: which take part in the election; where they are all
    zero, all do. The bits go to the arrays after the experts' own and those of masks of kind bits.
    """
    count = len(masks)

    def body(loop: Loop) -> None:
        origin, zero = loop.load(1), loop.number(0.0)
        parts = []
        for k, mask in enumerate(masks):
            delta, kept = _task_vector(loop, origin, k, mask, count)
            part = delta * loop.given_number(k)
            parts.append(part if kept is None else loop.where(kept, part, zero))
        elected = sum(parts[1:], parts[0])
        if not all(live):
            votes, untouched = zero, zero.equals(zero)
            for part in (part for part, has_vote in zip(parts, live, strict=True) if has_vote):
                votes, untouched = votes + part, untouched & part.equals(zero)
            elected = loop.where(untouched, elected, votes)
        positive = elected >= zero
        for k, part in enumerate(parts):
            loop.store_truth(2 + 2 * count + k, loop.negated_unless(positive, part) > zero)

    return body


def slopes(kept: Sequence[bool], normalize: bool) -> Body:
    """Sum k: array 0 times what expert k's weight adds; then, times what all weights add.

    Numbers: each expert's weight, then each one's scale. kept: which experts have bits that say
    where they are kept. normalize: each element is divided by the weights that are kept there.
    """
    count = len(kept)

    def body(loop: Loop) -> None:
        pull, origin, zero, one = loop.load(0), loop.load(1), loop.number(0.0), loop.number(1.0)
        truths = [loop.load_truth(2 + count + k) if bits else None for k, bits in enumerate(kept)]
        rows, mean, share, size = [], zero, zero, zero
        for k, truth in enumerate(truths):
            weight = loop.given_number(k)
            row = (loop.load(2 + k) - origin) * loop.given_number(count + k)
            row = _where_kept(loop, truth, row)
            mean = mean + weight * row
            rows.append(row)
            if normalize:
                share = share + _where_kept(loop, truth, weight)
                size = size + _where_kept(loop, truth, loop.absolute(weight))
        if normalize:
            some = loop.absolute(share) > size * loop.number(CANCEL_SHARE)
            share = loop.where(some, share, one)
            mean = mean / share
            slope = loop.where(some, pull / share, zero)
        for k, (row, truth) in enumerate(zip(rows, truths, strict=True)):
            if normalize:
                loop.add_to_sum(k, _where_kept(loop, truth, row - mean) * slope)
            else:
                loop.add_to_sum(k, row * pull)
        loop.add_to_sum(count, mean * pull)

    return body


def between(experts: int) -> Body:
    """Where expert k's magnitude has bits from word 2k on, and at most word 2k+1 more.

    Noted of each in three arrays: the place, the magnitude as float32 has it, and as float64 has
    it; count k counts them. The arrays come after the experts.
    """

    def body(loop: Loop) -> None:
        origin = loop.load(1)
        for k in range(experts):
            value, arrays = loop.load(2 + k), 2 + experts + 3 * k
            low, width = loop.given_word(3 * k), loop.given_word(3 * k + 1)
            inside = magnitude_bits(loop, value, origin) - low <= width
            notes = partial(_magnitudes, loop, value, origin)
            loop.collect(k, arrays, inside, notes, most=3 * k + 2)

    return body


def inexact(collected: bool) -> Body:
    """Magnitudes that float32 does not hold exactly: count 0 counts them.

    collected: three arrays after the one expert note them, as in ``between``.
    """

    def body(loop: Loop) -> None:
        rounded, exact = _magnitudes(loop, loop.load(2), loop.load(1))
        differ = exact.differs(loop.double(rounded))
        if collected:
            loop.collect(0, 3, differ, lambda: (rounded, exact), most=0)
        else:
            loop.add_to_count(0, differ)

    return body


def checksum() -> Body:
    """Count 0: the sum of array 0's words times array 1's factors, which repeat, times one more
    than twice the number of the period."""

    def body(loop: Loop) -> None:
        period = loop.places() >> CHECKSUM_PERIOD.bit_length() - 1
        word, factor = loop.load_integers(0), loop.load_integers(1, CHECKSUM_PERIOD)
        loop.add_to_count(0, word * factor * (period + period + loop.long(1)))

    return body


def _where_kept(loop: Loop, truth: Lanes | None, value: Lanes) -> Lanes:
    return value if truth is None else loop.where(truth, value, loop.number(0.0))


def magnitude_bits(loop: Loop, value: Lanes, origin: Lanes) -> Lanes:
    """The bits of the difference's magnitude in float32: as unsigned words, they order it."""
    return loop.bits(loop.single(value) - loop.single(origin)) & loop.word(0x7FFFFFFF)


def _magnitudes(loop: Loop, value: Lanes, origin: Lanes) -> tuple[Lanes, Lanes]:
    """Of the difference, in float32 and in float64."""
    rounded = loop.single(value) - loop.single(origin)
    exact = loop.double(value) - loop.double(origin)
    return loop.absolute(rounded), loop.absolute(exact)


def _task_vector(
    loop: Loop, origin: Lanes, k: int, mask: Mask, count: int
) -> tuple[Lanes, Lanes | None]:
    """Expert k less the base, and where it is kept (None for everywhere)."""
    value = loop.load(2 + k)
    kept: Lanes | None = None
    words = [WORDS * k + at for at in range(WORDS)]
    if mask in ("rank", "window"):
        bits, counts = magnitude_bits(loop, value, origin), 1 + COUNTS * k
        kept = _largest(loop, bits, counts, *words[:2])
        if mask == "window":  # the second are among the first
            kept = kept ^ _largest(loop, bits, counts + 1, *words[2:])
    elif mask == "hash":
        keys = loop.given_word(words[0]), loop.given_word(words[1])
        kept = _hash(loop, *keys) <= loop.given_word(words[2])
    elif mask == "bits":
        kept = loop.load_truth(2 + count + k)
    return value - origin, kept


def _largest(loop: Loop, bits: Lanes, count: int, least: int, most: int) -> Lanes:
    """Bits above one given word; of those that equal it, the first in memory, as another says."""
    return (bits > loop.given_word(least)) | loop.first_equal(count, bits, least, most)


def _hash(loop: Loop, first_key: Lanes, second_key: Lanes) -> Lanes:
    """The hash of ``kernels.py``'s head, of each lane's element."""
    h = loop.low_places() + first_key
    h = (h ^ (h >> 16)) * loop.word(0x21F0AAAD)
    h = h ^ second_key
    h = (h ^ (h >> 15)) * loop.word(0x735A2D97)
    return h ^ (h >> 15)


_BODIES: dict[str, Callable[..., Body]] = {
    "weighted_sum": weighted_sum,
    "added": added,
    "consensus": consensus,
    "norms": norms,
    "agreement": agreement,
    "slopes": slopes,
    "between": between,
    "inexact": inexact,
    "checksum": checksum,
}


_MAKING = Lock()


def loop_for(name: str, stored: tuple[str, ...], working: str, *how: object) -> Compiled:
    """The machine code of a loop of this module, made at its first use, by one thread for all.

    stored: the dtypes of the result, the base and the experts. how: the body's own arguments.
    """
    with _MAKING:
        return _loop_for(name, stored, working, *how)


@lru_cache(256)
def _loop_for(name: str, stored: tuple[str, ...], working: str, *how: object) -> Compiled:
    return compiled(_BODIES[name](*how), stored, working)
