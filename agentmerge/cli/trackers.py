"""Puts trackers between a search and the screen, and keeps their failures away from both."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from agentmerge.errors import AgentmergeError, UserError

Emit = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Tracking:
    """Which trackers are wanted, and where they file the run."""

    names: tuple[str, ...] = ()
    project: str | None = None
    entity: str | None = None


@dataclass
class _Guarded:
    """A tracker that has not failed yet, or why it did."""

    name: str
    tracker: Any
    broken: list[Exception] = field(default_factory=list)

    def call(self, action: Callable[[Any], None], *, even_broken: bool = False) -> None:
        if self.broken and not even_broken:
            return
        try:
            action(self.tracker)
        except Exception as error:
            if not self.broken:
                _say(f"{self.name} failed ({error}); the search goes on without it")
            self.broken.append(error)


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
        for guarded in trackers:
            for kind, path in fruits:
                guarded.call(partial(_keep, kind=kind, path=path))
            guarded.call(lambda tracker: tracker.close(), even_broken=True)


def _started(config: Any, tracking: Tracking, name: str | None) -> list[_Guarded]:
    from agentmerge import plugins

    found = []
    for kind in dict.fromkeys(tracking.names):
        try:
            tracker = plugins.load("agentmerge.trackers", kind)(
                config, name=name, project=tracking.project, entity=tracking.entity
            )
        except UserError:
            raise
        except Exception as error:
            _say(f"{kind} did not start ({error}); the search goes on")
            continue
        found.append(_Guarded(kind, tracker))
    return found


def _fruits(runs_dir: Path, run: str) -> Sequence[tuple[str, Path]]:
    """(kind, file) of what a search leaves: its best recipe so far, and its report."""
    from agentmerge.report.html import write_report
    from agentmerge.session import opened

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
