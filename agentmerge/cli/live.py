"""A search on a terminal: a screen that stays in place, plain lines, or JSON for programs.

``progress`` picks one of the three; all take events and lines (``say``). They write to stderr, so
that stdout holds the result alone.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agentmerge.cli.render import number
from agentmerge.cli.terminal import plain_line
from agentmerge.config import SearchConfig
from agentmerge.contracts import events
from agentmerge.contracts.events import Emit, Event, Note, parsed
from agentmerge.evaluation.statistics import duration, figure
from agentmerge.recipe.names import short_name
from agentmerge.report.board import Board
from agentmerge.report.lines import event_lines, sparkline

MAX_RIVALS = 6


def json_line(event: dict[str, Any], stream: Any = None) -> None:
    print(json.dumps(event), file=stream or sys.stderr, flush=True)


class Progress:
    """Lines on stderr: one a generation, one a failure. What others wrote stays in its line."""

    def __init__(self, board: Board, quiet: bool = False) -> None:
        self.board, self.quiet = board, quiet

    def __call__(self, event: dict[str, Any]) -> None:
        told = parsed(event)
        self.board.tell(told)
        if isinstance(told, events.Evaluated) and told.failure:
            self.say(plain_line(f"  candidate {told.generation}.{told.slot}: {told.failure}"))
        elif isinstance(told, Note):
            self.say(plain_line(f"note: {told.text}"))
        self.show(told)

    def show(self, event: Event) -> None:
        for line in event_lines(event, self.board):
            self.say(plain_line(line))

    def say(self, line: str) -> None:
        if not self.quiet:
            print(line, file=sys.stderr, flush=True)


class Screen(Progress):
    """A rich screen, drawn anew as events come; lines scroll by above it."""

    def __init__(self, board: Board, live: Any) -> None:
        super().__init__(board)
        self._live = live

    def show(self, event: Event) -> None:
        self._live.update(drawn(self.board))

    def say(self, line: str) -> None:
        from rich.text import Text

        self._live.console.print(Text(line))


@contextmanager
def progress(
    config: SearchConfig,
    runs_dir: Path,
    *,
    quiet: bool,
    as_json: bool,
    past: Iterable[Event] = (),
    clocked: bool = True,
) -> Iterator[Emit]:
    """The listener that fits: JSON where a program asked, a screen on a terminal, else lines.

    past: events of a search that goes on, which are known and not told. clocked: see ``Board``.
    """
    board = Board(config, runs_dir, clocked=clocked)
    for event in past:
        board.tell(event)
    if as_json and not quiet:
        yield json_line
        return
    if quiet or not sys.stderr.isatty():
        yield Progress(board, quiet)
        return
    from rich.console import Console
    from rich.live import Live

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
        parts.append(line.append(plain_line(words), style="not dim"))
    if workers := board.workers.sentence(time.time()):
        parts.append(Text(workers))
    parts.append(_bars(board))
    return Panel(Group(*parts), title="agentmerge", title_align="left", border_style="blue")


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
    tail += [f"${board.cost_usd:.2f}"] if board.cost_usd else []
    if tail:
        table.add_row("", ", ".join(tail), "")
    return table
