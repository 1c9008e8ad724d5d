"""What can be asked of a search besides its nodes: try a recipe, list, compare, look at parents.

The agents' tools and ``MergeToolkit`` are these functions under other names. They go through the
same ledger, budget and scoring as the nodes, and answer in JSON-plain values. What a caller sends
is data: a recipe may use the search's own parents and nothing else, and no text names a file.
"""

from __future__ import annotations

import json
import math
import statistics
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import yaml

from agentmerge.agents.ladder import Noise, release
from agentmerge.agents.schemas import SCALE, unit
from agentmerge.contracts.operators import PARENT, PROBE, SHADOW
from agentmerge.contracts.strategy import Proposal
from agentmerge.contracts.worker import ItemRef, ItemResult
from agentmerge.errors import (
    CandidateFailed,
    NotBegun,
    NotFound,
    RecipeError,
    RecipeRejected,
    UserError,
)
from agentmerge.evaluation.leads import lead
from agentmerge.evaluation.tasks import ScoredTask
from agentmerge.ledger import Candidate
from agentmerge.methods import METHODS
from agentmerge.recipe import Recipe, renamed
from agentmerge.search import budget
from agentmerge.search.evaluate import evaluate
from agentmerge.search.search import Search
from agentmerge.space.grouped import short_name
from agentmerge.system.yaml_text import read_yaml

MAX_RECIPE_CHARS = 20_000
MAX_LISTED = 50
ITEMS_SHOWN = 8
_RECIPE_KEYS = {"merge_method", "base_model", "models", "slices", "parameters"}
#: Written by exports and harmless: the search sets them itself.
_IGNORED_KEYS = {"dtype", "out_dtype", "merge_seed"}

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
        released = release(self.search.told(space=self.search.present), self.noise)
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


def _shown(release: Release | None, candidate: Candidate) -> Candidate:
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
        return _as_candidate(search, proposal, parsed, generation, release)
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
        results = [answers.results[ref] for ref in items[task.name]]
        scores[task.name] = search.taskset.aggregate(task, results, items[task.name])
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
        "candidates": [_row(candidate) for candidate in ranked[:count]],
        "scored": len(ranked),
        "failed": sum(c.state == "failed" for c in found),
        "evaluations_left": budget.evaluations_left(search),
        "axes": [axis.name for axis in search.present.axes],
    }


def compare(search: Search, a: str, b: str, release: Release | None = None) -> dict[str, Any]:
    """Two candidates, task by task and item by item: what b lost that a had, and what it gained.

    a, b: "generation.slot", a parent's name, or the start of a recipe's hash.

    Raises:
        NotFound: no such candidate, or it was not scored.
    """
    one, other = _named(search, a), _named(search, b)
    if release is not None and not release.apart(one, other):
        shown = (_shown(release, candidate) for candidate in (one, other))
        both = {name: _row(candidate) for name, candidate in zip("ab", shown, strict=True)}
        return both | {"note": "these two cannot be told apart on the search's items"}
    mine, theirs = (search.item_results(c.recipe_hash) for c in (one, other))
    rows = []
    for objective in search.taskset.objectives:
        for name in objective.leaves:
            task = search.taskset.task(name)
            refs = [ref for ref in task.part("search") if ref in mine and ref in theirs]
            if not refs:
                continue
            rows.append(_task_row(task, search.taskset.item_sign(task), refs, mine, theirs))
    shown_one, shown_other = _shown(release, one), _shown(release, other)
    found: dict[str, Any] = {"a": _row(shown_one), "b": _row(shown_other), "tasks": rows}
    gap = lead(search.taskset, theirs, mine, search.config.search.seed)
    if gap is not None:
        found["b_minus_a"] = {
            "score": _short(gap.mean),
            "interval_95": [_short(gap.low), _short(gap.high)],
            "beyond_noise": gap.excludes_zero,
        }
    return found


def inspect_parents(search: Search) -> dict[str, Any]:
    """How the parents differ: in weights, part by part, and in the items that only one of them
    solves. The weights need no evaluation; parents not scored yet are, and count."""
    genome = search.space.genome
    return {
        "origin": short_name(genome.base_model) if genome.base_model else "the parents' mean",
        "parts": _geometry(search),
        "items": _solved(search),
    }


