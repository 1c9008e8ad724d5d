"""Where a search's graph state lives between steps: one SQLite file for all searches.

Knows LangGraph's checkpoint tables and how to thin, copy and share them. Does not know what a
state holds, who may write to it (lease.py), nor the ledger, which is another file.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentmerge.errors import RunFailed, UserError
from agentmerge.ledger.folder import CHECKPOINTS
from agentmerge.ledger.identity import Identity, abandon, checkpoints_gone, identity, is_elsewhere
from agentmerge.ledger.journal import journal_mode
from agentmerge.ledger.store import remedy
from agentmerge.system.bounded import refuse_odd_file
from agentmerge.system.redaction import redact

# LangGraph reads this once, when it is first imported: an unknown class in a checkpoint file is
# then data, never code. Our own serializer below is strict even if LangGraph was imported earlier.
os.environ.setdefault("LANGGRAPH_STRICT_MSGPACK", "true")

from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.checkpoint.sqlite import SqliteSaver

if TYPE_CHECKING:
    from langchain_core.runnables import RunnableConfig
    from langgraph.checkpoint.base import (
        CheckpointTuple,
    )

BUSY_TIMEOUT_S = 30.0
RUNS_DIR_VARIABLE = "AGENTMERGE_RUNS_DIR"

# Rows of one thread that are not the newest of their namespace.
_OLDER = """thread_id = ? AND checkpoint_id < (
    SELECT MAX(newest.checkpoint_id) FROM checkpoints AS newest
    WHERE newest.thread_id = {table}.thread_id AND newest.checkpoint_ns = {table}.checkpoint_ns)"""
_ALL = "thread_id = ?"
_STRATEGIES = {"keep_latest": _OLDER, "delete": _ALL}


@dataclass(frozen=True, slots=True)
class Prunable:
    """What a prune would remove; `payload_bytes` is the rows' content, without page overhead."""

    checkpoints: int
    writes: int
    payload_bytes: int


def _awaited(name: str) -> Any:
    """A method of the saver on a thread of its own, for a caller that runs on an event loop."""

    async def call(saver: Saver, *given: Any, **named: Any) -> Any:
        return await asyncio.to_thread(getattr(saver, name), *given, **named)

    return call


