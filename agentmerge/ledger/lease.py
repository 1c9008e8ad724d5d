"""The lease that keeps two processes off one search.

Knows one row a thread id (host, pid, heartbeat, token) in a SQLite file, on connections of its
own, and one of whoever can be asked to stop. Does not know what the search does with it: it takes,
renews, passes on that a stop was asked for, and gives back.
"""

from __future__ import annotations

import os
import socket
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from agentmerge.errors import LeaseHeld, RunFailed, UserError
from agentmerge.ledger.identity import Identity, abandon, checkpoints_gone, identity, is_elsewhere
from agentmerge.ledger.store import is_unwritable
from agentmerge.system.bounded import refuse_odd_file

STALE_AFTER_S = 60.0
_BUSY_TIMEOUT_S = 30.0
_BEATS_BEFORE_STALE = 4
#: How soon a stop that somebody asked for is heard.
_LISTEN_EVERY_S = 1.0
#: A process with a holder's pid that began so much later than its last beat is another one, where
#: the holder's token does not say when it began.
_STARTS_APART_S = 60.0

# Tokens of this process's own leases: a row with our pid and no such token was left by an earlier
# process that happened to have the same pid, as every restarted container has.
_held: set[str] = set()


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a lease; `heartbeat` is seconds since the epoch on the holder's clock, which is
    nobody else's: of another host's, only that it changes says anything."""

    host: str
    pid: int
    heartbeat: float
    token: str

    @property
    def is_here(self) -> bool:
        return self.host == socket.gethostname()

    @property
    def is_gone(self) -> bool:
        """Whether this holder is known to be at work no longer.

        On this host its process says so, however long it was silent (a suspended machine, a long
        VACUUM). Another host's says nothing at one look.
        """
        if not self.is_here:
            return False
        if self.pid == os.getpid():
            return self.token not in _held
        return not _is_alive(self.pid, self.heartbeat, self.token)


class Lease:
    """The sole right to advance one search, renewed by a thread until the block ends."""

    def __init__(
        self,
        path: Path,
        thread_id: str,
        stale_after_s: float,
        name: str,
        asked: Callable[[], None] | None = None,
    ) -> None:
        self.path = path
        self.thread_id = thread_id
        self.stale_after_s = stale_after_s
        self.name = name
        self.asked = asked
        self.token = uuid.uuid4().hex + _birth(os.getpid())
        self._file: Identity | None = None
        self._stop = threading.Event()
        self._lost = threading.Event()
        #: What ``check`` reads by, as often as a search takes a step.
        self._conn: sqlite3.Connection | None = None
        self._looking = threading.Lock()

    @classmethod
    @contextmanager
    def acquire(
        cls,
        path: Path | str,
        thread_id: str,
        stale_after_s: float = STALE_AFTER_S,
        *,
        name: str | None = None,
        say: Callable[[str], None] = lambda line: None,
        asked: Callable[[], None] | None = None,
    ) -> Iterator[Lease]:
        """Hold the lease of `thread_id` in the file `path` while the block runs.

        Raises LeaseHeld where another process, or another block of this one, is at work. A holder
        of this host that is dead is replaced; another host's once it was silent for `stale_after_s`
        by this process's own clock, which is waited for. `name` is what messages call the search;
        `say` hears why there is a wait; `asked` is called, on another thread, once somebody asks
        this holder to stop (`ask_to_stop`). Without it nobody can.
        """
        lease = cls(Path(path), thread_id, stale_after_s, name or thread_id, asked)
        lease._take(say)
        beat = threading.Thread(target=lease._renew, name=f"lease-{thread_id}", daemon=True)
        beat.start()
        try:
            yield lease
        finally:
            lease._stop.set()
            beat.join()
            lease._give_back()

    @staticmethod
    def holder(path: Path | str, thread_id: str) -> Holder | None:
        """The holder of this search's lease, unless it is known to be gone; writes nothing.

        Another host's counts as being at work until a search takes its lease.
        """
        found = _looked_up(Path(path), thread_id)
        return None if found is None or found.is_gone else found

    @staticmethod
    def ask_to_stop(path: Path | str, thread_id: str, name: str) -> Holder:
        """Ask whoever advances this search, on whatever host, to finish what runs and stop.

        Raises UserError where nobody does, or it cannot be asked; RunFailed where the file cannot
        be written.
        """
        idle = UserError(f"search {name!r} does not run, so there is nothing to stop")
        found = Lease.holder(path, thread_id)
        if found is None:
            raise idle
        try:
            with _transaction(Path(path), "rw") as conn:
                heard = conn.execute("UPDATE stops SET asked = 1 WHERE token = ?", (found.token,))
        except sqlite3.OperationalError as error:
            raise RunFailed(f"search {name!r} cannot be told to stop: {path}: {error}") from None
        if heard.rowcount == 0:
            if Lease.holder(path, thread_id) is None:  # it ended meanwhile
                raise idle
            raise UserError(
                f"search {name!r} is held by process {found.pid} on {found.host}, which cannot be "
                "asked to stop from elsewhere; stop it there"
            )
        return found

    def check(self) -> None:
        """Raise LeaseHeld if the lease was taken over, as after a long sleep of the machine;
        RunFailed if its file is no more at its path."""
        if is_elsewhere(self.path, self._file):
            raise RunFailed(checkpoints_gone(self.path))
        # A file that is locked says nothing; the thread that renews looks again.
        with suppress(sqlite3.OperationalError), self._looking:
            if self._conn is None:
                self._conn = _connect(self.path, "ro")
            found = _read(self._conn, self.thread_id)
            if found is None or found.token != self.token:
                self._lost.set()
        if self._lost.is_set():
            raise LeaseHeld(
                f"search {self.name!r} was taken over by another process while this one gave no "
                "sign of life; nothing is lost: follow it there, or stop it and resume here"
            )

    def _take(self, say: Callable[[str], None]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        silent = self._silent_elsewhere(say)
        with _transaction(self.path) as conn:
            found = _read(conn, self.thread_id)
            if found is not None and found != silent and not found.is_gone:
                raise LeaseHeld(self._refusal(found))
            conn.execute(
                "INSERT OR REPLACE INTO leases (thread_id, host, pid, heartbeat, token) "
                "VALUES (?, ?, ?, ?, ?)",
                (self.thread_id, socket.gethostname(), os.getpid(), time.time(), self.token),
            )
            conn.execute("DELETE FROM stops WHERE token NOT IN (SELECT token FROM leases)")
            if self.asked is not None:
                conn.execute("INSERT INTO stops (token, asked) VALUES (?, 0)", (self.token,))
            _held.add(self.token)
        self._file = identity(self.path)

    def _silent_elsewhere(self, say: Callable[[str], None]) -> Holder | None:
        """Another host's holder that gave no sign of life for long enough, by our own clock."""
        found = _looked_up(self.path, self.thread_id)
        if found is None or found.is_here:
            return None
        say(
            f"process {found.pid} on {found.host} had search {self.name!r}; waiting up to "
            f"{self.stale_after_s:.0f} s for a sign that it still has"
        )
        until = time.monotonic() + self.stale_after_s
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, self.stale_after_s / _BEATS_BEFORE_STALE))
            if _looked_up(self.path, self.thread_id) != found:
                return None
        return found

    def _refusal(self, found: Holder) -> str:
        if found.is_here and found.pid == os.getpid():
            return f"search {self.name!r} is already running in this process (pid {found.pid})"
        return (
            f"search {self.name!r} is being run by process {found.pid} on {found.host}; stop that "
            "process, or branch the search under another name"
        )

    def _renew(self) -> None:
        while not self._waited():
            # A locked file costs one beat of several; the next one tries again.
            if is_elsewhere(self.path, self._file):
                continue  # `check` says so
            with suppress(sqlite3.OperationalError), _transaction(self.path, "rw") as conn:
                renewed = conn.execute(
                    "UPDATE leases SET heartbeat = ? WHERE thread_id = ? AND token = ?",
                    (time.time(), self.thread_id, self.token),
                )
                if renewed.rowcount == 0:
                    self._lost.set()
                    return

    def _waited(self) -> bool:
        """Wait for the next beat, listening meanwhile; whether the lease is to be given back."""
        until = time.monotonic() + self.stale_after_s / _BEATS_BEFORE_STALE
        while (left := until - time.monotonic()) > 0:
            if self._stop.wait(left if self.asked is None else min(left, _LISTEN_EVERY_S)):
                return True
            if self.asked is not None and self._is_asked():
                asked, self.asked = self.asked, None
                # Apart: whatever a listener raises or waits for, the lease is renewed.
                threading.Thread(target=asked, name="asked to stop", daemon=True).start()
        return self._stop.is_set()

    def _is_asked(self) -> bool:
        """A file that is locked or gone says nothing; the next look asks again."""
        with suppress(sqlite3.Error, OSError, UserError), _opened(self.path, "ro") as conn:
            found = conn.execute(
                "SELECT asked FROM stops WHERE token = ?", (self.token,)
            ).fetchone()
            return found is not None and bool(found[0])
        return False

    def _give_back(self) -> None:
        _held.discard(self.token)
        gone = is_elsewhere(self.path, self._file)
        with self._looking:
            if self._conn is not None:
                (abandon if gone else sqlite3.Connection.close)(self._conn)
                self._conn = None
        if gone:
            return
        # Where the file is locked or gone, the row is recognised as dead by whoever comes next.
        with suppress(sqlite3.OperationalError), _transaction(self.path, "rw") as conn:
            conn.execute(
                "DELETE FROM leases WHERE thread_id = ? AND token = ?",
                (self.thread_id, self.token),
            )
            conn.execute("DELETE FROM stops WHERE token = ?", (self.token,))


