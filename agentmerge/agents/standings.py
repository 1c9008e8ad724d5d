"""What a history comes to, for the agents' rules: its best few, its rivals, whether it gained.

Worked out once an entry: a history that goes on where the last one ended is walked from there.
"""

from __future__ import annotations

import math
import threading
from bisect import insort
from collections import deque
from dataclasses import dataclass
from operator import is_

from agentmerge.contracts.operators import CHEAP
from agentmerge.contracts.strategy import History, Observation

#: How many are the best few.
ELITES = 4
#: Only so many of the latest candidates are kept to say how axes go with the score.
RECENT = 1_000


@dataclass(frozen=True, slots=True)
class Standing:
    """best: the first with the best score, whatever it is. elites: the best few that have a point
    too, best first. recent: the latest of these. rivals: the parents and the cheap merges, which a
    searched merge has to beat. floor: the worst score, inf where there is none. improved: as
    ``strategy.improved``."""

    best: Observation | None
    elites: tuple[Observation, ...]
    recent: tuple[Observation, ...]
    rivals: tuple[Observation, ...]
    floor: float
    improved: bool


class Standings:
    """Where histories stand; safe to share between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._begin()

    def _begin(self) -> None:
        self._walked: list[Observation] = []
        self._best: Observation | None = None
        self._elites: list[Observation] = []
        self._recent: deque[Observation] = deque(maxlen=RECENT)
        self._rivals: list[Observation] = []
        self._floor = math.inf
        #: The best score before the last generation, and of it.
        self._before = self._last = -math.inf

    def of(self, history: History) -> Standing:
        with self._lock:
            if len(history) < len(self._walked) or not all(map(is_, self._walked, history)):
                self._begin()
            for entry in history[len(self._walked) :]:
                self._add(entry)
            return Standing(
                self._best,
                tuple(self._elites),
                tuple(self._recent),
                tuple(self._rivals),
                self._floor,
                self._last > self._before,
            )

    def _add(self, entry: Observation) -> None:
        if self._walked and self._walked[-1].generation != entry.generation:
            self._before, self._last = max(self._before, self._last), -math.inf
        self._walked.append(entry)
        if entry.operator in CHEAP:
            self._rivals.append(entry)
        if entry.score is None:
            return
        self._last, self._floor = max(self._last, entry.score), min(self._floor, entry.score)
        if self._best is None or entry.score > (self._best.score or 0.0):
            self._best = entry
        if entry.vector is not None:
            self._recent.append(entry)
            insort(self._elites, entry, key=lambda o: (-(o.score or 0.0), o.generation, o.slot))
            del self._elites[ELITES:]
