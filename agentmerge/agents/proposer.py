"""The proposer: says where the next generation should look.

Knows its prompt, its reply (integers 0..100, turned into the unit box here) and how to do without
a model: the mean of the four best, weighted by score.
"""

from __future__ import annotations

from dataclasses import replace

from agentmerge.agents.prompts import Message, Prompts
from agentmerge.agents.schemas import MAX_CANDIDATES, ProposedMove, ProposerReply, unit
from agentmerge.agents.tables import critic_said, variables
from agentmerge.agents.view import HistoryView
from agentmerge.contracts.advice import Guidance, StructuralMove

REPLY = ProposerReply


def messages(view: HistoryView, prompts: Prompts, guidance: Guidance) -> list[Message]:
    """`guidance` holds the critic's words and the controller's step."""
    return prompts.proposer.render(
        next_sigma="not set" if guidance.sigma is None else f"{guidance.sigma:g}",
        max_candidates=str(MAX_CANDIDATES),
        failing=view.failing,
        **variables(view),
        **critic_said(view, guidance),
    )


def by_model(reply: ProposerReply, guidance: Guidance) -> Guidance:
    return replace(
        guidance,
        mean=tuple(unit(value) for value in reply.mean_genome),
        candidates=tuple(tuple(unit(value) for value in c.genome) for c in reply.candidates),
        forecasts=tuple(candidate.expected_score for candidate in reply.candidates),
        structural_move=_move(reply.structural_move),
        expected_score=reply.expected_score,
        thought=reply.thought,
        source="model",
    )


def _move(said: ProposedMove | None) -> StructuralMove | None:
    if said is None or said.change == "none":
        return None
    return StructuralMove(said.change, said.value.strip(), said.why)


def by_rules(view: HistoryView, guidance: Guidance) -> Guidance:
    """The four best, each weighted by how far its score is above the worst one seen."""
    elites = view.standing.elites
    if not elites:
        return replace(guidance, thought="Nothing has been scored yet: no mean to propose.")
    floor = view.standing.floor
    weights = [(entry.score or 0.0) - floor for entry in elites]
    if sum(weights) <= 0:
        weights = [1.0] * len(elites)
    columns = zip(*(entry.vector or () for entry in elites), strict=True)
    mean = tuple(
        sum(w * value for w, value in zip(weights, column, strict=True)) / sum(weights)
        for column in columns
    )
    thought = f"The score-weighted mean of the best {len(elites)}."
    return replace(guidance, mean=mean, thought=thought)
