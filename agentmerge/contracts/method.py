"""The contract of a merge method: its row in the table (``Method``), and its kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class MergeKernel(Protocol):
    """One tensor's merge; a plugin's entry point is a ``Method`` that has one.

    The same inputs always give the same result; what is random draws from torch's generator, whose
    seed is the merge's, the models' and the tensor's where the method says ``random``. It sees
    every floating tensor of the models, vectors too.
    """

    def __call__(
        self,
        base: Any | None,
        tensors: Sequence[Any],
        own: Sequence[Mapping[str, float]],
        shared: Mapping[str, float],
    ) -> Any:
        """A tensor of the others' shape.

        base: the base's tensor in float32 (float64 where a parent is so stored), None where the
        method ignores it or the merge names none. tensors: the models', alike. own: each one's
        parameters by name. shared: those of the whole merge. Whatever it raises is that
        candidate's failure; the result is rounded once, to what is stored.
        """
        ...
