"""How the answer is chosen and confirmed: repeated splits among the best few, then sealed items.

The best-seen of many candidates is often the luckiest (SEARCH: 100 candidates on 250 items
overstate by about 3 points). So the few best compete on many random halves of the search items,
and the one that wins most halves is the answer (after arXiv 2605.05973), if it is ahead of every
cheap rival by more than the items' noise, all tries counted. The answer then goes to the sealed
items, beside every parent and the best cheap merge, and differences are paired by item. A searched
merge that is not ahead there of the rival that was best before is not handed out, and neither is
anything that a rival is ahead of beyond their noise. Whatever fails there (a candidate, a task's
code, a worker), there is an answer, and the card says what is missing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import numpy as np

from agentmerge.contracts.card import Answered, Card, Compared, Difference
from agentmerge.contracts.events import Done, Ending
from agentmerge.contracts.operators import CHEAP, PARENT, RIVALS
from agentmerge.contracts.strategy import rng_factory
from agentmerge.contracts.worker import ItemRef, ItemResult
from agentmerge.errors import (
    BudgetReached,
    CandidateFailed,
    NotBegun,
    RunFailed,
    TaskError,
    WorkerLost,
)
from agentmerge.evaluation.leads import counted, lead, least_leads
from agentmerge.evaluation.statistics import Interval, figure
from agentmerge.evaluation.tasks import Part
from agentmerge.ledger import Candidate, incumbent
from agentmerge.recipe import Recipe
from agentmerge.search import budget
from agentmerge.search.constraints import kept
from agentmerge.search.past import best_within, charges
from agentmerge.search.search import Search
from agentmerge.search.state import SearchState
from agentmerge.search.structure import wanted_move
from agentmerge.search.trials import WORTH
from agentmerge.space.grouped import short_name
from agentmerge.system.temporary import write_at_once

_RESUMED = ["not all could be asked the sealed items, perhaps for now only; resume asks them"]
SHORTLIST = 5
SPLITS = 200

Results = dict[ItemRef, ItemResult]


def finish(search: Search, stop_reason: str) -> SearchState:
    """Choose the answer, confirm it on sealed items, write recipe and card."""
    search.entering()
    search.emit(Ending(reason=stop_reason))
    candidates = search.book.candidates()
    card: Card | None = None
    if incumbent(candidates) is not None:
        card = final_card(search, candidates)
        card = replace(
            card,
            notes=[*card.notes, *_unused(search, stop_reason)],
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
    move = wanted_move(search, search.book.candidates()[-1].generation, least=0)
    if move is not None:
        return [
            f"{told}another search space ({move.change} {move.value}) is opened only while "
            f"{WORTH} are: resume with {WORTH - left} more evaluations, at least"
        ]
    return [
        f"{told}a larger budget changes nothing; a branch with another strategy goes on from here"
    ]


def final_card(search: Search, candidates: Sequence[Candidate]) -> Card:
    scored = [c for c in candidates if c.score is not None and c.twin is None and not c.prior]
    ranked = sorted(scored, key=lambda c: c.rank)
    allowed = [c for c in ranked if not c.violation] or ranked[:1]
    parents = [c for c in scored if c.operator == PARENT]
    rivals = [c for c in ranked if c.operator in RIVALS]
    best_rival = rivals[0] if rivals else None
    found = confirmed(search, allowed, [c for c in ranked if c.operator not in CHEAP])
    choice, answer, sealed = found.choice, found.answer, found.sealed
    # Search items are known of all of them; sealed ones are asked of the best cheap merge alone.
    others = [*parents, *(rivals[:1] if sealed else rivals)]
    doubts = list[str]()
    if sealed:
        answer, doubts = undenied(search, answer, [c for c in allowed if c in others])
    rows, lost = {}, [found.lost] if found.lost else []
    for candidate in dict.fromkeys([answer, *others]):
        rows[candidate.generation, candidate.slot] = _row(search, candidate, sealed, lost)
    part: Part = "sealed" if sealed else "search"
    known = [c for c in others if rows[c.generation, c.slot].sealed_failure is None]
    differences = _differences(search, answer, known, part)
    interval = _lead(search, search_results(search, answer, part), None, part)
    chosen = rows[answer.generation, answer.slot]
    all_parents = [rows[c.generation, c.slot] for c in parents]
    broken = ["no candidate kept every constraint; this one breaks them least"]
    known_parents = {c.label for c in parents}
    missing = [label for label, _, _ in search.space.parents() if label not in known_parents]
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
            *_unasked(rows.values()),
            *(_RESUMED if lost and not found.lost else []),
            *search.taskset.notes,
            *_unfair(rows.values(), chosen, len(search.taskset.refs("search"))),
            *(broken if answer.violation else []),
            *_at_bounds(search, answer),
        ],
        constraints=kept(search.floors(scored), chosen, all_parents),
        fallen=found.fallen,
        lost=lost[0] if lost else "",
        verdict=verdict(answer, scored, differences, where, missing, unproven=found.unproven),
    )


@dataclass(frozen=True, slots=True)
class Confirmed:
    """The answer and the contest that it won. sealed: whether its sealed items were scored.

    fallen: recipe hash -> why its sealed items could not be. lost: why nobody could be asked.
    """

    choice: Winner
    answer: Candidate
    sealed: bool
    notes: list[str]
    fallen: dict[str, str]
    lost: str = ""

    @property
    def unproven(self) -> bool:
        """Whether a searched merge won, and not by enough to be handed out."""
        return self.choice.winner.operator not in CHEAP and self.answer.operator in CHEAP


def confirmed(
    search: Search, allowed: Sequence[Candidate], tried: Sequence[Candidate]
) -> Confirmed:
    """The best of ``allowed`` (best first, at least one) whose sealed items can be scored.

    One whose sealed items cannot be (a value is not finite, the task's code raises) leaves the
    contest, which is then held among the others. Where a worker is lost, or every try failed, the
    answer is the one that the search items say.
    """
    first: Confirmed | None = None
    left, fallen, notes = list(allowed), dict[str, str](), list[str]()
    while left and len(fallen) < SHORTLIST:
        choice = choose(search, left[:SHORTLIST])
        cheap = [c for c in left if c.operator in CHEAP]
        answer, doubt = beyond_noise(search, choice.winner, tried, cheap)
        first = first or Confirmed(choice, answer, False, doubt, fallen)
        if not search.taskset.refs("sealed"):
            return first
        try:
            search.taskset.score(confirm(search, answer), "sealed")
            return Confirmed(choice, answer, True, [*notes, *doubt], fallen)
        except (BudgetReached, WorkerLost) as error:
            doubt = [*doubt, f"the sealed items were not asked; resume asks them: {error}"]
            return Confirmed(choice, answer, False, [*notes, *doubt], fallen, str(error))
        except (CandidateFailed, TaskError) as error:
            fallen[answer.recipe_hash] = str(error)
            notes.append(f"{name_of(answer)} was chosen, and its sealed items failed: {error}")
            left.remove(answer)
    assert first is not None
    more = f"so did those of {len(notes) - 1} more; " if len(notes) > 1 else ""
    return replace(first, notes=[*first.notes, notes[0], f"{more}it is not confirmed"])


def beyond_noise(
    search: Search, winner: Candidate, tried: Sequence[Candidate], cheap: Sequence[Candidate]
) -> tuple[Candidate, list[str]]:
    """(answer, notes): a searched merge only where search items put it ahead of every cheap rival.

    The best of many tries is ahead by luck, so its lead has to be more than the luckiest of so many
    would have. Ahead of each rival means ahead of the best of them, whichever that is in truth.

    tried: every searched merge, best first; cheap: every cheap rival, best first.
    """
    if not cheap or winner.operator in CHEAP:
        return winner, []
    every = len(search.taskset.refs("search"))
    some = [tried[place] for place in counted(search.taskset, len(tried))]
    results = {c: search_results(search, c, "search") for c in some}
    some = [c for c in some if c is winner or len(results[c]) == every]
    name = name_of(winner)
    for rival in cheap:
        theirs = search_results(search, rival, "search")
        seed = search.config.search.seed
        least = least_leads(search.taskset, [results[c] for c in some], theirs, seed)
        if least is None:
            return cheap[0], [
                f"{every} search items are too few to tell a lead from luck, so {name_of(cheap[0])}"
                f" is the answer and not the best searched merge, {name}; ask at least ten"
            ]
        if (lowest := least[some.index(winner)]) <= 0:
            ahead = _lead(search, results[winner], theirs, "search")
            told = 0.0 if ahead is None else ahead.mean
            by, luck = figure(told, "+"), figure(told - lowest, "+")
            return cheap[0], [
                f"the best searched merge, {name}, was ahead of {name_of(rival)} by {by} on search "
                f"items, where the best of {len(tried)} tries can be by {luck} through luck: "
                f"within the noise, so {name_of(cheap[0])} is the answer"
            ]
    return winner, []


def undenied(
    search: Search, answer: Candidate, cheap: Sequence[Candidate]
) -> tuple[Candidate, list[str]]:
    """(answer, notes): what sealed items, on which nothing was chosen, leave of a choice.

    answer: scored there. cheap: the rivals that are asked there, best first on the search items;
    one that cannot be scored is left out.
    """
    mine = search_results(search, answer, "sealed")
    theirs = {}
    for rival in cheap:
        if rival is not answer:
            try:
                theirs[rival] = search_results(search, rival, "sealed")
            except (BudgetReached, CandidateFailed, TaskError, WorkerLost):
                continue
    if not theirs:
        return answer, []
    first = cheap[0]
    if answer.operator not in CHEAP and first in theirs:
        ahead = _lead(search, mine, theirs[first], "sealed")
        if ahead is not None and ahead.mean <= 0:
            return first, [
                f"the best searched merge, {name_of(answer)}, was not ahead of {name_of(first)} on "
                f"sealed items ({_span(ahead)}), so the cheap one is the answer"
            ]
    seed = search.config.search.seed
    least = least_leads(search.taskset, list(theirs.values()), mine, seed, "sealed") or [0.0]
    if max(least) <= 0:
        return answer, []
    better = list(theirs)[least.index(max(least))]
    ahead = _lead(search, theirs[better], mine, "sealed")
    span = "" if ahead is None else f" by {_span(ahead)}"
    return better, [
        f"on sealed items {name_of(better)} is ahead of {name_of(answer)}{span}, beyond the noise "
        f"of {len(theirs)} rivals, so it is the answer"
    ]


def _differences(
    search: Search, answer: Candidate, others: Sequence[Candidate], part: Part
) -> list[Difference]:
    """How far the answer is ahead of each other; all have been asked."""
    mine = search_results(search, answer, part)
    found = []
    for other in others:
        theirs = mine if other is answer else search_results(search, other, part)
        if other is not answer and (ahead := _lead(search, mine, theirs, part)) is not None:
            found.append(Difference(name_of(other), other.operator, *ahead))
    return found


def search_results(search: Search, candidate: Candidate, part: Part) -> Results:
    if part == "sealed":
        return confirm(search, candidate)
    return search.item_results(candidate.recipe_hash)


def _difference(search: Search, mine: Candidate, theirs: Candidate) -> tuple[Part, Interval | None]:
    """How far one is ahead on sealed items, or on search items where none are sealed, and which.

    Raises:
        BudgetReached, CandidateFailed, TaskError, WorkerLost: one of them cannot be scored there.
    """
    part: Part = "sealed" if search.taskset.refs("sealed") else "search"
    one, other = (search_results(search, c, part) for c in (mine, theirs))
    return part, _lead(search, one, other, part)


@dataclass(frozen=True, slots=True)
class Winner:
    """winner: of most halves; votes: how many."""

    winner: Candidate
    votes: int


def choose(search: Search, shortlist: Sequence[Candidate]) -> Winner:
    """The candidate that wins most random halves of the search items.

    A tie goes to the better search score. Halves are drawn task by task, so every half asks the
    same mix; the draws are the same for every candidate.
    """
    if len(shortlist) < 2:
        return Winner(shortlist[0], SPLITS)
    known = [search.item_results(candidate.recipe_hash) for candidate in shortlist]
    rng = rng_factory(search.config.search.seed)(0, 0, "items")
    votes = [0] * len(shortlist)
    for _ in range(SPLITS):
        half: dict[str, list[ItemRef]] = {}
        for task in search.taskset.tasks:
            items = task.part("search")
            order = rng.permutation(len(items))
            half[task.name] = [items[i] for i in order[: max(1, len(items) // 2)]]
        votes[int(np.argmax([_score(search, results, half) for results in known]))] += 1
    winner = int(np.argmax(votes))
    return Winner(shortlist[winner], votes[winner])


def name_of(candidate: Candidate) -> str:
    return candidate.label or f"{candidate.operator} {candidate.generation}.{candidate.slot}"


def verdict(
    answer: Candidate,
    scored: Sequence[Candidate],
    differences: Sequence[Difference],
    where: str,
    missing: Sequence[str] = (),
    *,
    unproven: bool = False,
) -> str:
    """What the search was worth, in a sentence or two, and nothing that was not asked.

    scored: every candidate with a score. differences: of the answer to parents and cheap merges.
    where: the items that they are of. missing: parents without a score. unproven: a searched merge
    is better on search items by no more than luck can do, and was not asked whether on others.
    """
    words = _worth(answer, scored, differences, where, unproven)
    best = min(differences, key=attrgetter("mean"), default=None)
    if answer.operator in CHEAP and best is not None and best.high < 0:
        turned = Interval(-best.mean, -best.high, -best.low)
        words += f" But {_called(best)} is ahead of it on {where} by {_span(turned)}."
    if missing:
        words += f" Without a score: {', '.join(f'parent {short_name(name)}' for name in missing)}."
    return words


def _worth(
    answer: Candidate,
    scored: Sequence[Candidate],
    differences: Sequence[Difference],
    where: str,
    unproven: bool,
) -> str:
    noise = " beyond the noise" if unproven else ""
    name = short_name(answer.label) if answer.operator == PARENT else name_of(answer)
    if answer.operator == PARENT:
        if all(c.operator == PARENT for c in scored):
            return f"No merge was scored: {name} is the best of the parents that were."
        return f"No merge beat the parent {name}{noise}: use it as it is."
    if answer.operator in RIVALS:
        if all(c.operator in CHEAP for c in scored):
            return (
                f"No searched merge was scored: the cheap {name} merge is the best of the others."
            )
        told = " that these items could tell" if unproven else ""
        return f"Nothing beat the cheap {name} merge{noise}: there was nothing to gain{told}."
    if all(c.operator not in CHEAP for c in scored):
        return "There was no cheap rival to compare with."
    if not differences:
        return f"The cheap rivals cannot be compared with: there are too few {where}."
    best = min(differences, key=attrgetter("mean"))
    rival = f"the best cheap rival, {_called(best)},"
    if best.high < 0:
        return f"The searched merge is worse than {rival} on {where}: {_span(best)}."
    if all(d.low > 0 for d in differences):
        return f"The searched merge beats {rival} on {where} by {_span(best)}."
    near = min(differences, key=attrgetter("low"))
    rival = rival if near is best else f"{_called(near)}, a cheap rival,"
    return f"The searched merge and {rival} cannot be told apart on {where}: {_span(near)}."


def _called(difference: Difference) -> str:
    if difference.operator == PARENT:
        return f"parent {short_name(difference.against)}"
    return f"the {difference.against} merge"


def _span(found: Interval | Difference) -> str:
    mean, low, high = (figure(end, "+") for end in (found.mean, found.low, found.high))
    return f"{mean} ({low} to {high}, 95 %)"


def _where(search: Search, part: Part) -> str:
    """The items that differences are of, in words."""
    if part == "search":
        return "search items, by which it was chosen"
    stand_in = [task.name for task in search.taskset.tasks if task.sealed == task.search]
    if not stand_in:
        return "sealed items"
    return f"sealed items (of {', '.join(stand_in)} its search items, for want of sealed ones)"


def _row(search: Search, candidate: Candidate, sealed: bool, lost: list[str]) -> Compared:
    """A candidate as the card has it. lost: gets why nobody could be asked, which may pass."""
    row = Compared(
        (candidate.generation, candidate.slot), name_of(candidate), candidate.operator,
        candidate.recipe_hash, candidate.score, dict(candidate.tasks), candidate.truncated,
        candidate.cut_off,
    )  # fmt: skip
    if not sealed:
        return row
    try:
        score = search.taskset.score(confirm(search, candidate), "sealed")
    except (BudgetReached, CandidateFailed, TaskError, WorkerLost) as error:
        if isinstance(error, (BudgetReached, WorkerLost)):
            lost.append(str(error))
        return replace(row, sealed_failure=str(error))
    return replace(row, sealed_score=score.value, sealed_tasks=dict(score.tasks))


def _at_bounds(search: Search, answer: Candidate) -> list[str]:
    """An answer on the edge of what was searched: beyond it may be a better one."""
    if answer.operator in CHEAP or answer.vector is None:
        return []
    space = search.standing(answer.generation).of(answer.space or search.space.key)
    if answer.space not in ("", space.key):
        return []  # made in the space of the search that this one branched from
    found = [
        f"{axis.name} ({end:g})"
        for axis, unit in zip(space.axes, answer.vector, strict=True)
        for edge, end in ((0.0, axis.low), (1.0, axis.high))
        if abs(unit - edge) < 1e-6
    ]
    if not found:
        return []
    named = ", ".join(found[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "")
    return [
        f"the answer lies on the bound of {len(found)} of {len(space.axes)} values: {named}; a "
        "wider range may hold a better one"
    ]


def _unasked(rows: Iterable[Compared]) -> list[str]:
    """Whom the sealed items could not compare, and why."""
    return [
        f"{short_name(row.name)} is not compared on sealed items: {row.sealed_failure}"
        for row in rows
        if row.sealed_failure is not None
    ]


def _unfair(rows: Collection[Compared], chosen: Compared, items: int) -> list[str]:
    """A published ten-point gain was parents' answers being cut off more often: say so. Where all
    are cut alike, how many."""
    found = []
    if chosen.truncated:
        found.append(
            f"{chosen.truncated} of {items} prompts were cut to fit the context, so their "
            "beginnings were not asked; make them shorter, or give models a longer context"
        )
    for key, what in (("truncated", "prompts cut to fit"), ("cut_off", "answers cut off")):
        counts = {short_name(row.name): getattr(row, key) for row in rows}
        if len(set(counts.values())) > 1:
            some = [f"{name} {count}" for name, count in counts.items() if count]
            each = ", ".join([*some, "none of the others"] if len(some) < len(counts) else some)
            found.append(f"{what} differ between the compared models ({each}); compare with care")
    return found


def _score(search: Search, results: Results, half: dict[str, list[ItemRef]]) -> float:
    """The objective on some items of each task; minus infinity where a metric is not finite."""
    taskset = search.taskset
    try:
        leaves = {
            task.name: taskset.aggregate(
                task, [results[ref] for ref in half[task.name]], half[task.name]
            )
            for task in taskset.tasks
        }
    except CandidateFailed:
        return float("-inf")
    sizes = {name: len(items) for name, items in half.items()}
    return taskset.objective(taskset.combine(leaves, sizes))


def _lead(search: Search, mine: Results, theirs: Results | None, part: Part) -> Interval | None:
    return lead(search.taskset, mine, theirs, search.config.search.seed, part)


def confirm(search: Search, candidate: Candidate) -> dict[ItemRef, ItemResult]:
    """Sealed items' results of a candidate, paid for once and kept.

    Raises:
        CandidateFailed, NotBegun, WorkerLost, TaskError: as the pool does.
        BudgetReached: no time is left.
    """
    recipe = Recipe.parse(search.ledger.recipe(candidate.recipe_hash, search.run_id))
    in_time = search.seconds_left() > 0
    try:
        answers = search.scoring.ask(
            recipe, candidate.recipe_hash, "sealed", lambda: in_time and not search.stopping()
        )
    except NotBegun:
        if (
            search.seconds_left() < 1 and not search.stopping()
        ):  # the pool's clock may be a bit ahead
            raise BudgetReached("timeout") from None
        raise
    search.scoring.save(answers)
    return answers.results


def write_best(search: Search, best: Candidate) -> None:
    """best.yml, replaced in one step: it is whole at every moment."""
    path = search.run_dir / "best.yml"
    if best.recipe_hash == search.written and path.exists():
        return
    text = search.ledger.recipe(best.recipe_hash, search.run_id)
    try:
        write_at_once(path, text)
    except OSError as error:
        raise RunFailed(f"{path} cannot be written: {error}; mend that, then resume") from error
    search.written = best.recipe_hash


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
        part, interval = _difference(search, agents, null)
    except (BudgetReached, CandidateFailed, TaskError, WorkerLost) as error:
        return found | {"difference": None, "failure": str(error)}
    return found | {"part": part, "difference": interval._asdict() if interval else None}
