"""``python -m benchmarks.stack``: searches over layers against each other, from one weight answer.

    OMP_NUM_THREADS=1 python -m benchmarks.stack --seeds 20 --family so,rs --most 4,8 --out DIR

For every seed one search of the weights (``auto``, to its end); its best merge is what all arms
begin with, each with the same budget of evaluations (a gradient with its score counts as four):

    auto_gradients, gradient   ours, with slopes of every position's two scales
    margins                    ours, from items alone
    cma_es_path                CMA-ES on switches and scales, after arXiv 2403.13187
    genetic_path, catcma_path  a genetic algorithm there, and CatCMA (package ``cmaes``)

No stack has more than ``--most`` layers beyond the models' depth: of more, the weakest are left
out, for every arm alike. The answer of an arm is settled as the product settles its own
(``agentmerge.search.depths``), from the best seen, where the product begins with the winner of most
halves of the items: the best stack is asked without its weakest layer, its two
weakest, and so on (at most ``--most`` evaluations, beside the budget, of every arm alike); of these
the shallowest that is no worse than the best beyond the noise of the search items, if sealed items
put it ahead of the weight answer beyond theirs; else the weight answer. Writes
``DIR/runs/*.json`` (one a search: stopped and started again, it goes on where it was),
``results.json``, ``results.md`` and ``PROBLEM.png``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from agentmerge import plugins
from agentmerge.config import LayersConfig
from agentmerge.contracts.strategy import Strategy
from agentmerge.strategies.auto import Auto
from agentmerge.testing.tiny import TINY, TinyProblem
from benchmarks import comparing, plots
from benchmarks.choosing import Asked
from benchmarks.machine import machine
from benchmarks.running import Arm, best_at, path_of, run_search, save
from benchmarks.smollm2 import SmolLM2Problem
from benchmarks.stack_problem import StackProblem
from benchmarks.stack_rivals import CatCma, Genetic

FAMILIES = {
    "so": "tiny-so-8",
    "rs": "tiny-rs-8",
    "sro": "tiny-sro-12",
    "useless": "tiny-useless",
    "halves": "tiny-halves",
    "useless-2": "tiny-useless-2",
    "halves-2": "tiny-halves-2",
    "smollm2": "smollm2-interfering",
    "smollm2-plain": "smollm2-plain",
}
#: How often the path form runs through all sources' layers.
REPEATS = 2
WEIGHTS = Arm("weights", partial(Auto, gradients_from=None))
WEIGHT_BUDGET = 100
#: Of SmolLM2, and its search items a skill.
SMOLLM2_BUDGET, SMOLLM2_ITEMS = 45, 50


def _known(name: str) -> Callable[[], Strategy]:
    return partial(plugins.load, "agentmerge.strategies", name)


#: Arm -> (whether on the path form, what makes its strategy).
ARMS: dict[str, tuple[bool, Callable[[], Any]]] = {
    "auto_gradients": (False, partial(Auto, gradients_from=1)),
    "gradient": (False, _known("gradient")),
    "margins": (False, _known("margins")),
    "cma_es_path": (True, _known("cma_es")),
    "genetic_path": (True, Genetic),
    "catcma_path": (True, CatCma),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stack", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--family", default="so,rs", help=f"of {', '.join(FAMILIES)}")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--most", default="4", help="layers beyond the models' depth; several by ,")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--budget", type=int, default=150)
    parser.add_argument("--against", default="auto_gradients")
    parser.add_argument("--out", type=Path, default=Path("benchmark-results"))
    asked = parser.parse_args(arguments)
    families, arms = asked.family.split(","), asked.arms.split(",")
    for given, known in ((families, FAMILIES), (arms, ARMS), ([asked.against], ARMS)):
        if unknown := sorted(set(given) - set(known)):
            parser.error(f"{unknown[0]!r} is not known; there are {', '.join(known)}")
    most = [int(n) for n in asked.most.split(",")]
    runs: list[dict[str, Any]] = []
    for seed in range(asked.first_seed, asked.first_seed + asked.seeds):
        for family in families:
            runs += seed_runs(family, seed, most, arms, asked.budget, asked.out)
    print(written(runs, asked.against, asked.out))


def seed_runs(
    family: str, seed: int, most: Sequence[int], arms: Sequence[str], budget: int, out: Path
) -> list[dict[str, Any]]:
    """One seed's searches, from their files where they are: the weights', then every arm's."""
    problem, start = weight_answer(family, seed, out)
    runs = []
    for extra in most:
        for arm in arms:
            on_path, make = ARMS[arm]
            path = path_of(out, f"{FAMILIES[family]}+{extra}", arm, seed, budget)
            if not path.is_file():
                form = {"path": True, "repeats": REPEATS} if on_path else {}
                layers = LayersConfig(most=extra, **form)
                stacks = StackProblem(problem(), tuple(start["vector"]), layers)
                save(path, _searched(stacks, Arm(arm, make), seed, budget, start))
            run = json.loads(path.read_text())
            if "ladder" not in run:
                raise SystemExit(f"{path} was settled by an earlier rule; give another --out")
            runs.append(run)
    return runs


def weight_answer(
    family: str, seed: int, out: Path
) -> tuple[Callable[[], TinyProblem | SmolLM2Problem], dict[str, Any]]:
    """(the family's problem, what the search of its weights had as its best)."""
    name, own = FAMILIES[family], WEIGHT_BUDGET
    make: Callable[[], TinyProblem | SmolLM2Problem]
    if name in TINY:
        make = partial(TinyProblem, TINY[name], seed)
    else:
        make, own = partial(SmolLM2Problem, name, seed, SMOLLM2_ITEMS), SMOLLM2_BUDGET
    problem = cache(make)
    path = path_of(out, name, WEIGHTS.name, seed, own)
    if not path.is_file():
        save(path, run_search(problem(), WEIGHTS, seed, own))
    return problem, json.loads(path.read_text())["answers"]["best"]


