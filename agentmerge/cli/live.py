"""A search on a terminal: a screen that stays in place, plain lines, or JSON for programs.

``progress`` picks one of the three; all take events and lines (``say``). They write to stderr, so
that stdout holds the result alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from agentmerge.cli.render import Progress, duration, number
from agentmerge.cli.terminal import plain_line
from agentmerge.config import SearchConfig
from agentmerge.evaluation.statistics import figure
from agentmerge.report.board import Board, Event
from agentmerge.space.grouped import short_name

BLOCKS = "▁▂▃▄▅▆▇█"
MAX_RIVALS = 6


class Listener(Protocol):
    """Hears a search's events, and lines from the command itself."""

    def __call__(self, event: dict[str, Any]) -> None: ...

    def say(self, line: str) -> None: ...


class JsonLines:
    """Every event as a line of JSON."""

    def __init__(self, stream: Any = None) -> None:
        self._stream = stream or sys.stderr

    def __call__(self, event: dict[str, Any]) -> None:
        print(json.dumps(event), file=self._stream, flush=True)

    def say(self, line: str) -> None:
        self({"event": "note", "text": line})


class Screen:
    """A rich screen, drawn anew as events come; lines scroll by above it."""

    def __init__(self, board: Board, live: Any) -> None:
        self._board, self._live = board, live

    def __call__(self, event: dict[str, Any]) -> None:
        self._board.tell(event)
        if event["event"] == "candidate" and event["failure"]:
            self.say(f"candidate {event['generation']}.{event['slot']}: {event['failure']}")
        if event["event"] == "note":
            self.say(f"note: {plain_line(event['text'])}")
        self._live.update(drawn(self._board))

    def say(self, line: str) -> None:
        from rich.text import Text

        self._live.console.print(Text(line))


@contextmanager
def progress(
    config: SearchConfig | None, *, quiet: bool, as_json: bool, past: Iterable[Event] = ()
) -> Iterator[Listener]:
    """The listener that fits: JSON where a program asked, a screen on a terminal, else lines.

    past: events of a search that goes on, for the screen to begin with.
    """
    if as_json and not quiet:
        yield JsonLines()
        return
    if quiet or config is None or not sys.stderr.isatty():
        yield Progress(config.budget.max_evaluations if config else 0, quiet)
        return
    from rich.console import Console
    from rich.live import Live

    board = Board(config)
    for event in past:
        board.tell(event)
    with Live(console=Console(stderr=True), refresh_per_second=4, transient=True) as live:
        yield Screen(board, live)


def drawn(board: Board) -> Any:
    """The board as something rich can print; fits 80 columns and up."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.text import Text

    head = Text(no_wrap=True, overflow="ellipsis")
    head.append(board.run or "search", style="bold")
    where = f" {board.current}" if board.current else ""
    head.append(f"  {board.config.algorithm}, generation {board.generation}: {board.phase}{where}")
    parts: list[Any] = [head, _scores(board)]
    if board.trail:
        parts.append(
            Text(
                f"best by generation  {sparkline(board.trail)}  {figure(board.trail[-1], digits=4)}"
            )
        )
    for role, words in board.words.items():
        line = Text(f"{role}: ", style="dim", no_wrap=True, overflow="ellipsis")
        parts.append(line.append(words, style="not dim"))
    parts.append(_bars(board))
    return Panel(Group(*parts), title="agentmerge", title_align="left", border_style="blue")


def sparkline(values: list[float], width: int = 40) -> str:
    """Values as blocks of eight heights; the last ``width`` of them."""
    shown = values[-width:]
    low, high = min(shown), max(shown)
    if high <= low:
        return BLOCKS[3] * len(shown)
    return "".join(BLOCKS[round((v - low) / (high - low) * (len(BLOCKS) - 1))] for v in shown)


def _scores(board: Board) -> Any:
    from rich.table import Table

    tasks = [task.name for task in board.config.tasks.tasks][:4]
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("", overflow="ellipsis", no_wrap=True, max_width=34)
    for name in ("score", *(_tail(short_name(task)) for task in tasks)):
        table.add_column(name, justify="right", overflow="ellipsis", no_wrap=True, max_width=14)
    rows = list(board.rivals.items())[:MAX_RIVALS]
    if board.best:
        rows = [(f"best: {board.best.name}", board.best), *rows]
    for name, line in rows:
        cells = (number(line.tasks.get(task)) for task in tasks)
        best = line is board.best
        table.add_row(
            name, figure(line.score, digits=4), *cells, style="bold green" if best else ""
        )
    return table


def _tail(name: str) -> str:
    """The end of a long name: tasks of one family begin alike."""
    return name if len(name) <= 14 else f"…{name[-13:]}"


def _bars(board: Board) -> Any:
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    table = Table.grid(padding=(0, 1))
    for name, used, limit in board.budgets:
        shown = f"{used:.2f} of {limit:g}" if name == "dollars" else f"{used:.0f} of {limit:g}"
        bar = ProgressBar(total=limit, completed=min(used, limit), width=30)
        table.add_row(name, bar, shown)
    left = board.seconds_left
    tail = [] if left is None else [f"about {duration(left)} left"]
    tail += [f"{board.failed} failed"] if board.failed else []
    tail += [f"{board.tokens} tokens"] if board.tokens else []
    if tail:
        table.add_row("", ", ".join(tail), "")
    return table
