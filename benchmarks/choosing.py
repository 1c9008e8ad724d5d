"""Repeated splits: which of a few candidates wins most random halves of the items.

The best-seen of many candidates is often the luckiest; the one that wins most halves is picked
right far more often (arXiv 2605.05973). Pure functions of stored values; imports numpy only.
"""

from __future__ import annotations

import numpy as np

SPLITS = 200


def most_wins(
    values: np.ndarray, task: np.ndarray, rng: np.random.Generator, splits: int = SPLITS
) -> tuple[int, list[int]]:
    """(winner, halves won by each) of k candidates, ordered best first.

    values: (k, m), what each item adds to a candidate's score. task: (m,), each item's task; halves
    are drawn task by task, so that every half asks the same mix. A tie goes to the earlier.
    """
    votes = np.zeros(len(values), int)
    places = [np.flatnonzero(task == one) for one in np.unique(task)]
    for _ in range(splits):
        half = np.concatenate([rng.permutation(p)[: max(1, len(p) // 2)] for p in places])
        votes[int(np.argmax(values[:, half].sum(1)))] += 1
    return int(np.argmax(votes)), votes.tolist()
