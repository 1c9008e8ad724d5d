"""Searches for two objectives: the area that their fronts have on items that no search sees.

    python -m benchmarks.front --family skills --seeds 20 --budget 100 --out build/front
    python -m benchmarks.front --family wordy --arms auto,nsga2 --seeds 5

Families: ``skills``, a tiny family of real models (``tiny-so-8``) whose two skills are an axis
each, one told as items that score and the other as a cost, the share that is wrong; ``wordy``, a
family trained in the same way of a terse and a wordy expert, which says the question again before
its answer: each has a skill of its own, and merges are asked both and answer through the product's
worker, whose count of tokens is the cost; ``lengths``,
the fake worker's landscape, where better merges answer longer. Arms: ``auto`` as the product runs
it with ``search.objectives``; ``nsga2`` (pymoo, in its population of 10, from the cheap rivals on);
``qlognehvi`` (BoTorch, two Gaussian processes); ``scalarised`` (BoTorch's expected improvement of
a Chebyshev scalarisation with new random weights for each candidate, as ParEGO); ``random``. All
begin with the product's cheap rivals, which count.

After 50 and 100 evaluations of one search the points that nothing dominates on search items are
scored on sealed ones; the area is counted from a little beyond the worst parent there, and is given
as a share of what the best front of all arms of that seed has. ``DIR/results.md`` has these, and
how far the first of the arms is ahead of each other, paired by seed. ``DIR/runs/*.json`` has a file
a search: stopped and started again, it goes on where it was.
Needs the extra ``bench``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from agentmerge.contracts.strategy import Evidence, History, Items, Observation, rng_factory
from agentmerge.space.grouped import SearchSpace
from agentmerge.strategies.auto import Auto
from agentmerge.strategies.front import Front, Worst, undominated
from agentmerge.strategies.random import random_vectors
from agentmerge.testing.problem import first_points
from benchmarks import comparing
from benchmarks.running import path_of, save

CHECKPOINTS = (50, 100)
POPULATION = 10
#: What the terse and the wordy expert learned, and what is asked of merges of them.
WORDY, WORDY_SKILLS = ("shift", "wordy-sort"), ("shift", "sort")
SEARCH_ITEMS, SEALED_ITEMS = 200, 400
#: Of an answer: as long as the wordy one's, and a little more.
MOST_TOKENS = 16
Vector = tuple[float, ...]
Told = tuple[float, float, Evidence]
"""A score, a cost, and the items of both."""


class Skills:
    """Two skills of real models: the first is the score, what is wrong of the second the cost."""

    def __init__(self, seed: int) -> None:
        from agentmerge.testing.tiny import TINY, TinyProblem

        self._there = TinyProblem(TINY["tiny-so-8"], seed)
        self.space: SearchSpace = self._there.space

    def ask(self, vector: Vector) -> Told:
        shown = self._there.evaluate(vector).evidence
        assert shown is not None
        first = shown.items.task == 0
        share = np.where(first, 1 / first.sum(), 1 / (~first).sum())
        items = Items(
            shown.items.task, np.where(first, share, 0.0), shown.items.margins,
            tokens=np.where(first, 0.0, share), traded=True,
        )  # fmt: skip
        values = np.where(first, shown.values, 1.0 - shown.values)
        signals = np.where(first, shown.signals, -shown.signals)
        score, cost = float(values @ items.weight), float(values @ items.tokens)
        return score, cost, Evidence(items, signals, values)

    def sealed(self, vector: Vector) -> tuple[float, float]:
        first, second = np.split(self._there.sealed(vector), 2)
        return 2 * float(first.sum()), 1.0 - 2 * float(second.sum())


class Answers:
    """A search's own config, worker and items: what answers cost is the tokens that were made."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        from agentmerge import plugins
        from agentmerge.config import SearchConfig
        from agentmerge.preflight.prepare import prepare

        prepared = prepare(SearchConfig.from_text(json.dumps(body)))
        self.space, self._taskset = prepared.space, prepared.taskset
        self._worker = plugins.load("agentmerge.workers", body["worker"]["kind"])(prepared.spec)

    def _results(self, vector: Vector, part: Any) -> dict[Any, Any]:
        self._worker.load(self.space.recipe(vector))
        refs = self._taskset.refs(part)
        return dict(zip(refs, self._worker.score(refs), strict=True))

    def ask(self, vector: Vector) -> Told:
        from agentmerge.search.evidence import ItemTable

        results = self._results(vector, "search")
        score, tokens = self._taskset.score(results), self._taskset.tokens(results)
        told = Observation(0, 0, vector, "x", score.value, score.tasks, "x")
        [found] = ItemTable(self._taskset, lambda _: results, True, True).of([told])
        assert tokens is not None
        assert found.evidence is not None
        return score.value, tokens, found.evidence

    def sealed(self, vector: Vector) -> tuple[float, float]:
        results = self._results(vector, "sealed")
        tokens = self._taskset.tokens(results, "sealed")
        assert tokens is not None
        return self._taskset.score(results, "sealed").value, tokens


