"""Which experts of a pool are merged: chosen once all of them were asked by themselves.

By what each one scored on the search's own items, task by task, and by what their weights show:
near-duplicates of a chosen one and damaged ones are out. Reads weights once (``merging/experts``).
What a curator named is only tried against that choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import median
from typing import TYPE_CHECKING

from agentmerge.contracts.advice import StructuralMove, subsets_of
from agentmerge.contracts.operators import CURATOR, NO_TURN, PARENT, STRUCTURE
from agentmerge.ledger.words import openings
from agentmerge.recipe.names import short_name
from agentmerge.search.search import Search
from agentmerge.space.grouped import SearchSpace
from agentmerge.workers.kinds import reads_models

if TYPE_CHECKING:
    from agentmerge.merging.experts import ExpertSurvey


@dataclass(frozen=True, slots=True)
class OwnScore:
    """What an expert showed alone: its score, and what each task adds to it."""

    score: float
    parts: tuple[float, ...]


def choices(search: Search) -> list[StructuralMove]:
    """The moves to the space of a pool's best few, the rule's first; none while experts are still
    to be scored. The others are for where that cannot be merged: what a curator named, and what
    the rule takes without one of its first.

    A replay takes what was chosen: it has no weights.
    """
    if search.replies_of is not None:
        said = openings(search.ledger.advice(search.replies_of, role=STRUCTURE))
        return [o.move for o in said if o.move.change == "models"][:1]
    pool, settings, known = search.space.pool, search.space.genome.pool, alone(search)
    if settings is None or known is None:
        return []
    base = known.get(search.space.genome.base_model or "")
    shown = {name: known[name] for name in pool if name in known}
    if len(shown) < 2:
        return []  # the search ends
    damaged, alike = _weights(search, list(shown))
    noise = _noise(search, shown)

    def of(left: Mapping[str, OwnScore]) -> StructuralMove:
        names = chosen(left, base, settings.most, damaged, alike, noise)
        if len(names) < 2:  # then the damaged and the twins are what there is
            names = chosen(left, None, settings.most, {}, {}, noise)
        why = f"the best of {len(pool)} by what each scored alone"
        out = [f"{short_name(name)} {said}" for name, said in damaged.items() if name not in names]
        value = ", ".join(map(short_name, names))
        return StructuralMove("models", value, "; ".join([why, *out])[:LONGEST])

    first = of(shown)
    taken = [name for name in shown if short_name(name) in first.value.split(", ")]
    rest = [{n: one for n, one in shown.items() if n != name} for name in reversed(taken)]
    return [first, *_named(search), *(of(left) for left in rest if len(left) > 1)]


def challenger(search: Search, spaces: Sequence[SearchSpace]) -> StructuralMove | None:
    """The move to the next subset that a curator named and nobody tried. spaces: all so far."""
    tried = [frozenset(map(short_name, space.models)) for space in spaces]
    before = openings(search.book.advice(role=STRUCTURE))
    tried += [frozenset(o.move.value.split(", ")) for o in before if o.move.change == "models"]
    return next((m for m in _named(search) if frozenset(m.value.split(", ")) not in tried), None)


def _named(search: Search) -> list[StructuralMove]:
    return [
        StructuralMove("models", ", ".join(subset.models), f"the curator: {subset.why}"[:LONGEST])
        for subset in subsets_of(search.book.advice(role=CURATOR))
    ]


def nothing_to_choose(search: Search) -> str:
    """Why there is nothing of a pool to merge, or ""."""
    pool, known = search.space.pool, alone(search) if search.space.pool else None
    if known is not None and len(known.keys() & set(pool)) < 2:
        return "fewer than two experts of the pool have a score"
    before = openings(search.book.advice(role=STRUCTURE)) if pool else []
    if before and all(o.refusal for o in before) and not searched_whole(search):
        return f"no few of the pool can be merged: {before[0].refusal}"[:LONGEST]
    return ""


def searched_whole(search: Search) -> bool:
    """Whether a pool is searched as one space, as searches did once where a choice was refused;
    those go on as they began."""
    run, key = search.replies_of or search.run_id, search.space.key
    own = [c for c in search.ledger.candidates(run) if not c.prior]
    first = min((c.generation for c in own), default=0)
    return any(
        c.generation > first and c.operator not in (PARENT, *NO_TURN) and (c.space or key) == key
        for c in own
    )


def alone(search: Search) -> dict[str, OwnScore] | None:
    """What the parents showed by themselves, as far as they have a score; None while one is still
    to be scored."""
    weights = {o.name: o.signed_weight for o in search.taskset.objectives}
    shown: dict[str, OwnScore] = {}
    for c in search.book.candidates():
        if c.operator != PARENT or c.prior:
            continue
        if c.state == "open":
            return None
        if c.score is not None:
            parts = tuple(weight * dict(c.tasks)[name] for name, weight in weights.items())
            shown[c.label] = OwnScore(c.score, parts)
    return shown


#: Of the reason that is kept with a choice.
LONGEST = 400


def chosen(
    shown: Mapping[str, OwnScore],
    base: OwnScore | None,
    most: int,
    damaged: Mapping[str, str],
    alike: Mapping[str, frozenset[str]],
    noise: float = 0.0,
) -> list[str]:
    """At most so many experts: first the best; then, one by one, whoever is furthest ahead of those
    that are there, summed over the tasks in which it is; then the best by score of what is left,
    as long as they are ahead of the base. alike: an expert -> its near-duplicates. noise: to be
    ahead by less is luck."""
    left = {name: one for name, one in shown.items() if name not in damaged}
    names: list[str] = []
    while left and len(names) < most:
        there = [max(parts) for parts in zip(*(shown[n].parts for n in names), strict=True)]
        gains = {n: _gain(one.parts, there, noise) for n, one in left.items()}
        name = max(left, key=lambda n: (gains[n], shown[n].score))
        behind = base is not None and left[name].score <= base.score and not gains[name]
        if behind and len(names) >= 2:
            break
        names.append(name)
        left = {n: one for n, one in left.items() if n != name and n not in alike.get(name, ())}
    return names


def _gain(parts: Sequence[float], there: Sequence[float], noise: float) -> float:
    ahead = sum(max(own - best, 0.0) for own, best in zip(parts, there, strict=bool(there)))
    return ahead if ahead > noise else 0.0


def _noise(search: Search, shown: Mapping[str, OwnScore]) -> float:
    """The median standard error of how far the best expert is ahead of another."""
    alone = {c.label: c.observation() for c in search.book.candidates() if c.label in shown}
    best = max(shown, key=lambda name: shown[name].score)
    found = [search.noise(alone[best], alone[name]) for name in shown if name != best]
    return median(found)


def _weights(
    search: Search, names: Sequence[str]
) -> tuple[dict[str, str], dict[str, frozenset[str]]]:
    """What the weights say: who is damaged and how, and who is whose near-duplicate."""
    found, named = surveyed(search, names)
    if found is None:
        return {}, {}
    damaged = {
        named[one.model]: one.damage[0] for one in found.experts if one.damage and not one.misfit
    }
    alike: dict[str, frozenset[str]] = {}
    for one, other, _ in found.duplicates:
        for mine, theirs in ((one, other), (other, one)):
            alike[named[mine]] = alike.get(named[mine], frozenset()) | {named[theirs]}
    return damaged, alike


def surveyed(search: Search, names: Sequence[str]) -> tuple[ExpertSurvey | None, dict[str, str]]:
    """What the weights of two experts or more show, and the name of each that it calls by its
    path; None where the worker reads no models."""
    if not reads_models(search.config.worker.kind):
        return None, {}
    named = {str(search.paths[name]): name for name in names}
    base = search.paths.get(search.space.genome.base_model or "")
    identities = tuple(search.identities.items())
    return _surveyed(tuple(named), str(base) if base else None, identities), named


@lru_cache(maxsize=1)
def _surveyed(
    models: tuple[str, ...], base: str | None, identities: tuple[tuple[str, str], ...]
) -> ExpertSurvey:
    """What the weights show; two nodes of the graph ask for it. identities: what is read."""
    from agentmerge.merging.experts import survey_experts

    return survey_experts(models, base)
