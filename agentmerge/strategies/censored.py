"""What races' losers would have shown on the items that they were not asked.

A loser's rung is a part of the items, the same part for all losers of that rung, so each part needs
one factorisation: of the points that were asked it. The rest gets the process's own expectation,
which leaves its mean everywhere as it was. So every answer that was paid for counts, and the
surrogate sees whole rows. Knows points and numbers only.
"""

from __future__ import annotations

import numpy as np

from agentmerge.strategies.surrogate import conditioned, fitted

#: With fewer whole rows than this there is nothing to expect the rest from.
LEAST = 2


def completed(points: np.ndarray, signals: np.ndarray) -> np.ndarray:
    """Signals (n, m) with NaN, at points (n, d) -> the same without; what was seen is untouched.

    Length scales are fitted on the items that all rows have. Rows that cannot be completed, for
    want of whole ones or of a common item, stay as they are.
    """
    seen = np.isfinite(signals)
    common = seen.all(0)
    if common.all() or not common.any() or seen.all(1).sum() < LEAST:
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
