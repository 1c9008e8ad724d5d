"""Problems for any search, by name.

    here = problem("tiny-so-8", seed=0)
    shown = here.evaluate(vector)       # .score; .evidence.values and .evidence.signals, by item
    here.sealed(vector).sum()           # of items that no search sees

Tiny families of real models (their margins are real; the first one trains for a minute), and known
functions, with items or without. ``searched`` drives whatever keeps to a strategy's contract.
"""

from __future__ import annotations

from collections.abc import Sequence

from agentmerge.contracts.strategy import Observation, Strategy, rng_factory
from agentmerge.errors import UserError
from agentmerge.testing.functions import KNOWN
from agentmerge.testing.problem import Problem


def names() -> list[str]:
    from agentmerge.testing.tiny import TINY

    return [*TINY, *KNOWN]


def problem(name: str, seed: int = 0) -> Problem:
    """seed: which items are asked; of a function, where its optimum is."""
    if name in KNOWN:
        return KNOWN[name](seed)
    from agentmerge.testing.tiny import TINY, TinyProblem

    if name not in TINY:
        raise UserError(f"there is no problem {name!r}; there are {', '.join(names())}")
    return TinyProblem(TINY[name], seed)


def searched(there: Problem, strategy: Strategy, budget: int, seed: int = 0) -> list[Observation]:
    """What a strategy was told in so many evaluations, the problem's first points among them; in
    fewer where it ends by itself. Gradients are not asked for."""
    rng_for, history = rng_factory(seed), list[Observation]()
    nearest = getattr(there, "nearest", lambda vector, asked: vector)

    def tell(generation: int, slot: int, operator: str, vector: Sequence[float]) -> None:
        point = tuple(nearest(vector, {o.vector for o in history}))
        outcome = there.evaluate(point)
        found = Observation(
            generation, slot, point, operator, outcome.score, evidence=outcome.evidence
        )
        history.append(found)

    for slot, (operator, _, vector) in enumerate(there.first_points()[:budget]):
        tell(0, slot, operator, vector)
    while len(history) < budget:
        count = min(strategy.population(there.space.dimensions), budget - len(history))
        asked = strategy.propose(there.space, tuple(history), None, count, rng_for)
        if not asked:
            break
        generation = history[-1].generation + 1
        for slot, proposal in enumerate(asked):
            tell(generation, slot, proposal.operator, proposal.vector or ())
    return history
