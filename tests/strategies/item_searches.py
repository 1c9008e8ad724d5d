"""A search whose items are known functions of the point, for strategies that learn from items."""

from __future__ import annotations

import numpy as np

from agentmerge.config import GenomeConfig
from agentmerge.contracts.strategy import Evidence, Items, Observation, Strategy, rng_factory
from agentmerge.space import seeds
from agentmerge.space.grouped import SearchSpace

SPACE = SearchSpace(
    GenomeConfig(
        models=("a", "b"),
        base_model="base",
        merge_method="task_arithmetic",
        layer_granularity=1,
    ),
    4,
)
COUNT = 120


class Quiz:
    """Items of two tasks, each right inside an ellipsoid of its own; two axes matter little."""

    def __init__(self, seed: int, values_only: bool = False) -> None:
        rng = np.random.default_rng(seed)
        self.centre = rng.uniform(0.25, 0.75, SPACE.dimensions)
        self.pull = np.where(np.arange(SPACE.dimensions) < 2, 0.5, 8.0)
        self.bar = rng.uniform(0.0, 1.5, COUNT)
        self.lean = rng.normal(0, 1.0, (COUNT, SPACE.dimensions))
        margins = np.full(COUNT, not values_only)
        self.items = Items(np.arange(COUNT) % 2, np.full(COUNT, 1 / COUNT), margins)

    def ask(self, vector: tuple[float, ...]) -> Evidence:
        away = np.asarray(vector) - self.centre
        margin = self.bar - (self.pull * away**2).sum() + 0.3 * self.lean @ away
        values = (margin > 0).astype(float)
        return Evidence(self.items, np.where(self.items.margins, margin, values), values)

    def observe(
        self, generation: int, slot: int, vector: tuple[float, ...], operator: str
    ) -> Observation:
        evidence = self.ask(vector)
        score = float(evidence.values @ self.items.weight)
        return Observation(generation, slot, vector, operator, score, evidence=evidence)


def searched(strategy: Strategy, quiz: Quiz, evaluations: int, seed: int) -> list[Observation]:
    points = [p for _, _, p in [*seeds.parents(SPACE), *seeds.scale_points(SPACE)] if p]
    history = [quiz.observe(0, slot, point, "scale") for slot, point in enumerate(points)]
    while len(history) < evaluations:
        count = min(strategy.population(SPACE.dimensions), evaluations - len(history))
        asked = strategy.propose(SPACE, tuple(history), None, count, rng_factory(seed))
        if not asked:
            break
        generation = history[-1].generation + 1
        for slot, proposal in enumerate(asked):
            assert proposal.vector is not None
            history.append(quiz.observe(generation, slot, proposal.vector, proposal.operator))
    return history


def best(history: list[Observation]) -> float:
    return max(o.score for o in history if o.score is not None)
