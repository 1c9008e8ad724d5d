"""What the agents earn: a second arm of the same search that hears none of their words.

A share of the budget goes to ``null_llm`` (their rules, with the model replaced by the mean of the
four best). Both arms begin with the same first generation, and neither sees the other's candidates,
nor races against them. In the end the best of each, after as many evaluations, meet on the sealed
items. One search shows the noise of its items, not the spread over searches.
"""

from __future__ import annotations

from collections.abc import Sequence

from agentmerge.contracts.operators import SHADOW
from agentmerge.contracts.strategy import History, Observation
from agentmerge.ledger import Candidate

#: Generations in a row without one new merge after which the space counts as exhausted.
BARREN_GENERATIONS = 3


def first_generation(candidates: Sequence[Candidate]) -> int:
    """The one that both arms share: generation 0, or where a branch began to score anew.

    candidates: in their order.
    """
    return next((c.generation for c in candidates if not c.prior), 0)


def arm_of(
    candidates: Sequence[Candidate], *, shadow: bool, shared: bool = True
) -> list[Candidate]:
    """One arm's candidates, with the first generation if it is shared."""
    first = first_generation(candidates)
    return [
        c
        for c in candidates
        if (shared if c.generation == first and not c.prior else (c.operator == SHADOW) == shadow)
        and not (shadow and c.prior)
    ]


def arm_history(history: History, first: int, *, shadow: bool) -> list[Observation]:
    """What an arm knows of a history."""
    if not shadow:
        return [o for o in history if o.operator != SHADOW]
    return [o for o in history if o.operator == SHADOW or o.generation == first]


def charges(candidates: Sequence[Candidate], *, shadow: bool) -> dict[tuple[int, int], float]:
    """What each candidate of an arm would have cost it alone: a twin of the other's is not free."""
    alone = arm_of(candidates, shadow=shadow, shared=False)
    known = {(c.generation, c.slot) for c in arm_of(candidates, shadow=shadow)}
    return {
        (c.generation, c.slot): 1.0 if c.twin is not None and c.twin not in known else c.cost
        for c in alone
    }


def best_within(
    candidates: Sequence[Candidate], budget: float, *, shadow: bool
) -> Candidate | None:
    """The best of the shared generation and of an arm's first candidates that the budget pays."""
    cost, left = charges(candidates, shadow=shadow), budget + 1e-9
    scored = []
    for candidate in arm_of(candidates, shadow=shadow):
        left -= cost.get((candidate.generation, candidate.slot), 0.0)
        if left < 0:
            break
        if candidate.score is not None and not candidate.prior:
            scored.append(candidate)
    return min(scored, key=lambda c: c.rank, default=None)
