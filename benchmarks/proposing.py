"""What one proposal of ``auto`` takes after a long search: ``scale proposal``.

Histories are of random points whose items answer by a smooth margin each; the last of them are
pending, as beside many workers.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np

from agentmerge.config import GenomeConfig
from agentmerge.contracts.strategy import Evidence, Items, Observation, rng_factory
from agentmerge.space.grouped import SearchSpace
from agentmerge.strategies.auto import Auto


def history(space: SearchSpace, count: int, items: int, pending: int) -> list[Observation]:
    rng = np.random.default_rng(0)
    best, steep = rng.random((items, space.dimensions)), rng.gamma(2.0, 3.0, items)
    table = Items(np.zeros(items, int), np.full(items, 1.0 / items), np.ones(items, bool))
    found = []
    for generation in range(count):
        point = rng.random(space.dimensions)
        margins = 2.0 - steep * ((point - best) ** 2).mean(1)
        values = (margins > 0).astype(float)
        at_work = generation >= count - pending
        found.append(
            Observation(
                generation,
                0,
                tuple(float(x) for x in point),
                "margins",
                None if at_work else float(values.mean()),
                recipe_hash=str(generation),
                evidence=None if at_work else Evidence(table, margins, values),
                space=space.key,
                pending=at_work,
            )
        )
    return found


def proposal(asked: argparse.Namespace) -> None:
    genome = GenomeConfig(
        models=("north", "south"),
        base_model="base",
        merge_method="task_arithmetic",
        layer_granularity=1,
        normalize=False,
    )
    space = SearchSpace(genome, 4, "float32")
    for workers in asked.workers:
        lag = 2 * workers - 1 if workers > 1 else 0
        told = history(space, asked.evaluations, asked.items, lag)
        began, used = time.perf_counter(), time.process_time()
        Auto().propose(space, told, None, 1, rng_factory(0))
        row = {"evaluations": asked.evaluations, "items": asked.items, "pending": lag}
        row |= {"processor_s": round(time.process_time() - used, 2)}
        print(json.dumps(row | {"clock_s": round(time.perf_counter() - began, 2)}), flush=True)
