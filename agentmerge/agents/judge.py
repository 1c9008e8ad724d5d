"""The judge: what it is shown of an answer, and what it may say.

Answers, questions and references stand between marks that none of them can hold, since a mark is a
hash of them all; each answer is cut to a length. Knows no task, no search and no ledger.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    Strict,
    ValidationInfo,
    field_validator,
)

from agentmerge.agents.prompts import Message, Prompt
from agentmerge.agents.quoting import mark_of, quoted
from agentmerge.agents.schemas import clean_text, closed, parse_reply

_MAX_REASON = 500
_NONE = "(there is none)"

Reason = Annotated[str, AfterValidator(lambda text: clean_text(text, _MAX_REASON))]


@dataclass(frozen=True, slots=True)
class Exhibit:
    """One turn to be judged. before: (the user's words, the answer) of the turns before it."""

    question: str
    reference: str
    category: str
    before: Sequence[tuple[str, str]]
    answer: str


@dataclass(frozen=True, slots=True)
class Judgement:
    """value: points of the scale; or of two answers 1 where the first is better, 0 where the second
    is, 0.5 where neither."""

    value: float
    reason: str


class PointsReply(BaseModel):
    """The grade of one answer."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    reason: Reason = ""
    points: Annotated[float, Strict(), Field(allow_inf_nan=False)]

    @field_validator("points")
    @classmethod
    def _on_the_scale(cls, value: float, info: ValidationInfo) -> float:
        least, most = info.context or (-math.inf, math.inf)
        if not least <= value <= most:
            raise ValueError(f"{value:g} is outside the scale; give {least:g} to {most:g}")
        return value


class BetterReply(BaseModel):
    """Which of two answers is better."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    reason: Reason = ""
    better: Literal["A", "B", "tie"]


def points_schema(scale: tuple[float, float]) -> dict[str, Any]:
    points = {"type": "number", "minimum": scale[0], "maximum": scale[1]}
    body = closed({"reason": {"type": "string"}, "points": points})
    return {"title": PointsReply.__name__} | body


def better_schema() -> dict[str, Any]:
    better = {"type": "string", "enum": ["A", "B", "tie"]}
    body = closed({"reason": {"type": "string"}, "better": better})
    return {"title": BetterReply.__name__} | body


def read_points(text: str, scale: tuple[float, float]) -> Judgement:
    """Raises ModelReplyError, with a sentence for the model."""
    reply = parse_reply(text, PointsReply, scale)
    return Judgement(reply.points, reply.reason)


def read_better(text: str) -> Judgement:
    """Raises ModelReplyError, with a sentence for the model."""
    reply = parse_reply(text, BetterReply, None)
    return Judgement({"A": 1.0, "B": 0.0, "tie": 0.5}[reply.better], reply.reason)


def points_messages(
    prompt: Prompt, shown: Exhibit, scale: tuple[float, float], most_chars: int
) -> list[Message]:
    """What a judge is asked of one answer."""
    mark = _mark([shown])
    values = _shared(shown, mark, most_chars) | {
        "least": f"{scale[0]:g}",
        "most": f"{scale[1]:g}",
        "conversation": _conversation(shown, mark, most_chars),
        "answer": quoted("answer", shown.answer, mark, most_chars),
    }
    return prompt.render(**values)


def pair_messages(prompt: Prompt, one: Exhibit, other: Exhibit, most_chars: int) -> list[Message]:
    """What a judge is asked of two answers to the same turn, in this order."""
    mark = _mark([one, other])
    values = _shared(one, mark, most_chars)
    for name, shown in (("a", one), ("b", other)):
        values[f"conversation_{name}"] = _conversation(shown, mark, most_chars)
        values[f"answer_{name}"] = quoted("answer", shown.answer, mark, most_chars)
    return prompt.render(**values)


def _shared(shown: Exhibit, mark: str, most_chars: int) -> dict[str, str]:
    return {
        "category": f"Category: {clean_text(shown.category, 100)}" if shown.category else "",
        "question": quoted("user", shown.question, mark, most_chars),
        "reference": _reference(shown.reference, mark, most_chars),
    }


def _conversation(shown: Exhibit, mark: str, most_chars: int) -> str:
    if not shown.before:
        return "(this is the first turn)"
    return "\n".join(
        quoted(who, text, mark, most_chars)
        for turn in shown.before
        for who, text in zip(("user", "assistant"), turn, strict=True)
    )


def _reference(text: str, mark: str, most_chars: int) -> str:
    return quoted("reference", text, mark, most_chars) if text.strip() else _NONE


def _mark(shown: Sequence[Exhibit]) -> str:
    return mark_of([[e.question, e.reference, e.before, e.answer] for e in shown])
