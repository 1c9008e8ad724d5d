"""Structural moves as a search decides on them: which one is wanted, whether it may be made.

What a move is and how a new space fares is ``trials.py``; the ledger keeps every decision.
"""

from __future__ import annotations

from typing import Any

from agentmerge.contracts.advice import Guidance, StructuralMove
from agentmerge.contracts.operators import STRUCTURE
from agentmerge.errors import RecipeRejected, UserError
from agentmerge.ledger import incumbent
from agentmerge.ledger.words import guidance_of, openings, spoken
from agentmerge.search import budget
from agentmerge.search.propose import asked
from agentmerge.search.search import Search
from agentmerge.search.trials import REFUSED, WORTH
from agentmerge.space.grouped import SearchSpace
from agentmerge.space.moves import finer, moved


def wanted_move(search: Search, generation: int, *, least: int = WORTH) -> StructuralMove | None:
    """The structural move to decide on before the next generation, if there is one.

    An agent's, or with ``search.structure: free`` a finer space once the strategy has nothing
    more to ask in the present one, which was worth searching. least: evaluations that must be left.
    """
    wish = search.config.search.structure
    before = openings(search.book.advice(role=STRUCTURE))
    if wish == "fixed" or any(opening.generation == generation for opening in before):
        return None
    now = search.trials(generation)
    if now.trial is not None or budget.evaluations_left(search) < least:
        return None
    guidance = guidance_of(search.book.advice(generation))
    move = guidance.structural_move if guidance.source == "model" else None
    if move is None and wish == "free" and _worth_refining(search, generation, now.leader):
        move = finer(now.leader)
    known = {(opening.move.change, opening.move.value) for opening in before}
    return None if move is None or (move.change, move.value) in known else move


def approval(search: Search, generation: int) -> bool | None:
    """Whether a move may be made; None: a person has to say."""
    if search.replies_of is not None:
        said = openings(search.ledger.advice(search.replies_of, role=STRUCTURE))
        return not any(o.generation == generation and o.refusal == REFUSED for o in said)
    return None if search.config.search.approve else True


def question(generation: int, move: StructuralMove) -> dict[str, Any]:
    """What a person is asked before a move."""
    return {
        "question": f"open another search space: {move.sentence}?",
        "generation": generation,
        "change": move.change,
        "value": move.value,
        "why": move.why,
    }


def restructure(search: Search, generation: int, move: StructuralMove, *, approved: bool) -> None:
    """Open the space of a move, or keep why not."""
    now = search.trials(generation)
    refusal = ""
    try:
        if not approved:
            raise UserError(REFUSED)
        space = moved(now.leader, move)
        if space.key in {known.key for known in now.spaces}:
            raise UserError("that space was open before")
        search.check(space.uniform()[0])
    except (UserError, RecipeRejected) as error:
        refusal = str(error)
    word = Guidance(structural_move=move, thought=move.sentence)
    body = {"guidance": word.to_json(), "failure": refusal}
    search.book.save_advice(generation, STRUCTURE, body)
    search.emit(spoken({"generation": generation, "role": STRUCTURE} | body))


def _worth_refining(search: Search, generation: int, space: SearchSpace) -> bool:
    """Whether a space has nothing left to ask and gave more than noise."""
    candidates = search.book.candidates()
    best = incumbent(candidates)
    cheap = incumbent([c for c in candidates if c.generation == 0])
    if (
        best is None
        or cheap is None
        or asked(search, space, generation, budget.evaluations_left(search))
    ):
        return False
    noise = search.noise(best.observation(), cheap.observation())
    return (best.score or 0.0) - (cheap.score or 0.0) > 2 * noise
