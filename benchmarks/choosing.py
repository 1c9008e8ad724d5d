"""How an answer is chosen, and how often what is no better is called ahead: a simulation.

    python -m benchmarks.choosing                      # about half an hour on one core
    python -m benchmarks.choosing --searches 100 --rivals 1 --gains 0

Every candidate and every cheap rival of a search is right on the same share of all items in truth
(or every candidate on ``gain`` more). What each shows on the items asked is correlated, as merges
of one family are. "drawn" candidates are independent of each other; "climbing" ones are made as a
search makes them, each near the best so far, so that luck adds up. The choice by repeated splits
(after arXiv 2605.05973), the count of tries and the confirmation are the product's
(``agentmerge.search.choosing``), on arrays.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from agentmerge.evaluation.statistics import RESAMPLES, Leads, PairedTask, leads

SPLITS = 200
SHORTLIST = 5


def most_wins(
    values: np.ndarray, task: np.ndarray, rng: np.random.Generator, splits: int = SPLITS
) -> tuple[int, list[int]]:
    """(winner, halves won by each) of k candidates, ordered best first.

    values: (k, m), what each item adds to a candidate's score. task: (m,), each item's task; halves
    are drawn task by task, so that every half asks the same mix. A tie goes to the earlier.
    """
    votes = np.zeros(len(values), int)
    places = [np.flatnonzero(task == one) for one in np.unique(task)]
    for _ in range(splits):
        half = np.concatenate([rng.permutation(p)[: max(1, len(p) // 2)] for p in places])
        votes[int(np.argmax(values[:, half].sum(1)))] += 1
    return int(np.argmax(votes)), votes.tolist()


@dataclass(frozen=True)
class Asked:
    """Items of one part. task, weight: (m,), each item's task and what it weighs in the score."""

    task: np.ndarray
    weight: np.ndarray

    def leads(
        self, mine: np.ndarray, theirs: np.ndarray, seed: int, resamples: int = RESAMPLES
    ) -> Leads:
        """mine: (m, k) values, theirs: (m,)."""
        tasks = []
        for one in np.unique(self.task):
            at = self.task == one
            tasks.append(PairedTask(float(self.weight[at].sum()), mine[at], theirs[at]))
        found = leads(tasks, seed, resamples)
        assert found is not None, "too few items"
        return found


def beyond_noise(
    asked: Asked,
    tried: np.ndarray,
    winner: int,
    rivals: np.ndarray,
    seed: int,
    resamples: int = RESAMPLES,
) -> bool:
    """Whether the winner of those tried, (m, k), is ahead of each rival, (m, r), all counted."""
    return all(
        asked.leads(tried, rival, seed, resamples).at_least()[winner] > 0 for rival in rivals.T
    )


@dataclass(frozen=True)
class World:
    """What is searched. skill: share of items right in truth; differing: how unlike two merges are
    (0: the same items right; 1: independent). dimensions: of what candidates can vary in."""

    rivals: int
    gain: float
    climbing: bool
    candidates: int = 100
    search_items: int = 160
    sealed_items: int = 160
    skill: float = 0.6
    differing: float = 0.15
    dimensions: int = 12

    def search(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """(candidates, rivals): who is right where, (items, each), search items first."""
        size = self.search_items + self.sealed_items
        common = rng.normal(size=size) * np.sqrt(1 - self.differing)
        own = rng.normal(size=(size, self.dimensions)) * np.sqrt(self.differing)

        def right(point: np.ndarray, skill: float) -> np.ndarray:
            shown = common + own @ (point / np.linalg.norm(point))
            return (shown < NormalDist().inv_cdf(skill)).astype(float)

        def drawn() -> np.ndarray:
            return rng.normal(size=self.dimensions)

        rivals = [right(drawn(), self.skill) for _ in range(self.rivals)]
        points: list[np.ndarray] = []
        found: list[np.ndarray] = []
        for n in range(self.candidates):
            point = drawn()
            if self.climbing and n >= self.candidates // 5:
                best = max(range(n), key=lambda i: found[i][: self.search_items].sum())
                start = points[best] / np.linalg.norm(points[best])
                point = start + 0.5 * point / np.sqrt(self.dimensions)
            points.append(point)
            found.append(right(point, self.skill + self.gain))
        return np.stack(found, 1), np.stack(rivals, 1)


RULES = ("one pair", "counted", "handed out", "said")


def outcome(world: World, seed: int, resamples: int) -> dict[str, bool]:
    """Whether a searched merge is called ahead: by a 95 % interval of the pair, as if nothing had
    been chosen; all tries counted; after the sealed items; in the closing sentence."""
    rng = np.random.default_rng([seed, world.rivals])
    candidates, rivals = world.search(rng)
    n = world.search_items
    (tried, tried_sealed), (cheap, cheap_sealed) = ((v[:n], v[n:]) for v in (candidates, rivals))
    ranked = np.argsort(-tried.mean(0), kind="stable")
    first = int(np.argmax(cheap.mean(0)))
    asked, confirmed = (
        Asked(np.zeros(size, int), np.full(size, 1 / size)) for size in (n, world.sealed_items)
    )
    place, _ = most_wins(tried[:, ranked[:SHORTLIST]].T, asked.task, rng)
    winner = int(ranked[place])
    pair = asked.leads(tried[:, [winner]], cheap[:, first], seed, resamples).interval()
    counted = beyond_noise(asked, tried, winner, cheap, seed, resamples)
    gaps = tried_sealed[:, [winner]] - cheap_sealed
    handed_out = counted and float(gaps[:, first].mean()) > 0
    said = handed_out
    for rival in cheap_sealed.T:
        if said:
            mine = tried_sealed[:, [winner]]
            found = confirmed.leads(mine, rival, seed, resamples).interval()
            said = found is not None and found.low > 0
    return dict(zip(RULES, (bool(pair and pair.low > 0), counted, handed_out, said), strict=True))


def rates(world: World, searches: int, resamples: int = 1000) -> dict[str, float]:
    """Of so many searches, the share in which each rule calls a searched merge ahead."""
    found = [outcome(world, seed, resamples) for seed in range(searches)]
    return {rule: sum(one[rule] for one in found) / searches for rule in RULES}


def table(
    gains: Sequence[float], rivals: Sequence[int], kinds: Sequence[str], searches: int
) -> None:
    print("| candidates | rivals | true gain | one pair | tries counted | handed out | said |")
    print("|---|---|---|---|---|---|---|")
    for kind in kinds:
        for gain in gains:
            for count in rivals:
                found = rates(World(count, gain, kind == "climbing"), searches)
                cells = " | ".join(f"{100 * found[rule]:.1f} %" for rule in RULES)
                print(f"| {kind} | {count} | {gain:g} | {cells} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--searches", type=int, default=1000, help="of each kind")
    parser.add_argument("--rivals", type=int, nargs="+", default=[1, 3, 10])
    parser.add_argument("--gains", type=float, nargs="+", default=[0.0, 0.04, 0.08, 0.12])
    parser.add_argument("--kinds", nargs="+", default=["drawn", "climbing"])
    arguments = parser.parse_args()
    table(arguments.gains, arguments.rivals, arguments.kinds, arguments.searches)


if __name__ == "__main__":
    main()
