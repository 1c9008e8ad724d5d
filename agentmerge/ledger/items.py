"""Item results: one packed block per (recipe, engine, protocol, item set)."""

from __future__ import annotations

import json
import math
import sqlite3
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256

from agentmerge.contracts.worker import EngineInfo, ItemRef, ItemResult
from agentmerge.ledger.packing import pack, pack_keys, unpack, unpack_keys
from agentmerge.ledger.rows import ResultKey
from agentmerge.ledger.store import Store, engine_text, hashed, intern

#: A part of ``run_items``, with the id of a search that was forgotten and that this one went on
#: from: the items that it searched are never sealed.
FORGOTTEN = "searched by "


class ItemResults(Store):
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
        engine = engine_text(key.engine)
        engine_id = intern(conn, "engines", hashed(engine), {"info": engine})
        protocol_id = intern(conn, "protocols", key.protocol_hash, {"task": task, "info": ""})
        set_id = intern_items(conn, items)
        place, block = (key.recipe_hash, engine_id, protocol_id, set_id), pack(results)
        made = conn.execute(
            "INSERT OR IGNORE INTO results (recipe_hash, engine_id, protocol_id, item_set_id, "
            "block, fingerprint, seconds, created) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (*place, block, fingerprint, seconds, time.time()),
        )
        if not made.rowcount and any(result.tokens is not None for result in results):
            where = "recipe_hash = ? AND engine_id = ? AND protocol_id = ? AND item_set_id = ?"
            old = conn.execute(f"SELECT block FROM results WHERE {where}", place).fetchone()
            if all(result.tokens is None for result in unpack(old[0])):  # asked again for them
                # What was not said to the agents of older searches stays so, or no replay is one.
                block = pack([replace(result, answers=(), reasons=()) for result in results])
                conn.execute(f"UPDATE results SET block = ? WHERE {where}", (block, *place))

    def results(self, key: ResultKey) -> dict[str, ItemResult]:
        """Item key -> result, over every block stored under ``key``."""
        engine = hashed(engine_text(key.engine))
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
            for item, result in zip(unpack_keys(packed_keys), unpack(block), strict=True):
                if result.tokens is not None or item not in found or found[item].tokens is None:
                    found[item] = result
        return found

    def fingerprints(self, recipe_hash: str, engine: EngineInfo) -> set[str]:
        """Of which live weights the results of a recipe on an engine are; one, or none yet."""
        rows = self._rows(
            "SELECT DISTINCT r.fingerprint FROM results r JOIN engines e ON e.id = r.engine_id "
            "WHERE r.recipe_hash = ? AND e.hash = ? AND r.fingerprint <> ''",
            recipe_hash,
            hashed(engine_text(engine)),
        )
        return {row[0] for row in rows}

    def keyed_too_weakly(self) -> int:
        """How many blocks of results of real models are from before ``EngineInfo.conditions``: they
        stay for reports, and no search finds them any more."""
        rows = self._rows(
            "SELECT count(*) FROM results r JOIN engines e ON e.id = r.engine_id "
            "WHERE json_extract(e.info, '$.conditions') IS NULL "
            "AND json_extract(e.info, '$.engine') IN ('hf', 'disk', 'vllm')"
        )
        return int(rows[0][0])

    def first_time(self, what: str) -> bool:
        """Whether this was never said of this database; from now on it was."""
        with self._writing() as conn:
            done = conn.execute("INSERT OR IGNORE INTO told VALUES (?)", (what,))
        return done.rowcount == 1

    def save_items(self, run_id: str, task: str, part: str, items: Sequence[ItemRef]) -> None:
        """Which items of a task a search asks: ``part`` is "search" or "sealed"."""
        if not items:
            return
        with self._writing() as conn:
            conn.execute(
                "INSERT OR IGNORE INTO run_items VALUES (?, ?, ?, ?)",
                (run_id, task, part, intern_items(conn, items)),
            )

    def save_texts(self, run_id: str, task: str, texts: Mapping[str, Sequence[str]]) -> None:
        """Key -> what a search item asks and what is right, for people to read; the first word
        stands."""
        if not texts:
            return
        block = zlib.compress(json.dumps(texts).encode())
        with self._writing() as conn:
            conn.execute("INSERT OR IGNORE INTO run_texts VALUES (?, ?, ?)", (run_id, task, block))

    def texts(self, run_id: str) -> dict[str, dict[str, list[str]]]:
        """Task -> key -> [what it asks, what is right]; empty where none were kept."""
        rows = self._rows("SELECT task, block FROM run_texts WHERE run_id = ?", run_id)
        return {task: json.loads(zlib.decompress(block)) for task, block in rows}

    def item_keys(self, run_id: str, part: str) -> dict[str, list[str]]:
        """Task -> keys of the items that a search asked, in order; empty for older searches."""
        rows = self._rows(
            "SELECT i.task, s.keys FROM run_items i JOIN item_sets s ON s.id = i.item_set_id "
            "WHERE i.run_id = ? AND i.part = ? ORDER BY i.task",
            run_id,
            part,
        )
        return {task: unpack_keys(keys) for task, keys in rows}

    def searched_before(self, runs: Iterable[str], recipes: Iterable[str] = ()) -> set[str]:
        """Keys of the items that these searches asked, and those which they went on from, as a
        branch or by a merge that another had found (``init``).

        recipes: hashes of merges that a new search begins with.
        """
        begun = [*runs, *(run for recipe in recipes for run in self._finders(recipe))]
        sets = self._rows(
            "SELECT i.run_id, s.keys FROM run_items i JOIN item_sets s ON s.id = i.item_set_id "
            "WHERE i.part = 'search' OR i.part LIKE ?",
            f"{FORGOTTEN}%",
        )
        known = self.went_on_from(begun)
        return {key for run, keys in sets if run in known for key in unpack_keys(keys)}

    def went_on_from(self, runs: Iterable[str]) -> set[str]:
        """These searches and all that they began with the finds of."""
        known: set[str] = set()
        left = [*runs]
        while left:
            run = left.pop()
            if run not in known:
                known.add(run)
                parents = "SELECT parent_run FROM runs WHERE id = ? AND parent_run IS NOT NULL"
                left += [row[0] for row in self._rows(parents, run)]
                begun = self._rows(
                    "SELECT c.recipe_hash, r.created FROM candidates c JOIN runs r "
                    "ON r.id = c.run_id WHERE r.id = ? AND c.operator = 'init'",
                    run,
                )
                left += [found for row in begun for found in self._finders(*row)]
        return known

    def _finders(self, recipe_hash: str, before: float = math.inf) -> list[str]:
        """The searches that had found a merge; what every search tries is nobody's find."""
        rows = self._rows(
            "SELECT DISTINCT c.run_id FROM candidates c JOIN runs r ON r.id = c.run_id "
            "WHERE c.recipe_hash = ? AND r.created < ? "
            "AND c.operator NOT IN ('parent', 'uniform', 'scale', 'depth')",
            recipe_hash,
            before,
        )
        return [row[0] for row in rows]


def intern_items(conn: sqlite3.Connection, items: Sequence[ItemRef]) -> int:
    keys = pack_keys([item.key for item in items])
    body = {"count": len(items), "keys": keys}
    return intern(conn, "item_sets", sha256(keys).hexdigest()[:32], body)
