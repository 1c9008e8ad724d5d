"""Places for workers, with a thread each, so that whoever waits for one can give it up.

Knows how long a candidate may take, and no process: what is given up goes on by itself until
somebody ends it (``pool.py``).
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from agentmerge.contracts.worker import Hosted, Worker
from agentmerge.errors import NotBegun, RunFailed, WorkerLost
from agentmerge.workers.processes import GIVEN_UP

T = TypeVar("T")

#: Without a limit of the user's a candidate may take so many times what the slowest took an item,
TIMES = 20
#: and never less than this.
FLOOR_S = 600.0
INTERRUPTED = "whoever waited for this candidate was interrupted; it stays open"


class Late(Exception):
    """What was asked is not done yet."""


class NoLongerAwaited(NotBegun):
    """Nobody waits any more for what was asked."""


@dataclass
class Deadlines:
    """How long what is asked of a worker may take.

    asked_s: a candidate, as the user says (``worker.timeout_s``); by default it is ``TIMES`` what
        the slowest took, and nothing until one was scored. slowest_s: an item of that one.
    ends: ``time.monotonic`` value at which whatever runs is ended, or None.
    """

    asked_s: float | None = None
    ends: float | None = None
    slowest_s: float = 0.0

    def of(self, items: int) -> float:
        """Seconds that so many items may take."""
        if self.asked_s is not None:
            return self.asked_s
        return max(FLOOR_S, TIMES * self.slowest_s * items) if self.slowest_s else math.inf

    @property
    def why(self) -> str:
        if self.asked_s is not None:
            return "worker.timeout_s"
        return f"{TIMES} times what the slowest took; worker.timeout_s sets another limit"

    def took(self, seconds: float, items: int) -> None:
        self.slowest_s = max(self.slowest_s, seconds / max(1, items))

    @property
    def left_s(self) -> float:
        return math.inf if self.ends is None else max(0.0, self.ends - time.monotonic())


class Place:
    """Where one worker lives, and the thread that works with it.

    device: of every worker that lives here. barren: none could be started here when that was last
        tried. rests_until: ``time.monotonic`` value before which it is not tried again.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.hosted: Hosted | None = None
        self.worker: Worker | None = None  # once it is ready
        self.barren = False
        self.rests_until = 0.0
        self._todo: queue.SimpleQueue[Callable[[], object] | None] | None = None
        self._thread: threading.Thread | None = None
        self.interrupted = False
        self._outcome: queue.SimpleQueue[tuple[Any, BaseException | None]] | None = None
        self._lock = threading.Lock()

    def interrupt(self) -> None:
        """Nobody waits here any more, nor will until ``interrupted`` is taken back."""
        with self._lock:
            self.interrupted = True
            if self._outcome is not None:
                self._outcome.put((None, NoLongerAwaited(INTERRUPTED)))

    def ask(self, work: Callable[[], T], limit_s: float | None = None) -> T:
        """What the work gives, or raises. limit_s: None for what ends by itself.

        Raises:
            Late: it has not ended in time, and goes on.
            NoLongerAwaited: nobody is to wait for it; where it was begun, it goes on.
        """
        if self._todo is None:
            self._todo = queue.SimpleQueue()
            self._thread = threading.Thread(
                target=_work, args=(self._todo,), name="worker", daemon=True
            )
            self._thread.start()
        outcome: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

        def run() -> None:
            try:
                outcome.put((work(), None))
            except BaseException as error:
                outcome.put((None, error))

        with self._lock:
            if limit_s is not None and self.interrupted:
                raise NoLongerAwaited(INTERRUPTED)
            self._outcome = None if limit_s is None else outcome
            self._todo.put(run)
        try:
            value, error = outcome.get(timeout=None if limit_s == math.inf else limit_s)
        except queue.Empty:
            raise Late from None
        if error is not None:
            raise error
        done: T = value
        return done

    def give_up(self) -> threading.Thread | None:
        """Wait no more for what was asked; its thread closes the worker once it is through."""
        with self._lock:
            hosted = self.taken()
            thread, self._thread = self._thread, None
        if thread is not None and self._todo is not None:
            thread.name = GIVEN_UP
            self._todo.put(lambda: close_quietly(hosted))
        self.leave()
        return thread

    def lodge(self, hosted: Hosted, worker: Worker | None = None) -> bool:
        """Whether it lives here from now on: not where the thread that asks was given up."""
        with self._lock:
            if threading.current_thread() is not self._thread:
                return False
            self.hosted, self.worker = hosted, worker
            return True

    def taken(self) -> Hosted | None:
        """Who lived here; nobody does from now on."""
        hosted, self.hosted, self.worker = self.hosted, None, None
        return hosted

    def leave(self) -> None:
        """Let the thread end."""
        if self._todo is not None:
            self._todo.put(None)
        self._todo = self._thread = None


def _work(todo: queue.SimpleQueue[Callable[[], object] | None]) -> None:
    while (work := todo.get()) is not None:
        work()


def close_quietly(hosted: Hosted | None) -> RunFailed | None:
    """What a worker had against its own answers; one that is gone already has nothing."""
    if hosted is not None:
        try:
            hosted.close()
        except WorkerLost:
            pass
        except RunFailed as failure:
            return failure
        except Exception:  # of a broken worker there is nothing left to be closed
            pass
    return None
