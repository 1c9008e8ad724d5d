"""After a generation: the incumbent, whether to score what is left, go on, or stop."""

from __future__ import annotations

from dataclasses import dataclass, field

from agentmerge.ledger import Candidate
from agentmerge.ledger.rows import whole
from agentmerge.search import budget
from agentmerge.search.depths import ask_shallower
from agentmerge.search.evaluate import collect, judged
from agentmerge.search.finish import write_best
from agentmerge.search.propose import propose
from agentmerge.search.search import Search
from agentmerge.search.seed import complete
from agentmerge.search.state import SearchState
from agentmerge.search.stopping import stop_reason
from agentmerge.search.window import horizon, within


@dataclass(frozen=True, slots=True)
class Outcome:
    """What ``select`` found. open_slots: candidates of this generation still to be scored."""

    best: Candidate | None
    stop_reason: str = ""
    open_slots: list[tuple[int, int]] = field(default_factory=list)
    generation: int = 0

    def update(self) -> SearchState:
        best = self.best
        return SearchState(
            generation=self.generation,
            best=[best.generation, best.slot] if best else None,
            best_score=best.score if best else None,
            stop_reason=self.stop_reason,
        )


def select(search: Search, generation: int) -> Outcome:
    """Find the incumbent, save its recipe, and decide what comes next."""
    search.entering()
    candidates = judged(search)
    if candidates[-1].generation < generation and generation not in search.exhausted:
        # The strategy had none, or the ledger is behind the graph's checkpoint: it decides.
        generation = propose(search, candidates[-1].generation)
        candidates = judged(search)
    complete(search, generation, candidates)
    # Before the scores, and not after: a candidate of the window may end in between.
    still_open = [(c.generation, c.slot) for c in search.book.pending(generation)]
    candidates = judged(search)
    best = search.book.incumbent()
    if best is not None:
        write_best(search, best)
    limit = min(search.reached, default="")
    if search.seconds_left() <= budget.ending_s(search):
        limit = "timeout"
    if limit:
        collect(search, generation, whole=True)  # what is at work in the window
        judged(search)
        return Outcome(search.book.incumbent(), limit, generation=generation)
    known = horizon(search, generation)
    if any(at[0] <= known or at not in search.dispatched for at in still_open):
        return Outcome(best, open_slots=still_open, generation=generation)
    reason = stop_reason(within(search, generation), generation)
    search.emit(whole(generation, search.book.evaluations(), best))
    if reason and best is not None and ask_shallower(search, candidates):
        return select(search, candidates[-1].generation + 1)
    return Outcome(best, reason, generation=generation)
