"""A pool of experts: each is asked alone, a few are chosen, and merges are of those."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from agentmerge.config import SearchConfig
from agentmerge.contracts.advice import Guidance, StructuralMove
from agentmerge.contracts.operators import DEPTH, PARENT, SCALE, STRUCTURE, UNIFORM
from agentmerge.errors import ConfigError, UserError
from agentmerge.ledger import Ledger
from agentmerge.ledger.folder import LEDGER
from agentmerge.ledger.words import openings
from agentmerge.merging import experts
from agentmerge.preflight.plan import plan_of
from agentmerge.preflight.prepare import prepare
from agentmerge.recipe import Recipe
from agentmerge.search import models, structure
from agentmerge.search.models import OwnScore, chosen
from agentmerge.session.driving import branch, resume, run
from agentmerge.session.replay import replay
from agentmerge.space.moves import moved
from agentmerge.space.seeds import parents

NAMES = [f"expert{number}" for number in range(6)]


def config(**changes: Any) -> SearchConfig:
    body: dict[str, Any] = {
        "genome": {
            "models": NAMES,
            "base_model": "base",
            "merge_method": "task_arithmetic",
            "layer_granularity": 2,
            "pool": {"most": 2},
        },
        "tasks": [{"name": "one"}, {"name": "two", "weight": 0.5}],
        "limit": 40,
        "search": {"algorithm": "cma_es", "seed": 3, "population": 4},
        "worker": {"kind": "fake"},
        "budget": {"max_evaluations": 24},
    }
    for key, value in changes.items():
        body[key] = {**body[key], **value} if isinstance(body.get(key), dict) else value
    return SearchConfig.from_text(yaml.safe_dump(body), "pool")


def trace(ledger: Ledger, name: str) -> list[tuple[Any, ...]]:
    return [
        (c.generation, c.slot, c.operator, c.recipe_hash, c.score)
        for c in ledger.candidates(ledger.run(name).id)
    ]


def test_few_are_chosen_after_each_was_asked_alone(tmp_path: Path) -> None:
    run(config(), name="a", runs_dir=tmp_path)
    with Ledger(tmp_path / LEDGER) as ledger:
        row = ledger.run("a")
        found = ledger.candidates(row.id)
        (opening,) = openings(ledger.advice(row.id, role=STRUCTURE))
        merged = {
            name
            for c in found
            if c.generation
            for name in Recipe.parse(ledger.recipe(c.recipe_hash, row.id)).models
        }
        assert replay("a", runs_dir=tmp_path).identical
    first = [c for c in found if c.generation == 0]
    assert [c.label for c in first] == ["base", *NAMES]
    assert {c.operator for c in first} == {PARENT}
    assert opening.move.change == "models"
    picked = set(opening.move.value.split(", "))
    assert len(picked) == 2
    assert merged - {"base"} == picked
    best = max(first[1:], key=lambda c: c.score or 0.0)
    assert best.label in picked
    assert {UNIFORM, SCALE, DEPTH} <= {c.operator for c in found if c.generation == 1}
    assert len(found) == 24
    assert row.card.best_rival is not None
    assert len(row.card.parents) == 7


def test_a_search_that_stopped_anywhere_goes_on_as_if_it_had_not(tmp_path: Path) -> None:
    run(config(), name="whole", runs_dir=tmp_path)
    for stop in (8, 12):
        name = f"cut{stop}"
        limited = config(budget={"max_evaluations": stop})
        run(limited, name=name, runs_dir=tmp_path)
        resume(name, runs_dir=tmp_path, overrides={"budget.max_evaluations": 24})
        with Ledger(tmp_path / LEDGER) as ledger:
            assert trace(ledger, name) == trace(ledger, "whole")


def test_a_branch_that_asks_something_else_asks_the_cheap_rivals_again(tmp_path: Path) -> None:
    run(config(budget={"max_evaluations": 14}), name="a", runs_dir=tmp_path)
    asked = {"limit": 44, "budget.max_evaluations": 18}
    row = branch("a", at=1, name="b", runs_dir=tmp_path, overrides=asked)
    with Ledger(tmp_path / LEDGER) as ledger:
        own = [c for c in ledger.candidates(row.id) if not c.prior]
        (opening,) = openings(ledger.advice(row.id, role=STRUCTURE))
        (before,) = openings(ledger.advice(ledger.run("a").id, role=STRUCTURE))
    assert opening.move.value == before.move.value
    assert replay("b", runs_dir=tmp_path).identical
    begun = {c.operator for c in own if c.generation == opening.generation + 1}
    assert {UNIFORM, SCALE, DEPTH} <= begun
    assert row.card.best_rival is not None


def test_a_later_space_begins_with_the_best_and_no_cheap_rivals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    word = Guidance(structural_move=StructuralMove("swap_model", "expert0 -> expert1"))
    monkeypatch.setattr(structure, "guidance_of", lambda said: replace(word, source="model"))
    long = {"search": {"max_generations": 2}, "budget": {"max_evaluations": 60}}
    run(config(**long), name="a", runs_dir=tmp_path)
    with Ledger(tmp_path / LEDGER) as ledger:
        row = ledger.run("a")
        found = ledger.candidates(row.id)
        first, later = openings(ledger.advice(row.id, role=STRUCTURE))
    assert (first.refusal, later.refusal) == ("", "")
    begun = [c for c in found if c.generation == later.generation + 1]
    assert {c.operator for c in begun} == {STRUCTURE}
    assert {c.label.split()[0] for c in begun} == {"from", "uniform"}


def test_no_space_begins_with_a_merge_of_nothing(tmp_path: Path) -> None:
    linear = {"merge_method": "linear", "base_model": None}
    run(config(genome=linear, budget={"max_evaluations": 9}), name="a", runs_dir=tmp_path)
    with Ledger(tmp_path / LEDGER) as ledger:
        found = ledger.candidates(ledger.run("a").id)
    assert [c.operator for c in found if c.generation == 1] == [UNIFORM]


@pytest.mark.parametrize("left", [1, 2])
def test_where_fewer_than_two_experts_have_a_score_the_search_ends(
    tmp_path: Path, left: int
) -> None:
    alone = parents(prepare(config(), weights=False).space)
    failing = [recipe.hash() for name, recipe, _ in alone if name in NAMES[left:]]
    few = config(worker={"options": {"fail_when": failing}}, budget={"max_evaluations": 10})
    row = run(few, name="a", runs_dir=tmp_path)
    assert replay("a", runs_dir=tmp_path).identical
    why = {1: "fewer than two experts of the pool have a score", 2: "budget"}
    assert (row.status, row.stop_reason) == ("done", why[left])
    with Ledger(tmp_path / LEDGER) as ledger:
        found = ledger.candidates(row.id)
        merged = [ledger.recipe(c.recipe_hash, row.id) for c in found if c.generation]
    assert {c.label for c in found if c.score is None} == set(NAMES[left:])
    assert bool(merged) == (left == 2)
    assert not any(NAMES[left] in text for text in merged)


def test_weights_are_read_once_and_who_is_merged_is_not_said_to_be_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[list[str]] = []

    def surveyed(names: Sequence[str], base: str | None) -> Any:
        read.append(list(names))
        facts = [SimpleNamespace(model=n, damage=("zeros",), misfit="") for n in names[1:]]
        return SimpleNamespace(experts=facts, duplicates=())

    models._surveyed.cache_clear()
    monkeypatch.setattr(models, "reads_models", lambda kind: True)
    monkeypatch.setattr(experts, "survey_experts", surveyed)
    run(config(budget={"max_evaluations": 9}), name="a", runs_dir=tmp_path)
    assert len(read) == 1
    with Ledger(tmp_path / LEDGER) as ledger:
        (opening,) = openings(ledger.advice(ledger.run("a").id, role=STRUCTURE))
    merged = opening.move.value.split(", ")
    said = [name for name in NAMES if f"{name} zeros" in opening.move.why]
    assert set(said) == set(NAMES[1:]) - set(merged)
    assert len(merged) == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"genome": {"pool": 6}}, "nothing is to be chosen"),
        ({"genome": {"pool": {"most": 1}}}, "most"),
        ({"genome": {"pool": {"most": 17}}}, "most"),
        ({"genome": {"pool": {"least": 2}}}, "least"),
        ({"genome": {"models": [f"m{n}" for n in range(65)]}}, "at most 64"),
        ({"budget": {"max_evaluations": 7}}, "pays for no merge"),
        ({"genome": {"merge_method": "nuslerp", "pool": 3}}, "exactly 2"),
        ({"genome": {"models": ["a/one", "b/one", "two", "three"]}}, "of its own, .*: 'one'; "),
        ({"genome": {"models": ["one", "two", "three, four"]}}, "'three, four'"),
        ({"genome": {"models": ["one", "two", "x -> y"]}}, "'x -> y'"),
    ],
)
def test_nonsense_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        prepare(config(**changes), weights=False)


def test_the_plan_is_of_merges_as_they_will_be() -> None:
    prepared = prepare(config(genome={"pool": 3}), weights=False)
    assert plan_of(prepared, None, "").dimensions == prepared.space.dimensions // 2


def test_what_is_stored_of_other_configs_is_what_it_was() -> None:
    body = config().to_yaml()
    assert "pool" in body
    without = config(genome={"pool": None})
    assert "pool" not in without.to_yaml()


def test_other_experts_come_by_moves() -> None:
    space = prepare(config(genome={"pool": 3}), weights=False).space
    two = moved(space, StructuralMove("models", "expert0, expert4"))
    assert two.models == ("expert0", "expert4")
    three = moved(two, StructuralMove("add_model", "expert2"))
    assert three.models == ("expert0", "expert4", "expert2")
    swapped = moved(two, StructuralMove("swap_model", "expert4 -> expert5"))
    assert swapped.models == ("expert0", "expert5")
    for move, said in (
        (StructuralMove("add_model", "nobody"), "there is no model 'nobody' in the pool"),
        (StructuralMove("swap_model", "expert3 -> expert5"), "no model 'expert3' to drop"),
        (StructuralMove("add_model", "expert4"), "twice"),
    ):
        with pytest.raises(UserError, match=said):
            moved(two, move)
    with pytest.raises(UserError, match="3 models at most"):
        moved(three, StructuralMove("add_model", "expert1"))


def shown(*parts: float) -> OwnScore:
    return OwnScore(sum(parts), parts)


BASE = shown(0.1, 0.1)
POOL = {
    "both": shown(0.5, 0.5),
    "both again": shown(0.5, 0.49),
    "one": shown(0.95, 0.02),
    "two": shown(0.1, 0.9),
    "other": shown(0.1, 0.09),
    "broken": shown(0.95, 0.9),
}
ALIKE = {"both": frozenset({"both again"}), "both again": frozenset({"both"})}


@pytest.mark.parametrize(
    ("most", "names"),
    [
        (2, ["both", "one"]),
        (3, ["both", "one", "two"]),
        (5, ["both", "one", "two"]),  # the twin is out, the other no better than the base
    ],
)
def test_the_rule_takes_who_adds_most(most: int, names: list[str]) -> None:
    assert chosen(POOL, BASE, most, {"broken": "zeros"}, ALIKE) == names


def test_a_lead_within_the_noise_is_none() -> None:
    pool = {"good": shown(0.8, 0.3), "also": shown(0.7, 0.3), "lucky": shown(0.1, 0.32)}
    assert chosen(pool, None, 2, {}, {})[1] == "lucky"
    assert chosen(pool, None, 2, {}, {}, noise=0.05)[1] == "also"
