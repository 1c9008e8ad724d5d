"""Puts trackers between a search and the screen, and keeps their failures away from both."""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from agentmerge.contracts.events import Emit
from agentmerge.errors import AgentmergeError, UserError
from agentmerge.system.waits import waiting_for

#: Seconds that a tracker may take to begin, and all of them together after the search.
START_S, END_S = 10.0, 30.0


@dataclass(frozen=True, slots=True)
class Tracking:
    """Which trackers are wanted, and where they file the run."""

    names: tuple[str, ...] = ()
    project: str | None = None
    entity: str | None = None


class _Guarded:
    """A tracker on a thread of its own: the search hands it events and waits for nothing.

    A tracker speaks to a server, and one that does not answer must cost the search no time: it has
    ``START_S`` to begin (the only thing that is waited for, so that a mistake is told before the
    search is paid for) and ``END_S`` after the search to take what it was told.
    """

    def __init__(self, name: str, build: Callable[[], Any]) -> None:
        self.name = name
        self._build = build
        self._told: queue.SimpleQueue[Callable[[Any], None] | None] = queue.SimpleQueue()
        self._began: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)

    def start(self) -> None:
        """Raises UserError: the tracker cannot be used at all."""
        self._thread.start()
        try:
            with waiting_for(f"{self.name} to begin"):
                error = self._began.get(timeout=START_S)
        except queue.Empty:
            _say(f"{self.name} has not answered in {START_S:g} s; the search does not wait for it")
            return
        if isinstance(error, UserError):
            raise error

    def call(self, action: Callable[[Any], None]) -> None:
        self._told.put(action)

    def end(self, deadline: float) -> None:
        """Close it; give up at the deadline (``time.monotonic``)."""
        self._told.put(None)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            _say(f"{self.name} did not take everything in {END_S:g} s; it lacks the rest")

    def _work(self) -> None:
        try:
            tracker = self._build()
        except UserError as error:
            self._began.put(error)
            return
        except Exception as error:
            _say(f"{self.name} did not start ({error}); the search goes on")
            self._began.put(error)
            return
        self._began.put(None)
        broken = False
        while (action := self._told.get()) is not None:
            if broken:
                continue
            try:
                action(tracker)
            except Exception as error:
                broken = True
                _say(f"{self.name} failed ({error}); the search goes on without it")
        try:
            tracker.close()
        except Exception as error:
            if not broken:
                _say(f"{self.name} failed at its end ({error})")


@contextmanager
def tracked(
    emit: Emit, config: Any, tracking: Tracking, runs_dir: Path, name: str | None
) -> Iterator[Emit]:
    """``emit``, and every tracker too. At the end they get the best recipe and the report.

    Raises:
        UserError: a tracker is unknown or its package is missing (before the search begins).
    """
    trackers = _started(config, tracking, name)
    if not trackers:
        yield emit
        return
    run: list[str] = []

    def tell(event: dict[str, Any]) -> None:
        emit(event)
        if event["event"] == "start" and "run" in event:
            run.append(event["run"])
        for guarded in trackers:
            guarded.call(lambda tracker: tracker.tell(event))

    try:
        yield tell
    finally:
        fruits = _fruits(runs_dir, run[0]) if run else []
        deadline = time.monotonic() + END_S
        for guarded in trackers:
            for kind, path in fruits:
                guarded.call(partial(_keep, kind=kind, path=path))
        for guarded in trackers:
            with waiting_for(f"{guarded.name} to take what it was told"):
                guarded.end(deadline)


def _started(config: Any, tracking: Tracking, name: str | None) -> list[_Guarded]:
    from agentmerge import plugins

    kinds = dict.fromkeys(tracking.names)
    classes = {kind: plugins.load("agentmerge.trackers", kind) for kind in kinds}
    where = {"name": name, "project": tracking.project, "entity": tracking.entity}
    found = [_Guarded(kind, partial(build, config, **where)) for kind, build in classes.items()]
    for guarded in found:
        guarded.start()
    return found


def _fruits(runs_dir: Path, run: str) -> Sequence[tuple[str, Path]]:
    """(kind, file) of what a search leaves: its best recipe so far, and its report."""
    from agentmerge.ledger.folder import opened
    from agentmerge.report.html import write_report

    recipe = runs_dir / run / "best.yml"
    found = [("recipe", recipe)] if recipe.is_file() else []
    try:
        with opened(runs_dir) as ledger:
            found.append(("report", write_report(ledger, [run], runs_dir / run / "report.html")))
    except AgentmergeError as error:
        _say(f"the trackers get no report: {error}")
    return found


def _keep(tracker: Any, *, kind: str, path: Path) -> None:
    tracker.keep(kind, path)


def _say(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)
