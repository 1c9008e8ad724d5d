"""Intervals: what a score over a finite number of items is worth, and a difference of two.

Everything is a bootstrap over items (Efron's percentile interval, 95 %) of the metric itself, so a
perplexity or an F1 has one as a mean has. Resampling cannot see what no item showed, so the items
drawn from are those that were asked and a few more: where two are compared, an item on which they
differ as they mostly do where they differ, and the same with their answers swapped (for shares of
right answers that is Bonett and Price's adjusted interval, 2012); for a score alone, two of the
worst value and two of the best (Agresti and Coull 1998). So no interval has a width of zero. With
fewer than ten items there is none.

Pure functions of stored values and a seed; imports numpy only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

RESAMPLES = 4000
#: With fewer items than this nothing is said about what others would show.
MIN_ITEMS = 10
#: Counts of resamples that are in memory at a time.
_CELLS = 8_000_000
#: A metric beyond this is as bad as any: a perplexity that overflows in a resample.
_LARGEST = 1e150

Metric = Callable[[np.ndarray, np.ndarray, np.ndarray | None], np.ndarray]
"""(counts (resamples, items), values (items, candidates), statics like values or None) -> the
metric of each resample and candidate."""


class Interval(NamedTuple):
    """A figure and the ends of its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def figure(value: float, sign: str = "", digits: int = 3) -> str:
    """A score as text, short however large: a perplexity may have seventy digits."""
    large = abs(value) >= 1e5
    return f"{value:{sign}.{digits + 1}g}" if large else f"{value:{sign}.{digits}f}"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


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


def mean(counts: np.ndarray, values: np.ndarray, statics: np.ndarray | None) -> np.ndarray:
    """The metric of most tasks."""
    found: np.ndarray = counts @ values / counts.sum(1, keepdims=True)
    return found


@dataclass(frozen=True, slots=True, eq=False)
class PairedTask:
    """One task of a score. weight: of its metric in the score.

    mine: (items, candidates). theirs: the one that all are compared with; None: nothing is.
    metric, statics: how values make the metric, and what of an item no model changes.
    labels: values are predicted classes and statics the true ones.
    """

    weight: float
    mine: np.ndarray
    theirs: np.ndarray | None = None
    metric: Metric = mean
    statics: np.ndarray | None = None
    labels: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Leads:
    """How far each of some candidates is ahead of one other, or of nothing: its score.

    ahead: (candidates,), as it was measured. draws: (resamples, candidates). centre: what the draws
    vary around.
    """

    ahead: np.ndarray
    draws: np.ndarray
    centre: np.ndarray

    def interval(self, candidate: int = 0) -> Interval | None:
        """Of one candidate, for itself; None where resamples do not vary."""
        low, high = np.quantile(self.draws[:, candidate], [0.025, 0.975])
        if not high > low:
            return None
        told = float(self.ahead[candidate])
        return Interval(told, min(float(low), told), max(float(high), told))

    def at_least(self) -> np.ndarray:
        """Lower ends that hold for all candidates at once (97.5 %), so for one chosen among them.

        The largest of their studentised deviations is resampled (max-t: Westfall and Young 1993;
        Romano and Wolf 2005): the more candidates, and the less alike, the lower.
        """
        spread = self.draws.std(0)
        known = spread > 0
        found = np.full(len(self.ahead), -np.inf)
        if known.any():
            away = (self.draws[:, known] - self.centre[known]) / spread[known]
            reach = float(np.quantile(away.max(1), 0.975))
            least = self.centre[known] - reach * spread[known]
            found[known] = np.minimum(least, self.ahead[known])
        return found


