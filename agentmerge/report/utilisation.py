"""What a search's workers do and how much of their time was used, as a fold over its log.

Whoever drives a search, follows it or reads of it later folds the same lines, so all say the same.
It knows events and their times, no ledger. A search without a log has nothing to say of workers.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agentmerge.contracts import events
from agentmerge.contracts.events import Event, parsed
from agentmerge.errors import UserError
from agentmerge.ledger import Ledger, RunRow
from agentmerge.system.bounded import refuse_odd_file

LOG = "log.jsonl"
#: Events that say something of workers, as they begin a line's text.
_TELLING = ("start", "evaluate", "candidate", "finish", "done")
#: Bytes of a line that is looked at; of a log that is read at once.
_LONGEST, _CHUNK = 65_536, 1 << 24
#: More of anything is none of ours.
MOST_WORKERS = 100_000


@dataclass(slots=True)
class Workers:
    """number: of workers. waiting: candidates that wait for one, as the last one began.

    at_work: (generation, slot) -> the number of the worker that began it, and since when. done,
    busy_s: a worker's candidates that have ended, and the seconds of those.
    """

    number: int = 0
    waiting: int = 0
    at_work: dict[tuple[int, int], tuple[int, float]] = field(default_factory=dict)
    done: Counter[int] = field(default_factory=Counter)
    busy_s: dict[int, float] = field(default_factory=dict)
    _before_s: float = 0.0  # of all workers, in sessions that are over
    _from: float | None = None
    _until: float = 0.0

    def tell(self, event: Event, at: float) -> None:
        """Take in what happened at a time, in seconds since the epoch."""
        match event:
            case events.Begun():
                self._end()
                self.number = event.workers
            case events.Evaluate(worker=int(worker)):
                self._from, self._until = self._from or at, at
                self.at_work[event.generation, event.slot] = worker, at
                self.waiting = event.waiting
            case events.Evaluated(past=False):
                began = self.at_work.pop((event.generation, event.slot), None)
                if began is not None:
                    worker, since = began
                    self._until = max(self._until, at)
                    self.done[worker] += 1
                    self.busy_s[worker] = self.busy_s.get(worker, 0.0) + max(0.0, at - since)
            case events.Ending() | events.Done():
                self._end()

    def _end(self) -> None:
        """Nobody is at work: whoever was is gone."""
        if self._from is not None:
            self._before_s += self.number * (self._until - self._from)
        self.at_work.clear()
        self._from, self.waiting = None, 0

    def used(self, now: float | None = None) -> float | None:
        """The share of their time that they were at work; now: with what they are at."""
        whole, busy = self._before_s, sum(self.busy_s.values())
        if self._from is not None:
            until = self._until if now is None else max(now, self._until)
            whole += self.number * (until - self._from)
            busy += sum(max(0.0, until - since) for _, since in self.at_work.values())
        return min(1.0, busy / whole) if whole > 0 else None

    def sentence(self, now: float | None = None) -> str:
        """Of several workers; "" where there is one, or nothing is known."""
        if self.number < 2 or (used := self.used(now)) is None:
            return ""
        share = f"{used:.0%} of their time used".replace("%", " %", 1)
        if now is None:
            return f"{self.number} workers, {share}"
        waiting = f"{self.waiting} waiting, " if self.waiting else ""
        return f"workers: {len(self.at_work)} of {self.number} at work, {waiting}{share}"

    def to_json(self, now: float | None = None) -> dict[str, Any]:
        """{number, at_work, waiting, used, each}. now: where it is being driven."""
        at = {} if now is None else self.at_work
        has = {worker: (candidate, since) for candidate, (worker, since) in at.items()}
        rows = []
        for worker in range(1, max([self.number, *self.done]) + 1):
            candidate, since = has.get(worker, (None, 0.0))
            rows.append(
                {
                    "worker": worker,
                    "candidate": None if candidate is None else list(candidate),
                    "for_s": None if candidate is None else round(max(0.0, (now or 0) - since), 1),
                    "candidates": self.done[worker],
                    "busy_s": round(self.busy_s.get(worker, 0.0), 1),
                }
            )
        used = self.used(now)
        return {
            "number": self.number,
            "at_work": len(at),
            "waiting": 0 if now is None else self.waiting,
            "used": None if used is None else round(used, 3),
            "each": rows,
        }


class WorkersLog:
    """A log that is read on from where it was read before."""

    def __init__(self, path: Path) -> None:
        self._path, self._read_to = path, 0
        self._workers = Workers()

    def read(self) -> Workers:
        """As of its last whole line; what cannot be read says nothing."""
        try:
            refuse_odd_file(self._path, UserError)
            with self._path.open("rb") as log:
                log.seek(self._read_to)
                while lines := log.readlines(_CHUNK):
                    for line in lines:
                        if not line.endswith(b"\n"):
                            return self._workers  # it is being written
                        self._read_to += len(line)
                        self._tell(line)
        except (OSError, UserError):
            pass
        return self._workers

    def _tell(self, line: bytes) -> None:
        if len(line) > _LONGEST or not any(f'"event": "{e}"'.encode() in line for e in _TELLING):
            return
        try:
            body = json.loads(line)
            event, at = parsed(body), float(body["time"])
            numbers = [body.get(name) or 0 for name in ("worker", "workers", "waiting")]
            if not math.isfinite(at) or not all(0 <= n <= MOST_WORKERS for n in numbers):
                return
            if not all(isinstance(body.get(name, 0), int) for name in ("generation", "slot")):
                return
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            return  # torn by a power cut, or written by whoever
        self._workers.tell(event, at)


def workers_of(ledger: Ledger, row: RunRow, *, running: bool) -> dict[str, Any]:
    """{"workers": as ``Workers.to_json``, "sentence"}; {} where nothing is known of them."""
    found = WorkersLog(ledger.path.parent / row.name / LOG).read()
    now = time.time() if running else None
    if found.used(now) is None:
        return {}
    return {"workers": found.to_json(now) | {"sentence": found.sentence(now)}}
