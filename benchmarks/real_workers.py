"""Real workers side by side: ``scale real``, candidates an hour of two against one.

Searches (``random``, a window of four) of the demo's family, ``hf`` workers of one thread each:
one in the search's own process, where it waits while the search does its own work; one and two in
processes of their own; two on a Ray cluster of this machine. Counted from the end of a search's
fourth candidate to that of its last, so that no start is in it. The four take turns, ``--seeds``
times. What several cores of a machine share (memory, caches, their clock) is in the figures.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from agentmerge.demo.family import cached_family
from agentmerge.demo.tasks import demo_search
from benchmarks.comparing import markdown
from benchmarks.kill import start
from benchmarks.machine import machine

PLACES: dict[str, dict[str, Any]] = {
    "one, here": {"host": "here", "count": 1},
    "one, process": {"host": "process", "count": 1},
    "two, process": {"host": "process", "count": 2},
    "two, ray": {"host": "ray", "count": 2},
}
SKILLS = ("shift", "sort")


def real(asked: argparse.Namespace) -> None:
    rates: dict[str, list[float]] = {place: [] for place in PLACES}
    for seed in range(asked.seed, asked.seed + asked.seeds):
        for place, worker in PLACES.items():
            rates[place].append(an_hour(worker, asked.evaluations, seed))
            print(f"seed {seed}, {place}: {rates[place][-1]:.0f} an hour", flush=True)
    alone = np.array(rates["one, process"])
    rows = [
        {
            "workers": place,
            "candidates an hour": round(float(np.median(found))),
            "of one": round(float(np.median(np.array(found) / alone)), 2),
            "least": round(float(np.min(np.array(found) / alone)), 2),
            "most": round(float(np.max(np.array(found) / alone)), 2),
        }
        for place, found in rates.items()
    ]
    print(markdown([list(rows[0]), *([str(value) for value in row.values()] for row in rows)]))
    print(json.dumps(machine(1)))


def an_hour(worker: dict[str, Any], evaluations: int, seed: int) -> float:
    """Candidates that a search of its own process ends in an hour of the clock."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        family = cached_family(SKILLS, 0)
        path = demo_search(family, folder, max_evaluations=evaluations, seed=seed, worker="hf")
        body = yaml.safe_load(path.read_text())
        body["search"] |= {"algorithm": "random", "lag": 4}
        body["worker"] |= worker
        path.write_text(yaml.safe_dump(body))
        env = {"OMP_NUM_THREADS": "1", "RAY_ADDRESS": "", "RAY_USAGE_STATS_ENABLED": "0"}
        process = start(folder / "runs", "run", str(path), "--name", "s", env=env)
        _, err = process.communicate()
        if process.returncode:
            raise SystemExit(f"a search ended with {process.returncode}: {err}")
        return counted(folder / "runs" / "s" / "log.jsonl")


def counted(log: Path) -> float:
    """Candidates an hour, by a search's log."""
    events = map(json.loads, log.read_text().splitlines())
    ends = sorted(event["time"] for event in events if event["event"] == "candidate")[3:]
    return 3600 * (len(ends) - 1) / float(ends[-1] - ends[0])