def lengths(seed: int) -> Answers:
    """The fake worker: a good merge has much of the parents that answer at length."""
    return Answers({
        "genome": {"models": ["north", "south", "east"], "base_model": "base",
                   "merge_method": "task_arithmetic", "layer_granularity": 2},
        "tasks": [{"name": f"one-{seed}", "metric": "exact_match,none"}],
        "search": {"sealed_share": 0.5, "objectives": ["score", "tokens"]},
        "worker": {"kind": "fake", "options": {"base": "base", "documents": 400}},
    })  # fmt: skip


def wordy(seed: int) -> Answers:
    """A terse and a wordy expert, trained for real; each has a skill of its own."""
    from agentmerge.demo import cached_family, language
    from agentmerge.demo.tasks import exact_match, search_config, skill_inputs, write_task
    from agentmerge.system.temporary import temporary_folder

    family = cached_family(WORDY)
    tasks = [{"name": f"front-{skill}", "weight": 0.5, "metric": "exact_match,said"}
             for skill in WORDY_SKILLS]  # fmt: skip
    # What is right is what is said last, however much of it there is.
    last = [{"function": "regex", "regex_pattern": r"([a-z]+)\s*$"}, {"function": "take_first"}]
    kind = exact_match(MOST_TOKENS) | {"filter_list": [{"name": "said", "filter": last}]}
    with temporary_folder("agentmerge-front") as folder:
        for skill, task in zip(WORDY_SKILLS, tasks, strict=True):
            known = language.SKILLS[skill]
            texts = skill_inputs(skill, SEARCH_ITEMS + SEALED_ITEMS, seed)
            docs = [{"prompt": language.prompt(known.tag, text), "answer": known.apply(text)}
                    for text in texts]  # fmt: skip
            write_task(folder, str(task["name"]), docs, kind)
        return Answers({
            **search_config(family.base, family.experts, tasks, limit=SEARCH_ITEMS),
            "task_search_path": [str(folder)],
            "search": {"sealed_share": SEALED_ITEMS / (SEARCH_ITEMS + SEALED_ITEMS),
                       "objectives": ["score", "tokens"], "seed": seed},
            "worker": {"kind": "hf", "batch_size": SEALED_ITEMS, "options": {"threads": 1}},
        })  # fmt: skip


FAMILIES: dict[str, Callable[[int], Any]] = {"skills": Skills, "wordy": wordy, "lengths": lengths}


def by_auto(space: SearchSpace, history: History, seed: int) -> list[Vector]:
    asked = Auto(gradients_from=None).propose(space, history, None, 1, rng_factory(seed))
    return [tuple(p.vector) for p in asked if p.vector is not None]


def by_chance(space: SearchSpace, history: History, seed: int) -> list[Vector]:
    return random_vectors(space, history[-1].generation + 1, 1, rng_factory(seed))


def by_nsga2(space: SearchSpace, history: History, seed: int) -> list[Vector]:
    """pymoo's NSGA-II, replayed: it begins with the best of the cheap rivals and random points."""
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.core.evaluator import Evaluator
    from pymoo.core.population import Population
    from pymoo.core.problem import Problem
    from pymoo.problems.static import StaticProblem

    axes = space.dimensions
    costs = {o.vector: [-(o.score or 0.0), o.tokens or 0.0] for o in history}
    rivals = [o.vector for o in history if o.generation == 0][:POPULATION]
    more = np.random.default_rng(seed).random((POPULATION - len(rivals), axes))
    begin = np.vstack([rivals, more])
    problem = Problem(n_var=axes, n_obj=2, xl=0.0, xu=1.0)
    algorithm = NSGA2(pop_size=POPULATION, sampling=Population.new("X", begin))
    algorithm.setup(problem, termination=("n_gen", 10_000), seed=seed, verbose=False)
    while True:
        asked = algorithm.ask()
        points = [tuple(float(x) for x in row) for row in asked.get("X")]
        if left := [point for point in points if point not in costs]:
            return left
        told = StaticProblem(problem, F=np.array([costs[point] for point in points]))
        Evaluator().eval(told, asked)
        algorithm.tell(infills=asked)


