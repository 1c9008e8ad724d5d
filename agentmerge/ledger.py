"""The results database: runs, candidates, per-item results, model calls, advice.

It is the search's memory. What was paid for is committed here, under a key made of everything that
can change the answer, before the node that paid returns; asking again for a key that is there
costs nothing. Graph state holds only numbers that point here. It knows no strategy and no model.

Laid out for 100,000 candidates x 1,000 items: a result row is one packed block per (recipe,
engine, protocol, item set), three zlib-compressed columns (float64 values, float32 log-likelihoods,
float16 margins) and two bit flags an item; item keys are stored once a set. See ``pack``.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from sqlite_utils import Database, Migrations

from agentmerge.errors import LedgerError, NotFound
from agentmerge.strategies.base import Observation, Proposal
from agentmerge.workers.base import EngineInfo, ItemRef, ItemResult

migrations = Migrations("agentmerge")


@migrations()  # type: ignore[untyped-decorator]
def m001_first(db: Any) -> None:
    for statement in _SCHEMA.split(";"):
        if statement.strip():
            db.execute(statement)


_SCHEMA = """
CREATE TABLE runs (
    id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, created REAL NOT NULL, status TEXT NOT NULL,
    stop_reason TEXT NOT NULL DEFAULT '', config TEXT NOT NULL, settings_hash TEXT NOT NULL,
    seed INTEGER NOT NULL, algorithm TEXT NOT NULL, parent_run TEXT, parent_generation INTEGER,
    facts TEXT NOT NULL DEFAULT '{}', result TEXT
);
CREATE TABLE recipes (hash TEXT PRIMARY KEY, yaml TEXT NOT NULL);
CREATE TABLE candidates (
    run_id TEXT NOT NULL REFERENCES runs(id), generation INTEGER NOT NULL, slot INTEGER NOT NULL,
    operator TEXT NOT NULL, label TEXT NOT NULL, vector TEXT, recipe_hash TEXT NOT NULL,
    twin_generation INTEGER, twin_slot INTEGER, state TEXT NOT NULL, score REAL, tasks TEXT,
    failure TEXT, reused INTEGER NOT NULL DEFAULT 0, truncated INTEGER NOT NULL DEFAULT 0,
    cut_off INTEGER NOT NULL DEFAULT 0, seconds REAL, fingerprint TEXT,
    prior INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (run_id, generation, slot)
) WITHOUT ROWID;
CREATE INDEX candidates_recipe ON candidates(run_id, recipe_hash);
CREATE TABLE engines (id INTEGER PRIMARY KEY, hash TEXT NOT NULL UNIQUE, info TEXT NOT NULL);
CREATE TABLE protocols (
    id INTEGER PRIMARY KEY, hash TEXT NOT NULL UNIQUE, task TEXT NOT NULL, info TEXT NOT NULL
);
CREATE TABLE item_sets (
    id INTEGER PRIMARY KEY, hash TEXT NOT NULL UNIQUE, count INTEGER NOT NULL, keys BLOB NOT NULL
);
CREATE TABLE results (
    id INTEGER PRIMARY KEY, recipe_hash TEXT NOT NULL, engine_id INTEGER NOT NULL,
    protocol_id INTEGER NOT NULL, item_set_id INTEGER NOT NULL, block BLOB NOT NULL,
    fingerprint TEXT NOT NULL, seconds REAL NOT NULL, created REAL NOT NULL,
    UNIQUE (recipe_hash, engine_id, protocol_id, item_set_id)
);
CREATE TABLE model_calls (
    run_id TEXT NOT NULL, generation INTEGER NOT NULL, role TEXT NOT NULL,
    prompt_hash TEXT NOT NULL, attempt INTEGER NOT NULL, model TEXT NOT NULL,
    messages TEXT NOT NULL, reply TEXT, error TEXT,
    tokens_in INTEGER NOT NULL, tokens_out INTEGER NOT NULL,
    latency_s REAL NOT NULL, created REAL NOT NULL,
    PRIMARY KEY (run_id, generation, role, prompt_hash, attempt)
) WITHOUT ROWID;
CREATE TABLE advice (
    run_id TEXT NOT NULL, generation INTEGER NOT NULL, role TEXT NOT NULL, body TEXT NOT NULL,
    PRIMARY KEY (run_id, generation, role)
) WITHOUT ROWID
"""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A row of the candidates table: what was proposed and what came of it.

    state: "open" (not scored yet), "scored", "failed" or "twin" (the same merge as an earlier
        candidate of this run; its score is the earlier one's and it cost nothing).
    prior: scored under other settings before a branch: known to strategies, never the best.
    """

    generation: int
    slot: int
    operator: str
    label: str
    vector: tuple[float, ...] | None
    recipe_hash: str
    state: str
    score: float | None = None
    tasks: tuple[tuple[str, float], ...] = ()
    failure: str = ""
    reused: bool = False
    twin: tuple[int, int] | None = None
    truncated: int = 0
    cut_off: int = 0
    seconds: float | None = None
    prior: bool = False

    def observation(self) -> Observation:
        return Observation(
            self.generation,
            self.slot,
            self.vector,
            self.operator,
            self.score,
            self.tasks,
            self.recipe_hash,
            self.label,
            self.failure,
        )


