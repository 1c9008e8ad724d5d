"""A pool of experts: each is asked alone, a few are chosen, and merges are of those."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from agentmerge.config import SearchConfig
from agentmerge.contracts.advice import StructuralMove
from agentmerge.contracts.operators import DEPTH, PARENT, SCALE, STRUCTURE, UNIFORM
from agentmerge.errors import ConfigError, UserError
from agentmerge.ledger import Ledger
from agentmerge.ledger.folder import LEDGER
from agentmerge.ledger.words import openings
from agentmerge.preflight.plan import plan_of
from agentmerge.preflight.prepare import prepare
from agentmerge.recipe import Recipe
from agentmerge.search.models import OwnScore, chosen
from agentmerge.session.driving import resume, run
from agentmerge.session.replay import replay
from agentmerge.space.moves import moved

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
        body[key] = {**body[key], **value}
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
