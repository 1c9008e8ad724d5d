"""What each page shows, as plain data: a page and its JSON twin are made of the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from agentmerge.errors import AgentmergeError, UserError
from agentmerge.ledger import Candidate, Ledger, RunRow
from agentmerge.ledger.overview import ORDERS
from agentmerge.recipe import Recipe
from agentmerge.report.compare import recipe_changes
from agentmerge.report.explain import explain_recipe
from agentmerge.report.items import (
    ItemsAsked,
    Values,
    asked,
    candidate_name,
    gains,
    goodness,
    paired,
)
from agentmerge.report.summary import answer_of, run_summary
from agentmerge.report.utilisation import workers_of

#: Rows of a table on one page.
PAGE, MOST = 50, 500
STATES = ("open", "scored", "failed", "twin", "stopped")


def searches(ledger: Ledger, query: Mapping[str, str]) -> dict[str, Any]:
    """The newest first: each as ``agentmerge list --json`` has it."""
    rows = ledger.runs()[::-1]
    offset, limit = _window(query)
    shown = [run_summary(ledger, row) for row in rows[offset : offset + limit]]
    return {"total": len(rows), "offset": offset, "limit": limit, "searches": shown}


def search(ledger: Ledger, row: RunRow) -> dict[str, Any]:
    """As ``agentmerge show --json`` has it."""
    found = run_summary(ledger, row)
    return found | workers_of(ledger, row, running=found["status"] == "running")


def candidates(ledger: Ledger, row: RunRow, query: Mapping[str, str]) -> dict[str, Any]:
    """A page of a search's candidates.

    Raises:
        UserError: there is no such order or state, or a number is none.
    """
    order, state = query.get("sort") or "place", query.get("state") or ""
    _one_of("sort", order, ORDERS)
    _one_of("state", state, ("", *STATES))
    asked_for = {"state": state, "operator": query.get("operator") or ""}
    containing, descending = query.get("containing") or "", query.get("way") == "down"
    offset, limit = _window(query)
    total, found = ledger.candidate_page(
        row.id, order=order, descending=descending, where=asked_for, containing=containing,
        limit=limit, offset=offset,
    )  # fmt: skip
    return {
        "run": row.name,
        "total": total,
        "offset": offset,
        "limit": limit,
        "sort": order,
        "way": "down" if descending else "up",
        "containing": containing,
        "operators": ledger.operators(row.id),
        "candidates": [_row(candidate) for candidate in found],
    } | asked_for


def candidate(
    ledger: Ledger, row: RunRow, generation: int, slot: int, query: Mapping[str, str]
) -> dict[str, Any]:
    """One in full: its recipe, what sets it apart from the search's best, and item by item."""
    found, best = ledger.candidate(row.id, generation, slot), answer_of(ledger, row)
    recipe = ledger.recipe(found.recipe_hash, row.id)
    same = best is None or best.recipe_hash == found.recipe_hash
    question = asked(ledger, row, "search")
    mine, theirs = (
        question.values(ledger, hash_) if question is not None and hash_ else None
        for hash_ in (found.recipe_hash, None if best is None or same else best.recipe_hash)
    )
    return {
        "run": row.name,
        "candidate": _row(found),
        "recipe": recipe.rstrip(),
        "explained": _explained(row, recipe),
        "best": None if best is None else _row(best),
        "same_as_best": same,
        "changes": recipe_changes(ledger, (row, row), (best, found)),
        "against_best": None if same else _against(question, mine, theirs),
        "items": _items(question, mine, theirs, ledger.texts(row.id), query),
    }


def _row(candidate: Candidate) -> dict[str, Any]:
    body = asdict(candidate) | {"tasks": dict(candidate.tasks)}
    for long in ("vector", "gradient"):
        del body[long]
    return body | {"name": candidate_name(candidate), "twin": candidate.twin}


def _explained(row: RunRow, recipe: str) -> dict[str, Any]:
    """As ``agentmerge explain`` has it, or {reason}."""
    try:
        return explain_recipe(Recipe.parse(recipe), None, row.facts.get("num_layers"))
    except AgentmergeError as error:
        return {"reason": str(error)}


def _against(
    question: ItemsAsked | None, mine: Values | None, theirs: Values | None
) -> dict[str, Any]:
    """{mean, low, high, tasks}: gained and lost against the best, or {reason}."""
    if question is None:
        return {"reason": "which items were asked was not written down"}
    if mine is None or theirs is None:
        return {"reason": "one of them was not asked every item"}
    difference = paired(mine, theirs, question)
    return {
        "difference": None if difference is None else difference._asdict(),
        "tasks": gains(mine, theirs, question),
    }


def _items(
    question: ItemsAsked | None,
    mine: Values | None,
    theirs: Values | None,
    texts: Mapping[str, Mapping[str, Sequence[str]]],
    query: Mapping[str, str],
) -> dict[str, Any]:
    """{total, offset, limit, rows: [{task, item, value, margin, best, change, asks, right, said,
    why}]}, or {reason}. asks, right: "" where its text was not kept. said, why: of items that it
    fails, what was answered and what its judge or program gave as reasons, turn by turn. An item
    without a verdict has no value."""
    if question is None:
        return {"reason": "which items were asked was not written down"}
    if mine is None:
        return {"reason": "it was not asked every item"}
    places = [(task, key) for task, keys in question.keys.items() for key in keys]
    offset, limit = _window(query)
    rows = []
    for task, key in places[offset : offset + limit]:
        result, best = mine[task].get(key), (theirs or {}).get(task, {}).get(key)
        good = goodness(question, task)
        pair = [None if one is None else good(one) for one in (result, best)]
        change = ""
        if pair[0] is not None and pair[1] is not None and pair[0] != pair[1]:
            change = "gained" if pair[0] > pair[1] else "lost"
        asks, right = texts.get(task, {}).get(key, ("", ""))
        rows.append(
            {"task": task, "item": key, "value": result and result.value}
            | {"margin": result and result.margin, "best": best and best.value, "change": change}
            | {"asks": asks, "right": right, "said": list(result.answers if result else ())}
            | {"why": list(result.reasons) if result else ["no verdict"]}
        )
    return {"total": len(places), "offset": offset, "limit": limit, "rows": rows}


def _window(query: Mapping[str, str]) -> tuple[int, int]:
    return _number(query, "offset", 0, 10**9), _number(query, "limit", PAGE, MOST) or PAGE


def _number(query: Mapping[str, str], name: str, default: int, most: int) -> int:
    text = query.get(name) or str(default)
    if not (text.isascii() and text.isdigit() and len(text) < 12):
        raise UserError(f"{name} is {text[:40]!r}, and must be a whole number from 0 to {most:,}")
    return min(int(text), most)


def _one_of(name: str, value: str, known: Sequence[str] | Mapping[str, Any]) -> None:
    if value not in known:
        names = ", ".join(filter(None, known))
        raise UserError(f"{name} is {value[:40]!r}; there are: {names}")
