"""The benchmark of stacks gives what the product's worker gives; its rivals keep their rules."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from agentmerge.config import LayersConfig
from agentmerge.contracts.strategy import Observation, rng_factory
from agentmerge.demo.family import TinyFamily
from agentmerge.testing.tiny import TINY, TinyProblem
from agentmerge.workers.hf import HfWorker
from benchmarks import stack
from benchmarks.stack import settled
from benchmarks.stack_problem import StackProblem
from benchmarks.stack_rivals import Genetic
from tests.benchmarks.test_tiny import demo_search

ITEMS = 40
FORMS = {"beside": LayersConfig(most=3), "path": LayersConfig(most=3, path=True, repeats=2)}


def problem_of(form: str) -> StackProblem:
    weights = TinyProblem(TINY["tiny-so-8"], 0)
    answer = weights.space.everywhere(weight=0.85)[1]
    return StackProblem(weights, answer, FORMS[form])


def drawn(problem: StackProblem, seed: int) -> tuple[float, ...]:
    """A legal point around the weight answer."""
    rng = np.random.default_rng(seed)
    near = np.array(problem.neutral()) + 0.15 * rng.standard_normal(problem.space.dimensions)
    return problem.space.made_legal(tuple(np.clip(near, 0.0, 1.0).tolist()))


def test_it_scores_stacks_as_the_worker_does(family: TinyFamily, tmp_path: Path) -> None:
    prepared = demo_search(family, tmp_path, ITEMS, layers=3)
    worker = HfWorker(prepared.spec, prepared.taskset)
    places = {"base": family.base} | dict(zip(family.skills, family.experts, strict=True))
    known = {path: name for name, path in prepared.paths.items()}
    names = {name: known[path] for name, path in places.items()}
    for form in FORMS:
        problem = problem_of(form)
        point = drawn(problem, 1)
        recipe = problem.space.recipe(point).renamed(lambda name: names.get(name, name))
        worker.load(recipe)
        asked = worker.score(prepared.taskset.refs("search"))
        evidence = problem.evaluate(point).evidence
        assert evidence is not None
        assert problem.depth(point) > 4
        for task in range(2):
            mine = np.flatnonzero(evidence.items.task == task)[:ITEMS]
            theirs = asked[task * ITEMS : (task + 1) * ITEMS]
            assert [r.value for r in theirs] == evidence.values[mine].tolist()
            margins = [r.margin for r in theirs]
            np.testing.assert_allclose(margins, evidence.signals[mine], atol=1e-3)


def test_its_slopes_are_those_of_the_loss_absent_layers_included(family: TinyFamily) -> None:
    problem = problem_of("beside")
    point = problem.neutral()
    shown = problem.gradient(point)
    assert shown.gradient is not None
    assert all(shown.gradient), "an absent layer has a slope too"
    again = problem_of("beside").evaluate(point)
    assert (shown.score, shown.evidence.signals.tolist()) == (
        again.score, again.evidence.signals.tolist(),
    )  # fmt: skip
    axis, step = 5, 0.03
    runs = problem.runs(point)
    losses = []
    for sign in (-1, 1):
        place, part = problem.space.axes[axis].group, axis % 2
        model, layer, strength = runs[place]
        moved = [*strength]
        moved[part] += sign * step * 2.0  # the axis is two wide
        stack_ = [*runs[:place], (model, layer, tuple(moved)), *runs[place + 1 :]]
        losses.append(problem.stacks.slopes(stack_, problem._search)[0])
    slope = (losses[1] - losses[0]) / (2 * step)
    assert slope == pytest.approx(shown.gradient[axis], rel=0.1)


@pytest.mark.slow
def test_an_arm_goes_on_where_it_was_and_never_deeper_than_allowed(
    family: TinyFamily, tmp_path: Path
) -> None:
    line = ["--family", "so", "--seeds", "1", "--budget", "12", "--out", str(tmp_path)]
    line += ["--most", "2", "--arms", "gradient,genetic_path", "--against", "gradient"]
    stack.main(line)
    files = {path.name: path.read_bytes() for path in (tmp_path / "runs").iterdir()}
    assert len(files) == 3
    for name, body in files.items():
        run = json.loads(body)
        assert run["spent"] <= run["budget"]
        if "weights--" not in name:
            assert max(answer["layers"] for answer in run["answers"].values()) <= 6
            assert run["answers"]["best"]["search"] >= run["weights"]["search"]
            ladder, chosen = run["ladder"], run["answers"]["chosen"]
            assert ladder[0] == {"layers": 4, "search": run["weights"]["search"]}
            assert [rung["layers"] for rung in ladder] == list(range(4, 4 + len(ladder)))
            assert {key: chosen[key] for key in ladder[0]} in ladder
    (tmp_path / "runs" / "tiny-so-8+2--genetic_path--0--12.json").unlink()
    stack.main(line)
    for name, body in files.items():
        again, before = (
            json.loads(text) | {"processor_s": 0, "thinking_s": 0}
            for text in ((tmp_path / "runs" / name).read_bytes(), body)
        )
        assert again == before
    (row, _) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert row["problem"] == "tiny-so-8+2"
    assert "sealed error" in (tmp_path / "results.md").read_text()


def test_the_genetic_algorithm_breeds_what_is_good(family: TinyFamily) -> None:
    """On a landscape without models: switches and scales near a target."""
    space = problem_of("path").space
    switches = np.array([axis.kind == "bool" for axis in space.axes])
    target = np.where(np.arange(space.dimensions) % 5 == 0, 0.9, 0.1)

    def score(vector: tuple[float, ...]) -> float:
        point = np.array(vector)
        wrong = (point >= 0.5) != (target >= 0.5)
        return -float(wrong[switches].sum() + abs(point - target)[~switches].sum())

    start = tuple([0.5] * space.dimensions)
    history = [Observation(0, 0, start, "uniform", score(start))]
    for generation in range(1, 25):
        asked = Genetic().propose(space, history, None, 16, rng_factory(0))
        assert asked == Genetic().propose(space, history, None, 16, rng_factory(0))
        history += [
            Observation(generation, slot, p.vector, p.operator, score(p.vector))
            for slot, p in enumerate(asked)
        ]
    assert max(o.score for o in history) > 0.8 * score(start)


@pytest.mark.parametrize(
    ("search", "sealed", "layers"),
    [
        ((0.5, 0.5, 0.5025), (0.5, 0.5, 0.9), 4),  # search items tell none from the weight answer
        ((0.5, 0.9, 0.91), (0.5, 0.5, 0.9), 4),  # sealed items do not confirm it
        ((0.5, 0.9, 0.91), (0.5, 0.8, 0.9), 5),  # the shallowest that is no worse
        ((0.5, 0.6, 0.9), (0.5, 0.6, 0.9), 6),
    ],
)
def test_an_answer_is_settled_by_both_kinds_of_items(
    search: tuple[float, ...], sealed: tuple[float, ...], layers: int
) -> None:
    size, draw = 400, np.random.default_rng(0).permutation(400)
    items = SimpleNamespace(task=np.arange(size) % 2, weight=np.full(size, 1 / size))

    def shown(vector: tuple[float]) -> Any:
        values = (draw < size * search[int(vector[0])]).astype(float)
        return SimpleNamespace(
            score=values.mean(), evidence=SimpleNamespace(values=values, items=items)
        )

    problem: Any = SimpleNamespace(
        tasks=("a", "b"),
        neutral=lambda: (0.0,),
        depth=lambda vector: 4 + int(vector[0]),
        evaluate=shown,
        sealed=lambda vector: (draw < size * sealed[int(vector[0])]) / size,
        space=SimpleNamespace(num_layers=4, shallower=lambda vector: (vector[0] - 1,)),
    )
    found = settled(problem, {"seed": 0, "answers": {"best": {"vector": [2.0]}}})
    assert [rung["layers"] for rung in found["ladder"]] == [4, 5, 6]
    chosen = found["answers"]["chosen"]
    assert chosen["layers"] == layers
    assert chosen["sealed"] == pytest.approx(sealed[layers - 4])
    assert (chosen["over_rival"] > 0) == (layers > 4)
