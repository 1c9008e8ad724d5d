"""The mutation controller: says how far the next generation steps.

Knows its prompt, its reply and the rule it replaces: a small step after an improvement, else a
wide one (LLM-Evo-Merge).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from agentmerge.agents.prompts import Message, Prompts
from agentmerge.agents.schemas import ControllerReply, json_schema, parse_reply
from agentmerge.agents.view import HistoryView, variables
from agentmerge.contracts.advice import Guidance


def messages(view: HistoryView, prompts: Prompts, guidance: Guidance) -> list[Message]:
    """`guidance` holds the critic's words."""
    return prompts.controller.render(critique=guidance.critique or "none", **variables(view))


def schema(view: HistoryView) -> dict[str, Any]:
    return json_schema(ControllerReply, view.bounds)


def parse(text: str, view: HistoryView) -> ControllerReply:
    """Raises ModelReplyError."""
    return parse_reply(text, ControllerReply, view.bounds)


def by_model(reply: ControllerReply, guidance: Guidance) -> Guidance:
    return replace(guidance, sigma=reply.sigma, source="model")


def by_rules(view: HistoryView, guidance: Guidance) -> Guidance:
    bounds = view.bounds
    return replace(guidance, sigma=bounds.sigma_low if view.improved_last else bounds.sigma_high)
