"""Which search left which, and where: the family tree of a runs directory."""

from __future__ import annotations

from typing import Any

from agentmerge.ledger import Ledger
from agentmerge.report.summary import answer_of, run_status


def lineage(ledger: Ledger) -> list[dict[str, Any]]:
    """Every search, oldest first: {name, parent, generation, status, search, evaluations, best,
    answer}: the best score seen, and the answer's.

    A branch whose parent is gone stands by itself.
    """
    rows = ledger.runs()
    names = {row.id: row.name for row in rows}
    found = []
    for row in rows:
        best = ledger.best_candidate(row.id)
        answer = answer_of(ledger, row)
        parent = names.get(row.parent_run or "")
        found.append(
            {
                "name": row.name,
                "parent": parent,
                "generation": row.parent_generation,
                "status": run_status(ledger, row),
                "search": row.algorithm,
                "evaluations": ledger.tally(row.id).evaluations,
                "best": None if best is None else best.score,
                "answer": answer.score if row.result and answer else None,
            }
        )
    return found
