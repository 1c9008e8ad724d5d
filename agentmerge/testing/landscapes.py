"""Landscapes that are not easy: no mean over items, no margins, lower is better, in two scales."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from agentmerge.contracts.strategy import Evidence, Items, Observation

COUNT = 40
KINDS = ("score", "margins", "values", "perplexity", "beside", "lower")


@dataclass(frozen=True)
class Landscape:
    """A known function of the point, told in one of KINDS.

    score: nobody kept items. margins, values: the items' margins, or only right and wrong.
    perplexity: one whole metric, lower is better, 3 to 1e14. beside: that and an accuracy, whose
    sizes do not match. lower: an error rate.
    """

    kind: str
    centre: tuple[float, ...]

    def _away(self, vector: tuple[float, ...]) -> float:
        return float(((np.asarray(vector) - self.centre) ** 2).sum())

    def _margins(self, vector: tuple[float, ...]) -> np.ndarray:
        rng = np.random.default_rng(7)
        bars, lean = rng.uniform(0.0, 1.2, COUNT), rng.normal(size=(COUNT, len(vector)))
        return bars - 4 * self._away(vector) + 0.3 * lean @ (np.asarray(vector) - self.centre)

    def _perplexity(self, vector: tuple[float, ...]) -> float:
        return float(np.exp(1.0 + 32 * self._away(vector)))

    @property
    def items(self) -> Items:
        share, marks = np.full(COUNT, 1 / COUNT), np.full(COUNT, self.kind != "values")
        if self.kind == "perplexity":
            return Items(np.zeros(1, int), -np.ones(1), np.zeros(1, bool), np.full(1, COUNT))
        if self.kind == "beside":
            return Items(
                np.append(np.zeros(COUNT, int), 1),
                np.append(share, -0.1),
                np.append(marks, False),
                np.append(np.ones(COUNT), COUNT),
            )
        sign = -1.0 if self.kind == "lower" else 1.0
        return Items(np.zeros(COUNT, int), sign * share, marks)

    def evidence(self, vector: tuple[float, ...]) -> Evidence:
        items, margins = self.items, self._margins(vector)
        margins = -margins if self.kind == "lower" else margins
        right = (margins > 0).astype(float)
        whole = self._perplexity(vector)
        if self.kind == "perplexity":
            return Evidence(items, np.array([whole]), np.array([whole]))
        if self.kind == "beside":
            return Evidence(items, np.append(margins, whole), np.append(right, whole))
        return Evidence(items, margins if items.margins.all() else right, right)

    def observe(
        self,
        generation: int,
        slot: int,
        vector: tuple[float, ...],
        operator: str,
        fail: bool = False,
    ) -> Observation:
        """fail: a candidate whose last coordinate is far above the best one's fails."""
        if fail and vector[-1] > self.centre[-1] + 0.15:
            return Observation(generation, slot, vector, operator, None, failure="as it was told")
        evidence = self.evidence(vector)
        score = float(evidence.values @ evidence.items.weight)
        kept = None if self.kind == "score" else evidence
        return Observation(generation, slot, vector, operator, score, evidence=kept)
