"""Where a search's workers live, and how its devices are shared out among them.

Knows hosts by their names alone and builds none before it is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from agentmerge import plugins
from agentmerge.config import WorkerSettings
from agentmerge.contracts.worker import Host, WorkerSpec


def devices_for(spec: WorkerSpec, count: int, host: type[Host] | None = None) -> list[str]:
    """The device of each of ``count`` workers: where only ``cuda`` is asked for, they take turns
    (each as many in a row as its engine has ranks), unless their host gives each its own."""
    if spec.device != "cuda" or count == 1 or getattr(host, "places", False):
        return [spec.device] * count
    places = fitting(spec)
    return [f"cuda:{worker % places * spec.ranks}" for worker in range(count)]


def fitting(spec: WorkerSpec) -> int:
    """For how many such workers this machine has GPUs, one at least."""
    from agentmerge.merging.memory import cuda_devices

    return max(1, cuda_devices() // spec.ranks)


def host_class(name: str | None, count: int, timeout_s: float | None) -> type[Host]:
    """Where workers live: by default one without a deadline in this process, others in a process
    each."""
    default = "here" if count == 1 and timeout_s is None else "process"
    found: type[Host] = plugins.load("agentmerge.hosts", name or default)
    return found


def host_of(settings: WorkerSettings) -> Callable[[int], Host]:
    """What makes the host of a config's workers, given their number."""
    found = host_class(settings.host, settings.number, settings.timeout_s)
    settled: Any = getattr(found, "settled", None)
    make: Callable[[int], Host] = found if settled is None else settled(settings)
    return make


def crowd_of(spec: WorkerSpec, count: int, host: type[Host] | None = None) -> int:
    """How many of ``count`` workers share the fullest device."""
    if spec.device != "cpu" and getattr(host, "places", False):
        return 1
    devices = devices_for(spec, count)
    return max(map(devices.count, devices))
