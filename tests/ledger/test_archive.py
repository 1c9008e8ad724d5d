"""The results database as a whole: stats, prune, export, and other people's tools."""

from __future__ import annotations

import asyncio
import json
import shutil
import sqlite3
from pathlib import Path

import pytest

from agentmerge.cli.app import run_app
from agentmerge.errors import LedgerError
from agentmerge.ledger import Ledger
from agentmerge.ledger.archive import export_parquet, stats
from agentmerge.report.items import asked
from agentmerge.session import driving
from tests.report.conftest import search_family


@pytest.fixture(scope="module")
def family_of_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    search_family(folder)
    return folder


@pytest.fixture
def runs(family_of_runs: Path, tmp_path: Path) -> Path:
    shutil.copytree(family_of_runs, tmp_path / "runs")
    return tmp_path / "runs"


def said(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict:
    assert run_app([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_stats_count_what_is_there(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = said(capsys, "ledger", "stats", "--runs-dir", runs)
    with Ledger(runs / driving.LEDGER) as ledger:
        candidates = sum(len(ledger.candidates(row.id)) for row in ledger.runs())
    assert found["searches"] == 2
    assert found["candidates"] == candidates
    assert found["item_results"] > 40 * 120
    assert 0 < found["bytes_per_item"] < 12, "small blocks cost a little more an item"
    assert found["unused"] == {"blocks": 0, "item_results": 0, "bytes": 0}


def test_prune_removes_what_no_search_has_and_nothing_else(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Ledger(runs / driving.LEDGER) as ledger:
        before = stats(ledger)
        second = ledger.run("second")
        kept = {c.recipe_hash for c in ledger.candidates(second.id)}
        question = asked(ledger, second, "search")
        assert question is not None
        first_only = {
            c.recipe_hash for c in ledger.candidates(ledger.run("first").id)
        } - kept  # fmt: skip
    where = ("--forget", "first", "--runs-dir", runs)
    dry = said(capsys, "ledger", "prune", "--dry-run", *where)
    assert dry["forgotten"] == ["first"]
    with Ledger(runs / driving.LEDGER) as ledger:
        assert stats(ledger) == before, "a dry run removes nothing"
    done = said(capsys, "ledger", "prune", *where)
    assert done["item_results"] == dry["item_results"] > 0
    with Ledger(runs / driving.LEDGER) as ledger:
        after = stats(ledger)
        assert [row.name for row in ledger.runs()] == ["second"]
        assert after["item_results"] == before["item_results"] - done["item_results"]
        scored = [c for c in ledger.candidates(second.id) if c.score is not None]
        assert all(question.values(ledger, c.recipe_hash) for c in scored)
        assert not any(question.values(ledger, recipe) for recipe in first_only)
    assert run_app(["resume", "second", "--runs-dir", str(runs), "-q"]) == 0
    assert run_app(["report", "second", "--runs-dir", str(runs)]) == 0
    capsys.readouterr()
    assert said(capsys, "show", "second", "--runs-dir", runs)["parent"]["run"] is None


def test_prune_refuses_a_search_that_runs(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from agentmerge.ledger.lease import Lease

    with Ledger(runs / driving.LEDGER) as ledger:
        run_id = ledger.run("first").id
    with Lease.acquire(runs / driving.CHECKPOINTS, run_id, name="first"):
        code = run_app(["ledger", "prune", "--forget", "first", "--runs-dir", str(runs)])
    assert code == 2
    assert "runs now" in capsys.readouterr().err


def test_no_file_is_rewritten_while_a_search_runs_there(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from agentmerge.ledger.lease import Lease

    with Ledger(runs / driving.LEDGER) as ledger:
        run_id = ledger.run("second").id
    sizes = [(runs / name).stat().st_size for name in (driving.LEDGER, driving.CHECKPOINTS)]
    where = ("--runs-dir", str(runs))
    with Lease.acquire(runs / driving.CHECKPOINTS, run_id, name="second"):
        assert run_app(["ledger", "prune", "--forget", "first", *where]) == 0
        assert "second runs now, so the file keeps its size" in capsys.readouterr().out
        gone = said(capsys, "gc", *where)
        assert gone["busy"] == ["second"]
        assert gone["freed_bytes"] == 0
    after = [(runs / name).stat().st_size for name in (driving.LEDGER, driving.CHECKPOINTS)]
    assert all(new >= old for old, new in zip(sizes, after, strict=True))
    said(capsys, "ledger", "prune", *where)
    assert (runs / driving.LEDGER).stat().st_size < sizes[0]
    assert said(capsys, "gc", *where)["freed_bytes"] > 0


def test_prune_says_where_the_database_is_locked(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Ledger(runs / driving.LEDGER, busy_timeout_s=0.1) as ledger:
        other = sqlite3.connect(runs / driving.LEDGER, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(LedgerError, match="locked"):
            ledger.shrink()
        other.rollback()
        other.close()


def test_parquet_holds_every_item_result(runs: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    with Ledger(runs / driving.LEDGER) as ledger:
        counts = export_parquet(ledger, tmp_path / "out")
        row = ledger.run("first")
        answer = row.result["answer"]
        question = asked(ledger, row, "sealed")
        assert question is not None
        values = question.values(ledger, answer["recipe_hash"])
        assert values is not None
        total = stats(ledger)["item_results"]
    assert counts["items"] == total
    assert pq.read_table(tmp_path / "out" / "searches.parquet").column("name").to_pylist() == [
        "first",
        "second",
    ]
    candidates = pq.read_table(tmp_path / "out" / "candidates.parquet")
    assert candidates.num_rows == counts["candidates"]
    items = pq.read_table(tmp_path / "out" / "items.parquet").to_pylist()
    mine = {
        (i["task"], i["item"]): i for i in items if i["recipe_hash"] == answer["recipe_hash"]
    }  # fmt: skip
    for task, found in values.items():
        for key, result in found.items():
            assert mine[task, key]["value"] == result.value
            assert mine[task, key]["margin"] == pytest.approx(result.margin)


def test_an_export_that_cannot_be_written_is_said(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run_app(["ledger", "export", "--to", "/proc/nowhere", "--runs-dir", str(runs)])
    assert code == 2
    assert "cannot be written" in capsys.readouterr().err


def test_views_for_people_say_what_show_says(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = said(capsys, "show", "first", "--runs-dir", runs)
    conn = sqlite3.connect(runs / driving.LEDGER)
    conn.row_factory = sqlite3.Row
    row = dict(conn.execute("SELECT * FROM searches WHERE name = 'first'").fetchone())
    assert row["evaluations"] == shown["evaluations"]["total"]
    assert row["best"] == shown["best"]["score"]
    assert row["sealed"] == shown["final"]["answer"]["sealed_score"]
    count = conn.execute("SELECT count(*) FROM scores WHERE search = 'first'").fetchone()[0]
    assert count == 40
    conn.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_datasette_serves_it(runs: Path) -> None:
    pytest.importorskip("datasette")
    from datasette.app import Datasette

    async def read() -> tuple[int, dict, int]:
        site = Datasette([str(runs / driving.LEDGER)])
        await site.invoke_startup()
        rows = await site.client.get("/agentmerge/scores.json?_shape=array&search=second")
        page = await site.client.get("/agentmerge/searches")
        return rows.status_code, rows.json(), page.status_code

    status, rows, page = asyncio.run(read())
    assert (status, page) == (200, 200)
    assert {row["search"] for row in rows} == {"second"}
