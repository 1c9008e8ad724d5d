"""What people are told of a search's events, in lines of text: on a terminal, or on a live page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from agentmerge.contracts import events
from agentmerge.contracts.events import Event
from agentmerge.contracts.operators import STRUCTURE
from agentmerge.evaluation.statistics import duration, figure
from agentmerge.report.board import Board

BLOCKS = "▁▂▃▄▅▆▇█"


def event_lines(event: Event, board: Board) -> Iterator[str]:
    """What is said of an event where no screen shows the board, which has it already."""
    match event:
        case events.Begun(run=run, advisers=[]):
            yield (
                f"{run}: no language model advises (--llm none); the agents work by rules, on "
                "statistics of the history"
            )
        case events.Begun():
            yield f"{event.run}: advised by {', '.join(event.advisers)}"
            if not event.heeded:
                yield (
                    "  note: this algorithm does not use advice: the models explain the search and "
                    "cost what they cost; auto and llm_evo use it"
                )
        case events.Generation():
            limit = board.config.budget.max_evaluations
            best, parent = (
                "none" if score is None else figure(score, digits=4)
                for score in (event.best, board.best_parent)
            )
            line = f"generation {event.generation:>3}   {event.evaluations:>4g} of {limit} "
            line += f"evaluations   best {best}"
            line += "" if board.best_parent is None else f" (best parent {parent})"
            if workers := board.workers.sentence():
                line += f"   {workers}"
            left = board.seconds_left
            yield line if left is None else f"{line}   about {duration(left)} left"
        case events.Advised() if event.role == STRUCTURE:
            end = f"not opened: {event.failure}" if event.failure else "opened, on trial"
            yield f"  another search space: {_first_line(event.words)}: {end}"
        case events.Advised() if event.failure:
            yield f"  {event.role}: {event.failure}; its rules advise instead"
        case events.Advised(source="model") if event.words:
            yield f"  {event.role}: {_first_line(event.words)}"
    if isinstance(event, events.Begun) and event.memory:
        yield f"  {event.memory}"


def _first_line(words: str) -> str:
    return words.splitlines()[0][:160]


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """Values as blocks of eight heights; the last ``width`` of them."""
    shown = values[-width:]
    low, high = min(shown), max(shown)
    if high <= low:
        return BLOCKS[3] * len(shown)
    return "".join(BLOCKS[round((v - low) / (high - low) * (len(BLOCKS) - 1))] for v in shown)
