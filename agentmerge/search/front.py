"""The front that a search ends with: what no merge is better than without being longer.

It is drawn by search items. Of a long one the few points that make most of its area are asked the
sealed items, as the answer is. Knows no strategy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from agentmerge.contracts.card import FrontRow, known
from agentmerge.evaluation.statistics import MIN_ITEMS
from agentmerge.evaluation.tasks import Part
from agentmerge.ledger import Candidate
from agentmerge.search.choosing import Results, compared, lead_of, search_results
from agentmerge.search.search import Search
from agentmerge.strategies.front import SHOWN, Front, Worst, undominated


def front_of(scored: Sequence[Candidate], count: int = SHOWN) -> list[Candidate]:
    """At most so many of what nothing dominates, best score first: its two ends, and then what
    enlarges the area most. A stack without its weakest layers may be one: it may be the answer."""
    ranked = sorted(scored, key=lambda c: c.rank)
    allowed = [c for c in ranked if not c.violation] or ranked[:1]
    found = [c for c in allowed if c.tokens is not None]
    if not found:
        return []
    scores = np.array([c.score for c in found], float)
    tokens = np.array([c.tokens for c in found], float)
    along = undominated(scores, tokens).tolist()
    worst = Worst.of(scores[along], tokens[along])
    kept = list(dict.fromkeys([along[0], along[-1]]))
    while len(kept) < min(count, len(along)):
        front = Front.of(worst, scores[kept], tokens[kept])
        left = [place for place in along if place not in kept]
        kept.append(left[int(np.argmax(front.added(scores[left], tokens[left])))])
    return [found[place] for place in along if place in kept]


def front_rows(
    search: Search, scored: Sequence[Candidate], part: Part, lost: list[str]
) -> list[FrontRow]:
    """The closing card's. scored: of this search, no twins. lost: as ``compared`` has it."""
    found = []
    for candidate in front_of(scored):
        told = known(FrontRow, vars(compared(search, candidate, part, lost)))
        if told.sealed_failure is None:
            results = search_results(search, candidate, part)
            score = lead_of(search, results, None, part)
            told = replace(
                told,
                interval=None if score is None else [score.low, score.high],
                tokens_interval=_around(search, results, part),
            )
        found.append(told)
    return found


def _around(search: Search, results: Results, part: Part) -> list[float] | None:
    """The mean length's 95 % interval over items (normal)."""
    lengths = search.taskset.lengths(results, part)
    if None in lengths or len(lengths) < MIN_ITEMS:
        return None
    counts = np.array(lengths, float)
    middle, half = float(counts.mean()), 1.96 * float(counts.std(ddof=1)) / math.sqrt(len(counts))
    return [max(0.0, middle - half), middle + half]


def untraded(search: Search) -> list[str]:
    """What a reader has to know of a front that its strategy did not look for."""
    if not search.config.search.traded or getattr(search.strategy, "trades", False):
        return []
    return [
        f"{search.config.algorithm} goes by the score alone, so the front is of what it happened "
        "to see; auto and margins look for all of it"
    ]
