"""What happens in a search, as whoever listens is told it.

Nodes of a search and its followers make these values; ``report/board.py`` folds them. Outside (a
log, ``--json``, trackers, whoever streams the graph) each is an object as docs/watching.md has it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from agentmerge.contracts.card import known

#: Hears the objects.
Emit = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class Event:
    event: ClassVar[str]

    def to_json(self) -> dict[str, Any]:
        return {"event": self.event} | {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True, kw_only=True)
class Begun(Event):
    """heeded: whether the strategy takes advice. memory: what was given up to fit. workers: how
    many there are."""

    event = "start"
    run: str
    status: str
    advisers: list[str]
    heeded: bool = True
    memory: str = ""
    workers: int = 1


@dataclass(frozen=True, kw_only=True)
class Evaluate(Event):
    """worker: which one it has, from 1. waiting: candidates that wait for one."""

    event = "evaluate"
    generation: int
    slot: int
    worker: int | None = None
    waiting: int = 0


@dataclass(frozen=True, kw_only=True)
class Evaluated(Event):
    """twin: it has an earlier one's score. past: from before somebody listened."""

    event = "candidate"
    generation: int
    slot: int
    operator: str
    label: str
    score: float | None
    tasks: Mapping[str, float] = field(default_factory=dict)
    failure: str = ""
    estimate: float | None = None
    reused: bool = False
    seconds: float | None = None
    twin: bool = False
    past: bool = False


@dataclass(frozen=True, kw_only=True)
class NoGradient(Event):
    event = "no_gradient"
    failure: str
    generation: int
    slot: int


@dataclass(frozen=True, kw_only=True)
class Generation(Event):
    """All of one is scored. best, leader: the incumbent's score, and its generation and slot."""

    event = "generation"
    generation: int
    evaluations: float
    best: float | None
    leader: list[int] | None = None


@dataclass(frozen=True, kw_only=True)
class Called(Event):
    """A request to a model. tokens: in and out."""

    event = "call"
    role: str
    generation: int
    attempt: int
    ending: str
    error: str
    tokens: list[int]
    cost_usd: float | None
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Advised(Event):
    event = "advice"
    role: str
    generation: int
    source: str
    failure: str
    words: str


@dataclass(frozen=True, kw_only=True)
class Ending(Event):
    event = "finish"
    reason: str


@dataclass(frozen=True, kw_only=True)
class Done(Event):
    """card: empty where nothing was scored."""

    event = "done"
    reason: str
    card: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Note(Event):
    event = "note"
    text: str


_KINDS = {kind.event: kind for kind in Event.__subclasses__()}


def parsed(body: Mapping[str, Any]) -> Event:
    """What an object tells."""
    return known(_KINDS[body["event"]], body)
