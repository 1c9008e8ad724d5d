"""Bayesian optimisation on every item's margin instead of one score (see docs/search.md).

A Gaussian process predicts each item's signal at a point (``surrogate.py``), and those say the
score that is expected there (``soft_score.py``). A candidate is worth its expected improvement, all
items erring together: one standard normal shared by all, integrated at five nodes. Where only
ratios of weights matter, points are those of ``ratios.py``; where a point is no merge at all, it is
not proposed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import minimize

from agentmerge.contracts.advice import Guidance
from agentmerge.contracts.space import Space
from agentmerge.contracts.strategy import Bound, History, Proposal, RngFor, next_generation
from agentmerge.space.subspaces import rungs
from agentmerge.strategies.front import SHOWN, Front, Worst, undominated, worst_of
from agentmerge.strategies.one_plus_one import reflected
from agentmerge.strategies.random import random_vectors
from agentmerge.strategies.ratios import EVERYTHING, Ratios
from agentmerge.strategies.soft_score import SoftScore, directions, scaled
from agentmerge.strategies.surrogate import ItemModel, fitted
from agentmerge.strategies.table import Table, softened, table_of, thinned

_NODES, _SHARES = np.polynomial.hermite_e.hermegauss(5)
_SHARES = _SHARES / _SHARES.sum()
ELITES = 4
STEPS = (0.05, 0.15, 0.4)
SCREENED, ROUNDS, POLISHED = 500, 3, 4
#: How far two points must be apart, in the unit box, to be two: nearer merges answer alike. A score
#: of few documents may be a function without noise, whose optimum is to be met.
APART, APART_WITHOUT_NOISE = 1e-3, 1e-7
#: A lower rung is enough while its best point promises so much of what the whole space's does.
ENOUGH = 0.7
#: The share of noise in an item's variance from which on its answers are mostly chance.
CHANCE = 0.25
_SOFT = 1e-3
#: How much of the model's deviation counts. All of it sends the search far away for long, since
#: items that all err the same way promise perfect scores anywhere unknown.
EXPLORATION = 0.25
MORE_EXPLORATION = (0.5, 1.0)
#: The least gain is so much of the standard error of a difference in which CHANGING of the items
#: change.
CHANGING, PART = 0.01, 0.2
#: Fewer documents have no noise to speak of: a score that nobody took apart. There it is so
#: much of what the best score is ahead of the median.
FEW_DOCUMENTS, LITTLE = 20, 1e-3


@dataclass(frozen=True, eq=False)
class Prospect:
    """A model with what counts as an improvement: expected gains at points.

    least_gain: a gain that is not worth an evaluation, far below what the items can show. by_item:
    whether the model knows items, or their score alone.
    """

    model: ItemModel
    score: SoftScore
    best: float
    exploration: float
    least_gain: float
    by_item: bool
    ratios: Ratios = EVERYTHING
    apart: float = APART
    front: Front | None = None

    def gains(self, points: np.ndarray) -> np.ndarray:
        """Expected improvement at (c, d) points, in score; of the front's area where there is one,
        scores and lengths each erring together, and not with one another."""
        means, deviation = self.model.predict(points)
        if self.front is not None:
            signals = [
                means + self.exploration * node * deviation[:, None] * self.model.spread
                for node in _NODES
            ]
            lengths = [self.score.length(each) for each in signals]
            area = np.zeros(len(points))
            for scores, share in zip(map(self.score, signals), _SHARES, strict=True):
                for tokens, other in zip(lengths, _SHARES, strict=True):
                    area += share * other * self.front.added(scores, tokens)
            return area
        total = np.zeros(len(points))
        for node, share in zip(_NODES, _SHARES, strict=True):
            signals = means + self.exploration * node * deviation[:, None] * self.model.spread
            total += share * np.maximum(self.score(signals) - self.best, 0.0)
        return total

    def smooth_loss(self, point: np.ndarray) -> tuple[float, np.ndarray]:
        """(minus a smooth expected improvement, its gradient) at one point."""
        means, deviation, kernel_slope, deviation_slope = self.model.slope(point)
        if self.front is not None:
            return self._area_loss(self.front, means, deviation, kernel_slope, deviation_slope)
        total, gradient = 0.0, np.zeros(len(point))
        for node, share in zip(_NODES, _SHARES, strict=True):
            signals = means + self.exploration * node * deviation * self.model.spread
            ahead = (float(self.score(signals)) - self.best) / _SOFT
            pull = self.score.slope(signals)
            along = kernel_slope @ (self.model.weights @ pull)
            along = (
                along + self.exploration * node * float(self.model.spread @ pull) * deviation_slope
            )
            total += share * _SOFT * float(np.logaddexp(0.0, ahead))
            gradient += share * along / (1.0 + np.exp(-np.clip(ahead, -500, 500)))
        return -total, -gradient

    def _area_loss(
        self,
        front: Front,
        means: np.ndarray,
        deviation: np.ndarray,
        kernel_slope: np.ndarray,
        deviation_slope: np.ndarray,
    ) -> tuple[float, np.ndarray]:
        told = []
        for node in _NODES:
            signals = means + self.exploration * node * deviation * self.model.spread
            values = float(self.score(signals)), float(self.score.length(signals))
            slopes = [
                kernel_slope @ (self.model.weights @ pull)
                + self.exploration * node * float(self.model.spread @ pull) * deviation_slope
                for pull in (self.score.slope(signals), self.score.length_slope(signals))
            ]
            told.append((values, slopes))
        total, gradient = 0.0, np.zeros(len(kernel_slope))
        for ((score, _), (rise, _)), share in zip(told, _SHARES, strict=True):
            for ((_, tokens), (_, longer)), other in zip(told, _SHARES, strict=True):
                by_score, by_tokens = front.slopes(score, tokens)
                added = front.added(np.array([score]), np.array([tokens]))
                total += share * other * float(added[0])
                gradient += share * other * (by_score * rise + by_tokens * longer)
        return -total, -gradient

    def elites(self) -> np.ndarray:
        """The best of the points that are known; of a front, some along all of it."""
        signals = self.model.mean + self.model.centred()
        scores = self.score(signals)
        if self.front is None:
            some = np.argsort(-scores, kind="stable")[:ELITES]
        else:
            along = undominated(scores, self.score.length(signals))
            count = min(len(along), 2 * ELITES)
            some = along[np.linspace(0, len(along) - 1, count).round().astype(int)]
        found: np.ndarray = self.model.points[some]
        return found


class Margins:
    name = "margins"
    uses_items = True
    trades = True

    def propose(
        self, space: Space, history: History, guidance: Guidance | None, count: int, rng_for: RngFor
    ) -> list[Proposal]:
        generation = next_generation(history)
        if generation == 0 or count == 0:
            return []
        return self.climbing(space, prospect_for(space, history), generation, count, rng_for)

    def climbing(
        self, space: Space, prospect: Prospect | None, generation: int, count: int, rng_for: RngFor
    ) -> list[Proposal]:
        """The most promising points, each as if those before had shown what is expected."""
        if prospect is None:
            vectors = random_vectors(space, generation, count, rng_for)
            return [Proposal(vector, "random") for vector in vectors]
        rng = rng_for(generation, 0, "sample")
        found: list[Proposal] = []
        for _ in range(count):
            if found:
                prospect = believed(prospect, np.array([found[-1].vector]))
            point = climbed(prospect, space, rng)
            found.append(Proposal(tuple(float(x) for x in point), self.name))
        return found

    def population(self, dimensions: int) -> int:
        return 1


def prospect_for(space: Space, history: History) -> Prospect | None:
    """What a history promises; None where it says too little for a model."""
    table = table_of(history)
    if table is None or len(table.points) < 2:
        return None
    ratios = Ratios.of(space)
    table = replace(table, points=ratios.representative(table.points))
    apart = APART if table.items.documents_scored >= FEW_DOCUMENTS else APART_WITHOUT_NOISE
    found = replace(prospect_of(table, worst_of(history)), ratios=ratios, apart=apart)
    pending = [o.vector for o in history if o.pending and o.vector is not None]
    return believed(found, ratios.representative(np.array(pending))) if pending else found


def prospect_of(table: Table, worst: Worst | None = None) -> Prospect:
    """The model of the items, or of their score alone where the items' answers are mostly chance.

    What changes by chance from one merge to the next says less apart than together. worst: from
    where the front's area counts; by default the worst of all that is known.
    """
    table = thinned(table)
    score = softened(table)
    scores = score(table.signals)
    if worst is not None and score.tokens is not None:  # in true scores, and all else in soft ones
        soft = replace(score, bounds=())(table.signals)
        gap = float((soft - table.values @ table.items.weight)[_counted(table)].mean())
        worst = replace(worst, score=worst.score + gap)
    least_gain, best = least_gain_of(table, scores), best_of(scores, table)
    tokens = table.items.tokens
    answers = table.signals if tokens is None else table.signals[:, tokens == 0]
    if answers.shape[1] > 1:
        model = fitted(table.points, table.signals)
        # Lengths are no chance, however much of it there is in the answers.
        judged = model if tokens is None else fitted(table.points, answers)
        if judged.hyper.noise < CHANCE:
            found = Prospect(model, score, best, EXPLORATION, least_gain, by_item=True)
            return _with_front(found, table, table.signals, worst)
    whole, told = summed(score, table)
    smooth = fitted(table.points, told)
    expected = smooth.predict(table.points)[0]
    best = best_of(whole(expected), table)
    found = Prospect(smooth, whole, best, 1.0, least_gain, by_item=False)
    return _with_front(found, table, expected, worst)


def _with_front(
    found: Prospect, table: Table, signals: np.ndarray, worst: Worst | None
) -> Prospect:
    """The same, after the whole front where short answers are an objective too."""
    if found.score.tokens is None:
        return found
    scores, lengths = found.score(signals), found.score.length(signals)
    worst = worst or Worst.of(scores, lengths)
    kept = _counted(table)
    front = Front.of(worst, scores[kept], lengths[kept])
    return replace(found, front=front, least_gain=found.least_gain / SHOWN)


def best_of(scores: np.ndarray, table: Table) -> float:
    """The best of what counts."""
    return float(scores[_counted(table)].max())


def _counted(table: Table) -> np.ndarray:
    """(n,) the rows that count; all where none does."""
    return table.counts if table.counts.any() else np.ones_like(table.counts)


def summed(score: SoftScore, table: Table) -> tuple[SoftScore, np.ndarray]:
    """The score, and each bounded metric, as the only items there are; and their signals."""
    values = score.values(table.signals)
    lengths = () if score.tokens is None else (score.tokens,)
    shares = (score.weight, *(b.share for b in score.bounds), *lengths)
    sums = [values @ share for share in shares]
    places = np.eye(len(sums))
    tokens = places[-1] if lengths else None
    bounds = tuple(
        Bound(place, b.sign, b.least, b.steep)
        for place, b in zip(places[1 : 1 + len(score.bounds)], score.bounds, strict=True)
    )
    told, decades = scaled(np.array(sums).T, directions(places[0], bounds, tokens))
    plain = np.zeros(len(sums), bool)
    return SoftScore(places[0], plain, np.ones(len(sums)), decades, bounds, tokens), told


def least_gain_of(table: Table, scores: np.ndarray) -> float:
    """A gain that is not worth an evaluation; see ``Prospect``."""
    items = table.items
    if items.documents_scored < FEW_DOCUMENTS:
        return LITTLE * float(scores.max() - np.median(scores))
    best = table.values[int(scores.argmax())]
    # One document more or less is worth 1 at most, and of other scales as much as the value now.
    unit = np.where(items.margins, 1.0, np.maximum(abs(best), (abs(table.values) <= 1).all(0)))
    per_document = (items.weight * unit) ** 2 / items.counts
    return PART * float(np.sqrt(CHANGING * per_document.sum()))


def believed(prospect: Prospect, points: np.ndarray) -> Prospect:
    """As if points (c, d) had shown what is expected of them, for the next one of their generation,
    or of the window. One after the other would be the same: what is expected changes no mean."""
    means, _ = prospect.model.predict(points)
    scores, front = prospect.score(means), prospect.front
    if front is not None:
        for score, length in zip(scores, prospect.score.length(means), strict=True):
            front = front.told(float(score), float(length))
    best = max(prospect.best, float(scores.max()))
    return replace(prospect, model=prospect.model.told(points, means), best=best, front=front)


def climbed(prospect: Prospect, space: Space, rng: np.random.Generator) -> np.ndarray:
    """The most promising point of the lowest rung that promises nearly as much as the whole space.

    What few numbers can say is learned first, and from fewer candidates. Where the least gain is
    all that is promised, more of the model's doubt is counted.
    """
    *lower, whole = rungs(space)
    point, gain = most_promising(prospect, space, rng, whole)
    for exploration in MORE_EXPLORATION:
        if not prospect.by_item or gain >= prospect.least_gain:
            break
        prospect = replace(prospect, exploration=exploration)
        point, gain = most_promising(prospect, space, rng, whole)
    if prospect.by_item:
        for basis in lower:
            coarse, promised = most_promising(prospect, space, rng, basis)
            if promised >= ENOUGH * gain:
                return coarse
    return point


def most_promising(
    prospect: Prospect, space: Space, rng: np.random.Generator, basis: np.ndarray
) -> tuple[np.ndarray, float]:
    """The point of a rung with the largest expected improvement that was found, and that.

    Candidates: uniform, and perturbations of the best points along each axis's length scale, at
    three widths; refined from the best of themselves; then polished by gradient.

    basis: (k, d), of ``rungs``.
    """
    known = prospect.model.points

    def promise(coordinates: np.ndarray) -> np.ndarray:
        return prospect.gains(prospect.ratios.representative(coordinates @ basis))

    # On a lower rung: the nearest points.
    centres = np.clip(prospect.elites() @ np.linalg.pinv(basis), 0.0, 1.0)
    scales = np.exp(np.log(prospect.model.hyper.scales) @ (basis > 0).T / (basis > 0).sum(1))
    pool, gains = centres, promise(centres)
    for step in range(ROUNDS):
        fresh = _perturbed(centres, scales, rng, shrink=0.5**step)
        if step == 0:
            fresh = np.vstack([fresh, rng.random((SCREENED // 4, len(basis)))])
        pool = np.vstack([pool, fresh])
        gains = np.append(gains, promise(fresh))
        order = np.argsort(-gains, kind="stable")[: 4 * ELITES]
        pool, gains = pool[order], gains[order]
        centres = pool[:ELITES]
    polished = [_polished(prospect, start, basis) for start in pool[:POLISHED]]
    points = prospect.ratios.representative(np.vstack([pool, polished]) @ basis)
    gains = prospect.gains(points)
    for index in np.argsort(-gains, kind="stable"):
        point = np.asarray(points[index])
        if np.abs(known - point).max(1).min() > prospect.apart and space.legal(point.tolist()):
            return point, float(gains[index])
    return prospect.ratios.representative(rng.random((1, len(basis))) @ basis)[0], 0.0


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
        point = coordinates @ basis
        value, slope = prospect.smooth_loss(prospect.ratios.representative(point[None])[0])
        return value, basis @ prospect.ratios.pulled_back(point, slope)

    box = [(0.0, 1.0)] * len(start)
    found = minimize(
        loss, start, jac=True, method="L-BFGS-B", bounds=box, options={"maxiter": 15}
    )  # fmt: skip
    end: np.ndarray = np.clip(found.x, 0.0, 1.0)
    return end


STRATEGY = Margins()
