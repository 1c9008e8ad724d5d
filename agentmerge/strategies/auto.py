"""The default search: learns from items, lets simpler searches step in, and stops when done.

After the cheap rivals every generation belongs to one operator. ``gradient`` has the first
``GRADIENT_STEPS`` where there are many dimensions and workers offer gradients, then ``margins``
works. When nothing was gained for ``STALE`` evaluations, the operators share the budget by what
each gained an evaluation, older gains counting less (a bandit on improvement per item evaluation).
What agents propose enters as extra points, at most ``MOST_ADVICE`` of all, and less unless it earns
its share; until one of them gained, only those of which the items' model expects as much as of the
search's own. A search whose next candidate is expected to gain less than the noise of the items
ends, unless its own candidates still climb.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from agentmerge.contracts.advice import Guidance
from agentmerge.contracts.operators import ADVICE, CARRIED
from agentmerge.contracts.space import Space
from agentmerge.contracts.strategy import (
    History,
    Observation,
    Proposal,
    RngFor,
    Strategy,
    cost_of,
    first_generation,
    next_generation,
)
from agentmerge.strategies.front import by_area, traded
from agentmerge.strategies.gradient import GradientSteps, next_step
from agentmerge.strategies.margins import (
    ENOUGH,
    FEW_DOCUMENTS,
    MORE_EXPLORATION,
    Margins,
    Prospect,
    most_promising,
    prospect_for,
)
from agentmerge.strategies.one_plus_one import OnePlusOne
from agentmerge.strategies.random import random_vectors

GRADIENT_STEPS = 6
#: In fewer dimensions the items' model is as good without: six steps cost what 23 candidates do.
GRADIENTS_FROM = 33
STALE = 8
#: So often that without a gain, and twice its dimensions, ends a search that no margins end.
PATIENCE = 3
FLOOR = 0.1
FADE = 0.9
LEAST_ADVICE, MOST_ADVICE = 0.1, 0.3


class Auto:
    name = "auto"
    heeds_advice = True
    uses_items = True
    trades = True

    def __init__(self, gradients_from: int | None = GRADIENTS_FROM) -> None:
        """gradients_from: dimensions from which on gradients are asked for; None: never."""
        self.gradients_from = gradients_from

    def propose(
        self, space: Space, history: History, guidance: Guidance | None, count: int, rng_for: RngFor
    ) -> list[Proposal]:
        generation = next_generation(history)
        if generation == 0 or count == 0:
            return []
        gradients = self.gradients_from is not None and space.dimensions >= self.gradients_from
        seen, operator = history, operator_of(history, gradients, rng_for)
        if traded(history):  # no other operator looks for a front
            seen, operator = by_area(history), Margins()
        advised = fresh(advice(seen, guidance, count), history)
        unproven = advised and not gain_rate(seen, ADVICE)
        stale = since_gain(seen) >= STALE
        prospect: Prospect | None = None
        if stale or unproven or isinstance(operator, Margins):
            prospect = prospect_for(space, history)
        if stale and prospect and nothing_to_gain(space, seen, prospect, rng_for):
            return []
        if unproven and prospect:
            [best] = Margins().climbing(space, prospect, generation, 1, rng_for)
            advised = promising(advised, prospect, best)
        count_own = count - len(advised)
        if isinstance(operator, Margins):
            asked = operator.climbing(space, prospect, generation, count_own, rng_for)
        else:
            asked = operator.propose(space, history, guidance, count_own, rng_for)
        found = fresh([*advised, *asked], history)
        if not found:  # nothing new is no reason to stop
            vectors = random_vectors(space, generation, count, rng_for)
            found = [Proposal(vector, "random") for vector in vectors]
        return found

    def population(self, dimensions: int) -> int:
        return 1


def operator_of(history: History, gradients: bool, rng_for: RngFor) -> Strategy:
    """Whose generation the next one is."""
    steps = sum(o.operator == GradientSteps.name for o in history)
    open_gradient = gradients and next_step(history) is not None
    if open_gradient and steps < GRADIENT_STEPS:
        return GradientSteps()
    operators: list[Strategy] = [Margins(), OnePlusOne(anywhere=True)]
    if open_gradient:
        operators.append(GradientSteps())
    if since_gain(history) < STALE:
        return operators[0]
    rates = [gain_rate(history, operator.name) for operator in operators]
    total = sum(rates)
    shares = [
        FLOOR + (1 - FLOOR * len(rates)) * (rate / total if total else i == 0)
        for i, rate in enumerate(rates)
    ]
    rng = rng_for(next_generation(history), 0, "mutate")
    return operators[int(rng.choice(len(operators), p=np.array(shares) / sum(shares)))]


def nothing_to_gain(space: Space, history: History, prospect: Prospect, rng_for: RngFor) -> bool:
    """Whether the most promising point is expected to gain the least that is worth it, at most.

    Twice the doubt that proposals begin with is counted: with theirs a search would end too early.
    Never while the search's own candidates climb, however far below a rival they are: what a model
    promises of a region that it has hardly seen is no reason to leave it. Without margins a model
    promises without end, and what it promised has to have come.
    """
    own = later(history)
    if len(own) < max(2 * STALE, space.dimensions) or since_rise(own) < STALE:
        return False
    patience = max(PATIENCE * STALE, 2 * space.dimensions)
    if promises_on(history, prospect) and since_rise(own, by=prospect.least_gain) >= patience:
        return True
    doubtful = replace(prospect, exploration=max(prospect.exploration, MORE_EXPLORATION[0]))
    rng = rng_for(next_generation(history), 0, "items")
    return most_promising(doubtful, space, rng, np.eye(space.dimensions))[1] < prospect.least_gain


def promises_on(history: History, prospect: Prospect) -> bool:
    """Whether a model may promise a gain for ever: no margin tells it how far an item is from
    right. A score that nobody took apart is for its owner to end."""
    told = next((o.evidence for o in reversed(history) if o.evidence is not None), None)
    margins = prospect.by_item and bool(prospect.score.margins.any())
    return told is not None and told.items.documents_scored >= FEW_DOCUMENTS and not margins


def later(history: History) -> list[Observation]:
    """What a search tried in this space after its cheap rivals."""
    first = first_generation(history)
    return [
        o
        for o in history
        if o.generation > first and not (o.prior or o.pending) and o.operator != CARRIED
    ]


def since_gain(history: History) -> int:
    """Evaluations in this search space since the best score last rose there."""
    first = first_generation(history)
    rivals = [o.score for o in history if o.generation == first and o.score is not None]
    return since_rise(later(history), max(rivals, default=-np.inf))


def since_rise(history: History, best: float = -np.inf, by: float = 0.0) -> int:
    """How many observations there are since one was above ``best`` and all before it.

    by: how far above what counted last.
    """
    since = 0
    for observation in history:
        score = -np.inf if observation.score is None else observation.score
        risen = score > best + by
        since, best = (0, score) if risen else (since + 1, best)
    return since


def gain_rate(history: History, operator: str) -> float:
    """What an operator's generations added to the best score, an evaluation; old ones fade."""
    best, before, generation = -np.inf, -np.inf, -1
    first = first_generation(history)
    gained, spent = 0.0, 0.0
    for observation in history:
        if observation.prior or observation.pending:
            continue
        if observation.generation != generation:
            generation, before = observation.generation, best
            gained, spent = FADE * gained, FADE * spent
        score = -np.inf if observation.score is None else observation.score
        if observation.operator == operator and generation > first:
            spent += cost_of(observation.gradient is not None)
            gained += max(0.0, score - max(best, before)) if np.isfinite(best) else 0.0
        best = max(best, score)
    return gained / spent if spent else 0.0


