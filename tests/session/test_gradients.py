"""A search that asks for gradients: what they cost, and that none is lost or paid for twice."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from agentmerge.contracts.strategy import GRADIENT_COST
from agentmerge.ledger import Ledger, evaluations
from agentmerge.session import driving
from agentmerge.session.replay import replay
from tests.session.conftest import command, config, config_text, trace_of
from tests.session.test_resume import events, kill_after

#: Parents, uniform merges and the depth line, which every search scores first.
RIVALS = 10
#: Then gradients: three for the first, at a point scored already.
BUDGET = RIVALS + GRADIENT_COST + 5 * (1 + GRADIENT_COST)
SEARCH = {"algorithm": "descent", "population": 1}


@pytest.fixture(autouse=True)
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The strategy, installed; returns what PYTHONPATH must hold for another process."""
    folder = tmp_path / "site" / "descent-1.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: descent\nVersion: 1\n")
    (folder / "entry_points.txt").write_text(
        "[agentmerge.strategies]\ndescent = tests.session.descent:STRATEGY\n"
    )
    monkeypatch.syspath_prepend(folder.parent)
    return f"{folder.parent}:{Path(__file__).parents[2]}"


def test_a_gradient_counts_as_three_and_leads_up(tmp_path: Path) -> None:
    row = driving.run(
        config(search=SEARCH, budget={"max_evaluations": BUDGET}), name="a", runs_dir=tmp_path
    )
    with Ledger(tmp_path / driving.LEDGER) as ledger:
        found = ledger.candidates(row.id)
    asked = [c for c in found if c.want == "gradient"]
    assert row.stop_reason == "budget"
    assert evaluations(found) == BUDGET
    assert len(asked) == 6
    first = asked[0]
    assert first.twin is not None, "its score was known: only the gradient is new"
    assert (first.cost, asked[1].cost) == (GRADIENT_COST, 1 + GRADIENT_COST)
    assert all(len(c.gradient or ()) == len(c.vector or ()) for c in asked)
    assert max(c.score or 0 for c in asked) > max(c.score or 0 for c in found[:RIVALS])
    losses = [c.loss for c in asked]
    assert min(losses[1:]) < losses[0]


def test_a_budget_that_has_no_room_for_a_gradient_is_scores(tmp_path: Path) -> None:
    row = driving.run(
        config(search=SEARCH, budget={"max_evaluations": RIVALS + 3 + 4 + 2}),
        name="a",
        runs_dir=tmp_path,
    )
    with Ledger(tmp_path / driving.LEDGER) as ledger:
        found = ledger.candidates(row.id)
    assert [c.want for c in found[RIVALS : RIVALS + 3]] == ["gradient", "gradient", "score"]
    assert evaluations(found) == RIVALS + 8  # a step from the same gradient again would be a twin


def test_a_gradient_is_paid_for_once(tmp_path: Path) -> None:
    asked = config(search=SEARCH, budget={"max_evaluations": BUDGET})
    driving.run(asked, name="a", runs_dir=tmp_path)
    dead = config(
        search=SEARCH,
        budget={"max_evaluations": BUDGET},
        worker={"options": {"base": "base", "die_at": 1}},
    )
    driving.run(dead, name="b", runs_dir=tmp_path)  # no worker is asked, so none dies
    assert trace_of(tmp_path, "a") == trace_of(tmp_path, "b")


def test_where_there_is_no_gradient_a_score_is_asked(tmp_path: Path) -> None:
    slerp = config(
        genome={"merge_method": "slerp", "base_model": None},
        search=SEARCH,
        budget={"max_evaluations": 12},
    )
    row = driving.run(slerp, name="a", runs_dir=tmp_path)
    with Ledger(tmp_path / driving.LEDGER) as ledger:
        found = ledger.candidates(row.id)
    assert {c.want for c in found} == {"score"}
    assert row.status == "done"


@pytest.mark.parametrize("fault", ["failed", "lost"])
def test_a_gradient_that_never_comes_costs_two_and_no_score(tmp_path: Path, fault: str) -> None:
    row = driving.run(
        config(
            search=SEARCH,
            budget={"max_evaluations": BUDGET},
            worker={"options": {"base": "base", "no_gradient": fault}},
        ),
        name="a",
        runs_dir=tmp_path,
    )
    with Ledger(tmp_path / driving.LEDGER) as ledger:
        found = ledger.candidates(row.id)
    asked = [c for c in found if c.want == "gradient"]
    assert row.status == "done"
    assert row.result["answer"]["sealed_score"] is not None
    assert len([c for c in asked if c.state == "scored"]) <= 2
    assert all(c.score is not None and c.gradient is None for c in asked)
    assert replay("a", runs_dir=tmp_path).identical


def test_killed_in_the_middle_it_ends_as_if_never_killed(tmp_path: Path, plugin: str) -> None:
    budget = {"max_evaluations": RIVALS + 3 + 12 * 4}
    driving.run(config(search=SEARCH, budget=budget), name="calm", runs_dir=tmp_path / "calm")
    path = tmp_path / "config.yml"
    worker = {"options": {"base": "base", "delay_s": 0.05}}
    path.write_text(config_text(search=SEARCH, budget=budget, worker=worker))
    runs, rng = tmp_path / "runs", random.Random(5)
    log = runs / "rough" / "log.jsonl"
    process = command("run", path, "--name", "rough", "--runs-dir", runs, "-q", PYTHONPATH=plugin)
    kills = 0
    while kills < 5 and kill_after(process, log, rng.randint(4, 12), rng.random() * 0.1):
        kills += 1
        process = command("resume", "rough", "--runs-dir", runs, "-q", PYTHONPATH=plugin)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert kills == 5
    assert trace_of(runs, "rough") == trace_of(tmp_path / "calm", "calm")
    scored = [(e["generation"], e["slot"]) for e in events(log) if e["event"] == "candidate"]
    assert len(scored) == len(set(scored)), "what was committed was paid for again"


def test_a_branch_inherits_gradients(tmp_path: Path) -> None:
    asked = config(search=SEARCH, budget={"max_evaluations": BUDGET})
    driving.run(asked, name="a", runs_dir=tmp_path)
    row = driving.branch("a", name="b", at=2, runs_dir=tmp_path)
    assert row.status == "done"
    mine, theirs = trace_of(tmp_path, "b"), trace_of(tmp_path, "a")
    assert mine["candidates"] == theirs["candidates"]
