"""Where parents are kept while a search merges them, chosen by a forecast of peak memory.

Arithmetic over a layout and the memory that is free: ``check``, ``doctor`` and the workers share
it. It reads no weights. Three placements, in order of preference:
    device: all parents in the device's memory;
    host: all in this machine's memory, copied to the device tensor by tensor. On a CPU that is the
        same thing, so only two are told apart there;
    stream: none in memory; each tensor is mapped from its safetensors file when it is merged.
One is taken where its forecast and a tenth more fit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from agentmerge.errors import UserError
from agentmerge.merging.memory import Limit, device_limit, host_limit, resident_bytes
from agentmerge.merging.scratch import RANKING_METHODS, WIDTHS, scratch_bytes, size_bytes, slabs
from agentmerge.parents.layout import Layout

Placement = Literal["device", "host", "stream"]
PLACEMENTS: tuple[Placement, ...] = ("device", "host", "stream")

#: How far from the forecast the peak may be.
MARGIN = 0.1

#: What comes with the first model and the first merge: transformers' modules, compiled loops.
_LATER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class Share:
    """Bytes of one kind of memory that one worker needs at its peak.

    statistics: of the parents' tensors, remembered from merge to merge. scratch: what merging the
    largest tensor takes, or as many as are merged at a time. runtime: interpreter and libraries.
    beside: what the worker's engine takes besides.
    """

    parents: int
    live: int
    statistics: int
    scratch: int
    runtime: int
    beside: int = 0

    @property
    def total(self) -> int:
        held = self.parents + self.live + self.statistics
        return held + self.scratch + self.runtime + self.beside


@dataclass(frozen=True, slots=True)
class MemoryForecast:
    """What one worker needs in one placement; ``device`` is None where it is the host."""

    placement: Placement
    host: Share
    device: Share | None = None


@dataclass(frozen=True, slots=True)
class Demand:
    """What a kind of worker is made of.

    possible: placements that it can do. processes: of each worker. ranks: processes that share the
        live model and have whole parents each, on a device of their own. threads: tensors merged
        at a time in the host's memory. beside_bytes: what its engine takes of each device besides.
        extra_layers: how many the live model has beyond the parents'.
    """

    possible: tuple[Placement, ...] = PLACEMENTS
    processes: int = 1
    ranks: int = 1
    threads: int = 1
    beside_bytes: int = 0
    extra_layers: int = 0


_ALONE = Demand()


@dataclass(frozen=True)
class MemoryPlan:
    """Every possible placement's forecast, what there is, and which one is taken.

    chosen: None where nothing fits (or not what was asked for); ``reason`` then says so.
    host, device: what the workers may use in all, with what this process has already.
    token_bytes, gradient_token_bytes: what scoring adds for each token of a batch, and what a
        gradient does (0 where the worker has none); not in the forecast.
    at_a_time: how many of the ``parents`` the forecasts are of.
    """

    forecasts: tuple[MemoryForecast, ...]
    workers: int
    host: Limit
    device: Limit | None
    chosen: Placement | None
    reason: str
    token_bytes: int
    gradient_token_bytes: int = 0
    crowd: int = 1
    at_a_time: int = 0
    parents: int = 0

    @property
    def tokens_of_a_gradient(self) -> int | None:
        """How many tokens' activations fit beside the chosen placement; None where a gradient is
        not to be had."""
        if self.chosen is None or not self.gradient_token_bytes:
            return None
        forecast = next(f for f in self.forecasts if f.placement == self.chosen)
        crowd = self.workers if forecast.device is None else self.crowd
        limit = self.host if forecast.device is None else self.device
        need = forecast.host if forecast.device is None else forecast.device
        assert limit is not None
        free = limit.size_bytes / crowd - need.total * (1 + MARGIN)
        return max(0, int(free / self.gradient_token_bytes))

    @property
    def placement(self) -> Placement:
        """The one taken.

        Raises:
            UserError: none fits.
        """
        if self.chosen is None:
            raise UserError(self.reason)
        return self.chosen

    @property
    def compromise(self) -> str:
        """Why the parents are not where they are merged from fastest; empty where they are."""
        if self.chosen is None or self.chosen == self.forecasts[0].placement:
            return ""
        return f"parents: {self.name_of(self.chosen)}; {self.reason}"

    def name_of(self, placement: Placement) -> str:
        """For people: on a CPU there is but one memory to be resident in."""
        return _name(placement, self.device is not None)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, with the totals of each forecast."""
        body = asdict(self)
        for row, forecast in zip(body["forecasts"], self.forecasts, strict=True):
            row["host"]["total"] = forecast.host.total
            if forecast.device is not None:
                row["device"]["total"] = forecast.device.total
        return body


