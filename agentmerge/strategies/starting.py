"""Where a search from point to point begins: at the best known merge that is no parent, if it keeps
what is to be kept as well as the parents do.

A parent lies at a side of the box, where half of all steps lead out of it and most of the others
undo what makes it the best. Searches to version 0.2 began there; those go on as they began.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from agentmerge.contracts.operators import PARENT
from agentmerge.contracts.space import Space
from agentmerge.contracts.strategy import History, Observation, fittest

Point = tuple[float, ...]
#: How near two points are that are one, drawn twice.
SAME = 1e-9


def merges(
    space: Space,
    history: History,
    first: Observation | None,
    drawn: Callable[[Point, Observation], Sequence[float]],
) -> Sequence[Observation]:
    """The history without its parents; with them where nothing else was scored, where the best of
    the rest lacks what a parent keeps, and where the search began at one.

    first: the first candidate that the search asked, None where it has asked none. drawn: that
    candidate, had the search begun at a point.
    """
    found = [o for o in history if o.operator != PARENT]
    ahead, known = fittest(found, 1), fittest(history, 1)
    if not ahead or ahead[0].violation > known[0].violation:
        return history
    if first is None or first.vector is None:
        return found
    best, mine = (
        fittest([o for o in seen if o.generation < first.generation], 1)
        for seen in (history, found)
    )
    if not best or best == mine:
        return found
    then = space.made_legal(tuple(float(x) for x in drawn(best[0].vector or (), first)))
    return history if np.allclose(then, first.vector, rtol=0, atol=SAME) else found
