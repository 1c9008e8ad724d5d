"""The mutation controller: says how far the next generation steps.

Knows its prompt, its reply and the rule it replaces: a small step after an improvement, else a
wide one (LLM-Evo-Merge).
"""

from __future__ import annotations

from dataclasses import replace

from agentmerge.agents.prompts import Message, Prompts
from agentmerge.agents.schemas import ControllerReply
from agentmerge.agents.tables import critic_said, variables
from agentmerge.agents.view import HistoryView
from agentmerge.contracts.advice import Guidance

REPLY = ControllerReply


def messages(view: HistoryView, prompts: Prompts, guidance: Guidance) -> list[Message]:
    """`guidance` holds the critic's words."""
    return prompts.controller.render(**variables(view), **critic_said(view, guidance))


def by_model(reply: ControllerReply, guidance: Guidance) -> Guidance:
    return replace(guidance, sigma=reply.sigma, source="model")


def by_rules(view: HistoryView, guidance: Guidance) -> Guidance:
    bounds = view.bounds
    return replace(guidance, sigma=bounds.sigma_low if view.improved_last else bounds.sigma_high)
