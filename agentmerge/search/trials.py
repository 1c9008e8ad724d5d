"""Structural moves: the other search spaces that a search opens, and the race for its budget.

A move changes what no value of an axis can: the merge method, the layers a group, the filters or
the models. The space that it opens inherits every candidate that has a point there, and begins with
the best few as near as they come. It then takes turns with the space that led until now, so that
both are asked as much, and after ``TRIAL`` evaluations of its own it leads if it holds the better
candidate. A space of layers keeps those of the candidate that its move names. All of this is a fold
over the moves and candidates in the ledger; it keeps no state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from agentmerge.contracts.advice import StructuralMove
from agentmerge.contracts.operators import (
    CARRIED,
    DEPTH,
    NO_TURN,
    PARENT,
    SCALE,
    SHADOW,
    STRUCTURE,
    UNIFORM,
)
from agentmerge.contracts.strategy import History, Observation, Proposal
from agentmerge.ledger import Candidate
from agentmerge.ledger.words import Opening
from agentmerge.recipe import Recipe
from agentmerge.space.grouped import SearchSpace
from agentmerge.space.moves import moved
from agentmerge.space.seeds import depth_line, scale_points

#: Evaluations that a new space gets before it has to lead.
TRIAL = 16
#: The same of a space of layers, a dimension: of most layers it has to be learned that they hurt.
TRIAL_OF_LAYERS = 2
#: The same of experts that a curator named, at most: it ends with their cheap merges.
TRIAL_OF_MODELS = 6
#: Least of the budget that must be left for a move: its trial and as much for the other space.
WORTH = 2 * TRIAL
#: The same of the move to layers, which comes when the other space has had its share.
WORTH_OF_LAYERS = TRIAL
#: How many of the best candidates begin a new space.
SEEDS = 3
#: The refusal of a person who was asked.
REFUSED = "you said no"
_NOTHING = (math.inf, math.inf)


@dataclass(frozen=True, slots=True)
class Trials:
    """Where a search stands. spaces: all that were opened, the config's own first.

    trial: the space that is on trial against the leader, or None.
    turn: whose generation the next one is; the second only where the first has nothing to ask.
    chosen: of a pool the spaces of some of its experts that were named as a whole, the rule's
    choice first.
    """

    leader: SearchSpace
    trial: SearchSpace | None
    spaces: tuple[SearchSpace, ...]
    turn: tuple[SearchSpace, ...]
    chosen: tuple[SearchSpace, ...] = ()

    def of(self, key: str) -> SearchSpace:
        """The space with this key; a candidate of before spaces had keys lies in the first."""
        return next((space for space in self.spaces if space.key == key), self.spaces[0])


def trials_of(
    base: SearchSpace,
    moves: Sequence[Opening],
    candidates: Sequence[Candidate],
    recipe_of: Callable[[Candidate], str] = lambda candidate: "",
) -> Trials:
    """How all trials so far went. candidates: up to the last finished generation."""
    leader, trial = base, None
    spaces, turn, chosen = [base], [base], list[SearchSpace]()
    rows = [c for c in candidates if c.operator != SHADOW and not c.prior]
    scored = [c for c in rows if c.score is not None and c.twin is None]
    for opening in moves:
        if opening.refusal:
            continue
        # What followed decides nothing anew.
        leader = next((space for space in spaces if space.key == opening.leader), leader)
        trial = moved(leader, opening.move, kept(opening.move, candidates, recipe_of))
        spaces.append(trial)
        length = trial_length(trial)
        if opening.move.change == "models":
            chosen.append(trial)
            length = min(TRIAL_OF_MODELS, len(cheap_merges(trial)) or TRIAL_OF_MODELS)
            if len(chosen) == 1:  # nothing was searched before
                leader, turn, trial = trial, [trial], None
                continue
        asked = {
            space.key: sum(
                # Of first points all are asked, however early a race stops them.
                1 if opening.move.change == "models" else c.cost
                for c in rows
                if c.generation > opening.generation
                and c.operator not in NO_TURN
                and (c.space or base.key) == space.key
            )
            for space in (leader, trial)
        }
        if asked[trial.key] < length:
            ahead = asked[trial.key] > asked[leader.key]
            turn = [leader, trial] if ahead else [trial, leader]
            continue
        before = {space.key for space in spaces[:-1]}
        mine, others = (
            min((c.rank[:2] for c in scored if (c.space or base.key) in keys), default=_NOTHING)
            for keys in ({trial.key}, before)
        )
        if mine < others:
            leader = trial
        trial, turn = None, [leader]
    return Trials(leader, trial, tuple(spaces), tuple(turn), tuple(chosen))


def worth(move: StructuralMove, space: SearchSpace) -> int:
    """Evaluations that must be left for a move; those of layers end with a table of depths, and
    against a curator's experts the choice had its cheap merges."""
    if move.change == "models":
        return TRIAL_OF_MODELS
    return WORTH_OF_LAYERS + max(0, space.deeper - 1) if move.change == "layers" else WORTH


