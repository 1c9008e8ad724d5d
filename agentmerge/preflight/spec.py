"""A worker from a config: its class, its spec, and what follows from the two before it is built.

Knows configs and folders of models; reads no weights and no tasks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentmerge import plugins
from agentmerge.config import MOST_WORKERS, SearchConfig
from agentmerge.contracts.worker import EngineInfo, Host, WorkerSpec
from agentmerge.errors import UserError
from agentmerge.parents.headers import chat_template, read_config, text_config
from agentmerge.preflight.faults import waits_for_all
from agentmerge.space.grouped import SearchSpace
from agentmerge.workers.kinds import worker_class
from agentmerge.workers.options import given
from agentmerge.workers.sharing import crowd_of, devices_for, fitting, host_class

if TYPE_CHECKING:  # read only where models are
    from agentmerge.merging.placement import MemoryPlan
    from agentmerge.parents.layout import Layout


#: Candidates in a window, a worker (``search.lag: auto``).
LAG_A_WORKER = 2


def known_class(config: SearchConfig) -> Any:
    """The class of the config's worker; None where it cannot be had, which is a fault by itself."""
    with suppress(UserError):
        return plugins.load("agentmerge.workers", config.worker.kind)
    return None


def spec_of(
    config: SearchConfig, paths: Mapping[str, Path], dtype: str, device: str | None = None
) -> WorkerSpec:
    """The spec of a worker on these folders.

    dtype, device: what it computes in and on; by default the config's device, or the fastest here.
    """
    spec = WorkerSpec(
        kind=config.worker.kind,
        parents=tuple((name, str(path)) for name, path in paths.items()),
        template_model=template_model(config, paths),
        tasks=config.tasks,
        dtype=dtype,
        batch_size=config.worker.batch_size,
        device=device or config.worker.device or _device(),
        matmul_precision=_matmul_precision(),
        trust_remote_code=config.worker.trust_remote_code,
        options={"base": config.genome.base_model} | _engine(config) | given(config.worker.options),
        method=config.genome.merge_method,
        methods={name: own.plain for name, own in (config.worker.methods or {}).items()},
        resident=config.genome.at_a_time,
    )
    return replace(spec, crowd=crowd_of(spec, config.worker.number, host_for(config)))


def counted(config: SearchConfig) -> SearchConfig:
    """The config with so many workers as its host has devices for, where they are to be counted.

    Raises:
        UserError: they cannot be.
    """
    worker = config.worker
    if worker.count == "auto":
        device = worker.device or _device()
        host = plugins.load("agentmerge.hosts", worker.host or "process")
        found = getattr(host, "room", None)
        number = max(1, min(MOST_WORKERS, found(worker, device))) if found else 1
        worker = worker.model_copy(update={"count": number})
    return config.model_copy(update={"worker": worker})


def buffered(
    config: SearchConfig, unfit: Callable[[SearchConfig], str]
) -> tuple[SearchConfig, list[str]]:
    """(the config with two workers a device, what is to be said), where ``worker.buffered`` asks
    for it: one merges while the other scores. unfit: why two do not fit, else ""."""
    worker = config.worker
    if not worker.buffered:
        return config, []
    single = config.model_copy(update={"worker": worker.model_copy(update={"buffered": False})})
    twice = {"buffered": False, "count": min(MOST_WORKERS, 2 * worker.number)}
    double = config.model_copy(update={"worker": worker.model_copy(update=twice)})
    host, name = host_for(double), repr(worker.host)
    if getattr(host, "places", False):
        why = f"worker.host {name} gives each worker devices of its own"
    elif not host.apart:
        why = f"with worker.host {name} one worker lives in this process; use process"
    else:
        why = unfit(double)
    if why:
        return single, [f"worker.buffered: one model a device, since {why}"]
    return double, []


def windowed(config: SearchConfig) -> SearchConfig:
    """The config, its workers counted and doubled, with a window of twice as many candidates where
    that follows from them; without one where it can have none."""
    search = config.search
    if search.lag and waits_for_all(config):
        search = search.model_copy(update={"lag": None})
    elif search.lag == "auto":
        search = search.model_copy(update={"lag": LAG_A_WORKER * config.worker.number})
    return config.model_copy(update={"search": search})


def host_for(config: SearchConfig) -> type[Host]:
    worker = config.worker
    return host_class(worker.host, worker.number, worker.timeout_s)


