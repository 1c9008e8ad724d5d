"""Constraints: what breaks them ranks last, is never the answer, and is said where all do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from agentmerge.cli.render import card_text, constraint_text
from agentmerge.config import Constraint, SearchConfig
from agentmerge.contracts.card import Compared
from agentmerge.contracts.strategy import Observation
from agentmerge.errors import ConfigError
from agentmerge.evaluation.tasks import Objective
from agentmerge.ledger import Candidate, Ledger, incumbent
from agentmerge.search.constraints import PENALTY, floors, kept, penalised, violation
from agentmerge.session import driving
from tests.session.conftest import command, config, config_text, trace_of
from tests.session.test_resume import kill_after

SEARCH = {"algorithm": "cma_es", "population": 5}


def parent(label: str, slot: int, **tasks: float) -> Candidate:
    score = sum(tasks.values())
    return Candidate(0, slot, "parent", label, None, label, "scored", score, tuple(tasks.items()))


PARENTS = [parent("north", 0, one=0.8, two=0.3), parent("south", 1, one=0.2, two=0.6)]
BOTH = [Objective("one", 1.0, True, ("one",)), Objective("two", -0.5, False, ("two",))]


def test_a_floor_is_the_best_parents_metric_less_the_drop() -> None:
    found = floors([Constraint(task="one", max_drop=0.02)], BOTH, PARENTS)
    assert [(f.task, f.parent.label, f.metric) for f in found] == [("one", "north", 0.8)]
    assert violation(found, {"one": 0.78, "two": 9.0}) == 0.0  # a drop of exactly that is allowed
    assert violation(found, {"one": 0.7, "two": 0.0}) == pytest.approx(0.08)


def test_lower_may_be_better_and_a_star_is_every_other_task() -> None:
    asked = [Constraint(task="*", max_drop=0.1), Constraint(task="one", max_drop=0.5)]
    found = floors(asked, BOTH, PARENTS)
    assert [(f.task, f.max_drop, f.parent.label) for f in found] == [
        ("one", 0.5, "north"),
        ("two", 0.1, "north"),  # 0.3 is better than 0.6 there
    ]
    assert violation(found, {"one": 0.25, "two": 0.45}) == pytest.approx(0.05 + 0.05)


def test_without_a_scored_parent_nothing_can_be_asked() -> None:
    assert floors([Constraint(task="*", max_drop=0.0)], BOTH, []) == []


def test_strategies_are_told_a_lower_score() -> None:
    told = [
        Observation(1, 0, (0.5,), "x", 0.9, violation=0.02),
        Observation(1, 1, (0.5,), "x", 0.7),
        Observation(1, 2, (0.5,), "x", None, failure="it failed"),
    ]
    found = penalised(told, BOTH)
    assert [o.score for o in found] == [pytest.approx(0.9 - PENALTY * 1.5 * 0.02), 0.7, None]


def searched(tmp_path: Path, name: str, constraints: list, budget: int = 44, **search: object):
    body = yaml.safe_load(config_text(search=SEARCH | {"constraints": constraints} | search))
    body["tasks"][1]["weight"] = -1.0  # so that the score wants what the constraint forbids
    body["budget"]["max_evaluations"] = budget
    row = driving.run(SearchConfig.from_text(yaml.safe_dump(body)), name=name, runs_dir=tmp_path)
    with Ledger(tmp_path / driving.LEDGER) as ledger:
        return row, ledger.candidates(row.id), ledger.best_candidate(row.id)


@pytest.mark.parametrize("objective", ["accuracy", "perplexity"], indirect=True)
def test_what_breaks_one_is_never_the_answer_where_something_keeps_it(
    tmp_path: Path, objective: str
) -> None:
    sign = 1.0 if objective == "accuracy" else -1.0  # a perplexity should be low
    free, _, _ = searched(tmp_path, "free", [])
    asked = [{"task": "two", "max_drop": 0.05}]
    row, found, best = searched(tmp_path, "bound", asked)
    floor = max(sign * dict(c.tasks)["two"] for c in found if c.operator == "parent") - 0.05
    if objective == "accuracy":  # no weight makes the score want what a perplexity's floor forbids
        assert sign * dict(free.result["answer"]["tasks"])["two"] < floor, (
            "the constraint would bind nothing"
        )
    scored = [c for c in found if c.score is not None]
    for candidate in scored:
        lacking = floor - sign * dict(candidate.tasks)["two"]
        assert candidate.violation == pytest.approx(max(0.0, lacking), abs=2e-9)
    if objective == "accuracy":
        assert any(c.violation and c.score > best.score for c in scored)
    answer = row.result["answer"]
    assert sign * answer["tasks"]["two"] >= floor - 1e-9
    assert best.violation == 0.0
    (line,) = row.result["constraints"]
    assert (line["task"], line["kept"]) == ("two", True)
    assert line["answer"] == answer["tasks"]["two"]
    assert "constraint: two may be 0.05 worse than the best parent: search items kept" in card_text(
        row.card
    )
    # and the search itself went where it is kept
    late = [c for c in scored if c.generation >= 3]
    assert sum(not c.violation for c in late) > len(late) / 2


def test_the_default_search_keeps_them_too(tmp_path: Path) -> None:
    """It predicts every task; (1+1), which is told a penalty only, is no better but by an item."""
    asked = [{"task": "two", "max_drop": 0.05}]
    best = {}
    for algorithm in ("auto", "one_plus_one"):
        search = {"algorithm": algorithm, "population": 1}
        _, found, best[algorithm] = searched(tmp_path / algorithm, "a", asked, 28, **search)
        own = [c for c in found if c.generation > 0]
        assert sum(not c.violation for c in own) > 0.6 * len(own), algorithm
        assert best[algorithm].violation == 0.0
    assert best["auto"].score > best["one_plus_one"].score - 1.5 / 60
    cheap = max(c.score for c in found if c.generation == 0 and not c.violation)
    assert best["auto"].score > cheap


def test_where_nothing_keeps_them_the_least_violation_is_the_best() -> None:
    far, near = (
        replace(parent(str(slot), slot, one=one), operator="x", violation=v)
        for slot, one, v in ((2, 0.9, 0.3), (3, 0.5, 0.1))
    )
    assert incumbent([far, near]) == near
    assert incumbent([far, near, parent("north", 4, one=0.1)]).label == "north"


def test_a_floor_that_does_not_hold_on_sealed_items_is_said() -> None:
    found = floors([Constraint(task="one", max_drop=0.02)], BOTH, PARENTS)
    answer = Compared(tasks={"one": 0.79}, sealed_tasks={"one": 0.70})
    parents = [Compared(sealed_tasks={"one": 0.4}), Compared(sealed_tasks={"one": 0.75})]
    (row,) = kept(found, answer, parents)
    assert (row["kept"], row["sealed_kept"]) == (True, False)
    assert (row["best_parent"], row["sealed_parent"]) == ("north", 0.75)
    (unsealed,) = kept(found, Compared(tasks={"one": 0.7}), [Compared()])
    assert not unsealed["kept"]
    assert "sealed_kept" not in unsealed
    text = constraint_text(row)
    assert text.endswith(
        "search items kept (0.790 against 0.800), sealed items BROKEN (0.700 against 0.750)"
    )


def test_killed_and_raced_it_ends_the_same(tmp_path: Path) -> None:
    sections = {
        "search": SEARCH | {"constraints": [{"task": "two", "max_drop": 0.05}], "racing": True}
    }
    driving.run(config(**sections), name="a", runs_dir=tmp_path / "calm")
    path, runs = tmp_path / "config.yml", tmp_path / "runs"
    path.write_text(config_text(**sections, worker={"options": {"base": "base", "delay_s": 0.01}}))
    process = command("run", path, "--name", "a", "--runs-dir", runs, "-q")
    assert kill_after(process, runs / "a" / "log.jsonl", 25, 0.02)
    process = command("resume", "a", "--runs-dir", runs, "-q")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert trace_of(runs, "a") == trace_of(tmp_path / "calm", "a")


@pytest.mark.parametrize(
    ("constraints", "message"),
    [
        ([{"task": "oen", "max_drop": 0.1}], "'oen' is not one of the tasks; did you mean 'one'"),
        ([{"task": "one", "max_drop": -0.1}], "max_drop"),
        ([{"task": "one"}], "max_drop"),
        ([{"task": "*", "max_drop": 0.1}] * 2, "constrained twice"),
        ([{"task": "one", "max_dorp": 0.1}], "max_dorp"),
        ("one", "constraints"),
    ],
)
def test_faulty_ones_are_named(constraints, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(search={"constraints": constraints})