def _looked_up(path: Path, thread_id: str) -> Holder | None:
    """A lease as it is written; None where none is, or nobody could have written one."""
    if not path.exists():
        return None
    try:
        with _opened(path, "ro") as conn:
            return _read(conn, thread_id)
    except sqlite3.OperationalError as error:
        # No table yet; or a folder that cannot be written to, where no process has the file open.
        if "no such table" in str(error) or is_unwritable(error):
            return None
        raise


@contextmanager
def _opened(path: Path, mode: str) -> Iterator[sqlite3.Connection]:
    with closing(_connect(path, mode)) as conn:
        yield conn


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    refuse_odd_file(path, UserError)  # a pipe would be waited for without an end
    where = f"{path.absolute().as_uri()}?mode={mode}"
    return sqlite3.connect(where, uri=True, timeout=_BUSY_TIMEOUT_S, check_same_thread=False)


@contextmanager
def _transaction(path: Path, mode: str = "rwc") -> Iterator[sqlite3.Connection]:
    """One write transaction on a connection of its own, with the tables in place."""
    with _opened(path, mode) as conn, conn:
        conn.execute("BEGIN IMMEDIATE")
        conn.execute(
            "CREATE TABLE IF NOT EXISTS leases (thread_id TEXT PRIMARY KEY, "
            "host TEXT NOT NULL, pid INTEGER NOT NULL, heartbeat REAL NOT NULL, "
            "token TEXT NOT NULL)"
        )
        conn.execute(
            "CREATE TABLE IF NOT EXISTS stops (token TEXT PRIMARY KEY, asked INTEGER NOT NULL)"
        )
        yield conn