def by_qlognehvi(space: SearchSpace, history: History, seed: int) -> list[Vector]:
    from botorch.acquisition.multi_objective.logei import (
        qLogNoisyExpectedHypervolumeImprovement as Acquisition,
    )
    from botorch.models import ModelListGP

    points, values = _tensors(history)
    worst = _worst(history)
    low = [worst.score, -worst.tokens]
    with _seeded(seed, history):
        model = ModelListGP(*(_process(points, values[:, [i]]) for i in range(2)))
        acquisition = Acquisition(
            model, ref_point=low, X_baseline=points, prune_baseline=True
        )  # fmt: skip
        return _optimised(acquisition, space)


def by_scalarised(space: SearchSpace, history: History, seed: int) -> list[Vector]:
    from botorch.acquisition import LogExpectedImprovement

    points, values = _tensors(history)
    weight = rng_factory(seed)(history[-1].generation + 1, 0, "sample").random()
    unit = (values - values.amin(0)) / (values.amax(0) - values.amin(0)).clamp_min(1e-9)
    shares = unit.new_tensor([weight, 1.0 - weight])
    told = (unit * shares).amin(1, keepdim=True) + 0.05 * (unit * shares).sum(1, keepdim=True)
    with _seeded(seed, history):
        return _optimised(LogExpectedImprovement(_process(points, told), told.max()), space)


def _worst(history: History) -> Worst:
    parents = [o for o in history if o.operator == "parent"]
    return Worst.of([o.score or 0.0 for o in parents], [o.tokens or 0.0 for o in parents])


def _tensors(history: History) -> Any:
    import torch

    points = torch.tensor([o.vector for o in history], dtype=torch.float64)
    rows = [[o.score, -(o.tokens or 0.0)] for o in history]
    return points, torch.tensor(rows, dtype=torch.float64)


def _seeded(seed: int, history: History) -> Any:
    import torch
    from botorch.utils.sampling import manual_seed

    torch.set_num_threads(1)
    return manual_seed(1000 * seed + len(history))


def _process(points: Any, values: Any) -> Any:
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from botorch.models.transforms import Standardize
    from gpytorch.mlls import ExactMarginalLogLikelihood

    model = SingleTaskGP(points, values, outcome_transform=Standardize(1))
    fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
    return model


def _optimised(acquisition: Any, space: SearchSpace) -> list[Vector]:
    import torch
    from botorch.optim import optimize_acqf

    box = torch.tensor([[0.0], [1.0]], dtype=torch.float64).expand(2, space.dimensions)
    found, _ = optimize_acqf(acquisition, box, q=1, num_restarts=5, raw_samples=256)
    return [tuple(float(x) for x in found[0])]


ARMS = {
    "auto": by_auto,
    "nsga2": by_nsga2,
    "qlognehvi": by_qlognehvi,
    "scalarised": by_scalarised,
    "random": by_chance,
}


def run(there: Any, arm: str, seed: int, budget: int) -> dict[str, Any]:
    """One search as plain data: search and sealed figures of each checkpoint's front."""
    history: list[Observation] = []
    begun = time.process_time()

    def tell(generation: int, slot: int, operator: str, vector: Vector) -> None:
        score, cost, evidence = there.ask(vector)
        found = Observation(generation, slot, vector, operator, score, evidence=evidence)
        history.append(replace(found, tokens=cost))

    for slot, (operator, _, vector) in enumerate(first_points(there.space)):
        tell(0, slot, operator, vector)
    while len(history) < budget:
        asked = ARMS[arm](there.space, tuple(history), seed)
        if not asked:
            break
        generation = history[-1].generation + 1
        for slot, vector in enumerate(asked[: budget - len(history)]):
            tell(generation, slot, arm, vector)
    fronts = {}
    for spent in CHECKPOINTS:
        if spent <= budget:
            seen = history[:spent]
            scores, costs = np.array([[o.score, o.tokens] for o in seen], float).T
            kept = [seen[place] for place in undominated(scores, costs)]
            fronts[spent] = [there.sealed(o.vector) for o in kept]
    parents = [there.sealed(o.vector) for o in history if o.operator == "parent"]
    return {
        "arm": arm,
        "seed": seed,
        "fronts": fronts,
        "parents": parents,
        "spent": len(history),
        "cpu_s": round(time.process_time() - begun, 1),
    }


