"""The critic: says what the last generation showed.

Knows its prompt, its reply and how to do without a model: plain statistics of the history.
"""

from __future__ import annotations

from dataclasses import replace

from agentmerge.agents.prompts import Message, Prompts
from agentmerge.agents.schemas import CriticReply
from agentmerge.agents.view import HistoryView, observations, variables
from agentmerge.contracts.advice import Guidance

MAX_CRITIQUE = 1_500

REPLY = CriticReply


def messages(view: HistoryView, prompts: Prompts, guidance: Guidance) -> list[Message]:
    """The critic speaks first: `guidance` has nothing for it yet."""
    return prompts.critic.render(failing=view.failing, **variables(view))


def by_model(reply: CriticReply, guidance: Guidance) -> Guidance:
    """The guidance with the model's critique in it."""
    lines = [reply.summary, *(f"- {finding}" for finding in reply.findings if finding)]
    return replace(guidance, critique=_bounded(lines), source="model")


def by_rules(view: HistoryView, guidance: Guidance) -> Guidance:
    """The guidance with the statistics as critique."""
    return replace(guidance, critique=_bounded(observations(view.released())))


def _bounded(lines: list[str]) -> str:
    kept: list[str] = []
    for line in lines:
        if kept and sum(len(k) + 1 for k in kept) + len(line) > MAX_CRITIQUE:
            break
        kept.append(line)
    return "\n".join(kept)