@dataclass(frozen=True, slots=True)
class RunRow:
    id: str
    name: str
    created: float
    status: str
    stop_reason: str
    config: str
    settings_hash: str
    seed: int
    algorithm: str
    parent_run: str | None
    parent_generation: int | None
    facts: dict[str, Any]
    result: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class ResultKey:
    """What a block of item results belongs to, besides its items."""

    recipe_hash: str
    engine: EngineInfo
    protocol_hash: str


class Ledger:
    """One open results database; safe to share between threads.

    Raises:
        LedgerError: the file cannot be opened or written (disk full, locked, not a database).
    """

    def __init__(self, path: Path | str, busy_timeout_s: float = 30.0) -> None:
        self.path = Path(path)
        self._lock = threading.RLock()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._conn = sqlite3.connect(
                self.path, timeout=busy_timeout_s, check_same_thread=False, isolation_level=None
            )
            self._conn.execute("PRAGMA journal_mode=WAL")
            self._conn.execute("PRAGMA synchronous=NORMAL")
            with self._writing():
                migrations.apply(Database(self._conn, recursive_triggers=False))
        except (sqlite3.Error, OSError) as error:
            raise LedgerError(f"results database {self.path} cannot be opened: {error}") from error

    def close(self) -> None:
        with self._lock:
            self._conn.close()

    def __enter__(self) -> Ledger:
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
                    f"results database {self.path} cannot be written: {error}; free the disk or "
                    "end the other writer, then resume"
                ) from error

    def _rows(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._lock:
            try:
                return self._conn.execute(sql, values).fetchall()
            except sqlite3.Error as error:
                raise LedgerError(
                    f"results database {self.path} cannot be read: {error}"
                ) from error

    # --- runs -------------------------------------------------------------------------------

    def add_run(self, row: RunRow) -> None:
        body = asdict(row) | {
            "facts": json.dumps(row.facts),
            "result": None if row.result is None else json.dumps(row.result),
        }
        marks = ", ".join(f":{key}" for key in body)
        with self._writing() as conn:
            conn.execute(f"INSERT INTO runs ({', '.join(body)}) VALUES ({marks})", body)

    def run(self, name: str) -> RunRow:
        """The run called ``name`` (or with that id).

        Raises:
            NotFound: naming the runs that exist.
        """
        found = self._runs("WHERE name = ? OR id = ?", name, name)
        if not found:
            known = ", ".join(row.name for row in self.runs()[-8:]) or "none yet"
            raise NotFound(f"no run called {name!r} in {self.path.parent}; there are: {known}")
        return found[0]

    def runs(self) -> list[RunRow]:
        return self._runs("ORDER BY created, id")

    def _runs(self, tail: str, *values: Any) -> list[RunRow]:
        columns = ", ".join(RunRow.__dataclass_fields__)
        rows = self._rows(f"SELECT {columns} FROM runs {tail}", *values)
        found = []
        for row in rows:
            body = dict(zip(RunRow.__dataclass_fields__, row, strict=True))
            body["facts"] = json.loads(body["facts"])
            body["result"] = None if body["result"] is None else json.loads(body["result"])
            found.append(RunRow(**body))
        return found

    def update_run(self, run_id: str, **fields: Any) -> None:
        packed = {k: json.dumps(v) if k in ("facts", "result") else v for k, v in fields.items()}
        sets = ", ".join(f"{key} = :{key}" for key in packed)
        with self._writing() as conn:
            conn.execute(f"UPDATE runs SET {sets} WHERE id = :id", packed | {"id": run_id})

    # --- candidates -------------------------------------------------------------------------

    def add_candidates(
        self,
        run_id: str,
        generation: int,
        proposals: Sequence[tuple[Proposal, str, str, str]],
    ) -> None:
        """Write a generation's proposals: (proposal, recipe hash, recipe YAML, failure or "").

        Writing the same generation again (a node that runs twice) changes nothing. A merge that
        this run has already is a twin; one with a failure is refused before any worker sees it.
        """
        with self._writing() as conn:
            for slot, (proposal, recipe_hash, yaml_text, failure) in enumerate(proposals):
                conn.execute(
                    "INSERT OR IGNORE INTO recipes VALUES (?, ?)", (recipe_hash, yaml_text)
                )
                twin = conn.execute(
                    "SELECT generation, slot FROM candidates WHERE run_id = ? AND recipe_hash = ? "
                    "AND (generation, slot) < (?, ?) AND twin_slot IS NULL AND prior = 0 "
                    "ORDER BY generation, slot LIMIT 1",
                    (run_id, recipe_hash, generation, slot),
                ).fetchone()
                state = "failed" if failure else ("twin" if twin else "open")
                vector = None if proposal.vector is None else json.dumps(proposal.vector)
                conn.execute(
                    "INSERT OR IGNORE INTO candidates (run_id, generation, slot, operator, label, "
                    "vector, recipe_hash, twin_generation, twin_slot, state, failure) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (
                        run_id, generation, slot, proposal.operator, proposal.label, vector,
                        recipe_hash, *(twin if twin and not failure else (None, None)), state,
                        failure,
                    ),
                )  # fmt: skip

    def candidates(
        self, run_id: str, generation: int | None = None, up_to: int | None = None
    ) -> list[Candidate]:
        """Candidates ordered by (generation, slot); a twin carries its first one's result."""
        where = ""
        values: list[Any] = [run_id]
        if generation is not None:
            where, values = "AND c.generation = ?", [run_id, generation]
        elif up_to is not None:
            where, values = "AND c.generation <= ?", [run_id, up_to]
        rows = self._rows(
            "SELECT c.generation, c.slot, c.operator, c.label, c.vector, c.recipe_hash, c.state, "
            "coalesce(t.score, c.score), coalesce(t.tasks, c.tasks), "
            "coalesce(nullif(c.failure, ''), t.failure, ''), c.reused, c.twin_generation, "
            "c.twin_slot, c.truncated, c.cut_off, c.seconds, c.prior FROM candidates c "
            "LEFT JOIN candidates t ON t.run_id = c.run_id AND t.generation = c.twin_generation "
            f"AND t.slot = c.twin_slot WHERE c.run_id = ? {where} ORDER BY c.generation, c.slot",
            *values,
        )
        return [_candidate(row) for row in rows]

    def candidate(self, run_id: str, generation: int, slot: int) -> Candidate:
        for found in self.candidates(run_id, generation):
            if found.slot == slot:
                return found
        raise NotFound(f"no candidate {generation}.{slot} in this run")

    def history(self, run_id: str, up_to: int | None = None) -> list[Observation]:
        """Everything that was scored or failed, ordered by (generation, slot)."""
        found = self.candidates(run_id, up_to=up_to)
        return [
            c.observation()
            for c in found
            if c.state != "open" and (c.score is not None or c.failure)
        ]

    def recipe(self, recipe_hash: str) -> str:
        rows = self._rows("SELECT yaml FROM recipes WHERE hash = ?", recipe_hash)
        if not rows:
            raise NotFound(f"no recipe {recipe_hash}")
        return str(rows[0][0])

    def save_evaluation(
        self,
        run_id: str,
        candidate: tuple[int, int],
        *,
        score: float | None,
        tasks: Sequence[tuple[str, float]] = (),
        failure: str = "",
        reused: bool = False,
        counts: tuple[int, int] = (0, 0),
        seconds: float = 0.0,
        fingerprint: str = "",
        results: Sequence[tuple[ResultKey, str, Sequence[ItemRef], Sequence[ItemResult]]] = (),
    ) -> None:
        """A candidate's score and the item results it paid for, in one transaction.

        results: (key, task name, items, their results) for each task. counts: truncated prompts
            and cut-off generations.
        """
        with self._writing() as conn:
            for key, task, items, values in results:
                self._insert_results(conn, key, task, items, values, fingerprint, seconds)
            conn.execute(
                "UPDATE candidates SET state = ?, score = ?, tasks = ?, failure = ?, reused = ?, "
                "truncated = ?, cut_off = ?, seconds = ?, fingerprint = ? "
                "WHERE run_id = ? AND generation = ? AND slot = ? AND state = 'open'",
                (
                    "failed" if failure else "scored", score, json.dumps(list(tasks)), failure,
                    int(reused), *counts, seconds, fingerprint, run_id, *candidate,
                ),
            )  # fmt: skip

    def copy_past(self, source: str, target: str, up_to: int, *, prior: bool) -> None:
        """The past that a branch shares with the run it came from; ``prior``: other settings."""
        columns = (
            "generation, slot, operator, label, vector, recipe_hash, twin_generation, twin_slot, "
            "state, score, tasks, failure, reused, truncated, cut_off, seconds, fingerprint"
        )
        with self._writing() as conn:
            conn.execute(
                f"INSERT OR IGNORE INTO candidates (run_id, prior, {columns}) SELECT ?, "
                f"max(prior, ?), {columns} FROM candidates WHERE run_id = ? AND generation <= ?",
                (target, int(prior), source, up_to),
            )
            conn.execute(
                "INSERT OR IGNORE INTO advice SELECT ?, generation, role, body FROM advice "
                "WHERE run_id = ? AND generation <= ?",
                (target, source, up_to),
            )

    # --- item results -----------------------------------------------------------------------

    def save_results(
        self,
        key: ResultKey,
        task: str,
        items: Sequence[ItemRef],
        results: Sequence[ItemResult],
        fingerprint: str = "",
        seconds: float = 0.0,
    ) -> None:
        with self._writing() as conn:
            self._insert_results(conn, key, task, items, results, fingerprint, seconds)

    def _insert_results(
        self,
        conn: sqlite3.Connection,
        key: ResultKey,
        task: str,
        items: Sequence[ItemRef],
        results: Sequence[ItemResult],
        fingerprint: str,
        seconds: float,
    ) -> None:
        if not items:
            return
        engine = json.dumps(asdict(key.engine), sort_keys=True)
        engine_id = _intern(conn, "engines", _hash(engine), {"info": engine})
        protocol_id = _intern(conn, "protocols", key.protocol_hash, {"task": task, "info": ""})
        keys = zlib.compress(bytes.fromhex("".join(item.key for item in items)))
        body = {"count": len(items), "keys": keys}
        set_id = _intern(conn, "item_sets", sha256(keys).hexdigest()[:32], body)
        conn.execute(
            "INSERT OR IGNORE INTO results (recipe_hash, engine_id, protocol_id, item_set_id, "
            "block, fingerprint, seconds, created) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                key.recipe_hash, engine_id, protocol_id, set_id, pack(results), fingerprint,
                seconds, time.time(),
            ),
        )  # fmt: skip

    def results(self, key: ResultKey) -> dict[str, ItemResult]:
        """Item key -> result, over every block stored under ``key``."""
        engine = _hash(json.dumps(asdict(key.engine), sort_keys=True))
        rows = self._rows(
            "SELECT s.keys, r.block FROM results r JOIN item_sets s ON s.id = r.item_set_id "
            "JOIN engines e ON e.id = r.engine_id JOIN protocols p ON p.id = r.protocol_id "
            "WHERE r.recipe_hash = ? AND e.hash = ? AND p.hash = ? ORDER BY r.id",
            key.recipe_hash,
            engine,
            key.protocol_hash,
        )
        found: dict[str, ItemResult] = {}
        for packed_keys, block in rows:
            raw = zlib.decompress(packed_keys).hex()
            keys = [raw[i : i + KEY_DIGITS] for i in range(0, len(raw), KEY_DIGITS)]
            found.update(zip(keys, unpack(block), strict=True))
        return found

    # --- advice and model calls -------------------------------------------------------------

    def save_advice(self, run_id: str, generation: int, role: str, body: Mapping[str, Any]) -> None:
        with self._writing() as conn:
            conn.execute(
                "INSERT OR IGNORE INTO advice VALUES (?, ?, ?, ?)",
                (run_id, generation, role, json.dumps(body)),
            )

    def advice(self, run_id: str, generation: int | None = None) -> list[dict[str, Any]]:
        """Every agent's word, ordered by (generation, role): {generation, role, ...body}."""
        where, values = ("AND generation = ?", [generation]) if generation is not None else ("", [])
        rows = self._rows(
            f"SELECT generation, role, body FROM advice WHERE run_id = ? {where} "
            "ORDER BY generation, role",
            run_id,
            *values,
        )
        return [{"generation": g, "role": role} | json.loads(body) for g, role, body in rows]

    def save_call(
        self,
        run_id: str,
        generation: int,
        role: str,
        prompt_hash: str,
        attempt: int,
        *,
        model: str,
        messages: Sequence[Mapping[str, str]],
        reply: str | None,
        error: str | None,
        tokens_in: int,
        tokens_out: int,
        latency_s: float,
    ) -> None:
        with self._writing() as conn:
            conn.execute(
                "INSERT OR IGNORE INTO model_calls VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    run_id, generation, role, prompt_hash, attempt, model,
                    json.dumps(list(messages)), reply, error, tokens_in, tokens_out, latency_s,
                    time.time(),
                ),
            )  # fmt: skip

    def call(
        self, run_id: str, generation: int, role: str, prompt_hash: str, attempt: int = 0
    ) -> tuple[str | None, str | None] | None:
        """(reply, error) of a call that was paid for, or None."""
        rows = self._rows(
            "SELECT reply, error FROM model_calls WHERE run_id = ? AND generation = ? AND role = ? "
            "AND prompt_hash = ? AND attempt = ?",
            run_id,
            generation,
            role,
            prompt_hash,
            attempt,
        )
        return (rows[0][0], rows[0][1]) if rows else None

    def call_totals(self, run_id: str) -> dict[str, Any]:
        """What the agents cost: {calls, failures, tokens_in, tokens_out, cost_usd}."""
        row = self._rows(
            "SELECT count(*), coalesce(sum(error IS NOT NULL), 0), coalesce(sum(tokens_in), 0), "
            "coalesce(sum(tokens_out), 0) FROM model_calls WHERE run_id = ?",
            run_id,
        )[0]
        names = ("calls", "failures", "tokens_in", "tokens_out")
        return dict(zip(names, row, strict=True)) | {"cost_usd": None}

    def seconds_per_candidate(self, settings_hash: str) -> float | None:
        """The median time a candidate took in runs of the same settings, or None."""
        rows = self._rows(
            "SELECT c.seconds FROM candidates c JOIN runs r ON r.id = c.run_id "
            "WHERE r.settings_hash = ? AND c.state = 'scored' AND c.reused = 0 "
            "AND c.seconds > 0 LIMIT 1000",
            settings_hash,
        )
        return float(np.median([row[0] for row in rows])) if rows else None


