"""A process of its own that loads merges with an hf worker and says how much memory that took.

Run by ``test_memory.py``: one JSON argument in, one JSON line out.
"""

from __future__ import annotations

import json
import resource
import sys
from dataclasses import replace
from pathlib import Path

from agentmerge.config import TasksConfig
from agentmerge.contracts.worker import WorkerSpec
from agentmerge.evaluation.tasks import TaskSet
from agentmerge.merging.placement import plan_memory
from agentmerge.parents.layout import read_layout
from agentmerge.recipe import Recipe
from agentmerge.workers.hf import HfWorker


def status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) * 1024


def main() -> None:
    asked = json.loads(sys.argv[1])
    paths = {name: Path(path) for name, path in asked["parents"].items()}
    layout = read_layout(paths, "base")
    recipes = [Recipe.parse(text).canonical(layout.num_layers) for text in asked["recipes"]]
    if asked["address_space"] is not None:
        limit = status("VmSize") + asked["address_space"]
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    spec = WorkerSpec(
        kind="hf",
        parents=tuple((name, str(path)) for name, path in paths.items()),
        template_model="base",
        tasks=TasksConfig(tasks=["none"]),
        dtype="bfloat16",
        batch_size=1,
        options={"base": "base", "threads": asked["threads"]},
    )
    plan = plan_memory(
        layout,
        dtype="bfloat16",
        method=recipes[0].merge_method,
        demand=HfWorker.demand(spec, layout),
        asked=asked["placement"],
        memory_gb=asked["memory_gb"],
    )
    spec = replace(spec, placement=plan.placement)
    worker = HfWorker(spec, TaskSet((), ()))
    digests = [worker.load(recipe).digest for recipe in recipes]
    share = next(f.host for f in plan.forecasts if f.placement == plan.chosen)
    found = {
        "placement": plan.chosen,
        "reason": plan.reason,
        "digests": digests,
        "forecast": share.total,
        "runtime": share.runtime,
        "peak": status("VmHWM"),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