class Saver(SqliteSaver):
    """LangGraph's SQLite saver with an async facade, prune, copy and delete_for_runs.

    Passes langgraph-checkpoint-conformance in full. Safe to share between threads. Graphs that
    use DeltaChannel are not supported: pruning would empty their channels.
    """

    def __init__(self, conn: sqlite3.Connection, path: Path | None = None) -> None:
        self.path = path
        self.file: Identity | None = None if path is None else identity(path)
        # An empty allowlist: the state is JSON-plain, so no class needs to come back from disk.
        super().__init__(conn, serde=JsonPlusSerializer(allowed_msgpack_modules=[]))

    def setup(self) -> None:
        """Create the tables; waits for another process that is creating them."""
        deadline = time.monotonic() + BUSY_TIMEOUT_S
        while True:
            try:
                return super().setup()
            except sqlite3.OperationalError as error:
                # Switching a new file to WAL ignores SQLite's own busy timeout.
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    @contextmanager
    def cursor(self, transaction: bool = True) -> Iterator[sqlite3.Cursor]:
        """One transaction under the lock; rolls back on an error, where the parent commits.

        Raises:
            RunFailed: the file is no more at its path.
        """
        with self.lock:
            if self.path is not None and is_elsewhere(self.path, self.file):
                raise RunFailed(checkpoints_gone(self.path))
            self.setup()
            with self.conn, closing(self.conn.cursor()) as cur:
                yield cur

    def list(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> Iterator[CheckpointTuple]:
        """Newest first. Read at once, so that a caller may use the saver while it iterates."""
        yield from [*super().list(config, filter=filter, before=before, limit=limit)]

    def searches(self) -> Sequence[str]:
        """Threads of our own graph: their states name a search, which has the thread's id."""
        with self.cursor() as cur:
            cur.execute("SELECT DISTINCT thread_id FROM checkpoints ORDER BY thread_id")
            threads = [str(row[0]) for row in cur.fetchall()]
        return [thread for thread in threads if self._searched_by(thread) == thread]

    def _searched_by(self, thread_id: str) -> str | None:
        found = self.get_tuple({"configurable": {"thread_id": thread_id}})
        values = found.checkpoint["channel_values"] if found else {}
        begun = values.get("__start__")
        state = begun if isinstance(begun, dict) else values
        run_id = state.get("run_id")
        return run_id if isinstance(run_id, str) else None

    def put_writes(
        self,
        config: RunnableConfig,
        writes: Sequence[tuple[str, Any]],
        task_id: str,
        task_path: str = "",
    ) -> None:
        """As LangGraph's; of an error that ended a node its text is kept, without secrets."""
        kept = [(c, redact(repr(v)) if isinstance(v, BaseException) else v) for c, v in writes]
        super().put_writes(config, kept, task_id, task_path)

    def prunable(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> Prunable:
        """What `prune` with the same arguments would remove."""
        where = _strategy(strategy)
        checkpoints = writes = size = 0
        with self.cursor() as cur:
            for thread_id in thread_ids:
                cur.execute(
                    "SELECT COUNT(*), COALESCE(SUM(LENGTH(checkpoint) + LENGTH(metadata)), 0) "
                    f"FROM checkpoints WHERE {where.format(table='checkpoints')}",
                    (thread_id,),
                )
                count, length = cur.fetchone()
                checkpoints, size = checkpoints + count, size + length
                cur.execute(
                    "SELECT COUNT(*), COALESCE(SUM(LENGTH(value)), 0) "
                    f"FROM writes WHERE {where.format(table='writes')}",
                    (thread_id,),
                )
                count, length = cur.fetchone()
                writes, size = writes + count, size + length
        return Prunable(checkpoints, writes, size)

    def prune(
        self, thread_ids: Sequence[str], *, strategy: str = "keep_latest", shrink: bool = True
    ) -> None:
        """Remove old checkpoints of these threads, then (shrink) give the space back to the disk,
        while which nobody else can write to the file.

        `keep_latest` keeps the newest checkpoint of each namespace with its pending writes, which
        is all that a resume needs; `delete` keeps nothing.
        """
        where = _strategy(strategy)
        with self.cursor() as cur:
            for thread_id in thread_ids:
                # Writes first: which of them are old is read from the checkpoints.
                for table in ("writes", "checkpoints"):
                    condition = where.format(table=table)
                    cur.execute(f"DELETE FROM {table} WHERE {condition}", (thread_id,))
        if thread_ids and shrink:
            self._vacuum()

    def _vacuum(self) -> None:
        with self.lock:
            try:
                self.conn.execute("VACUUM")
                self.conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            except sqlite3.OperationalError as error:
                # A running search holds the file: its freed pages are reused, later gc shrinks it.
                if "locked" not in str(error):
                    raise

    def size_bytes(self) -> int:
        """Size of the database as SQLite sees it, freed but not yet returned pages included."""
        with self.cursor() as cur:
            pages = cur.execute("PRAGMA page_count").fetchone()[0]
            return int(pages) * int(cur.execute("PRAGMA page_size").fetchone()[0])

    def copy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        """Copy every checkpoint and pending write to a thread that does not exist yet."""
        with self.cursor() as cur:
            cur.execute("SELECT 1 FROM checkpoints WHERE thread_id = ?", (target_thread_id,))
            if cur.fetchone():
                raise UserError(
                    f"checkpoint thread {target_thread_id!r} already exists: copy to a new id"
                )
            cur.execute(
                "INSERT INTO checkpoints (thread_id, checkpoint_ns, checkpoint_id, "
                "parent_checkpoint_id, type, checkpoint, metadata) "
                "SELECT ?, checkpoint_ns, checkpoint_id, parent_checkpoint_id, type, checkpoint, "
                "metadata FROM checkpoints WHERE thread_id = ?",
                (target_thread_id, source_thread_id),
            )
            cur.execute(
                "INSERT INTO writes (thread_id, checkpoint_ns, checkpoint_id, task_id, task_path, "
                "idx, channel, type, value) "
                "SELECT ?, checkpoint_ns, checkpoint_id, task_id, task_path, idx, channel, type, "
                "value FROM writes WHERE thread_id = ?",
                (target_thread_id, source_thread_id),
            )

    def delete_for_runs(self, run_ids: Sequence[str]) -> None:
        """Remove the checkpoints, with their writes, whose metadata names one of these runs."""
        with self.cursor() as cur:
            for run_id in run_ids:
                cur.execute(
                    "SELECT thread_id, checkpoint_ns, checkpoint_id FROM checkpoints "
                    "WHERE json_extract(CAST(metadata AS TEXT), '$.run_id') = ?",
                    (str(run_id),),
                )
                keys = cur.fetchall()
                for table in ("writes", "checkpoints"):
                    cur.executemany(
                        f"DELETE FROM {table} "
                        "WHERE thread_id = ? AND checkpoint_ns = ? AND checkpoint_id = ?",
                        keys,
                    )

    async def alist(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> AsyncIterator[CheckpointTuple]:
        def read() -> tuple[CheckpointTuple, ...]:
            return tuple(self.list(config, filter=filter, before=before, limit=limit))

        for found in await asyncio.to_thread(read):
            yield found

    aget_tuple = _awaited("get_tuple")
    aput = _awaited("put")
    aput_writes = _awaited("put_writes")
    adelete_thread = _awaited("delete_thread")
    adelete_for_runs = _awaited("delete_for_runs")
    acopy_thread = _awaited("copy_thread")
    aprune = _awaited("prune")


def _strategy(name: str) -> str:
    if name not in _STRATEGIES:
        known = ", ".join(sorted(_STRATEGIES))
        raise UserError(f"prune strategy {name!r} is unknown: use one of {known}")
    return _STRATEGIES[name]


class _WithoutWal(sqlite3.Connection):
    """One on whose file system WAL does not work, which LangGraph's tables ask for."""

    def executescript(self, script: str, /) -> sqlite3.Cursor:
        return super().executescript(script.replace("journal_mode=WAL", "journal_mode=DELETE"))


def _open(path: Path) -> Saver:
    conn = None
    refuse_odd_file(path, UserError)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = sqlite3.Connection if journal_mode(path) == "WAL" else _WithoutWal
        conn = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, check_same_thread=False, factory=kind)
        saver = Saver(conn, path)
        saver.setup()
        saver.file = identity(path)
    except (sqlite3.DatabaseError, OSError) as error:
        if conn is not None:
            conn.close()
        raise UserError(
            f"cannot use {path} for checkpoints: {error}; give another runs directory, or move "
            "this file away if it is not agentmerge's"
        ) from error
    return saver


@contextmanager
def open_saver(path: Path | str) -> Iterator[Saver]:
    """A saver on this file, made with its folder where there is none; closed at the end."""
    saver = _open(Path(path))
    try:
        yield saver
    finally:
        _close(saver)


@contextmanager
def readable(checkpoints: Path, name: str) -> Iterator[None]:
    """A checkpoint file that fails as a sentence: the ledger still holds the whole search."""
    try:
        yield
    except sqlite3.Error as error:
        what_to_do = remedy(error)
        if what_to_do.startswith("move it away"):
            what_to_do = f"delete it (no result is in it), then agentmerge resume {name}"
        raise RunFailed(f"{checkpoints} cannot be used: {error}; {what_to_do}") from error


@asynccontextmanager
async def langgraph_checkpointer() -> AsyncIterator[Saver]:
    """The saver for a LangGraph server, on the file that the command line uses.

    Named in langgraph.json under "checkpointer" as
    {"path": "./agentmerge/session/checkpoints.py:langgraph_checkpointer"}. The folder is
    $AGENTMERGE_RUNS_DIR, or runs/ under the working directory.
    """
    path = Path(os.environ.get(RUNS_DIR_VARIABLE, "runs")) / CHECKPOINTS
    saver = await asyncio.to_thread(_open, path)
    try:
        yield saver
    finally:
        await asyncio.to_thread(_close, saver)


def _close(saver: Saver) -> None:
    if saver.path is not None and is_elsewhere(saver.path, saver.file):
        abandon(saver.conn)
    else:
        saver.conn.close()
