"""Bayesian optimisation on every item's margin instead of one score (see docs/search.md).

A Gaussian process predicts each item's margin at a point (``surrogate.py``); the share of items
right there is the mean of Phi(margin / softening), the softening fitted per task. A candidate is
worth its expected improvement, all items erring together: one standard normal shared by all,
integrated at five nodes. Items without a margin count with their value.

Where nobody kept items (another's history), the score itself is the one item.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import minimize
from scipy.special import ndtr

from agentmerge.agents.schemas import Guidance
from agentmerge.genome import SearchSpace
from agentmerge.strategies.base import Items, Observation, Proposal, RngFor, next_generation
from agentmerge.strategies.censored import completed
from agentmerge.strategies.one_plus_one import reflected
from agentmerge.strategies.random import random_vectors
from agentmerge.strategies.rungs import rungs
from agentmerge.strategies.surrogate import ItemModel, fitted

CLIP = 12.0
#: Widths of a step from margin to right, in nats, that are tried; the most likely is used.
SOFTENINGS = (0.5, 0.7, 1.0, 1.4, 2.0, 3.0, 4.0)
_NODES, _SHARES = np.polynomial.hermite_e.hermegauss(5)
_SHARES = _SHARES / _SHARES.sum()
ELITES = 4
STEPS = (0.05, 0.15, 0.4)
SCREENED, ROUNDS, POLISHED = 500, 3, 4
#: What a proposal looks at, at most: items, and points (the best quarter and the latest).
ITEMS, POINTS = 1000, 400
#: How far two points must be apart, in the unit box, to be two.
APART = 1e-3
#: A lower rung is enough while its best point promises so much of what the whole space's does.
ENOUGH = 0.7
#: The share of noise in an item's variance from which on its answers are mostly chance.
CHANCE = 0.25
_SOFT = 1e-3
#: How much of the model's deviation counts. All of it sends the search far away for long, since
#: items that all err the same way promise perfect scores anywhere unknown.
BOLDNESS = 0.25
BOLDER = (0.5, 1.0)
#: A trifle is so much of the standard error of a difference in which CHANGING of the items change.
CHANGING, PART = 0.01, 0.2


@dataclass(frozen=True, eq=False)
class Table:
    """What a model is fitted on. points: (n, d). signals: (n, m). values: (n, m)."""

    points: np.ndarray
    signals: np.ndarray
    values: np.ndarray
    items: Items


@dataclass(frozen=True, eq=False)
class SoftScore:
    """From signals to a smooth score. weight, margins: (m,); softening: (m,), in nats."""

    weight: np.ndarray
    margins: np.ndarray
    softening: np.ndarray

    def __call__(self, signals: np.ndarray) -> np.ndarray:
        """(..., m) -> (...)."""
        right = np.where(self.margins, ndtr(signals / self.softening), signals)
        found: np.ndarray = right @ self.weight
        return found

    def slope(self, signals: np.ndarray) -> np.ndarray:
        """d score / d signal, (m,) -> (m,)."""
        scaled = signals / self.softening
        bell = np.exp(-0.5 * scaled**2) / np.sqrt(2 * np.pi) / self.softening
        found: np.ndarray = self.weight * np.where(self.margins, bell, 1.0)
        return found


@dataclass(frozen=True, eq=False)
class Prospect:
    """A model with what counts as an improvement: expected gains at points."""

    model: ItemModel
    score: SoftScore
    best: float
    boldness: float

    @property
    def by_item(self) -> bool:
        return len(self.score.weight) > 1

    @property
    def trifle(self) -> float:
        """A gain that is not worth an evaluation: far below what the items can show."""
        return PART * float(np.sqrt(CHANGING * (self.score.weight**2).sum()))

    def gains(self, points: np.ndarray) -> np.ndarray:
        """Expected improvement at (c, d) points, in score."""
        means, deviation = self.model.predict(points)
        total = np.zeros(len(points))
        for node, share in zip(_NODES, _SHARES, strict=True):
            signals = means + self.boldness * node * deviation[:, None] * self.model.spread
            total += share * np.maximum(self.score(signals) - self.best, 0.0)
        return total

    def smooth_loss(self, point: np.ndarray) -> tuple[float, np.ndarray]:
        """(minus a smooth expected improvement, its gradient) at one point."""
        means, deviation, kernel_slope, deviation_slope = self.model.slope(point)
        total, gradient = 0.0, np.zeros(len(point))
        for node, share in zip(_NODES, _SHARES, strict=True):
            signals = means + self.boldness * node * deviation * self.model.spread
            ahead = (float(self.score(signals)) - self.best) / _SOFT
            pull = self.score.slope(signals)
            along = kernel_slope @ (self.model.weights @ pull)
            along = along + self.boldness * node * float(self.model.spread @ pull) * deviation_slope
            total += share * _SOFT * float(np.logaddexp(0.0, ahead))
            gradient += share * along / (1.0 + np.exp(-np.clip(ahead, -500, 500)))
        return -total, -gradient


class Margins:
    name = "margins"
    uses_items = True

    def propose(
        self,
        space: SearchSpace,
        history: Sequence[Observation],
        guidance: Guidance | None,
        count: int,
        rng_for: RngFor,
    ) -> list[Proposal]:
        generation = next_generation(history)
        if generation == 0 or count == 0:
            return []
        table = table_of(history)
        if table is None or len(table.points) < 2:
            vectors = random_vectors(space, generation, count, rng_for)
            return [Proposal(vector, "random") for vector in vectors]
        prospect = prospect_of(table)
        rng = rng_for(generation, 0, "sample")
        found = []
        for _ in range(count):
            point = climbed(prospect, space, rng)
            found.append(Proposal(tuple(float(x) for x in point), self.name))
            prospect = believed(prospect, point)
        return found

    def population(self, dimensions: int) -> int:
        return 1


def table_of(history: Sequence[Observation]) -> Table | None:
    """Everything scored inside the space; None where there is nothing.

    A failure is told as a poor result, the lower quartile of what each item showed, so that the
    search leaves its surroundings without a cliff that would bend every length scale.
    """
    scored = [o for o in history if o.vector is not None and o.score is not None]
    if not scored:
        return None
    if all(o.evidence is not None for o in scored):
        items = scored[-1].evidence.items  # type: ignore[union-attr]
        values = np.stack([o.evidence.values for o in scored])  # type: ignore[union-attr]
        signals = np.stack([o.evidence.signals for o in scored])  # type: ignore[union-attr]
        signals = np.where(items.margins, np.clip(signals, -CLIP, CLIP), signals)
        signals = completed(np.array([o.vector for o in scored]), signals)
        expected = np.where(items.margins, signals > 0, signals)
        values = np.where(np.isfinite(values), values, expected)
        whole = np.isfinite(signals).all(1)
        scored = [o for o, kept in zip(scored, whole, strict=True) if kept]
        signals, values = signals[whole], values[whole]
    else:
        items = Items(np.zeros(1, int), np.ones(1), np.zeros(1, bool))
        values = np.array([[o.score] for o in scored], float)
        signals = values
    points = np.array([o.vector for o in scored])
    failed = np.array([o.vector for o in history if o.vector is not None and o.score is None])
    if len(failed):
        poor = np.quantile(signals, 0.25, axis=0)
        points = np.vstack([points, failed])
        signals = np.vstack([signals, np.tile(poor, (len(failed), 1))])
        values = np.vstack([values, np.tile(np.quantile(values, 0.25, axis=0), (len(failed), 1))])
    return Table(points, signals, values, items)


def prospect_of(table: Table) -> Prospect:
    """The model of the items, or of their score alone where the items' answers are mostly chance.

    What changes by chance from one merge to the next says less apart than together.
    """
    table = thinned(table)
    score = softened(table)
    model = fitted(table.points, table.signals)
    scores = score(table.signals)
    if len(table.items.weight) > 1 and model.hyper.noise < CHANCE:
        return Prospect(model, score, float(scores.max()), BOLDNESS)
    told = scores[:, None]
    whole = SoftScore(np.ones(1), np.zeros(1, bool), np.ones(1))
    smooth = fitted(table.points, told)
    return Prospect(smooth, whole, float(smooth.predict(table.points)[0].max()), 1.0)


def thinned(table: Table) -> Table:
    """At most ITEMS items and POINTS points.

    Of each task items are kept evenly by their mean signal, and count for those left out.
    """
    items, scores = table.items, np.nan_to_num(table.values) @ table.items.weight
    count = len(table.points)
    rows = np.arange(count)
    if count > POINTS:
        best = np.argsort(-scores, kind="stable")[: POINTS // 4]
        rest = np.setdiff1d(rows, best)[-(POINTS - len(best)) :]
        rows = np.sort(np.append(best, rest))
    if len(items.weight) <= ITEMS:
        return replace(
            table, points=table.points[rows], signals=table.signals[rows], values=table.values[rows]
        )
    kept, weights = [], []
    for task in np.unique(items.task):
        mine = np.flatnonzero(items.task == task)
        mine = mine[np.argsort(table.signals[:, mine].mean(0), kind="stable")]
        number = max(1, round(ITEMS * len(mine) / len(items.task)))
        some = mine[np.linspace(0, len(mine) - 1, number).round().astype(int)]
        kept.append(some)
        weights.append(items.weight[some] * len(mine) / len(some))
    places = np.concatenate(kept)
    fewer = Items(items.task[places], np.concatenate(weights), items.margins[places])
    pick = np.ix_(rows, places)
    return Table(table.points[rows], table.signals[pick], table.values[pick], fewer)


def softened(table: Table) -> SoftScore:
    """The softening of each task under which its margins say best which items are right."""
    items = table.items
    softening = np.full(len(items.weight), SOFTENINGS[0])
    for task in np.unique(items.task[items.margins]):
        mine = items.margins & (items.task == task)
        signals, right = table.signals[:, mine], table.values[:, mine] > 0.5
        likely = [
            np.log(np.clip(ndtr(np.where(right, signals, -signals) / soft), 1e-6, 1.0)).sum()
            for soft in SOFTENINGS
        ]
        softening[mine] = SOFTENINGS[int(np.argmax(likely))]
    return SoftScore(items.weight, items.margins, softening)


def believed(prospect: Prospect, point: np.ndarray) -> Prospect:
    """As if the point had shown what is expected of it, for the next one of the same generation."""
    means, _ = prospect.model.predict(point[None])
    model = prospect.model.told(point[None], means)
    return replace(prospect, model=model, best=max(prospect.best, float(prospect.score(means)[0])))


def climbed(prospect: Prospect, space: SearchSpace, rng: np.random.Generator) -> np.ndarray:
    """The most promising point of the lowest rung that promises nearly as much as the whole space.

    What few numbers can say is learned first, and from fewer candidates. Where a trifle is all
    that is promised, more of the model's doubt is counted.
    """
    *lower, whole = rungs(space)
    point, gain = most_promising(prospect, rng, whole)
    for boldness in BOLDER:
        if not prospect.by_item or gain >= prospect.trifle:
            break
        prospect = replace(prospect, boldness=boldness)
        point, gain = most_promising(prospect, rng, whole)
    if prospect.by_item:
        for basis in lower:
            coarse, promised = most_promising(prospect, rng, basis)
            if promised >= ENOUGH * gain:
                return coarse
    return point


def most_promising(
    prospect: Prospect, rng: np.random.Generator, basis: np.ndarray
) -> tuple[np.ndarray, float]:
    """The point of a rung with the largest expected improvement that was found, and that.

    Candidates: uniform, and perturbations of the best points along each axis's length scale, at
    three widths; refined from the best of themselves; then polished by gradient.

    basis: (k, d), of ``rungs``.
    """
    known = prospect.model.points
    scores = prospect.score(prospect.model.mean + prospect.model.centred())
    best = known[np.argsort(-scores, kind="stable")[:ELITES]]
    # On a lower rung: the nearest points.
    centres = np.clip(best @ np.linalg.pinv(basis), 0.0, 1.0)
    scales = np.exp(np.log(prospect.model.hyper.scales) @ (basis > 0).T / (basis > 0).sum(1))
    pool, gains = centres, prospect.gains(centres @ basis)
    for step in range(ROUNDS):
        fresh = _perturbed(centres, scales, rng, shrink=0.5**step)
        if step == 0:
            fresh = np.vstack([fresh, rng.random((SCREENED // 4, len(basis)))])
        pool = np.vstack([pool, fresh])
        gains = np.append(gains, prospect.gains(fresh @ basis))
        order = np.argsort(-gains, kind="stable")[: 4 * ELITES]
        pool, gains = pool[order], gains[order]
        centres = pool[:ELITES]
    polished = [_polished(prospect, start, basis) for start in pool[:POLISHED]]
    points = np.vstack([pool, polished]) @ basis
    gains = prospect.gains(points)
    for index in np.argsort(-gains, kind="stable"):
        if np.abs(known - points[index]).max(1).min() > APART:
            return np.asarray(points[index]), float(gains[index])
    return rng.random(len(basis)) @ basis, 0.0


def _perturbed(
    centres: np.ndarray, scales: np.ndarray, rng: np.random.Generator, shrink: float
) -> np.ndarray:
    """SCREENED steps from the centres; of some, only a few axes move."""
    count, dimensions = SCREENED, centres.shape[1]
    relative = np.clip(scales / np.exp(np.log(scales).mean()), 0.3, 3.0)
    width = rng.choice(STEPS, size=(count, 1)) * shrink * relative
    moves = rng.random((count, dimensions)) < rng.choice((0.3, 1.0), size=(count, 1))
    start = centres[rng.integers(len(centres), size=count)]
    steps = moves * width * rng.standard_normal((count, dimensions))
    return reflected(start + steps)


def _polished(prospect: Prospect, start: np.ndarray, basis: np.ndarray) -> np.ndarray:
    def loss(coordinates: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope = prospect.smooth_loss(coordinates @ basis)
        return value, basis @ slope

    box = [(0.0, 1.0)] * len(start)
    found = minimize(
        loss, start, jac=True, method="L-BFGS-B", bounds=box, options={"maxiter": 15}
    )  # fmt: skip
    end: np.ndarray = np.clip(found.x, 0.0, 1.0)
    return end


STRATEGY = Margins()
