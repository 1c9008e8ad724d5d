"""What it costs a search to propose while candidates are still at work: ``scale quality``.

Searches of ``auto`` on the tiny families whose proposals know all but the last L = 2 W candidates,
for W workers; one worker knows all. What is believed of a pending candidate is the product's, or
one of ``BELIEFS``. When each candidate ends is worked out afterwards, on a virtual clock.
"""

from __future__ import annotations

import argparse
import heapq
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from agentmerge.contracts.strategy import Proposal, next_generation
from agentmerge.strategies import auto, margins
from agentmerge.strategies.auto import Auto
from agentmerge.strategies.margins import Prospect
from agentmerge.testing.tiny import TINY, TinyProblem
from benchmarks.comparing import markdown, median_interval, of_arm
from benchmarks.running import Arm, best_at, run_suite

#: The lower quartile of a standard normal.
QUARTILE = -0.6745
Belief = Callable[[Prospect, np.ndarray], Prospect]


def ignored(prospect: Prospect, points: np.ndarray) -> Prospect:
    return prospect


def lower(prospect: Prospect, points: np.ndarray) -> Prospect:
    """As if each point in turn had shown the lower quartile of what is expected, item by item."""
    for point in points:
        means, deviation = prospect.model.predict(point[None])
        worse = np.sign(prospect.score.slope(means[0])) * prospect.model.spread
        model = prospect.model.told(point[None], means + QUARTILE * deviation[:, None] * worse)
        prospect = replace(prospect, model=model)
    return prospect


class Believing(Auto):
    """``auto`` with another belief of what is pending. bold: how much of the model's deviation
    counts is drawn for each slot."""

    def __init__(self, belief: Belief, bold: bool = False) -> None:
        super().__init__(gradients_from=None)
        self._belief, self._bold = belief, bold

    def propose(self, space: Any, history: Any, *rest: Any) -> list[Proposal]:
        prospect_for = margins.prospect_for
        drawn = np.random.default_rng(next_generation(history)).exponential() if self._bold else 1.0

        def found(*asked: Any) -> Prospect | None:
            prospect = prospect_for(*asked)
            bolder = prospect and drawn * prospect.exploration
            return prospect and replace(prospect, exploration=bolder)

        with (
            mock.patch.object(margins, "believed", self._belief),
            mock.patch.object(auto, "prospect_for", found),
        ):
            return super().propose(space, history, *rest)


BELIEFS = {
    "mean": partial(Auto, gradients_from=None),
    "ignored": partial(Believing, ignored),
    "lower": partial(Believing, lower),
    "bold": partial(Believing, ignored, bold=True),
}


def arms_of(workers: Sequence[int], beliefs: Sequence[str]) -> list[Arm]:
    """One a number of workers and belief, and one worker that knows all."""
    found = [Arm("1", BELIEFS["mean"])]
    for belief in beliefs:
        found += [Arm(f"{w} {belief}", BELIEFS[belief], lag=2 * w) for w in workers if w > 1]
    return found


def ends(run: dict[str, Any], workers: int, cv: float = 0.3) -> list[float]:
    """When each candidate ends, its mean duration being 1; one that waits takes the first free
    worker, and none is proposed before what it is to know has ended."""
    rng, room = np.random.default_rng(run["seed"]), 2 * workers - 1 if workers > 1 else 0
    sigma = float(np.sqrt(np.log1p(cv**2)))
    first = sum(p["generation"] == 0 for p in run["points"])
    free, done, proposed = [0.0] * workers, list[float](), 0.0
    for at in range(len(run["points"])):
        if at >= first:
            proposed = max([proposed, *done[: max(first, at - room)]])
        begun = max(proposed, heapq.heappop(free))
        done.append(begun + float(rng.lognormal(-(sigma**2) / 2, sigma)))
        heapq.heappush(free, done[-1])
    return done


def best_after(run: dict[str, Any], workers: int, time: float) -> float:
    scores = [
        p["score"]
        for p, end in zip(run["points"], ends(run, workers), strict=True)
        if end <= time and p["score"] is not None
    ]
    return max(scores, default=0.0)


def quality(asked: argparse.Namespace) -> None:
    makes = {name: partial(TinyProblem, TINY[name]) for name in asked.problems}
    arms = arms_of(asked.workers, asked.beliefs)
    seeds = range(asked.seed, asked.seed + asked.seeds)
    run_suite(makes, arms[:1], seeds, asked.evaluations // 4, asked.out)  # what less time brings
    runs = run_suite(makes, arms, seeds, asked.evaluations, asked.out)
    print(table(runs, list(makes)))


def table(runs: Sequence[dict[str, Any]], problems: Sequence[str]) -> str:
    """Scores at equal evaluations, the paired difference of the sealed one to one worker's, and the
    search score after an eighth of one worker's time."""
    rows = [["problem", "workers", "seeds", "search", "sealed", "less one's", "95 %", "ends at",
             "search at 1/8"]]  # fmt: skip
    for problem in problems:
        alone = of_arm(runs, problem, "1")
        for arm in dict.fromkeys(r["arm"] for r in runs):
            mine = of_arm(runs, problem, arm)
            seeds = sorted(set(mine) & set(alone))
            if not seeds:
                continue
            workers = int(arm.split()[0])
            gaps = np.array([sealed(mine[s]) - sealed(alone[s]) for s in seeds])
            low, high = median_interval(gaps)
            early = [best_after(mine[s], workers, mine[s]["budget"] / 8) for s in seeds]
            rows.append(
                [problem, arm, str(len(seeds))]
                + [f"{np.median([f(mine[s]) for s in seeds]):.3f}" for f in (found_by_end, sealed)]
                + [f"{np.median(gaps):+.3f}", f"{low:+.3f} to {high:+.3f}"]
                + [f"{np.median([max(ends(mine[s], workers)) for s in seeds]):.0f}"]
                + [f"{np.median(early):.3f}"]
            )
    return markdown(rows)


def found_by_end(run: dict[str, Any]) -> float:
    return best_at(run, run["budget"])


def sealed(run: dict[str, Any]) -> float:
    return float(run["answers"]["chosen"]["sealed"])


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--problems", nargs="+", default=["tiny-so-8", "tiny-rs-8"])
    parser.add_argument("--beliefs", nargs="+", choices=list(BELIEFS), default=["mean"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmark-results"))
