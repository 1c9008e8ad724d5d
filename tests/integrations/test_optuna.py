"""``auto`` as an Optuna sampler: Optuna's own suites, and that it searches as ``auto`` does."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.testing.pytest_samplers import (
    BasicSamplerTestCase,
    RelativeSamplerTestCase,
    SingleOnlySamplerTestCase,
)

from agentmerge.integrations.optuna import OPERATOR, AutoSampler

Make = Callable[[], AutoSampler]


@pytest.fixture(autouse=True)
def quiet() -> Any:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():  # what the suites themselves do is experimental
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


class TestBasic(BasicSamplerTestCase):
    @pytest.fixture(params=[0, 10])
    def sampler(self, request: pytest.FixtureRequest) -> Make:
        return lambda: AutoSampler(seed=0, n_startup_trials=request.param)


class TestRelative(RelativeSamplerTestCase):
    @pytest.fixture
    def sampler(self) -> Make:
        return lambda: AutoSampler(seed=0, n_startup_trials=0)


class TestSingleOnly(SingleOnlySamplerTestCase):
    @pytest.fixture
    def sampler(self) -> Make:
        return lambda: AutoSampler(seed=0)


def mixed(trial: optuna.Trial) -> float:
    """Least, 0, at 0.3, 1e-3, 4 and "b"."""
    x = trial.suggest_float("x", -1.0, 1.0)
    rate = trial.suggest_float("rate", 1e-5, 1e-1, log=True)
    layers = trial.suggest_int("layers", 1, 9)
    kind = trial.suggest_categorical("kind", ["a", "b", "c"])
    off = (x - 0.3) ** 2 + 0.2 * (np.log10(rate) + 3) ** 2 + 0.05 * (layers - 4) ** 2
    return float(off + 0.3 * (kind != "b"))


def searched(trials: int, direction: str = "minimize", seed: int = 0) -> optuna.Study:
    sign = 1.0 if direction == "minimize" else -1.0
    study = optuna.create_study(sampler=AutoSampler(seed=seed), direction=direction)
    study.optimize(lambda trial: sign * mixed(trial), n_trials=trials)
    return study


def test_it_is_far_ahead_of_chance() -> None:
    drawn = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn.optimize(mixed, n_trials=40)
    found = searched(40)
    assert found.best_value < 0.1 * drawn.best_value
    assert found.best_params["kind"] == "b"
    operators = {t.system_attrs.get(OPERATOR) for t in found.trials[10:]}
    assert "margins" in operators


def test_a_seed_is_a_study_in_either_direction() -> None:
    one, again, up = searched(16), searched(16), searched(16, "maximize")
    assert [t.params for t in one.trials] == [t.params for t in again.trials]
    assert [t.params for t in one.trials] == [t.params for t in up.trials]
    assert [t.params for t in one.trials] != [t.params for t in searched(16, seed=1).trials]


def test_a_study_goes_on_with_another_sampler_as_if_nothing_had_been() -> None:
    """It keeps nothing of its own: what it proposed, and by whom, is in the study."""
    whole = searched(18)
    for stop in (11, 14, 17):
        part = optuna.create_study(sampler=AutoSampler(seed=0))
        part.add_trials(whole.trials[:stop])
        part.optimize(mixed, n_trials=1)
        assert part.trials[stop].params == whole.trials[stop].params


def test_trials_that_run_are_not_proposed_again() -> None:
    study = searched(12)
    box = study.trials[0].distributions
    open_trials = [study.ask(box) for _ in range(4)]
    points = {(t.params["x"], t.params["rate"]) for t in open_trials}
    assert len(points) == 4


def test_what_is_not_finite_and_what_fails_is_lived_with() -> None:
    def fragile(trial: optuna.Trial) -> float:
        value = mixed(trial)
        if trial.params["x"] > 0.8:
            raise ValueError("as it was told")
        return float("inf") if trial.params["x"] < 0 else value

    study = optuna.create_study(sampler=AutoSampler(seed=3, n_startup_trials=8))
    study.optimize(fragile, n_trials=30, catch=(ValueError,))
    assert study.best_value < 0.3
    assert any(not np.isfinite(t.value) for t in study.get_trials() if t.value is not None)


def test_it_goes_on_where_auto_would_end() -> None:
    study = optuna.create_study(sampler=AutoSampler(seed=0, n_startup_trials=4))
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1) ** 2, n_trials=45)
    assert len(study.trials) == 45
    assert study.best_value < 1e-6
