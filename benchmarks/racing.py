"""What racing saves: whole searches on the demo family, with and without, and sealed scores beside.

    python -m benchmarks.racing [--seeds 5] [--budget 100] [--share 4] [--algorithm cma_es]

Arms: every candidate asked everything, at the budget; raced at one part in SHARE of it; and, as a
control, every candidate asked everything at that part. The budget counts item evaluations, in
candidates' worth; strategies that learn from items get the gold answer's margin beside each answer,
in all arms, uncounted. Each seed asks other items, 200 of each task to search on and 400 sealed,
and all arms of a seed ask the same. Differences are paired by seed, with a bootstrap interval over
seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from agentmerge import plugins
from agentmerge.config import SearchConfig
from agentmerge.demo.family import cached_family
from agentmerge.demo.tasks import skill_task, write_skill_tasks
from agentmerge.evaluation.statistics import paired_score_difference
from agentmerge.ledger import Ledger
from agentmerge.report.summary import run_summary
from agentmerge.session import driving

SKILLS = ("shift", "sort")
LIMIT, ITEMS = 200, 600


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.racing", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--budget", type=int, default=100, help="candidates' worth of items")
    parser.add_argument("--share", type=int, default=4, help="the other arms get one part in SHARE")
    parser.add_argument("--algorithm", default="cma_es")
    parser.add_argument("--json", type=Path, help="every search's figures")
    asked = parser.parse_args()
    part = asked.budget // asked.share
    arms = {"full": (asked.budget, False), "raced": (part, True), "full, less": (part, False)}
    rows = []
    for seed in range(asked.seeds):
        for name, (budget, racing) in arms.items():
            rows.append(searched(asked.algorithm, seed, budget, racing) | {"arm": name})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
            if asked.json:
                asked.json.write_text(json.dumps(rows, indent=1))
    print(table(rows, list(arms)))


def searched(algorithm: str, seed: int, budget: int, racing: bool) -> dict[str, Any]:
    """One whole search, through the product's own session and its HF worker."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tasks = write_skill_tasks(folder / "tasks", SKILLS, n_items=ITEMS, seed=seed)
        config = SearchConfig.from_text(
            yaml.safe_dump(body(tasks, algorithm, seed, budget, racing))
        )
        row = driving.run(config, name="a", runs_dir=folder / "runs")
        with Ledger(folder / "runs" / driving.LEDGER, read_only=True) as ledger:
            summary = run_summary(ledger, row)
            found = ledger.candidates(row.id)
    answer = summary["final"]["answer"]
    return {
        "seed": seed,
        "budget": budget,
        "items": round(sum(c.cost for c in found) * LIMIT * len(SKILLS)),
        "tried": sum(c.state in ("scored", "stopped") for c in found),
        "search": answer["score"],
        "sealed": answer["sealed_score"],
    }


def body(tasks: Path, algorithm: str, seed: int, budget: int, racing: bool) -> dict[str, Any]:
    family = cached_family(SKILLS, 0)
    learns = getattr(plugins.load("agentmerge.strategies", algorithm), "uses_items", False)
    names = [skill_task(skill) for skill in SKILLS]
    return {
        "genome": {
            "models": [str(expert) for expert in family.experts],
            "merge_method": "task_arithmetic",
            "base_model": str(family.base),
            "layer_granularity": 1,
            "normalize": False,
        },
        "tasks": [{"name": n, "weight": 0.5, "metric": "exact_match,none"} for n in names],
        "limit": LIMIT,
        "num_fewshot": 0,
        "apply_chat_template": False,
        "task_search_path": [str(tasks)],
        "search": {"algorithm": algorithm, "seed": seed, "racing": racing, "companion": learns},
        "budget": {"max_evaluations": budget},
        "worker": {"batch_size": 200, "options": {"threads": 1}},
    }


def table(rows: list[dict[str, Any]], arms: list[str]) -> str:
    lines = [f"{'arm':<12} {'items':>8} {'tried':>6} {'search':>7} {'sealed':>7}   (medians)"]
    for arm in arms:
        mine = [row for row in rows if row["arm"] == arm]
        cells = {
            key: statistics.median(row[key] for row in mine)
            for key in ("items", "tried", "search", "sealed")
        }
        lines.append(
            f"{arm:<12} {cells['items']:>8.0f} {cells['tried']:>6.0f} {cells['search']:>7.3f} "
            f"{cells['sealed']:>7.3f}"
        )
    sealed = {arm: [row["sealed"] for row in rows if row["arm"] == arm] for arm in arms}
    for one, other in (("raced", "full"), ("raced", "full, less")):
        gap = paired_score_difference([(1.0, sealed[one], sealed[other])], 0)
        if gap is None:
            lines.append(f"sealed, {one} minus {other}: too few seeds for an interval")
            continue
        lines.append(
            f"sealed, {one} minus {other}: {gap.mean:+.3f} ({gap.low:+.3f} to {gap.high:+.3f}, "
            f"{len(sealed[one])} seeds)"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
