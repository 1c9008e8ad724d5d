"""A merge method: its row, which a search reads, and its kernel, which tensor after tensor goes
through (see ``agentmerge.contracts.MergeKernel``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from agentmerge.contracts import Method, Parameter


def capped(
    base: Any | None,
    tensors: Sequence[Any],
    own: Sequence[Mapping[str, float]],
    shared: Mapping[str, float],
) -> Any:
    """The base plus the weighted sum of the task vectors, no element far beyond the others."""
    moved = sum(
        values["weight"] * (tensor - base) for tensor, values in zip(tensors, own, strict=True)
    )
    most = shared["reach"] * moved.square().mean().sqrt()
    return base + moved.clamp(-most, most)


METHOD = Method(
    "capped",
    "The base plus the weighted sum of the task vectors, capped.",
    source=(Parameter("weight", "How much of the task vector goes in.", None, high=1.5),),
    shared=(Parameter("reach", "The cap, in root mean squares of the sum.", 3.0, 0.5, 6.0, "log"),),
    base="required",
    paper="",
    kernel=capped,
)