def leads(
    tasks: Sequence[PairedTask], seed: int, resamples: int = RESAMPLES, least: int = MIN_ITEMS
) -> Leads | None:
    """Every candidate of ``mine`` against the one in ``theirs``, on the same resamples.

    None with fewer than ``least`` items in all.

    Raises:
        ValueError: no tasks, no items, or unequal numbers of them.
    """
    if not tasks:
        raise ValueError("a difference needs at least one task")
    for task in tasks:
        others = len(task.mine) if task.theirs is None else len(task.theirs)
        if len(task.mine) != others or not others:
            raise ValueError(
                f"{len(task.mine)} values against {others}: they must be of the same items"
            )
    if sum(len(task.mine) for task in tasks) < least:
        return None
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, len(tasks)])))
    size = tasks[0].mine.shape[1]
    ahead, centre, draws = np.zeros(size), np.zeros(size), np.zeros((resamples, size))
    for task in tasks:
        asked, more = _tables(task), _more(task)
        ahead += _told(task, np.ones((1, len(task.mine))), asked)[0]
        tables = [
            None if t is None else np.vstack([t, *m]) for t, m in zip(asked, more, strict=True)
        ]
        # Items alike in everything are drawn as one: of scores there are few kinds.
        given = [t for t in tables if t is not None]
        _, first, often = np.unique(np.hstack(given), axis=0, return_index=True, return_counts=True)
        tables = [None if t is None else t[first] for t in tables]
        centre += _told(task, often[None].astype(float), tables)[0]
        step = max(1, _CELLS // (len(often) + size))
        for start in range(0, resamples, step):
            count = min(step, resamples - start)
            drawn = rng.multinomial(often.sum(), often / often.sum(), size=count).astype(float)
            draws[start : start + count] += _told(task, drawn, tables)
    return Leads(ahead, draws, centre)


Tables = Sequence[np.ndarray | None]
"""(mine, theirs, statics), each (items, candidates)."""


def _tables(task: PairedTask) -> Tables:
    def wide(column: np.ndarray | None) -> np.ndarray | None:
        return None if column is None else np.broadcast_to(column[:, None], task.mine.shape)

    return task.mine, wide(task.theirs), wide(task.statics)


def _told(task: PairedTask, counts: np.ndarray, tables: Tables) -> np.ndarray:
    """The task's part of each difference, resample by resample."""
    mine, theirs, statics = tables
    assert mine is not None

    def metric(values: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            found = task.metric(counts, values, statics)
        return np.clip(np.nan_to_num(found, posinf=_LARGEST, neginf=-_LARGEST), -_LARGEST, _LARGEST)

    return task.weight * (metric(mine) - (0.0 if theirs is None else metric(theirs)))


def _more(task: PairedTask) -> Sequence[Sequence[np.ndarray]]:
    """Rows to add to each table: what the items did not show; see the module's head."""
    values, columns = task.mine, np.arange(task.mine.shape[1])
    statics = np.zeros(len(values)) if task.statics is None else task.statics
    if task.theirs is None:
        low, high = values.argmin(0), values.argmax(0)
        ends = np.stack([values[low, columns], values[high, columns]])
        if np.isin(values, (0.0, 1.0)).all() and not task.labels:
            ends[0], ends[1] = 0.0, 1.0
        return [ends, ends], [], [statics[[low, high]]] * 2
    theirs = np.broadcast_to(task.theirs[:, None], values.shape)
    gap = np.abs(values - theirs)
    if task.labels:  # right against wrong, where there is that, and not one error and another
        told = ((values == statics[:, None]) != (theirs == statics[:, None])).astype(float)
        gap = np.where(told.any(0), told, gap)
    size = np.sqrt((gap**2).sum(0) / np.maximum((gap > 0).sum(0), 1))
    typical = np.where(gap > 0, np.abs(gap - size), np.inf).argmin(0)
    mine, other = values[typical, columns], theirs[typical, columns]
    alike = gap.max(0) == 0
    if alike.any():
        worst, best = task.theirs.min(), task.theirs.max()
        if np.isin(task.theirs, (0.0, 1.0)).all():
            worst, best = 0.0, 1.0
        elif worst == best:
            worst = best - max(1.0, abs(best))
        mine, other = np.where(alike, best, mine), np.where(alike, worst, other)
    both = statics[typical]
    return [np.stack([mine, other])], [np.stack([other, mine])], [np.stack([both, both])]


def paired_score_difference(
    tasks: Sequence[tuple[float, Sequence[float], Sequence[float]]], seed: int
) -> Interval | None:
    """The difference of two candidates' scores where every task's metric is a mean over items.

    tasks: (weight, one candidate's values, the other's), item by item; the score is the weighted
        sum of the tasks' means. None with fewer than ten items in all.

    Raises:
        ValueError: no tasks, no items, or unequal numbers of them.
    """
    found = leads(
        [PairedTask(w, np.asarray(a, float)[:, None], np.asarray(b, float)) for w, a, b in tasks],
        seed,
    )
    return None if found is None else found.interval()
