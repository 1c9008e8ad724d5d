"""Which scores the models are told: the Ladder (Blum and Hardt, arXiv 1502.04585).

Whoever sees exact scores of a few hundred items, generation after generation, fits those items. So
an improvement is reported only where it is beyond the noise of a paired comparison with the best so
far; one within it shows that best's score and tasks again. Worse scores are shown as they are.
Knows no items: the noise of a pair is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from agentmerge.contracts.strategy import History, Observation

#: One standard error of the paired difference of two candidates' scores, or 0 where there is none.
Noise = Callable[[Observation, Observation], float]


@dataclass(frozen=True, slots=True)
class Released:
    """entries: the history with the scores that may be shown. tied: (generation, slot) of those
    that cannot be told apart from the best before them."""

    entries: tuple[Observation, ...]
    tied: frozenset[tuple[int, int]]


def release(history: History, noise: Noise) -> Released:
    """Walk a history in its own order, so that the same past is always told the same way."""
    best: Observation | None = None
    shown: list[Observation] = []
    tied: set[tuple[int, int]] = set()
    for entry in history:
        if entry.score is None or entry.censored:
            shown.append(entry)
        elif best is None or best.score is None or entry.recipe_hash == best.recipe_hash:
            best = best or entry
            shown.append(entry)
        elif entry.score <= best.score:
            shown.append(entry)
        elif entry.score - best.score > noise(entry, best):
            best = entry
            shown.append(entry)
        else:
            tied.add((entry.generation, entry.slot))
            shown.append(replace(entry, score=best.score, tasks=best.tasks))
    return Released(tuple(shown), frozenset(tied))