def advice(history: History, guidance: Guidance | None, count: int) -> list[Proposal]:
    """A model's points as extra ones, as many as its share allows."""
    if guidance is None or guidance.source != "model":
        return []
    own = later(history)
    asked = sum(o.operator == ADVICE for o in own)
    mine = gain_rate(history, ADVICE)
    others = max(gain_rate(history, name) for name in (Margins.name, GradientSteps.name))
    earned = mine / (mine + others) if mine + others else 0.0
    share = LEAST_ADVICE + (MOST_ADVICE - LEAST_ADVICE) * earned
    allowed = int(share * (len(own) + count) - asked + 0.5)
    points = [*guidance.candidates, *([guidance.mean] if guidance.mean else [])]
    return [Proposal(tuple(point), ADVICE) for point in points[: max(0, min(allowed, count))]]


def promising(proposals: Sequence[Proposal], prospect: Prospect, own: Proposal) -> list[Proposal]:
    """Those that are expected to gain nearly as much as the search's own next point."""
    points = np.array([p.vector for p in (own, *proposals)])
    least, *gains = prospect.gains(prospect.ratios.representative(points))
    return [p for p, gain in zip(proposals, gains, strict=True) if gain >= ENOUGH * least]


def fresh(proposals: Sequence[Proposal], history: History) -> list[Proposal]:
    """Without points that are known already; a gradient may be asked of a known point."""
    known = {o.vector for o in history}
    kept = []
    for proposal in proposals:
        if proposal.want == "gradient" or proposal.vector not in known:
            kept.append(proposal)
            known.add(proposal.vector)
    return kept


STRATEGY = Auto()
