"""One open database file: short transactions, reads, and errors that say what to do."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

from agentmerge.errors import LedgerError
from agentmerge.ledger.journal import journal_mode
from agentmerge.ledger.schema import migrate, pending
from agentmerge.workers.base import EngineInfo


class Store:
    """Safe to share between threads.

    read_only: for looking on while another process writes: nothing is created or locked, and a
        file of an older version is brought up to date first.

    Raises:
        LedgerError: the file cannot be opened or written (disk full, locked, not a database).
    """

    def __init__(
        self, path: Path | str, busy_timeout_s: float = 30.0, *, read_only: bool = False
    ) -> None:
        self.path = Path(path)
        self._lock = threading.RLock()
        self._timeout_s = busy_timeout_s
        was_there = self.path.exists()
        try:
            if read_only:
                self._conn = self._connect("?mode=ro")
                if not pending(self._conn):
                    return
                self._conn.close()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._conn = self._connect("")
            self._conn.execute(f"PRAGMA journal_mode={journal_mode(self.path)}")
            self._conn.execute("PRAGMA synchronous=FULL")
            if pending(self._conn):
                with self._writing() as conn:
                    migrate(conn)
        except (sqlite3.Error, OSError, LedgerError) as error:
            cause = error.__cause__ if isinstance(error, LedgerError) else error
            if lacks_shared_memory(cause) and not was_there:
                self._conn.close()
                for end in ("", "-wal", "-shm"):  # where nobody can open it, nobody else made it
                    self.path.with_name(self.path.name + end).unlink(missing_ok=True)
            if isinstance(error, LedgerError):
                raise
            raise LedgerError(
                f"results database {self.path} cannot be opened: {error}; {remedy(error)}"
            ) from error

    def _connect(self, query: str) -> sqlite3.Connection:
        return sqlite3.connect(
            f"{self.path.absolute().as_uri()}{query}",
            uri=True,
            timeout=self._timeout_s,
            check_same_thread=False,
            isolation_level=None,
        )

    def copy_to(self, path: Path) -> None:
        """The whole database as another file, whoever else writes to it meanwhile."""
        with self._lock, closing(sqlite3.connect(path)) as target:
            self._conn.backup(target)

    def close(self) -> None:
        with self._lock:
            self._conn.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One short transaction: all of it is on disk when the block ends, or none."""
        with self._lock:
            try:
                self._conn.execute("BEGIN IMMEDIATE")
                try:
                    yield self._conn
                except BaseException:
                    self._conn.rollback()
                    raise
                self._conn.commit()
            except sqlite3.Error as error:
                if self._conn.in_transaction:
                    self._conn.rollback()
                raise LedgerError(
                    f"results database {self.path} cannot be written: {error}; {remedy(error)}"
                ) from error

    def _rows(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._lock:
            try:
                return self._conn.execute(sql, values).fetchall()
            except sqlite3.Error as error:
                raise LedgerError(
                    f"results database {self.path} cannot be read: {error}; {remedy(error)}"
                ) from error

    def records(self, sql: str, *values: Any) -> list[dict[str, Any]]:
        """Rows by column name."""
        with self._lock:
            try:
                cursor = self._conn.execute(sql, values)
                names = [column[0] for column in cursor.description]
                return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]
            except sqlite3.Error as error:
                raise LedgerError(
                    f"results database {self.path} cannot be read: {error}; {remedy(error)}"
                ) from error

    def shrink(self) -> None:
        """Give pages that nothing uses back to the disk; needs room for a copy while it runs."""
        with self._lock:
            try:
                self._conn.execute("VACUUM")
                self._conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            except sqlite3.Error as error:
                raise LedgerError(
                    f"results database {self.path} cannot be made smaller: {error}; what was "
                    "removed is removed, and its pages will be used again"
                ) from error


def lacks_shared_memory(error: BaseException | None) -> bool:
    """Whether the folder's file system cannot map SQLite's -shm file."""
    return str(getattr(error, "sqlite_errorname", "")).startswith("SQLITE_IOERR_SHM")


def remedy(error: Exception) -> str:
    """What to do about a database that cannot be used."""
    name = getattr(error, "sqlite_errorname", "")
    if lacks_shared_memory(error):
        return (
            "this file system has no shared memory for SQLite (Lustre, GPFS and some NFS mounts "
            "have none); name a folder on a local disk with --runs-dir"
        )
    if name == "SQLITE_FULL":
        return "free the disk, then resume"
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return "end the other writer, then resume"
    if name.startswith("SQLITE_IOERR"):
        return "the disk failed or is full: free or change it, then resume"
    if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
        return "move it away, or save what is left of it with the .recover command of sqlite3"
    if name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")):
        return "make its folder writable, or name another with --runs-dir"
    if isinstance(error, OSError):
        return "name another folder with --runs-dir"
    return "free the disk or end the other writer, then resume"


def intern(conn: sqlite3.Connection, table: str, key: str, body: Mapping[str, Any]) -> int:
    """The id of the row of ``table`` whose hash is ``key``, written if it is not there."""
    names = ", ".join(body)
    marks = ", ".join("?" for _ in body)
    conn.execute(
        f"INSERT OR IGNORE INTO {table} (hash, {names}) VALUES (?, {marks})",
        (key, *body.values()),
    )
    return int(conn.execute(f"SELECT id FROM {table} WHERE hash = ?", (key,)).fetchone()[0])


def hashed(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:32]


def engine_text(engine: EngineInfo) -> str:
    """What an engine's row is the hash of."""
    body = asdict(engine)
    if not engine.conditions:  # as engines were written before these were recorded
        del body["conditions"]
    return json.dumps(body, sort_keys=True)
