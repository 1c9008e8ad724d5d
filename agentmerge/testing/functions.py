"""Known functions as search problems: optima away from the middle, coordinates in shuffled order.

Sphere, rotated ellipsoid (condition 100), Rosenbrock, Rastrigin (Hansen et al., BBOB), scaled to
scores in (0, 1]. With noise a score is the share of 400 Bernoulli items that are right with that
probability, fresh for each point; a strategy that wants items gets them, with the logit of the
probability plus logistic noise as margin (so that its sign is the outcome).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from agentmerge.config import GenomeConfig
from agentmerge.contracts.strategy import Evidence, Items
from agentmerge.space.grouped import SearchSpace
from agentmerge.testing.problem import Shown, first_points

ITEMS = 400
DIMENSIONS = (2, 5, 16, 32)
_MODELS = {2: (2, 1), 5: (5, 1), 16: (4, 4), 32: (4, 8)}
"""Dimensions -> (experts, layer groups)."""


def sphere(z: np.ndarray) -> float:
    return float((z**2).sum())


def ellipsoid(z: np.ndarray) -> float:
    weights = 100 ** (np.arange(len(z)) / max(len(z) - 1, 1))
    return float((weights * z**2).sum() / weights.mean())


def rosenbrock(z: np.ndarray) -> float:
    x = z + 1.0
    return float((100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum() / 100)


def rastrigin(z: np.ndarray) -> float:
    return float((z**2 - np.cos(2 * np.pi * z) + 1).sum())


FUNCTIONS: dict[str, tuple[Callable[[np.ndarray], float], float, bool]] = {
    "sphere": (sphere, 1.0, False),
    "ellipsoid": (ellipsoid, 1.0, True),
    "rosenbrock": (rosenbrock, 2.0, False),
    "rastrigin": (rastrigin, 4.0, False),
}
"""Name -> (function with its least value at 0, half the box's width, whether it is rotated)."""


@dataclass
class SyntheticProblem:
    """See ``problem.Problem``. The sealed score is the true one, without noise."""

    function: str
    dimensions: int
    noisy: bool
    seed: int
    space: SearchSpace = field(init=False)
    tasks: tuple[str, ...] = ("right",)

    def __post_init__(self) -> None:
        self.name = f"{self.function}-{self.dimensions}{'-noisy' if self.noisy else ''}"
        experts, groups = _MODELS[self.dimensions]
        genome = GenomeConfig(
            models=tuple(f"m{i}" for i in range(experts)),
            base_model="base",
            merge_method="task_arithmetic",
            layer_granularity=1 if groups > 1 else 0,
            normalize=False,
        )
        self.space = SearchSpace(genome, groups, "float32")
        rng = np.random.default_rng([self.seed, self.dimensions])
        away = rng.uniform(0.1, 0.3, self.dimensions)
        self._optimum = 0.5 + away * rng.choice((-1.0, 1.0), self.dimensions)
        self._order = rng.permutation(self.dimensions)
        self._turn = np.linalg.qr(rng.normal(size=(self.dimensions, self.dimensions)))[0]
        self._items = Items(np.zeros(ITEMS, int), np.full(ITEMS, 1 / ITEMS), np.ones(ITEMS, bool))

    def first_points(self) -> list[tuple[str, str, tuple[float, ...]]]:
        return first_points(self.space)

    def evaluate(self, vector: Sequence[float]) -> Shown:
        quality = self._quality(vector)
        if not self.noisy:
            return Shown(quality)
        digest = hashlib.sha256(np.asarray([self.seed, *vector]).tobytes()).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
        chance = min(max(quality, 1e-6), 1 - 1e-6)
        margins = np.log(chance / (1 - chance)) + rng.logistic(size=ITEMS)
        values = (margins > 0).astype(float)
        return Shown(float(values.mean()), Evidence(self._items, margins, values))

    def gradient(self, vector: Sequence[float]) -> Shown:
        return self.evaluate(vector)

    def sealed(self, vector: Sequence[float]) -> np.ndarray:
        return np.array([self._quality(vector)])

    def _quality(self, vector: Sequence[float]) -> float:
        function, half_width, rotated = FUNCTIONS[self.function]
        z = (np.asarray(vector)[self._order] - self._optimum) * 2 * half_width
        z = self._turn @ z if rotated else z
        return float(1.0 / (1.0 + function(z)))


#: Name -> what makes the problem of a seed.
KNOWN = {
    f"{function}-{dimensions}{'-noisy' if noisy else ''}": partial(
        SyntheticProblem, function, dimensions, noisy
    )
    for function in FUNCTIONS
    for dimensions in DIMENSIONS
    for noisy in (False, True)
}
