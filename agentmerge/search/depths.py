"""What the depth of an answer buys: a stack of layers without its weakest ones, one after another.

When a search ends and its best is deeper than its models, the shallower stacks on the way down to
the merge that lies under it are scored, as a generation of their own. The answer is then the
shallowest of them that is no worse than the best beyond the noise of the search items, if sealed
items put it ahead of the merge underneath beyond theirs; else that merge. Under a stack that was
not searched as one (a cheap rival, a warm start) lies the best merge of the models' own layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from agentmerge.contracts.card import DepthRow
from agentmerge.contracts.operators import CHEAP, SHALLOWER
from agentmerge.contracts.strategy import Proposal
from agentmerge.evaluation.statistics import Interval
from agentmerge.evaluation.tasks import Part
from agentmerge.ledger import Candidate
from agentmerge.recipe import Recipe
from agentmerge.recipe.copying import layers_read
from agentmerge.search import budget
from agentmerge.search.choosing import (
    SHORTLIST,
    choose,
    compared,
    entrants,
    lead_of,
    search_results,
)
from agentmerge.search.propose import add, affordable
from agentmerge.search.search import Search
from agentmerge.search.verdict import name_of, span
from agentmerge.space.grouped import SearchSpace

Point = tuple[float, ...]


def ask_shallower(search: Search, candidates: Sequence[Candidate]) -> bool:
    """Propose what the table of the best stack still lacks; whether that was anything."""
    if search.config.genome.layers is None:
        return False
    allowed = entrants(candidates)
    winner = choose(search, allowed[:SHORTLIST]).winner if allowed else None
    found = None if winner is None else _way_down(search, winner)
    if found is None or not found[2]:
        return False
    space, start, points = found
    own = [c for c in candidates if not c.prior]
    known, asked = {c.recipe_hash for c in own}, {(c.space, c.vector) for c in own}
    last = candidates[-1].generation
    proposals, deepest = [], len(layers_read(space.recipe(start)))
    for point in points:
        recipe = space.recipe(point)
        if recipe.hash(search.identities) not in known and (space.key, point) not in asked:
            label = f"{len(layers_read(recipe))} of {deepest} layers"
            proposals.append(Proposal(point, SHALLOWER, label=label, space=space.key))
    proposals = affordable(proposals, math.floor(budget.left(search) + 1e-9))
    add(search, last + 1, proposals)
    return bool(proposals)


@dataclass(frozen=True, slots=True)
class Settled:
    """An answer as deep as it has to be. rows: of the table, from the merge underneath on; none
    where the answer has its models' layers."""

    answer: Candidate
    notes: list[str]
    rows: list[DepthRow]


def settled(
    search: Search,
    answer: Candidate,
    candidates: Sequence[Candidate],
    part: Part,
    lost: list[str],
) -> Settled:
    """See the module's head. part: "sealed" where those items are asked. lost: as of
    ``compared``."""
    ladder = _ladder(search, answer, candidates)
    if len(ladder) < 2:
        return Settled(answer, [], [])
    rows, notes = _rows(search, ladder, part, lost), list[str]()
    known = [c for c, row in zip(ladder, rows, strict=True) if row.sealed_failure is None]
    chosen = _shallowest(search, known or [answer])
    if chosen is not answer:
        fewer, all_ = (search.depth_of(candidate) for candidate in (chosen, answer))
        less = name_of(chosen) if chosen is ladder[0] else f"a stack of {fewer} layers"
        notes.append(
            f"{less} is no worse than {name_of(answer)}, a stack of {all_}, beyond the noise of "
            "the search items"
        )
    if part == "sealed" and chosen is not ladder[0]:
        row = rows[ladder.index(chosen)]
        if row.sealed_failure or rows[0].sealed_failure:
            notes.append("what its layers gain is not confirmed: sealed items could not be asked")
        elif (row.ahead is None or row.ahead[1] <= 0) and ladder[0].violation > chosen.violation:
            notes.append(
                f"the stack of {row.layers} layers is not ahead of the merge under it beyond the "
                "noise of sealed items; it stays, since that merge breaks the constraints by more"
            )
        elif row.ahead is None or row.ahead[1] <= 0:
            by = "" if row.ahead is None else f" ({_span(row)})"
            notes.append(
                f"the stack of {row.layers} layers is not ahead of the merge under it, "
                f"{name_of(ladder[0])}, beyond the noise of sealed items{by}: that merge is chosen"
            )
            chosen = ladder[0]
        else:
            more = row.layers - rows[0].layers
            what = f"{more} layer{'s' * (more > 1)} more than" if more > 0 else "other layers than"
            verb = "is" if more == 1 else "are"
            notes.append(f"{what} the models' {verb} worth {_span(row)} on sealed items")
    return Settled(chosen, notes, rows)


