"""Rows of the results database as values. Knows no SQL."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from agentmerge.contracts.card import Card
from agentmerge.contracts.events import Evaluated, Generation
from agentmerge.contracts.strategy import GRADIENT_COST, Observation
from agentmerge.contracts.worker import EngineInfo, Loss


@dataclass(frozen=True, slots=True)
class Candidate:
    """A row of the candidates table: what was proposed and what came of it.

    state: "open" (not scored yet), "scored", "failed", "twin" (the same merge as an earlier
        candidate of this run; its score is the earlier one's and it cost nothing) or "stopped" (it
        lost a race against the incumbent: no score, an estimate).
    prior: scored under other settings before a branch: known to strategies, never the best.
    want, loss_kind: as the proposal's; a gradient of a merge that this run has scored already has
        that one for its twin, and its own state.
    loss, gradient: what the gradient is of, and the gradient in the unit box.
    estimate: of a loser, the incumbent's score plus the paired difference on the items of its rung.
    rung: the fraction of every task that it was asked; share: of all items.
    violation: what it lacks to the floors of the constraints, in the metrics' units.
    space: the key of the search space that ``vector`` lies in; "" is the config's own.
    tokens: generated an item, of the tasks that generate; None where none does, or nobody counted.
    """

    generation: int
    slot: int
    operator: str
    label: str
    vector: tuple[float, ...] | None
    recipe_hash: str
    state: str
    score: float | None = None
    tasks: tuple[tuple[str, float], ...] = ()
    failure: str = ""
    reused: bool = False
    twin: tuple[int, int] | None = None
    truncated: int = 0
    cut_off: int = 0
    seconds: float | None = None
    prior: bool = False
    want: Literal["score", "gradient"] = "score"
    loss_kind: Loss | None = None
    loss: float | None = None
    gradient: tuple[float, ...] | None = None
    estimate: float | None = None
    rung: float = 1.0
    share: float = 1.0
    violation: float = 0.0
    space: str = ""
    tokens: float | None = None

    @property
    def cost(self) -> float:
        """What it took of the budget, in scores, once it is scored, stopped or failed."""
        differentiated = self.want == "gradient" and self.state == "scored"
        return (self.twin is None) * self.share + GRADIENT_COST * differentiated

    @property
    def observed(self) -> bool:
        """Whether strategies are told of it: it was scored, stopped or failed."""
        known = self.score is not None or self.estimate is not None or bool(self.failure)
        return known and self.state != "open"

    @property
    def rank(self) -> tuple[float, float, int, int]:
        """Of scored ones the smallest is the best: fewer faults, more score, earlier."""
        return self.violation, -(self.score or 0.0), self.generation, self.slot

    def event(self, past: bool = False) -> Evaluated:
        return Evaluated(
            generation=self.generation,
            slot=self.slot,
            operator=self.operator,
            label=self.label,
            score=self.score,
            tasks=dict(self.tasks),
            failure=self.failure,
            estimate=self.estimate,
            reused=self.reused,
            seconds=self.seconds,
            twin=self.twin is not None,
            past=past,
        )

    def observation(self) -> Observation:
        return Observation(
            self.generation,
            self.slot,
            self.vector,
            self.operator,
            self.estimate if self.score is None else self.score,
            self.tasks,
            self.recipe_hash,
            self.label,
            self.failure,
            self.gradient,
            self.loss,
            rung=1.0 if self.score is not None else self.rung,
            violation=self.violation,
            space=self.space,
            prior=self.prior,
            tokens=self.tokens,
        )


@dataclass(frozen=True, slots=True)
class RunRow:
    id: str
    name: str
    created: float
    status: str
    stop_reason: str
    config: str
    settings_hash: str
    seed: int
    algorithm: str
    parent_run: str | None
    parent_generation: int | None
    facts: dict[str, Any]
    result: dict[str, Any] | None

    @property
    def card(self) -> Card:
        """The result as a value; an empty one before there is one."""
        return Card.parse(self.result or {})


@dataclass(frozen=True, slots=True)
class ResultKey:
    """What a block of item results belongs to, besides its items."""

    recipe_hash: str
    engine: EngineInfo
    protocol_hash: str


@dataclass(frozen=True, slots=True)
class GradientKey:
    """What a gradient belongs to; ``question``: a hash of the loss, the items and their weights."""

    recipe_hash: str
    engine: EngineInfo
    question: str


def counted(cost: float) -> float:
    """A sum of costs as people read it: a whole number where no race was stopped early."""
    return int(cost) if float(cost).is_integer() else round(cost, 2)


def incumbent(candidates: Sequence[Candidate]) -> Candidate | None:
    """The best candidate scored under the present settings: least violation, then best score."""
    scored = [c for c in candidates if c.score is not None and not c.prior and c.twin is None]
    return min(scored, key=lambda c: c.rank, default=None)


def whole(generation: int, cost: float, best: Candidate | None) -> Generation:
    """That all of a generation is scored. cost: of all so far. best: the incumbent."""
    return Generation(
        generation=generation,
        evaluations=counted(cost),
        best=best.score if best else None,
        leader=[best.generation, best.slot] if best else None,
    )


def evaluations(candidates: Sequence[Candidate]) -> float:
    """How much of the budget is used: every distinct merge of this search, failed ones too, every
    gradient as three, and of a race's loser the share of the items that it was asked.

    A merge that another search paid for counts as well, so that a search does not depend on what
    else is in the ledger; a twin does not. Candidates still open are not counted.
    """
    done = ("scored", "stopped", "failed")
    return math.fsum(c.cost for c in candidates if c.state in done and not c.prior)
