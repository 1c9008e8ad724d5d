"""The critic: says what the last generation showed.

Knows its prompt, its reply and how to do without a model: plain statistics of the history.
"""

from __future__ import annotations

from dataclasses import replace

from agentmerge.agents.prompts import Message, Prompts
from agentmerge.agents.schemas import CriticReply, bounded_lines
from agentmerge.agents.tables import variables
from agentmerge.agents.view import HistoryView, observations
from agentmerge.contracts.advice import Guidance

MAX_CRITIQUE = 1_500

REPLY = CriticReply


def messages(view: HistoryView, prompts: Prompts, guidance: Guidance) -> list[Message]:
    """The critic speaks first: `guidance` has nothing for it yet."""
    return prompts.critic.render(failing=view.failing, **variables(view))


def by_model(reply: CriticReply, guidance: Guidance) -> Guidance:
    """The guidance with the model's critique in it."""
    lines = [reply.summary, *(f"- {finding}" for finding in reply.findings if finding)]
    return replace(guidance, critique=bounded_lines(lines, MAX_CRITIQUE), source="model")


def by_rules(view: HistoryView, guidance: Guidance) -> Guidance:
    """The guidance with the statistics as critique."""
    return replace(guidance, critique=bounded_lines(observations(view.released), MAX_CRITIQUE))
