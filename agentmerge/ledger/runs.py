"""Searches in the results database: what each asks, where it stands, what it answered."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from agentmerge.errors import NotFound
from agentmerge.ledger.rows import RunRow
from agentmerge.ledger.store import Store


class Runs(Store):
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
