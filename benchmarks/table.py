"""``python -m benchmarks.table``: a problem's answers at many points, as one file.

    python -m benchmarks.table --points 20000 --out build/table.npz

Goes on where it was stopped: the file is replaced every few hundred points.
``agentmerge.testing.stored`` reads it, and says how its points are chosen.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from agentmerge.testing.problems import problem
from agentmerge.testing.stored import StoredProblem, grown


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__)
    parser.add_argument("--problem", default="tiny-so-8")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--points", type=int, default=20_000)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args(arguments)
    there = problem(asked.problem, asked.seed)
    known = StoredProblem.read(asked.out) if asked.out.is_file() else None
    if known and (known.about["name"], known.about["seed"]) != (asked.problem, asked.seed):
        parser.error(f"{asked.out} is of {known.about['name']}, seed {known.about['seed']}")
    before = time.perf_counter()
    for table in grown(there, asked.seed, asked.points, known):
        table.write(asked.out)
        size, took = asked.out.stat().st_size / 2**20, time.perf_counter() - before
        print(f"{len(table.points)} points, {size:.1f} MiB, {took:.0f} s", flush=True)


if __name__ == "__main__":
    main()