def plain(search: Search, candidates: Iterable[Candidate]) -> Iterator[Candidate]:
    """Those that are no stacks: of the models' own layers, and not as a search of layers scaled
    them."""
    space = _layered(search)
    under = space.under.hash(search.identities) if space is not None and space.under else ""
    for candidate in candidates:
        searched = space is not None and candidate.space == space.key
        if not (candidate.recipe_hash != under if searched else search.is_stack(candidate)):
            yield candidate


def _layered(search: Search) -> SearchSpace | None:
    """The space of layers that was opened last."""
    candidates = search.book.candidates()
    if len({c.space for c in candidates}) < 2:
        return None  # no other space was opened
    opened = search.trials(candidates[-1].generation).spaces
    return next((space for space in reversed(opened) if space.stacks is not None), None)


def _way_down(search: Search, stack: Candidate) -> tuple[SearchSpace, Point, list[Point]] | None:
    """The space of a stack, its point there, and those of all between it and the merge under it,
    deepest first; None where it has none."""
    space = None if stack.operator in CHEAP else _layered(search)
    if space is None:
        return None
    point = stack.vector
    if point is None or stack.space != space.key:
        point = search.point_of(space, stack.observation())
    if point is None:
        return None
    found, fewer = list[Point](), space.shallower(point)
    while fewer is not None and len(layers_read(space.recipe(fewer))) > space.num_layers:
        found.append(fewer)
        fewer = space.shallower(fewer)
    return space, point, found


def _ladder(search: Search, answer: Candidate, candidates: Sequence[Candidate]) -> list[Candidate]:
    """The merge under a stack, then what is known of the way up to it, then itself; no more than
    itself where it is no stack, or there is no other merge."""
    if any(plain(search, [answer])):
        return [answer]
    recipes, found = list[Recipe | None](), _way_down(search, answer)
    if found is not None:
        space, _, points = found
        recipes = [space.under, *(space.recipe(point) for point in reversed(points))]
    scored = {
        c.recipe_hash: c
        for c in reversed(candidates)
        if c.score is not None and c.twin is None and not c.prior
    }
    rungs = [scored.get(recipe.hash(search.identities)) for recipe in recipes if recipe]
    under = rungs[0] if rungs else None
    if under is None:
        under = next(plain(search, entrants(candidates)), None)
    if under is None:
        return [answer]
    return [under, *(c for c in rungs[1:] if c is not None and not c.violation), answer]


def _shallowest(search: Search, ladder: Sequence[Candidate]) -> Candidate:
    """The first that is no worse than the best of all beyond the noise of the search items, and
    breaks the constraints by no more."""
    best = min(ladder, key=lambda c: (c.violation, -(c.score or 0.0)))
    mine = search_results(search, best, "search")
    for candidate in ladder[: ladder.index(best)]:
        if candidate.violation > best.violation:
            continue
        ahead = lead_of(search, mine, search_results(search, candidate, "search"), "search")
        if ahead is None or ahead.low <= 0:
            return candidate
    return best


def _rows(
    search: Search, ladder: Sequence[Candidate], part: Part, lost: list[str]
) -> list[DepthRow]:
    rows = [
        DepthRow(**vars(compared(search, c, part, lost)), layers=search.depth_of(c)) for c in ladder
    ]
    if not rows[0].sealed_failure:
        under = search_results(search, ladder[0], part)
        for place, candidate in enumerate(ladder[1:], 1):
            if not rows[place].sealed_failure:
                mine = search_results(search, candidate, part)
                ahead = lead_of(search, mine, under, part)
                rows[place] = replace(rows[place], ahead=None if ahead is None else [*ahead])
    return rows


def _span(row: DepthRow) -> str:
    return span(Interval(*row.ahead)) if row.ahead else ""
