"""Where a search stands, as a fold over its events; and those events read from the ledger.

``Board`` is what a screen shows. The driver of a search tells it events as they happen; a watcher
elsewhere gets the same kind of events from ``Follower``, which only reads the ledger.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from agentmerge.config import SearchConfig
from agentmerge.contracts.operators import PARENT, RIVALS, STRUCTURE
from agentmerge.ledger import Candidate, Ledger, RunRow
from agentmerge.ledger.rows import counted
from agentmerge.space.grouped import short_name

Event = Mapping[str, Any]

#: Which agent speaks after which, for the name of the phase.
_FINISH = "choosing the answer, and asking it the sealed items"
_NEXT = {"critic": "controller", "controller": "proposer", "proposer": "next generation"}


@dataclass(frozen=True, slots=True)
class Line:
    """A row of the table of scores."""

    name: str
    score: float
    tasks: Mapping[str, float]


@dataclass(slots=True)
class Board:
    """The state of a search. budgets: (name, used, limit), in the order they are shown."""

    config: SearchConfig
    began: float = field(default_factory=time.monotonic)
    run: str = ""
    phase: str = "reading models and tasks"
    generation: int = 0
    current: str = ""
    best: Line | None = None
    rivals: dict[str, Line] = field(default_factory=dict)
    trail: list[float] = field(default_factory=list)
    words: dict[str, str] = field(default_factory=dict)
    advisers: tuple[str, ...] = ()
    evaluations: float = 0
    paid: int = 0
    paid_at: float = 0.0
    failed: int = 0
    tokens: int = 0
    cost_usd: float = 0.0
    reason: str = ""

    def tell(self, event: Event) -> None:
        """Take in one event; kinds that are not shown change nothing."""
        kind = str(event["event"])
        if kind in _FOLDS:
            _FOLDS[kind](self, event)

    @property
    def budgets(self) -> list[tuple[str, float, float]]:
        budget = self.config.budget
        found = [("evaluations", float(self.evaluations), float(budget.max_evaluations))]
        if self.config.search.max_generations:
            found.append(("generations", self.generation, self.config.search.max_generations))
        if budget.timeout_s:
            found.append(("seconds", time.monotonic() - self.began, budget.timeout_s))
        if budget.max_tokens:
            found.append(("tokens", self.tokens, budget.max_tokens))
        if budget.max_cost_usd:
            found.append(("dollars", self.cost_usd, budget.max_cost_usd))
        return found

    @property
    def seconds_left(self) -> float | None:
        """What the rest of the budget takes at the pace so far; None before anything was paid."""
        left = self.config.budget.max_evaluations - self.evaluations
        if not self.paid or self.reason or self.phase == _FINISH:
            return None
        # As it was when the last one came: a pace that a clock moves on would rise until the next.
        pace = (self.paid_at - self.began) / self.paid * left
        pace = max(0.0, pace - (time.monotonic() - self.paid_at))
        if self.config.budget.timeout_s is None:
            return pace
        return min(pace, max(0.0, self.config.budget.timeout_s - (time.monotonic() - self.began)))

    def _start(self, event: Event) -> None:
        self.run = event["run"]
        self.advisers = tuple(event.get("advisers", ()))

    def _evaluate(self, event: Event) -> None:
        self.generation = event["generation"]
        self.current = f"candidate {event['slot']}"
        self.phase = "evaluating"

    def _candidate(self, event: Event) -> None:
        self.generation = max(self.generation, event["generation"])
        self.evaluations += not event.get("twin", False)
        self.phase = "evaluating"
        if not (event["reused"] or event.get("past", False)):
            self.paid, self.paid_at = self.paid + 1, time.monotonic()
        score = event["score"]
        if score is None:
            self.failed += bool(event["failure"])  # else it lost a race, and has an estimate
            return
        name = short_name(event["label"]) if event["label"] else ""
        line = Line(name or f"{event['operator']} {event['generation']}.{event['slot']}", score,
                    event["tasks"])  # fmt: skip
        if event["operator"] == PARENT:
            self.rivals[f"parent {name}"] = line
        elif event["operator"] in RIVALS:
            before = self.rivals.get("best cheap merge")
            if before is None or score > before.score:
                self.rivals["best cheap merge"] = line
        if self.best is None or score > self.best.score:
            self.best = line

    def _generation(self, event: Event) -> None:
        self.evaluations = event["evaluations"]
        if event["best"] is not None:
            self.trail.append(event["best"])
        spent = self.evaluations >= self.config.budget.max_evaluations
        self.phase, self.current = _FINISH if spent else "critic", ""

    def _advice(self, event: Event) -> None:
        self.phase = _NEXT.get(event["role"], "advice")
        words = event["failure"] or event["words"] or ""
        if words:
            self.words[event["role"]] = " ".join(words.split())

    def _call(self, event: Event) -> None:
        self.tokens += sum(event["tokens"])
        self.cost_usd += event["cost_usd"] or 0.0

    def _finish(self, event: Event) -> None:
        self.phase, self.current = _FINISH, ""

    def _done(self, event: Event) -> None:
        self.phase, self.current, self.reason = "done", "", event["reason"]


_FOLDS = {
    "start": Board._start,
    "evaluate": Board._evaluate,
    "candidate": Board._candidate,
    "generation": Board._generation,
    "advice": Board._advice,
    "call": Board._call,
    "finish": Board._finish,
    "done": Board._done,
}


class Follower:
    """What happened in a search since one last looked, as events, from the ledger alone.

    Its past comes first, marked ``past``. It writes nothing, so any number may follow.
    """

    def __init__(self, ledger: Ledger, row: RunRow) -> None:
        self.ledger, self.row = ledger, row
        self._generation = 0
        self._seen: set[tuple[int, int]] = set()
        self._said: set[tuple[int, str]] = set()
        self._current: tuple[int, int] | None = None
        self._total = 0.0
        self._best: float | None = None
        self._first = True

    def news(self) -> Iterator[dict[str, Any]]:
        """The events since the last call, in the order they happened."""
        if self._first:
            advisers = [*self.ledger.called_models(self.row.id)]
            yield {"event": "start", "run": self.row.name, "status": self.row.status} | {
                "advisers": advisers,
                "memory": "",
            }
        while found := self.ledger.candidates(self.row.id, self._generation):
            yield from self._candidates(found)
            if any(c.state == "open" for c in found):
                break
            yield from self._whole()
            yield from self._words()
            if not self.ledger.candidates(self.row.id, self._generation + 1):
                break
            self._generation += 1
        self.row = self.ledger.run(self.row.id)
        if self.row.status == "done":
            yield {"event": "done", "reason": self.row.stop_reason, "card": self.row.result}
        self._first = False

    def _candidates(self, found: list[Candidate]) -> Iterator[dict[str, Any]]:
        for candidate in found:
            at = (candidate.generation, candidate.slot)
            if at in self._seen or candidate.prior:
                continue
            if candidate.state == "open":
                if at != self._current:
                    self._current = at
                    yield {"event": "evaluate", "generation": at[0], "slot": at[1]}
                return  # a worker takes them in order
            self._seen.add(at)
            self._total += candidate.cost
            if candidate.score is not None and candidate.twin is None:
                self._best = max(candidate.score, self._best or candidate.score)
            yield {
                "event": "candidate",
                "generation": at[0],
                "slot": at[1],
                "operator": candidate.operator,
                "label": candidate.label,
                "score": candidate.score,
                "tasks": dict(candidate.tasks),
                "failure": candidate.failure,
                "estimate": candidate.estimate,
                "reused": candidate.reused,
                "seconds": candidate.seconds,
                "twin": candidate.twin is not None,
                "past": self._first,
            }

    def _whole(self) -> Iterator[dict[str, Any]]:
        if (self._generation, "") not in self._said:
            self._said.add((self._generation, ""))
            yield {"event": "generation", "generation": self._generation} | {
                "evaluations": counted(self._total),
                "best": self._best,
            }

    def _words(self) -> Iterator[dict[str, Any]]:
        order = ("critic", "controller", "proposer", STRUCTURE)
        said = {word["role"]: word for word in self.ledger.advice(self.row.id, self._generation)}
        for role in (role for role in order if role in said):
            if (self._generation, role) in self._said:
                continue
            self._said.add((self._generation, role))
            guidance = said[role]["guidance"]
            words = guidance.get("thought" if role in ("proposer", STRUCTURE) else "critique") or ""
            yield {"event": "advice", "role": role, "generation": self._generation} | {
                "source": guidance.get("source", "rules"),
                "failure": said[role].get("failure") or "",
                "words": words,
            }
