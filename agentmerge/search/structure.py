"""Structural moves as a search decides on them: which one is wanted, whether it may be made.

What a move is and how a new space fares is ``trials.py``; the ledger keeps every decision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from agentmerge.contracts.advice import Guidance, StructuralMove
from agentmerge.contracts.operators import STRUCTURE
from agentmerge.errors import RecipeRejected, UserError
from agentmerge.ledger import incumbent
from agentmerge.ledger.words import Opening, guidance_of, openings, spoken
from agentmerge.search import budget
from agentmerge.search.models import LONGEST, challenger, choices, searched_whole
from agentmerge.search.past import BARREN_GENERATIONS
from agentmerge.search.propose import asked
from agentmerge.search.search import Search
from agentmerge.search.trials import REFUSED, Trials, kept, worth
from agentmerge.search.window import told_in, within
from agentmerge.space.grouped import SearchSpace
from agentmerge.space.moves import finer, moved


def wanted_move(
    search: Search, generation: int, *, worth: Callable[[StructuralMove, SearchSpace], int] = worth
) -> StructuralMove | None:
    """The structural move to decide on before the next generation, if there is one.

    A pool's choice first, then what a curator named; an agent's; with ``search.structure: free`` a
    finer space once the strategy has nothing more to ask in the present one, which was worth
    searching; and with ``genome.layers`` the space of layers, once there is neither, or half of the
    budget is spent, or after one more generation too little would be left. worth: evaluations that
    must be left for a move.
    """
    search = within(search, generation)
    wish = search.config.search.structure
    before = openings(search.book.advice(role=STRUCTURE))
    if search.space.pool and not before:
        return next(iter(choices(search)), None)
    if wish == "fixed" or any(opening.generation == generation for opening in before):
        return None
    now = search.trials(generation)
    if now.trial is not None:
        return None
    if search.space.pool and not now.chosen and not searched_whole(search):
        return None
    known = {(opening.move.change, opening.move.value) for opening in before}
    left = budget.evaluations_left(search)

    def possible(move: StructuralMove | None) -> bool:
        return (
            move is not None
            and (move.change, move.value) not in known
            and left >= worth(move, search.space)
        )

    named = challenger(search, now.spaces[1:]) if now.leader.stacks is None else None
    if possible(named):
        return named
    guidance = guidance_of(search.book.advice(generation))
    ahead = search.config.agents.ahead
    heard = not ahead or told_in(search, generation, ahead=True).leader.key == now.leader.key
    move = guidance.structural_move if guidance.source == "model" and heard else None
    rung = finer(now.leader) if wish == "free" else None
    if move is None and possible(rung) and _worth_refining(search, generation, now.leader):
        move = rung
    layers = StructuralMove("layers", "", "weights have no more to give")
    if (
        move is None
        and possible(layers)
        and _layers_are_due(search, generation, now.leader, before, worth(layers, search.space))
    ):
        move = layers
    if move is not None and move.change == "layers":
        scored = [c for c in search.book.candidates() if c.score is not None]
        # The best may have other layers: a cheap rival, a warm start.
        in_place = [c for c in scored if not search.is_stack(c)]
        best = incumbent([c for c in in_place if not search.canonical_of(c).merges])
        move = replace(move, value=f"{best.generation}.{best.slot}" if best else "")
    return move if possible(move) else None


def approval(search: Search, generation: int) -> bool | None:
    """Whether a move may be made; None: a person has to say. A pool's first choice is what the
    config asks for."""
    if search.space.pool and not openings(search.book.advice(role=STRUCTURE)):
        return True
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


def agreed(said: object, move: StructuralMove) -> bool | None:
    """Whether a person agreed to a move; None: what they were asked was another, since the search
    was given other limits meanwhile. said: a server's client says "yes" or True alone, and whatever
    else it says is a no."""
    asked = said.get("asked") if isinstance(said, Mapping) else None
    if not isinstance(said, Mapping) or not isinstance(asked, Mapping):
        return said in (True, "yes")
    same = (asked.get("change"), asked.get("value")) == (move.change, move.value)
    return said.get("approved") is True if same else None


def restructure(search: Search, generation: int, move: StructuralMove, *, approved: bool) -> None:
    """Open the space of a move, or keep why not."""
    search = within(search, generation)
    now = search.trials(generation)
    space, refusal = _opened(search, now, move) if approved else (None, REFUSED)
    if refusal and move.change == "models" and not now.chosen:
        # A pool is not searched whole because one choice of it cannot be merged.
        for other in choices(search)[1:]:
            space, _ = _opened(search, now, other)
            if space is not None:
                why = f"{other.why}; {move.value} cannot be merged: {refusal}"
                move, refusal = replace(other, why=why[:LONGEST]), ""
                break
    word = Guidance(structural_move=move, thought=move.sentence)
    body: dict[str, Any] = {"guidance": word.to_json(), "failure": refusal}
    body["leader"] = now.leader.key
    if space is not None and move.change == "models":
        body["space"] = space.key  # what was forecast of it is held against what came there
    search.book.save_advice(generation, STRUCTURE, body)
    search.emit(spoken({"generation": generation, "role": STRUCTURE} | body))


def _opened(search: Search, now: Trials, move: StructuralMove) -> tuple[SearchSpace | None, str]:
    """The space that a move opens; or None, and why."""
    try:
        space = moved(now.leader, move, kept(move, search.book.candidates(), search.recipe_text))
        if space.key in {known.key for known in now.spaces}:
            raise UserError("that space was open before")
        recipe, point = space.uniform()
        if point is not None:  # of stacks one of the deepest
            recipe = space.recipe(point if space.stacks is None else (1.0,) * space.dimensions)
        search.check(recipe)
    except (UserError, RecipeRejected) as error:
        return None, str(error)
    return space, ""


def _layers_are_due(
    search: Search, generation: int, space: SearchSpace, before: Sequence[Opening], least: int
) -> bool:
    """Whether layers are to be searched, were not yet, and weights had what they can use: at most
    what leaves ``least`` evaluations."""
    known = any(opening.move.change == "layers" for opening in before)
    if known or space.outputs is None or space.stacks is not None:
        return False
    left = budget.evaluations_left(search)
    if search.book.evaluations() >= left or _repeats(search):
        return True
    more = asked(search, space, generation, left)
    return not more or left - sum(p.cost for p in more) < least


def _repeats(search: Search) -> bool:
    """Whether the strategy proposes only what was tried: once more, and the search would end."""
    candidates = search.book.candidates()
    recent = candidates[-1].generation - BARREN_GENERATIONS + 1
    last = [c for c in candidates if c.generation > max(recent, 0)]
    return bool(last) and all(c.state == "twin" for c in last)


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
