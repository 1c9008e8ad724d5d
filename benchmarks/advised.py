"""What a chat model says to a benchmark's search, asked as the product asks it.

The same three roles, prompts, table of the history and parsing, without ledger and graph. The
control is shuffled feedback: the scores that the model is told, with their tasks and items, are
dealt anew among the points by a generator of its own at every asking. The strategy sees the truth.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from agentmerge.agents import controller, critic, proposer
from agentmerge.agents.forecasts import forecasts, track
from agentmerge.agents.models import AgentModel
from agentmerge.agents.prompts import Prompts, load_prompts
from agentmerge.agents.schemas import json_schema, parse_reply
from agentmerge.agents.view import HistoryView, TaskView
from agentmerge.contracts.advice import Guidance
from agentmerge.contracts.calls import Call, NoLog
from agentmerge.contracts.strategy import Observation, improved
from agentmerge.errors import ModelReplyError
from agentmerge.strategies.llm_evo import SIGMA_HIGH, SIGMA_LOW
from agentmerge.testing.problem import Problem

_ROLES: tuple[tuple[str, Any], ...] = (
    ("critic", critic),
    ("controller", controller),
    ("proposer", proposer),
)


@dataclass
class Adviser(NoLog):
    """The agents of one search. model: who speaks for all three. shuffled: the control."""

    model: AgentModel
    seed: int
    shuffled: bool = False
    prompts: Prompts = field(default_factory=load_prompts)
    calls: int = 0
    tokens: int = 0
    failures: int = 0
    _last: Guidance = field(default_factory=Guidance)
    _words: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, spec: str, base_url: str | None, shuffled: bool, seed: int) -> Adviser:
        """spec: "provider:model"."""
        if base_url is not None:
            os.environ.setdefault("OPENAI_API_KEY", "none")  # a local server asks for none
        return cls(AgentModel.from_spec(spec, base_url=base_url, timeout_s=300), seed, shuffled)

    def guidance(self, problem: Problem, history: Sequence[Observation], left: int) -> Guidance:
        """The agents' word on a history; where the model fails, a role's rules speak."""
        entries = list(history)
        generation = entries[-1].generation
        truth = self._view(problem, entries, left)
        view = truth
        if self.shuffled:
            rng = np.random.default_rng([self.seed, generation])
            view = self._view(problem, dealt_anew(entries, rng), left)
        said = Guidance()
        for role, agent in _ROLES:
            try:
                reply = self.model.ask(
                    agent.messages(view, self.prompts, said),
                    json_schema(agent.REPLY, view.bounds),
                    partial(parse_reply, reply=agent.REPLY, bounds=view.bounds),
                    log=self,
                )
                said = agent.by_model(reply.parsed, said)
            except ModelReplyError:
                self.failures += 1
                said = agent.by_rules(truth, said)
            word = {"generation": generation, "role": role, "guidance": said.to_json()}
            self._words.append(word)
        self._last = said
        return said

    def keep(self, number: int, call: Call) -> None:
        self.calls += 1
        self.tokens += call.tokens_in + call.tokens_out

    def costs(self) -> dict[str, Any]:
        found = {"calls": self.calls, "tokens": self.tokens, "failures": self.failures}
        return found | {"model": self.model.name}

    def _view(self, problem: Problem, entries: list[Observation], left: int) -> HistoryView:
        names = problem.tasks
        return HistoryView(
            space=problem.space,
            tasks=tuple(TaskView(name, 1 / len(names), "exact_match", True) for name in names),
            entries=tuple(entries),
            sigma=self._last.sigma,
            sigma_low=SIGMA_LOW,
            sigma_high=SIGMA_HIGH,
            improved_last=improved(entries),
            budget_left=left,
            forecasts=track(forecasts(self._words, entries)).sentence(),
            noise=paired_noise,
        )


def dealt_anew(history: Sequence[Observation], rng: np.random.Generator) -> list[Observation]:
    """The same points; the scores, with the tasks and items behind them, in another order."""
    places = [i for i, o in enumerate(history) if o.score is not None]
    found = list(history)
    for place, other in zip(places, rng.permutation(places), strict=True):
        told = history[int(other)]
        found[place] = replace(
            found[place], score=told.score, tasks=told.tasks, evidence=told.evidence
        )
    return found


def paired_noise(a: Observation, b: Observation) -> float:
    """One standard error of two scores' difference, as ``agentmerge.search.advise`` has it."""
    if a.evidence is None or b.evidence is None:
        return 0.0
    items, variance = a.evidence.items, 0.0
    for task in np.unique(items.task):
        mine = items.task == task
        gaps = (a.evidence.values - b.evidence.values)[mine]
        variance += float(items.weight[mine].sum()) ** 2 * float(gaps.var(ddof=1)) / len(gaps)
    return math.sqrt(variance)
