"""Two candidates item by item, and how the parents differ; what a tool asks besides scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from agentmerge.contracts.operators import PARENT, SHADOW
from agentmerge.contracts.strategy import Proposal
from agentmerge.contracts.worker import ItemRef, ItemResult
from agentmerge.errors import NotFound
from agentmerge.evaluation.leads import lead
from agentmerge.evaluation.tasks import ScoredTask
from agentmerge.ledger import Candidate
from agentmerge.recipe.names import short_name
from agentmerge.search.probes import Release, as_candidate, row_of, short, shown_to
from agentmerge.search.search import Search
from agentmerge.space import seeds

ITEMS_SHOWN = 8


def compare(search: Search, a: str, b: str, release: Release | None = None) -> dict[str, Any]:
    """Two candidates, task by task and item by item: what b lost that a had, and what it gained.

    a, b: "generation.slot", a parent's name, or the start of a recipe's hash.

    Raises:
        NotFound: no such candidate, or it was not scored.
    """
    one, other = named(search, a), named(search, b)
    if release is not None and not release.apart(one, other):
        shown = (shown_to(release, candidate) for candidate in (one, other))
        both = {
            name: row_of(search, candidate) for name, candidate in zip("ab", shown, strict=True)
        }
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
    shown_one, shown_other = shown_to(release, one), shown_to(release, other)
    found: dict[str, Any] = {
        "a": row_of(search, shown_one),
        "b": row_of(search, shown_other),
        "tasks": rows,
    }
    gap = lead(search.taskset, theirs, mine, search.config.search.seed)
    if gap is not None:
        found["b_minus_a"] = {
            "score": short(gap.mean),
            "interval_95": [short(gap.low), short(gap.high)],
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


def named(search: Search, name: str) -> Candidate:
    """A scored candidate by its place, its label or the start of its recipe's hash.

    Raises:
        NotFound: there is none.
    """
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
        "a": short(sum(mine[ref].value for ref in refs) / len(refs)),
        "b": short(sum(theirs[ref].value for ref in refs) / len(refs)),
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
                "length": {short_name(name): short(value) for name, value in part.length},
                "cosine": {
                    f"{short_name(one)}, {short_name(other)}": short(value)
                    for one, other, value in part.cosine
                },
            }
        )
    return rows


def _solved(search: Search) -> list[dict[str, Any]]:
    """Task by task: how many items each parent alone solves, all of them, and none."""
    results = {}
    for label, recipe, point in seeds.parents(search.space):
        if not search.item_results(recipe.hash(search.identities)):
            parent = Proposal(point, PARENT, None if point else recipe.to_yaml(), label)
            as_candidate(search, parent, recipe, None)
        results[short_name(label)] = search.item_results(recipe.hash(search.identities))
    rows = []
    for task in search.taskset.tasks:
        asked = task.part("search")
        refs = [ref for ref in asked if all(ref in known for known in results.values())]
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
