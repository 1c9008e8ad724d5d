"""The contract of a tracker: something that wants to hear what a search does.

A tracker is built once a run and told every event; whatever it raises is caught and said once, so
that it never stops a search. It knows events, not searches.
"""

from __future__ import annotations

from typing import Any, Protocol

from agentmerge.config import SearchConfig


class Tracker(Protocol):
    """``tell`` gets each event of ``steps.Search.emit``; ``close`` ends the session."""

    def __init__(
        self, config: SearchConfig, *, name: str | None, project: str | None, entity: str | None
    ) -> None: ...

    def tell(self, event: dict[str, Any]) -> None: ...

    def close(self) -> None: ...
