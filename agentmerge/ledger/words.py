"""What the agents said, and what each call of a model cost."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from agentmerge.contracts.advice import Guidance, StructuralMove
from agentmerge.contracts.calls import MOST_TOKENS, Call
from agentmerge.contracts.events import Advised
from agentmerge.contracts.operators import STRUCTURE
from agentmerge.ledger.store import Store
from agentmerge.system.redaction import redact, redacted

#: What a request took. Ledgers of before counts were bounded may hold any number: there the text is
#: the estimate, and what it cost is not known.
_COUNTED = f"""
    SELECT *,
        CASE WHEN fits THEN tokens_in ELSE length(messages) / 4 + 1 END AS tokens_in_,
        CASE WHEN fits THEN tokens_out ELSE length(coalesce(reply, '')) / 4 + 1 END AS tokens_out_,
        CASE WHEN fits THEN cost_usd END AS cost_usd_
    FROM (
        SELECT *, typeof(tokens_in) = 'integer' AND typeof(tokens_out) = 'integer'
            AND tokens_in BETWEEN 0 AND {MOST_TOKENS}
            AND tokens_out BETWEEN 0 AND {MOST_TOKENS} AS fits
        FROM model_calls WHERE run_id = ?
    )
"""


#: Of a word, what follows from the moves before it: no part of what is said.
PLACES = ("leader", "of_space")


@dataclass(frozen=True, slots=True)
class Opening:
    """A move that was decided after a generation. refusal: why it opened nothing, or "". leader:
    key of the space that it was a move from; "" where an older version did not keep it."""

    generation: int
    move: StructuralMove
    refusal: str = ""
    leader: str = ""


class Words(Store):
    def save_advice(self, run_id: str, generation: int, role: str, body: Mapping[str, Any]) -> None:
        with self._writing() as conn:
            conn.execute(
                "INSERT OR IGNORE INTO advice VALUES (?, ?, ?, ?)",
                (run_id, generation, role, json.dumps(redacted(body))),
            )

    def advice(
        self, run_id: str, generation: int | None = None, role: str | None = None
    ) -> list[dict[str, Any]]:
        """Every agent's word, ordered by (generation, role): {generation, role, ...body}."""
        asked = {"generation": generation, "role": role}
        given = {name: value for name, value in asked.items() if value is not None}
        where, values = "".join(f" AND {name} = ?" for name in given), given.values()
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
        call: Call,
        *,
        model: str,
        prompt_file: str,
    ) -> None:
        """One request to a model. prompt_file: hash of the prompt file that it began with."""
        named = (run_id, generation, role, prompt_hash, attempt, model)
        with self._writing() as conn:
            insert_call(conn, named, call, prompt_file)

    def call(
        self, run_id: str, generation: int, role: str, prompt_hash: str, attempt: int = 0
    ) -> Call | None:
        """A request that was made before, or None."""
        return self.calls(run_id, generation).get((role, prompt_hash, attempt))

    def calls(self, run_id: str, generation: int) -> dict[tuple[str, str, int], Call]:
        """The requests of a generation as they were made, by role, prompt's hash and attempt."""
        rows = self._rows(
            "SELECT role, prompt_hash, attempt, messages, ending, shape, reply, tool_calls, error, "
            f"tokens_in_, tokens_out_, latency_s, cost_usd_ FROM ({_COUNTED}) WHERE generation = ? "
            "ORDER BY created",
            run_id,
            generation,
        )
        return {
            (role, prompt, attempt): Call(
                json.loads(messages), ending, shape, reply, tuple(json.loads(tools)), *rest
            )
            for role, prompt, attempt, messages, ending, shape, reply, tools, *rest in rows
        }

    def called_models(self, run_id: str) -> dict[str, str]:
        """Role -> the name of the model that was asked for it."""
        query = "SELECT DISTINCT role, model FROM model_calls WHERE run_id = ? ORDER BY role"
        return dict(self._rows(query, run_id))

    def call_totals(self, run_id: str) -> dict[str, Any]:
        """What the agents cost: {calls, failures, tokens_in, tokens_out, cost_usd, unpriced}.

        cost_usd: of the requests whose price was known; unpriced: how many were not, so that the
        sum is a lower bound. Requests that failed count as nothing, but for those that were not
        answered in time: they count as the longest reply that was allowed.
        """
        row = self._rows(
            "SELECT count(*), coalesce(sum(error IS NOT NULL), 0), coalesce(sum(tokens_in_), 0), "
            "coalesce(sum(tokens_out_), 0), sum(cost_usd_), "
            "coalesce(sum(cost_usd_ IS NULL AND reply IS NOT NULL), 0) "
            f"FROM ({_COUNTED})",
            run_id,
        )[0]
        names = ("calls", "failures", "tokens_in", "tokens_out", "cost_usd", "unpriced")
        return dict(zip(names, row, strict=True))

    def save_prompt(self, run_id: str, role: str, text: str) -> None:
        """The prompt file of a role that a model speaks for; the latest one is kept."""
        with self._writing() as conn:
            conn.execute(
                "INSERT OR REPLACE INTO run_prompts (run_id, role, text) VALUES (?, ?, ?)",
                (run_id, role, text),
            )

    def prompts(self, run_id: str) -> dict[str, str]:
        """Role -> its prompt file's text, of the roles that a model speaks for."""
        return dict(self._rows("SELECT role, text FROM run_prompts WHERE run_id = ?", run_id))

    def save_probe(
        self,
        run_id: str,
        tool: str,
        arguments: Mapping[str, Any],
        answer: str,
        items: int = 0,
        generation: int = -1,
    ) -> None:
        """A tool call of an agent; the same one again only has a new answer.

        items: how many are asked besides those of candidates, once they are promised. generation:
        whose agents asked, -1 where it was nobody's of the search.
        """
        with self._writing() as conn:
            conn.execute(
                "INSERT INTO probes (run_id, tool, arguments, answer, items, created, generation) "
                "VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET "
                "answer = excluded.answer, items = max(items, excluded.items)",
                (run_id, tool, json.dumps(arguments, sort_keys=True), redact(answer), items,
                 time.time(), generation),
            )  # fmt: skip

    def probed(self, run_id: str, tool: str, arguments: Mapping[str, Any]) -> bool:
        """Whether this call was promised its items before."""
        where = "run_id = ? AND tool = ? AND arguments = ? AND items > 0"
        key = (run_id, tool, json.dumps(arguments, sort_keys=True))
        return bool(self._rows(f"SELECT 1 FROM probes WHERE {where}", *key))

    def probe_totals(self, run_id: str, up_to: int | None = None) -> dict[str, int]:
        """{calls, items}; up_to: of no later generation."""
        sums = "SELECT count(*), coalesce(sum(items), 0) FROM probes WHERE run_id = ?"
        if up_to is not None:
            sums += f" AND generation <= {int(up_to)}"
        return dict(zip(("calls", "items"), self._rows(sums, run_id)[0], strict=True))


