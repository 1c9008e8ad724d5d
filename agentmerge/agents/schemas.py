"""What an agent may say, and the one place where its words become numbers.

Knows the reply of each role, its JSON schema and how to find it in a model's text; and Guidance,
what a strategy is given. Knows no provider, no prompt and no search space: only how many
dimensions there are and how far a step may go.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from agentmerge.errors import ModelReplyError

SCALE = 100
MAX_CANDIDATES = 4
MAX_REPLY_CHARS = 200_000
_TOLERANCE = 0.5
_MAX_TEXT = 1_000
_MAX_FINDINGS = 8
_MAX_FINDING = 300
_MAX_JSON_STARTS = 1_000


@dataclass(frozen=True, slots=True)
class Guidance:
    """Advice of one generation; a strategy may use it as extra points. Vectors are unit-box.

    operator_weights: (operator, weight), how much of the next generation each should get.
    structural_move: a change of method, granularity, filters or models, in words.
    source: "model" as soon as a chat model wrote any part of it.
    """

    mean: tuple[float, ...] | None = None
    candidates: tuple[tuple[float, ...], ...] = ()
    sigma: float | None = None
    operator_weights: tuple[tuple[str, float], ...] = ()
    structural_move: str | None = None
    critique: str = ""
    thought: str = ""
    source: Literal["rules", "model"] = "rules"
    expected_score: float | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON-plain; `from_json` gives back an equal Guidance."""
        plain = asdict(self)
        plain["mean"] = None if self.mean is None else list(self.mean)
        plain["candidates"] = [list(vector) for vector in self.candidates]
        plain["operator_weights"] = [list(pair) for pair in self.operator_weights]
        return plain

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Guidance:
        mean = plain.get("mean")
        return cls(
            **{
                **plain,
                "mean": None if mean is None else tuple(mean),
                "candidates": tuple(tuple(v) for v in plain.get("candidates", ())),
                "operator_weights": tuple(
                    (name, weight) for name, weight in plain.get("operator_weights", ())
                ),
            }
        )


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a reply is checked against: dimensions of the space, and the least and widest step."""

    dimensions: int
    sigma_low: float
    sigma_high: float


# Strict: true, "12" and null are not numbers, however kindly pydantic would read them.
Number = Annotated[float, Strict()]


class _Reply(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class ProposerReply(_Reply):
    """Where to look next, in integers 0..100 of the unit box, and the score expected there."""

    thought: str
    mean_genome: list[Number]
    candidates: list[list[Number]] = Field(default_factory=list)
    expected_score: Number | None = None

    @field_validator("thought")
    @classmethod
    def _clean(cls, value: str) -> str:
        return clean_text(value, _MAX_TEXT)

    @field_validator("mean_genome")
    @classmethod
    def _genome(cls, value: list[float], info: ValidationInfo) -> list[float]:
        return _checked_genome(value, _bounds(info).dimensions)

    @field_validator("candidates")
    @classmethod
    def _genomes(cls, value: list[list[float]], info: ValidationInfo) -> list[list[float]]:
        return [_checked_genome(g, _bounds(info).dimensions) for g in value[:MAX_CANDIDATES]]

    @field_validator("expected_score")
    @classmethod
    def _finite(cls, value: float | None) -> float | None:
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{value} is not a finite number")
        return value


class CriticReply(_Reply):
    """What the last generation showed."""

    summary: str = Field(min_length=1)
    findings: list[str] = Field(default_factory=list)

    @field_validator("summary")
    @classmethod
    def _clean(cls, value: str) -> str:
        cleaned = clean_text(value, _MAX_TEXT)
        if not cleaned:
            raise ValueError("it is empty; say what the last generation showed")
        return cleaned

    @field_validator("findings")
    @classmethod
    def _clean_all(cls, value: list[str]) -> list[str]:
        return [clean_text(finding, _MAX_FINDING) for finding in value[:_MAX_FINDINGS]]


class ControllerReply(_Reply):
    """How far the next generation should step, as a fraction of the unit box."""

    thought: str
    sigma: Number

    @field_validator("thought")
    @classmethod
    def _clean(cls, value: str) -> str:
        return clean_text(value, _MAX_TEXT)

    @field_validator("sigma")
    @classmethod
    def _within(cls, value: float, info: ValidationInfo) -> float:
        bounds = _bounds(info)
        slack = 0.01 * bounds.sigma_high
        if not bounds.sigma_low - slack <= value <= bounds.sigma_high + slack:
            raise ValueError(
                f"{value} is outside {bounds.sigma_low} to {bounds.sigma_high}; "
                "give a number between them"
            )
        return min(max(value, bounds.sigma_low), bounds.sigma_high)


R = TypeVar("R", bound=_Reply)


def json_schema(reply: type[_Reply], bounds: Bounds) -> dict[str, Any]:
    """The reply's JSON schema as a plain dict that strict servers accept.

    Every property is required and no other is allowed: what OpenAI's strict mode asks for. What
    strict dialects do not all know (lengths of text) is left to `parse_reply`.
    """
    genome = {
        "type": "array",
        "items": {"type": "integer", "minimum": 0, "maximum": SCALE},
        "minItems": bounds.dimensions,
        "maxItems": bounds.dimensions,
    }
    text = {"type": "string"}
    properties: dict[type[_Reply], dict[str, Any]] = {
        ProposerReply: {
            "thought": text,
            "mean_genome": genome,
            "candidates": {"type": "array", "items": genome, "maxItems": MAX_CANDIDATES},
            "expected_score": {"type": ["number", "null"]},
        },
        CriticReply: {"summary": text, "findings": {"type": "array", "items": text}},
        ControllerReply: {
            "thought": text,
            "sigma": {
                "type": "number",
                "minimum": bounds.sigma_low,
                "maximum": bounds.sigma_high,
            },
        },
    }
    return {
        "title": reply.__name__,
        "type": "object",
        "properties": properties[reply],
        "required": list(properties[reply]),
        "additionalProperties": False,
    }


def parse_reply(text: str, reply: type[R], bounds: Bounds) -> R:
    """The reply in a model's text: bare, fenced, after a <think> block, or amid prose.

    Raises ModelReplyError with one sentence that can be shown to the model.
    """
    found = _find_object(text, set(reply.model_fields))
    try:
        return reply.model_validate(found, context=bounds)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ModelReplyError(_sentence(first)) from None


def unit(value: float) -> float:
    """From 0..100 to the unit box."""
    return value / SCALE


def percent(value: float) -> int:
    """From the unit box to 0..100, rounded (0.29 is 29) and kept inside."""
    return min(max(round(value * SCALE), 0), SCALE)


def clean_text(text: str, limit: int) -> str:
    """Safe to store and to print: no control characters or lone surrogates, cut at `limit`."""
    kept = "".join(
        c for c in text if c == "\n" or unicodedata.category(c) not in {"Cc", "Cf", "Cs"}
    )
    kept = kept.strip()
    return kept if len(kept) <= limit else kept[: limit - 1].rstrip() + "…"


def _bounds(info: ValidationInfo) -> Bounds:
    assert isinstance(info.context, Bounds), "replies are validated by parse_reply"
    return info.context


def _checked_genome(value: list[float], dimensions: int) -> list[float]:
    if len(value) != dimensions:
        raise ValueError(
            f"it has {len(value)} numbers; give exactly {dimensions}, one for each axis"
        )
    for index, number in enumerate(value):
        if not math.isfinite(number):
            raise ValueError(f"number {index} is {number}; give integers from 0 to {SCALE}")
        if not -_TOLERANCE <= number <= SCALE + _TOLERANCE:
            raise ValueError(f"number {index} is {number:g}; give integers from 0 to {SCALE}")
    if all(number <= 1 for number in value) and any(number % 1 for number in value):
        raise ValueError(f"it looks like fractions of 1; give integers from 0 to {SCALE}")
    return [min(max(number, 0.0), float(SCALE)) for number in value]


def _sentence(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    message = error["msg"].removeprefix("Value error, ").rstrip(".")
    return f"{where}: {message}." if where else f"{message}."


def _find_object(text: str, fields: set[str]) -> dict[str, Any]:
    """The last JSON object of the text that has one of the fields, else the last there is."""
    if len(text) > MAX_REPLY_CHARS:
        raise ModelReplyError(
            f"The reply has {len(text)} characters; answer with one JSON object and nothing else."
        )
    if not text.strip():
        raise ModelReplyError("The reply is empty; answer with one JSON object.")
    answer = text
    if not text.lstrip().startswith("{"):
        # Drafts inside a thinking block are not the answer; its opening tag may be in the prompt.
        answer = text.rpartition("</think>")[2]
        if answer is text and "<think>" in text:
            answer = ""
    objects = [*_objects(answer)]
    fitting = [found for found in objects if fields & found.keys()]
    if not objects:
        raise ModelReplyError(
            "The reply holds no complete JSON object; answer with one and only it."
        )
    return (fitting or objects)[-1]


def _objects(text: str) -> Iterator[dict[str, Any]]:
    decoder = json.JSONDecoder()
    start = text.find("{")
    for _ in range(_MAX_JSON_STARTS):
        if start < 0:
            return
        try:
            found, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            end = start + 1
        else:
            yield found
        start = text.find("{", end)
