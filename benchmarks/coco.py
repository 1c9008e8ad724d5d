"""``python -m benchmarks.coco``: COCO's functions judge the search (Hansen et al., 1603.08785).

    python -m benchmarks.coco --suite bbob --dimensions 5,10 --instances 1-3 --most 200 --out DIR

Needs ``pip install 'agentmerge[coco]'``. Every search is a file under ``DIR/runs`` and COCO's own
log of it a folder under ``DIR/exdata``, by arm, so that what was stopped goes on where it was and
cocopp reads what it knows. The budget is ``--per-dimension`` evaluations times the dimensions, and
``--most`` at most. What counts is read from COCO's log, which knows the optimum and the value
without noise: the share of cocopp's 51 targets (its least distances to the optimum, 1e2 to 1e-8)
that were reached, over functions and instances. ``DIR/results.md`` has the tables, with the best of
BBOB 2009 at each target, whose runs cocopp brings.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.coco_arms import ARMS, minimised
from benchmarks.machine import machine

TARGETS = 10.0 ** np.linspace(2, -8, 51)
#: Evaluations a dimension at which shares are read.
READ = (10, 20, 50, 100)
GROUPS = {
    "bbob": {
        "separable": range(1, 6),
        "moderate": range(6, 10),
        "ill-conditioned": range(10, 15),
        "multimodal": range(15, 20),
        "weak structure": range(20, 25),
    },
    "bbob-noisy": {
        "moderate noise": range(101, 107),
        "severe noise": range(107, 122),
        "severe, multimodal": range(122, 131),
    },
}
#: Whose versions a table says: the judges, and what arms need besides ourselves.
JUDGES = ("coco-experiment", "cocopp")
NEEDED = {"pycma": "cma", "cmaes": "cmaes", "tpe": "optuna", "smac": "smac", "botorch": "botorch"}
Run = dict[str, Any]


def run(arm: str, problem: Any, suite: str, budget: int, out: Path) -> Run:
    """One search, and how near it came: (evaluations, least distance so far) where it fell."""
    import cocoex

    function, dimension, instance = problem.id_triple[:3]
    folder = f"{function:03}-{dimension:02}-{instance:02}-{budget}"
    shutil.rmtree(out / "exdata" / arm / folder, ignore_errors=True)  # of a run that was stopped
    options = f"outer_folder: {out / 'exdata' / arm} result_folder: {folder} algorithm_name: {arm}"
    problem.observe_with(cocoex.Observer(suite, options))
    before = time.process_time()
    found = minimised(arm, problem, dimension, budget, instance)
    seconds = time.process_time() - before
    problem.free()
    return {
        "suite": suite,
        "arm": arm,
        "function": function,
        "dimension": dimension,
        "instance": instance,
        "budget": budget,
        "evaluations": len(found.values),
        "ended": found.ended,
        "cpu_s": round(seconds, 2),
        "way": way(out / "exdata" / arm / folder),
    }


def way(folder: Path) -> list[tuple[int, float]]:
    """(evaluations, least distance to the optimum without noise) of COCO's log of one search."""
    (log,) = folder.rglob("*.dat")
    rows = [line.split() for line in log.read_text().splitlines() if not line.startswith("%")]
    return [(int(row[0]), float(row[2])) for row in rows]


def reached(one: Run, evaluations: int) -> float:
    """The share of TARGETS that a search had reached by then."""
    least = min((away for spent, away in one["way"] if spent <= evaluations), default=np.inf)
    return float(np.mean(least <= TARGETS))


def shares(runs: Iterable[Run], per_dimension: int, functions: Iterable[int] = ()) -> list[float]:
    """The shares at so many evaluations a dimension, one a search, of these functions or all."""
    kept = set(functions)
    return [
        reached(one, per_dimension * one["dimension"])
        for one in runs
        if not kept or one["function"] in kept
    ]


def tables(runs: Sequence[Run], reference: Callable[[int, int, int], float] | None = None) -> str:
    """One table a suite and dimension, of the problems that every arm in it has searched.

    reference: (function, dimension, evaluations) -> the share that the best of BBOB 2009 reached.
    """
    found = []
    for suite, dimension in dict.fromkeys((one["suite"], one["dimension"]) for one in runs):
        mine = [one for one in runs if (one["suite"], one["dimension"]) == (suite, dimension)]
        budget = min(one["budget"] for one in mine)
        found.append(_table(mine, suite, dimension, budget, reference))
    return "\n\n".join(found) + "\n"


