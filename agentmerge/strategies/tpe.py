"""TPE (Bergstra et al. 2011) through the package ``optuna``, rebuilt from history each time.

The study is filled with everything that was scored; failures are told as failed trials, which
optuna leaves out. Joint densities (``multivariate``) and a lie of the worst score for candidates
still open in the same generation (``constant_liar``), as optuna advises for several workers.
"""

from __future__ import annotations

import warnings
from typing import Any

from agentmerge.contracts.advice import Guidance
from agentmerge.contracts.space import Space
from agentmerge.contracts.strategy import History, Proposal, RngFor, next_generation
from agentmerge.errors import UserError


class Tpe:
    name = "tpe"

    def propose(
        self, space: Space, history: History, guidance: Guidance | None, count: int, rng_for: RngFor
    ) -> list[Proposal]:
        generation = next_generation(history)
        if generation == 0 or count == 0:
            return []
        optuna = _optuna()
        names = [f"x{i}" for i in range(space.dimensions)]
        box = {name: optuna.distributions.FloatDistribution(0.0, 1.0) for name in names}
        seed = int(rng_for(generation, 0, "sample").integers(2**31))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # multivariate is "experimental", since 2020
            sampler = optuna.samplers.TPESampler(
                seed=seed, multivariate=True, constant_liar=count > 1
            )
            study = optuna.create_study(direction="maximize", sampler=sampler)
            study.add_trials(
                [
                    optuna.trial.create_trial(
                        params=dict(zip(names, o.vector, strict=True)),
                        distributions=box,
                        value=o.score,
                    )
                    for o in history
                    if o.vector is not None and o.score is not None
                ]
            )
            asked = [study.ask(box).params for _ in range(count)]
        return [Proposal(tuple(float(one[name]) for name in names), self.name) for one in asked]

    def population(self, dimensions: int) -> int:
        return 1


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise UserError(
            "tpe needs the package optuna: pip install 'agentmerge[tpe]', or use another "
            "search.algorithm"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


STRATEGY = Tpe()
