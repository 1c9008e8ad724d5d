"""The search on the fake worker that benchmarks of the program itself begin with."""

from __future__ import annotations

from typing import Any

GENOME = {
    "models": ["north", "south"],
    "base_model": "base",
    "merge_method": "task_arithmetic",
    "layer_granularity": 2,
}
TASKS = [{"name": "one", "metric": "acc,none"}, {"name": "two", "metric": "acc,none"}]


def fake_config(limit: int, **options: Any) -> dict[str, Any]:
    """A config's text as a mapping. limit: items a task. options: of the worker."""
    worker = {"kind": "fake", "options": {"base": "base"} | options}
    return {"genome": dict(GENOME), "tasks": list(TASKS), "limit": limit, "worker": worker}
