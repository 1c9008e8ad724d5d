"""``tree`` and ``compare``: lineage, and what sets searches apart, from the ledger alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from agentmerge.cli.app import run_app
from agentmerge.config import SearchConfig
from agentmerge.contracts.worker import ItemRef
from agentmerge.ledger import Ledger, evaluations, incumbent
from agentmerge.report.compare import compare
from agentmerge.report.summary import run_summary
from agentmerge.session import driving
from agentmerge.system.bundled import bundled
from agentmerge.testing.scripted import ScriptedServer
from tests.report.conftest import CONFIG, search_family


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    search_family(folder)
    changed = {"search.seed": 8, "tasks": [{"name": "one"}, {"name": "two"}]}
    config = SearchConfig.from_text(CONFIG, overrides=changed)
    driving.run(config, name="weighted", runs_dir=folder)
    other = {"genome.layer_granularity": 1, "budget.max_evaluations": 20, "search.seed": 5}
    driving.run(SearchConfig.from_text(CONFIG, overrides=other), name="fine", runs_dir=folder)
    return folder


def said(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert run_app([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def test_tree_hangs_branches_from_their_searches(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = said(capsys, "tree", "--runs-dir", runs).splitlines()
    assert lines[0].startswith("first: done, cma_es, 40 evaluations, best seen 0.")
    assert ", answer 0." in lines[0]
    assert lines[1].startswith("└─ second (from generation 1): done, random, 30 evaluations")
    assert lines[2].startswith("weighted: ")
    nodes = json.loads(said(capsys, "tree", "--runs-dir", runs, "--json"))
    assert [(n["name"], n["parent"], n["generation"]) for n in nodes] == [
        ("first", None, None),
        ("second", "first", 1),
        ("weighted", None, None),
        ("fine", None, None),
    ]


def test_the_databases_sums_are_those_of_the_candidates(runs: Path) -> None:
    with Ledger(runs / driving.LEDGER) as ledger:
        for row in ledger.runs():
            candidates = ledger.candidates(row.id)
            summary = run_summary(ledger, row)
            best = incumbent(candidates)
            assert best is not None
            assert summary["best"]["recipe_hash"] == best.recipe_hash
            assert [summary["best"]["generation"], summary["best"]["slot"]] == [
                best.generation,
                best.slot,
            ]
            assert summary["evaluations"] == {
                "total": evaluations(candidates),
                "reused": sum(c.reused or c.state == "twin" for c in candidates),
                "failed": sum(c.state == "failed" for c in candidates),
            }


def test_compare_pairs_items_and_says_what_differs(runs: Path) -> None:
    with Ledger(runs / driving.LEDGER) as ledger:
        found = compare(ledger, ["first", "second"])
    assert [row["name"] for row in found["searches"]] == ["first", "second"]
    difference = found["differences"][0]
    score = difference["score"]
    ahead = found["searches"][0]["sealed_score"] - found["searches"][1]["sealed_score"]
    assert score["part"] == "sealed"
    assert score["mean"] == pytest.approx(ahead)
    assert score["low"] <= score["mean"] <= score["high"]
    assert {c["key"] for c in difference["config"]} == {
        "search.algorithm",
        "budget.max_evaluations",
    }
    assert difference["prompts"] == []
    for row in difference["recipe"]["rows"]:
        assert row["of"] != row["against"]
        assert len(row["of"]) == len(difference["recipe"]["columns"])


def test_a_search_against_itself_differs_in_nothing(runs: Path) -> None:
    driving.resume("first", runs_dir=runs)
    with Ledger(runs / driving.LEDGER) as ledger:
        row = ledger.run("first")
        ledger.add_run(type(row)(**{**_fields(row), "id": "copy", "name": "copy"}))
        ledger.copy_past(row.id, "copy", 10_000, prior=False)
        for part in ("search", "sealed"):
            for task, keys in ledger.item_keys(row.id, part).items():
                refs = [ItemRef(task, i, key) for i, key in enumerate(keys)]
                ledger.save_items("copy", task, part, refs)
        found = compare(ledger, ["first", "copy"])["differences"][0]
    assert found["recipe"]["rows"] == found["config"] == []
    assert found["score"]["mean"] == 0.0
    assert found["score"]["low"] <= 0.0 <= found["score"]["high"]


def _fields(row: object) -> dict:
    return {name: getattr(row, name) for name in type(row).__dataclass_fields__}


def test_other_granularities_are_laid_on_the_finer_one(runs: Path) -> None:
    with Ledger(runs / driving.LEDGER) as ledger:
        recipe = compare(ledger, ["first", "fine"])["differences"][0]["recipe"]
    assert recipe["columns"] == [f"layer {layer}" for layer in range(4)]


def test_other_weights_are_not_compared(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "compare", "first", "weighted", "--runs-dir", runs)
    assert "cannot be compared item by item: their tasks have different weights" in text
    assert "search.seed: 3 → 8" in text


def test_a_prompt_that_differs_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-none")
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    text = (bundled("prompts") / "critic.md").read_text()
    (prompts / "critic.md").write_text(text.rstrip() + "\nBe brief.\n")
    runs = tmp_path / "runs"
    with ScriptedServer(lambda body: {"summary": "so", "findings": []}) as server:
        settings = {
            "agents.critic": "openai:adviser",
            "agents.base_url": server.base_url,
            "budget.max_evaluations": 16,
        }
        for name, extra in (("plain", {}), ("brief", {"agents.prompts": str(prompts)})):
            config = SearchConfig.from_text(CONFIG, overrides=settings | extra)
            driving.run(config, name=name, runs_dir=runs)
    text = said(capsys, "compare", "plain", "brief", "--runs-dir", runs)
    assert "the critic's prompt differs:" in text
    assert "+Be brief." in text


def test_one_search_is_no_comparison(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(["compare", "first", "first", "--runs-dir", str(runs)]) == 2
    assert "needs two searches" in capsys.readouterr().err
    assert run_app(["compare", "first", "none", "--runs-dir", str(runs)]) == 2
    assert "no run called 'none'" in capsys.readouterr().err


def test_an_old_database_is_read_after_it_is_brought_up_to_date(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a search of an earlier version left it: no items, no prompts, no objectives."""
    old = tmp_path / "old"
    shutil.copytree(runs, old)
    with Ledger(old / driving.LEDGER) as ledger:
        for row in ledger.runs():
            facts = {k: v for k, v in row.facts.items() if k != "objectives"}
            ledger.update_run(row.id, facts=facts)
        ledger._conn.execute("DROP TABLE run_items")
        ledger._conn.execute("DROP TABLE run_prompts")
        ledger._conn.execute(
            "DELETE FROM _sqlite_migrations WHERE name IN "
            "('m002_items_of_a_run', 'm005_prompts_of_a_run')"
        )
        ledger._conn.execute("DROP INDEX candidates_score")
    text = said(capsys, "compare", "first", "second", "--runs-dir", old)
    assert "which items were asked was not written down" in text
    assert "search.algorithm" in text
    said(capsys, "report", "first", "--runs-dir", old)
