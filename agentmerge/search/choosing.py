"""How the answer is chosen and confirmed: repeated splits among the best few, then sealed items.

The best-seen of many candidates is often the luckiest (SEARCH: 100 candidates on 250 items
overstate by about 3 points). So the few best compete on many random halves of the search items,
and the one that wins most halves is the answer (after arXiv 2605.05973), if it is ahead of every
cheap rival by more than the items' noise, all tries counted. A searched merge that is not ahead on
sealed items of the rival that was best before is not handed out, and neither is anything that a
rival is ahead of beyond their noise. Whatever fails there (a candidate, a task's code, a worker),
there is an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from agentmerge.contracts.card import Compared
from agentmerge.contracts.operators import CHEAP, SHALLOWER
from agentmerge.contracts.strategy import rng_factory
from agentmerge.contracts.worker import ItemRef, ItemResult
from agentmerge.errors import BudgetReached, CandidateFailed, NotBegun, TaskError, WorkerLost
from agentmerge.evaluation.leads import counted, lead, least_leads
from agentmerge.evaluation.statistics import Interval, figure
from agentmerge.evaluation.tasks import Part
from agentmerge.ledger import Candidate
from agentmerge.recipe import Recipe
from agentmerge.search.scoring import there
from agentmerge.search.search import Search
from agentmerge.search.verdict import name_of, span

SHORTLIST = 5
SPLITS = 200
Results = dict[ItemRef, ItemResult]


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


def entrants(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Who may win, best first: what was tried to see what depth buys is none that was searched."""
    ranked = sorted((c for c in candidates if _scored(c)), key=lambda c: c.rank)
    return [c for c in ranked if not c.violation] or ranked[:1]


def _scored(candidate: Candidate) -> bool:
    own = candidate.twin is None and not candidate.prior
    return own and candidate.score is not None and candidate.operator != SHALLOWER


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
    name = name_of(winner)
    for rival in cheap:
        theirs = search_results(search, rival, "search")
        seed = search.config.search.seed
        # A try that misses a verdict is one still: there it is taken to be where the rival is.
        mine = [
            results[c] if c is winner or len(results[c]) == every else {**theirs, **results[c]}
            for c in some
        ]
        least = least_leads(search.taskset, mine, theirs, seed)
        if least is None:
            return cheap[0], [
                f"{every} search items are too few to tell a lead from luck, so {name_of(cheap[0])}"
                f" is the answer and not the best searched merge, {name}; ask at least ten"
            ]
        if (lowest := least[some.index(winner)]) <= 0:
            ahead = lead_of(search, results[winner], theirs, "search")
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
        ahead = lead_of(search, mine, theirs[first], "sealed")
        if ahead is not None and ahead.mean <= 0:
            return first, [
                f"the best searched merge, {name_of(answer)}, was not ahead of {name_of(first)} on "
                f"sealed items ({span(ahead)}), so the cheap one is the answer"
            ]
    seed = search.config.search.seed
    least = least_leads(search.taskset, list(theirs.values()), mine, seed, "sealed") or [0.0]
    if max(least) <= 0:
        return answer, []
    better = list(theirs)[least.index(max(least))]
    ahead = lead_of(search, theirs[better], mine, "sealed")
    by = "" if ahead is None else f" by {span(ahead)}"
    return better, [
        f"on sealed items {name_of(better)} is ahead of {name_of(answer)}{by}, beyond the noise "
        f"of {len(theirs)} rivals, so it is the answer"
    ]


def search_results(search: Search, candidate: Candidate, part: Part) -> Results:
    """What there is a verdict on, or needs none."""
    if part == "sealed":
        return there(confirm(search, candidate))
    return search.item_results(candidate.recipe_hash)


def unjudged(search: Search, candidates: Sequence[Candidate]) -> list[str]:
    """Who has sealed answers without a verdict, and so a sealed score that is of the others."""
    every = len(set(search.taskset.refs("sealed")))
    missing = {c: every - len(search_results(search, c, "sealed")) for c in candidates}
    return [
        f"{count} of {every} sealed items of {name_of(c)} have no verdict; its score there is of "
        "the others"
        for c, count in missing.items()
        if count
    ]


def compared(search: Search, candidate: Candidate, part: Part, lost: list[str]) -> Compared:
    """A candidate as the card has it, with its sealed score where those are asked. lost: gets why
    nobody could be asked, which may pass."""
    row = Compared(
        (candidate.generation, candidate.slot), name_of(candidate), candidate.operator,
        candidate.recipe_hash, candidate.score, dict(candidate.tasks), candidate.truncated,
        candidate.cut_off, tokens=candidate.tokens if search.config.search.counted else None,
    )  # fmt: skip
    if part == "search":
        return row
    try:
        results = confirm(search, candidate)
        score = search.taskset.score(results, part)
    except (BudgetReached, CandidateFailed, TaskError, WorkerLost) as error:
        if isinstance(error, (BudgetReached, WorkerLost)):
            lost.append(str(error))
        return replace(row, sealed_failure=str(error))
    if search.config.search.counted:
        row = replace(row, sealed_tokens=search.taskset.tokens(results, "sealed"))
    return replace(row, sealed_score=score.value, sealed_tasks=dict(score.tasks))


def difference(search: Search, mine: Candidate, theirs: Candidate) -> tuple[Part, Interval | None]:
    """How far one is ahead on sealed items, or on search items where none are sealed, and which.

    Raises:
        BudgetReached, CandidateFailed, TaskError, WorkerLost: one of them cannot be scored there.
    """
    part: Part = "sealed" if search.taskset.refs("sealed") else "search"
    one, other = (search_results(search, c, part) for c in (mine, theirs))
    return part, lead_of(search, one, other, part)


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
    asked = {
        task.name: [ref for ref in task.part("search") if all(ref in results for results in known)]
        for task in search.taskset.tasks
    }
    rng = rng_factory(search.config.search.seed)(0, 0, "items")
    votes = [0] * len(shortlist)
    for _ in range(SPLITS):
        half: dict[str, list[ItemRef]] = {}
        for task in search.taskset.tasks:
            items = asked[task.name]
            order = rng.permutation(len(items))
            half[task.name] = [items[i] for i in order[: max(1, len(items) // 2)]]
        votes[int(np.argmax([_score(search, results, half) for results in known]))] += 1
    winner = int(np.argmax(votes))
    return Winner(shortlist[winner], votes[winner])


def _score(search: Search, results: Results, half: dict[str, list[ItemRef]]) -> float:
    """The objective on some items of each task; minus infinity where a metric is not finite, or a
    task has no item."""
    taskset = search.taskset
    if not all(half.values()):
        return float("-inf")
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


def lead_of(search: Search, mine: Results, theirs: Results | None, part: Part) -> Interval | None:
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
        # The pool's clock may be a bit ahead.
        if search.seconds_left() < 1 and not search.stopping():
            raise BudgetReached("timeout") from None
        raise
    search.scoring.save(answers)
    return answers.results
