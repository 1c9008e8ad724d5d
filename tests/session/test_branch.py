"""A branch shares the past of a search and leaves it untouched."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentmerge import plugins
from agentmerge.agents.view import HistoryView
from agentmerge.contracts.strategy import Observation
from agentmerge.errors import NotFound
from agentmerge.ledger import Ledger
from agentmerge.search import advise
from agentmerge.search.advise import view_of
from agentmerge.session import driving
from agentmerge.session.gc import prune_checkpoints, prune_results
from agentmerge.session.replay import replay
from agentmerge.strategies.one_plus_one import step_size
from tests.session.conftest import config, trace_of

pytestmark = pytest.mark.usefixtures("objectives")

#: A search that finds something on many items, for branches that ask fewer.
WIDE = {"limit": 200, "search": {"algorithm": "random"}, "budget": {"max_evaluations": 24}}


@pytest.fixture
def trunk(tmp_path: Path) -> Path:
    driving.run(config(), name="trunk", runs_dir=tmp_path)
    return tmp_path


def candidates(runs: Path, name: str) -> list:
    with Ledger(runs / driving.LEDGER) as ledger:
        return ledger.candidates(ledger.run(name).id)


def test_a_branch_without_changes_repeats_the_search(trunk: Path) -> None:
    before = trace_of(trunk, "trunk")
    row = driving.branch("trunk", at=2, name="same", runs_dir=trunk)
    assert trace_of(trunk, "same")["candidates"] == before["candidates"]
    assert trace_of(trunk, "trunk") == before
    with Ledger(trunk / driving.LEDGER) as ledger:
        assert row.parent_run == ledger.run("trunk").id
    assert row.parent_generation == 2
    later = [c for c in candidates(trunk, "same") if c.generation > 2]
    assert later
    assert all(c.reused for c in later), "the ledger has these merges"


def test_a_branch_may_change_the_search(trunk: Path) -> None:
    overrides = {"search.algorithm": "random", "search.seed": 99}
    driving.branch("trunk", at=1, name="other", runs_dir=trunk, overrides=overrides)
    mine, old = candidates(trunk, "other"), candidates(trunk, "trunk")
    assert [c.recipe_hash for c in mine if c.generation <= 1] == [
        c.recipe_hash for c in old if c.generation <= 1
    ]
    assert {c.operator for c in mine if c.generation > 1} == {"random"}


def test_a_branch_that_asks_other_questions_scores_the_best_again(trunk: Path) -> None:
    driving.branch("trunk", at=2, name="wide", runs_dir=trunk, overrides={"limit": 90})
    mine = candidates(trunk, "wide")
    past = [c for c in mine if c.generation <= 2]
    again = [c for c in mine if c.generation == 3]
    assert all(c.prior for c in past)
    assert not any(c.prior for c in again)
    assert {"parent", "uniform", "scale", "depth", "incumbent"} == {c.operator for c in again}
    best = max((c for c in past if c.operator != "parent"), key=lambda c: c.score or 0)
    assert best.recipe_hash in {c.recipe_hash for c in again}


@pytest.mark.parametrize("algorithm", ["auto", "one_plus_one"])
def test_strategies_learn_from_a_branchs_past_and_hear_no_score_of_it(
    tmp_path: Path, algorithm: str
) -> None:
    """Other weights are another scale: what was 1.1 there is 0.011 here, and no reason to stop."""
    search = {"algorithm": algorithm, "population": 1}
    driving.run(
        config(search=search, budget={"max_evaluations": 20}), name="trunk", runs_dir=tmp_path
    )
    weights = [{"name": "one", "weight": 0.01}, {"name": "two", "weight": 0.005}]
    changes = {"tasks": weights, "budget.max_evaluations": 16}
    past = candidates(tmp_path, "trunk")[-1].generation
    row = driving.branch("trunk", at=past, name="low", runs_dir=tmp_path, overrides=changes)
    found = candidates(tmp_path, "low")
    first = min(c.generation for c in found if not c.prior)
    own = [c for c in found if c.generation > first]
    assert len(own) >= 3
    assert row.stop_reason == "budget"
    rivals = {c.vector: c.score for c in found if c.generation == first and c.vector}
    point = max(rivals, key=lambda vector: rivals[vector])
    away = max(abs(a - b) for a, b in zip(point, own[0].vector, strict=True))
    assert away > 0.02, "a step that shrank on the past's scores"


@pytest.mark.parametrize(
    ("algorithm", "limit", "covered"),
    [("auto", 40, True), ("one_plus_one", 40, True), ("one_plus_one", 90, False)],
)
def test_a_past_whose_items_are_asked_still_is_scored_again_from_the_ledger(
    tmp_path: Path, algorithm: str, limit: int, covered: bool
) -> None:
    search = {"algorithm": algorithm, "population": 1}
    asked = config(search=search, budget={"max_evaluations": 20})
    driving.run(asked, name="trunk", runs_dir=tmp_path)
    past = candidates(tmp_path, "trunk")[-1].generation
    changes = {"limit": limit, "budget.max_evaluations": 16}
    told: list[list[Observation]] = []
    strategy = plugins.load("agentmerge.strategies", algorithm)
    propose = type(strategy).propose

    def heard(self, space, history, *rest):
        told.append(list(history))
        return propose(self, space, history, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(strategy), "propose", heard)
        row = driving.branch("trunk", at=past, name="b", runs_dir=tmp_path, overrides=changes)
    assert row.stop_reason == "budget"
    before = [o for o in told[-1] if o.prior]
    own = {o.recipe_hash: o for o in told[-1] if not o.prior}
    assert len(before) == 20
    assert all((o.score is not None) == covered for o in before)
    again = [o for o in before if o.recipe_hash in own]
    assert len(again) >= 5
    if covered:
        assert all(
            (o.score, o.tasks) == (own[o.recipe_hash].score, own[o.recipe_hash].tasks)
            for o in again
        )
        assert step_size(told[-1], "one_plus_one", 12) > 0.05
    assert replay("b", runs_dir=tmp_path).identical


def test_agents_hear_no_score_of_another_scale(tmp_path: Path) -> None:
    driving.run(config(budget={"max_evaluations": 18}), name="trunk", runs_dir=tmp_path)
    weights = [{"name": "one", "weight": 0.01}, {"name": "two", "weight": 0.005}]
    past = candidates(tmp_path, "trunk")[-1].generation
    changes = {"tasks": weights, "budget.max_evaluations": 14, "limit": 90}
    views: list[HistoryView] = []

    def seen(search, role, generation):
        views.append(view_of(search, role, generation))
        return views[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(advise, "view_of", seen)
        driving.branch("trunk", at=past, name="b", runs_dir=tmp_path, overrides=changes)
    assert views
    assert not any(o.prior for view in views for o in view.entries)


def test_a_generation_that_does_not_exist_names_those_that_do(trunk: Path) -> None:
    with pytest.raises(NotFound, match=r"no finished generation 44; it has 0 to \d+"):
        driving.branch("trunk", at=44, runs_dir=trunk)


def test_pruned_checkpoints_do_not_break_branches(trunk: Path) -> None:
    report = prune_checkpoints(trunk, dry_run=True)
    assert report["checkpoints"] > 0
    assert prune_checkpoints(trunk, dry_run=False)["freed_bytes"] > 0
    assert prune_checkpoints(trunk, dry_run=True)["checkpoints"] == 0
    assert driving.branch("trunk", at=1, name="late", runs_dir=trunk).status == "done"
    assert driving.resume("trunk", runs_dir=trunk).status == "done"


def test_a_killed_search_can_be_branched(tmp_path: Path) -> None:
    drain = driving.Drain()
    slow = config(worker={"options": {"base": "base", "delay_s": 0.05}})

    def stop_in_generation_two(event: dict) -> None:
        if event["event"] == "candidate" and event["generation"] == 2:
            drain.request()

    row = driving.run(slow, name="cut", runs_dir=tmp_path, emit=stop_in_generation_two, drain=drain)
    assert row.status == "interrupted"
    with pytest.raises(NotFound, match="0 to 1"):
        driving.branch("cut", at=2, runs_dir=tmp_path)
    assert driving.branch("cut", at=1, name="on", runs_dir=tmp_path).status == "done"


def keys(runs: Path, name: str, part: str) -> dict[str, set[str]]:
    with Ledger(runs / driving.LEDGER) as ledger:
        found = ledger.item_keys(ledger.run(name).id, part)
    return {task: set(items) for task, items in found.items()}


class TestSealing:
    """What the searches saw that a search goes on from is never sealed."""

    @pytest.fixture
    def wide(self, tmp_path: Path) -> Path:
        driving.run(config(**WIDE), name="wide", runs_dir=tmp_path)
        return tmp_path

    def test_a_branch_with_a_lower_limit(self, wide: Path) -> None:
        row = driving.branch("wide", at=1, name="b", runs_dir=wide, overrides={"limit": 60})
        again = driving.branch("b", at=1, name="c", runs_dir=wide, overrides={"limit": 50})
        for name in ("b", "c"):
            searched, sealed = keys(wide, "wide", "search"), keys(wide, name, "sealed")
            assert sealed
            for task, items in sealed.items():
                if items == keys(wide, name, "search")[task]:  # it stands in, and that is said
                    assert any(f"{task!r} is confirmed" in note for note in row.result["notes"])
                    continue
                assert len(items) >= 20
                assert not items & searched[task]
        assert row.result["sealed"]
        assert driving.resume("b", runs_dir=wide).result == row.result
        assert replay("c", runs_dir=wide).identical
        assert again.facts["searched"]

    def test_what_a_forgotten_ancestor_searched(self, wide: Path) -> None:
        searched = keys(wide, "wide", "search")
        driving.branch("wide", at=1, name="b", runs_dir=wide, overrides={"limit": 60})
        driving.branch("b", at=1, name="c", runs_dir=wide)
        for name in ("wide", "b"):
            prune_results(wide, [name], dry_run=False)
        driving.branch("c", at=1, name="d", runs_dir=wide, overrides={"limit": 50})
        for task, items in keys(wide, "d", "sealed").items():
            assert not items & searched[task] or items == keys(wide, "d", "search")[task]
        assert driving.resume("d", runs_dir=wide).status == "done"

    def test_too_few_left_means_none_and_it_is_said(self, tmp_path: Path) -> None:
        few = WIDE | {"worker": {"options": {"documents": 215}}}
        driving.run(config(**few), name="wide", runs_dir=tmp_path)
        row = driving.branch("wide", at=1, name="b", runs_dir=tmp_path, overrides={"limit": 30})
        assert not row.result["sealed"]
        assert any("saw" in note and "no sealed items" in note for note in row.result["notes"])
        assert not keys(tmp_path, "b", "sealed")
        assert "sealed" not in row.result["verdict"]

    @pytest.mark.parametrize("runs", ["runs", "others"])
    def test_a_warm_start_from_a_searchs_best(self, wide: Path, runs: str) -> None:
        best = wide / "wide" / "best.yml"
        folder = wide if runs == "runs" else wide / runs
        asked = config(**WIDE | {"limit": 60, "search": {"init": [str(best)]}})
        row = driving.run(asked, name="b", runs_dir=folder)
        searched = keys(wide, "wide", "search")
        assert row.facts["searched"]
        for task, items in keys(folder, "b", "sealed").items():
            assert not items & searched[task] or items == keys(folder, "b", "search")[task]
        assert driving.resume("b", runs_dir=folder).result == row.result
