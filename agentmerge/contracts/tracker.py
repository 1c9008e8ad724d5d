"""The contract of a tracker: something outside that hears what a search does, and keeps its fruits.

A tracker is built once a run and told every event; whatever it raises is caught and said once, so
that it never stops a search. It knows events and files, not searches.

Every tracker passes ``tests/report/test_trackers.py``:
    tell() of any event logs what it knows of it and ignores the rest;
    keep() of a file stores its content under its kind, "recipe" or "report";
    close() ends the session, also after tell() failed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from agentmerge.config import SearchConfig


class Tracker(Protocol):
    """project, entity: where the service files the run, in its own words (an MLflow experiment is
    a project); None for its default."""

    def __init__(
        self, config: SearchConfig, *, name: str | None, project: str | None, entity: str | None
    ) -> None: ...

    def tell(self, event: dict[str, Any]) -> None:
        """One event, as ``docs/watching.md`` has it."""
        ...

    def keep(self, kind: str, path: Path) -> None:
        """Store a file: the "recipe" (mergekit YAML) or the "report" (HTML)."""
        ...

    def close(self) -> None: ...
