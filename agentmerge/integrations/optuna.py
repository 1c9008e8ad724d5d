"""``auto`` as an Optuna sampler: ``pip install 'agentmerge[optuna]'``.

    study = optuna.create_study(sampler=AutoSampler(seed=1), direction="maximize")
    study.optimize(objective, n_trials=100)

An objective's value is told as one item without a margin, so this is Bayesian optimisation with
(1+1)-ES beside it; what ``auto`` gains from items' margins (docs/search.md) is not had here. Knows
Optuna and strategies, no merges.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from agentmerge.contracts.operators import INIT
from agentmerge.contracts.strategy import Observation, rng_factory
from agentmerge.errors import UserError
from agentmerge.space.box import unit_box
from agentmerge.strategies.auto import Auto
from agentmerge.strategies.margins import Margins

try:
    import optuna
    from optuna._transform import _SearchSpaceTransform
    from optuna.samplers import BaseSampler, RandomSampler
    from optuna.search_space import intersection_search_space
    from optuna.study import Study, StudyDirection
    from optuna.trial import FrozenTrial, TrialState
except ImportError:
    raise UserError(
        "agentmerge.integrations.optuna needs the package optuna: pip install 'agentmerge[optuna]'"
    ) from None

#: The system attribute of a trial that says which operator proposed it.
OPERATOR = "agentmerge:operator"

Distributions = dict[str, "optuna.distributions.BaseDistribution"]


class AutoSampler(BaseSampler):  # type: ignore[misc]
    """Proposes what ``auto`` would: a function of the study's trials and the seed alone.

    seed: trials of one process follow from it; None draws one.
    n_startup_trials: so many complete trials are drawn at random before the first model.
    independent_sampler: draws those, and parameters that not all complete trials have (conditional
        ones, or whose range changed); by default uniform at random.

    Whole numbers, steps and logarithms are coordinates as Optuna's own transform has them; a choice
    is a coordinate for each of its values. Trials that run are told as poor ones, so that the next
    lies elsewhere; failed and pruned trials are left out, as every sampler of Optuna's does. A
    study's end is its own: where ``auto`` would say that there is nothing to gain, its model of the
    items goes on. Several objectives are refused, constraints are not looked at.
    """

    def __init__(
        self,
        *,
        seed: int | None = None,
        n_startup_trials: int = 10,
        independent_sampler: BaseSampler | None = None,
    ) -> None:
        self._n_startup_trials = n_startup_trials
        self._independent_sampler = independent_sampler or RandomSampler(seed=seed)
        self._seed = _drawn() if seed is None else seed

    def reseed_rng(self) -> None:
        self._seed = _drawn()
        self._independent_sampler.reseed_rng()

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> Distributions:
        found = intersection_search_space(study.get_trials(deepcopy=False))
        return {name: one for name, one in found.items() if not one.single()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: Distributions
    ) -> dict[str, Any]:
        self._raise_error_if_multi_objective(study)
        if not search_space:
            return {}
        transform = _SearchSpaceTransform(search_space, transform_0_1=True)
        history = _history(study, search_space, transform)
        scored = sum(o.score is not None for o in history)
        if scored < max(self._n_startup_trials, 1):
            return {}
        drawn = rng_factory(self._seed)

        def rng_for(generation: int, slot: int, purpose: str) -> np.random.Generator:
            return drawn(trial.number, slot, purpose)  # which no other trial has

        space = unit_box(len(transform.bounds))
        asked = Auto(gradients_from=None).propose(space, history, None, 1, rng_for)
        asked = asked or Margins().propose(space, history, None, 1, rng_for)
        params: dict[str, Any] = transform.untransform(np.array(asked[0].vector))
        operator = asked[0].operator
        if _point(transform, params) in {o.vector for o in history}:  # by rounding
            anywhere = drawn(trial.number, 1, "sample").random(space.dimensions)
            params, operator = transform.untransform(anywhere), "random"
        study._storage.set_trial_system_attr(trial._trial_id, OPERATOR, operator)
        return params

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: Any
    ) -> Any:
        self._raise_error_if_multi_objective(study)
        return self._independent_sampler.sample_independent(
            study, trial, param_name, param_distribution
        )

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._independent_sampler.before_trial(study, trial)

    def after_trial(
        self,
        study: Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        self._independent_sampler.after_trial(study, trial, state, values)


def _history(study: Study, space: Distributions, transform: Any) -> tuple[Observation, ...]:
    """Complete trials with their scores, running ones without, in the order of their numbers.

    Those before the first that this sampler proposed are the first generation.
    """
    sign = 1.0 if study.direction == StudyDirection.MAXIMIZE else -1.0
    told = (TrialState.COMPLETE, TrialState.RUNNING)
    found: list[Observation] = []
    for trial in study.get_trials(deepcopy=False, states=told):
        if any(trial.distributions.get(name) != one for name, one in space.items()):
            continue
        operator = trial.system_attrs.get(OPERATOR, INIT)
        generation = found[-1].generation if found else 0
        generation += operator != INIT or generation > 0
        value = trial.value if trial.state == TrialState.COMPLETE else None
        score = None if value is None or not np.isfinite(value) else sign * value
        point = _point(transform, trial.params)
        found.append(Observation(generation, trial.number, point, operator, score))
    return tuple(found)


def _point(transform: Any, params: dict[str, Any]) -> tuple[float, ...]:
    return tuple(float(x) for x in np.clip(transform.transform(params), 0.0, 1.0))


def _drawn() -> int:
    return int(np.random.SeedSequence().generate_state(1)[0])
