"""A run as plain data: what ``show --json`` prints and every table is made from."""

from __future__ import annotations

from typing import Any

from agentmerge.errors import NotFound
from agentmerge.lease import Lease
from agentmerge.ledger import Candidate, Ledger, RunRow
from agentmerge.session import CHECKPOINTS
from agentmerge.steps import evaluations, incumbent

#: Failed candidates that a summary lists; the ledger has them all.
MAX_FAILURES = 10


def run_summary(ledger: Ledger, row: RunRow) -> dict[str, Any]:
    """name, status, seed, search, generations, parents, best, evaluations, agents, final card."""
    candidates = ledger.candidates(row.id)
    best = incumbent(candidates)
    parent = None
    if row.parent_run is not None:
        parent = {"run": ledger.run(row.parent_run).name, "generation": row.parent_generation}
    own = [c for c in candidates if not c.prior]
    return {
        "name": row.name,
        "id": row.id,
        "status": _status(ledger, row),
        "stop_reason": row.stop_reason,
        "seed": row.seed,
        "search": row.algorithm,
        "generations": 1 + max((c.generation for c in candidates if c.state != "open"), default=-1),
        "parent": parent,
        "evaluations": {
            "total": evaluations(candidates),
            "reused": sum(c.reused or c.state == "twin" for c in own),
            "failed": sum(c.state == "failed" for c in own),
        },
        "best": None if best is None else candidate_summary(best),
        "parents": [
            candidate_summary(c)
            for c in own
            if c.operator in ("parent", "uniform") and c.score is not None
        ],
        "agents": ledger.call_totals(row.id),
        "failures": [
            {"candidate": [c.generation, c.slot], "failure": c.failure}
            for c in own
            if c.state == "failed"
        ][:MAX_FAILURES],
        "final": row.result,
    }


def _status(ledger: Ledger, row: RunRow) -> str:
    """As saved; but a search that nobody drives any more does not run."""
    if row.status not in ("new", "running"):
        return row.status
    driven = Lease.holder(ledger.path.with_name(CHECKPOINTS), row.id) is not None
    return "running" if driven else "interrupted"


def candidate_summary(candidate: Candidate) -> dict[str, Any]:
    return {
        "score": candidate.score,
        "tasks": dict(candidate.tasks),
        "recipe_hash": candidate.recipe_hash,
        "generation": candidate.generation,
        "slot": candidate.slot,
        "operator": candidate.operator,
        "label": candidate.label,
    }


def trace(ledger: Ledger, row: RunRow) -> dict[str, Any]:
    """Everything that a resumed search must share with an uninterrupted one, clocks left out."""
    return {
        "candidates": [
            {
                "at": [c.generation, c.slot],
                "operator": c.operator,
                "vector": c.vector,
                "recipe": c.recipe_hash,
                "state": c.state,
                "score": c.score,
                "tasks": list(c.tasks),
                "failure": c.failure,
                "loss": c.loss,
                "gradient": c.gradient,
            }
            for c in ledger.candidates(row.id)
        ],
        "advice": ledger.advice(row.id),
        "result": row.result,
    }


def best_recipe(ledger: Ledger, row: RunRow) -> dict[str, Any]:
    """The answer of a finished search, else the best so far: {recipe, score, ...}.

    Raises:
        NotFound: nothing has been scored.
    """
    candidates = ledger.candidates(row.id)
    found = incumbent(candidates)
    if row.result:
        at = tuple(row.result["answer"]["candidate"])
        found = next(c for c in candidates if (c.generation, c.slot) == at)
    if found is None:
        raise NotFound(f"run {row.name!r} has not scored a candidate yet")
    return {"recipe": ledger.recipe(found.recipe_hash)} | candidate_summary(found)
