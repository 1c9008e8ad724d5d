"""A results database of every older version opens with the present code, and nothing is lost."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from agentmerge.cli.app import run_app
from agentmerge.contracts.calls import Call
from agentmerge.contracts.strategy import Proposal
from agentmerge.contracts.worker import EngineInfo, Gradient
from agentmerge.ledger import GradientKey, Ledger, schema
from agentmerge.ledger.verdicts import VerdictKey
from agentmerge.session import driving
from tests.report.conftest import search_family

KEY = GradientKey("same", EngineInfo("hf", "1", "cpu", "float32", "64"), "question")
STEPS = list(schema.MIGRATIONS)
BEFORE_GRADIENTS = [step.__name__ for step in STEPS].index("m003_gradients")
ADDED = {"want": "score", "rung": 1.0, "share": 1.0, "violation": 0.0}


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A present database with rows in every table."""
    folder = tmp_path_factory.mktemp("runs")
    search_family(folder)
    with Ledger(folder / driving.LEDGER) as ledger:
        run_id = ledger.run("first").id
        for attempt, (reply, error) in enumerate(((None, "too slow"), ("said", None))):
            call = Call(({"role": "user", "content": "?"},), "answered", "text", reply, (), error)
            ledger.save_call(
                run_id, 1, "critic", "hash", attempt, call, model="m", prompt_file="f"
            )  # fmt: skip
        ledger.save_prompt(run_id, "critic", "text")
        ledger.save_texts(run_id, "one", {"key": ("2 + 2 =", "4")})
        ledger.save_probe(run_id, "best", {}, "answer", 0)
        ledger.add_candidates(run_id, 90, [(Proposal((0.5,), "x", want="gradient"), "h", "", "")])
        slope = (KEY, Gradient(0.5, 7, ()), (0.25,))
        ledger.save_evaluation(run_id, (90, 0), score=0.1, slope=slope)
        ledger.add_candidates(run_id, 91, [(Proposal((0.5,), "x"), "h", "of: other names", "")])
        ledger.save_call_and_verdict(
            run_id, VerdictKey("question", 0, "judge"), 0, call, model="m", prompt_file="f",
            verdict=("chats", "item", 0, 7.5, "why"),
        )  # fmt: skip
        ledger.save_unjudged(
            run_id, VerdictKey("other", 0, "judge"), ("chats", "item", 0), "why", final=True
        )
        assert ledger.first_time("news")
        assert not ledger.first_time("news")
    return folder


def tables(path: Path) -> dict[str, list[str]]:
    """Table -> its columns."""
    conn = sqlite3.connect(path)
    names = [
        name
        for (name,) in conn.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        if not name.startswith(("_", "sqlite_"))
    ]
    found = {
        name: [row[0] for row in conn.execute(f"SELECT name FROM pragma_table_info('{name}')")]
        for name in names
    }
    conn.close()
    return found


def rows(path: Path, table: str, columns: list[str]) -> list[Any]:
    conn = sqlite3.connect(path)
    found = conn.execute(f"SELECT {', '.join(columns)} FROM {table}").fetchall()
    conn.close()
    return sorted(found, key=repr)


def shape(path: Path) -> list[Any]:
    """Everything that a schema consists of."""
    conn = sqlite3.connect(path)
    found = conn.execute(
        "SELECT type, name, tbl_name, sql FROM sqlite_master WHERE name NOT LIKE '\\_sqlite%' "
        "ESCAPE '\\' ORDER BY name"
    ).fetchall()
    conn.close()
    return found