#: Hex digits of an item key.
KEY_DIGITS = 16


def pack(results: Sequence[ItemResult]) -> bytes:
    """Item results as bytes: count, then four length-prefixed zlib columns.

    Values are float64 (a metric is stored exactly), log-likelihoods float32 (what torch summed),
    margins float16 (three digits; they are clipped where they are used), flags one byte.
    """
    missing = float("nan")

    def column(kind: str, values: list[Any]) -> bytes:
        body = zlib.compress(np.asarray(values, dtype=kind).tobytes(), 6)
        return len(body).to_bytes(4, "little") + body

    return len(results).to_bytes(4, "little") + b"".join(
        (
            column("<f8", [r.value for r in results]),
            column("<f4", [missing if r.log_likelihood is None else r.log_likelihood
                           for r in results]),
            column("<f2", [missing if r.margin is None else np.clip(r.margin, -6e4, 6e4)
                           for r in results]),
            column("u1", [r.truncated + 2 * r.cut_off for r in results]),
        )
    )  # fmt: skip


def unpack(block: bytes) -> list[ItemResult]:
    count = int.from_bytes(block[:4], "little")
    place, columns = 4, []
    for kind in ("<f8", "<f4", "<f2", "u1"):
        size = int.from_bytes(block[place : place + 4], "little")
        raw = zlib.decompress(block[place + 4 : place + 4 + size])
        columns.append(np.frombuffer(raw, dtype=kind, count=count))
        place += 4 + size
    values, lls, margins, flags = columns
    return [
        ItemResult(
            float(value),
            None if np.isnan(ll) else float(ll),
            None if np.isnan(margin) else float(margin),
            bool(flag & 1),
            bool(flag & 2),
        )
        for value, ll, margin, flag in zip(values, lls, margins, flags, strict=True)
    ]


def _candidate(row: tuple[Any, ...]) -> Candidate:
    (generation, slot, operator, label, vector, recipe_hash, state, score, tasks, failure, reused,
     twin_generation, twin_slot, truncated, cut_off, seconds, prior) = row  # fmt: skip
    return Candidate(
        generation,
        slot,
        operator,
        label,
        None if vector is None else tuple(json.loads(vector)),
        recipe_hash,
        state,
        score,
        tuple((name, value) for name, value in json.loads(tasks or "[]")),
        failure,
        bool(reused),
        None if twin_slot is None else (twin_generation, twin_slot),
        truncated,
        cut_off,
        seconds,
        bool(prior),
    )


def _intern(conn: sqlite3.Connection, table: str, key: str, body: Mapping[str, Any]) -> int:
    names = ", ".join(body)
    marks = ", ".join("?" for _ in body)
    conn.execute(
        f"INSERT OR IGNORE INTO {table} (hash, {names}) VALUES (?, {marks})",
        (key, *body.values()),
    )
    return int(conn.execute(f"SELECT id FROM {table} WHERE hash = ?", (key,)).fetchone()[0])


def _hash(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:32]
