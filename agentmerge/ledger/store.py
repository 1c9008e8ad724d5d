"""One open database file: short transactions, reads, and errors that say what to do."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Any, Self

from agentmerge.contracts.worker import EngineInfo
from agentmerge.errors import LedgerError, UserError
from agentmerge.ledger.identity import Identity, abandon, identity, is_elsewhere
from agentmerge.ledger.journal import journal_mode
from agentmerge.ledger.schema import migrate, pending
from agentmerge.system.bounded import refuse_odd_file
from agentmerge.system.temporary import TemporaryFolder

#: Of a ledger that was taken away while it was open, between its stem and a number.
SAVED = ".saved-"


class Store:
    """Safe to share between threads.

    read_only: for looking on while another process writes: nothing is created or locked, and a
        file of an older version is brought up to date first, where that cannot be as a copy.

    Raises:
        LedgerError: the file cannot be opened or written (disk full, locked, not a database), or
            is no more at its path: what it held, and what is written then, is saved beside it.
        UserError: a newer agentmerge wrote it, or it is no regular file.
    """

    def __init__(
        self, path: Path | str, busy_timeout_s: float = 30.0, *, read_only: bool = False
    ) -> None:
        self.path = Path(path)
        self._lock = threading.RLock()
        self._timeout_s = busy_timeout_s
        self._file: Identity | None = None
        self._saved: Path | None = None
        self._copy: TemporaryFolder | None = None
        refuse_odd_file(self.path, UserError)
        was_there = self.path.exists()
        try:
            if read_only and self._look():
                return
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._conn = self._connect(self.path, "")
            self._conn.execute(f"PRAGMA journal_mode={journal_mode(self.path)}")
            self._conn.execute("PRAGMA synchronous=FULL")
            if pending(self._conn):
                import sqlite_utils  # noqa: F401  # takes long: not while others wait for the lock

                with self._writing() as conn:
                    migrate(conn)
            self._file = identity(self.path)
        except UserError:
            self._conn.close()
            raise
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

    def _connect(self, path: Path, query: str) -> sqlite3.Connection:
        return sqlite3.connect(
            f"{path.absolute().as_uri()}{query}",
            uri=True,
            timeout=self._timeout_s,
            check_same_thread=False,
            isolation_level=None,
        )

    def _look(self) -> bool:
        """Open for reading; False where the file is of an older version."""
        self._conn = self._connect(self.path, "?mode=ro")
        try:
            if not pending(self._conn):
                return True
            if os.access(self.path.parent, os.W_OK):
                self._conn.close()
                return False
        except sqlite3.OperationalError as error:
            # Even to read, SQLite writes beside a file with WAL, if nobody has it open.
            if not is_unwritable(error) or not self.path.is_file():
                raise
        self._conn.close()
        journal = self.path.with_name(f"{self.path.name}-wal")
        if not (journal.is_file() and journal.stat().st_size):
            self._conn = self._connect(self.path, "?mode=ro&immutable=1")
            if not pending(self._conn):
                return True
            self._conn.close()
        self._copy = TemporaryFolder("agentmerge-read")
        for file in (self.path, journal):
            if file.is_file():
                shutil.copyfile(file, self._copy.path / file.name)
        self._conn = self._connect(self._copy.path / self.path.name, "")
        if pending(self._conn):
            with self._writing() as conn:
                migrate(conn)
        return True

    def copy_to(self, path: Path) -> None:
        """The whole database as another file, whoever else writes to it meanwhile."""
        with self._lock, closing(sqlite3.connect(path)) as target:
            self._conn.backup(target)

    def close(self) -> None:
        """Safe to call twice.

        Raises:
            LedgerError: the file is no more at its path. Said at the end too, since whoever wrote
                may not have been heard.
        """
        with self._lock:
            gone = is_elsewhere(self.path, self._file)
            self._file = None
            if gone and self._saved is None:
                self._save_elsewhere()
            self._conn.close()
            if self._copy is not None:
                self._copy.close()
            if gone:
                raise LedgerError(self._said_saved())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One short transaction: all of it is on disk when the block ends, or none."""
        with self._lock:
            try:
                if self._saved is None and is_elsewhere(self.path, self._file):
                    self._save_elsewhere()
                self._conn.execute("BEGIN IMMEDIATE")
                try:
                    yield self._conn
                except BaseException:
                    self._conn.rollback()
                    raise
                self._conn.commit()
            except (sqlite3.Error, OverflowError, UnicodeEncodeError) as error:
                if self._conn.in_transaction:
                    self._conn.rollback()
                raise LedgerError(
                    f"results database {self.path} cannot be written: {error}; {remedy(error)}"
                ) from error
            if self._saved is not None:
                raise LedgerError(self._said_saved())

    def _save_elsewhere(self) -> None:
        """The file is no more at its path, and gone when it is closed: go on in a copy."""
        names = (f"{self.path.stem}{SAVED}{n}{self.path.suffix}" for n in count(1))
        saved = self.path
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            saved = next(to for name in names if _is_new(to := self.path.with_name(name)))
            conn = self._connect(saved, "")
            self._conn.backup(conn)
        except (sqlite3.Error, OSError) as error:
            raise LedgerError(
                f"results database {self.path} was deleted, moved or replaced while it was in use, "
                f"and what it held cannot be saved as {saved}: {error}; {remedy(error)}"
            ) from error
        finally:
            abandon(self._conn)
        self._conn, self._saved = conn, saved

    def _said_saved(self) -> str:
        return (
            f"results database {self.path} was deleted, moved or replaced while it was in use; all "
            f"that it held and what came since is in {self._saved}: to go on, move "
            f"{self.path.name}* away, name that file {self.path.name}, and resume"
        )

    def _rows(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._lock:
            try:
                return self._conn.execute(sql, values).fetchall()
            except (sqlite3.Error, OverflowError, UnicodeEncodeError) as error:
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
            except (sqlite3.Error, OverflowError, UnicodeEncodeError) as error:
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


def _is_new(file: Path) -> bool:
    """Make a file; False where it is there."""
    try:
        file.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def is_unwritable(error: sqlite3.Error) -> bool:
    """Whether SQLite needed to write where nobody may."""
    name = str(getattr(error, "sqlite_errorname", ""))
    return name.startswith(("SQLITE_CANTOPEN", "SQLITE_READONLY"))


def lacks_shared_memory(error: BaseException | None) -> bool:
    """Whether the folder's file system cannot map SQLite's -shm file."""
    return str(getattr(error, "sqlite_errorname", "")).startswith("SQLITE_IOERR_SHM")


def remedy(error: Exception) -> str:
    """What to do about a database that cannot be used."""
    name = getattr(error, "sqlite_errorname", None) or ""
    if lacks_shared_memory(error):
        return (
            "this file system has no shared memory for SQLite (Lustre, GPFS and some NFS mounts "
            "have none); name a folder on a local disk with --runs-dir"
        )
    if name == "SQLITE_FULL":
        return "free the disk, then resume"
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_PROTOCOL")):
        return "end the other writer, then resume"
    if name.startswith("SQLITE_IOERR"):
        return "the disk failed or is full: free or change it, then resume"
    if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
        return "move it away, or save what is left of it with the .recover command of sqlite3"
    if name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")):
        return "make its folder writable, or name another with --runs-dir"
    if isinstance(error, OSError):
        return "name another folder with --runs-dir"
    if name == "SQLITE_NOMEM":
        return "free memory, then resume"
    if name.startswith(("SQLITE_ERROR", "SQLITE_SCHEMA")):
        return (
            "its tables are not those of this version: if another program changed them, take them "
            "from a copy, or name another folder with --runs-dir"
        )
    return (
        "this is a fault of agentmerge, unless another program wrote to the file: please report "
        "it; what was saved stays, and resume goes on from there"
    )


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
