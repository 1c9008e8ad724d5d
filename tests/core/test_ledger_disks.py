"""Folders whose file system cannot hold a database: the remedy is the right one."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from agentmerge.errors import LedgerError
from agentmerge.ledger import Ledger
from agentmerge.ledger.store import remedy


class NoSharedMemory(sqlite3.Connection):
    """What SQLite says on Lustre or GPFS once a file is in WAL mode."""

    def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
        if sql == "BEGIN IMMEDIATE" or sql.startswith("PRAGMA user_version"):
            raise failure("SQLITE_IOERR_SHMMAP")
        return super().execute(sql, *values)


def failure(name: str) -> sqlite3.OperationalError:
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorname = name
    return error


@pytest.fixture
def no_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = sqlite3.connect
    monkeypatch.setattr(
        "agentmerge.ledger.store.sqlite3.connect",
        lambda *args, **rest: connect(*args, factory=NoSharedMemory, **rest),
    )


def test_a_file_system_without_shared_memory_is_told_and_nothing_is_left(
    tmp_path: Path, no_shared_memory: None
) -> None:
    with pytest.raises(LedgerError, match="a folder on a local disk with --runs-dir"):
        Ledger(tmp_path / "runs" / "agentmerge.sqlite")
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_database_that_was_there_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    path = tmp_path / "agentmerge.sqlite"
    Ledger(path).close()
    size = path.stat().st_size
    request.getfixturevalue("no_shared_memory")
    with pytest.raises(LedgerError), Ledger(path) as ledger:
        ledger.save_prompt("run", "critic", "text")
    assert path.stat().st_size == size


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("SQLITE_FULL", "free the disk"),
        ("SQLITE_BUSY", "end the other writer"),
        ("SQLITE_IOERR_WRITE", "free or change it"),
        ("SQLITE_IOERR_SHMSIZE", "Lustre"),
        ("SQLITE_READONLY", "writable"),
    ],
)
def test_each_failure_has_its_own_remedy(name: str, words: str) -> None:
    assert words in remedy(failure(name))
