"""A Gaussian process of every item's signal as a function of the merge, with one kernel for all.

All items share a Matérn-5/2 kernel with a length scale an axis (Rasmussen & Williams 2006, 4.17),
so one Cholesky factorisation serves them all; each has a mean and a variance of its own. Length
scales and noise maximise the items' summed marginal likelihood: hundreds of items say far more
about which axes matter than one score does. Knows points and numbers, no merges and no search.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_solve, cholesky, solve_triangular
from scipy.optimize import minimize

#: Length scales (of the unit box) and noise variance (of each item's own), as natural logarithms.
_SCALES = (np.log(0.03), np.log(10.0))
_NOISE = (np.log(1e-6), np.log(10.0))
_START_SCALE, _START_NOISE = np.log(1.5), np.log(1e-3)
#: Pulls length scales towards the start: each axis's log scale has this standard deviation.
_PRIOR_SD = 1.5
_ITERATIONS = 40
#: Items that hyper-parameters are fitted on, and numbers of points they are fitted on, at most.
FIT_ITEMS, FIT_POINTS = 400, 160
#: With fewer rows that were asked everything there is nothing to expect the rest from.
LEAST_WHOLE = 2
_ROOT5 = np.sqrt(5.0)


@dataclass(frozen=True, eq=False)
class Hyper:
    """scales: (d,) length scales. noise: variance of an observation, as a share of the item's."""

    scales: np.ndarray
    noise: float


