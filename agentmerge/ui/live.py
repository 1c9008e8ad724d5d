"""Searches as they go on, for pages that stay open: each is followed once, however many look."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from agentmerge.config import SearchConfig
from agentmerge.contracts import events
from agentmerge.contracts.events import Event
from agentmerge.errors import NotFound, UserError
from agentmerge.ledger import Ledger, RunRow, counted
from agentmerge.ledger.folder import opened
from agentmerge.report.board import Board, Follower, Line
from agentmerge.report.lines import event_lines, sparkline
from agentmerge.report.summary import run_status
from agentmerge.ui.actions import Actions

#: How long a page waits for a writer, in seconds, before it says that the database is locked.
PATIENCE_S = 2.0
#: Searches that are followed at once; of more, the one that nobody looked at longest is forgotten.
MAX_FOLLOWED = 64
#: Of a search: lines of events, generations' best, and characters of an agent's word; the last.
MAX_LINES, MAX_TRAIL, MAX_WORDS = 60, 400, 4000

#: Searches that the list follows, the newest.
MAX_LISTED = 500
#: Seconds that a look reads for: who looks shows what there is, and looks again.
LOOK_S = 0.4

#: What a list has of a snapshot.
_BRIEF = ("name", "read", "status", "phase", "search", "evaluations", "best_parent", "sparkline")

Snapshot = Mapping[str, Any]


@dataclass(slots=True)
class _Followed:
    board: Board
    follower: Follower
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=MAX_LINES))
    lock: threading.Lock = field(default_factory=threading.Lock)
    status: str = ""
    whole: int = -1
    caught_up_at: float | None = None
    _news: Iterator[Event] | None = None

    def read(self, status: str, every_s: float) -> None:
        """Take in what is new for at most ``LOOK_S``; nothing within ``every_s`` of the last."""
        now = time.monotonic()
        fresh = self.caught_up_at is not None and now - self.caught_up_at < every_s
        if fresh and status == self.status:
            return
        self.status, self.caught_up_at = status, None
        news, self._news = self._news or self.follower.news(), None  # a fault ends it
        for event in news:
            self._tell(event)
            if time.monotonic() - now > LOOK_S:
                self._news = news
                return
        self.caught_up_at = time.monotonic()

    def _tell(self, event: Event) -> None:
        self.board.tell(event)
        if isinstance(event, events.Generation):
            self.whole = event.generation
        if isinstance(event, events.Evaluated) and event.failure:
            self.lines.append(f"candidate {event.generation}.{event.slot}: {event.failure}")
        self.lines.extend(line.strip() for line in event_lines(event, self.board))


class Live:
    """What ``Board`` shows of each search of a runs directory. Safe to share between threads.

    every_s: nobody's look reads a search anew sooner than this after the last.
    actions: what may be done with them; by default nothing, nor is any limit named.
    """

    def __init__(
        self, runs_dir: Path, every_s: float = 1.0, actions: Actions | None = None
    ) -> None:
        self.runs_dir, self.every_s = runs_dir, every_s
        self.actions = actions or Actions(runs_dir, {})
        self._followed: OrderedDict[str, _Followed] = OrderedDict()
        self._briefs: dict[str, tuple[str, Snapshot | None]] = {}
        self._lock = threading.Lock()

    def ledger(self) -> AbstractContextManager[Ledger]:
        """Opened for each look, so that a file that is replaced is seen, and none is held."""
        return opened(self.runs_dir, PATIENCE_S)

    def look(self, name: str) -> Snapshot:
        """How a search stands now; of a long past that is new here, as far as it is read.

        Raises:
            NotFound: it is gone, or all are. LedgerError: the database cannot be read now.
        """
        with self.ledger() as ledger:
            row = ledger.run(name)
            status = run_status(ledger, row)
            followed = self._of(ledger, row)
            with followed.lock:
                followed.follower.ledger = ledger
                followed.read(status, self.every_s)
                offered = self.actions.offered(row, status, followed.board.config, followed.whole)
                return {
                    **_snapshot(followed, row, status, ledger.open_count(row.id)),
                    "actions": offered,
                }

    def briefs(self) -> dict[str, Snapshot | None]:
        """Name -> how it stands, newest first; None of one that nobody has looked at so far.

        What is over is looked at until its past is read, and of what is left some each time.
        """
        until = time.monotonic() + LOOK_S
        with self.ledger() as ledger:
            rows = ledger.runs()[::-1][:MAX_LISTED]
            standing = {row.id: run_status(ledger, row) for row in rows}
        found: dict[str, Snapshot | None] = {}
        for row in rows:
            status, known = self._briefs.get(row.id, ("", None))
            over = status == standing[row.id] != "running" and known is not None and known["read"]
            if not over and time.monotonic() < until:
                known = self._brief(row.name)
                self._briefs[row.id] = standing[row.id], known
            found[row.name] = known
        for gone in self._briefs.keys() - standing.keys():
            self._briefs.pop(gone, None)
        return found

    def _brief(self, name: str) -> Snapshot | None:
        try:
            board = self.look(name)
        except NotFound:
            return None  # deleted since
        except UserError as error:  # its config names what is not installed here
            return {"name": name, "phase": str(error), "read": True}
        best = board["best"]
        return {key: board[key] for key in _BRIEF} | {
            "limit": board["budgets"][0]["limit"],
            "best": None if best is None else best["score"],
        }

    def _of(self, ledger: Ledger, row: RunRow) -> _Followed:
        with self._lock:
            found = self._followed.pop(row.id, None)
            if found is not None and found.board.reason and row.status != "done":
                found = None  # it was done, and goes on with other limits
            if found is None:
                config = SearchConfig.from_text(row.config, row.name)
                board = Board(config, self.runs_dir, clocked=False)
                found = _Followed(board, Follower(ledger, row))
            self._followed[row.id] = found  # the last is the one that was looked at last
            while len(self._followed) > MAX_FOLLOWED:
                self._followed.popitem(last=False)
            return found


def _snapshot(followed: _Followed, row: RunRow, status: str, waiting: int) -> Snapshot:
    board = followed.board
    running = status == "running"
    left = board.seconds_left if running else None
    return {
        "name": row.name,
        "status": status,
        "stop_reason": row.stop_reason,
        "search": board.config.algorithm,
        "phase": _phase(followed, status),
        "read": followed.caught_up_at is not None,
        "generation": board.generation,
        "current": board.current if running else "",
        "worker": board.config.worker.kind,
        "workers": board.config.worker.number,
        "waiting": waiting,
        "workers_now": board.workers.sentence(time.time() if running else None),
        "tasks": [task.name for task in board.config.tasks.tasks],
        "best": _line("best", board.best),
        "rivals": [_line(name, line) for name, line in board.rivals.items()],
        "best_parent": board.best_parent,
        "trail": board.trail[-MAX_TRAIL:],
        "sparkline": sparkline(board.trail) if board.trail else "",
        "words": {role: words[:MAX_WORDS] for role, words in board.words.items()},
        "budgets": [
            {"name": name, "used": used, "limit": limit} for name, used, limit in board.budgets
        ],
        "seconds_left": None if left is None else round(left),
        "evaluations": counted(board.evaluations),
        "failed": board.failed,
        "tokens": board.tokens,
        "cost_usd": board.cost_usd,
        "events": list(followed.lines),
    }


def _phase(followed: _Followed, status: str) -> str:
    if followed.caught_up_at is None:
        return "its past is being read"
    return followed.board.phase if status == "running" else status


def _line(name: str, line: Line | None) -> dict[str, Any] | None:
    return None if line is None else {"of": name} | asdict(line) | {"tasks": dict(line.tasks)}
