"""A finished search's front as plain data, and which of its points somebody prefers."""

from __future__ import annotations

import math
import re
from typing import Any

from agentmerge.contracts.card import FrontRow
from agentmerge.errors import NotFound, UserError
from agentmerge.evaluation.statistics import figure
from agentmerge.ledger import RunRow

_WISH = re.compile(r"\s*(score\s*>=|tokens\s*<=)\s*(\S+)\s*")


def front_points(row: RunRow) -> list[dict[str, Any]]:
    """{point, name, candidate, score, tokens, sealed_score, sealed_tokens, interval,
    tokens_interval, is_answer}, best score first; the intervals are of the sealed ones where there
    are any."""
    answer = row.card.answer.recipe_hash
    return [
        {"point": number, "name": point.name, "candidate": list(point.candidate)}
        | {"score": point.score, "tokens": point.tokens}
        | {"sealed_score": point.sealed_score, "sealed_tokens": point.sealed_tokens}
        | {"interval": point.interval, "tokens_interval": point.tokens_interval}
        | {"is_answer": point.recipe_hash == answer}
        for number, point in enumerate(row.card.front, 1)
    ]


def picked(row: RunRow, point: int | None, prefer: str | None) -> FrontRow:
    """A point by its number, or the best that keeps a wish: of ``score>=X`` the shortest, of
    ``tokens<=X`` the one with most score, on sealed items where they were asked.

    Raises:
        NotFound: there is no front, no such point, or none that keeps it.
        UserError: a wish that says nothing.
    """
    front = row.card.front
    if not front:
        raise NotFound(
            f"run {row.name!r} has no front: a search has one once it is done, with "
            "search.objectives: [score, tokens]"
        )
    if point is not None:
        if not 1 <= point <= len(front):
            raise NotFound(
                f"run {row.name!r} has no point {point}; its front has 1 to {len(front)}"
            )
        return front[point - 1]
    # One that failed there has search items alone, which flatter it.
    front = [p for p in front if p.sealed_score is not None] or front
    key, bound = _wish(prefer or "")
    if key == "score":
        kept = [p for p in front if _score(p) >= bound]
        if not kept:
            most = max(map(_score, front))
            raise NotFound(
                f"no point of the front has a score of {bound:g}: {figure(most)} at most"
            )
        return min(kept, key=lambda p: (_tokens(p), -_score(p)))
    kept = [p for p in front if _tokens(p) <= bound]
    if not kept:
        least = min(map(_tokens, front))
        raise NotFound(f"no point of the front has {bound:g} tokens an item: {least:.1f} at least")
    return max(kept, key=lambda p: (_score(p), -_tokens(p)))


def _wish(text: str) -> tuple[str, float]:
    said = _WISH.fullmatch(text)
    try:
        if said is None:
            raise ValueError
        bound = float(said[2])
        if not math.isfinite(bound):
            raise ValueError
        return said[1].split(">")[0].split("<")[0].strip(), bound
    except ValueError:
        raise UserError(
            f'--prefer {text!r} is not understood; write "score>=0.8" or "tokens<=50"'
        ) from None


def _score(point: FrontRow) -> float:
    found = point.score if point.sealed_score is None else point.sealed_score
    return float("-inf") if found is None else found


def _tokens(point: FrontRow) -> float:
    found = point.tokens if point.sealed_tokens is None else point.sealed_tokens
    return float("inf") if found is None else found
