"""What the runs of a suite say: medians, paired tests, bootstrap intervals. Needs scipy.

Pairs are runs of the same problem and seed. Differences of two arms: Wilcoxon's signed-rank test,
p-values by Holm over the comparisons of one problem, and a bootstrap interval of the median.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import wilcoxon

from benchmarks.running import CHECKPOINTS, best_at

RESAMPLES = 2000
Runs = Sequence[dict[str, Any]]


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
    return _markdown(rows)


def comparisons(runs: Runs, against: str) -> str:
    """Every arm against one, on sealed error (1 - score): ratio, difference, interval, p."""
    head = [
        "problem",
        "arm",
        "pairs",
        f"sealed error / {against}'s",
        "difference",
        "95 %",
        "p (Holm)",
    ]
    rows = [head]
    for problem in dict.fromkeys(r["problem"] for r in runs):
        base = of_arm(runs, problem, against)
        found = []
        for arm in dict.fromkeys(r["arm"] for r in runs if r["problem"] == problem):
            mine = of_arm(runs, problem, arm)
            seeds = sorted(set(mine) & set(base))
            if arm == against or len(seeds) < 2:
                continue
            a, b = (np.array([_sealed(x[s]) for s in seeds]) for x in (mine, base))
            ratio = (1 - np.median(a)) / max(1 - np.median(b), 1e-9)
            low, high = median_interval(a - b)
            found.append((arm, len(seeds), ratio, np.median(a - b), low, high, _p(a, b)))
        for row, p in zip(found, holm([f[-1] for f in found]), strict=True):
            arm, pairs, ratio, difference, low, high, _ = row
            rows.append(
                [problem, arm, str(pairs), f"{ratio:.2f}", f"{difference:+.4f}",
                 f"{low:+.4f} to {high:+.4f}", f"{p:.4f}"]
            )  # fmt: skip
    return _markdown(rows)


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


def _p(a: np.ndarray, b: np.ndarray) -> float:
    return 1.0 if np.allclose(a, b) else float(wilcoxon(a, b).pvalue)


def _sealed(run: dict[str, Any]) -> float:
    return float(run["answers"]["chosen"]["sealed"])


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
    return _markdown(rows)


def advice(runs: Runs) -> str:
    """What the models were asked and how often they failed; nothing where none was."""
    rows = [["problem", "arm", "model", "calls", "tokens", "failed"]]
    for problem, arm in dict.fromkeys((r["problem"], r["arm"]) for r in runs if r.get("advice")):
        mine = [r["advice"] for r in of_arm(runs, problem, arm).values()]
        sums = [str(sum(a[key] for a in mine)) for key in ("calls", "tokens", "failures")]
        rows.append([problem, arm, mine[0]["model"], *sums])
    return _markdown(rows) if len(rows) > 1 else ""


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines)