def read_recipe(search: Search, text: str) -> tuple[Recipe, tuple[float, ...] | None]:
    """A recipe from untrusted text, in canonical form, and its point if the space holds it.

    Raises:
        UserError: not a recipe, or it names anything but this search's parents.
        RecipeRejected: a recipe that cannot be merged.
    """
    if len(text) > MAX_RECIPE_CHARS:
        raise RecipeError(f"the recipe has {len(text)} characters; {MAX_RECIPE_CHARS} are the most")
    space = search.present
    if text.lstrip().startswith("["):
        point = _point(text, space.dimensions)
        return space.recipe(point), point
    body = _plain_yaml(text)
    unknown = sorted(set(body) - _RECIPE_KEYS - _IGNORED_KEYS)
    if unknown:
        raise RecipeError(
            f"{unknown[0]!r} cannot be set here; use {', '.join(sorted(_RECIPE_KEYS))}"
        )
    body = {key: value for key, value in body.items() if key in _RECIPE_KEYS}
    body["dtype"] = space.dtype
    try:
        recipe = Recipe.parse(renamed(body, _full_names(search.identities)))
        strangers = sorted(set(recipe.models) - set(search.identities))
        if strangers:
            known = ", ".join(short_name(name) for name in search.identities)
            raise RecipeError(f"{strangers[0][:80]!r} is no model of this search; it has {known}")
        if METHODS[recipe.merge_method].random:
            recipe = replace(recipe, merge_seed=space.merge_seed)
        canonical = recipe.canonical(space.num_layers)
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise RecipeError(f"the recipe cannot be read: {error}") from None
    try:
        point_or_none = space.vector(canonical)
    except RecipeRejected:
        point_or_none = None  # outside this space: legal, and scored as it stands
    return canonical, point_or_none


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