def _read(conn: sqlite3.Connection, thread_id: str) -> Holder | None:
    row = conn.execute(
        "SELECT host, pid, heartbeat, token FROM leases WHERE thread_id = ?", (thread_id,)
    ).fetchone()
    return None if row is None else Holder(*row)


def _is_alive(pid: int, at: float, token: str) -> bool:
    """Whether the process that had this pid still runs: by when it began, counted from the boot as
    its token has it; in a token of earlier versions, by a clock that may have been set since (`at`,
    seconds since the epoch)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    fields = _stat(pid)
    if fields is None:
        return True
    if fields[0] == "Z":  # killed, and nobody has waited for it: it has its pid, and runs nothing
        return False
    _, told, birth = token.partition("@")
    return told + birth == _birth(pid) if told else _started(int(fields[19])) < at + _STARTS_APART_S


def _birth(pid: int) -> str:
    """Which boot of the machine a process belongs to, and its clock ticks since then; empty where
    the system does not say."""
    fields = _stat(pid)
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
    return "" if fields is None else f"@{boot}:{fields[19]}"


def _stat(pid: int) -> list[str] | None:
    """What Linux says of a process, from its state on."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def _started(ticks: int) -> float:
    """When a process began, in seconds since the epoch, from its clock ticks since the boot."""
    try:
        lines = Path("/proc/stat").read_text().splitlines()
        boot = next(int(line.split()[1]) for line in lines if line.startswith("btime "))
    except (OSError, StopIteration):
        return 0.0
    return boot + ticks / os.sysconf("SC_CLK_TCK")
