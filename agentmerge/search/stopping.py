"""Why a search ends after a generation, from its ledger alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from agentmerge.ledger import Candidate
from agentmerge.search import budget
from agentmerge.search.models import nothing_to_choose
from agentmerge.search.past import BARREN_GENERATIONS
from agentmerge.search.search import Search


def stop_reason(search: Search, generation: int) -> str:
    """Why a search ends after a generation, or ""."""
    candidates = search.book.candidates()
    limit = search.config.search.max_generations
    if not budget.evaluations_left(search):
        return "budget"
    if limit is not None and generation >= limit:
        return "generations"
    if reason := nothing_to_choose(search):
        return reason
    if generation and all(c.score is None or c.prior or c.twin is not None for c in candidates):
        return "every candidate failed"
    if _barren(candidates, generation):
        return "nothing new"
    # The strategy had no proposal.
    return "nothing more to gain" if candidates[-1].generation < generation else ""


def _barren(candidates: Sequence[Candidate], generation: int) -> bool:
    last = generation - BARREN_GENERATIONS
    recent = list(takewhile(lambda c: c.generation > last, reversed(candidates)))
    return generation >= BARREN_GENERATIONS and all(c.state == "twin" for c in recent)
