"""What answers cost in generated tokens: kept, shown, bounded, and traded for score."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agentmerge.cli.app import run_app
from agentmerge.cli.render import constraint_text
from agentmerge.contracts.card import Card, FrontRow
from agentmerge.errors import ConfigError, NotFound
from agentmerge.ledger import Ledger, pack, unpack
from agentmerge.ledger.folder import LEDGER
from agentmerge.preflight.prepare import prepare
from agentmerge.report.content import content
from agentmerge.report.front import front_points, picked
from agentmerge.report.html import charts_of
from agentmerge.report.model_card import model_card
from agentmerge.report.summary import best_recipe, run_summary
from agentmerge.session import driving
from agentmerge.strategies.front import by_area
from tests.session.conftest import config, trace_of

TASKS = [{"name": "one", "metric": "exact_match,none"}, {"name": "two", "metric": "acc,none"}]


def searched(runs: Path, name: str = "s", /, **sections: Any) -> dict[str, Any]:
    """What ``show`` has of a search of a task that generates beside one that does not."""
    search = {"algorithm": "random", "population": None} | sections.pop("search", {})
    body = {"tasks": TASKS, "limit": 40, "budget": {"max_evaluations": 12}, "search": search}
    driving.run(config(**(body | sections)), name=name, runs_dir=runs)
    with Ledger(runs / LEDGER, read_only=True) as ledger:
        return run_summary(ledger, ledger.run(name))


def test_tokens_of_the_best_and_the_parents_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = searched(tmp_path)
    lengths = {row["label"]: row["tokens_per_item"] for row in shown["parents"]}
    assert lengths["north"] > lengths["uniform"] > lengths["south"] > 0, "north is the wordy one"
    assert run_app(["show", "s", "--runs-dir", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert f"tokens an item: this search's answer {shown['answer']['tokens_per_item']:.1f}" in said
    assert run_app(["show", "s", "--json", "--runs-dir", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["best"]["tokens_per_item"] > 0
    likelihoods = searched(tmp_path, "l", tasks=[{"name": "two", "metric": "acc,none"}])
    assert likelihoods["best"]["tokens_per_item"] is None, "nothing is generated there"


def test_answers_are_kept_short_enough(tmp_path: Path) -> None:
    most = 40.0
    limits = [{"tokens": {"most": most}}, {"task": "one", "max_drop": 1.0}]
    for name, limit in (("bound", limits), ("parents", [{"tokens": {"parents": 0.8}}])):
        search = {"algorithm": "auto", "constraints": limit}
        shown = searched(tmp_path, name, search=search, budget={"max_evaluations": 11})
        if name == "parents":
            parents = [row for row in shown["parents"] if row["operator"] == "parent"]
            most = 0.8 * sum(row["tokens_per_item"] for row in parents) / len(parents)
        with Ledger(tmp_path / LEDGER, read_only=True) as ledger:
            found = [c for c in ledger.candidates(shown["id"]) if c.score is not None]
        for candidate in found:
            lacks = max(0.0, candidate.tokens / most - 1.0)
            assert candidate.violation == pytest.approx(lacks, abs=2e-9)
        assert any(c.violation for c in found)
        assert shown["answer"]["tokens_per_item"] <= most * (1 + 1e-9)
        row = shown["final"]["constraints"][-1]
        assert row["tokens"]["most"] == pytest.approx(most)
        assert row["kept"]
        assert row["answer"] == shown["answer"]["tokens_per_item"]
        said = constraint_text(row)
        assert said.startswith(f"answers may have {most:.1f} tokens an item")
        assert "search items kept" in said
        assert "sealed items" in said


def test_faults_of_what_is_asked_of_lengths() -> None:
    for search, said in (
        ({"objectives": ["tokens"]}, "must hold score"),
        ({"objectives": ["score", "tokens"], "racing": True}, "a race drops"),
        ({"constraints": [{"tokens": {"most": 9, "parents": 1}}]}, "tokens has either most"),
        ({"constraints": [{"tokens": {"most": 9}, "task": "one"}]}, "a constraint of its own"),
        ({"constraints": [{"task": "one"}]}, "has task and max_drop, or tokens"),
        ({"constraints": [{"tokens": {"most": 9}}, {"tokens": {"most": 8}}]}, "twice; keep one"),
    ):
        with pytest.raises(ConfigError, match=said):
            config(tasks=TASKS, search=search)
    for search in ({"objectives": ["score", "tokens"]}, {"constraints": [{"tokens": {"most": 9}}]}):
        with pytest.raises(ConfigError, match="no task generates any") as error:
            prepare(config(search=search))
        assert len(error.value.faults) == 1
    assert not config(search={"objectives": ["score"]}).search.counted


FRONT = {"algorithm": "auto", "objectives": ["score", "tokens"]}


def candidates_of(runs: Path, name: str) -> list[Any]:
    return trace_of(runs, name)["candidates"]


def area_of(runs: Path, name: str) -> float:
    with Ledger(runs / LEDGER, read_only=True) as ledger:
        told = by_area(ledger.history(ledger.run(name).id))
    return max(o.score for o in told if o.score is not None)


def test_the_whole_front_is_looked_for_and_a_resume_goes_the_same_way(tmp_path: Path) -> None:
    budget = {"max_evaluations": 16}
    searched(tmp_path, "front", search=FRONT, budget=budget)
    searched(tmp_path, "score", search={"algorithm": "auto"}, budget=budget)
    assert area_of(tmp_path, "front") > area_of(tmp_path, "score") + 0.05
    searched(tmp_path / "again", "front", search=FRONT, budget={"max_evaluations": 12})
    driving.resume("front", runs_dir=tmp_path / "again", overrides={"budget.max_evaluations": 16})
    assert candidates_of(tmp_path / "again", "front") == candidates_of(tmp_path, "front")


def test_results_of_before_lengths_were_kept(tmp_path: Path) -> None:
    """They answer a search that asks for none, and are asked again by one that does."""
    before = searched(tmp_path, "old")
    with sqlite3.connect(tmp_path / LEDGER) as conn:
        for key, block in conn.execute("SELECT id, block FROM results").fetchall():
            bare = pack([replace(result, tokens=None) for result in unpack(block)])
            conn.execute("UPDATE results SET block = ? WHERE id = ?", (bare, key))
        conn.execute("UPDATE candidates SET tokens = NULL")
    again = searched(tmp_path, "again")
    assert again["evaluations"]["reused"] == again["evaluations"]["total"]
    assert again["best"]["tokens_per_item"] is None
    assert again["best"]["score"] == before["best"]["score"]
    overrides = {"search.objectives": ["score", "tokens"], "budget.max_evaluations": 8}
    driving.branch("old", at=0, name="branch", runs_dir=tmp_path, overrides=overrides)
    with Ledger(tmp_path / LEDGER) as ledger:
        found = ledger.candidates(ledger.run("branch").id)
    own = [c for c in found if not c.prior and c.twin is None]
    assert len(own) > 4
    assert all(c.tokens is not None and not c.reused for c in own)
    assert all(c.tokens is None for c in found if c.prior)
    alike = {c.recipe_hash: c.score for c in found if c.prior}
    assert any(c.recipe_hash in alike for c in own)
    fresh = searched(tmp_path, "fresh", search=FRONT | {"algorithm": "random"})
    assert fresh["best"]["tokens_per_item"] > 0


@pytest.fixture(scope="module")
def traded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished search for the front, by a strategy that goes by the score alone."""
    runs = tmp_path_factory.mktemp("traded")
    search = FRONT | {"algorithm": "random", "sealed_share": 0.25}
    searched(runs, search=search, limit=None, budget={"max_evaluations": 20})
    return runs


