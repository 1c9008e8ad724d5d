"""What a history says item by item, as the arrays that a model is fitted on.

Rows are in the history's order, failures among them, so that the latest rows are where the search
is now. Where nobody kept items (another's history), the score itself is the one item.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from agentmerge.contracts.strategy import History, Items
from agentmerge.strategies.soft_score import SoftScore, calibrated, directions, scaled, softening_of
from agentmerge.strategies.surrogate import completed

CLIP = 12.0
#: What a proposal looks at, at most: items, and points (the best quarter and the latest).
ITEMS, POINTS = 1000, 400
_NOBODY = Items(np.zeros(1, int), np.ones(1), np.zeros(1, bool))


@dataclass(frozen=True, eq=False)
class Table:
    """points: (n, d). signals, values: (n, m). decades: (m,), as ``SoftScore`` has it.

    counts: (n,) whether a row may be the best so far: it was scored for this very search, and
    keeps its constraints.
    """

    points: np.ndarray
    signals: np.ndarray
    values: np.ndarray
    items: Items
    decades: np.ndarray
    counts: np.ndarray


def table_of(history: History) -> Table | None:
    """Everything known inside the space; None where there is nothing.

    A failure is told as a poor result, the worse quartile of what each item showed, so that the
    search leaves its surroundings without a cliff that would bend every length scale.
    """
    inside = [o for o in history if o.vector is not None]
    scored = [o for o in inside if o.score is not None]
    by_item = all(o.evidence is not None for o in scored)
    told = [o for o in inside if o.evidence is not None] if by_item else scored
    if not told:
        return None
    points = np.array([o.vector for o in told])
    if by_item:
        items = told[-1].evidence.items  # type: ignore[union-attr]
        values = np.stack([o.evidence.values for o in told])  # type: ignore[union-attr]
        signals = np.stack([o.evidence.signals for o in told])  # type: ignore[union-attr]
    else:
        items = _NOBODY
        values = np.array([[o.score] for o in told], float)
        signals = values
    better = directions(items.weight, items.bounds, items.tokens)
    others = ~items.margins
    signals, decades = np.clip(signals, -CLIP, CLIP), np.zeros(len(better))
    signals[:, others], decades[others] = scaled(values[:, others], better[others])
    signals = completed(points, signals)
    plain = SoftScore(items.weight, items.margins, np.ones(len(better)), decades)
    expected = np.where(items.margins, signals > 0, plain.values(signals))
    values = np.where(np.isfinite(values), values, expected)
    whole = np.isfinite(signals).all(1)
    if not whole.any():
        return None
    told = [o for o, kept in zip(told, whole, strict=True) if kept]
    points, signals, values = points[whole], signals[whole], values[whole]
    failed = [o for o in inside if o.failed]
    if failed:
        way = np.where(decades < 0, -better, better)
        poor = way * np.quantile(way * signals, 0.25, axis=0)
        worse = better * np.quantile(better * values, 0.25, axis=0)
        points = np.vstack([points, [o.vector for o in failed]])
        signals = np.vstack([signals, np.tile(poor, (len(failed), 1))])
        values = np.vstack([values, np.tile(worse, (len(failed), 1))])
    rows = [*told, *failed]
    order = sorted(range(len(rows)), key=lambda i: (rows[i].generation, rows[i].slot))
    counts = np.array([o.score is not None and not o.violation for o in rows])
    return Table(points[order], signals[order], values[order], items, decades, counts[order])


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
    places, counted = np.arange(len(items.weight)), np.ones(len(items.weight))
    if len(items.weight) > ITEMS:
        kept, shares = [], []
        for task in np.unique(items.task):
            mine = np.flatnonzero(items.task == task)
            mine = mine[np.argsort(table.signals[:, mine].mean(0), kind="stable")]
            number = max(1, round(ITEMS * len(mine) / len(items.task)))
            kept.append(mine[np.linspace(0, len(mine) - 1, number).round().astype(int)])
            shares.append(np.full(number, len(mine) / number))
        places, counted = np.concatenate(kept), np.concatenate(shares)
    fewer = Items(
        items.task[places],
        items.weight[places] * counted,
        items.margins[places],
        items.counts[places] * counted,
        tuple(replace(b, share=b.share[places] * counted) for b in items.bounds),
        None if items.tokens is None else items.tokens[places] * counted,
        items.traded,
    )
    pick = np.ix_(rows, places)
    return Table(
        table.points[rows],
        table.signals[pick],
        table.values[pick],
        fewer,
        table.decades[places],
        table.counts[rows],
    )


def softened(table: Table) -> SoftScore:
    """The score as a smooth function of signals, each task with the softening that suits it."""
    items = table.items
    softening = np.ones(len(items.weight))
    for task in np.unique(items.task[items.margins]):
        mine = items.margins & (items.task == task)
        softening[mine] = softening_of(table.signals[:, mine], table.values[:, mine] > 0.5)
    tokens = items.tokens if items.traded else None
    score = SoftScore(items.weight, items.margins, softening, table.decades, tokens=tokens)
    soft = score.values(table.signals)
    bounds = tuple(calibrated(bound, soft, table.values) for bound in items.bounds)
    return replace(score, bounds=bounds)
