"""What LangGraph checkpoints: ids and small numbers; everything else is in the ledger.

No reducers: what scores commits to the ledger and writes nothing here, so replaying a node cannot
double anything.
"""

from __future__ import annotations

from typing import TypedDict

#: Raise when nodes are renamed or removed. What an older graph saved is begun anew from the ledger;
#: what a newer one saved is refused, loudly. 2: dispatch and collect, in place of evaluate.
GRAPH_VERSION = 2
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
