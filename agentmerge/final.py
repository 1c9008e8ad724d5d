"""How the answer is chosen and confirmed: repeated splits among the best few, then sealed items.

The best-seen of many candidates is often the luckiest (SEARCH: 100 candidates on 250 items
overstate by about 3 points). So the few best compete on many random halves of the search items,
and the one that wins most halves is the answer (after arXiv 2605.05973), if it is ahead of the best
cheap rival by more than the items' noise. The answer then goes once to the sealed items, beside
every parent and the best cheap rival, and differences are paired by item. Whatever fails there
(a candidate, a task's code, a worker), there is an answer, and the card says what is missing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from agentmerge.constraints import kept
from agentmerge.errors import CandidateFailed, TaskError, WorkerLost
from agentmerge.evaluation.statistics import Interval, paired_score_difference
from agentmerge.genome import short_name
from agentmerge.ledger import Candidate
from agentmerge.strategies.base import rng_factory
from agentmerge.workers.base import ItemRef, ItemResult

if TYPE_CHECKING:
    from agentmerge.steps import Search

SHORTLIST = 5
SPLITS = 200
RIVALS = ("uniform", "scale", "depth")

Results = dict[ItemRef, ItemResult]


def final_card(search: Search, candidates: Sequence[Candidate]) -> dict[str, Any]:
    """The closing table as plain data: answer, parents, best rival, differences, verdict."""
    scored = [c for c in candidates if c.score is not None and c.twin is None and not c.prior]
    ranked = sorted(scored, key=lambda c: c.rank)
    allowed = [c for c in ranked if not c.violation] or ranked[:1]
    parents = [c for c in scored if c.operator == "parent"]
    rivals = [c for c in ranked if c.operator in RIVALS]
    best_rival = rivals[0] if rivals else None
    found = confirmed(search, allowed)
    choice, answer, sealed = found.choice, found.answer, found.sealed
    # Search items are known of all of them; sealed ones are asked of the best cheap merge alone.
    others = [*parents, *(rivals[:1] if sealed else rivals)]
    rows = {}
    for candidate in dict.fromkeys([answer, *others]):
        rows[candidate.generation, candidate.slot] = _row(search, candidate, sealed)
    part: Literal["search", "sealed"] = "sealed" if sealed else "search"
    known = [c for c in others if "sealed_failure" not in rows[c.generation, c.slot]]
    differences = _differences(search, answer, known, part)
    interval = _paired(search, search_results(search, answer, part), None, part)
    chosen = rows[answer.generation, answer.slot]
    all_parents = [rows[c.generation, c.slot] for c in parents]
    broken = ["no candidate kept every constraint; this one breaks them least"]
    card = {
        "answer": chosen
        | {"votes": choice.votes, "splits": SPLITS, "estimate": choice.estimate}
        | {"interval": None if interval is None else [interval.low, interval.high]},
        "parents": all_parents,
        "best_rival": rows[best_rival.generation, best_rival.slot] if best_rival else None,
        "sealed": sealed,
        "differences": differences,
        "warnings": search.ledger.run(search.run_id).facts.get("warnings", []),
        "notes": [
            *found.notes,
            *_unasked(rows.values()),
            *search.taskset.notes,
            *_unfair(rows.values()),
            *(broken if answer.violation else []),
        ],
        "constraints": kept(search.floors(scored), chosen, all_parents),
        "fallen": found.fallen,
        "lost": found.lost,
    }
    return card | {"verdict": verdict(answer, best_rival, differences, part)}


@dataclass(frozen=True, slots=True)
class Confirmed:
    """The answer and the contest that it won. sealed: whether its sealed items were scored.

    fallen: recipe hash -> why its sealed items could not be. lost: why nobody could be asked.
    """

    choice: Choice
    answer: Candidate
    sealed: bool
    notes: list[str]
    fallen: dict[str, str]
    lost: str = ""


def confirmed(search: Search, allowed: Sequence[Candidate]) -> Confirmed:
    """The best of ``allowed`` (best first, at least one) whose sealed items can be scored.

    One whose sealed items cannot be (a value is not finite, the task's code raises) leaves the
    contest, which is then held among the others. Where a worker is lost, or every try failed, the
    answer is the one that the search items say.
    """
    first: Confirmed | None = None
    left, fallen, notes = list(allowed), dict[str, str](), list[str]()
    while left and len(fallen) < SHORTLIST:
        choice = choose(search, left[:SHORTLIST])
        cheap = next((c for c in left if c.operator in (*RIVALS, "parent")), None)
        answer, doubt = beyond_noise(search, choice.winner, cheap)
        first = first or Confirmed(choice, answer, False, doubt, fallen)
        if not search.taskset.refs("sealed"):
            return first
        try:
            search.taskset.score(search.confirm(answer), "sealed")
            return Confirmed(choice, answer, True, [*notes, *doubt], fallen)
        except WorkerLost as error:
            doubt = [*doubt, f"the sealed items were not asked; resume asks them: {error}"]
            return Confirmed(choice, answer, False, [*notes, *doubt], fallen, str(error))
        except (CandidateFailed, TaskError) as error:
            fallen[answer.recipe_hash] = str(error)
            notes.append(f"{name_of(answer)} was chosen, and its sealed items failed: {error}")
            left.remove(answer)
    assert first is not None
    notes = [notes[0], f"so did those of {len(notes) - 1} more; it is not confirmed"]
    return replace(first, notes=[*first.notes, *notes])


def beyond_noise(
    search: Search, winner: Candidate, cheap: Candidate | None
) -> tuple[Candidate, list[str]]:
    """(answer, note): a searched merge only where search items put it ahead of every cheap rival.

    Within the noise of the items the best of many tries is ahead by luck, and the cheap rival, one
    of a few, is the better bet.
    """
    if cheap is None or winner.operator in (*RIVALS, "parent"):
        return winner, []
    ahead = _paired(
        search,
        search_results(search, winner, "search"),
        search_results(search, cheap, "search"),
        "search",
    )
    if ahead is None or ahead.low > 0:
        return winner, []
    span = f"{ahead.mean:+.3f} ({ahead.low:+.3f} to {ahead.high:+.3f}, 95 %)"
    return cheap, [
        f"the best searched merge, {name_of(winner)}, was ahead of {name_of(cheap)} by {span} on "
        "search items: within the noise, so the cheap one is the answer"
    ]


def _differences(
    search: Search,
    answer: Candidate,
    others: Sequence[Candidate],
    part: Literal["search", "sealed"],
) -> list[dict[str, Any]]:
    """How far the answer is ahead of each other, paired by item; all have been asked."""
    mine = search_results(search, answer, part)
    found = []
    for other in others:
        if other is answer:
            continue
        ahead = _paired(search, mine, search_results(search, other, part), part)
        if ahead is not None:
            row = {"against": name_of(other), "operator": other.operator}
            found.append(row | ahead._asdict())
    return found


def search_results(
    search: Search, candidate: Candidate, part: Literal["search", "sealed"]
) -> Results:
    if part == "sealed":
        return search.confirm(candidate)
    return search.item_results(candidate.recipe_hash)


def difference(
    search: Search, mine: Candidate, theirs: Candidate
) -> tuple[Literal["search", "sealed"], Interval | None]:
    """How far one is ahead on sealed items, or on search items where none are sealed, and which.

    Raises:
        CandidateFailed, TaskError, WorkerLost: one of them cannot be scored there.
    """
    part: Literal["search", "sealed"] = "sealed" if search.taskset.refs("sealed") else "search"
    one, other = (search_results(search, c, part) for c in (mine, theirs))
    return part, _paired(search, one, other, part)


@dataclass(frozen=True, slots=True)
class Choice:
    """winner: of most halves; votes: how many. estimate: the mean score on the other halves of
    whoever won a half, which the choosing has not flattered; None where halves cannot be scored.
    """

    winner: Candidate
    votes: int
    estimate: float | None


def choose(search: Search, shortlist: Sequence[Candidate]) -> Choice:
    """The candidate that wins most random halves of the search items.

    A tie goes to the better search score. Halves are drawn task by task, so every half asks the
    same mix; the draws are the same for every candidate.
    """
    if len(shortlist) < 2:
        return Choice(shortlist[0], SPLITS, shortlist[0].score)
    known = [search.item_results(candidate.recipe_hash) for candidate in shortlist]
    rng = rng_factory(search.config.search.seed)(0, 0, "items")
    votes = [0] * len(shortlist)
    rest_scores = []
    for _ in range(SPLITS):
        half: dict[str, list[ItemRef]] = {}
        rest: dict[str, list[ItemRef]] = {}
        for task in search.taskset.tasks:
            items = task.part("search")
            order = rng.permutation(len(items))
            cut = max(1, len(items) // 2)
            half[task.name] = [items[i] for i in order[:cut]]
            rest[task.name] = [items[i] for i in order[cut:]] or half[task.name]
        first = int(np.argmax([_score(search, results, half) for results in known]))
        votes[first] += 1
        rest_scores.append(_score(search, known[first], rest))
    winner = int(np.argmax(votes))
    estimate = float(np.mean(rest_scores))
    return Choice(shortlist[winner], votes[winner], estimate if np.isfinite(estimate) else None)


def name_of(candidate: Candidate) -> str:
    return candidate.label or f"{candidate.operator} {candidate.generation}.{candidate.slot}"


def verdict(
    answer: Candidate,
    rival: Candidate | None,
    differences: Sequence[dict[str, Any]],
    part: Literal["search", "sealed"],
) -> str:
    """One honest sentence about what the search was worth."""
    where = "sealed" if part == "sealed" else "search"
    if answer.operator == "parent":
        return f"No merge beat the parent {name_of(answer)}: use it as it is."
    if answer.operator in RIVALS:
        return f"Nothing beat the cheap {name_of(answer)} merge: there was nothing to gain."
    found = [d for d in differences if rival is not None and d["against"] == name_of(rival)]
    if not found:
        return "There was no cheap rival to compare with."
    mean, low, high = found[0]["mean"], found[0]["low"], found[0]["high"]
    span = f"{mean:+.3f} ({low:+.3f} to {high:+.3f}, 95 %)"
    if low > 0:
        return f"The searched merge beats the best cheap rival on {where} items by {span}."
    if high < 0:
        return f"The searched merge is worse than the best cheap rival on {where} items: {span}."
    return f"The searched merge and the best cheap rival cannot be told apart on {where}: {span}."


def _row(search: Search, candidate: Candidate, sealed: bool) -> dict[str, Any]:
    row: dict[str, Any] = {
        "candidate": [candidate.generation, candidate.slot],
        "name": name_of(candidate),
        "operator": candidate.operator,
        "recipe_hash": candidate.recipe_hash,
        "score": candidate.score,
        "tasks": dict(candidate.tasks),
        "truncated": candidate.truncated,
        "cut_off": candidate.cut_off,
    }
    if sealed:
        try:
            score = search.taskset.score(search.confirm(candidate), "sealed")
            row |= {"sealed_score": score.value, "sealed_tasks": dict(score.tasks)}
        except (CandidateFailed, TaskError, WorkerLost) as error:
            row |= {"sealed_score": None, "sealed_failure": str(error)}
    return row


def _unasked(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Whom the sealed items could not compare, and why."""
    return [
        f"{short_name(row['name'])} is not compared on sealed items: {row['sealed_failure']}"
        for row in rows
        if "sealed_failure" in row
    ]


def _unfair(rows: Iterable[dict[str, Any]]) -> list[str]:
    """A published ten-point gain was parents' answers being cut off more often: say so."""
    found = []
    for key, what in (("truncated", "prompts cut to fit"), ("cut_off", "answers cut off")):
        counts = {short_name(row["name"]): row[key] for row in rows}
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


def _paired(
    search: Search, mine: Results, theirs: Results | None, part: Literal["search", "sealed"]
) -> Interval | None:
    """How far one candidate's score is ahead (of nothing: the score itself), paired by item.

    None where a metric is no mean over items.
    """
    taskset = search.taskset
    if any(task.rebuild != "plain" for task in taskset.tasks):
        return None
    rows = []
    for objective in taskset.objectives:
        parts = {name: taskset.task(name).part(part) for name in objective.leaves}
        total = sum(map(len, parts.values()))
        for items in parts.values():
            share = len(items) / total if objective.by_size else 1 / len(parts)
            rows.append(
                (
                    objective.signed_weight * share,
                    [mine[ref].value for ref in items],
                    [0.0 if theirs is None else theirs[ref].value for ref in items],
                )
            )
    return paired_score_difference(rows, search.config.search.seed)
