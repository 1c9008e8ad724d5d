"""What a search may still spend: evaluations, items and seconds, and what its end will take.

Reserved is what an open candidate or a tool's call was promised; the ledger has both.
"""

from __future__ import annotations

import math
import statistics

from agentmerge.config import SearchConfig
from agentmerge.contracts.operators import STRUCTURE
from agentmerge.ledger.words import openings
from agentmerge.search.search import Search
from agentmerge.space.grouped import SearchSpace
from agentmerge.strategies.front import SHOWN


def evaluations_left(search: Search) -> int:
    """What of the budget is neither used nor promised to an open candidate."""
    return max(0, math.floor(left(search) - _kept_back(search) + 1e-9))


def _kept_back(search: Search) -> int:
    """For the stacks between the deepest and its models' depth, once layers are searched."""
    if not search.space.deeper:
        return 0
    moves = openings(search.book.advice(role=STRUCTURE))
    opened = any(o.move.change == "layers" and not o.refusal for o in moves)
    return search.space.deeper - 1 if opened else 0


def items_left(search: Search) -> int:
    """The same in items."""
    return max(0, math.floor((left(search) - _kept_back(search)) * items_each(search) + 1e-9))


def left(search: Search, up_to: int | None = None) -> float:
    """The budget in evaluations, as it was before what agents did after generation ``up_to``.

    Items that tools asked beside candidates are parts of evaluations.
    """
    budget = search.config.budget
    probed = search.book.probe_totals(None if up_to is None else up_to - 1)
    used = search.book.evaluations(up_to, promised=True)
    used += probed["items"] / items_each(search)
    rest = budget.max_evaluations - used
    if budget.max_items is not None:
        rest = min(rest, (budget.max_items - ending_items(search)) / items_each(search) - used)
    return max(0.0, rest)


def ending_items(search: Search) -> int:
    """The sealed items that the end asks, at most, where each merge has a finite answer: of the
    parents, the best cheap merge, the answer, the stacks under it, the other arm's best, and the
    front."""
    return ending_merges(search.config, search.space) * len(
        set(search.taskset.refs("sealed")) - set(search.taskset.refs("search"))
    )


def ending_merges(config: SearchConfig, space: SearchSpace) -> int:
    merges = len(space.genome.parents) + 2 + bool(config.search.shadow)
    merges += SHOWN if config.search.traded else 0
    return merges + space.deeper


def ending_s(search: Search) -> float:
    """How long that takes, by the candidates that were scored."""
    if not search.seconds:
        return 0.0
    return statistics.median(search.seconds) * ending_items(search) / items_each(search)


def items_each(search: Search) -> int:
    return max(1, len(search.taskset.refs("search")))


def wanted(search: Search) -> bool:
    return not search.stopping() and not search.reached and search.seconds_left() > ending_s(search)
