"""What judges said, kept under all that they were shown, and what each request cost."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass

from agentmerge.contracts.calls import Call
from agentmerge.ledger.words import Words, insert_call, storable

#: Who a judge's requests are kept under among those of models, and at which generation: theirs
#: belong to a recipe, whichever generations it is in.
JUDGE, NO_GENERATION = "judge", -1


@dataclass(frozen=True, slots=True)
class VerdictKey:
    """question: a hash of the judge, its settings and all that it was shown. nonce: 0; 1 for the
    same question once more. judge: a hash of the judge and its settings."""

    question: str
    nonce: int
    judge: str


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far a judge agrees with itself on what it was asked twice.

    verdicts: how many there are, asked once. twice: how many of them again; same: that came out the
    same. apart: the mean distance of the two. noise: the standard deviation of one verdict.
    """

    verdicts: int
    twice: int
    same: int
    apart: float | None
    noise: float | None


class Verdicts(Words):
    def save_call_and_verdict(
        self,
        run_id: str,
        key: VerdictKey,
        attempt: int,
        call: Call,
        *,
        model: str,
        prompt_file: str,
        verdict: tuple[str, str, int, float, str] | None,
    ) -> None:
        """One request of a judge in one transaction with what came of it.

        verdict: (task, item, turn, value, reason). run_id: "" where no search asked, whose requests
        are not kept.
        """
        with self._writing() as conn:
            if run_id:
                prompt = f"{key.question}/{key.nonce}"
                named = (run_id, NO_GENERATION, JUDGE, prompt, attempt, model)
                insert_call(conn, named, call, prompt_file)
            if verdict is not None:
                task, item, turn, value, reason = verdict
                conn.execute(
                    "INSERT OR IGNORE INTO verdicts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (key.question, key.nonce, key.judge, task, item, turn, value,
                     storable(reason), run_id, time.time()),
                )  # fmt: skip

    def verdict(self, key: VerdictKey) -> float | None:
        """What was said to a question, or None."""
        where = "question = ? AND nonce = ?"
        rows = self._rows(f"SELECT value FROM verdicts WHERE {where}", key.question, key.nonce)
        return float(rows[0][0]) if rows else None

    def reason(self, key: VerdictKey) -> str:
        """Why a judge said what it said to a question; "" where it gave none."""
        where = "question = ? AND nonce = ?"
        rows = self._rows(f"SELECT reason FROM verdicts WHERE {where}", key.question, key.nonce)
        return str(rows[0][0]) if rows else ""

    def judge_attempts(self, run_id: str, key: VerdictKey) -> int:
        """How many requests of a question a run has kept: the next one's number."""
        rows = self._rows(
            "SELECT coalesce(max(attempt) + 1, 0) FROM model_calls WHERE run_id = ? "
            "AND generation = ? AND role = ? AND prompt_hash = ?",
            run_id, NO_GENERATION, JUDGE, f"{key.question}/{key.nonce}",
        )  # fmt: skip
        return int(rows[0][0])

    def save_unjudged(
        self, run_id: str, key: VerdictKey, asked: tuple[str, str, int], reason: str, *, final: bool
    ) -> None:
        """A run's question that got no valid verdict; a verdict that comes after all outranks it.

        asked: (task, item, turn). final: it was the question itself, or the replies to it.
        """
        with self._writing() as conn:
            conn.execute(
                "INSERT OR REPLACE INTO unjudged VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (run_id, key.question, key.nonce, *asked, storable(reason), final, time.time()),
            )

    def refused(self, run_id: str, key: VerdictKey) -> bool:
        """Whether a run asked a question to the end, and nothing is gained by asking again."""
        where = "run_id = ? AND question = ? AND nonce = ? AND final"
        return bool(
            self._rows(f"SELECT 1 FROM unjudged WHERE {where}", run_id, key.question, key.nonce)
        )

    def verdict_costs(self, run_id: str) -> dict[str, int]:
        """What a run's valid verdicts took: {verdicts, tokens, microusd}."""
        rows = self._rows(
            "SELECT count(*), coalesce(sum(tokens_in + tokens_out), 0), "
            "coalesce(sum(round(coalesce(cost_usd, 0) * 1e6)), 0) FROM model_calls "
            "WHERE run_id = ? AND generation = ? AND role = ? AND ending = 'answered'",
            run_id, NO_GENERATION, JUDGE,
        )  # fmt: skip
        return dict(zip(("verdicts", "tokens", "microusd"), map(int, rows[0]), strict=True))

    def agreement(self, judges: Collection[str]) -> Agreement:
        """Of these judges (by hash), over all that this ledger has of them."""
        marks = ", ".join("?" for _ in judges)
        asked = self._rows(
            f"SELECT count(*) FROM verdicts WHERE nonce = 0 AND judge IN ({marks})", *judges
        )
        pairs = self._rows(
            "SELECT a.value - b.value FROM verdicts b JOIN verdicts a ON a.question = b.question "
            f"AND a.nonce = 0 WHERE b.nonce = 1 AND b.judge IN ({marks})",
            *judges,
        )
        gaps = [float(row[0]) for row in pairs]
        mean = sum(map(abs, gaps)) / len(gaps) if gaps else None
        noise = (sum(gap * gap for gap in gaps) / len(gaps) / 2) ** 0.5 if gaps else None
        return Agreement(int(asked[0][0]), len(gaps), sum(not gap for gap in gaps), mean, noise)

    def unjudged(self, run_id: str) -> dict[str, int]:
        """Task -> how many of a run's questions no judge gave a valid verdict to."""
        rows = self._rows(
            "SELECT task, count(*) FROM unjudged u WHERE run_id = ? AND nonce = 0 AND NOT EXISTS "
            "(SELECT 1 FROM verdicts v WHERE v.question = u.question AND v.nonce = 0) "
            "GROUP BY task",
            run_id,
        )
        return {str(task): int(count) for task, count in rows}
