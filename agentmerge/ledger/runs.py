"""Searches in the results database: what each asks, where it stands, what it answered."""

from __future__ import annotations

import difflib
import json
import sqlite3
from collections.abc import Mapping
from dataclasses import asdict, replace
from itertools import count
from typing import Any

from agentmerge.errors import NotFound, UserError
from agentmerge.ledger.rows import RunRow
from agentmerge.ledger.store import Store
from agentmerge.system.bounded import is_text
from agentmerge.system.redaction import hidden_config, redacted

#: Names that are told where one is not known.
_SHOWN = 8


class Runs(Store):
    def add_run(self, row: RunRow) -> RunRow:
        """The row as written; one without a name gets the first "run-N" that is free.

        Raises:
            UserError: the name is taken.
        """
        with self._writing() as conn:  # one writer at a time: what is free stays free
            taken = {name for (name,) in conn.execute("SELECT name FROM runs")}
            if not row.name:
                free = next(f"run-{n}" for n in count(1) if f"run-{n}" not in taken)
                row = replace(row, name=free)
            if row.name in taken:
                raise UserError(
                    f"a run called {row.name!r} exists; `agentmerge resume {row.name}`, or choose "
                    "another name"
                )
            self._insert(conn, row)
        return row

    @staticmethod
    def _insert(conn: sqlite3.Connection, row: RunRow) -> None:
        body = asdict(row) | {
            "facts": json.dumps(row.facts),
            "result": None if row.result is None else json.dumps(row.result),
        }
        marks = ", ".join(f":{key}" for key in body)
        conn.execute(f"INSERT INTO runs ({', '.join(body)}) VALUES ({marks})", body)

    def run(self, name: str) -> RunRow:
        """The run called ``name`` (or with that id).

        Raises:
            NotFound: naming the runs that exist.
        """
        found = self._runs("WHERE name = ? OR id = ?", name, name) if is_text(name) else []
        if not found:
            names = [row.name for row in self.runs()]
            like = difflib.get_close_matches(name, names, n=1)
            shown = [*like, *(known for known in names[-_SHOWN:] if known not in like)]
            known = ", ".join(shown) or "none yet"
            if len(names) > len(shown):
                known += f" and {len(names) - len(shown)} more (`agentmerge list`)"
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
            body["config"], names = hidden_config(body["config"])
            for secret, reference in names.items():  # of a version that kept it
                body["facts"] = body["facts"].replace(json.dumps(secret)[1:-1], reference)
            body["facts"] = json.loads(body["facts"])
            body["result"] = None if body["result"] is None else json.loads(body["result"])
            found.append(RunRow(**body))
        return found

    def update_run(self, run_id: str, **fields: Any) -> None:
        for name in fields.keys() & {"result", "stop_reason"}:
            fields[name] = redacted(fields[name], shapes=False)
        packed = {k: json.dumps(v) if k in ("facts", "result") else v for k, v in fields.items()}
        sets = ", ".join(f"{key} = :{key}" for key in packed)
        with self._writing() as conn:
            conn.execute(f"UPDATE runs SET {sets} WHERE id = :id", packed | {"id": run_id})

    def save_limits(self, run_id: str, limits: Mapping[str, Any]) -> None:
        """Limits that hold from here on; nothing where they held already."""
        known = self.limits(run_id)
        if known and known[-1][1] == limits:
            return
        with self._writing() as conn:
            conn.execute(
                "INSERT INTO run_limits VALUES (?, ?, ?, ?, ?)",
                (run_id, len(known), *self.position(run_id), json.dumps(limits)),
            )

    def limits(self, run_id: str) -> list[tuple[tuple[int, int], dict[str, Any]]]:
        """Every set of limits in order, with the position from which on it held."""
        rows = self._rows(
            "SELECT candidates, words, limits FROM run_limits WHERE run_id = ? ORDER BY number",
            run_id,
        )
        return [((candidates, words), json.loads(limits)) for candidates, words, limits in rows]

    def position(self, run_id: str) -> tuple[int, int]:
        """How far a search's decisions are: (candidates that its strategy proposed, advice)."""
        candidates = "SELECT count(*) FROM candidates WHERE run_id = ? AND operator != 'probe'"
        words = "SELECT count(*) FROM advice WHERE run_id = ?"
        first, second = (self._rows(sql, run_id)[0][0] for sql in (candidates, words))
        return int(first), int(second)
