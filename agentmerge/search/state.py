"""What LangGraph checkpoints: ids and small numbers; everything else is in the ledger.

No reducers: evaluate tasks commit to the ledger and write nothing here, so replaying one cannot
double anything.
"""

from __future__ import annotations

from typing import TypedDict

#: Raise when nodes are renamed or removed: an older search then refuses to resume, loudly.
GRAPH_VERSION = 1
#: A run's status where it stopped to ask its user (``search.approve``); the question is its
#: stop_reason.
WAITING = "waiting"


class SearchState(TypedDict, total=False):
    """status: "running" or "done"; ``stop_reason`` says why it ended.

    best: [generation, slot] of the incumbent; frozen while a generation is scored.
    """

    run_id: str
    graph_version: int
    settings_hash: str
    generation: int
    status: str
    stop_reason: str
    best: list[int] | None
    best_score: float | None


class Assignment(TypedDict):
    """What one ``evaluate`` task is sent."""

    generation: int
    slot: int