def plan_memory(
    layout: Layout,
    *,
    dtype: str | None = None,
    device: str = "cpu",
    method: str | None = None,
    workers: int = 1,
    apart: bool = False,
    devices: int = 1,
    demand: Demand = _ALONE,
    asked: Placement | Literal["auto"] = "auto",
    memory_gb: float | None = None,
    token_bytes: int = 0,
    gradient_token_bytes: int = 0,
    most: int | None = None,
    low_rank: Mapping[str, tuple[str, int]] | None = None,
) -> MemoryPlan:
    """Forecast every placement, and choose.

    dtype: of the live model; by default as stored. method: the merge method, for what its kernel
        needs besides. workers: how many there are, each with a family, spread evenly over so many
        ``devices``. apart: even one has a process of its own. memory_gb: at most so much is used
        in all (of each device, where there are any), even if there is more. most: so many parents
        are in memory at a time; None for all. low_rank: of those that are kept as adapters, the
        model that each is of (which may be a parent) and what it takes beside it.
    """
    parents = len(layout.parents)
    held = _held(layout, most, low_rank or {})
    layout = layout.of_most(most)
    cuda = device.startswith("cuda")
    forecasts = tuple(
        _forecast(placement, layout, held, dtype, method, demand, cuda)
        for placement in demand.possible
        if placement != "host" or cuda
    )
    host = _with_this_process(host_limit())
    on_device = device_limit(device) if cuda else None
    if memory_gb is not None:
        given = Limit(int(memory_gb * 1e9), "worker.memory_gb")
        if on_device is None:
            host = min(host, given, key=lambda limit: limit.size_bytes)
        else:
            on_device = min(on_device, given, key=lambda limit: limit.size_bytes)
    if asked == "host" and not cuda:
        asked = "device"
    crowd = -(-workers // devices)
    apart = apart or workers > 1
    shorts = {f.placement: _short(f, workers, apart, crowd, host, on_device) for f in forecasts}
    chosen, reason = _choice(shorts, asked, cuda)
    return MemoryPlan(
        forecasts,
        workers,
        host,
        on_device,
        chosen,
        reason,
        token_bytes,
        gradient_token_bytes,
        crowd,
        len(layout.parents),
        parents,
    )


def layout_bytes(layout: Layout, dtype: str | None = None, extra_layers: int = 0) -> int:
    """A model of this layout, in ``dtype`` or as stored, with so many more of its last layer."""
    last = layout.num_layers - 1
    return sum(
        size_bytes(spec, dtype) * (1 + extra_layers * (spec.layer == last))
        for spec in layout.tensors
    )


def bytes_per_token(config: Mapping[str, Any], dtype: str) -> int:
    """What scoring holds for each token of a batch: keys, values and logits (and their softmax in
    float32). From a text model's config; what it does not say counts nothing."""
    width = WIDTHS.get(dtype, 2)
    layers = config.get("num_hidden_layers") or 0
    heads = config.get("num_attention_heads") or 1
    key_heads = config.get("num_key_value_heads") or heads
    head_size = config.get("head_dim") or (config.get("hidden_size") or 0) // heads
    cache = 2 * layers * key_heads * head_size * width
    return int(cache + (config.get("vocab_size") or 0) * (width + 4))


def gradient_bytes_per_token(config: Mapping[str, Any], dtype: str) -> int:
    """What a backward pass keeps of each token: every layer's activations (of a decoder with a
    gated feed-forward part, as most are), and logits with their softmax and its gradient.

    A norm is taken in float32 whatever the dtype. From a text model's config, as
    ``bytes_per_token``; attention that writes out its weights takes more.
    """
    width = WIDTHS.get(dtype, 2)
    hidden = config.get("hidden_size") or 0
    heads = config.get("num_attention_heads") or 1
    head_size = config.get("head_dim") or hidden // heads
    keys = (config.get("num_key_value_heads") or heads) * head_size
    inner = config.get("intermediate_size") or 4 * hidden
    wide = max(width, 4)
    layer = (6 * width + 2 * wide) * hidden + 2 * width * keys + 4 * width * inner
    logits = (config.get("vocab_size") or 0) * (width + 2 * wide)
    return int((config.get("num_hidden_layers") or 0) * layer + logits)


@dataclass(frozen=True, slots=True)
class _Held:
    """Parents in memory: whole models, adapters, and what those take besides."""

    whole: int
    adapters: int
    beside_bytes: int


def _held(layout: Layout, most: int | None, low_rank: Mapping[str, tuple[str, int]]) -> _Held:
    """At most: whole models first, then the largest adapters."""
    adapters = [name for name in layout.parents if name in low_rank]
    number = len(layout.parents) if most is None else min(most, len(layout.parents))
    whole = min(number, len(layout.parents) - len(adapters))
    sizes = sorted((low_rank[name][1] for name in adapters), reverse=True)[: number - whole]
    grounds = {low_rank[name][0] for name in adapters} - {*layout.parents}
    return _Held(whole + min(len(grounds), len(sizes)), len(sizes), sum(sizes))


def _forecast(
    placement: Placement,
    layout: Layout,
    kept: _Held,
    dtype: str | None,
    method: str | None,
    demand: Demand,
    cuda: bool,
) -> MemoryForecast:
    count, ranks = len(layout.parents), demand.ranks
    parents = layout_bytes(layout) * kept.whole + kept.beside_bytes
    live = layout_bytes(layout, dtype, demand.extra_layers)
    runtime = (resident_bytes() + _LATER_BYTES) * demand.processes
    fused = not cuda and _is_fused(layout, method)
    inputs = count if placement == "stream" or (cuda and placement == "host") else kept.adapters
    # Only loops are free of torch's own threads; and where memory is short, one tensor at a time.
    threads = demand.threads if fused and placement != "stream" and not kept.adapters else 1
    scratch = scratch_bytes(
        layout, dtype, method, fused=fused, on_device=cuda, inputs=inputs, threads=threads
    )
    if not cuda:
        known = _statistics(layout) if fused and method in RANKING_METHODS else 0
        held = 0 if placement == "stream" else parents
        share = Share(held * ranks, live, known * ranks, scratch * ranks, runtime)
        return MemoryForecast(placement, share)
    sizes = [size_bytes(spec) for spec in layout.tensors]
    pinned = sum(slabs(sizes)[1]) * kept.whole + kept.beside_bytes if placement == "host" else 0
    mapped = max(sizes, default=0) if placement == "stream" else 0
    host = Share(pinned * ranks, 0, 0, mapped * ranks, runtime)
    on_device = Share(
        parents if placement == "device" else 0, live // ranks, 0, scratch, 0, demand.beside_bytes
    )
    return MemoryForecast(placement, host, on_device)


def _is_fused(layout: Layout, method: str | None) -> bool:
    from agentmerge.merging.engines import has_fused

    doubles = any(spec.dtype == "float64" for spec in layout.tensors)
    return method is not None and has_fused(method) and not doubles


def _statistics(layout: Layout) -> int:
    """Orders of every expert's tensors."""
    from agentmerge.merging.loops.orders import order_bytes

    experts = max(1, len(layout.parents) - 1)
    return experts * sum(order_bytes(math.prod(spec.shape)) for spec in layout.tensors)


def _with_this_process(limit: Limit) -> Limit:
    """A forecast counts interpreter and libraries, which are there already."""
    return Limit(limit.size_bytes + resident_bytes(), limit.source)


def _short(
    forecast: MemoryForecast,
    workers: int,
    apart: bool,
    crowd: int,
    host: Limit,
    device: Limit | None,
) -> tuple[int, Limit] | None:
    """What ``workers`` of these need, and the limit that this exceeds; None where it fits.

    apart: this process is one more, without a model. crowd: workers on one device.
    """
    needed = forecast.host.total * workers + (forecast.host.runtime if apart else 0)
    spare = MARGIN * workers * (forecast.host.total - forecast.host.runtime)
    if needed + spare > host.size_bytes:
        return needed, host
    if forecast.device is not None and device is not None:
        needed = forecast.device.total * crowd
        if needed * (1 + MARGIN) > device.size_bytes:
            return needed, device
    return None


def _choice(
    shorts: Mapping[Placement, tuple[int, Limit] | None], asked: str, cuda: bool
) -> tuple[Placement | None, str]:
    for placement, short in shorts.items():
        if short is None and asked in ("auto", placement):
            why = [f"{_name(p, cuda)} {_said(s)}" for p, s in shorts.items() if s and p != asked]
            if asked != "auto":
                return placement, "as worker.placement says"
            return placement, "; ".join(why) or "it fits"
    lower = "worker.count, worker.dtype or the number of models"
    if asked != "auto":
        short = shorts.get(asked)  # type: ignore[call-overload]
        if short is None:
            return None, f"worker.placement: {asked} is not possible with this kind of worker"
        return None, (
            f"worker.placement: {asked} {_said(short)}; use auto, or lower {lower}, or free memory"
        )
    least = list(shorts.values())[-1]
    assert least is not None  # else it had been taken
    return None, (
        f"not enough memory: even with the parents streamed from their files, a search "
        f"{_said(least)}; lower {lower}, raise worker.memory_gb if it is set, or free memory"
    )


def _said(short: tuple[int, Limit] | None) -> str:
    if short is None:
        return "fits"
    needed, limit = short
    return (
        f"needs {needed / 1e9:.2f} GB and a tenth to spare, and {limit.size_bytes / 1e9:.2f} GB "
        f"are {_there(limit)}"
    )


def _there(limit: Limit) -> str:
    return f"allowed by {limit.source}" if limit.source.startswith("worker.") else limit.source


def _name(placement: Placement, cuda: bool) -> str:
    return "resident" if placement == "device" and not cuda else placement
