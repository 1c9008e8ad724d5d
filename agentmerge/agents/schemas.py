"""What an agent may say, and the one place where its words become numbers.

Knows the reply of each role, its JSON schema and how to find it in a model's text; and Guidance,
what a strategy is given. Knows no provider, no prompt and no search space: only how many
dimensions there are and how far a step may go.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from agentmerge.contracts.advice import bounded_score
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
class Bounds:
    """What a reply is checked against: dimensions of the space, the least and widest step, and what
    a structural move may name; deeper: layers that one may add; absent: of a pool of experts those
    that are not merged, of which one may join them where there is room."""

    dimensions: int
    sigma_low: float
    sigma_high: float
    layers: int = 0
    methods: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    deeper: int = 0
    absent: tuple[str, ...] = ()
    room: bool = False

    @property
    def joining(self) -> tuple[str, ...]:
        """What add_model may name."""
        return self.absent if self.room else ()

    @property
    def swaps(self) -> tuple[str, ...]:
        """What swap_model may name."""
        return tuple(f"{out} -> {into}" for out in self.models for into in self.absent)


# Strict: true, "12" and null are not numbers, however kindly pydantic would read them.
Number = Annotated[float, Strict()]


def _checked_genome(value: list[float], info: ValidationInfo) -> list[float]:
    dimensions = _bounds(info).dimensions
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


def _checked_score(value: float | None) -> float | None:
    if value is not None and bounded_score(value) is None:
        raise ValueError(f"{value:g} is no score; give one that a merge may reach, or null")
    return value


Score = Annotated[Number | None, AfterValidator(_checked_score)]
Genome = Annotated[list[Number], AfterValidator(_checked_genome)]
Text = Annotated[str, AfterValidator(lambda text: clean_text(text, _MAX_TEXT))]


class _Reply(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class ProposedMove(_Reply):
    """A structural move as a model says it; "none" is no move."""

    change: Literal[
        "none", "method", "granularity", "filters", "drop_model", "layers", "add_model",
        "swap_model",
    ]  # fmt: skip
    value: str = ""
    why: str = ""

    @field_validator("why")
    @classmethod
    def _clean(cls, value: str) -> str:
        return clean_text(value, _MAX_FINDING)

    @model_validator(mode="after")
    def _possible(self, info: ValidationInfo) -> ProposedMove:
        bounds, value = _bounds(info), self.value.strip()
        if self.change == "method" and value not in bounds.methods:
            raise ValueError(f"{value[:40]!r} is no merge method; use {', '.join(bounds.methods)}")
        if self.change == "drop_model" and value not in bounds.models:
            raise ValueError(f"{value[:40]!r} is no model here; use {', '.join(bounds.models)}")
        if self.change == "add_model" and value not in bounds.joining:
            raise ValueError(
                f"{value[:40]!r} cannot join; of these one may: {_some(bounds.joining)}"
            )
        if self.change == "swap_model" and value not in bounds.swaps:
            raise ValueError(
                f"{value[:80]!r} is no swap here; write one as {_some(bounds.swaps[:1])}"
            )
        if self.change == "granularity" and not _divides(value, bounds.layers):
            raise ValueError(f"{value[:40]!r} does not divide the {bounds.layers} layers")
        if self.change == "layers" and not bounds.deeper:
            raise ValueError("no layers can be searched here")
        if self.change == "filters" and not _FILTERS.fullmatch(value):
            raise ValueError(f"{value[:40]!r} is no list of parts of tensor names, such as mlp")
        return self


def _some(names: Sequence[str]) -> str:
    return ", ".join(names) or "there is none"


_FILTERS = re.compile(r"(?:[A-Za-z0-9_.]{1,60}(?:\s*,\s*[A-Za-z0-9_.]{1,60}){0,7})?")


def _divides(value: str, layers: int) -> bool:
    """0 is one group for the whole model."""
    if not value.isascii() or not value.isdigit() or len(value) > 6:
        return False
    return int(value) == 0 or (layers > 0 and layers % int(value) == 0)


class ProposedCandidate(_Reply):
    """A whole candidate, and the score expected of it."""

    genome: Genome
    expected_score: Score = None

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, value: Any) -> Any:
        return {"genome": value} if isinstance(value, list) else value


class ProposerReply(_Reply):
    """Where to look next, in integers 0..100 of the unit box, and the scores expected there."""

    thought: Text
    mean_genome: Genome
    candidates: list[ProposedCandidate] = Field(default_factory=list)
    expected_score: Score = None
    structural_move: ProposedMove | None = None

    @field_validator("candidates", mode="before")
    @classmethod
    def _few(cls, value: Any) -> Any:
        return value[:MAX_CANDIDATES] if isinstance(value, list) else value


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

    thought: Text
    sigma: Number

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


R = TypeVar("R", bound=BaseModel)


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
    score = {"type": ["number", "null"]}
    properties: dict[type[_Reply], dict[str, Any]] = {
        ProposerReply: {
            "thought": text,
            "mean_genome": genome,
            "candidates": {
                "type": "array",
                "items": closed({"genome": genome, "expected_score": score}),
                "maxItems": MAX_CANDIDATES,
            },
            "expected_score": score,
            "structural_move": {"anyOf": [*_possible_moves(bounds)]},
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
    return {"title": reply.__name__} | closed(properties[reply])


def _possible_moves(bounds: Bounds) -> Iterator[dict[str, Any]]:
    """A schema a change with its possible values: a small model takes what it is offered."""
    steps = ["0", *(str(n) for n in range(1, bounds.layers + 1) if bounds.layers % n == 0)]
    values: dict[str, Sequence[str]] = {
        "none": [""],
        "method": bounds.methods,
        "granularity": steps,
        "drop_model": bounds.models,
        "layers": [""] * bool(bounds.deeper),
        "add_model": bounds.joining,
        "swap_model": bounds.swaps,
    }
    for change in get_args(ProposedMove.model_fields["change"].annotation):
        value: dict[str, Any] = {"type": "string"}
        if change in values:
            value["enum"] = [*values[change]]
        if value.get("enum", True):
            one = {"type": "string", "enum": [change]}
            yield closed({"change": one, "value": value, "why": {"type": "string"}})


def closed(properties: dict[str, Any]) -> dict[str, Any]:
    """An object with exactly these properties."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def parse_reply(text: str, reply: type[R], bounds: Any, without: Sequence[str] = ()) -> R:
    """The reply in a model's text: bare, fenced, after a <think> block, or amid prose.

    bounds: what the reply's own checks go by; ``Bounds`` for agents' replies.
    without: fields that are left at their defaults, whatever the text says of them.

    Raises ModelReplyError with one sentence that can be shown to the model.
    """
    found = _find_object(text, set(reply.model_fields))
    found = {name: value for name, value in found.items() if name not in without}
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


def bounded_lines(lines: Sequence[str], limit: int) -> str:
    """As many whole lines as fit, and the first in any case."""
    kept: list[str] = []
    for line in lines:
        if kept and sum(len(k) + 1 for k in kept) + len(line) > limit:
            break
        kept.append(line)
    return "\n".join(kept)


def _bounds(info: ValidationInfo) -> Bounds:
    assert isinstance(info.context, Bounds), "replies are validated by parse_reply"
    return info.context


def _sentence(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    message = error["msg"].removeprefix("Value error, ").rstrip(".")
    return (f"{where}: {message}" if where else str(message))[:_MAX_FINDING] + "."


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
