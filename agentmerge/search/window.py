"""The lag window: what the next proposal may know while candidates are still at work.

With ``search.lag`` L, a proposal knows the results of all candidates but the last L that were
proposed, itself included, whatever has ended by then; of the others it knows that they are
pending. So it is a function of an ordered history, as without a window: neither the order in which
candidates end nor the number of workers changes a search. Where a search would stop for what it
knows, it waits for all first, and looks again: that, too, follows from the ledger, so that whoever
goes on with a search knows what its last process knew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from agentmerge.contracts.strategy import Observation
from agentmerge.ledger import Candidate, incumbent
from agentmerge.ledger.book import Book, Place
from agentmerge.ledger.rows import evaluations
from agentmerge.search.past import first_generation
from agentmerge.search.search import Search
from agentmerge.search.stopping import stop_reason
from agentmerge.search.trials import Trials

#: A candidate as it is, as it is seen, and what strategies are told of it.
_Mask = tuple[Candidate, Candidate, Observation]


def lag_of(search: Search) -> int:
    """Candidates in the window; 0 where a proposal waits for all before it."""
    lag = search.config.search.lag
    return lag if isinstance(lag, int) else 0


def horizon(search: Search, generation: int, *, whole: bool = True) -> int:
    """The last generation whose results whoever proposes after ``generation`` knows.

    whole: it is ``generation`` itself where the search would stop for what it knows in the window.
    """
    lag = lag_of(search)
    if not lag or (whole and generation in search.whole):
        return generation
    own = search.strategy.population(search.space.dimensions)
    room = lag - search.config.generation_size(own)
    candidates = search.book.candidates(up_to=generation)
    if room <= 0:
        return generation
    first = first_generation(candidates)
    # Whole generations: the one in which the last candidate is that all of the window follow.
    known = first if len(candidates) <= room else max(candidates[-room].generation - 1, first)
    return generation if whole and _would_stop(search, generation, known, candidates) else known


def _would_stop(
    search: Search, generation: int, known: int, candidates: Sequence[Candidate]
) -> bool:
    """Whether it would for what is known up to ``known``, once that is."""
    if known >= generation:
        return False
    key = (generation, known, len(candidates), search.config.budget, search.config.search)
    last, found = search.windows.get("stops", (None, False))
    if last != key:
        if search.book.pending(known):
            return False
        found = bool(stop_reason(within(search, generation, whole=False), generation))
        search.windows["stops"] = key, found
    return bool(found)


def within(search: Search, generation: int, *, whole: bool = True) -> Search:
    """The search as whoever proposes after ``generation`` knows it."""
    known = horizon(search, generation, whole=whole)
    return search if known >= generation else _pending_after(search, known)


def told_in(search: Search, generation: int, *, ahead: bool) -> Trials:
    """The search spaces as agents know them who speak of a generation: the first turn is theirs.

    ahead: they do while it is scored, and what it shows is pending.
    """
    known = _pending_after(search, generation - 1) if ahead and generation else search
    return known.trials(generation, decided=False)


def _pending_after(search: Search, known: int) -> Search:
    """The search as it is to who knows no result after a generation."""
    book = search.book
    key = (known, book.changes)
    found: Search
    last, found = search.windows.get("last", (None, search))
    if last != key:
        masks = getattr(found.book, "masks", {})
        found = replace(search, views={}, _histories={})
        shared = ("course", "item_table", "noise", "ladder", "standings", "texts", "_rescored")
        found.__dict__.update({name: getattr(search, name) for name in shared})
        whole_book = book._book if isinstance(book, _Window) else book
        found.__dict__["book"] = cast(Book, _Window(whole_book, known, masks))
        search.windows["last"] = key, found  # in one step: a worker's thread looks, too
    return found


class _Window:
    """A run's book in which what follows a generation is pending, whatever has come of it.

    masks: (generation, slot) -> a candidate as it is, as it is seen, and what is told of it; those
    of the window before, since most are in both.
    """

    def __init__(self, book: Book, known: int, masks: dict[Place, _Mask]) -> None:
        self._book, self._known = book, known
        # Whether a twin is known depends on the window. Copied, since workers' threads look, too.
        kept = [m for m in masks.copy().items() if m[0][0] > known and m[1][0].twin is None]
        self.masks: dict[Place, _Mask] = dict(kept)
        self._after: tuple[Any, list[_Mask]] = (None, [])
        self._used: dict[Any, float] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._book, name)

    def candidates(
        self, generation: int | None = None, up_to: int | None = None
    ) -> list[Candidate]:
        if generation is not None:
            return [self._mask(c)[1] for c in self._book.candidates(generation)]
        known = self._book.candidates(up_to=self._until(up_to))
        return known + [seen for _, seen, _ in self._later(up_to)]

    def history(self, up_to: int | None = None) -> list[Observation]:
        later = [told for c, _, told in self._later(up_to) if not c.prior]
        return self._book.history(self._until(up_to)) + later

    def evaluations(self, up_to: int | None = None, *, promised: bool = False) -> float:
        asked = (self._book.changes, up_to, promised)
        if asked not in self._used:
            later = [seen for _, seen, _ in self._later(up_to)]
            still_open = sum(c.cost for c in later if c.state == "open") if promised else 0.0
            known = self._book.evaluations(self._until(up_to), promised=promised)
            self._used[asked] = known + evaluations(later) + still_open
        return self._used[asked]

    def incumbent(self) -> Candidate | None:
        return incumbent(self.candidates())

    def _until(self, up_to: int | None) -> int:
        return self._known if up_to is None else min(up_to, self._known)

    def _later(self, up_to: int | None) -> list[_Mask]:
        asked = (self._book.changes, up_to)
        last, found = self._after
        if last != asked:
            every = self._book.candidates(up_to=up_to)
            first = len(self._book.candidates(up_to=self._known))
            found = [self._mask(c) for c in every[first:]]
            self._after = asked, found
        return found

    def _mask(self, c: Candidate) -> _Mask:
        at = (c.generation, c.slot)
        found = self.masks.get(at)
        if found is None or found[0] is not c:
            seen = self._seen(c)
            told = seen.observation()
            found = c, seen, told if seen.observed else replace(told, pending=True)
            self.masks[at] = found
        return found

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
