"""Bayesian optimisation on the score alone, as BoTorch has it: a rival for the search benchmark.

SingleTaskGP with its own priors, log expected improvement (Ament et al., arXiv 2310.20708), one
point at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from agentmerge.contracts.advice import Guidance
from agentmerge.contracts.strategy import Observation, Proposal, RngFor, next_generation
from agentmerge.space.grouped import SearchSpace

RESTARTS, SCREENED = 5, 256


class BoTorch:
    name = "botorch"

    def propose(
        self,
        space: SearchSpace,
        history: Sequence[Observation],
        guidance: Guidance | None,
        count: int,
        rng_for: RngFor,
    ) -> list[Proposal]:
        from botorch.acquisition import LogExpectedImprovement
        from botorch.fit import fit_gpytorch_mll
        from botorch.models import SingleTaskGP
        from botorch.models.transforms import Standardize
        from botorch.optim import optimize_acqf
        from gpytorch.mlls import ExactMarginalLogLikelihood

        generation = next_generation(history)
        if generation == 0:
            return []
        scored = [o for o in history if o.score is not None]
        points = torch.tensor([o.vector for o in scored], dtype=torch.float64)
        scores = torch.tensor([[o.score] for o in scored], dtype=torch.float64)
        with torch.random.fork_rng():
            torch.manual_seed(int(rng_for(generation, 0, "sample").integers(2**31)))
            model = SingleTaskGP(points, scores, outcome_transform=Standardize(1))
            fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
            box = torch.tensor([[0.0], [1.0]], dtype=torch.float64).expand(2, space.dimensions)
            found, _ = optimize_acqf(
                LogExpectedImprovement(model, scores.max()),
                box,
                q=1,
                num_restarts=RESTARTS,
                raw_samples=SCREENED,
            )
        return [Proposal(tuple(float(x) for x in found[0]), self.name)]

    def population(self, dimensions: int) -> int:
        return 1
