"""The end of a search: its answer (``choosing.py``) beside all that it has to beat, as a card.

The answer's sealed items are asked beside every parent's and the best cheap merge's, and
differences are paired by item. Where one cannot be scored there, the card says what is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from agentmerge.contracts.advice import StructuralMove
from agentmerge.contracts.card import Answered, Card, Difference, FrontRow
from agentmerge.contracts.events import Done, Ending
from agentmerge.contracts.operators import CHEAP, PARENT, RIVALS, SHALLOWER, STRUCTURE
from agentmerge.errors import BudgetReached, CandidateFailed, RunFailed, TaskError, WorkerLost
from agentmerge.evaluation.tasks import Part
from agentmerge.ledger import Candidate, incumbent
from agentmerge.ledger.words import openings
from agentmerge.search import budget
from agentmerge.search.choosing import (
    SPLITS,
    beyond_noise,
    compared,
    confirmed,
    difference,
    entrants,
    lead_of,
    search_results,
    undenied,
    unjudged,
)
from agentmerge.search.constraints import kept
from agentmerge.search.depths import plain, settled
from agentmerge.search.evaluate import collect, judged
from agentmerge.search.failing import misanswered
from agentmerge.search.front import front_rows, untraded
from agentmerge.search.past import best_within, charges
from agentmerge.search.search import Search
from agentmerge.search.state import SearchState
from agentmerge.search.structure import wanted_move
from agentmerge.search.trials import worth
from agentmerge.search.verdict import name_of, unasked, unfair, verdict
from agentmerge.space import seeds
from agentmerge.system.temporary import write_at_once

_RESUMED = ["not all could be asked the sealed items, perhaps for now only; resume asks them"]


def finish(search: Search, stop_reason: str) -> SearchState:
    """Choose the answer, confirm it on sealed items, write recipe and card."""
    search.entering()
    search.emit(Ending(reason=stop_reason))
    last = search.book.candidates()[-1].generation
    search.whole.add(last)
    if search.dispatched:  # a limit came while a window was at work
        collect(search, last, whole=True)
    candidates = judged(search)
    card: Card | None = None
    if incumbent(candidates) is not None:
        card = final_card(search, candidates)
        card = replace(
            card,
            notes=[*card.notes, *_unused(search, stop_reason), *_unopened(search, stop_reason)],
            uplift=_uplift(search, candidates) if search.config.search.shadow else None,
        )
        write_best(search, search.book.candidate(*card.answer.candidate))
    result = None if card is None else card.to_json()
    search.ledger.update_run(search.run_id, status="done", stop_reason=stop_reason, result=result)
    search.emit(Done(reason=stop_reason, card=result or {}))
    return SearchState(status="done", stop_reason=stop_reason)


def _unused(search: Search, stop_reason: str) -> list[str]:
    """Why evaluations are left, where neither a limit nor a person ended the search."""
    why = {
        "nothing more to gain": "has nothing more to propose",
        "nothing new": "proposes only merges that were tried",
    }.get(stop_reason)
    left = budget.evaluations_left(search)
    if why is None or not left:
        return []
    told = f"{left} evaluations are left: {search.config.algorithm} {why}, and "
    move = wanted_move(search, search.book.candidates()[-1].generation, worth=lambda *_: 0)
    if move is not None:
        least = worth(move, search.space)
        return [
            f"{told}another search space ({move.change} {move.value}) is opened only while "
            f"{least} are: resume with {least - left} more evaluations, at least"
        ]
    return [
        f"{told}a larger budget changes nothing; a branch with another strategy goes on from here"
    ]


def _unopened(search: Search, stop_reason: str) -> list[str]:
    """That the budget ended before layers were searched, which the user asked for."""
    moves = openings(search.book.advice(role=STRUCTURE))
    known = any(opening.move.change == "layers" for opening in moves)
    if stop_reason != "budget" or known or not search.space.deeper:
        return []
    least = worth(StructuralMove("layers", ""), search.space)
    more = least - budget.evaluations_left(search)
    return [
        f"no layers were searched: their space is opened only while {least} evaluations are left; "
        f"resume with {more} more, at least"
    ]


def final_card(search: Search, candidates: Sequence[Candidate]) -> Card:
    scored = [c for c in candidates if c.score is not None and c.twin is None and not c.prior]
    ranked = sorted(scored, key=lambda c: c.rank)
    allowed = entrants(scored)
    parents = [c for c in scored if c.operator == PARENT]
    rivals = [c for c in ranked if c.operator in RIVALS]
    best_rival = rivals[0] if rivals else None
    tried = [c for c in ranked if c.operator not in (*CHEAP, SHALLOWER)]
    found = confirmed(search, allowed, tried)
    choice, sealed = found.choice, found.sealed
    part: Part = "sealed" if sealed else "search"
    cheap = [c for c in allowed if c.operator in CHEAP]
    own = list(plain(search, cheap))
    # A cheap stack takes another merge's place only where sealed items put it ahead.
    cheap.sort(key=lambda c: c not in own)
    lucky = found.answer in cheap and found.answer not in own
    # Where a stack won and is not ahead of the cheap rivals, the table shows why.
    lost = [found.lost] if found.lost else []
    deep = settled(search, found.answer if lucky else choice.winner, candidates, part, lost)
    answer, doubts = deep.answer, deep.notes
    if found.unproven and not lucky:
        answer, doubts = found.answer, []
    if answer is not found.answer and answer.operator not in CHEAP:
        rivals_of = own if any(plain(search, [answer])) else cheap
        answer, more = beyond_noise(search, answer, [answer, *tried], rivals_of)
        doubts = [*doubts, *more]
    # Search items are known of all of them; sealed ones are asked of the best cheap merge alone.
    others = [*parents, *(rivals[:1] if sealed else rivals)]
    if sealed:
        answer, more = undenied(search, answer, [c for c in cheap if c in others])
        doubts = [*doubts, *more]
    rows = {}
    for candidate in dict.fromkeys([answer, *others]):
        rows[candidate.generation, candidate.slot] = compared(search, candidate, part, lost)
    known = [c for c in others if rows[c.generation, c.slot].sealed_failure is None]
    differences = _differences(search, answer, known, part)
    interval = lead_of(search, search_results(search, answer, part), None, part)
    chosen = rows[answer.generation, answer.slot]
    all_parents = [rows[c.generation, c.slot] for c in parents]
    front: list[FrontRow] = []
    if search.config.search.traded:
        front = front_rows(search, scored, part, lost)
    broken = ["no candidate kept every constraint; this one breaks them least"]
    known_parents = {c.label for c in parents}
    missing = [label for label, _, _ in seeds.parents(search.space) if label not in known_parents]
    where = _where(search, part)
    return Card(
        answer=Answered(
            **vars(chosen),
            votes=choice.votes,
            splits=SPLITS,
            interval=None if interval is None else [interval.low, interval.high],
        ),
        parents=all_parents,
        best_rival=rows[best_rival.generation, best_rival.slot] if best_rival else None,
        sealed=sealed,
        differences=differences,
        warnings=search.ledger.run(search.run_id).facts.get("warnings", []),
        notes=[
            *found.notes,
            *doubts,
            *dict.fromkeys(unasked([*rows.values(), *front])),
            *(unjudged(search, [answer, *known]) if sealed and search.taskset.judged else []),
            *(_RESUMED if lost and not found.lost else []),
            *search.taskset.notes,
            *unfair(rows.values(), chosen, len(search.taskset.refs("search"))),
            *misanswered(search, answer),
            *(broken if answer.violation and ranked[0].violation else []),
            *untraded(search),
            *_at_bounds(search, answer),
        ],
        constraints=kept(search.floors(scored), chosen, all_parents),
        fallen=found.fallen,
        lost=lost[0] if lost else "",
        depths=deep.rows,
        front=front,
        verdict=verdict(answer, scored, differences, where, missing, unproven=found.unproven),
    )


def _differences(
    search: Search, answer: Candidate, others: Sequence[Candidate], part: Part
) -> list[Difference]:
    """How far the answer is ahead of each other; all have been asked."""
    mine = search_results(search, answer, part)
    found = []
    for other in others:
        theirs = mine if other is answer else search_results(search, other, part)
        if other is not answer and (ahead := lead_of(search, mine, theirs, part)) is not None:
            found.append(Difference(name_of(other), other.operator, *ahead))
    return found


def _where(search: Search, part: Part) -> str:
    """The items that differences are of, in words."""
    if part == "search":
        return "search items, by which it was chosen"
    stand_in = [task.name for task in search.taskset.tasks if task.sealed == task.search]
    if not stand_in:
        return "sealed items"
    return f"sealed items (of {', '.join(stand_in)} its search items, for want of sealed ones)"


def _at_bounds(search: Search, answer: Candidate) -> list[str]:
    """An answer on the edge of what was searched: beyond it may be a better one."""
    if answer.operator in CHEAP or answer.vector is None:
        return []
    space = search.trials(answer.generation).of(answer.space or search.space.key)
    if answer.space not in ("", space.key):
        return []  # made in the space of the search that this one branched from
    # A layer that is absent, or as it is, is on no bound; nor has a switch any.
    neutral = space.stacks.neutral() if space.stacks else [None] * len(space.axes)
    found = [
        f"{axis.name} ({end:g})"
        for axis, unit, usual in zip(space.axes, answer.vector, neutral, strict=True)
        for edge, end in ((0.0, axis.low), (1.0, axis.high))
        if axis.kind != "bool"
        if abs(unit - edge) < 1e-6 and (usual is None or abs(unit - usual) > 1e-6)
    ]
    if not found:
        return []
    named = ", ".join(found[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "")
    return [
        f"the answer lies on the bound of {len(found)} of {len(space.axes)} values: {named}; a "
        "wider range may hold a better one"
    ]


def write_best(search: Search, best: Candidate) -> None:
    """best.yml, replaced in one step: it is whole at every moment."""
    path = search.run_dir / "best.yml"
    text = search.ledger.recipe(best.recipe_hash, search.run_id)
    try:
        if path.is_file() and path.read_bytes() == text.encode():
            return
        write_at_once(path, text)
    except OSError as error:
        raise RunFailed(f"{path} cannot be written: {error}; mend that, then resume") from error


def _uplift(search: Search, candidates: Sequence[Candidate]) -> dict[str, Any]:
    """Plain data for the closing card: both arms' best after as many evaluations, how far apart
    they are on sealed items (search items where none are sealed), and what the agents cost."""
    spent = {shadow: charges(candidates, shadow=shadow) for shadow in (False, True)}
    equal = min(sum(found.values()) for found in spent.values())
    agents, null = (best_within(candidates, equal, shadow=shadow) for shadow in (False, True))
    found: dict[str, Any] = {
        "share": search.config.search.shadow,
        "evaluations": round(equal, 2),
        "agents": None if agents is None else name_of(agents),
        "null": None if null is None else name_of(null),
        "cost": search.ledger.call_totals(search.replies_of or search.run_id),
    }
    if agents is None or null is None:
        return found
    found |= {"agents_search": agents.score, "null_search": null.score}
    try:
        part, interval = difference(search, agents, null)
    except (BudgetReached, CandidateFailed, TaskError, WorkerLost) as error:
        return found | {"difference": None, "failure": str(error)}
    return found | {"part": part, "difference": interval._asdict() if interval else None}
