"""Anytime curves: best search score against what was spent, medians and quartiles over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.comparing import of_arm
from benchmarks.running import best_at


def curves(runs: Sequence[dict[str, Any]], out: Path) -> list[Path]:
    """One PNG a problem in ``out``; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = []
    for problem in dict.fromkeys(r["problem"] for r in runs):
        figure, axes = pyplot.subplots(figsize=(7, 4.6))
        lowest = 1.0
        for arm in dict.fromkeys(r["arm"] for r in runs if r["problem"] == problem):
            mine = list(of_arm(runs, problem, arm).values())
            spent = np.arange(10, max(r["budget"] for r in mine) + 1)
            scores = np.array([[best_at(r, k) for k in spent] for r in mine])
            low, middle, high = np.quantile(scores, [0.25, 0.5, 0.75], axis=0)
            lowest = min(lowest, float(low[0]))
            (line,) = axes.plot(spent, middle, label=f"{arm} ({len(mine)} seeds)")
            axes.fill_between(spent, low, high, alpha=0.15, color=line.get_color())
        axes.set(title=problem, xlabel="evaluations (all search items)", ylabel="best search score")
        axes.set_ylim(bottom=max(0.0, lowest - 0.02))
        axes.grid(alpha=0.3)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3, frameon=False)
        figure.tight_layout()
        path = out / f"{problem}.png"
        figure.savefig(path, dpi=110)
        pyplot.close(figure)
        written.append(path)
    return written
