"""How a forecast of memory looks on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from agentmerge.cli.render import table

if TYPE_CHECKING:
    from agentmerge.merging.placement import MemoryPlan, Share


def memory_text(memory: MemoryPlan) -> str:
    """Each placement side by side, what there is, and which one is taken."""
    hosts = [f.host for f in memory.forecasts]
    devices = [f.device for f in memory.forecasts if f.device is not None]
    heads = [memory.name_of(f.placement) for f in memory.forecasts]
    tables = [_table("device memory", devices, heads, memory)] if devices else []
    tables.append(_table("memory", hosts, heads, memory))
    limits = [memory.host] if memory.device is None else [memory.device, memory.host]
    there = ", ".join(f"{limit.size_bytes / 1e9:.2f} GB {limit.source}" for limit in limits)
    chosen = "none" if memory.chosen is None else memory.name_of(memory.chosen)
    scoring = memory.token_bytes / 1e3
    lines = []
    if (tokens := memory.tokens_of_a_gradient) is not None:
        each = memory.gradient_token_bytes / 1e6
        lines.append(
            f"             a gradient, about {each:.2f} MB for each token of a batch: {tokens:,} "
            "tokens at a time fit"
        )
    return "\n".join(
        [
            *tables,
            f"there are:   {there}",
            f"placement:   {chosen} ({memory.reason})",
            f"not counted: what scoring adds (keys, values, logits), about {scoring:.2f} MB for "
            "each 1,000 tokens of a batch",
            *lines,
        ]
    )


def _table(head: str, shares: Sequence[Share], names: Sequence[str], memory: MemoryPlan) -> str:
    some = f"{memory.at_a_time} of {memory.parents} " if memory.at_a_time < memory.parents else ""
    unit, one = ("GB", 1e9) if max(share.total for share in shares) >= 2e9 else ("MB", 1e6)

    def row(name: str, values: Sequence[int]) -> list[str]:
        return [name, *(f"{value / one:.2f}" for value in values)]

    rows = [[f"{head}, {unit}", *names]]
    for name, values in (
        (f"{some}parents", [share.parents for share in shares]),
        ("live model", [share.live for share in shares]),
        ("statistics of the parents", [share.statistics for share in shares]),
        ("merging the largest tensor", [share.scratch for share in shares]),
        ("interpreter and libraries", [share.runtime for share in shares]),
        ("vLLM's cache and reserve", [share.beside for share in shares]),
    ):
        if any(values):
            rows.append(row(name, values))
    rows.append(row("a worker", [share.total for share in shares]))
    if memory.workers > 1:
        totals = [share.total * memory.workers + share.runtime for share in shares]
        rows.append(row(f"{memory.workers} workers and this process", totals))
    return table(rows)