def insert_call(
    conn: sqlite3.Connection,
    named: tuple[str, int, str, str, int, str],
    call: Call,
    prompt_file: str,
) -> None:
    """named: run, generation, role, the prompt's hash, attempt, model."""
    conn.execute(
        "INSERT OR IGNORE INTO model_calls (run_id, generation, role, prompt_hash, "
        "attempt, model, messages, reply, error, tokens_in, tokens_out, latency_s, "
        "created, ending, shape, tool_calls, cost_usd, prompt_file) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            *named, json.dumps(redacted(list(call.messages))), storable(call.reply),
            storable(call.error),
            call.tokens_in, call.tokens_out, call.latency_s, time.time(), call.ending,
            call.shape, json.dumps(list(call.tool_calls)), call.cost_usd, prompt_file,
        ),
    )  # fmt: skip


def storable(text: str | None) -> str | None:
    """SQLite holds no lone surrogates, and a model may send one; and no secret."""
    return text if text is None else redact(text).encode("utf-8", "replace").decode()


def openings(words: Iterable[Mapping[str, Any]]) -> list[Opening]:
    """The moves that were decided, in order. words: a run's advice, ``STRUCTURE``'s among it."""
    return [
        Opening(
            word["generation"],
            StructuralMove(**word["guidance"]["structural_move"]),
            word["failure"],
            word.get("leader", ""),
        )
        for word in words
        if word["role"] == STRUCTURE
    ]


def said_of(words: Iterable[Mapping[str, Any]]) -> str | None:
    """Key of the space that a generation's points were said of; None where none was kept."""
    return next((word.get("of_space") for word in words if word["role"] == "proposer"), None)


def spoken(word: Mapping[str, Any]) -> Advised:
    """An agent's word as it is told. word: a row of a run's advice."""
    guidance = word["guidance"]
    return Advised(
        role=word["role"],
        generation=word["generation"],
        source=guidance.get("source", "rules"),
        failure=word.get("failure") or "",
        words=own_words(word),
    )


def own_words(word: Mapping[str, Any]) -> str:
    """What an agent said: its own part of the guidance, which holds what was said before too."""
    guidance = word["guidance"]
    if word["role"] == "controller":
        sigma = guidance.get("sigma")
        return "" if sigma is None else f"step size {sigma:.3f}"
    part = "critique" if word["role"] == "critic" else "thought"
    return str(guidance.get(part) or "")


def guidance_of(words: Iterable[Mapping[str, Any]]) -> Guidance:
    """What the agents said of one generation, by its rows: the latest speaker's is complete."""
    said = {word["role"]: word for word in words}
    for role in ("proposer", "controller", "critic"):
        if role in said:
            return Guidance.from_json(said[role]["guidance"])
    return Guidance()
