"""Which scores the models are told: the Ladder (Blum and Hardt, arXiv 1502.04585).

Whoever sees exact scores of a few hundred items, generation after generation, fits those items. So
an improvement is reported only where it is beyond the noise of a paired comparison with the best so
far; one within it shows that best's score and tasks again. Worse scores are shown as they are.
Knows no items: the noise of a pair is asked for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import is_

from agentmerge.agents.standings import Standings
from agentmerge.contracts.strategy import History, Observation

#: One standard error of the paired difference of two candidates' scores, or 0 where there is none.
Noise = Callable[[Observation, Observation], float]


@dataclass(frozen=True, slots=True)
class Released:
    """entries: the history with the scores that may be shown. tied: (generation, slot) of those
    that cannot be told apart from the best before them."""

    entries: tuple[Observation, ...]
    tied: frozenset[tuple[int, int]]


def release(history: History, noise: Noise) -> Released:
    return Ladder(noise).release(history)


class Ladder:
    """Walks histories in their own order, so that the same past is always told the same way.

    One that goes on where the last one ended is walked from there. noise: the same for a pair
    whenever it is asked. standings: of what is shown. Safe to share between threads.
    """

    def __init__(self, noise: Noise) -> None:
        self._noise = noise
        self.standings = Standings()
        self._lock = threading.Lock()
        self._begin()

    def _begin(self) -> None:
        self._walked: list[Observation] = []
        self._shown: list[Observation] = []
        self._tied: set[tuple[int, int]] = set()
        self._best: Observation | None = None

    def release(self, history: History) -> Released:
        with self._lock:
            if len(history) < len(self._walked) or not all(map(is_, self._walked, history)):
                self._begin()
            for entry in history[len(self._walked) :]:
                self._walked.append(entry)
                self._shown.append(self._step(entry))
            return Released(tuple(self._shown), frozenset(self._tied))

    def _step(self, entry: Observation) -> Observation:
        best = self._best
        if entry.score is None or entry.censored:
            return entry
        if best is None or best.score is None or entry.recipe_hash == best.recipe_hash:
            self._best = best or entry
            return entry
        if entry.score <= best.score:
            return entry
        if entry.score - best.score > self._noise(entry, best):
            self._best = entry
            return entry
        self._tied.add((entry.generation, entry.slot))
        return replace(entry, score=best.score, tasks=best.tasks)
