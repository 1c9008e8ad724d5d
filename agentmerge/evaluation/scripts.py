"""What a user's program says of a candidate's answers: one JSON line an item in, and one out.

A line out has ``id`` and ``score``, perhaps ``margin``, and ``details`` for people and agents to
read. Knows lines and bounds; what is asked, and when, is ``scoring.py``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentmerge.config import ScorerCommand
from agentmerge.errors import AnswerRefused
from agentmerge.system.commands import MOST_SAID, Running, open_environment
from agentmerge.system.redaction import redact_json

#: Characters of a wrong line that a sentence has.
_SHOWN = 120
#: Characters of an item's details that are kept.
_MOST_DETAILS = 500


@dataclass(frozen=True, slots=True)
class Verdict:
    """margin: how far right is ahead of wrong, of any unit; None where the program gave none.
    details: why, in its words."""

    score: float
    margin: float | None = None
    details: str = ""


def verdicts(
    scorer: ScorerCommand, task: str, items: Mapping[int, Mapping[str, Any]]
) -> dict[int, Verdict]:
    """A verdict of each item, by its id. items: what the program is told of each besides its id.

    Raises:
        AnswerRefused: the program failed, was late, or said something else.
    """
    whose = f"the scorer of task {task!r}"
    given = "".join(json.dumps({"id": i, **told}, default=str) + "\n" for i, told in items.items())
    with Running(scorer.command, given.encode(), open_environment(scorer.env)) as running:
        in_time = running.wait(scorer.timeout_s)
    lines = running.said.decode(errors="replace").split("\n")
    refuse_failed(running, whose, None if in_time else scorer.timeout_s)
    return read_verdicts(lines, list(items), scorer.range, whose)


def refuse_failed(running: Running, whose: str, late_s: float | None) -> None:
    """
    Raises:
        AnswerRefused: it was late (late_s: after so many seconds), said too much, or failed.
    """
    why = ""
    if running.too_long:
        why = f"printed more than {MOST_SAID >> 20} MB"
    elif late_s is not None:
        count = len(running.said.splitlines())
        why = f"was not done after {late_s:g} s, with {count} lines printed (scorer.timeout_s)"
    elif running.code != 0:
        why = f"ended with exit code {running.code}"
    if why:
        said = f"; it wrote: {running.complaint}" if running.complaint else ""
        raise AnswerRefused(f"{whose} {why}{said}")


def read_verdicts(
    lines: Sequence[str],
    wanted: Sequence[int],
    bounds: tuple[float, float],
    whose: str,
    *,
    also: Container[int] = (),
    only: int | None = None,
) -> dict[int, Verdict]:
    """also: ids that lines may have besides. only: the id of a line that says none.

    Raises:
        AnswerRefused: a line that is none, or the first item without one.
    """
    asked, found = set(wanted), dict[int, Verdict]()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            item, verdict = _read(line, bounds, only)
            if item not in asked and item not in also:
                raise ValueError(f"has id {item!r}, which was not asked")
            if item in found:
                raise ValueError(f"is a second one for id {item}")
        except ValueError as fault:
            shown = line if len(line) <= _SHOWN else f"{line[:_SHOWN]}..."
            raise AnswerRefused(f"line {number} of {whose} {fault}: {shown}") from None
        found[item] = verdict
    if missing := [item for item in wanted if item not in found]:
        raise AnswerRefused(
            f"{whose} gave no line for id {missing[0]}, and so for {len(missing)} of "
            f"{len(wanted)} items"
        )
    return found


def _read(line: str, bounds: tuple[float, float], only: int | None) -> tuple[Any, Verdict]:
    """
    Raises:
        ValueError: what is wrong with the line.
    """
    try:
        body = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("is not JSON") from None
    if not isinstance(body, dict):
        raise ValueError("is no JSON object")
    if only is not None:
        body.setdefault("id", only)
    for key in ("id", "score"):
        if key not in body:
            raise ValueError(f"has no {key}")
    if unknown := body.keys() - {"id", "score", "margin", "details"}:
        raise ValueError(f"has a key {min(unknown)!r}; id, score, margin and details are known")
    item = body["id"]
    if type(item) is not int:
        raise ValueError(f"has id {str(item)[:20]!r}, which is no whole number")
    low, high = bounds
    score = _number(body["score"], "score")
    if not low <= score <= high:
        raise ValueError(f"has score {score:g}, outside the range from {low:g} to {high:g}")
    margin = body.get("margin")
    details = body.get("details") or ""
    if not isinstance(details, str):
        details = json.dumps(details)
    # Before it is cut: half a key is a secret that no pattern knows.
    why = redact_json(details)[:_MOST_DETAILS]
    return item, Verdict(score, None if margin is None else _number(margin, "margin"), why)


def _number(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"has {key} {str(value)[:20]!r}, which is no number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"has {key} {str(value)[:20]}, which is not finite")
    return number
