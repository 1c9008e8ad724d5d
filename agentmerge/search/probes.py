"""What can be asked of a search besides its nodes: try a recipe, list what was scored.

The agents' tools and ``MergeToolkit`` are these functions under other names. They go through the
same ledger, budget and scoring as the nodes, and answer in JSON-plain values. What a caller sends
is data: a recipe may use the search's own parents and nothing else, and no text names a file.
"""

from __future__ import annotations

import math
import statistics
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from agentmerge.agents.ladder import Noise, release
from agentmerge.agents.schemas import SCALE
from agentmerge.contracts.operators import PROBE, SHADOW
from agentmerge.contracts.strategy import Proposal
from agentmerge.contracts.worker import ItemRef
from agentmerge.errors import CandidateFailed, NotBegun, UserError
from agentmerge.ledger import Candidate
from agentmerge.recipe import Recipe
from agentmerge.recipe.names import short_name
from agentmerge.search import budget
from agentmerge.search.evaluate import evaluate
from agentmerge.search.search import Search
from agentmerge.search.untrusted import read_recipe

MAX_LISTED = 50

_adding = threading.Lock()
#: The same call from many threads at once is paid for once: each recipe has one of these.
_asking = tuple(threading.Lock() for _ in range(64))


@dataclass(frozen=True)
class Release:
    """Scores as the Ladder lets the search's own agents see them: in prompts and by tools alike.

    noise: one standard error of the difference of two candidates' scores.
    """

    search: Search
    noise: Noise

    def of(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The same, one that is better only within the noise with the score of the best before."""
        released = release(self.search.history(space=self.search.present), self.noise)
        shown = {(o.generation, o.slot): o for o in released.entries}
        found = []
        for candidate in candidates:
            at = (candidate.generation, candidate.slot)
            if at in released.tied:
                candidate = replace(candidate, score=shown[at].score, tasks=shown[at].tasks)
            found.append(candidate)
        return found

    def apart(self, one: Candidate, other: Candidate) -> bool:
        """Whether two scores differ by more than the noise."""
        gap = abs((one.score or 0.0) - (other.score or 0.0))
        return gap > self.noise(one.observation(), other.observation())


def shown_to(release: Release | None, candidate: Candidate) -> Candidate:
    return candidate if release is None else release.of([candidate])[0]


def merge_and_evaluate(
    search: Search,
    recipe: str,
    tasks: Sequence[str] | None = None,
    limit: int | None = None,
    generation: int | None = None,
    who: str = "",
    release: Release | None = None,
) -> dict[str, Any]:
    """Score a recipe; a merge that was scored before costs nothing.

    recipe: mergekit YAML with this search's models, or a JSON list of integers 0..100, one an axis.
    tasks, limit: only these objectives, only so many items a task: cheaper, and not comparable with
    a whole score, so it does not become a candidate.
    generation: which one a new candidate joins; by default one of its own. who: its label.
    release: what hides scores that differ by noise only; by default all are shown.

    Raises:
        UserError: the recipe or a task cannot be understood, or the budget is used up.
        CandidateFailed: it cannot be merged or scored.
    """
    parsed, point = read_recipe(search, recipe)
    search.check(parsed)
    if tasks is None and limit is None:
        text = None if point else parsed.to_yaml()
        proposal = Proposal(point, PROBE, text, who, space=search.present.key)
        return as_candidate(search, proposal, parsed, generation, release)
    names = [o.name for o in search.taskset.objectives]
    wrong = [name for name in tasks or () if name not in names]
    if wrong:
        raise UserError(f"no task {wrong[0]!r}; there are {', '.join(names)}")
    if limit is not None and limit < 1:
        raise UserError(f"limit {limit} must be at least 1")
    chosen = [o for o in search.taskset.objectives if not tasks or o.name in tasks]
    leaves = [search.taskset.task(name) for o in chosen for name in o.leaves]
    items = {task.name: task.part("search")[:limit] for task in leaves}
    only = [ref for refs in items.values() for ref in refs]
    recipe_hash = parsed.hash(search.identities)
    with _alone(search, recipe_hash):
        _reserve(search, {"recipe": recipe, "tasks": tasks, "limit": limit}, len(only), generation)
        answers = search.scoring.ask(
            parsed, recipe_hash, wanted=partial(budget.wanted, search), only=only
        )
        search.scoring.save(answers)
    scores = {}
    for task in leaves:
        judged = [ref for ref in items[task.name] if not answers.results[ref].missing]
        results = [answers.results[ref] for ref in judged]
        scores[task.name] = search.taskset.aggregate(task, results, judged)
        if release is not None:
            scores[task.name] = _coarse(scores[task.name], [r.value for r in results])
    return {
        "partial": True,
        "tasks": _by_objective(search, scores, {o.name for o in chosen}, items),
        "items": {name: len(refs) for name, refs in items.items()},
        "paid_items": sum(len(refs) for _, _, refs, _ in answers.paid),
        "note": "on a part of the items: compare it only with others on the same part",
    }


def list_candidates(
    search: Search, count: int = 10, release: Release | None = None
) -> dict[str, Any]:
    """The best candidates so far, parents and cheap merges among them, and what may be spent."""
    if not 1 <= count <= MAX_LISTED:
        raise UserError(f"count {count} must be from 1 to {MAX_LISTED}")
    found = search.book.candidates()
    heard = [c for c in found if c.operator != SHADOW]
    scored = [c for c in heard if c.score is not None and c.twin is None and not c.prior]
    ranked = sorted(scored if release is None else release.of(scored), key=lambda c: c.rank)
    return {
        "candidates": [row_of(search, candidate) for candidate in ranked[:count]],
        "scored": len(ranked),
        "failed": sum(c.state == "failed" for c in found),
        "evaluations_left": budget.evaluations_left(search),
        "axes": [axis.name for axis in search.present.axes],
    }


def _alone(search: Search, recipe_hash: str) -> threading.Lock:
    """One call at a time about a recipe: the next one finds what this one pays for."""
    return _asking[hash((search.run_id, recipe_hash)) % len(_asking)]


def _refuse_late(search: Search) -> None:
    """
    Raises:
        UserError: the search's time is used up.
        NotBegun: it was told to stop.
    """
    if search.stopping():
        raise NotBegun("the search was told to stop before this call's turn")
    if not budget.wanted(search):
        limit_s = search.config.budget.timeout_s
        raise UserError(f"the time of this search is used up (budget.timeout_s {limit_s:g})")


def _reserve(
    search: Search, arguments: Mapping[str, Any], items: int, generation: int | None
) -> None:
    """Promise a call its items, out of the same budget as candidates; once for the same call.

    Raises:
        UserError: the budget has fewer left.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    tool = merge_and_evaluate.__name__
    with _adding:
        if search.ledger.probed(search.run_id, tool, given):
            return
        _refuse_late(search)
        left = budget.items_left(search)
        if items > left:
            raise UserError(
                f"{items} items are more than this search's budget has left ({left}); "
                "give a lower limit, or fewer tasks"
            )
        at = -1 if generation is None else generation
        search.book.save_probe(tool, given, "", items, at)


def as_candidate(
    search: Search,
    proposal: Proposal,
    recipe: Recipe,
    generation: int | None,
    release: Release | None = None,
) -> dict[str, Any]:
    """Score a recipe as a candidate of the run, unless it is one already."""
    recipe_hash = recipe.hash(search.identities)
    with _alone(search, recipe_hash):
        at, known = _place(search, proposal, recipe, recipe_hash, generation)
        evaluate(search, *at)
    candidate = search.book.candidate(*at)
    if candidate.state == "open":
        raise NotBegun("the search was told to stop before this candidate's turn")
    if candidate.failure:
        raise CandidateFailed(candidate.failure)
    return row_of(search, shown_to(release, candidate)) | {
        "known": known,
        "evaluations_left": budget.evaluations_left(search),
    }


def _place(
    search: Search, proposal: Proposal, recipe: Recipe, recipe_hash: str, generation: int | None
) -> tuple[tuple[int, int], bool]:
    """(generation, slot) of a recipe's candidate, and whether it was one before.

    Raises:
        UserError: it is a new one, and no evaluation is left.
    """
    with _adding:
        found = search.book.candidates()
        for candidate in found:
            if candidate.recipe_hash == recipe_hash and not candidate.prior:
                return (candidate.generation, candidate.slot), True
        _refuse_late(search)
        if not budget.evaluations_left(search):
            most = search.config.budget.max_evaluations
            raise UserError(f"all {most} evaluations of this search are used")
        last = max((c.generation for c in found), default=-1)
        place = last + 1 if generation is None else generation
        slot = 1 + max((c.slot for c in found if c.generation == place), default=-1)
        search.book.add_candidates(place, [(proposal, recipe_hash, recipe.to_yaml(), "")], slot)
        return (place, slot), False


def row_of(search: Search, candidate: Candidate) -> dict[str, Any]:
    """genome: where it lies in the space whose axes agents know now; none where it does not."""
    row: dict[str, Any] = {
        "id": f"{candidate.generation}.{candidate.slot}",
        "score": None if candidate.score is None else short(candidate.score),
        "tasks": {name: short(value) for name, value in candidate.tasks},
        "operator": candidate.operator,
        "recipe_hash": candidate.recipe_hash,
    }
    if candidate.violation:
        row["breaks_constraints_by"] = short(candidate.violation)
    if candidate.estimate is not None:
        row["stopped_early"] = {
            "estimate": short(candidate.estimate),
            "items_share": short(candidate.share),
        }
    if candidate.label:
        row["label"] = short_name(candidate.label)
    vector, now = candidate.vector, search.present
    if vector is not None and (candidate.space or search.space.key) != now.key:
        vector = search.point_of(now, candidate.observation())
    if vector is not None:
        row["genome"] = [round(value * SCALE) for value in vector]
    return row


def _coarse(score: float, values: Sequence[float]) -> float:
    """A score to within its standard error: what so few items can say."""
    step = statistics.pstdev(values) / math.sqrt(len(values))
    return score if not step else round(score / step) * step


def _by_objective(
    search: Search,
    scores: Mapping[str, float],
    chosen: set[str],
    items: Mapping[str, Sequence[ItemRef]],
) -> dict[str, float]:
    found = {}
    for objective in search.taskset.objectives:
        if objective.name in chosen:
            share = {n: len(items[n]) if objective.by_size else 1 for n in objective.leaves}
            total = sum(scores[n] * share[n] for n in objective.leaves)
            found[objective.name] = short(total / sum(share.values()))
    return found


def short(value: float) -> float:
    """Four digits: what a model needs, and what noise allows."""
    return round(value, 4)
