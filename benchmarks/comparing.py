"""What the runs of a suite say: medians, paired tests, bootstrap intervals. Needs scipy.

Pairs are runs of the same problem and seed. Differences of two arms: Wilcoxon's signed-rank test,
p-values by Holm over the comparisons of one problem, and a bootstrap interval of the median.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from scipy.stats import wilcoxon

from benchmarks.running import CHECKPOINTS, best_at

RESAMPLES = 2000
Runs = Sequence[dict[str, Any]]
Figure = Callable[[dict[str, Any]], float]
Pairs = tuple[str, str, np.ndarray, np.ndarray, float]


def of_arm(runs: Runs, problem: str, arm: str) -> dict[int, dict[str, Any]]:
    return {r["seed"]: r for r in runs if r["problem"] == problem and r["arm"] == arm}


def table(runs: Runs) -> str:
    """One row a problem and arm: seeds, medians of the search score on the way, sealed scores."""
    steps = [k for k in CHECKPOINTS if k <= max(r["budget"] for r in runs)]
    head = ["problem", "arm", "seeds", *(f"@{k}" for k in steps), "sealed", "spent"]
    rows = [head]
    for problem, arm in dict.fromkeys((r["problem"], r["arm"]) for r in runs):
        mine = list(of_arm(runs, problem, arm).values())
        sealed = [r["answers"]["chosen"]["sealed"] for r in mine]
        rows.append(
            [problem, arm, str(len(mine))]
            + [f"{np.median([best_at(r, k) for r in mine]):.3f}" for k in steps]
            + [f"{np.median(sealed):.4f}", f"{np.median([r['spent'] for r in mine]):.0f}"]
        )
    return markdown(rows)


def comparisons(runs: Runs, against: str) -> str:
    """Every arm against one, on sealed error (1 - score): ratio of medians, difference, p."""
    head = ["problem", "arm", "pairs", f"sealed error / {against}'s", "95 %", "difference"]
    rows = [[*head, "95 %", "p (Holm)"]]
    for problem, arm, a, b, p in _pairs(runs, against, _sealed, _sealed):
        low, high = median_interval(a - b)
        least, most = ratio_interval(1 - a, 1 - b)
        ratio = (1 - np.median(a)) / max(1 - np.median(b), 1e-9)
        rows.append(
            [problem, arm, str(len(a)), f"{ratio:.2f}", f"{least:.2f} to {most:.2f}",
             f"{np.median(a - b):+.4f}", f"{low:+.4f} to {high:+.4f}", f"{p:.4f}"]
        )  # fmt: skip
    return markdown(rows)


def standing(runs: Runs, arm: str) -> str:
    """One arm against the best of the others, problem by problem, on sealed scores.

    The best by its median, picked afterwards, which favours it; p is not corrected.
    """
    rows = [["problem", "pairs", arm, "best other", "sealed", "difference", "95 %", "p"]]
    for problem in dict.fromkeys(r["problem"] for r in runs):
        mine = of_arm(runs, problem, arm)
        others = dict.fromkeys(r["arm"] for r in runs if r["problem"] == problem)
        pairs = {}
        for other in others:
            theirs = of_arm(runs, problem, other)
            seeds = sorted(set(mine) & set(theirs))
            if other != arm and len(seeds) > 1:
                pairs[other] = [np.array([_sealed(x[s]) for s in seeds]) for x in (mine, theirs)]
        if not pairs:
            continue
        best = max(pairs, key=lambda other: float(np.median(pairs[other][1])))
        a, b = pairs[best]
        low, high = median_interval(a - b)
        rows.append(
            [problem, str(len(a)), f"{np.median(a):.3f}", best, f"{np.median(b):.3f}",
             f"{np.median(a - b):+.3f}", f"{low:+.3f} to {high:+.3f}", f"{signed_rank(a, b):.4f}"]
        )  # fmt: skip
    return markdown(rows) if len(rows) > 1 else ""


def sooner(runs: Runs, against: str) -> str:
    """Every arm's search score at a quarter of the budget, less one arm's at all of it."""
    rows = [["problem", "arm", "pairs", f"@quarter - {against}'s end", "95 %", "p (Holm)"]]
    for problem, arm, a, b, p in _pairs(runs, against, _early, _late):
        low, high = median_interval(a - b)
        rows.append(
            [problem, arm, str(len(a)), f"{np.median(a - b):+.4f}",
             f"{low:+.4f} to {high:+.4f}", f"{p:.4f}"]
        )  # fmt: skip
    return markdown(rows)


def _pairs(runs: Runs, against: str, mine: Figure, theirs: Figure) -> Iterator[Pairs]:
    """(problem, arm, its figures, the other arm's, p by Holm over a problem's arms)."""
    for problem in dict.fromkeys(r["problem"] for r in runs):
        base = of_arm(runs, problem, against)
        found = []
        for arm in dict.fromkeys(r["arm"] for r in runs if r["problem"] == problem):
            own = of_arm(runs, problem, arm)
            seeds = sorted(set(own) & set(base))
            if arm == against or len(seeds) < 2:
                continue
            a, b = (np.array([f(x[s]) for s in seeds]) for f, x in ((mine, own), (theirs, base)))
            found.append((arm, a, b))
        for (arm, a, b), p in zip(
            found, holm([signed_rank(a, b) for _, a, b in found]), strict=True
        ):
            yield problem, arm, a, b, p


def ratio_interval(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """The bootstrap's 95 % interval of the ratio of two medians, pairs drawn together."""
    drawn = np.random.default_rng(0).integers(len(a), size=(RESAMPLES, len(a)))
    ratios = np.median(a[drawn], axis=1) / np.maximum(np.median(b[drawn], axis=1), 1e-9)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)


