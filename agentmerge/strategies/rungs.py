"""Rungs of the dimension ladder inside a search space: one value a model, then a line over depth.

A rung is the points ``z @ basis`` with z in the unit box of its own few coordinates. They are
inside the space's unit box, and each rung holds the ones below it. (The scale, below them all, is
among the cheap rivals; finer than the space is ``agentmerge.structure``.) Knows spaces and plain
numbers, no history.
"""

from __future__ import annotations

import numpy as np

from agentmerge.genome import SearchSpace


def rungs(space: SearchSpace) -> list[np.ndarray]:
    """Bases, shape (coordinates, dimensions), coarse to fine, the last one the whole space.

    Rows are not negative, and every column sums to one.
    """
    whole = np.eye(space.dimensions)
    found: list[np.ndarray] = []
    for basis in (_rows(space, line=False), _rows(space, line=True), whole):
        if len(found[-1] if found else []) < len(basis) < len(whole) or basis is whole:
            found.append(basis)
    return found


def _rows(space: SearchSpace, *, line: bool) -> np.ndarray:
    """One value for each parameter of each model; line: its values in the first and last group."""
    rows: dict[tuple[str | None, str, int], np.ndarray] = {}
    for index, axis in enumerate(space.axes):
        depth = axis.group / max(space.groups - 1, 1) if line else 0.0
        for end, share in enumerate((1.0 - depth, depth)[: 1 + line]):
            key = (axis.model, axis.parameter, end)
            rows.setdefault(key, np.zeros(space.dimensions))[index] = share
    return np.array(list(rows.values()))
