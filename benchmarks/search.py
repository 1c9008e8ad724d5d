"""``python -m benchmarks.search``: searches against each other at equal budgets.

    python -m benchmarks.search --suite tiny --arms cma_es,auto --seeds 20 --budget 100 --out DIR

Writes ``DIR/runs/*.json`` (one a search: stopped and started again, it goes on where it was),
``DIR/results.md`` (tables) and ``DIR/PROBLEM.png`` (medians and quartiles on the way). Arms are
strategies by name; ``auto`` asks for no gradients, ``auto_gradients`` does.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from agentmerge import plugins
from agentmerge.strategies.auto import Auto
from benchmarks import comparing, plots
from benchmarks.problems import Problem
from benchmarks.running import Arm, run_suite
from benchmarks.synthetic import DIMENSIONS, FUNCTIONS, SyntheticProblem

Make = Callable[[int], Problem]


def problems_of(suite: str) -> dict[str, Make]:
    """Name -> what makes the problem of a seed."""
    if suite == "synthetic":
        found: dict[str, Make] = {}
        for function in FUNCTIONS:
            for dimensions in DIMENSIONS:
                for noisy in (False, True):
                    make = partial(SyntheticProblem, function, dimensions, noisy)
                    found[make(0).name] = make
        return found
    from benchmarks.tiny import HEADROOM, NO_HEADROOM, TINY, TinyProblem

    names = {"tiny": HEADROOM, "no-headroom": NO_HEADROOM, "fine": ("tiny-so-64",)}[suite]
    return {name: partial(TinyProblem, TINY[name]) for name in names}


def arm_of(name: str) -> Arm:
    if name == "auto":
        return Arm(name, partial(Auto, gradients_from=None))
    if name == "auto_gradients":
        return Arm(name, partial(Auto, gradients_from=1))
    return Arm(name, partial(plugins.load, "agentmerge.strategies", name))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search", description=__doc__)
    parser.add_argument(
        "--suite", choices=("synthetic", "tiny", "no-headroom", "fine"), required=True
    )
    parser.add_argument("--problems", help="comma-separated names of the suite's; by default all")
    parser.add_argument("--arms", default="cma_es,tpe,one_plus_one,null_llm,auto")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--budget", type=int, default=100)
    parser.add_argument("--against", default="cma_es")
    parser.add_argument("--out", type=Path, default=Path("benchmark-results"))
    asked = parser.parse_args(arguments)
    known = problems_of(asked.suite)
    names = asked.problems.split(",") if asked.problems else list(known)
    unknown = sorted(set(names) - set(known))
    if unknown:
        parser.error(f"no problem {unknown[0]!r}; the suite has {', '.join(known)}")
    runs = run_suite(
        [known[name] for name in names],
        names,
        [arm_of(name) for name in asked.arms.split(",")],
        range(asked.first_seed, asked.first_seed + asked.seeds),
        asked.budget,
        asked.out,
        partial(print, flush=True),
    )
    print(written(runs, asked.against, asked.out))


def written(runs: Sequence[dict[str, Any]], against: str, out: Path) -> str:
    """The tables as text, after they and the curves were written to ``out``."""
    parts = [comparing.table(runs), comparing.comparisons(runs, against), comparing.harm(runs)]
    text = "\n\n".join(parts) + "\n"
    (out / "results.md").write_text(text)
    plots.curves(runs, out)
    return text


if __name__ == "__main__":
    main()