def area(front: Sequence[Sequence[float]], parents: Sequence[Sequence[float]]) -> float:
    worst = Worst.of(*np.array(parents, float).T)
    return Front.of(worst, *np.array(front, float).T).area


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=FAMILIES, default="skills")
    parser.add_argument("--arms", default=",".join(ARMS), help="of " + ", ".join(ARMS))
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--budget", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("build/front"))
    args = parser.parse_args(arguments)
    arms = args.arms.split(",")
    if unknown := [arm for arm in arms if arm not in ARMS]:
        parser.error(f"--arms: no {unknown[0]!r}; there are {', '.join(ARMS)}")
    if args.budget < CHECKPOINTS[0]:
        parser.error(f"--budget: {args.budget} is less than the first look, at {CHECKPOINTS[0]}")
    runs: Runs = {}
    make = lru_cache(maxsize=1)(FAMILIES[args.family])
    for seed in range(args.seeds):
        for arm in arms:
            path = path_of(args.out, args.family, arm, seed, args.budget)
            if not path.exists():
                save(path, run(make(seed), arm, seed, args.budget))
            runs[arm, seed] = json.loads(path.read_text(encoding="utf-8"))
            print(
                f"{arm} seed {seed}: {runs[arm, seed]['cpu_s']:.0f} s of the processor", flush=True
            )
    at = [checkpoint for checkpoint in CHECKPOINTS if checkpoint <= args.budget]
    text = written(runs, arms, at)
    (args.out / "results.md").write_text(text, encoding="utf-8")
    print(text)


Runs = dict[tuple[str, int], dict[str, Any]]
"""By arm and seed."""


def written(runs: Runs, arms: Sequence[str], at: Sequence[int]) -> str:
    shares = shares_of(runs, arms, at)
    return f"{table(shares)}\n\n{comparisons(shares, arms[0])}\n"


def shares_of(runs: Runs, arms: Sequence[str], at: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Arm -> evaluations -> (seeds,) areas, as a share of the best that any arm has of the seed."""
    areas = np.array([
        [[area(run["fronts"][str(c)], run["parents"]) for c in at]
         for (of, _), run in runs.items() if of == arm]
        for arm in arms
    ])  # fmt: skip
    most = areas.max(axis=(0, 2))
    shares = areas / np.where(most > 0, most, 1.0)[:, None]
    return {
        arm: {f"{c} evaluations": shares[i, :, j] for j, c in enumerate(at)}
        for i, arm in enumerate(arms)
    }


def table(shares: dict[str, dict[str, Any]]) -> str:
    """Mean share of the best area, by arm, with its standard error over seeds."""
    rows = [["arm", *next(iter(shares.values()))]]
    for arm, found in shares.items():
        spread = [s.std(ddof=1) / np.sqrt(len(s)) if len(s) > 1 else np.nan for s in found.values()]
        means = [s.mean() for s in found.values()]
        rows.append([arm, *(f"{m:.3f} ± {e:.3f}" for m, e in zip(means, spread, strict=True))])
    return comparing.markdown(rows)


def comparisons(shares: dict[str, dict[str, Any]], arm: str) -> str:
    """How far one arm is ahead of each other, paired by seed."""
    rows = [["rival", "at", "seeds", f"median of {arm}'s share less its own", "95 %", "p (Holm)"]]
    for at, mine in shares[arm].items():
        rivals = {rival: found[at] for rival, found in shares.items() if rival != arm}
        tested = comparing.holm([comparing.signed_rank(mine, found) for found in rivals.values()])
        for (rival, found), p in zip(rivals.items(), tested, strict=True):
            low, high = comparing.median_interval(mine - found)
            rows.append(
                [rival, at, str(len(mine)), f"{np.median(mine - found):+.3f}",
                 f"{low:+.3f} to {high:+.3f}", f"{p:.4f}"]
            )  # fmt: skip
    return comparing.markdown(rows)


if __name__ == "__main__":
    main()
