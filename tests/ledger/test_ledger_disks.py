"""Folders whose file system cannot hold a database: the remedy is the right one."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from agentmerge.errors import LedgerError
from agentmerge.ledger import Ledger
from agentmerge.ledger.journal import on_network
from agentmerge.ledger.store import remedy
from agentmerge.session import driving
from agentmerge.session.checkpoints import open_saver
from tests.session.conftest import config


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


MOUNTS = r"""overlay / overlay rw 0 0
proc /proc proc rw 0 0
/dev/sda1 /home ext4 rw 0 0
server:/export /home/team nfs4 rw 0 0
tmpfs /home/team/scratch tmpfs rw 0 0
10.0.0.1@o2ib:/fs /lustre lustre rw 0 0
//server/share /mnt/a\040share cifs rw 0 0
user@host: /mnt/ssh fuse.sshfs rw 0 0
/dev/sdb1 /mnt/stick fuse.ntfs rw 0 0
/dev/fuse /mnt/fuseblk fuseblk rw 0 0
scratch /scratch ext4 rw 0 0
scratch /scratch gpfs rw 0 0
"""


@pytest.mark.parametrize(
    ("folder", "network"),
    [
        ("/", False),
        ("/home/me/runs", False),
        ("/home/team", True),
        ("/home/team/runs", True),
        ("/home/teammate/runs", False),
        ("/home/team/scratch/runs", False),
        ("/lustre/runs", True),
        ("/mnt/a share/runs", True),
        ("/mnt/ssh/runs", True),
        ("/mnt/stick/runs", False),
        ("/mnt/fuseblk/runs", False),
        ("/scratch/runs", True),
    ],
)
def test_which_folders_several_hosts_may_share(folder: str, network: bool) -> None:
    assert on_network(Path(folder), MOUNTS) == network


def test_databases_on_a_network_have_no_wal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = tmp_path / "runs"
    with Ledger(runs / driving.LEDGER), open_saver(runs / driving.CHECKPOINTS):
        assert (runs / f"{driving.LEDGER}-shm").exists()
    mounts = tmp_path / "mounts"
    mounts.write_text(f"server:/export {tmp_path.resolve()} nfs rw 0 0\n")
    monkeypatch.setattr("agentmerge.ledger.journal.MOUNTS", mounts)
    row = driving.run(config(budget={"max_evaluations": 9}), name="a", runs_dir=runs)
    assert row.status == "done"
    assert driving.resume("a", runs_dir=runs).result == row.result
    for name in (driving.LEDGER, driving.CHECKPOINTS):  # made with a WAL, and changed
        with closing(sqlite3.connect(runs / name)) as conn:
            assert conn.execute("PRAGMA journal_mode").fetchone() == ("delete",)
        assert not (runs / f"{name}-wal").exists()
    with Ledger(runs / driving.LEDGER, read_only=True) as ledger:
        assert ledger.run("a").status == "done"