@pytest.fixture
def older(full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the database as the first ``count`` migrations leave it, with the rows it can hold."""

    def made(count: int) -> Path:
        runs = tmp_path / "runs"
        runs.mkdir()
        path = runs / driving.LEDGER
        with monkeypatch.context() as patch:
            patch.setattr(schema, "MIGRATIONS", STEPS[:count])
            Ledger(path).close()
        conn = sqlite3.connect(path)
        conn.execute("ATTACH ? AS present", (str(full / driving.LEDGER),))
        for table, columns in tables(path).items():
            names = ", ".join(columns)
            conn.execute(f"INSERT INTO {table} ({names}) SELECT {names} FROM present.{table}")
        conn.commit()
        conn.close()
        return path

    return made


@pytest.mark.parametrize("count", range(1, len(STEPS) + 1))
def test_a_database_of_any_version_becomes_the_present_one(
    older: Any, full: Path, count: int
) -> None:
    path = older(count)
    kept = tables(path)
    before = {table: rows(path, table, columns) for table, columns in kept.items()}
    assert all(before.values()), "every table of that version holds something"
    with Ledger(path, read_only=True) as ledger:  # as the reading commands open it
        assert [row.name for row in ledger.runs()] == ["first", "second"]
    assert {table: rows(path, table, columns) for table, columns in kept.items()} == before
    assert shape(path) == shape(full / driving.LEDGER)
    Ledger(path).close()
    assert shape(path) == shape(full / driving.LEDGER), "a second opening changes nothing"


@pytest.mark.parametrize("count", range(1, len(STEPS)))
def test_an_old_database_is_used_like_a_new_one(
    older: Any, count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = older(count).parent
    where = ["--runs-dir", str(runs)]
    for command in (
        ["list"],
        ["show", "second"],
        ["best", "second"],
        ["tree"],
        ["compare", "first", "second"],
        ["ledger", "stats"],
        ["report", "second"],
        ["replay", "second"],
        ["branch", "second", "--at", "1", "--as", "third", "-q"],
    ):
        assert run_app([*command, *where]) == 0, (command, capsys.readouterr().err)


def test_results_from_before_the_gradients_are_kept_and_gradients_work(older: Any) -> None:
    path = older(BEFORE_GRADIENTS)
    with Ledger(path) as ledger:
        first = ledger.run("first")
        found = ledger.candidates(first.id)
        assert len(found) == 42
        for name, value in ADDED.items():
            assert {getattr(c, name) for c in found} == {value}
        assert {(c.gradient, c.loss, c.estimate) for c in found} == {(None, None, None)}
        scored = next(c for c in found if c.state == "scored" and c.twin is None)
        asked = Proposal(scored.vector, "x", want="gradient", loss="margin")
        ledger.add_candidates(first.id, 92, [(asked, scored.recipe_hash, "", "")])
        (new,) = ledger.candidates(first.id, 92)
        assert (new.state, new.twin) == ("open", (scored.generation, scored.slot))
        gradient = Gradient(0.5, 7, ())
        slope = (KEY, gradient, (0.25,))
        ledger.save_evaluation(first.id, (92, 0), score=scored.score, slope=slope)
        assert ledger.gradient(KEY) == gradient
        assert ledger.candidates(first.id, 92)[0].gradient == (0.25,)


def test_a_failed_request_of_an_old_database_is_known_as_failed(older: Any) -> None:
    with Ledger(older(BEFORE_GRADIENTS)) as ledger:
        run_id = ledger.run("first").id
        endings = [ledger.call(run_id, 1, "critic", "hash", attempt).ending for attempt in (0, 1)]
    assert endings == ["failed", "answered"]


def test_what_no_judge_of_an_older_version_gave_a_verdict_to_is_known(older: Any) -> None:
    path = older([step.__name__ for step in STEPS].index("m017_unjudged"))
    conn = sqlite3.connect(path)
    asked = {
        "a/0": ["failed", "refused", "refused"],
        "b/0": ["refused", "refused", "failed"],
        "c/1": ["refused", "refused"],
        "d/0": ["refused", "answered"],
    }
    names = "run_id, generation, role, prompt_hash, attempt, model, messages, ending"
    names += ", tokens_in, tokens_out, latency_s, created"
    (run_id,) = conn.execute("SELECT id FROM runs WHERE name = 'first'").fetchone()
    for question, endings in asked.items():
        for attempt, ending in enumerate(endings):
            row = (run_id, -1, "judge", question, attempt, "m", "[]", ending, 1, 1, 0.1, 1.0)
            conn.execute(f"INSERT INTO model_calls ({names}) VALUES ({'?, ' * 11}?)", row)
    conn.commit()
    conn.close()
    with Ledger(path) as ledger:
        keys = [VerdictKey(*question.split("/"), "judge") for question in asked]  # type: ignore[arg-type]
        assert [ledger.refused(run_id, key) for key in keys] == [True, False, True, False]
        assert ledger.unjudged(run_id) == {"": 2}  # those that were asked twice for noise are not
