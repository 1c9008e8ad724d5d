"""Races inside a search: losers cost a part, winners are asked everything, kills change nothing."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from agentmerge.errors import ConfigError
from agentmerge.ledger import Ledger
from agentmerge.report.summary import run_summary
from agentmerge.session import driving
from agentmerge.session.replay import replay
from tests.session.conftest import OBJECTIVES, command, config, config_text, trace_of
from tests.session.test_resume import kill_after

RACED: dict = {"search": {"racing": {"rungs": [0.125, 0.25, 0.5]}, "algorithm": "random"}}
#: Where the share of the items that a race asks is exactly its rung: means alone may be cut.
OF_MEANS = RACED | OBJECTIVES["accuracy"]


def candidates_of(runs_dir: Path, name: str) -> list:
    with Ledger(runs_dir / driving.LEDGER) as ledger:
        return ledger.candidates(ledger.run(name).id)


@pytest.fixture(scope="module")
def raced(tmp_path_factory) -> Path:
    runs = tmp_path_factory.mktemp("raced")
    driving.run(config(**OF_MEANS), name="a", runs_dir=runs)
    return runs


def test_losers_stop_early_and_more_are_tried_for_the_same_items(raced: Path) -> None:
    found = candidates_of(raced, "a")
    stopped = [c for c in found if c.state == "stopped"]
    assert len(stopped) > 5
    assert len(found) > 34
    assert 33 <= sum(c.cost for c in found) <= 34
    with Ledger(raced / driving.LEDGER) as ledger:
        row = ledger.run("a")
        summary = run_summary(ledger, row)
        for candidate in stopped:
            before = [c for c in found if c.generation < candidate.generation and c.score]
            incumbent = max(c.score for c in before)
            assert candidate.score is None
            assert candidate.estimate < incumbent
            assert candidate.cost == candidate.share == pytest.approx(candidate.rung, abs=0.02)
        told = [o for o in ledger.history(row.id) if o.censored]
    assert len(told) == len(stopped) == summary["evaluations"]["stopped"]
    assert {o.score for o in told} == {c.estimate for c in stopped}
    assert summary["evaluations"]["total"] == pytest.approx(sum(c.cost for c in found), abs=0.01)


@pytest.mark.parametrize("objective", ["loss"], indirect=True)
def test_losers_stop_early_on_an_objective_without_bounds_too(
    objective: str, tmp_path: Path
) -> None:
    driving.run(config(**RACED), name="a", runs_dir=tmp_path)
    found = candidates_of(tmp_path, "a")
    stopped = [c for c in found if c.state == "stopped"]
    assert stopped
    assert all(c.score is None and c.rung - 0.02 <= c.share == c.cost < 1.0 for c in stopped)
    assert all(c.rung == c.share == 1.0 for c in found if c.score is not None)
    assert 33 <= sum(c.cost for c in found) <= 34


def test_only_whole_scores_are_compared(raced: Path) -> None:
    found = candidates_of(raced, "a")
    scored = [c for c in found if c.score is not None]
    assert all(c.rung == c.share == 1.0 and c.tasks for c in scored)
    with Ledger(raced / driving.LEDGER) as ledger:
        row = ledger.run("a")
        best = ledger.best_candidate(row.id)
        assert best.score == max(c.score for c in scored)
        answer = ledger.candidate(row.id, *row.result["answer"]["candidate"])
    assert answer.state == "scored"


def test_a_loser_would_have_lost(raced: Path, tmp_path: Path) -> None:
    """Asked in full, at most one in twenty would have won."""
    wrong, stopped = 0, [c for c in candidates_of(raced, "a") if c.state == "stopped"]
    with Ledger(raced / driving.LEDGER) as ledger:
        row = ledger.run("a")
        recipes = {c: ledger.recipe(c.recipe_hash) for c in stopped}
    for candidate, text in recipes.items():
        whole = driving.evaluate(driving.Recipe.parse(text), config(**OF_MEANS), runs_dir=tmp_path)
        beaten = max(
            c.score
            for c in candidates_of(raced, "a")
            if c.score is not None and c.generation < candidate.generation
        )
        wrong += whole["score"] >= beaten
        assert whole["score"] == pytest.approx(candidate.estimate, abs=0.45)
    assert wrong <= 0.05 * len(stopped)
    assert row.status == "done"


def test_higher_rungs_reuse_lower_ones(raced: Path) -> None:
    with Ledger(raced / driving.LEDGER) as ledger:
        rows = ledger.records(
            "SELECT recipe_hash, sum(count) AS items FROM results r JOIN item_sets s "
            "ON s.id = r.item_set_id WHERE recipe_hash IN (SELECT recipe_hash FROM candidates "
            "WHERE generation > 0 AND state = 'scored') GROUP BY recipe_hash"
        )
    asked = {row["items"] for row in rows}
    assert asked  # 240: those that were confirmed on as many sealed items
    assert asked <= {120, 240}, "an item was asked twice, or never"


def test_killed_in_the_middle_of_races_ends_as_if_never_killed(tmp_path: Path, raced: Path) -> None:
    slow = OBJECTIVES["accuracy"]["worker"]["options"] | {"delay_s": 0.01}
    sections = OF_MEANS | {"worker": {"options": slow}}
    path = tmp_path / "config.yml"
    path.write_text(config_text(**sections))
    runs, rng = tmp_path / "runs", random.Random(8)
    log = runs / "a" / "log.jsonl"
    process = command("run", path, "--name", "a", "--runs-dir", runs, "-q")
    kills = 0
    while kills < 4 and kill_after(process, log, rng.randint(8, 20), rng.random() * 0.05):
        kills += 1
        process = command("resume", "a", "--runs-dir", runs, "-q")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert kills == 4
    assert trace_of(runs, "a") == trace_of(raced, "a")


def test_a_search_does_not_depend_on_what_the_ledger_holds(tmp_path: Path, raced: Path) -> None:
    unraced = config(**OBJECTIVES["accuracy"], search={"algorithm": "random"})
    driving.run(unraced, name="before", runs_dir=tmp_path)  # all items of some of its candidates
    driving.run(config(**OF_MEANS), name="a", runs_dir=tmp_path)
    assert trace_of(tmp_path, "a") == trace_of(raced, "a")


def test_it_can_be_branched_and_replayed(raced: Path) -> None:
    assert replay("a", runs_dir=raced).identical
    row = driving.branch("a", at=2, name="b", runs_dir=raced)
    assert trace_of(raced, "b")["candidates"] == trace_of(raced, "a")["candidates"]
    assert row.result["answer"] == trace_of(raced, "a")["result"]["answer"]


def test_the_first_generation_is_never_raced(raced: Path) -> None:
    assert all(c.state != "stopped" for c in candidates_of(raced, "a") if c.generation == 0)


@pytest.mark.parametrize(
    ("racing", "message"),
    [
        ({"rungs": [0.5, 0.25]}, "must rise between 0 and 1"),
        ({"rungs": []}, "must rise"),
        ({"rungs": [0.0, 0.5]}, "must rise"),
        ({"alpha": 0}, "must be above 0"),
        ({"rung": [0.5]}, "rung"),
        ("often", "often"),
    ],
)
def test_faulty_settings_are_named(racing, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(search={"racing": racing})


def test_true_and_false_mean_on_and_off() -> None:
    assert config(search={"racing": True}).search.racing.alpha == 0.05
    assert config(search={"racing": False}).search.racing is None
    assert config().search.racing is None