def _table(
    runs: Sequence[Run],
    suite: str,
    dimension: int,
    budget: int,
    reference: Callable[[int, int, int], float] | None,
) -> str:
    by_arm: dict[str, dict[tuple[int, int], Run]] = {}
    for one in runs:
        by_arm.setdefault(one["arm"], {})[one["function"], one["instance"]] = one
    common = sorted(set.intersection(*(set(found) for found in by_arm.values())))
    steps = [k for k in READ if k * dimension <= budget] or [budget // dimension]
    last = steps[-1]
    groups = {name: set(found) for name, found in GROUPS[suite].items()}
    groups = {name: found for name, found in groups.items() if found & {f for f, _ in common}}
    instances = len({instance for _, instance in common})
    head = [f"{suite}, {dimension} dimensions", *(f"@{k}" for k in steps)]
    rows = [[*head, *(f"{name} @{last}" for name in groups), "CPU s a search", "said the end"]]
    for arm, found in by_arm.items():
        mine = [found[key] for key in common]
        cells = [shares(mine, k) for k in steps]
        cells += [shares(mine, last, functions) for functions in groups.values()]
        ended = sum(one["ended"] is not None and one["ended"] <= budget for one in mine)
        seconds = float(np.median([one["cpu_s"] for one in mine]))
        rows.append([arm, *map(_mean, cells), f"{seconds:.1f}", str(ended) if ended else ""])
    if reference:
        cells = [[reference(f, dimension, k * dimension) for f, _ in common] for k in steps]
        cells += [
            [reference(f, dimension, last * dimension) for f, _ in common if f in functions]
            for functions in groups.values()
        ]
        rows.append(["*best of BBOB 2009*", *map(_mean, cells), "", ""])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    count = len({f for f, _ in common})
    lines.append(f"\n{count} functions, {instances} instances, {budget} evaluations.")
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3f}"


def best_of_2009(suite: str) -> Callable[[int, int, int], float]:
    """From the runs that cocopp ships: at each target those of the algorithm that was best."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it looks for its archive on the network as it is imported
        import cocopp
        from cocopp import bestalg

    path = Path(cocopp.__file__).parent / "refalgs" / f"best2009-{suite}.tar.gz"
    entries = bestalg.load_reference_algorithm(str(path))

    def share(function: int, dimension: int, evaluations: int) -> float:
        needed = entries[dimension, function].detEvals(TARGETS)[0]
        return float(np.mean([np.mean(np.asarray(runs) <= evaluations) for runs in needed]))

    return share


def path_of(asked: argparse.Namespace, arm: str, key: Sequence[int]) -> Path | None:
    """The file of a run, also of one at a larger budget: but for SMAC's design, which depends on
    the budget, its beginning is the same. None where there is none.

    key: (function, dimension, instance).
    """
    which = "{:03}-{:02}-{:02}".format(*key)
    paths = (asked.out / "runs").glob(f"{asked.suite}--{arm}--{which}-*.json")
    found = {int(path.stem.rpartition("-")[2]): path for path in paths}
    budget = budget_of(asked, key[1])
    enough = [b for b in found if b == budget or (b > budget and arm != "smac")]
    return found[min(enough)] if enough else None


def budget_of(asked: argparse.Namespace, dimension: int) -> int:
    return int(min(asked.per_dimension * dimension, asked.most))


def run_all(asked: argparse.Namespace) -> None:
    """Instance by instance and arm by arm, so that whatever is stopped has whole tables."""
    import cocoex

    cocoex.log_level("warning")
    dimensions, instances = numbers(asked.dimensions), numbers(asked.instances)
    for instance, arm, dimension in product(instances, asked.arms.split(","), dimensions):
        budget = budget_of(asked, dimension)
        where = f"instances: {instance}", f"dimensions: {dimension}"
        for problem in cocoex.Suite(asked.suite, *where):
            if path_of(asked, arm, problem.id_triple):
                continue
            which = "{:03}-{:02}-{:02}".format(*problem.id_triple)
            one = run(arm, problem, asked.suite, budget, asked.out)
            path = asked.out / "runs" / f"{asked.suite}--{arm}--{which}-{budget}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_suffix(".tmp")
            draft.write_text(json.dumps(one))
            draft.replace(path)
            print(f"{path.stem}: {reached(one, budget):.2f}, {one['cpu_s']} s", flush=True)


def stored(asked: argparse.Namespace) -> list[Run]:
    """What was run of what is asked."""
    found = []
    functions = [f for group in GROUPS[asked.suite].values() for f in group]
    dimensions, instances = numbers(asked.dimensions), numbers(asked.instances)
    for dimension, arm in product(dimensions, asked.arms.split(",")):
        for function, instance in product(functions, instances):
            if path := path_of(asked, arm, (function, dimension, instance)):
                budget = budget_of(asked, dimension)
                found.append(json.loads(path.read_text()) | {"budget": budget})
    return found


def numbers(text: str) -> list[int]:
    """ "1-3,5" -> [1, 2, 3, 5]."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coco", description=__doc__)
    parser.add_argument("--suite", choices=sorted(GROUPS), default="bbob")
    parser.add_argument("--dimensions", default="2,3,5,10,20")
    parser.add_argument("--instances", default="1-15")
    parser.add_argument("--per-dimension", type=int, default=100)
    parser.add_argument("--most", type=int, default=500)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--read", action="store_true", help="tables of what is there, and no runs")
    parser.add_argument("--out", type=Path, default=Path("build/coco-results"))
    asked = parser.parse_args(arguments)
    unknown = sorted(set(asked.arms.split(",")) - set(ARMS))
    if unknown:
        parser.error(f"no arm {unknown[0]!r}; there are {', '.join(ARMS)}")
    arms = asked.arms.split(",")
    needed = [*JUDGES, *(NEEDED[arm] for arm in arms if arm in NEEDED)]
    try:
        versions = ", ".join(f"{name} {version(name)}" for name in needed)
    except PackageNotFoundError as error:
        parser.error(f"{error.name} is not installed: pip install 'agentmerge[coco]'")
    if not asked.read:
        run_all(asked)
    text = tables(stored(asked), best_of_2009(asked.suite))
    text += f"\n{versions}; {machine(1)}\n"
    (asked.out / "results.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