def trial_length(space: SearchSpace) -> int:
    return max(TRIAL, TRIAL_OF_LAYERS * space.dimensions) if space.stacks else TRIAL


def kept(
    move: StructuralMove, candidates: Sequence[Candidate], recipe_of: Callable[[Candidate], str]
) -> str | None:
    """The recipe of the candidate whose layers a move keeps."""
    if move.change != "layers":
        return None
    named = (c for c in candidates if f"{c.generation}.{c.slot}" == move.value)
    return next(map(recipe_of, named), None)


def verdicts(now: Trials, moves: Sequence[Opening]) -> list[str]:
    """What became of each move, a sentence each."""
    opened = iter(now.spaces[1:])
    found = []
    for opening in moves:
        end = f"not made: {opening.refusal}"
        if not opening.refusal:
            space = next(opened, None)  # None: opened since
            end = "on trial"
            if space is not now.trial and space is not None:
                end = "it leads" if space.key == now.leader.key else "it did not lead"
        found.append(f"{opening.move.sentence} after generation {opening.generation}: {end}")
    return found


def seen_from(
    history: History, space: SearchSpace, point: Callable[[Observation], Any]
) -> list[Observation]:
    """A history as it looks from ``space``; what was made in another space has no operator
    there, but for the cheap rivals and, wherever a branch scores them anew, the parents.

    point: an observation of another space -> its vector in this one, or None.
    """
    return [
        o
        if o.space == space.key
        else replace(
            o,
            vector=point(o),
            gradient=None,
            loss=None,
            operator=o.operator if o.generation == 0 or o.operator == PARENT else CARRIED,
        )
        for o in history
    ]


def cheap_merges(space: SearchSpace) -> dict[tuple[float, ...], Proposal]:
    """Point -> the uniform merges along the scale; none where the space holds no uniform one."""
    uniform = space.uniform()[1]
    if uniform is None:
        return {}
    found = {uniform: Proposal(uniform, UNIFORM, label=UNIFORM)}
    for operator, line in ((SCALE, scale_points(space)), (DEPTH, depth_line(space))):
        found |= {p: Proposal(p, operator, label=name) for name, _, p in line if p}
    return found


def first_points(
    space: SearchSpace,
    history: History,
    recipe: Callable[[Observation], Recipe],
    chosen: Sequence[SearchSpace] = (),
) -> list[Proposal]:
    """What a new space begins with: the best candidates as near as they come, and its uniform
    merge; nothing whose point is known there already.

    history: as it looks from the space. chosen: as ``Trials`` has it. Those begin with uniform
    merges along the scale, which are the search's cheap rivals in the first of them.
    """
    scored = [o for o in history if o.score is not None]
    best = sorted(scored, key=lambda o: (-(o.score or 0.0), o.generation, o.slot))[:SEEDS]
    points = [
        (space.nearest(made), f"from {o.generation}.{o.slot}")
        for o, made in ((o, recipe(o)) for o in best)
        # Nearest to models of a pool that are not here would be a merge of nothing.
        if not space.pool or not set(space.models).isdisjoint(made.models)
    ]
    uniform = space.uniform()[1]
    if uniform is not None:
        points.append((uniform, "uniform"))
    place = next((i for i, one in enumerate(chosen) if one.key == space.key), None)
    # Generation 0 had but the experts.
    found = {} if place is None else cheap_merges(space)
    if place:  # a trial is as long as this
        return [replace(p, operator=STRUCTURE) for p in [*found.values()][:TRIAL_OF_MODELS]]
    known = {o.vector for o in history if not (space.pool and o.prior)}
    for point, label in points:
        found.setdefault(point, Proposal(point, STRUCTURE, label=label))
    return [p for p in found.values() if p.vector not in known]
