"""Sums over a search's candidates, made by the database: quick however many there are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from agentmerge.contracts.operators import CHEAP
from agentmerge.contracts.strategy import GRADIENT_COST
from agentmerge.ledger.candidates import Candidates
from agentmerge.ledger.rows import Candidate, counted


@dataclass(frozen=True, slots=True)
class Tally:
    """Counts of a search's candidates, those of an incomparable past left out.

    evaluations: as ``steps.evaluations`` counts them. stopped: losers of races. generations:
        begun ones, the past included. seconds: worker time.
    """

    evaluations: float
    reused: int
    failed: int
    stopped: int
    generations: int
    seconds: float


#: What a table of candidates may be ordered by -> its columns; rows without a value come last.
ORDERS = {
    "place": "generation, slot",
    "score": "score",
    "operator": "operator",
    "state": "state",
    "seconds": "seconds",
}


class Overview(Candidates):
    def candidate_page(
        self,
        run_id: str,
        *,
        order: str = "place",
        descending: bool = False,
        where: Mapping[str, str] = MappingProxyType({}),
        containing: str = "",
        limit: int,
        offset: int = 0,
    ) -> tuple[int, list[Candidate]]:
        """(how many there are, some of them in order), of those that are asked for.

        order: a key of ``ORDERS``. where: "state" or "operator" -> what it is. containing: text of
        the label or of the failure. A twin has no score of its own to be ordered by.
        """
        tests, values = ["run_id = ?"], [run_id]
        for column in ("state", "operator"):
            if where.get(column):
                tests.append(f"{column} = ?")
                values.append(where[column])
        if containing:
            tests.append("(instr(lower(label), lower(?)) OR instr(lower(failure), lower(?)))")
            values += [containing, containing]
        some = " AND ".join(tests)
        total = self._rows(f"SELECT count(*) FROM candidates WHERE {some}", *values)[0][0]
        way = "DESC" if descending else "ASC"
        keys = ", ".join(f"{key} {way} NULLS LAST" for key in ORDERS[order].split(", "))
        rows = self._rows(
            f"SELECT generation, slot FROM candidates WHERE {some} "
            f"ORDER BY {keys}, generation, slot LIMIT ? OFFSET ?",
            *values,
            limit,
            offset,
        )
        return int(total), [self.candidate(run_id, *row) for row in rows]

    def operators(self, run_id: str) -> list[str]:
        """Who proposed a search's candidates."""
        sql = "SELECT DISTINCT operator FROM candidates WHERE run_id = ? ORDER BY operator"
        return [str(name) for (name,) in self._rows(sql, run_id)]

    def tally(self, run_id: str) -> Tally:
        row = self._rows(
            "SELECT coalesce(sum(CASE WHEN prior = 0 AND state IN ('scored', 'stopped', 'failed') "
            "THEN (twin_slot IS NULL) * share + ? * (want = 'gradient' AND state = 'scored') "
            "ELSE 0 END), 0), "
            "coalesce(sum(prior = 0 AND (reused OR state = 'twin')), 0), "
            "coalesce(sum(prior = 0 AND state = 'failed'), 0), "
            "coalesce(sum(prior = 0 AND state = 'stopped'), 0), "
            "coalesce(max(CASE WHEN state != 'open' THEN generation END), -1) + 1, "
            "coalesce(sum(CASE WHEN prior = 0 THEN seconds END), 0.0) "
            "FROM candidates WHERE run_id = ?",
            GRADIENT_COST,
            run_id,
        )[0]
        return Tally(counted(row[0]), *row[1:])

    def best_candidate(self, run_id: str) -> Candidate | None:
        """The best that was scored under the present settings, by ``Candidate.rank``."""
        rows = self._rows(
            "SELECT generation, slot FROM candidates WHERE run_id = ? AND score IS NOT NULL "
            "AND prior = 0 AND twin_slot IS NULL "
            "ORDER BY violation, score DESC, generation, slot LIMIT 1",
            run_id,
        )
        return self.candidate(run_id, *rows[0]) if rows else None

    def seeds(self, run_id: str) -> list[Candidate]:
        """The scored parents and cheap rivals, in the order they were asked."""
        rows = self._rows(
            "SELECT generation, slot FROM candidates WHERE run_id = ? "
            f"AND operator IN ({', '.join('?' * len(CHEAP))}) "
            "AND prior = 0 AND score IS NOT NULL AND twin_slot IS NULL ORDER BY generation, slot",
            run_id,
            *CHEAP,
        )
        return [self.candidate(run_id, *row) for row in rows]

    def failures(self, run_id: str, limit: int) -> list[tuple[int, int, str]]:
        """(generation, slot, why) of the first candidates that failed."""
        rows = self._rows(
            "SELECT generation, slot, failure FROM candidates WHERE run_id = ? AND prior = 0 "
            "AND state = 'failed' ORDER BY generation, slot LIMIT ?",
            run_id,
            limit,
        )
        return [(generation, slot, failure) for generation, slot, failure in rows]
