"""What a search begins with besides its config, and whether old and new scores compare."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from agentmerge.config import SearchConfig
from agentmerge.preflight.plan import Prepared


def changed_facts(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What changed since a search began, one phrase each."""
    found = []
    for model, fingerprint in old["identities"].items():
        if new["identities"].get(model) != fingerprint:
            found.append(f"the weights of {model!r} changed")
    for task, protocol in old["protocols"].items():
        if new["protocols"].get(task) != protocol:
            found.append(f"the definition of task {task!r} changed")
        elif new["items"].get(task) != old["items"].get(task):
            found.append(f"the items of task {task!r} changed")
    if new["dtype"] != old["dtype"]:
        found.append(f"the dtype changed from {old['dtype']} to {new['dtype']}")
    for key, value in old["engine"].items():
        if new["engine"].get(key) != value and key != "conditions":
            found.append(f"the engine's {key} changed from {value} to {new['engine'].get(key)}")
    return found + _changed_conditions(old, new)


def _changed_conditions(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    if old["engine"].get("conditions", "") == new["engine"].get("conditions", ""):
        return []
    if not old["engine"].get("conditions"):
        return [
            "what answers depend on besides the weights (the model's settings and code, the "
            "environment) has become part of the key of results, and was not recorded"
        ]
    from agentmerge.workers.conditions import changed

    return changed(old["conditions"], new["conditions"])


def arithmetic() -> dict[str, Any]:
    """What decides the last digits of a strategy's linear algebra on this machine: threads and
    kernels of numpy's BLAS. No result depends on it, but what is proposed next may."""
    import numpy  # noqa: F401  # loads its library
    from threadpoolctl import threadpool_info

    found = [pool for pool in threadpool_info() if pool["user_api"] == "blas"]
    return {
        "threads": max((int(pool["num_threads"]) for pool in found), default=1),
        "kernels": sorted({str(pool.get("architecture")) for pool in found}),
    }


#: Of the worker's settings: where it works and how long, which change no answer; and what merges
#: are made by, which their recipes say.
_WHERE = {"timeout_s", "buffered", "host", "ray_address", "paths", "methods"}


def settings_hash(prepared: Prepared) -> str:
    """What decides a search's course, for comparing and for time estimates."""
    config = prepared.config
    body = {
        "genome": config.genome.model_dump(mode="json"),
        "tasks": config.tasks.model_dump(mode="json"),
        "worker": config.worker.model_dump(mode="json", exclude=_WHERE),
        "facts": prepared.facts(),
    }
    return sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]


def answers(facts: Mapping[str, Any], config: SearchConfig) -> Any:
    """What decides a candidate's score: where it differs, old scores cannot be compared."""
    kept = {key: facts[key] for key in ("identities", "protocols", "dtype", "engine")}
    items = {task: found["search_hash"] for task, found in facts["items"].items()}
    return kept, items, [(task.name, task.weight) for task in config.tasks.tasks]