def _as_candidate(
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
    return _row(_shown(release, candidate)) | {
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


def _row(candidate: Candidate) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": f"{candidate.generation}.{candidate.slot}",
        "score": None if candidate.score is None else _short(candidate.score),
        "tasks": {name: _short(value) for name, value in candidate.tasks},
        "operator": candidate.operator,
        "recipe_hash": candidate.recipe_hash,
    }
    if candidate.violation:
        row["breaks_constraints_by"] = _short(candidate.violation)
    if candidate.estimate is not None:
        row["stopped_early"] = {
            "estimate": _short(candidate.estimate),
            "items_share": _short(candidate.share),
        }
    if candidate.label:
        row["label"] = short_name(candidate.label)
    if candidate.vector is not None:
        row["genome"] = [round(value * SCALE) for value in candidate.vector]
    return row


def _named(search: Search, name: str) -> Candidate:
    found = [
        c
        for c in search.book.candidates()
        if c.score is not None and not c.prior and c.twin is None and c.operator != SHADOW
    ]
    for candidate in found:
        names = {f"{candidate.generation}.{candidate.slot}", candidate.label}
        if candidate.operator == PARENT:
            names.add(short_name(candidate.label))
        if name in names or (len(name) >= 6 and candidate.recipe_hash.startswith(name)):
            return candidate
    known = ", ".join(f"{c.generation}.{c.slot}" for c in found[-8:]) or "none yet"
    raise NotFound(f"no scored candidate {name[:80]!r}; the latest are {known}")


def _task_row(
    task: ScoredTask,
    sign: float | None,
    refs: Sequence[ItemRef],
    mine: Mapping[ItemRef, ItemResult],
    theirs: Mapping[ItemRef, ItemResult],
) -> dict[str, Any]:
    gap = {ref: (sign or 0.0) * (theirs[ref].value - mine[ref].value) for ref in refs}

    def shown(chosen: list[ItemRef]) -> dict[str, Any]:
        # The widest margin first: what one of the two knows best, and the other not at all.
        chosen = sorted(chosen, key=lambda ref: (-_swing(mine[ref], theirs[ref]), ref.index))
        return {"count": len(chosen), "items": [ref.index for ref in chosen[:ITEMS_SHOWN]]}

    return {
        "task": task.name,
        "items": len(refs),
        "a": _short(sum(mine[ref].value for ref in refs) / len(refs)),
        "b": _short(sum(theirs[ref].value for ref in refs) / len(refs)),
        "lost_by_b": shown([ref for ref in refs if gap[ref] < 0]),
        "gained_by_b": shown([ref for ref in refs if gap[ref] > 0]),
    }


def _swing(a: ItemResult, b: ItemResult) -> float:
    if a.margin is None or b.margin is None:
        return abs(a.value - b.value)
    return abs(a.margin - b.margin)


def _geometry(search: Search) -> list[dict[str, Any]] | None:
    """None where there are no weights to look at (the fake worker's parents)."""
    if not all(path.is_dir() for path in search.paths.values()):
        return None
    from agentmerge.merging.geometry import task_vectors

    space = search.space
    base = space.genome.base_model if space.genome.base_model in search.paths else None
    found = task_vectors(search.paths, search.identities, base, space.groups, space.genome.filters)
    rows = []
    for part in found:
        where = "outside the layers" if part.group is None else space.layers_text(part.group)
        rows.append(
            {
                "part": " ".join(word for word in (where, part.filter) if word),
                "length": {short_name(name): _short(value) for name, value in part.length},
                "cosine": {
                    f"{short_name(one)}, {short_name(other)}": _short(value)
                    for one, other, value in part.cosine
                },
            }
        )
    return rows


def _solved(search: Search) -> list[dict[str, Any]]:
    """Task by task: how many items each parent alone solves, all of them, and none."""
    results = {}
    for label, recipe, point in search.space.parents():
        if not search.item_results(recipe.hash(search.identities)):
            parent = Proposal(point, PARENT, None if point else recipe.to_yaml(), label)
            _as_candidate(search, parent, recipe, None)
        results[short_name(label)] = search.item_results(recipe.hash(search.identities))
    rows = []
    for task in search.taskset.tasks:
        refs = task.part("search")
        binary = {results[name][ref].value for name in results for ref in refs} <= {0.0, 1.0}
        if not binary or search.taskset.item_sign(task) is None:
            continue  # no item is solved or not: a perplexity, a class
        solvers = {ref: [name for name in results if results[name][ref].value] for ref in refs}
        alone = {name: [ref.index for ref in refs if solvers[ref] == [name]] for name in results}
        rows.append(
            {
                "task": task.name,
                "items": len(refs),
                "only": {
                    name: {"count": len(items), "items": items[:ITEMS_SHOWN]}
                    for name, items in alone.items()
                },
                "all": sum(len(solvers[ref]) == len(results) for ref in refs),
                "none": sum(not solvers[ref] for ref in refs),
            }
        )
    return rows


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
            found[objective.name] = _short(total / sum(share.values()))
    return found


def _point(text: str, dimensions: int) -> tuple[float, ...]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        raise RecipeError("the genome is not a JSON list of numbers") from None
    if len(values) != dimensions:
        raise RecipeError(f"the genome has {len(values)} numbers; give {dimensions}, one an axis")
    for value in values:
        fine = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not fine or not 0 <= value <= SCALE:  # NaN is in no range
            shown = "a list or mapping" if isinstance(value, (list, dict)) else repr(value)[:40]
            raise RecipeError(f"{shown} in the genome is not a number from 0 to {SCALE}")
    return tuple(unit(value) for value in values)


def _plain_yaml(text: str) -> dict[str, Any]:
    try:
        # An alias can make a short text a huge value; a recipe needs none.
        if any(isinstance(e, yaml.AliasEvent) for e in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise RecipeError("a recipe may not have YAML aliases (*name)")
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise RecipeError(f"the recipe is not YAML: {' '.join(str(error).split())[:200]}") from None
    body = read_yaml(text, "the recipe", RecipeError).value
    if not isinstance(body, dict) or not all(isinstance(key, str) for key in body):
        raise RecipeError("a recipe is a mapping with 'merge_method', or a JSON list of integers")
    return body


def _full_names(known: Iterable[str]) -> dict[str, str]:
    """Short name -> the config's, where only one model has it."""
    names = [*known]
    short = [short_name(name) for name in names]
    return {s: name for s, name in zip(short, names, strict=True) if short.count(s) == 1}


def _short(value: float) -> float:
    """Four digits: what a model needs, and what noise allows."""
    return round(value, 4)