def _searched(
    problem: StackProblem, arm: Arm, seed: int, budget: int, start: dict[str, Any]
) -> dict[str, Any]:
    before, wall = time.process_time(), time.perf_counter()
    run = run_search(problem, arm, seed, budget)
    for answer in run["answers"].values():
        answer["layers"] = problem.depth(answer["vector"])
    run |= {
        "weights": {"search": start["search"], "sealed": start["sealed"]},
        "dimensions": problem.space.dimensions,
        "processor_s": round(time.process_time() - before, 1),
    }
    run |= settled(problem, run)
    chosen = run["answers"]["chosen"]
    print(
        f"{problem.name} {arm.name} seed {seed}: search {best_at(run, budget):.3f} from "
        f"{start['search']:.3f}, sealed {chosen['sealed']:.3f} from {start['sealed']:.3f}, "
        f"{chosen['layers']} layers, {time.perf_counter() - wall:.0f} s",
        flush=True,
    )
    return run


def settled(problem: StackProblem, run: dict[str, Any]) -> dict[str, Any]:
    """The answer as the product settles it, and the ladder that it was taken from, the weight
    answer first."""
    best, under = run["answers"]["best"], problem.neutral()
    ladder, point = [], tuple(best["vector"])
    while problem.depth(point) > problem.space.num_layers:
        ladder.insert(0, point)
        fewer = problem.space.shallower(point)
        if fewer is None:
            break
        point = fewer
    rungs = [(vector, problem.evaluate(vector)) for vector in (under, *ladder)]
    highest = max(rungs, key=lambda rung: rung[1].score or 0.0)
    items = highest[1].evidence.items
    asked = Asked(items.task, items.weight)

    def no_better(rung: tuple[Any, Any]) -> bool:
        mine, theirs = (shown.evidence.values for _, shown in (highest, rung))
        found = asked.leads(mine[:, None], theirs, run["seed"]).interval()
        return found is None or found.low <= 0

    chosen = next(rung for rung in rungs if rung is highest or no_better(rung))
    gap = problem.sealed(chosen[0]) - (weights := problem.sealed(under))
    if chosen[0] != under:  # as many sealed items a task
        tasks = np.arange(len(gap)) * len(problem.tasks) // len(gap)
        sealed = Asked(tasks, np.ones(len(gap)))
        ahead = sealed.leads(gap[:, None], np.zeros(len(gap)), run["seed"]).interval()
        if ahead is None or ahead.low <= 0:
            chosen, gap = rungs[0], np.zeros(len(gap))
    vector, shown = chosen
    answer = {
        "search": shown.score,
        "sealed": float((weights + gap).sum()),
        "vector": vector,
        "layers": problem.depth(vector),
        "over_rival": float(gap.sum()),
        "over_rival_se": float(gap.std() * np.sqrt(len(gap))),
    }
    told = [{"layers": problem.depth(v), "search": shown.score} for v, shown in rungs]
    return {"answers": run["answers"] | {"chosen": answer}, "ladder": told}


def written(runs: Sequence[dict[str, Any]], against: str, out: Path) -> str:
    """The tables as text, after they, the figures behind them and the curves were written."""
    rows = figures(runs)
    parts = [table(rows), comparing.comparisons(runs, against), comparing.harm(runs)]
    text = "\n\n".join(parts) + "\n"
    (out / "results.md").write_text(text)
    (out / "results.json").write_text(json.dumps({"machine": machine(1), "rows": rows}, indent=1))
    plots.curves(runs, out)
    return text


def figures(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a problem and arm: the sealed error as a share of the weight answer's, paired."""
    rows = []
    for problem, arm in dict.fromkeys((r["problem"], r["arm"]) for r in runs):
        mine = list(comparing.of_arm(runs, problem, arm).values())
        before = np.array([1 - r["weights"]["sealed"] for r in mine])
        row = {"problem": problem, "arm": arm, "seeds": len(mine)}
        for answer in ("chosen", "best"):
            after = np.array([1 - r["answers"][answer]["sealed"] for r in mine])
            gains = before - after
            row[answer] = {
                "sealed": float(np.median(1 - after)),
                "layers": float(np.median([r["answers"][answer]["layers"] for r in mine])),
                "ratio": float(np.median(after) / max(np.median(before), 1e-9)),
                "ratio_interval": comparing.ratio_interval(after, before),
                "gain": float(np.median(gains)),
                "gain_interval": comparing.median_interval(gains),
            }
        row |= {
            "weights": float(np.median(1 - before)),
            "search": float(np.median([best_at(r, r["budget"]) for r in mine])),
            "early": float(np.median([best_at(r, 40) for r in mine])),
            "processor_s": float(np.median([r["processor_s"] for r in mine])),
        }
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    head = ["problem", "arm", "seeds", "weights sealed", "search @40", "search", "sealed", "layers"]
    lines = [[*head, "sealed error / weights'", "95 %", "best seen", "95 %", "processor s"]]
    for row in rows:
        chosen, best = row["chosen"], row["best"]
        cells = [row["problem"], row["arm"], str(row["seeds"])]
        cells += [f"{row[key]:.3f}" for key in ("weights", "early", "search")]
        cells += [f"{chosen['sealed']:.3f}", f"{chosen['layers']:g}"]
        for found in (chosen, best):
            low, high = found["ratio_interval"]
            cells += [f"{found['ratio']:.2f}", f"{low:.2f} to {high:.2f}"]
        lines.append([*cells, f"{row['processor_s']:.0f}"])
    return comparing.markdown(lines)


if __name__ == "__main__":
    main()
