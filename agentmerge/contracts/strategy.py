"""The contract of a search strategy: a pure function of an ordered history.

    propose(space, history, guidance, count, rng_for) -> list[Proposal]

It keeps no state between calls and reads no clock, so resuming, branching and replaying are exact
by construction, and any strategy can take over a search that another began. ``history`` is ordered
by (generation, slot), never by who finished first, and holds the seed population (generation 0).
Vectors are in the unit box; ``space`` alone knows real ranges. ``rng_for(generation, slot,
purpose)`` gives an independent generator derived from the run's seed and those three.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Literal, Protocol

import numpy as np

from agentmerge.contracts.advice import Guidance
from agentmerge.contracts.space import Space
from agentmerge.contracts.worker import Loss

#: Purpose codes of random generators; part of every stored search, so never renumber.
PURPOSES = {"sample": 0, "mutate": 1, "cma": 2, "seed": 3, "items": 4, "failing": 5}

#: What a gradient costs, in scores of as many items: one forward pass, and a backward pass of two.
GRADIENT_COST = 3


def cost_of(with_gradient: bool) -> int:
    """What a candidate takes of the budget, in scores: it is always scored."""
    return 1 + GRADIENT_COST * with_gradient


RngFor = Callable[[int, int, str], np.random.Generator]


def rng_factory(seed: int) -> RngFor:
    """``rng_for`` of one run: Generator(PCG64(SeedSequence([seed, generation, slot, code])))."""

    def rng_for(generation: int, slot: int, purpose: str) -> np.random.Generator:
        entropy = [seed, generation, slot, PURPOSES[purpose]]
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))

    return rng_for


@dataclass(frozen=True, slots=True)
class Proposal:
    """One candidate to try.

    vector: the raw point in the unit box as the strategy drew it, or None for a recipe outside
        the space. It stays with the candidate: a strategy is told what it asked.
    recipe: mergekit YAML, only where there is no vector.
    operator: who made it ("parent", "uniform", "scale", "init", "random", "llm_evo", "cma_es"...).
    want: a score, or a score and the gradient of ``loss`` over the search items. Where no gradient
        can be had (the worker, the method or the tasks have none, or ``vector`` is None), the
        score alone is asked for and paid.
    space: the key of the search space that ``vector`` lies in; whoever runs the search says it.
    """

    vector: tuple[float, ...] | None
    operator: str
    recipe: str | None = None
    label: str = ""
    want: Literal["score", "gradient"] = "score"
    loss: Loss = "margin"
    space: str = ""

    @property
    def cost(self) -> int:
        """What it takes of the budget, in scores."""
        return cost_of(self.want == "gradient")


@dataclass(frozen=True, slots=True, eq=False)
class Bound:
    """A constraint on one task's metric: ``sign * (values @ share)`` is at least ``least``.

    share: (m,) what one unit of an item's value adds to the metric. steep: what each unit below
    takes from the score that a strategy is told.
    """

    share: np.ndarray
    sign: float
    least: float
    steep: float

    def lacking(self, values: np.ndarray) -> np.ndarray:
        """How far the metric is below the least, (..., m) -> (...); negative where it is not."""
        found: np.ndarray = self.least - self.sign * (values @ self.share)
        return found


@dataclass(frozen=True, slots=True, eq=False)
class Items:
    """What every candidate is asked, in one fixed order: m items (or whole metrics) in all.

    task: (m,) the number of each item's task. weight: (m,) what one unit of the item's value adds
    to the score. margins: (m,) whether its signal is a margin, whose sign says right or wrong;
    where it is not, the signal is the value itself. documents: (m,) how many each stands for, by
    default one; a whole metric stands for all of its task's. bounds: what candidates must keep.
    tokens: (m,) where answers' length matters, what one unit of the item's value adds to its mean;
    the lengths are items of their own then, which add nothing to the score. traded: short answers
    are an objective too.
    """

    task: np.ndarray
    weight: np.ndarray
    margins: np.ndarray
    documents: np.ndarray | None = None
    bounds: tuple[Bound, ...] = ()
    tokens: np.ndarray | None = None
    traded: bool = False

    @property
    def counts(self) -> np.ndarray:
        """(m,) how many documents each item stands for."""
        return np.ones(len(self.weight)) if self.documents is None else self.documents

    @property
    def documents_scored(self) -> float:
        """How many documents the score is of; lengths are no more of them."""
        own = slice(None) if self.tokens is None else self.tokens == 0
        return float(self.counts[own].sum())


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """What a candidate showed item by item; NaN where it was not asked.

    signals: (m,) float64, margins in nats or values. values: (m,) float64, the metric's values; the
    score is their sum weighted by ``items.weight``.
    """

    items: Items
    signals: np.ndarray
    values: np.ndarray


@dataclass(frozen=True, slots=True)
class Observation:
    """A proposal with what came of it; ``score`` is None where it failed, or is prior.

    score: weighted sum of the tasks' metrics, higher is better (a task's weight may be negative).
    tasks: (task name, metric value), unweighted.
    gradient: d loss / d coordinate of the unit box, one number an axis (0 for axes without a slope,
        see ``chain_rule.differentiable_axes``), at this very point; None where none was asked for
        or none came. Lower loss is better: step against it.
    loss: what the gradient is of, in nats an item: the objective's own mix of tasks.
    evidence: the items behind the score; None where nobody kept them.
    rung: the fraction of every task's items that it was asked. Below 1 it is censored: it lost a
        race, and its score is the incumbent's plus their paired difference on those items, which
        is below the incumbent's and not to be compared with another's to the last digit.
    violation: what it lacks to the constraints, in the metrics' units; the score that a strategy
        is told is lowered by a steep multiple of it.
    space: the key of the search space that it was made in; ``vector`` is in the present one.
    pending: it has been proposed and is being scored (``search.lag``): it will have a score, and a
        strategy is told so that it does not propose the same. Only where a strategy does not say
        ``needs_all``.
    prior: it was scored under other settings, before a branch that asks something else. Its items
        that are asked still are evidence; it has no score that compares with others'.
    tokens: generated an item, of the tasks that generate; None where none does, or nobody counted.
    """

    generation: int
    slot: int
    vector: tuple[float, ...] | None
    operator: str
    score: float | None
    tasks: tuple[tuple[str, float], ...] = ()
    recipe_hash: str = ""
    label: str = ""
    failure: str = ""
    gradient: tuple[float, ...] | None = None
    loss: float | None = None
    evidence: Evidence | None = field(default=None, compare=False, repr=False)
    rung: float = 1.0
    violation: float = 0.0
    space: str = ""
    prior: bool = False
    pending: bool = False
    tokens: float | None = None

    @property
    def failed(self) -> bool:
        return self.score is None and not self.prior and not self.pending

    @property
    def censored(self) -> bool:
        return self.score is not None and self.rung < 1.0


History = Sequence[Observation]


class Strategy(Protocol):
    """One that also has ``uses_items = True`` is told each observation with its evidence; one that
    has ``needs_all = True`` none that is pending; one that
    reads guidance has ``heeds_advice = True``, so that nobody pays unawares for words unheard; one
    that looks for the whole front where ``Items.traded`` says so has ``trades = True``; one
    with settings of its own gives itself with them in ``with_settings(config.search)``."""

    name: str

    def propose(
        self, space: Space, history: History, guidance: Guidance | None, count: int, rng_for: RngFor
    ) -> list[Proposal]:
        """At most ``count`` candidates of the next generation, in slot order.

        An empty history asks for the draws that join the seed population (parents, uniform
        merges and warm starts are there already); a strategy that needs none returns [].
        """
        ...

    def population(self, dimensions: int) -> int:
        """How many candidates a generation has unless the user says otherwise."""
        ...


def default_population(dimensions: int) -> int:
    """4 + round(3 ln d), as CMA-ES and LLM-Evo-Merge have it."""
    return 4 + round(3 * float(np.log(max(dimensions, 1))))


def next_generation(history: History) -> int:
    """The generation that is being proposed: one after the last in ``history``, 0 if empty."""
    return history[-1].generation + 1 if history else 0


def first_generation(history: History) -> int:
    """The one of the cheap rivals: 0, or where a branch that asks something else began anew."""
    return min((o.generation for o in history if not o.prior), default=0)


def fittest(history: History, count: int) -> list[Observation]:
    """The best scored observations that have a vector, best first; ties go to the earlier."""
    scores = [o.score for o in history if o.vector is not None and o.score is not None]
    least = min(heapq.nlargest(count, scores), default=math.inf)
    best = [o for o in history if o.score is not None and o.score >= least and o.vector is not None]
    return sorted(best, key=lambda o: (-(o.score or 0.0), o.generation, o.slot))[:count]


def improved(history: History) -> bool:
    """Did the last generation beat all before it? The first one counts as an improvement."""
    last = history[-1].generation
    latest = list(takewhile(lambda o: o.generation == last, reversed(history)))
    best = max((o.score for o in latest if o.score is not None), default=None)
    before = [o.score for o in history[: len(history) - len(latest)] if o.score is not None]
    return best is not None and (not before or max(before) < best)
