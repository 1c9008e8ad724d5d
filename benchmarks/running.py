"""One search of one arm on one problem, and what it found; many of them, saved one by one.

Every run is a file of its own, written when it ends: a suite that is stopped goes on where it was.
The budget counts evaluations of all search items; the cheap rivals, failures and duplicates are in
it, and a gradient counts as three. An arm that begins by itself has it all to itself.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from agentmerge.config import models_asked
from agentmerge.contracts.operators import CHEAP
from agentmerge.contracts.strategy import Observation, Strategy, cost_of, rng_factory
from agentmerge.testing.problem import Problem, Shown
from benchmarks.advised import Adviser
from benchmarks.choosing import Asked, beyond_noise, most_wins

Make = Callable[[int], Problem]
"""The problem of a seed; it can be sent to another process."""

SHORTLIST = 5
CHECKPOINTS = (10, 15, 20, 25, 30, 40, 50, 60, 80, 100)


@dataclass(frozen=True, slots=True)
class Arm:
    """name: in tables. make: a fresh strategy. advise: seed -> the agents that it listens to.

    alone: whether it is told nothing of the cheap rivals and begins as it would by itself. They
    cost it nothing then, and its answer has to beat them all the same.
    lag: its window, as ``search.lag``; 0 where it knows all before each proposal.
    """

    name: str
    make: Callable[[], Strategy]
    advise: Callable[[int], Adviser] | None = None
    alone: bool = False
    lag: int = 0


def run_search(problem: Problem, arm: Arm, seed: int, budget: int) -> dict[str, Any]:
    """The search as plain data: every point with its cost and score, and the answer's scores."""
    strategy = arm.make()
    adviser = arm.advise(seed) if arm.advise else None
    space, rng_for = problem.space, rng_factory(seed)
    history: list[Observation] = []
    spent, thinking, stopped = 0, 0.0, ""
    points: list[dict[str, Any]] = []

    def tell(generation: int, slot: int, operator: str, vector: Any, outcome: Shown) -> None:
        nonlocal spent
        again = outcome.gradient is not None and any(o.vector == vector for o in history)
        spent += cost_of(outcome.gradient is not None) - again  # its score is known
        history.append(
            Observation(
                generation,
                slot,
                vector,
                operator,
                outcome.score,
                tasks=_by_task(problem, outcome),
                recipe_hash=repr(vector),
                evidence=outcome.evidence,
                gradient=outcome.gradient,
                loss=outcome.loss,
            )
        )
        points.append(
            {
                "spent": spent,
                "generation": generation,
                "operator": operator,
                "score": outcome.score,
            }
        )

    for slot, (operator, _, vector) in enumerate(problem.first_points()):
        tell(0, slot, operator, vector, problem.evaluate(vector))
    rivals = list(history)
    if arm.alone:
        rivals = [replace(o, vector=None, score=None) for o in history]
        spent, points = 0, []
    size = strategy.population(space.dimensions)
    while spent < budget:
        told = (*rivals, *history[len(rivals) :])
        guidance = None
        if adviser and models_asked(history[-1].generation, size):
            guidance = adviser.guidance(problem, history, budget - spent)
        before = time.perf_counter()
        count = min(size, budget - spent)
        asked = strategy.propose(space, within(told, arm.lag, size), guidance, count, rng_for)
        if arm.lag and not asked:  # no search ends for what it knows before all is known
            asked = strategy.propose(space, told, guidance, count, rng_for)
        thinking += time.perf_counter() - before
        if not asked:
            stopped = "nothing to gain"
            break
        generation = history[-1].generation + 1
        for slot, proposal in enumerate(asked):
            if spent >= budget:
                break
            wanted = proposal.want == "gradient" and spent + proposal.cost <= budget
            ask = problem.gradient if wanted else problem.evaluate
            assert proposal.vector is not None
            vector = space.made_legal(proposal.vector)
            tell(generation, slot, proposal.operator, vector, ask(vector))
    return {
        "problem": problem.name,
        "arm": arm.name,
        "seed": seed,
        "budget": budget,
        "spent": spent,
        "stopped": stopped,
        "thinking_s": round(thinking, 3),
        "advice": adviser.costs() if adviser else None,
        "points": points,
        "answers": _answers(problem, history, seed),
    }


def within(history: Sequence[Observation], lag: int, size: int) -> Sequence[Observation]:
    """A history as the next proposal knows it (``search.window``): the last ones are pending.

    size: of a generation.
    """
    room = lag - size
    if room <= 0:
        return history
    known = max(history[-room].generation - 1, 0) if len(history) > room else 0
    unknown = {"score": None, "tasks": (), "evidence": None, "gradient": None, "loss": None}
    return [o if o.generation <= known else replace(o, pending=True, **unknown) for o in history]


def _by_task(problem: Problem, outcome: Shown) -> tuple[tuple[str, float], ...]:
    """(task, mean value), where items are known."""
    if outcome.evidence is None:
        return ()
    values, task = outcome.evidence.values, outcome.evidence.items.task
    return tuple((n, float(values[task == i].mean())) for i, n in enumerate(problem.tasks))


