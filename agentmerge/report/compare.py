"""Two or more searches side by side: what each cost and reached, and what makes them differ.

Everything comes from the results database. The difference of two answers is paired by item, on the
items that both were asked under the same protocol by the same engine; where there are none, it says
why instead of comparing what cannot be compared.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from agentmerge.config import SearchConfig
from agentmerge.errors import AgentmergeError
from agentmerge.ledger import Candidate, Ledger, RunRow
from agentmerge.recipe import Recipe
from agentmerge.report.grid import Grid, grid, stack_depth
from agentmerge.report.items import ItemsAsked, Part, Values, asked, gains, paired
from agentmerge.report.summary import answer_of, run_status, run_summary
from agentmerge.space.grouped import SearchSpace


def compare(ledger: Ledger, names: Sequence[str]) -> dict[str, Any]:
    """{searches: one row each, differences: the first against each other}.

    Raises:
        NotFound: no such search.
    """
    rows = [ledger.run(name) for name in dict.fromkeys(names)]
    return {
        "searches": [_row(ledger, row) for row in rows],
        "differences": [_difference(ledger, rows[0], other) for other in rows[1:]],
    }


def _row(ledger: Ledger, row: RunRow) -> dict[str, Any]:
    summary, answer = run_summary(ledger, row), answer_of(ledger, row)
    return {
        "name": row.name,
        "status": summary["status"],
        "search": row.algorithm,
        "seed": row.seed,
        "score": None if answer is None else answer.score,
        "sealed_score": row.card.answer.sealed_score,
        "tasks": {} if answer is None else dict(answer.tasks),
        "sealed_tasks": row.card.answer.sealed_tasks or {},
        "evaluations": summary["evaluations"],
        "seconds": summary["seconds"],
        "agents": summary["agents"],
    }


def _difference(ledger: Ledger, first: RunRow, other: RunRow) -> dict[str, Any]:
    answers = answer_of(ledger, first), answer_of(ledger, other)
    return {
        "of": first.name,
        "against": other.name,
        "score": _paired_answers(ledger, (first, other), answers),
        "recipe": recipe_changes(ledger, (first, other), answers),
        "config": config_changes(first.config, other.config),
        "prompts": _prompts(ledger, first, other),
    }


def _paired_answers(
    ledger: Ledger, rows: tuple[RunRow, RunRow], answers: tuple[Candidate | None, Candidate | None]
) -> dict[str, Any]:
    """{part, items, mean, low, high, tasks}, or {reason}."""
    reason = "nothing was scored in one of them"
    if answers[0] is None or answers[1] is None:
        return {"reason": reason}
    parts: tuple[Part, ...] = ("sealed", "search")
    for part in parts:
        found = asked(ledger, rows[0], part), asked(ledger, rows[1], part)
        if found[0] is None or found[1] is None:
            reason = "which items were asked was not written down"
            continue
        why = _incomparable(found[0], found[1])
        if why:
            return {"reason": why}
        values = (
            found[0].values(ledger, answers[0].recipe_hash),
            found[1].values(ledger, answers[1].recipe_hash),
        )
        if values[0] is None or values[1] is None:
            reason = f"the {part} items of one answer have no results"
            continue
        return _interval(found[0], values[0], values[1])
    return {"reason": reason}


def _interval(question: ItemsAsked, mine: Values, theirs: Values) -> dict[str, Any]:
    tasks = gains(mine, theirs, question)
    shared = sum(task["items"] for task in tasks)
    difference = paired(mine, theirs, question)
    if difference is None:
        return {"reason": "a metric is no mean over items, or a task shares no items"}
    return {"part": question.part, "items": shared} | difference._asdict() | {"tasks": tasks}


def _incomparable(one: ItemsAsked, other: ItemsAsked) -> str:
    if one.engine != other.engine:
        return "they were scored by different engines"
    if dict(one.protocols) != dict(other.protocols):
        return "their tasks are asked in different ways"
    counted = ("name", "signed_weight", "leaves", "by_size")
    mine, theirs = ([[o[key] for key in counted] for o in x.objectives] for x in (one, other))
    if mine != theirs:
        return "their tasks have different weights"
    return ""


def recipe_changes(
    ledger: Ledger, rows: tuple[RunRow, RunRow], answers: tuple[Candidate | None, Candidate | None]
) -> dict[str, Any]:
    """{columns, rows: [{model, parameter, filter, of, against}]}: only rows that differ."""
    if answers[0] is None or answers[1] is None:
        return {"columns": [], "rows": []}
    spaces = [_space(row) for row in rows]
    finest = max((space for space in spaces if space), key=lambda s: s.groups, default=None)
    if finest is None or len({space.num_layers for space in spaces if space}) != 1:
        return {"columns": [], "rows": []}
    texts = [
        ledger.recipe(answer.recipe_hash, row.id)
        for row, answer in zip(rows, answers, strict=True)
        if answer is not None
    ]
    try:
        recipes = [Recipe.parse(text).canonical(finest.num_layers) for text in texts]
    except AgentmergeError:  # one was refused: it has no text, or one that makes nothing
        return {"columns": [], "rows": []}
    depth = max(stack_depth(recipe, finest.num_layers) for recipe in recipes)
    grids = [grid(finest, recipe, depth) for recipe in recipes]
    return {"columns": list(grids[0].columns), "rows": _changed(grids[0], grids[1])}


def _space(row: RunRow) -> SearchSpace | None:
    try:
        config = SearchConfig.from_text(row.config, row.name)
        return SearchSpace(config.genome, row.facts["num_layers"], row.facts["dtype"], row.seed)
    except AgentmergeError:
        return None


def _changed(one: Grid, other: Grid) -> list[dict[str, Any]]:
    nothing = (None,) * len(one.columns)
    found = []
    for key in dict.fromkeys([*one.rows, *other.rows]):
        mine, theirs = one.rows.get(key, nothing), other.rows.get(key, nothing)
        if mine != theirs:
            model, parameter, where = key
            found.append(
                {"model": model, "parameter": parameter, "filter": where}
                | {"of": list(mine), "against": list(theirs)}
            )
    return found


def config_changes(one: str, other: str) -> list[dict[str, Any]]:
    """Dotted keys whose values differ between two resolved configs: {key, of, against}."""
    flat = [_flat(SearchConfig.from_text(text).model_dump(mode="json")) for text in (one, other)]
    return [
        {"key": key, "of": flat[0].get(key), "against": flat[1].get(key)}
        for key in dict.fromkeys([*flat[0], *flat[1]])
        if flat[0].get(key) != flat[1].get(key)
    ]


def _flat(body: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in body.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _prompts(ledger: Ledger, one: RunRow, other: RunRow) -> list[dict[str, Any]]:
    """Each role whose prompt file differs, as a unified diff."""
    texts = ledger.prompts(one.id), ledger.prompts(other.id)
    found = []
    for role in sorted({*texts[0], *texts[1]}):
        mine, theirs = texts[0].get(role, ""), texts[1].get(role, "")
        if mine != theirs:
            lines = difflib.unified_diff(
                mine.splitlines(), theirs.splitlines(), one.name, other.name, lineterm="", n=1
            )
            found.append({"role": role, "diff": "\n".join(lines)})
    return found


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
