"""Where a search stands, as a fold over its events; and those events read from the ledger.

``Board`` is what a screen shows. The driver of a search tells it events as they happen; a watcher
elsewhere gets the same kind of events from ``Follower``, which only reads the ledger.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from agentmerge.config import ROLES, SearchConfig
from agentmerge.contracts import events
from agentmerge.contracts.events import Event
from agentmerge.contracts.operators import PARENT, RIVALS, STRUCTURE
from agentmerge.ledger import Candidate, Ledger, RunRow, incumbent
from agentmerge.ledger.rows import whole
from agentmerge.ledger.words import spoken
from agentmerge.recipe.names import short_name
from agentmerge.report.utilisation import LOG, Workers, WorkersLog

#: Which agent speaks after which, for the name of the phase.
_FINISH = "choosing the answer, and asking it the sealed items"
_CHEAP = "best cheap merge"
_NEXT = {"critic": "controller", "controller": "proposer", "proposer": "next generation"}


@dataclass(frozen=True, slots=True)
class Line:
    """A row of the table of scores."""

    name: str
    score: float
    tasks: Mapping[str, float]


@dataclass(slots=True)
class Board:
    """The state of a search. budgets: (name, used, limit), in the order they are shown.

    runs_dir: where its log is, which says what workers do; None: nothing is said of them.
    clocked: whether who tells began with the search, or with its resume: no other knows when its
        wall clock was set.
    """

    config: SearchConfig
    runs_dir: Path | None = None
    clocked: bool = True
    began: float = field(default_factory=time.monotonic)
    run: str = ""
    phase: str = "reading models and tasks"
    generation: int = 0
    current: str = ""
    best: Line | None = None
    rivals: dict[str, Line] = field(default_factory=dict)
    trail: list[float] = field(default_factory=list)
    words: dict[str, str] = field(default_factory=dict)
    evaluations: float = 0
    paid: int = 0
    paid_at: float = 0.0
    failed: int = 0
    tokens: int = 0
    cost_usd: float = 0.0
    reason: str = ""
    _lines: dict[tuple[int, ...], Line] = field(default_factory=dict)
    _log: WorkersLog | None = None

    @property
    def workers(self) -> Workers:
        return self._log.read() if self._log else Workers()

    @property
    def budgets(self) -> list[tuple[str, float, float]]:
        budget = self.config.budget
        found = [("evaluations", float(self.evaluations), float(budget.max_evaluations))]
        if self.config.search.max_generations:
            found.append(("generations", self.generation, self.config.search.max_generations))
        if budget.timeout_s and self.clocked:
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
        if self.config.budget.timeout_s is None or not self.clocked:
            return pace
        return min(pace, max(0.0, self.config.budget.timeout_s - (time.monotonic() - self.began)))

    @property
    def best_parent(self) -> float | None:
        scores = [line.score for name, line in self.rivals.items() if name != _CHEAP]
        return max(scores, default=None)

    def tell(self, event: Event) -> None:
        """Take in one event; kinds that are not shown change nothing."""
        match event:
            case events.Begun():
                self.run, self.began = event.run, time.monotonic()
                if self.runs_dir is not None:
                    self._log = WorkersLog(self.runs_dir / self.run / LOG)
            case events.Evaluate():
                self.generation, self.current = event.generation, f"candidate {event.slot}"
                self.phase = "evaluating"
            case events.Evaluated():
                self._candidate(event)
            case events.Generation():
                self.evaluations = event.evaluations
                self.trail += [] if event.best is None else [event.best]
                self.best = self._lines.get(tuple(event.leader or ()), self.best)
                self._lines.clear()
                spent = self.evaluations >= self.config.budget.max_evaluations
                self.phase, self.current = _FINISH if spent else "critic", ""
            case events.Advised():
                self.phase = _NEXT.get(event.role, "advice")
                if words := " ".join((event.failure or event.words).split()):
                    self.words[event.role] = words
            case events.Called():
                self.tokens += sum(event.tokens)
                self.cost_usd += event.cost_usd or 0.0
            case events.Ending():
                self.phase, self.current = _FINISH, ""
            case events.Done():
                self.phase, self.current, self.reason = "done", "", event.reason

    def _candidate(self, event: events.Evaluated) -> None:
        self.generation = max(self.generation, event.generation)
        self.evaluations += not event.twin
        self.phase = "evaluating"
        if not (event.reused or event.past):
            self.paid, self.paid_at = self.paid + 1, time.monotonic()
        self.failed += bool(event.failure)
        if event.score is None:
            return  # it failed, or lost a race and has an estimate
        name = short_name(event.label) if event.label else ""
        place = f"{event.operator} {event.generation}.{event.slot}"
        line = self._lines[event.generation, event.slot] = Line(
            name or place, event.score, event.tasks
        )
        cheap = self.rivals.get(_CHEAP)
        if event.operator == PARENT:
            self.rivals[f"parent {name}"] = line
        elif event.operator in RIVALS and (cheap is None or line.score > cheap.score):
            self.rivals[_CHEAP] = line
        # Where some are not allowed, which is the best is known once a generation is judged.
        judged = self.config.search.constraints
        if self.best is None or (line.score > self.best.score and not judged):
            self.best = line


class Follower:
    """What happened in a search since one last looked, as events, from the ledger alone.

    Its past comes first, marked ``past``. It writes nothing, so any number may follow.
    """

    def __init__(self, ledger: Ledger, row: RunRow) -> None:
        self.ledger, self.row = ledger, row
        self._generation = 0
        self._seen: set[tuple[int, int]] = set()
        self._said: set[tuple[str | int, ...]] = set()
        self._current: tuple[int, int] | None = None
        self._total = 0.0
        self._best: Candidate | None = None
        self._first = True

    def news(self) -> Iterator[Event]:
        """The events since the last call, in the order they happened."""
        if self._first:
            advisers = [*self.ledger.called_models(self.row.id)]
            yield events.Begun(run=self.row.name, status=self.row.status, advisers=advisers)
        while found := self.ledger.candidates(self.row.id, self._generation, vectors=False):
            yield from self._candidates(found)
            if any(c.state == "open" for c in found):
                break
            if self._unsaid(""):
                self._best = incumbent([*([self._best] if self._best else []), *found])
                yield whole(self._generation, self._total, self._best)
            yield from self._words()
            if not self.ledger.candidates(self.row.id, self._generation + 1, vectors=False):
                break
            self._generation += 1
        self.row = self.ledger.run(self.row.id)
        if self.row.status == "done":
            yield events.Done(reason=self.row.stop_reason, card=self.row.result or {})
        self._first = False

    def _unsaid(self, *what: str | int) -> bool:
        """Whether this of the generation is new; from now on it is not."""
        key = (self._generation, *what)
        new = key not in self._said
        self._said.add(key)
        return new

    def _candidates(self, found: list[Candidate]) -> Iterator[Event]:
        for candidate in found:
            at = (candidate.generation, candidate.slot)
            if at in self._seen or candidate.prior:
                continue
            if candidate.state == "open":
                if at != self._current:
                    self._current = at
                    yield events.Evaluate(generation=at[0], slot=at[1])
                return  # a worker takes them in order
            self._seen.add(at)
            self._total += candidate.cost
            yield candidate.event(self._first)

    def _words(self) -> Iterator[Event]:
        calls = self.ledger.calls(self.row.id, self._generation)
        for (role, prompt, attempt), call in calls.items():
            if self._unsaid(role, prompt, attempt):
                yield call.event(role, self._generation, attempt)
        said = {word["role"]: word for word in self.ledger.advice(self.row.id, self._generation)}
        for role in (*ROLES, STRUCTURE):
            if role in said and self._unsaid(role):
                yield spoken(said[role])
