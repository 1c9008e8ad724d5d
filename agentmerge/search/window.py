"""The lag window: what the next proposal may know while candidates are still at work.

With ``search.lag`` L, a proposal knows the results of all candidates but the last L that were
proposed, itself included, whatever has ended by then; of the others it knows that they are
pending. So it is a function of an ordered history, as without a window: neither the order in which
candidates end nor the number of workers changes a search. Where a search would stop for what it
knows, it waits for all first, and looks again.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from agentmerge.contracts.strategy import Observation
from agentmerge.ledger import Candidate
from agentmerge.ledger.book import Book
from agentmerge.ledger.rows import evaluations
from agentmerge.search.past import first_generation
from agentmerge.search.search import Search


def lag_of(search: Search) -> int:
    """Candidates in the window; 0 where a proposal waits for all before it."""
    settings = search.config.search
    whole = settings.shadow or getattr(search.strategy, "needs_all", False)
    return 0 if whole or not isinstance(settings.lag, int) else settings.lag


def horizon(search: Search, generation: int, *, whole: bool = True) -> int:
    """The last generation whose results whoever proposes after ``generation`` knows.

    whole: it is ``generation`` itself where that was waited for (``Search.whole``).
    """
    lag = lag_of(search)
    if not lag or (whole and generation in search.whole):
        return generation
    own = search.strategy.population(search.space.dimensions)
    room = lag - search.config.generation_size(own)
    candidates = search.book.candidates(up_to=generation)
    if room <= 0 or len(candidates) <= room:
        return generation if room <= 0 else first_generation(candidates)
    # Whole generations: the one in which the last candidate is that all of the window follow.
    return max(candidates[-room].generation - 1, first_generation(candidates))


def pending(search: Search, generation: int) -> list[Candidate]:
    """What is still open, up to a generation."""
    return [
        c for c in search.book.candidates(up_to=generation) if c.state == "open" and not c.prior
    ]


def within(search: Search, generation: int, *, whole: bool = True) -> Search:
    """The search as whoever proposes after ``generation`` knows it."""
    known = horizon(search, generation, whole=whole)
    if known >= generation:
        return search
    book = search.book
    key = (known, book.changes)
    found: Search
    last, found = search.windows.get("last", (None, search))
    if last != key:
        found = replace(search, views={}, _histories={})
        shared = ("course", "item_table", "noise", "_rescored")
        whole_book = book._book if isinstance(book, _Window) else book
        found.__dict__.update({name: getattr(search, name) for name in shared})
        found.__dict__["book"] = cast(Book, _Window(whole_book, known))
        search.windows["last"] = key, found  # in one step: a worker's thread looks, too
    return found


class _Window:
    """A run's book in which what follows a generation is pending, whatever has come of it."""

    def __init__(self, book: Book, known: int) -> None:
        self._book, self._known = book, known

    def __getattr__(self, name: str) -> Any:
        return getattr(self._book, name)

    def candidates(
        self, generation: int | None = None, up_to: int | None = None
    ) -> list[Candidate]:
        return [self._seen(c) for c in self._book.candidates(generation, up_to)]

    def history(self, up_to: int | None = None) -> list[Observation]:
        known = self._known if up_to is None else min(up_to, self._known)
        return self._book.history(known) + [
            c.observation() if c.observed else replace(c.observation(), pending=True)
            for c in self._later(up_to)
            if not c.prior
        ]

    def evaluations(self, up_to: int | None = None, *, promised: bool = False) -> float:
        known = self._known if up_to is None else min(up_to, self._known)
        later = self._later(up_to)
        still_open = sum(c.cost for c in later if c.state == "open") if promised else 0.0
        return self._book.evaluations(known, promised=promised) + evaluations(later) + still_open

    def _later(self, up_to: int | None) -> list[Candidate]:
        found = self._book.candidates(up_to=up_to)
        first = len(self._book.candidates(up_to=self._known))
        return [self._seen(c) for c in found[first:]]

    def _seen(self, c: Candidate) -> Candidate:
        """Refused recipes, and merges that were scored before, are known at once."""
        if c.generation <= self._known or c.prior or c.recipe_hash.startswith("refused-"):
            return c
        if c.twin is not None and c.want == "score" and c.twin[0] <= self._known:
            return c
        state = c.state if c.twin is not None and c.want == "score" else "open"
        return replace(
            c, state=state, score=None, tasks=(), failure="", reused=False, seconds=None, loss=None,
            gradient=None, estimate=None, rung=1.0, share=1.0, violation=0.0,
        )  # fmt: skip
