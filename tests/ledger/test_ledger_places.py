"""A database that is taken away, lies where nobody may write, or is a newer version's."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from agentmerge.cli.app import run_app
from agentmerge.config import SearchConfig
from agentmerge.errors import LedgerError, RunFailed, UserError
from agentmerge.ledger import Ledger
from agentmerge.ledger.schema import SET
from agentmerge.ledger.store import remedy
from agentmerge.report.summary import trace
from agentmerge.session import driving

AWAY = ["deleted", "deleted with its journal", "moved", "replaced", "folder moved", "all deleted"]


def take_away(path: Path, how: str) -> None:
    if how == "all deleted":
        shutil.rmtree(path.parent)
        return
    if how == "folder moved":
        path.parent.rename(path.parent.with_name("moved"))
    elif how == "moved":
        path.rename(path.with_name("elsewhere.sqlite"))
    else:
        path.unlink()
    if how == "deleted with its journal":
        for end in ("-wal", "-shm"):
            path.with_name(path.name + end).unlink()
    if how == "replaced":
        with closing(sqlite3.connect(path)) as conn, conn:
            conn.execute("CREATE TABLE theirs (x)")


def put_back(path: Path) -> None:
    """As the sentence says: clear what is there away, give the copy its name."""
    (saved,) = path.parent.glob("agentmerge.saved-*.sqlite")
    for file in path.parent.glob(f"{path.name}*"):
        file.unlink()
    saved.rename(path)


@pytest.mark.parametrize("how", AWAY)
def test_a_ledger_that_is_taken_away_is_noticed_at_the_next_write_and_saved(
    tmp_path: Path, fake_config: str, how: str
) -> None:
    """With what was written before, what is being written, and what other threads write then."""
    config = SearchConfig.from_text(fake_config)
    driving.run(config, name="calm", runs_dir=tmp_path / "calm")
    with Ledger(tmp_path / "calm" / driving.LEDGER) as ledger:
        whole = trace(ledger, ledger.run("calm"))
    runs = tmp_path / "runs"
    path = runs / driving.LEDGER
    seen: list[Any] = []

    def listen(event: dict[str, Any]) -> None:
        seen.append(event)
        if [e["event"] for e in seen].count("candidate") == 8 and path.exists():
            take_away(path, how)

    with pytest.raises(RunFailed) as failed:
        driving.run(config, name="a", runs_dir=runs, emit=listen)
    assert "was deleted, moved or replaced while it was in use" in str(failed.value)
    assert "agentmerge.saved-1.sqlite" in str(failed.value)
    scored = [event for event in seen if event["event"] == "candidate"]
    assert len(scored) < 12  # not at the end
    if how == "replaced":
        with closing(sqlite3.connect(path)) as conn:
            assert conn.execute("SELECT count(*) FROM theirs").fetchone() == (0,)
    put_back(path)
    with Ledger(path) as ledger:
        there = {(c.generation, c.slot) for c in ledger.candidates(ledger.run("a").id) if c.score}
    assert {(e["generation"], e["slot"]) for e in scored if e["score"]} <= there
    again: list[Any] = []
    row = driving.resume("a", runs_dir=runs, emit=again.append)
    with Ledger(path) as ledger:
        assert trace(ledger, row) == whole
    paid = [e for e in again if e["event"] == "candidate" and not e["reused"]]
    assert not {(e["generation"], e["slot"]) for e in paid} & there


def test_checkpoints_that_are_taken_away_are_noticed_and_resume_goes_on(
    tmp_path: Path, fake_config: str
) -> None:
    config = SearchConfig.from_text(fake_config)
    path = tmp_path / driving.CHECKPOINTS
    seen: list[Any] = []

    def listen(event: dict[str, Any]) -> None:
        seen.append(event)
        if [e["event"] for e in seen].count("candidate") == 8 and path.exists():
            path.unlink()

    with pytest.raises(RunFailed, match="deleted, moved or replaced while the search ran"):
        driving.run(config, name="a", runs_dir=tmp_path, emit=listen)
    assert sum(e["event"] == "candidate" for e in seen) < 12
    assert not path.exists()
    assert driving.resume("a", runs_dir=tmp_path).status == "done"


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """A folder that this process owns; it is then, for files, nobody in particular."""
    home = Path(tempfile.mkdtemp(dir="/tmp"))  # one that another user can get at
    was = os.geteuid()
    if was == 0:
        os.chown(home, 65534, 65534)
        os.seteuid(65534)
    try:
        yield home
    finally:
        os.seteuid(was)
        for folder in (home, *home.rglob("*")):
            if folder.is_dir():
                folder.chmod(0o700)
        shutil.rmtree(home)


@pytest.mark.parametrize("left", ["closed", "killed", "killed without -shm", "old version"])
def test_a_runs_directory_that_cannot_be_written_can_be_read(
    unprivileged: Path,
    fake_config: str,
    left: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AGENTMERGE_CACHE", str(unprivileged / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(unprivileged))
    runs, where = unprivileged / "runs", unprivileged / "read"
    driving.run(SearchConfig.from_text(fake_config), name="a", runs_dir=runs)
    with Ledger(runs / driving.LEDGER) as ledger:
        ledger.update_run(ledger.run("a").id, stop_reason="as it is in the journal")
        if left.startswith("killed"):
            shutil.copytree(runs, where)
            if left == "killed without -shm":
                for file in where.glob("*-shm"):
                    file.unlink()
    if left == "old version":
        with closing(sqlite3.connect(runs / driving.LEDGER)) as conn, conn:
            conn.execute("DROP TABLE told")
            conn.execute("DELETE FROM _sqlite_migrations WHERE name LIKE 'm013%'")
    if not left.startswith("killed"):
        runs.rename(where)
    for path in (*where.rglob("*"), where):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = sorted(path.name for path in where.rglob("*"))
    report = unprivileged / "report.html"
    for command in (
        ["list"], ["show", "a"], ["best", "a"], ["watch", "a"], ["ledger", "stats"],
        ["report", "a", "--to", str(report)], ["tree"],
    ):  # fmt: skip
        code = run_app([*command, "--runs-dir", str(where)])
        said = capsys.readouterr()
        assert code == 0, (command, said.err)
    assert report.stat().st_size > 10_000
    assert run_app(["show", "a", "--json", "--runs-dir", str(where)]) == 0
    assert json.loads(capsys.readouterr().out)["stop_reason"] == "as it is in the journal"
    assert sorted(path.name for path in where.rglob("*")) == before
    assert [p.name for p in unprivileged.iterdir() if p.name.startswith("agentmerge-read")] == []
    assert run_app(["resume", "a", "--runs-dir", str(where)]) in (1, 2)
    assert "unexpected" not in capsys.readouterr().err


def test_a_newer_database_is_neither_read_nor_written(tmp_path: Path, fake_config: str) -> None:
    config = SearchConfig.from_text(fake_config)
    driving.run(config, name="a", runs_dir=tmp_path)
    path = tmp_path / driving.LEDGER
    with closing(sqlite3.connect(path)) as conn, conn:
        conn.execute(
            "INSERT INTO _sqlite_migrations (migration_set, name, applied_at) VALUES (?, ?, '')",
            (SET, "m099_from_the_future"),
        )
    before = path.read_bytes()
    for read_only in (False, True):
        with pytest.raises(UserError, match=r"newer agentmerge.*m099_from_the_future.*update"):
            Ledger(path, read_only=read_only)
    with pytest.raises(UserError, match="newer agentmerge"):
        driving.run(config, name="b", runs_dir=tmp_path)
    assert run_app(["doctor", "--runs-dir", str(tmp_path)]) == 1
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("sql", "value", "words"),
    [
        ("INSERT INTO recipes VALUES (?, NULL)", "x", "please report"),
        ("INSERT INTO nowhere VALUES (?)", "x", "not those of this version"),
        ("INSERT INTO recipes VALUES (?, '')", 2**63, "please report"),
        ("INSERT INTO recipes VALUES (?, '')", "\ud800", "please report"),
    ],
)
def test_a_fault_that_is_not_the_disks_is_not_called_so(
    tmp_path: Path, sql: str, value: Any, words: str
) -> None:
    with Ledger(tmp_path / "agentmerge.sqlite") as ledger:
        with pytest.raises(LedgerError, match=words) as failed, ledger._writing() as conn:
            conn.execute(sql, (value,))
        assert "free the disk" not in str(failed.value)
        assert ledger.runs() == []  # and it works on


def test_a_closed_database_is_no_full_disk() -> None:
    conn = sqlite3.connect(":memory:")
    conn.close()
    with pytest.raises(sqlite3.Error) as failed:
        conn.execute("SELECT 1")
    assert "free the disk" not in remedy(failed.value)


def test_at_exit_nothing_of_what_replaced_it_is_touched(tmp_path: Path) -> None:
    """SQLite deletes a journal by name when it closes: it may be another database's by then."""
    path = tmp_path / "agentmerge.sqlite"
    script = (
        "import sys, os\nfrom agentmerge.ledger import Ledger\nledger = Ledger(sys.argv[1])\n"
        "ledger.save_prompt('run', 'critic', 'text')\nprint('open', flush=True)\ninput()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        for file in tmp_path.glob("agentmerge.sqlite*"):
            file.unlink()
        other = Ledger(path)
        other.save_prompt("run", "critic", "another")
        journal = path.with_name(f"{path.name}-wal")
        assert journal.stat().st_size
        process.communicate("\n")
        assert journal.stat().st_size
    assert other.prompts("run") == {"critic": "another"}
    other.close()


@pytest.mark.parametrize("name", ["agentmerge.sqlite", "checkpoints.sqlite", "a/log.jsonl"])
@pytest.mark.parametrize("odd", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_not_waited_for(
    tmp_path: Path, fake_config: str, name: str, odd: Any
) -> None:
    path = tmp_path / "runs" / name
    path.parent.mkdir(parents=True)
    odd(path)
    with pytest.raises(UserError, match=rf"{path.name} is a (pipe|folder); put a regular file"):
        driving.run(SearchConfig.from_text(fake_config), name="a", runs_dir=tmp_path / "runs")
