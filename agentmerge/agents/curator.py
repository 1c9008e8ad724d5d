"""The curator: says which few experts of a pool are worth merging.

Knows its prompt, its reply and what it is told of each expert: names, cards, what weights and own
scores show. What others wrote in a card is quoted as data. Without a model there is no curator:
the rule of ``search.models`` has chosen already, and what is named here is only tried against it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from agentmerge.agents.prompts import Message, Prompts
from agentmerge.agents.schemas import Score, Text, clean_text, closed
from agentmerge.agents.view import HistoryView, variables
from agentmerge.contracts.advice import Guidance, Subset
from agentmerge.contracts.operators import PARENT
from agentmerge.contracts.strategy import Observation
from agentmerge.recipe.names import short_name

#: Subsets that are tried at most; each costs a trial.
MAX_SUBSETS = 3
#: Characters of all experts' cards together, and of one.
MAX_CARDS, MAX_CARD = 12_000, 600
_MAX_WHY = 300


@dataclass(frozen=True, slots=True)
class PoolBounds:
    """What a reply is checked against. names: the experts. most: of a subset. lenient: subsets that
    cannot be are left out, as long as another one can."""

    names: tuple[str, ...]
    most: int
    lenient: bool = False


@dataclass(frozen=True, slots=True)
class PoolView:
    """What a curator may know. history: what was scored so far, each expert alone among it.
    facts: expert -> what its weights and its card show, in plain JSON."""

    history: HistoryView
    facts: Mapping[str, Mapping[str, Any]]
    most: int

    @property
    def bounds(self) -> PoolBounds:
        return PoolBounds(tuple(map(short_name, self.facts)), self.most)


class ProposedSubset(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")
    models: list[str]
    why: str = ""
    expected_score: Score = None

    @field_validator("models")
    @classmethod
    def _once(cls, value: list[str]) -> list[str]:
        return [*dict.fromkeys(name.strip() for name in value)]


class CuratorReply(BaseModel):
    """Which experts are worth merging, the best subset first."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    thought: Text = ""
    subsets: list[ProposedSubset]

    @field_validator("subsets")
    @classmethod
    def _possible(cls, value: list[ProposedSubset], info: ValidationInfo) -> list[ProposedSubset]:
        bounds = info.context
        assert isinstance(bounds, PoolBounds), "replies are validated by parse_reply"
        faults = [_fault(subset, bounds) for subset in value]
        kept = [s for s, fault in zip(value, faults, strict=True) if not fault]
        if not kept or (len(kept) < len(value) and not bounds.lenient):
            raise ValueError(
                next(filter(None, faults), "it is empty; name a subset of the experts")
            )
        once = {frozenset(subset.models): subset for subset in reversed(kept)}
        return [s for s in kept if once[frozenset(s.models)] is s][:MAX_SUBSETS]


def _fault(subset: ProposedSubset, bounds: PoolBounds) -> str:
    unknown = sorted(set(subset.models) - set(bounds.names))
    if unknown:
        return (
            f"{clean_text(unknown[0], 40)!r} is no expert here; write names as they are given, "
            f"such as {bounds.names[0]!r}"
        )
    if not 2 <= len(subset.models) <= bounds.most:
        return f"a subset has {len(subset.models)} experts; name 2 to {bounds.most}"
    return ""


def schema(bounds: PoolBounds) -> dict[str, Any]:
    """The reply's JSON schema, as ``schemas.json_schema`` writes the others'."""
    text = {"type": "string"}
    models = {
        "type": "array",
        "items": {"type": "string", "enum": [*bounds.names]},
        "minItems": 2,
        "maxItems": bounds.most,
    }
    score = {"type": ["number", "null"]}
    subset = closed({"models": models, "why": text, "expected_score": score})
    subsets = {"type": "array", "items": subset, "minItems": 1, "maxItems": MAX_SUBSETS}
    return {"title": CuratorReply.__name__} | closed({"thought": text, "subsets": subsets})


def messages(view: PoolView, prompts: Prompts) -> list[Message]:
    told = variables(view.history) | {
        "experts": _experts(view),
        "noise": _noise(view.history),
        "most": str(view.most),
        "max_subsets": str(MAX_SUBSETS),
    }
    return prompts.curator.render(**told)


def subsets_of(reply: CuratorReply, names: Sequence[str]) -> tuple[Subset, ...]:
    """What was proposed, each in the pool's order. names: the pool's."""
    return tuple(
        Subset(
            tuple(name for name in names if name in said.models),
            clean_text(said.why, _MAX_WHY),
            said.expected_score,
        )
        for said in reply.subsets
    )


def guidance(reply: CuratorReply | None) -> Guidance:
    if reply is None:
        return Guidance(thought="The rule's choice stands.")
    said = " or ".join(", ".join(subset.models) for subset in reply.subsets)
    return replace(Guidance(), thought=f"{said}. {reply.thought}".strip(), source="model")


def _experts(view: PoolView) -> str:
    """A line of JSON an expert: in it no text can end its own quotes."""
    scores = {short_name(e.label): e for e in _alone(view.history.released)}
    most = min(MAX_CARD, MAX_CARDS // max(len(view.facts), 1))
    lines = []
    for name, facts in view.facts.items():
        told: dict[str, Any] = {"name": short_name(name)}
        if (entry := scores.get(told["name"])) is not None:
            told |= {"score": _rounded(entry.score), "tasks": _by_task(entry.tasks)}
        told |= {key: _told(value, most) for key, value in facts.items() if value}
        lines.append(json.dumps(told, ensure_ascii=False))
    return "\n".join(lines)


def _alone(history: HistoryView) -> list[Observation]:
    """What each showed last: a branch asks them once more."""
    latest = {e.label: e for e in history.entries if e.operator == PARENT}
    return [e for e in latest.values() if e.score is not None]


def _noise(history: HistoryView) -> str:
    """How far apart the best two must be for a difference to count."""
    best = sorted(_alone(history), key=lambda e: -(e.score or 0.0))[:2]
    return f"about {history.noise(*best):.3f}" if len(best) > 1 else "unknown"


def _by_task(tasks: Sequence[tuple[str, float]]) -> dict[str, float | None]:
    return {name: _rounded(value) for name, value in tasks}


def _told(value: Any, most: int) -> Any:
    if isinstance(value, float):
        return _rounded(value)
    return clean_text(value, most) if isinstance(value, str) else value


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
