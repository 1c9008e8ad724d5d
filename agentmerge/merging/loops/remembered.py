"""What is remembered of a family's tensors, so that a merge need not compute it again.

All of it depends on the parents alone, or on them and a number that many merges share. It belongs
to a family and goes with it. It knows tensors in memory of the CPU; everything it holds is made at
its first use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from agentmerge.merging.kernels import Operand, Operands, cosine

if TYPE_CHECKING:  # llvmlite may be missing, and then nothing asks for orders
    from agentmerge.merging.loops.orders import Cut, Order

#: Cuts remembered for each task vector: a parent's density often stays for some candidates.
_CUTS_KEPT = 4

_Value = TypeVar("_Value")


class Statistics:
    """Orders, cosines and norms, by the name of the pair of tensors (``Operand.pair``)."""

    def __init__(self) -> None:
        self._orders: dict[str, Order] = {}
        self._cosines: dict[str, float] = {}
        self._norms: dict[str, float] = {}
        self._cuts: dict[str, dict[int, Cut]] = {}

    @property
    def size_bytes(self) -> int:
        """What the orders take, which is nearly all."""
        return sum(order.size_bytes for order in self._orders.values())

    def forget(self, is_gone: Callable[[str], bool]) -> None:
        """What is known of pairs that are gone."""
        tables: tuple[dict[str, Any], ...] = (self._orders, self._cosines, self._norms, self._cuts)
        for table in tables:
            for pair in [pair for pair in table if is_gone(pair)]:
                del table[pair]

    def cosine(self, base: torch.Tensor, operand: Operand) -> float:
        return _remembered(
            self._cosines,
            operand.pair,
            lambda: cosine(base.reshape(-1), operand.tensor.reshape(-1)),
        )

    def norm(self, pair: str) -> float | None:
        """A task vector's L1 norm, if it is known."""
        return self._norms.get(pair)

    def keep_norm(self, pair: str, norm: float) -> None:
        if pair:
            self._norms[pair] = norm

    def cuts(self, base: torch.Tensor, operands: Operands, keeps: Sequence[int]) -> list[Cut]:
        """For each operand, the cut that keeps the so many largest elements of its task vector."""
        from agentmerge.merging.loops.orders import cuts

        wanted = list(zip(operands, keeps, strict=True))
        found = {at: self._cuts.get(o.pair, {}).get(keep) for at, (o, keep) in enumerate(wanted)}
        missing = [at for at, cut in found.items() if cut is None]
        new = cuts(
            base,
            [operands[at].tensor for at in missing],
            [self._order(base, operands[at]) for at in missing],
            [keeps[at] for at in missing],
        )
        for at, cut in zip(missing, new, strict=True):
            found[at] = cut
            self._keep_cut(*wanted[at], cut)
        return [cut for cut in found.values() if cut is not None]

    def _keep_cut(self, operand: Operand, keep: int, cut: Cut) -> None:
        if operand.pair:
            recent = self._cuts.setdefault(operand.pair, {})
            recent[keep] = cut
            if len(recent) > _CUTS_KEPT:
                del recent[next(iter(recent))]

    def _order(self, base: torch.Tensor, operand: Operand) -> Order:
        from agentmerge.merging.loops.orders import Order

        return _remembered(self._orders, operand.pair, lambda: Order.of(base, operand.tensor))


def _remembered(known: dict[str, _Value], name: str, make: Callable[[], _Value]) -> _Value:
    if not name:
        return make()
    if name not in known:
        known[name] = make()
    return known[name]
