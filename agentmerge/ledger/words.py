"""What the agents said, and what each call of a model cost."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from agentmerge.ledger.store import Store


class Words(Store):
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
