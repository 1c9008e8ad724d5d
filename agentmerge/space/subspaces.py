"""Rungs of the dimension ladder inside a search space.

One value a model, then a line over the depth, then one a layer group, then every axis.

A rung is the points ``z @ basis`` with z in the unit box of its own few coordinates. They are
inside the space's unit box, and each rung holds the ones below it. (The scale, below them all, is
among the cheap rivals; finer than the space is ``agentmerge.search.trials``.) Knows spaces and
plain numbers, no history.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from agentmerge.contracts.space import Space


def rungs(space: Space) -> list[np.ndarray]:
    """Bases, shape (coordinates, dimensions), coarse to fine, the last one the whole space.

    Rows are not negative, and every column sums to one. Rungs that add nothing are left out.
    """
    last = max(space.groups - 1, 1)
    lower = (
        _rows(space, lambda group: {0: 1.0}),
        _rows(space, lambda group: {0: 1 - group / last, last: group / last}),
        _rows(space, lambda group: {group: 1.0}),
    )
    found: list[np.ndarray] = []
    for basis in lower:
        if len(found[-1] if found else []) < len(basis) < space.dimensions:
            found.append(basis)
    return [*found, np.eye(space.dimensions)]


def _rows(space: Space, shares: Callable[[int], dict[int, float]]) -> np.ndarray:
    """A value for each parameter of each model at some groups, and what the others take of them.

    shares: a layer group -> the groups whose values it mixes, and how much of each.
    """
    rows: dict[tuple[str | None, str, int], np.ndarray] = {}
    for index, axis in enumerate(space.axes):
        for group, share in shares(axis.group).items():
            key = (axis.model, axis.parameter, group)
            rows.setdefault(key, np.zeros(space.dimensions))[index] = share
    return np.array([row for row in rows.values() if row.any()])
