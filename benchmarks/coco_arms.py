"""Searches of a function on [-5, 5]^d, each driven as its authors drive it: arms of the COCO runs.

An arm asks values of points until ``Spent`` is raised, and never ends by itself. Knows no suite and
no tables.
"""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from agentmerge.contracts.strategy import Observation, Strategy, rng_factory
from agentmerge.space.box import unit_box
from agentmerge.strategies.auto import Auto
from agentmerge.strategies.margins import Margins

LOW, HIGH = -5.0, 5.0
#: Points before the first model, of the arms that leave that to others: the middle, then chance.
STARTUP = 10
#: CMA-ES, as it was entered at BBOB: where it starts, and with which step.
START, SIGMA = 4.0, 2.0


class Spent(Exception):
    """The budget is used."""


class Objective:
    """Counts what it is asked; ``values`` are those of the points so far."""

    def __init__(self, function: Callable[[np.ndarray], float], dimensions: int, budget: int):
        self.dimensions, self.budget = dimensions, budget
        self.values: list[float] = []
        self.ended: int | None = None  # after so many an arm said that there is nothing to gain
        self._function = function

    def __call__(self, point: Any) -> float:
        if len(self.values) >= self.budget:
            raise Spent
        self.values.append(float(self._function(np.asarray(point, float))))
        return self.values[-1]

    def unit(self, point: Any) -> float:
        """The value at a point of the unit box."""
        return self(LOW + (HIGH - LOW) * np.asarray(point, float))


def chance(objective: Objective, seed: int) -> None:
    rng = np.random.default_rng(seed)
    while True:
        objective.unit(rng.random(objective.dimensions))


def strategy(make: Callable[[], Strategy], objective: Objective, seed: int) -> None:
    """One of ours, told values as one item; where it ends, its model of the items goes on."""
    space, own, rng_for = unit_box(objective.dimensions), make(), rng_factory(seed)
    drawn = np.random.default_rng(seed).random((STARTUP, objective.dimensions))
    drawn[0] = 0.5
    history: list[Observation] = []
    for slot, point in enumerate(drawn):
        vector = tuple(float(x) for x in point)
        history.append(Observation(0, slot, vector, "init", -objective.unit(vector)))
    while True:
        asked = own.propose(space, history, None, 1, rng_for)
        if not asked:
            objective.ended = objective.ended or len(history)
            asked = Margins().propose(space, history, None, 1, rng_for)
        (vector, operator) = asked[0].vector or (), asked[0].operator
        generation = history[-1].generation + 1
        history.append(Observation(generation, 0, vector, operator, -objective.unit(vector)))


def auto(objective: Objective, seed: int) -> None:
    strategy(lambda: Auto(gradients_from=None), objective, seed)


def margins(objective: Objective, seed: int) -> None:
    strategy(Margins, objective, seed)


def botorch(objective: Objective, seed: int) -> None:
    from benchmarks.botorch_rival import BoTorch

    strategy(BoTorch, objective, seed)


def pycma(objective: Objective, seed: int) -> None:
    """``cma.fmin2`` with restarts of doubled populations, unbounded."""
    import cma

    rng = np.random.default_rng(seed)
    while True:
        cma.fmin2(
            objective,
            lambda: rng.uniform(-START, START, objective.dimensions),
            SIGMA,
            {"verbose": -9, "seed": 1 + seed, "verb_disp": 0},
            restarts=9,
        )


def cmaes(objective: Objective, seed: int) -> None:
    """The package ``cmaes``, bounded, with restarts of doubled populations (its own example)."""
    from cmaes import CMA

    rng = np.random.default_rng(seed)
    bounds = np.array([[LOW, HIGH]] * objective.dimensions)
    size = None
    while True:
        mean = rng.uniform(-START, START, objective.dimensions)
        engine = CMA(mean=mean, sigma=SIGMA, bounds=bounds, population_size=size, seed=seed)
        while not engine.should_stop():
            points = [engine.ask() for _ in range(engine.population_size)]
            engine.tell([(point, objective(point)) for point in points])
        size = 2 * engine.population_size


def tpe(objective: Objective, seed: int) -> None:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    box = optuna.distributions.FloatDistribution(LOW, HIGH)
    names = {f"x{i}": box for i in range(objective.dimensions)}
    sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True)
    study = optuna.create_study(sampler=sampler)
    while True:
        trial = study.ask(names)
        study.tell(trial, objective([trial.params[name] for name in names]))


def smac(objective: Objective, seed: int) -> None:
    """SMAC's facade for continuous black boxes: a Gaussian process after a Sobol design."""
    from ConfigSpace import ConfigurationSpace
    from smac import BlackBoxFacade, Scenario
    from smac.runhistory.dataclasses import TrialValue

    names = [f"x{i:02}" for i in range(objective.dimensions)]
    with tempfile.TemporaryDirectory() as folder:
        scenario = Scenario(
            ConfigurationSpace(dict.fromkeys(names, (LOW, HIGH)), seed=seed),
            deterministic=True,
            n_trials=objective.budget,
            seed=seed,
            output_directory=folder,
        )
        facade = BlackBoxFacade(
            scenario,
            lambda config, seed=0: 0.0,  # never called: it is asked and told
            intensifier=BlackBoxFacade.get_intensifier(scenario, max_config_calls=1),
            overwrite=True,
            logging_level=False,
        )
        while True:
            asked = facade.ask()
            value = objective([asked.config[name] for name in names])
            facade.tell(asked, TrialValue(cost=value))


ARMS: dict[str, Callable[[Objective, int], None]] = {
    "random": chance,
    "pycma": pycma,
    "cmaes": cmaes,
    "tpe": tpe,
    "auto": auto,
    "margins": margins,
    "botorch": botorch,
    "smac": smac,
}


def minimised(
    arm: str, function: Callable[[np.ndarray], float], dimensions: int, budget: int, seed: int
) -> Objective:
    """One search, to the end of its budget."""
    objective = Objective(function, dimensions, budget)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each package has its own
        with contextlib.suppress(Spent):
            ARMS[arm](objective, seed)
    return objective
