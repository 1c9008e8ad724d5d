"""Finds tasks by a word, and says which metrics each has, from task files alone; reads no data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentmerge.config import TaskConfig, TasksConfig
from agentmerge.evaluation.loading import load_index, mentioning

#: lm-eval's own metrics where a task names none, by the type of its requests.
_DEFAULTS: Mapping[str, Sequence[tuple[str, bool]]] = {
    "multiple_choice": (("acc", True), ("acc_norm", True)),
    "loglikelihood": (("perplexity", False), ("acc", True)),
    "loglikelihood_rolling": (
        ("word_perplexity", False),
        ("byte_perplexity", False),
        ("bits_per_byte", False),
    ),
    "generate_until": (("exact_match", True),),
}


@dataclass(frozen=True, slots=True)
class TaskEntry:
    """A task, group or tag. metrics: ("name,filter", higher is better), as a config names them."""

    name: str
    kind: str
    metrics: tuple[tuple[str, bool], ...]
    dataset: str = ""
    members: tuple[str, ...] = ()


def search_tasks(word: str, task_search_path: Sequence[str] = ()) -> list[TaskEntry]:
    """Every task, group and tag with ``word`` in its name or data set; nearest names first.

    Raises:
        TaskError: a search path that is no directory.
    """
    index = mentioning(word, task_search_path)
    wanted = word.lower()
    found = [
        _entry(name, entry)
        for name, entry in index.items()
        if wanted in name.lower() or wanted in _dataset(entry.cfg or {}).lower()
    ]
    return sorted(found, key=lambda e: (wanted not in e.name.lower(), len(e.name), e.name))


def task_entries(names: Sequence[str], task_search_path: Sequence[str] = ()) -> list[TaskEntry]:
    """The tasks of these names that exist, in their order."""
    index = _index(task_search_path, names)
    return [_entry(name, index[name]) for name in names if name in index]


def _index(task_search_path: Sequence[str], names: Sequence[str]) -> Any:
    tasks = [TaskConfig(name=name) for name in names]
    return load_index(TasksConfig(tasks=tuple(tasks), task_search_path=tuple(task_search_path)))


def _entry(name: str, entry: Any) -> TaskEntry:
    cfg = entry.cfg or {}
    kind = entry.kind.name.lower()
    if kind == "group":
        metrics = tuple(
            (f"{found['metric']},{filter_}", True)
            for found in _listed(cfg.get("aggregate_metric_list"))
            for filter_ in _filters(found.get("filter_list"))
        )
        members = cfg.get("task") or []
        named = [m if isinstance(m, str) else str(m.get("task")) for m in _listed(members)]
        return TaskEntry(name, kind, metrics, "", tuple(named))
    if kind == "tag":
        return TaskEntry(name, kind, (), "", tuple(sorted(entry.tags)))
    return TaskEntry(name, kind, _metrics(cfg), _dataset(cfg))


def _metrics(cfg: Mapping[str, Any]) -> tuple[tuple[str, bool], ...]:
    listed = [
        (_named(found["metric"]), _higher(found))
        for found in _listed(cfg.get("metric_list"))
        if isinstance(found, dict) and isinstance(found.get("metric"), str)
    ]
    named = listed or list(_DEFAULTS.get(str(cfg.get("output_type")), ()))
    filters = [
        str(found["name"])
        for found in _listed(cfg.get("filter_list"))
        if isinstance(found, dict) and "name" in found
    ] or ["none"]
    return tuple((f"{name},{filter_}", higher) for name, higher in named for filter_ in filters)


def _named(metric: str) -> str:
    """A metric's name; a function of the task's own is listed by its file, and named after it."""
    return metric.rpartition(".")[2] if "/" in metric else metric


def _higher(metric: Mapping[str, Any]) -> bool:
    """As the task says, else as lm-eval has it for a metric of that name."""
    from lm_eval.api.registry import HIGHER_IS_BETTER_REGISTRY

    given = metric.get("higher_is_better")
    return bool(HIGHER_IS_BETTER_REGISTRY.get(metric["metric"], True) if given is None else given)


def _filters(given: Any) -> list[str]:
    if isinstance(given, str):
        return [given]
    return [str(name) for name in given] if isinstance(given, list) and given else ["none"]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _dataset(cfg: Mapping[str, Any]) -> str:
    return " ".join(str(cfg[key]) for key in ("dataset_path", "dataset_name") if cfg.get(key))