def _engine(config: SearchConfig) -> dict[str, Any]:
    worker = config.worker
    given: dict[str, Any] = {"engine_args": worker.engine_args} if worker.engine_args else {}
    kind, layers = known_class(config), config.genome.layers
    if getattr(kind, "has_canary", False):
        given |= {"canary_every": worker.canary_every}
    if layers is not None and getattr(kind, "fixed_depth", False):
        given |= {"extra_layers": layers.most}
    return given


def template_model(config: SearchConfig, paths: Mapping[str, Path]) -> str:
    """Whose tokenizer asks: ``tokenizer_source`` where it names a parent, else the first expert
    that has a chat template, else the base, else the first expert."""
    source = config.genome.tokenizer_source
    if source == "base":
        source = config.genome.base_model
    if source in paths:
        return str(source)
    names = list(config.genome.parents)
    if config.tasks.apply_chat_template:
        for name in names:
            if name in paths and chat_template(paths[name]):
                return name
    return next(name for name in names if name in paths)


def _matmul_precision() -> str:
    """torch's, where this process has torch: else nobody can have set it."""
    torch: Any = sys.modules.get("torch")
    return torch.get_float32_matmul_precision() if torch else "highest"


def _device() -> str:
    from agentmerge.merging.memory import cuda_devices

    return "cuda" if cuda_devices() else "cpu"


def base_among(config: SearchConfig, names: Collection[str]) -> str | None:
    base = config.genome.base_model
    return base if base in names else None


def engine_of(spec: WorkerSpec) -> tuple[EngineInfo, dict[str, Any]]:
    """What the spec's worker is, and the conditions that it answers under, where it has any."""
    kind = worker_class(spec)
    known = getattr(kind, "conditions", None)
    return kind.describe(spec), known(spec) if known else {}


def memory_of(
    config: SearchConfig,
    spec: WorkerSpec,
    layout: Layout,
    low_rank: Mapping[str, tuple[str, int]],
) -> MemoryPlan:
    """Where the parents are kept, decided once for all workers: each alone would see what the
    others have not taken yet. low_rank: as ``plan_memory`` has it."""
    from agentmerge.merging.placement import (
        Demand,
        bytes_per_token,
        gradient_bytes_per_token,
        plan_memory,
    )

    kind, worker, host = worker_class(spec), config.worker, host_for(config)
    number = worker.number
    if getattr(host, "places", False) and spec.device != "cpu":  # each node as if it were this one
        number = min(number, fitting(spec))
    demand = getattr(kind, "demand", None)
    text = text_config(read_config(Path(dict(spec.parents)[spec.template_model])))
    wanted = demand(spec, layout) if demand else Demand()
    extra, learning = _extra_layers(config, kind, layout.num_layers)
    if extra:  # of the deepest stack, as if none of its layers were a parent's own
        wanted = replace(wanted, extra_layers=extra)
    has_gradient = hasattr(kind, "gradient")
    return plan_memory(
        layout,
        dtype=spec.dtype,
        device=spec.device,
        method=spec.method,
        workers=number,
        apart=host.apart,
        devices=number if spec.crowd == 1 else len(set(devices_for(spec, number))),
        demand=wanted,
        asked=worker.placement,
        memory_gb=worker.memory_gb,
        most=spec.resident,
        # An engine that shares a device's memory out counts whole models, and whether a GPU gives a
        # checkpoint's bits out of factors is found out when it is opened.
        low_rank={} if wanted.beside_bytes or spec.device.startswith("cuda") else low_rank,
        token_bytes=bytes_per_token(_deeper(text, extra), spec.dtype),
        gradient_token_bytes=gradient_bytes_per_token(_deeper(text, learning), spec.dtype)
        if has_gradient
        else 0,
    )


def _extra_layers(config: SearchConfig, kind: Any, num_layers: int) -> tuple[int, int]:
    """How many more than the models' (the deepest stack has, a gradient's pass runs): of layers
    that stand beside the merge's, absent ones too."""
    layers, genome = config.genome.layers, config.genome
    if layers is None:
        return 0, 0
    most = learning = layers.most
    with suppress(UserError):  # which is a fault by itself
        pool = genome.experts if genome.pool else ()
        space = SearchSpace(genome, num_layers, outputs=("attention", "mlp"), pool=pool)
        stacks = replace(space, under=space.uniform()[0]).stacks
        assert stacks is not None
        most = space.deeper
        learning = most if layers.path else len(stacks.positions) - num_layers
    # An engine of one depth is built for what a recipe may have, whatever is searched.
    return layers.most if getattr(kind, "fixed_depth", False) else most, learning


def _deeper(text: Mapping[str, Any], extra: int) -> dict[str, Any]:
    own = text.get("num_hidden_layers")
    return {**text, "num_hidden_layers": own + extra} if own else {**text}