def test_the_front_is_asked_the_sealed_items_and_shown(
    traded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--runs-dir", str(traded)]
    assert run_app(["show", "s", "--json", *where]) == 0
    shown = json.loads(capsys.readouterr().out)
    front = shown["front"]
    assert [p["point"] for p in front] == list(range(1, len(front) + 1))
    assert 2 <= len(front) <= 8
    scores, tokens = [p["score"] for p in front], [p["tokens"] for p in front]
    assert scores == sorted(scores, reverse=True)
    assert tokens == sorted(tokens, reverse=True)
    with Ledger(traded / LEDGER, read_only=True) as ledger:
        row = ledger.run("s")
        for c in ledger.candidates(row.id):
            as_good = [s >= c.score and t <= c.tokens for s, t in zip(scores, tokens, strict=True)]
            assert any(as_good), "nothing that was tried is beyond it"
        for point in front:
            low, high = point["interval"]
            assert low <= point["sealed_score"] <= high
            low, high = point["tokens_interval"]
            assert low < point["sealed_tokens"] < high
        card = model_card(ledger, row, best_recipe(ledger, row, point=len(front)))
        assert f"Point {len(front)} of {len(front)} of its search's front" in card
        whose = "this merge" if front[-1]["is_answer"] else "another merge"
        assert f"What is said of the answer above holds for {whose}." in card
        chart = charts_of(content(ledger, row), "run0")["run0-front"]
        assert [line["name"] for line in chart["data"]] == [
            "tried (search items)", "front, sealed items", "front",
        ]  # fmt: skip
        assert len(chart["data"][1]["error_y"]["array"]) == len(front)
    assert any("random goes by the score alone" in note for note in shown["final"]["notes"])
    assert run_app(["show", "s", *where]) == 0
    said = capsys.readouterr().out
    assert "sealed tokens an item" in said
    assert "export --point N" in said
    assert run_app(["report", "s", "--to", str(traded / "r.html"), *where]) == 0
    assert "Better or shorter" in (traded / "r.html").read_text()


def test_a_point_is_taken_by_its_number_or_by_what_it_keeps(
    traded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def best(*wish: str) -> dict[str, Any]:
        code = run_app(["best", "s", "--json", *wish, "--runs-dir", str(traded)])
        out, err = capsys.readouterr()
        return json.loads(out) if code == 0 else {"code": code, "said": " ".join(err.split())}

    with Ledger(traded / LEDGER, read_only=True) as ledger:
        points = front_points(ledger.run("s"))
    places = [[best("--point", str(n))[key] for key in ("generation", "slot")] for n in (1, 2)]
    assert places == [p["candidate"] for p in points[:2]]
    for wished in points:
        found = best("--prefer", f"score>={wished['sealed_score']}")
        mine = next(p for p in points if p["candidate"] == [found["generation"], found["slot"]])
        enough = [p for p in points if p["sealed_score"] >= wished["sealed_score"]]
        assert mine["sealed_tokens"] == min(p["sealed_tokens"] for p in enough)
        found = best("--prefer", f" tokens <= {wished['sealed_tokens']}")
        mine = next(p for p in points if p["candidate"] == [found["generation"], found["slot"]])
        short = [p for p in points if p["sealed_tokens"] <= wished["sealed_tokens"]]
        assert mine["sealed_score"] == max(p["sealed_score"] for p in short)
    for wish, said in (
        (("--point", "99"), "its front has 1 to"),
        (("--prefer", "score>=9"), "no point of the front has a score of 9"),
        (("--prefer", "tokens<=1"), "no point of the front has 1 tokens an item"),
        (("--prefer", "score>0.8"), 'write "score>=0.8" or "tokens<=50"'),
        (("--prefer", "score>=nan"), "is not understood"),
        (("--prefer", "score>=0.1", "--point", "1"), "give one of them"),
    ):
        answer = best(*wish)
        assert answer["code"] == 2
        assert said in answer["said"]
    searched(traded, "plain")
    assert run_app(["best", "plain", "--point", "1", "--runs-dir", str(traded)]) == 2
    assert "has no front" in capsys.readouterr().err


def test_a_point_that_failed_its_sealed_items_is_nobodys_wish() -> None:
    good = FrontRow(name="good", score=0.8, tokens=50.0, sealed_score=0.7, sealed_tokens=52.0)
    failed = FrontRow(name="failed", score=0.9, tokens=40.0, sealed_failure="not finite")
    row: Any = SimpleNamespace(name="s", card=Card(front=[failed, good]))
    assert picked(row, None, "score>=0.6") is good
    assert picked(row, None, "tokens<=60") is good
    assert picked(row, 1, None) is failed, "by its number it is"
    with pytest.raises(NotFound, match=r"0\.700 at most"):
        picked(row, None, "score>=0.85")
    asked_none: Any = SimpleNamespace(name="s", card=Card(front=[failed]))
    assert picked(asked_none, None, "score>=0.85") is failed, "search items are all there are"


def test_the_front_is_reserved_in_the_budget_of_items(tmp_path: Path) -> None:
    for number, search in enumerate(({}, {"objectives": ["score", "tokens"]})):
        shown = searched(tmp_path, f"s{number}", search=search, limit=None,
                         budget={"max_evaluations": 100, "max_items": 9000})  # fmt: skip
        with Ledger(tmp_path / LEDGER, read_only=True) as ledger:
            blocks = ledger._rows(
                "SELECT coalesce(sum(s.count), 0) FROM results r JOIN item_sets s "
                "ON s.id = r.item_set_id"
            )
        asked = int(blocks[0][0])
        assert asked <= 9000 * (number + 1)
        assert shown["stop_reason"] == "budget"
        assert all(p["sealed_score"] is not None for p in shown.get("front", ()))
    assert shown["front"]
