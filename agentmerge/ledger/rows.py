"""Rows of the results database as values. Knows no SQL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from agentmerge.strategies.base import Observation
from agentmerge.workers.base import EngineInfo


@dataclass(frozen=True, slots=True)
class Candidate:
    """A row of the candidates table: what was proposed and what came of it.

    state: "open" (not scored yet), "scored", "failed" or "twin" (the same merge as an earlier
        candidate of this run; its score is the earlier one's and it cost nothing).
    prior: scored under other settings before a branch: known to strategies, never the best.
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

    def observation(self) -> Observation:
        return Observation(
            self.generation,
            self.slot,
            self.vector,
            self.operator,
            self.score,
            self.tasks,
            self.recipe_hash,
            self.label,
            self.failure,
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


@dataclass(frozen=True, slots=True)
class ResultKey:
    """What a block of item results belongs to, besides its items."""

    recipe_hash: str
    engine: EngineInfo
    protocol_hash: str
