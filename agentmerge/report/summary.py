"""A run as plain data: what ``show --json`` prints and every table is made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from agentmerge.agents.forecasts import forecasts, subset_forecasts, track
from agentmerge.contracts.advice import subsets_of
from agentmerge.contracts.operators import PARENT, STRUCTURE, UNIFORM
from agentmerge.errors import NotFound, UserError
from agentmerge.evaluation.statistics import figure
from agentmerge.ledger import Candidate, Ledger, RunRow
from agentmerge.ledger.folder import CHECKPOINTS
from agentmerge.ledger.lease import Lease
from agentmerge.ledger.words import PLACES, openings
from agentmerge.recipe.names import short_name
from agentmerge.report.front import front_points, picked

#: Failed candidates that a summary lists; the ledger has them all.
MAX_FAILURES = 10


def run_summary(ledger: Ledger, row: RunRow) -> dict[str, Any]:
    """name, status, seed, search, generations, parents, best, answer, evaluations, agents, final;
    depths where the answer has a table of them; judges where tasks have some; front where length is
    an objective.

    best: of all seen, by search items. answer: what a finished search chose; often another.
    """
    best, tally = ledger.best_candidate(row.id), ledger.tally(row.id)
    answer = answer_of(ledger, row) if row.result else None
    parent = None
    if row.parent_run is not None:
        names = {found.id: found.name for found in ledger.runs()}  # it may have been forgotten
        parent = {"run": names.get(row.parent_run), "generation": row.parent_generation}
    depths = depth_rows(ledger, row)
    return {
        "name": row.name,
        "id": row.id,
        "status": run_status(ledger, row),
        "stop_reason": row.stop_reason,
        "seed": row.seed,
        "search": row.algorithm,
        "generations": tally.generations,
        "parent": parent,
        "evaluations": {
            "total": tally.evaluations,
            "reused": tally.reused,
            "failed": tally.failed,
        }
        | ({"stopped": tally.stopped} if tally.stopped else {}),
        "best": None if best is None else candidate_summary(best),
        "answer": None if answer is None else candidate_summary(answer),
        "parents": [
            candidate_summary(c) for c in ledger.seeds(row.id) if c.operator in (PARENT, UNIFORM)
        ],
        "seconds": tally.seconds,
        "agents": ledger.call_totals(row.id) | _forecasts(ledger, row),
        "failures": [
            {"candidate": [generation, slot], "failure": failure}
            for generation, slot, failure in ledger.failures(row.id, MAX_FAILURES)
        ],
        "structure": [
            {"generation": o.generation, "move": o.move.sentence, "refusal": o.refusal}
            for o in openings(ledger.advice(row.id, role=STRUCTURE))
        ],
        "warnings": row.facts.get("warnings", []),
        "final": row.result,
    } | {
        key: found
        for key, found in (
            ("depths", depths),
            ("judges", judge_rows(ledger, row)),
            ("front", front_points(row)),
        )
        if found
    }


def judge_rows(ledger: Ledger, row: RunRow) -> dict[str, dict[str, Any]]:
    """Judged task -> {verdicts, twice, same, apart, noise, unjudged}: how far its judge agrees with
    itself, over all that this ledger has of it, and how many of this search's questions had no
    valid verdict (of a question asked before tasks were kept, under each)."""
    unjudged = ledger.unjudged(row.id)
    before = unjudged.get("", 0)
    return {
        task: asdict(ledger.agreement([judge])) | {"unjudged": unjudged.get(task, 0) + before}
        for task, judge in row.facts.get("judges", {}).items()
    }


def judge_sentences(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """``judge_rows`` in words."""
    return [_judge_sentence(task, found) for task, found in rows.items()]


def _judge_sentence(task: str, found: Mapping[str, Any]) -> str:
    told = f"judge of {task}: {found['verdicts']} verdicts"
    if found["twice"]:
        told += (
            f", {found['twice']} of them twice: {found['same'] / found['twice']:.0%} the same, "
            f"{found['apart']:.2f} apart on average, so one is {found['noise']:.2f} off "
            "(standard deviation)"
        )
    if found["unjudged"]:
        told += f"; {found['unjudged']} answers without a valid verdict"
    return told


def depth_rows(ledger: Ledger, row: RunRow) -> list[dict[str, Any]]:
    """What each layer of the answer's table buys and costs: {layers, parameters, seconds_per_item,
    score, sealed_score, ahead, candidate, is_answer}, from the merge under it on. What is not known
    is None: parameters where no model is read, seconds where results were known before."""
    found = []
    whole, each = row.facts.get("parameters") or (None, None)
    for depth in row.card.depths:
        candidate = ledger.candidate(row.id, *depth.candidate)
        items = sum(task["search"] for task in row.facts["items"].values())
        seconds = None if candidate.reused else candidate.seconds
        found.append(
            {
                "layers": depth.layers,
                "parameters": whole and whole + (depth.layers - row.facts["num_layers"]) * each,
                "seconds_per_item": seconds / items if seconds and items else None,
                "score": depth.score,
                "sealed_score": depth.sealed_score,
                "ahead": depth.ahead,
                "candidate": list(depth.candidate),
                "is_answer": depth.recipe_hash == row.card.answer.recipe_hash,
            }
        )
    return found


def run_status(ledger: Ledger, row: RunRow) -> str:
    """As saved; but a search that nobody drives any more does not run."""
    if row.status not in ("new", "running"):
        return row.status
    driven = Lease.holder(ledger.path.with_name(CHECKPOINTS), row.id) is not None
    return "running" if driven else "interrupted"


def _forecasts(ledger: Ledger, row: RunRow) -> dict[str, Any]:
    """How good the proposer's forecasts were, and a curator's: {count, rank_correlation, bias}."""
    advice = ledger.advice(row.id)
    foretold = any(word["guidance"].get("expected_score") is not None for word in advice)
    curated = bool(subsets_of(advice))
    # All candidates: only where they are needed.
    history = ledger.history(row.id) if foretold or curated else []
    found = {"forecasts": asdict(track(forecasts(advice, history)))}
    of_subsets = {"curator_forecasts": asdict(track(subset_forecasts(advice, history)))}
    return found | (of_subsets if curated else {})


def candidate_summary(candidate: Candidate) -> dict[str, Any]:
    return {
        "score": candidate.score,
        "tasks": dict(candidate.tasks),
        "recipe_hash": candidate.recipe_hash,
        "generation": candidate.generation,
        "slot": candidate.slot,
        "operator": candidate.operator,
        "label": candidate.label,
        "tokens_per_item": candidate.tokens,
    }


def tokens_text(summary: Mapping[str, Any]) -> str:
    """How long the answers are, of the answer (or the best so far) beside the parents'; empty where
    nobody counted."""
    best = summary["answer"] or summary["best"]
    rows = [*([best] if best else []), *summary["parents"]]
    named = {PARENT: "parent {}", UNIFORM: "the uniform merge"}
    told = [
        (
            ("this search's answer" if summary["answer"] else "best so far")
            if row is best
            else named[row["operator"]].format(short_name(row["label"]))
        )
        + f" {figure(row['tokens_per_item'], digits=1)}"
        for row in rows
        if row["tokens_per_item"] is not None
    ]
    return f"tokens an item: {', '.join(told)}" if told else ""


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
                "estimate": c.estimate,
                "rung": c.rung,
                "violation": c.violation,
            }
            for c in ledger.candidates(row.id)
        ],
        "advice": [
            {name: said for name, said in word.items() if name not in PLACES}
            for word in ledger.advice(row.id)
        ],
        "result": row.result,
    }


def best_recipe(
    ledger: Ledger,
    row: RunRow,
    layers: int | None = None,
    point: int | None = None,
    prefer: str | None = None,
) -> dict[str, Any]:
    """The answer of a finished search, else the best so far: {recipe, score, ...}.

    layers: the stack of so many layers of the answer's table instead. point, prefer: of its front,
    as ``front.picked`` has them.

    Raises:
        NotFound: nothing has been scored, the table has no such stack, the front no such point.
        UserError: more than one of these.
    """
    if sum(wish is not None for wish in (layers, point, prefer)) > 1:
        raise UserError("--layers, --point and --prefer each name one merge; give one of them")
    found: Candidate | None
    if point is not None or prefer is not None:
        found = ledger.candidate(row.id, *picked(row, point, prefer).candidate)
    elif layers is None:
        found = answer_of(ledger, row)
    else:
        rows = {depth.layers: depth.candidate for depth in reversed(row.card.depths)}
        chosen = row.card.answer.candidate  # of two rows of one depth the answer's
        rows |= {d.layers: d.candidate for d in row.card.depths if [*d.candidate] == [*chosen]}
        if layers not in rows:
            known = ", ".join(map(str, sorted(rows))) or "none, since its answer is no stack"
            raise NotFound(f"run {row.name!r} has no stack of {layers} layers; it has {known}")
        found = ledger.candidate(row.id, *rows[layers])
    if found is None:
        raise NotFound(f"run {row.name!r} has not scored a candidate yet")
    return {"recipe": ledger.recipe(found.recipe_hash, row.id)} | candidate_summary(found)


def answer_of(ledger: Ledger, row: RunRow) -> Candidate | None:
    """What a finished search chose, else the best so far, else None."""
    if row.result:
        return ledger.candidate(row.id, *row.card.answer.candidate)
    return ledger.best_candidate(row.id)