def median_interval(values: np.ndarray) -> tuple[float, float]:
    """The bootstrap's 95 % interval of the median."""
    rng = np.random.default_rng(0)
    drawn = rng.choice(values, size=(RESAMPLES, len(values)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (Holm 1979)."""
    order = np.argsort(p_values)
    found, least = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[index]))
        found[index] = least
    return found


def signed_rank(a: np.ndarray, b: np.ndarray) -> float:
    """The p-value of Wilcoxon's test of pairs."""
    return 1.0 if np.allclose(a, b) else float(wilcoxon(a, b).pvalue)


def _sealed(run: dict[str, Any]) -> float:
    return float(run["answers"]["chosen"]["sealed"])


def _early(run: dict[str, Any]) -> float:
    return best_at(run, run["budget"] // 4)


def _late(run: dict[str, Any]) -> float:
    return best_at(run, run["budget"])


def harm(runs: Runs) -> str:
    """How often an arm's answer is below the best cheap rival on sealed items beyond the noise."""
    rows = [["problem", "arm", "seeds", "harmed", "median ahead", "said nothing to gain"]]
    for problem, arm in dict.fromkeys((r["problem"], r["arm"]) for r in runs):
        mine = list(of_arm(runs, problem, arm).values())
        ahead = [r["answers"]["chosen"]["over_rival"] for r in mine]
        noise = [r["answers"]["chosen"]["over_rival_se"] for r in mine]
        harmed = sum(a < -1.96 * s - 1e-12 for a, s in zip(ahead, noise, strict=True))
        said = sum(bool(r["stopped"]) for r in mine)
        rows.append(
            [problem, arm, str(len(mine)), str(harmed), f"{np.median(ahead):+.4f}", str(said)]
        )
    return markdown(rows)


def advice(runs: Runs) -> str:
    """What the models were asked and how often they failed; nothing where none was."""
    rows = [["problem", "arm", "model", "calls", "tokens", "failed"]]
    for problem, arm in dict.fromkeys((r["problem"], r["arm"]) for r in runs if r.get("advice")):
        mine = [r["advice"] for r in of_arm(runs, problem, arm).values()]
        sums = [str(sum(a[key] for a in mine)) for key in ("calls", "tokens", "failures")]
        rows.append([problem, arm, mine[0]["model"], *sums])
    return markdown(rows) if len(rows) > 1 else ""


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table, the first row its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines)