@dataclass(frozen=True, eq=False)
class ItemModel:
    """A fitted process. points: (n, d). mean, spread: (m,) each item's own mean and deviation.

    weights: (n, m), the inverse kernel times the centred signals.
    """

    points: np.ndarray
    hyper: Hyper
    mean: np.ndarray
    spread: np.ndarray
    weights: np.ndarray
    _factor: np.ndarray

    def predict(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(means (c, m), deviation (c,) as a share of each item's spread) at (c, d) points."""
        cross = matern(points, self.points, self.hyper.scales)
        explained = (solve_triangular(self._factor, cross.T, lower=True) ** 2).sum(0)
        return self.mean + cross @ self.weights, np.sqrt(np.maximum(1.0 - explained, 1e-12))

    def slope(self, point: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(means (m,), deviation, d kernel (d, n), d deviation (d,)) at one point.

        The slope of item i's mean is ``d kernel @ weights[:, i]``.
        """
        cross, slopes = matern_slope(point, self.points, self.hyper.scales)
        half = solve_triangular(self._factor, cross, lower=True)
        variance = max(1.0 - float(half @ half), 1e-12)
        solved = solve_triangular(self._factor, half, lower=True, trans="T")
        deviation = np.sqrt(variance)
        return self.mean + cross @ self.weights, deviation, slopes, -(slopes @ solved) / deviation

    def told(self, points: np.ndarray, signals: np.ndarray) -> ItemModel:
        """The same kernel with more observations."""
        mine = self.mean + self.centred()
        return conditioned(np.vstack([self.points, points]), np.vstack([mine, signals]), self.hyper)

    def centred(self) -> np.ndarray:
        """The centred signals that were told."""
        found: np.ndarray = self._factor @ (self._factor.T @ self.weights)
        return found


def fitted(points: np.ndarray, signals: np.ndarray) -> ItemModel:
    """Hyper-parameters by marginal likelihood, then conditioned on everything.

    points: (n, d) in the unit box. signals: (n, m), finite.
    """
    rows = np.arange(len(points))[-FIT_POINTS:]  # the latest lie where the search is now
    live = np.flatnonzero(signals.std(0) > 1e-9)
    if len(live) > FIT_ITEMS:
        live = live[np.linspace(0, len(live) - 1, FIT_ITEMS).astype(int)]
    hyper = Hyper(np.full(points.shape[1], np.exp(_START_SCALE)), np.exp(_START_NOISE))
    if len(rows) > 2 and len(live):
        hyper = _most_likely(points[rows], signals[np.ix_(rows, live)], hyper)
    return conditioned(points, signals, hyper)


def conditioned(points: np.ndarray, signals: np.ndarray, hyper: Hyper) -> ItemModel:
    """The process given all observations; one factorisation, whatever the number of items."""
    count = len(points)
    kernel = matern(points, points, hyper.scales)
    factor = cholesky(kernel + (hyper.noise + 1e-8) * np.eye(count), lower=True)
    ones = cho_solve((factor, True), np.ones(count))
    mean = (ones @ signals) / ones.sum()
    centred = signals - mean
    weights = cho_solve((factor, True), centred)
    variance = np.maximum((centred * weights).sum(0) / count, 1e-12)
    return ItemModel(points, hyper, mean, np.sqrt(variance), weights, factor)


def matern(left: np.ndarray, right: np.ndarray, scales: np.ndarray) -> np.ndarray:
    a, b = left / scales, right / scales
    square = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
    r = _ROOT5 * np.sqrt(np.maximum(square, 0.0))
    found: np.ndarray = (1 + r + r * r / 3) * np.exp(-r)
    return found


def matern_slope(
    point: np.ndarray, right: np.ndarray, scales: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(kernel (n,), its slope (d, n)) of one point against (n, d) others."""
    away = (point - right) / scales
    r = _ROOT5 * np.sqrt((away**2).sum(1))
    decay = np.exp(-r)
    slope = -(5.0 / 3.0) * ((1 + r) * decay)[:, None] * away / scales
    return (1 + r + r * r / 3) * decay, slope.T


def _most_likely(points: np.ndarray, signals: np.ndarray, start: Hyper) -> Hyper:
    def cost(theta: np.ndarray) -> tuple[float, np.ndarray]:
        return _cost(points, signals, theta)

    begin = np.log(np.append(start.scales, start.noise))
    box = [_SCALES] * points.shape[1] + [_NOISE]
    begin = np.clip(begin, [low for low, _ in box], [high for _, high in box])
    found = minimize(
        cost, begin, jac=True, method="L-BFGS-B", bounds=box, options={"maxiter": _ITERATIONS}
    ).x
    return Hyper(np.exp(found[:-1]), float(np.exp(found[-1])))


def _cost(points: np.ndarray, signals: np.ndarray, theta: np.ndarray) -> tuple[float, np.ndarray]:
    """(minus the mean log marginal likelihood an item, less the prior; its gradient).

    Each item's mean and variance are at their most likely values, in closed form.
    """
    count, items = signals.shape
    scales, noise = np.exp(theta[:-1]), float(np.exp(theta[-1]))
    scaled = points / scales
    square = (scaled**2).sum(1)[:, None] + (scaled**2).sum(1)[None] - 2 * scaled @ scaled.T
    r = _ROOT5 * np.sqrt(np.maximum(square, 0.0))
    decay = np.exp(-r)
    kernel = (1 + r + r * r / 3) * decay + (noise + 1e-8) * np.eye(count)
    try:
        factor = cholesky(kernel, lower=True)
    except np.linalg.LinAlgError:
        return 1e12, np.zeros_like(theta)
    inverse = cho_solve((factor, True), np.eye(count))
    ones = inverse.sum(1)
    centred = signals - (ones @ signals) / ones.sum()
    weights = inverse @ centred
    energy = np.maximum((centred * weights).sum(0), 1e-12)
    fit = 0.5 * count * float(np.log(energy / count).mean()) + float(np.log(np.diag(factor)).sum())
    off = (theta[:-1] - _START_SCALE) / _PRIOR_SD
    # d cost / d kernel; symmetric
    push = 0.5 * (inverse - (weights * (count / energy)) @ weights.T / items)
    shared = push * (5.0 / 3.0) * (1 + r) * decay
    # sum over pairs of shared[a, b] * (scaled[a] - scaled[b])**2, axis by axis
    slope = 2 * (shared.sum(1) @ scaled**2 - (scaled * (shared @ scaled)).sum(0))
    gradient = np.append(slope + off / _PRIOR_SD, np.trace(push) * noise)
    return fit + 0.5 * float(off @ off), gradient


def completed(points: np.ndarray, signals: np.ndarray) -> np.ndarray:
    """Signals (n, m) with NaN, at points (n, d) -> the same without; what was seen is untouched:
    what losers of races would have shown on the items that they were not asked.

    A loser's rung is the same part of the items for all losers of that rung, so each part needs one
    factorisation. The rest gets the process's own expectation, which leaves its mean as it was.

    Length scales are fitted on the items that all rows have. Rows that cannot be completed, for
    want of whole ones or of a common item, stay as they are.
    """
    seen = np.isfinite(signals)
    common = seen.all(0)
    if common.all() or not common.any() or seen.all(1).sum() < LEAST_WHOLE:
        return signals
    hyper = fitted(points, signals[:, common]).hyper
    found = signals.copy()
    patterns, which = np.unique(seen, axis=1, return_inverse=True)
    for number, rows in enumerate(patterns.T):
        if rows.all():
            continue
        items = np.flatnonzero(which.ravel() == number)
        model = conditioned(points[rows], signals[np.ix_(rows, items)], hyper)
        found[np.ix_(~rows, items)] = model.predict(points[~rows])[0]
    return found