def best_at(run: dict[str, Any], spent: int) -> float:
    """The best search score of a run once so much was spent."""
    scores = [p["score"] for p in run["points"] if p["spent"] <= spent and p["score"] is not None]
    return max(scores) if scores else float("-inf")


def _answers(problem: Problem, history: Sequence[Observation], seed: int) -> dict[str, Any]:
    """The best-seen point, the choice by repeated splits, and the best cheap rival, sealed."""
    scored = [o for o in history if o.score is not None and o.vector is not None]
    ranked = sorted(scored, key=lambda o: (-(o.score or 0.0), o.generation, o.slot))
    rivals = [o for o in ranked if o.operator in CHEAP]
    winner = _chosen(ranked[:SHORTLIST], seed)
    answer = winner if _beyond_noise(winner, ranked, rivals, seed) else rivals[0]
    answers = {}
    sealed: dict[Any, np.ndarray] = {}
    if answer.operator not in CHEAP:  # the product's second question: what do sealed items say?
        for one in (answer, rivals[0]):
            sealed[one.vector] = problem.sealed(one.vector or ())
        if sealed[answer.vector].sum() <= sealed[rivals[0].vector].sum():
            answer = rivals[0]
    found = {"best": ranked[0], "chosen": answer, "rival": rivals[0]}
    for name, observation in found.items():
        vector = observation.vector
        if vector not in sealed:
            sealed[vector] = problem.sealed(vector or ())
        answers[name] = {
            "operator": observation.operator,
            "search": observation.score,
            "sealed": float(sealed[vector].sum()),
            "vector": vector,
        }
    mine, theirs = sealed[found["chosen"].vector], sealed[found["rival"].vector]
    gap = (mine - theirs) * len(theirs)
    answers["chosen"]["over_rival"] = float(gap.mean())
    answers["chosen"]["over_rival_se"] = float(gap.std() / np.sqrt(len(gap)))
    return answers


def _chosen(shortlist: Sequence[Observation], seed: int) -> Observation:
    if any(o.evidence is None for o in shortlist):
        return shortlist[0]
    items = shortlist[0].evidence.items  # type: ignore[union-attr]
    values = np.stack([o.evidence.values for o in shortlist])  # type: ignore[union-attr]
    winner, _ = most_wins(values * items.weight, items.task, rng_factory(seed)(0, 0, "items"))
    return shortlist[winner]


def _beyond_noise(
    winner: Observation, ranked: Sequence[Observation], rivals: Sequence[Observation], seed: int
) -> bool:
    """The product's rule (``search.choosing``): ahead of each rival, all tries counted."""
    if winner.operator in CHEAP:
        return False
    tried = [o for o in ranked if o.operator not in CHEAP]
    values = []
    for group in (tried, rivals):
        found = [o.evidence.values for o in group if o.evidence is not None]
        if len(found) != len(group):
            return True
        values.append(np.stack(found, 1))
    assert winner.evidence is not None
    items = winner.evidence.items
    asked = Asked(items.task, items.weight)
    return beyond_noise(asked, values[0], tried.index(winner), values[1], seed)


def run_suite(
    makes: Mapping[str, Make],
    arms: Sequence[Arm],
    seeds: Sequence[int],
    budget: int,
    out: Path,
    processes: int = 1,
) -> list[dict[str, Any]]:
    """Every (problem, seed, arm), from its file where it was run before.

    processes: how many share the seeds; each search runs in one, and says the same in any.
    """
    paths = [
        (name, seed, {arm.name: path_of(out, name, arm.name, seed, budget) for arm in arms})
        for name in makes
        for seed in seeds
    ]
    open_jobs = [
        (makes[name], [(arm, found[arm.name]) for arm in arms], seed, budget)
        for name, seed, found in paths
        if not all(path.is_file() for path in found.values())
    ]
    if processes == 1:
        for job in open_jobs:
            run_seed(*job)
    elif open_jobs:
        for make in dict.fromkeys(job[0] for job in open_jobs):
            make(seeds[0])  # what all seeds share, a family say, is made once
        # spawned, since a fork of a process that has used torch may hang
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, context) as pool:
            for future in [pool.submit(run_seed, *job) for job in open_jobs]:
                future.result()
    return [json.loads(path.read_text()) for _, _, found in paths for path in found.values()]


def path_of(out: Path, problem: str, arm: str, seed: int, budget: int) -> Path:
    return out / "runs" / f"{problem}--{arm}--{seed}--{budget}.json"


def run_seed(make: Make, arms: Sequence[tuple[Arm, Path]], seed: int, budget: int) -> None:
    """One seed's searches of a problem, each saved as it ends; those saved before are left."""
    problem: Problem | None = None
    for arm, path in arms:
        if path.is_file():
            continue
        problem = problem or make(seed)
        before = time.perf_counter()
        run = run_search(problem, arm, seed, budget)
        save(path, run)
        took = time.perf_counter() - before
        print(
            f"{problem.name} {arm.name} seed {seed}: search {best_at(run, budget):.3f}, "
            f"sealed {run['answers']['chosen']['sealed']:.3f}, {took:.0f} s",
            flush=True,
        )


def save(path: Path, run: dict[str, Any]) -> None:
    """In one step, so that what is there is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(run))
    draft.replace(path)
