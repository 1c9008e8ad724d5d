"""Candidates in the results database: proposals, their recipes, and what came of them."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from agentmerge.contracts.strategy import Observation, Proposal
from agentmerge.contracts.worker import Gradient, ItemRef, ItemResult
from agentmerge.errors import NotFound
from agentmerge.ledger.gradients import GradientRows, insert_gradient
from agentmerge.ledger.items import ItemResults
from agentmerge.ledger.rows import Candidate, GradientKey, ResultKey
from agentmerge.system.redaction import redact

#: A candidate's fields as columns of its row c, and of t, that of the candidate whose twin it is.
_COLUMNS = {field.name: f"c.{field.name}" for field in fields(Candidate)}
_COLUMNS |= {
    name: f"coalesce(t.{name}, c.{name})"
    for name in ("score", "tasks", "estimate", "rung", "share", "violation", "tokens")
}
_COLUMNS |= {
    name: f"coalesce(c.{name}, CASE WHEN c.loss_kind = t.loss_kind AND t.space IN (c.space, '') "
    f"THEN t.{name} END)"
    for name in ("loss", "gradient")
}
_COLUMNS |= {"failure": "coalesce(nullif(c.failure, ''), t.failure, '')", "twin": "c.twin_slot"}


class Candidates(ItemResults, GradientRows):
    def add_candidates(
        self,
        run_id: str,
        generation: int,
        proposals: Sequence[tuple[Proposal, str, str, str]],
        first_slot: int = 0,
    ) -> None:
        """Write a generation's proposals: (proposal, recipe hash, recipe YAML, failure or "").

        Writing the same generation again (a node that runs twice) changes nothing. A merge that
        this run has already is a twin; one with a failure is refused before any worker sees it. A
        gradient of a merge whose score alone this run has, or whose gradient in another space, is
        still open, and a twin by its score.
        """
        with self._writing() as conn:
            for slot, (proposal, recipe_hash, yaml_text, failure) in enumerate(
                proposals, first_slot
            ):
                conn.execute(
                    "INSERT OR IGNORE INTO recipes VALUES (?, ?)", (recipe_hash, yaml_text)
                )
                if yaml_text:
                    conn.execute(
                        "INSERT OR IGNORE INTO run_recipes SELECT ?, hash, ? FROM recipes "
                        "WHERE hash = ? AND yaml <> ?",
                        (run_id, yaml_text, recipe_hash, yaml_text),
                    )
                place = (run_id, recipe_hash, generation, slot)
                loss = proposal.loss if proposal.want == "gradient" else None
                asked = "loss_kind = ? AND state <> 'twin' AND space IN (?, '')"
                twin = whole = _earlier(conn, place, asked, loss, proposal.space)
                if whole is None:
                    twin = _earlier(conn, place, "twin_slot IS NULL")
                    whole = twin if loss is None else None
                state = "failed" if failure else ("twin" if whole else "open")
                vector = None if proposal.vector is None else json.dumps(proposal.vector)
                conn.execute(
                    "INSERT OR IGNORE INTO candidates (run_id, generation, slot, operator, label, "
                    "vector, recipe_hash, twin_generation, twin_slot, state, failure, want, "
                    "loss_kind, space) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (
                        run_id, generation, slot, proposal.operator, proposal.label, vector,
                        recipe_hash, *(twin if twin and not failure else (None, None)), state,
                        redact(failure), proposal.want, loss, proposal.space,
                    ),
                )  # fmt: skip

    def candidates(
        self,
        run_id: str,
        generation: int | None = None,
        up_to: int | None = None,
        slot: int | None = None,
        vectors: bool = True,
    ) -> list[Candidate]:
        """Candidates ordered by (generation, slot); a twin carries its first one's result.

        vectors: whether their vectors and gradients are wanted, which take longest to read.
        """
        where = ""
        values: list[Any] = [run_id]
        if slot is not None:
            where, values = "AND c.generation = ? AND c.slot = ?", [run_id, generation, slot]
        elif generation is not None:
            where, values = "AND c.generation = ?", [run_id, generation]
        elif up_to is not None:
            where, values = "AND c.generation <= ?", [run_id, up_to]
        columns = _COLUMNS if vectors else _COLUMNS | {"vector": "NULL", "gradient": "NULL"}
        rows = self._rows(
            f"SELECT {', '.join(columns.values())}, c.twin_generation "
            "FROM candidates c "
            "LEFT JOIN candidates t ON t.run_id = c.run_id AND t.generation = c.twin_generation "
            f"AND t.slot = c.twin_slot WHERE c.run_id = ? {where} ORDER BY c.generation, c.slot",
            *values,
        )
        return [_candidate(row) for row in rows]

    def open_count(self, run_id: str) -> int:
        """How many candidates are still to be scored."""
        sql = "SELECT count(*) FROM candidates WHERE run_id = ? AND state = 'open'"
        return int(self._rows(sql, run_id)[0][0])

    def slowest_s(self, run_id: str) -> float:
        """The seconds of the candidate that took longest to be scored; 0 where none was."""
        sql = (
            "SELECT coalesce(max(seconds), 0) FROM candidates "
            "WHERE run_id = ? AND state = 'scored' AND NOT prior"
        )
        return float(self._rows(sql, run_id)[0][0])

    def candidate(self, run_id: str, generation: int, slot: int) -> Candidate:
        for found in self.candidates(run_id, generation, slot=slot):
            return found
        raise NotFound(f"no candidate {generation}.{slot} in this run")

    def history(self, run_id: str, up_to: int | None = None) -> list[Observation]:
        """Everything that was scored, stopped or failed, ordered by (generation, slot)."""
        found = self.candidates(run_id, up_to=up_to)
        return [c.observation() for c in found if c.observed]

    def recipe(self, recipe_hash: str, run_id: str = "") -> str:
        """As mergekit YAML, with a run's own names for its models where others differ."""
        rows = self._rows(
            "SELECT yaml FROM run_recipes WHERE run_id = ? AND hash = ? "
            "UNION ALL SELECT yaml FROM recipes WHERE hash = ?",
            run_id,
            recipe_hash,
            recipe_hash,
        )
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
        slope: tuple[GradientKey, Gradient, Sequence[float]] | None = None,
        lost: tuple[float, float, float] | None = None,
        tokens: float | None = None,
    ) -> None:
        """A candidate's score and all that it paid for, in one transaction.

        results: (key, task name, items, their results) for each task. counts: truncated prompts
            and cut-off generations. seconds: of it all. slope: the gradient to keep, and itself in
            the unit box. lost: (estimate, rung, share) of one that a race stopped, in place of a
            score. tokens: as a ``Candidate`` has them.
        """
        estimate, rung, share = lost or (None, 1.0, 1.0)
        loss = None if slope is None else slope[1].loss
        unit = None if slope is None else json.dumps(list(slope[2]))
        with self._writing() as conn:
            for key, task, items, values in results:
                self._insert_results(conn, key, task, items, values, fingerprint, seconds)
            if slope is not None:
                insert_gradient(conn, slope[0], slope[1], seconds)
            conn.execute(
                "UPDATE candidates SET state = ?, score = ?, tasks = ?, failure = ?, reused = ?, "
                "truncated = ?, cut_off = ?, seconds = ?, fingerprint = ?, loss = ?, gradient = ?, "
                "estimate = ?, rung = ?, share = ?, tokens = ? "
                "WHERE run_id = ? AND generation = ? AND slot = ? AND state = 'open'",
                (
                    "failed" if failure else "stopped" if lost else "scored", score,
                    json.dumps(list(tasks)), redact(failure), int(reused), *counts, seconds,
                    fingerprint, loss, unit, estimate, rung, share, tokens, run_id, *candidate,
                ),
            )  # fmt: skip

    def save_violations(self, run_id: str, found: Mapping[tuple[int, int], float]) -> None:
        """What candidates, by (generation, slot), lack to their constraints."""
        with self._writing() as conn:
            conn.executemany(
                "UPDATE candidates SET violation = ? "
                "WHERE run_id = ? AND generation = ? AND slot = ?",
                [(value, run_id, *place) for place, value in found.items()],
            )

    def copy_past(
        self,
        source: str,
        target: str,
        up_to: int,
        *,
        prior: bool,
        without: Sequence[str] = (),
        words_up_to: int | None = None,
        space: str = "",
    ) -> None:
        """The past that a branch shares with the run it came from; ``prior``: other settings.

        without: roles whose words are left behind. words_up_to: of which generation the last words
        are; by default all. space: the key of the first run's own space, which candidates of before
        spaces had keys lie in.
        """
        with self._writing() as conn:
            every = [row[1] for row in conn.execute("PRAGMA table_info(candidates)")]
            columns = ", ".join(c for c in every if c not in ("run_id", "prior", "space"))
            conn.execute(
                f"INSERT OR IGNORE INTO candidates (run_id, prior, space, {columns}) SELECT ?, "
                f"max(prior, ?), coalesce(nullif(space, ''), ?), {columns} FROM candidates "
                "WHERE run_id = ? AND generation <= ?",
                (target, int(prior), space, source, up_to),
            )
            conn.execute(
                "INSERT OR IGNORE INTO run_recipes SELECT ?, hash, yaml FROM run_recipes "
                "WHERE run_id = ?",
                (target, source),
            )
            conn.execute(
                "INSERT OR IGNORE INTO advice SELECT ?, generation, role, body FROM advice "
                "WHERE run_id = ? AND generation <= ? "
                f"AND role NOT IN ({', '.join('?' for _ in without)})",
                (target, source, up_to if words_up_to is None else words_up_to, *without),
            )

    def seconds_per_candidate(self, settings_hash: str) -> float | None:
        """The median time a candidate took in runs of the same settings, or None."""
        rows = self._rows(
            "SELECT c.seconds FROM candidates c JOIN runs r ON r.id = c.run_id "
            "WHERE r.settings_hash = ? AND c.state = 'scored' AND c.reused = 0 "
            "AND c.seconds > 0 LIMIT 1000",
            settings_hash,
        )
        return float(np.median([row[0] for row in rows])) if rows else None


def _earlier(
    conn: sqlite3.Connection, place: tuple[Any, ...], condition: str, *values: Any
) -> tuple[int, int] | None:
    """The first candidate before (run, recipe, generation, slot) that is the same merge."""
    found: tuple[int, int] | None = conn.execute(
        "SELECT generation, slot FROM candidates WHERE run_id = ? AND recipe_hash = ? "
        f"AND (generation, slot) < (?, ?) AND prior = 0 AND {condition} "
        "ORDER BY generation, slot LIMIT 1",
        (*place, *values),
    ).fetchone()
    return found


def _candidate(row: tuple[Any, ...]) -> Candidate:
    *own, twin_generation = row
    found = dict(zip(_COLUMNS, own, strict=True))
    for name in ("vector", "gradient"):
        found[name] = None if found[name] is None else tuple(json.loads(found[name]))
    found["tasks"] = tuple((name, value) for name, value in json.loads(found["tasks"] or "[]"))
    found["twin"] = None if found["twin"] is None else (twin_generation, found["twin"])
    found |= {name: bool(found[name]) for name in ("reused", "prior")}
    return Candidate(**found)
