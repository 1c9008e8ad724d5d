"""The control for ``llm_evo``: its every rule, with the model replaced by the top-four mean.

It reads no advice at all. What a model earns is what ``llm_evo`` or ``auto`` gains over this.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from agentmerge.contracts.advice import Guidance
from agentmerge.contracts.space import Space
from agentmerge.contracts.strategy import History, Proposal, RngFor, fittest
from agentmerge.strategies.llm_evo import ELITES, LlmEvo


class NullLlm:
    name = "null_llm"
    needs_all = True

    def propose(
        self, space: Space, history: History, guidance: Guidance | None, count: int, rng_for: RngFor
    ) -> list[Proposal]:
        elites = [o.vector for o in fittest(history, ELITES) if o.vector]
        mean = tuple(float(x) for x in np.mean(elites, axis=0)) if elites else None
        asked = LlmEvo().propose(space, history, Guidance(mean=mean), count, rng_for)
        return [
            replace(proposal, operator=self.name) if proposal.operator == LlmEvo.name else proposal
            for proposal in asked
        ]

    def population(self, dimensions: int) -> int:
        return LlmEvo().population(dimensions)


STRATEGY = NullLlm()
