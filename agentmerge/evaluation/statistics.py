"""Intervals: what a score over a finite number of items is worth, and a difference of two.

Pure functions of stored values and a seed; imports numpy only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 4000


class Interval(NamedTuple):
    """A figure and the ends of its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def wilson(values: Sequence[float]) -> Interval:
    """Wilson's 95 % interval for the mean of zeros and ones (Wilson 1927); never outside [0, 1].

    Raises:
        ValueError: no values, or one that is neither 0 nor 1.
    """
    if not values or any(value not in (0, 1) for value in values):
        raise ValueError("wilson() needs zeros and ones, and at least one of them")
    n, mean, z = len(values), sum(values) / len(values), 1.959963984540054
    centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return Interval(mean, max(0.0, min(centre - half, mean)), min(1.0, max(centre + half, mean)))


def paired_difference(a: Sequence[float], b: Sequence[float], seed: int) -> Interval:
    """The mean of a - b over the same items in the same order; see ``paired_score_difference``."""
    return paired_score_difference([(1.0, a, b)], seed)


def paired_score_difference(
    tasks: Sequence[tuple[float, Sequence[float], Sequence[float]]], seed: int
) -> Interval:
    """The difference of two candidates' scores, with a bootstrap interval over items.

    tasks: (weight, one candidate's values, the other's), item by item; the score is the weighted
        sum of the tasks' means.

    Items are drawn anew within each task, both candidates' values together (Efron's percentile
    interval, 95 %). Resampling cannot see what no item showed: a task in which no item differs
    adds the rule of three on both sides, 3/n times the largest value (at least 1).

    Raises:
        ValueError: no tasks, no items, or unequal numbers of them.
    """
    if not tasks:
        raise ValueError("a difference needs at least one task")
    words = np.random.SeedSequence([seed, len(tasks)])
    rng = np.random.Generator(np.random.PCG64(words))
    mean, blind = 0.0, 0.0
    draws = np.zeros(RESAMPLES)
    for weight, a, b in tasks:
        if len(a) != len(b) or not len(a):
            raise ValueError(f"{len(a)} values against {len(b)}: they must be of the same items")
        difference = np.asarray(a, float) - np.asarray(b, float)
        mean += weight * float(difference.mean())
        if not difference.any():
            blind += abs(weight) * min(1.0, 3 / len(a)) * max(1.0, *map(abs, a))
            continue
        draws += weight * _resampled_means(difference, rng)
    low, high = np.quantile(draws, [0.025, 0.975])
    return Interval(mean, float(low) - blind, float(high) + blind)


def _resampled_means(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Means of bootstrap samples; by counts of distinct values, of which scores have few."""
    distinct, counts = np.unique(values, return_counts=True)
    n = len(values)
    if len(distinct) <= 64:
        drawn = rng.multinomial(n, counts / n, size=RESAMPLES)
        means: np.ndarray = drawn @ distinct / n
        return means
    rows = [values[rng.integers(n, size=n)].mean() for _ in range(RESAMPLES)]
    return np.asarray(rows)
