"""What a problem of the tiny suite has to give: descent on the sealed items themselves.

    python -m benchmarks.ceiling --problems tiny-so-8,tiny-so-24 --seeds 3

No search may do this. From the best answer of a suite's runs where --out names them, and from the
best cheap rival, Adam descends the mean log(1 + exp(-margin)) of the sealed items; printed is the
best sealed score seen on the way. A search's goal beyond it cannot be reached.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from agentmerge.testing.tiny import TINY, TinyProblem

RATE, BETA1, BETA2 = 0.03, 0.9, 0.99


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ceiling", description=__doc__)
    parser.add_argument("--problems", default="tiny-so-8,tiny-so-24")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, help="a suite's results, whose answers are starts too")
    asked = parser.parse_args()
    for name in asked.problems.split(","):
        found = []
        for seed in range(asked.seeds):
            problem = TinyProblem(TINY[name], seed)
            starts = [best_rival(problem), *answers(asked.out, name, seed)]
            found.append(max(descended(problem, start, asked.steps) for start in starts))
            print(f"{name} seed {seed}: {found[-1]:.4f} from {len(starts)} starts", flush=True)
        print(f"{name}: median {np.median(found):.4f} of {asked.seeds} seeds", flush=True)


def best_rival(problem: TinyProblem) -> tuple[float, ...]:
    points = [point for _, _, point in problem.first_points()]
    return max(points, key=lambda point: problem.evaluate(point).score or 0.0)


def answers(out: Path | None, name: str, seed: int) -> list[tuple[float, ...]]:
    """The best answer of every arm's run of this seed."""
    found = []
    for path in sorted((out / "runs").glob(f"{name}--*--{seed}--*.json") if out else ()):
        found.append(json.loads(path.read_text())["answers"]["chosen"])
    found.sort(key=lambda answer: -answer["sealed"])
    return [tuple(answer["vector"]) for answer in found[:1]]


def descended(problem: TinyProblem, start: Sequence[float], steps: int) -> float:
    """The best sealed score on the way."""
    point, rows = np.array(start), problem.sealed_rows()
    mean = square = np.zeros(len(point))
    best = 0.0
    for step in range(1, steps + 1):
        _, slope, right = problem.descent(tuple(point), rows)
        best = max(best, float(right.mean()))
        mean = BETA1 * mean + (1 - BETA1) * np.array(slope)
        square = BETA2 * square + (1 - BETA2) * np.array(slope) ** 2
        move = (mean / (1 - BETA1**step)) / (np.sqrt(square / (1 - BETA2**step)) + 1e-12)
        point = np.clip(point - RATE * move, 0.0, 1.0)
    return best


if __name__ == "__main__":
    main()
