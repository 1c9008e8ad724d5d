"""Finds workers, strategies, spaces and whatever else is a plugin by name.

A plugin is an entry point of an installed package, in one of the groups below; what ships with
agentmerge is registered the same way, here. Nothing is imported before it is asked for.

    # pyproject.toml of a plugin
    [project.entry-points."agentmerge.strategies"]
    my_search = "my_package.search:STRATEGY"

``examples/plugin`` is a package with one of each; docs/plugins.md says what each promises.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from agentmerge.errors import UserError

_BUILT_IN: dict[str, dict[str, str]] = {
    "agentmerge.workers": {
        "hf": "agentmerge.workers.hf:HfWorker",
        "disk": "agentmerge.workers.disk:DiskWorker",
        "vllm": "agentmerge.workers.vllm.worker:VllmWorker",
        "fake": "agentmerge.workers.fake:FakeWorker",
    },
    "agentmerge.hosts": {
        "here": "agentmerge.workers.hosts.here:Here",
        "process": "agentmerge.workers.hosts.process:Processes",
        "ray": "agentmerge.workers.hosts.ray:RayHost",
        "ray_serial": "agentmerge.workers.hosts.ray:RaySerial",
    },
    "agentmerge.strategies": {
        "llm_evo": "agentmerge.strategies.llm_evo:STRATEGY",
        "random": "agentmerge.strategies.random:STRATEGY",
        "cma_es": "agentmerge.strategies.cma_es:STRATEGY",
        "auto": "agentmerge.strategies.auto:STRATEGY",
        "gradient": "agentmerge.strategies.gradient:STRATEGY",
        "margins": "agentmerge.strategies.margins:STRATEGY",
        "null_llm": "agentmerge.strategies.null_llm:STRATEGY",
        "one_plus_one": "agentmerge.strategies.one_plus_one:STRATEGY",
        "sobol": "agentmerge.strategies.sobol:STRATEGY",
        "tpe": "agentmerge.strategies.tpe:STRATEGY",
    },
    "agentmerge.spaces": {
        "weights": "agentmerge.space.weights:WeightForm",
        "slerp": "agentmerge.space.slerp:SlerpForm",
    },
    "agentmerge.trackers": {
        "wandb": "agentmerge.report.wandb:WandbTracker",
        "mlflow": "agentmerge.report.mlflow:MlflowTracker",
    },
    "agentmerge.methods": {},
    "agentmerge.models": {},
    "agentmerge.scorers": {},
}


def known(group: str) -> dict[str, EntryPoint]:
    """Every plugin of a group by name, built-ins first.

    Raises:
        UserError: no such group, or two packages claim one name.
    """
    if group not in _BUILT_IN:
        raise UserError(f"no plugin group {group!r}; there are {', '.join(_BUILT_IN)}")
    own = [EntryPoint(name, value, group) for name, value in _BUILT_IN[group].items()]
    found: dict[str, EntryPoint] = {}
    for point in [*own, *_installed(group, tuple(sys.path))]:
        first = found.setdefault(point.name, point)
        if first.value != point.value:
            raise UserError(
                f"two {group} are called {point.name!r}: {first.value} and {point.value}; "
                "uninstall the package of one"
            )
    return found


@cache
def _installed(group: str, path: Sequence[str]) -> Sequence[EntryPoint]:
    """A group's entry points of all packages on ``path``: finding them reads every one's files."""
    return tuple(entry_points(group=group))


def named(group: str, name: str) -> EntryPoint:
    """Where the object is that ``name`` stands for; nothing is imported.

    Raises:
        UserError: unknown, with the known names.
    """
    found = known(group)
    if name not in found:
        near = difflib.get_close_matches(name, found, 1, 0.6)
        hint = f"did you mean {near[0]!r}? " if near else ""
        kind = group.rpartition(".")[2]
        raise UserError(
            f"{name!r} is not one of the {kind}; {hint}"
            f"known: {', '.join(found) or 'none installed'}"
        )
    return found[name]


def load(group: str, name: str) -> Any:
    """The object that ``name`` stands for.

    Raises:
        UserError: unknown, with the known names; or its package cannot be imported.
    """
    point = named(group, name)
    try:
        return point.load()
    except ImportError as error:
        raise UserError(
            f"{name!r} ({point.value}) cannot be imported: {error}; install what it needs"
        ) from error
