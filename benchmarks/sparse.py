"""The items' model with a sparsity prior over experts, as a chooser of ``benchmarks.pool``.

One length scale an expert (a whole-model weight each), pulled towards "makes no difference" by a
Laplace prior on its inverse; an expert whose inverse scale goes to 0 is out. It begins with each
expert alone, asks for a few uniform merges that promise most, and ends with the few experts whose
uniform merge it expects most of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
from scipy.optimize import minimize

from agentmerge.contracts.operators import PARENT, SCALE
from agentmerge.contracts.strategy import Observation
from agentmerge.space.grouped import SearchSpace
from agentmerge.space.weights import SCALE_POINTS
from agentmerge.strategies import surrogate
from agentmerge.strategies.margins import Prospect, prospect_for
from agentmerge.testing.problem import Shown

#: Rate of the Laplace prior on each inverse length scale.
RATE = 2.0
#: Out is whose inverse length scale is below so much of the largest.
OUT = 0.05
#: Uniform merges that are asked before the choice.
TRIES = 6

Point = tuple[float, ...]


def choose(
    space: SearchSpace, evaluate: Callable[[Point], Shown], most: int, tries: int = TRIES
) -> tuple[list[str], list[list[str]]]:
    """(the experts that it takes, those of each merge that it asked for).

    space: of one weight an expert. evaluate: what a point shows; experts alone are asked first.
    """
    experts = list(space.models)
    corners = [space.form.end_point(name) for name in [space.genome.base_model, *experts]]
    history = [
        _seen(0, slot, point, PARENT, evaluate(point))
        for slot, point in enumerate(corners)
        if point is not None
    ]
    points, subsets = _uniform(space, experts, most)
    asked: list[list[str]] = []
    for generation in range(1, tries + 1):
        prospect = _sparse(prospect_for(space, history))
        known = {o.vector for o in history}
        inside = _inside(prospect, experts)
        order = np.argsort(-prospect.gains(points), kind="stable")
        free = [i for i in order if tuple(points[i]) not in known]
        if not free:
            break
        best = next((i for i in free if set(subsets[i]) <= inside), free[0])
        vector = tuple(float(x) for x in points[best])
        asked.append(subsets[best])
        history.append(_seen(generation, 0, vector, SCALE, evaluate(vector)))
    prospect = _sparse(prospect_for(space, history))
    inside = _inside(prospect, experts)
    expected = prospect.score(prospect.model.predict(points)[0])
    order = np.argsort(-expected, kind="stable")
    return next((subsets[i] for i in order if set(subsets[i]) <= inside), subsets[order[0]]), asked


def _sparse(prospect: Prospect | None) -> Prospect:
    """The same with length scales under the sparsity prior in place of the product's."""
    assert prospect is not None, "each expert alone is enough for a model"
    model = prospect.model
    points, signals = model.points, model.mean + model.centred()
    live = np.flatnonzero(signals.std(0) > 1e-9)
    seen = signals[:, live] if len(live) else signals
    box = [surrogate._SCALES] * points.shape[1] + [surrogate._NOISE]

    def cost(theta: np.ndarray) -> tuple[float, np.ndarray]:
        fit, slope = surrogate._cost(points, seen, theta)
        off = (theta[:-1] - surrogate._START_SCALE) / surrogate._PRIOR_SD
        inverse = np.exp(-theta[:-1])
        slope = slope - np.append(off / surrogate._PRIOR_SD + RATE * inverse, 0.0)
        return fit - 0.5 * float(off @ off) + RATE * float(inverse.sum()), slope

    begin = np.log(np.append(model.hyper.scales, model.hyper.noise))
    begin = np.clip(begin, [low for low, _ in box], [high for _, high in box])
    theta = minimize(cost, begin, jac=True, method="L-BFGS-B", bounds=box).x
    hyper = surrogate.Hyper(np.exp(theta[:-1]), float(np.exp(theta[-1])))
    return replace(prospect, model=surrogate.conditioned(points, signals, hyper))


def _inside(prospect: Prospect, experts: Sequence[str]) -> set[str]:
    """The experts that make a difference, one way or the other."""
    inverse = 1.0 / prospect.model.hyper.scales
    return {name for name, one in zip(experts, inverse, strict=True) if one >= OUT * inverse.max()}


def _uniform(
    space: SearchSpace, experts: Sequence[str], most: int
) -> tuple[np.ndarray, list[list[str]]]:
    """Uniform merges of all few experts along the scale, and whose each is."""
    points, subsets = [], []
    for weight in SCALE_POINTS:
        full = np.array(space.everywhere(weight=weight)[1])
        none = np.array(space.everywhere(weight=0.0)[1])
        for count in range(2, most + 1):
            for some in combinations(range(len(experts)), count):
                points.append(np.where(np.isin(np.arange(len(experts)), some), full, none))
                subsets.append([experts[i] for i in some])
    return np.array(points), subsets


def _seen(generation: int, slot: int, vector: Point, operator: str, shown: Shown) -> Observation:
    return Observation(
        generation, slot, vector, operator, shown.score, recipe_hash=repr(vector),
        evidence=shown.evidence,
    )  # fmt: skip
