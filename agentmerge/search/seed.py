"""Generation 0: parents, cheap merges, warm starts, the strategy's first draws; a branch's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from agentmerge.contracts.operators import (
    DEPTH,
    INCUMBENT,
    INIT,
    PARENT,
    SANDWICH,
    SCALE,
    STACK,
    STRUCTURE,
    UNIFORM,
)
from agentmerge.contracts.strategy import Proposal
from agentmerge.errors import RecipeRejected, UserError
from agentmerge.ledger import Candidate
from agentmerge.ledger.words import openings
from agentmerge.preflight.anchoring import warm_start
from agentmerge.recipe import Recipe
from agentmerge.search import budget
from agentmerge.search.past import first_generation
from agentmerge.search.propose import add, affordable, population, possible, rng_of
from agentmerge.search.search import Search
from agentmerge.search.state import GRAPH_VERSION, SearchState
from agentmerge.search.trials import first_points
from agentmerge.space.seeds import depth_line, parents, plain_stacks, sandwiches, scale_points
from agentmerge.strategies.random import random_vectors


def seed(search: Search) -> int:
    """Write generation 0, unless this search has a past (a branch, or this node ran before).

    A branch whose settings make old scores incomparable starts a generation of its own: the
    cheap rivals and the old incumbent, scored again.
    """
    search.entering()
    past = search.book.candidates()
    if not past:
        if not budget.evaluations_left(search):
            raise UserError(
                f"budget.max_items {search.config.budget.max_items} pays for no candidate: "
                f"one is asked {budget.items_each(search)} items, and the end "
                f"{budget.ending_items(search)} sealed ones"
            )
        add(search, 0, _population(search, budget.evaluations_left(search)))
        return 0
    last = past[-1].generation
    if all(candidate.prior for candidate in past):
        known = [c for c in past if c.score is not None and c.operator != PARENT]
        found = (_again(search, c) for c in sorted(known, key=lambda c: c.rank))
        again = [proposal for proposal in found if proposal is not None][:1]
        add(search, last + 1, [*again, *_rivals(search)][: budget.evaluations_left(search)])
        return last + 1
    return last


def first_state(search: Search, generation: int) -> SearchState:
    return SearchState(
        run_id=search.run_id,
        graph_version=GRAPH_VERSION,
        settings_hash=search.settings_hash,
        generation=generation,
        status="running",
        stop_reason="",
    )


def _rivals(search: Search) -> list[Proposal]:
    """Parents, the uniform merge, a five-point uniform scale, a line through the depth; what is
    known of layers where those may be searched."""
    space = search.space
    found = [_proposal(point, recipe, PARENT, label) for label, recipe, point in parents(space)]
    if space.pool:
        return found  # then some of them are chosen, and those have cheap merges
    recipe, point = space.uniform()
    found.append(_proposal(point, recipe, UNIFORM, UNIFORM))
    lines = {SCALE: scale_points(space), DEPTH: depth_line(space)}
    if space.genome.layers is not None:
        lines |= {SANDWICH: sandwiches(space), STACK: plain_stacks(space)}
    for operator, points in lines.items():
        found += [_proposal(point, recipe, operator, label) for label, recipe, point in points]
    return found


def _seeds(search: Search) -> list[Proposal]:
    """The cheap rivals, and the warm starts."""
    seeds = _rivals(search)
    for path in search.config.search.init:
        recipe = warm_start(path).canonical(search.space.num_layers)
        try:
            point = search.space.vector(recipe)
        except RecipeRejected:
            point = None  # outside the space, and perhaps refused: `_add` says why
        seeds.append(_proposal(point, recipe, INIT, Path(path).name))
    return seeds


def _population(search: Search, left: int) -> list[Proposal]:
    seeds = _seeds(search)
    rest = 0 if search.space.pool else left - len(seeds)
    draws = search.strategy.propose(
        search.space, [], None, max(0, min(population(search, search.space), rest)), rng_of(search)
    )
    if search.config.search.random_init and not draws:
        points = random_vectors(
            search.space, 0, max(0, min(population(search, search.space), rest)), rng_of(search)
        )
        draws = [Proposal(point, "random") for point in points]
    return affordable([*seeds, *possible(search, search.space, draws)], left)


def complete(search: Search, generation: int, candidates: Sequence[Candidate]) -> bool:
    """Ask what a smaller budget left out of the first generation, or of a pool's first merges;
    whether there was any.

    A search whose limits were raised has to beat the same rivals as one that had them at once.
    """
    left = budget.evaluations_left(search)
    if left and _complete_pool(search, generation, candidates, left):
        return True
    if not left or not generation == first_generation(candidates) == candidates[-1].generation:
        return False
    begun = [c for c in candidates if c.generation == generation]
    asked = [(c.operator, c.label) for c in begun if c.operator != INCUMBENT]
    whole = _rivals(search) if generation else _seeds(search)  # a branch's begins with rivals
    if asked != [(p.operator, p.label) for p in whole][: len(asked)] or asked[len(whole) - 1 :]:
        return False
    if not generation:
        whole = _population(search, left + len(begun))
    add(search, generation, whole[len(asked) :][:left], len(begun))
    return True


def _complete_pool(
    search: Search, generation: int, candidates: Sequence[Candidate], left: int
) -> bool:
    moves = openings(search.book.advice(role=STRUCTURE)) if search.space.pool else []
    if not moves or not moves[0].generation + 1 == generation == candidates[-1].generation:
        return False
    now = search.trials(generation, decided=False)
    space = now.leader
    history = search.history(moves[0].generation, space=space)
    whole = possible(search, space, first_points(space, history, search.recipe_of, now.chosen))
    begun = [c for c in candidates if c.generation == generation]
    if [(c.operator, c.vector) for c in begun] != [(p.operator, p.vector) for p in whole][
        : len(begun)
    ]:
        return False
    add(search, generation, affordable(whole[len(begun) :], left), len(begun))
    return len(begun) < len(whole)


def _again(search: Search, candidate: Candidate) -> Proposal | None:
    """A candidate of before as the merge that it is; None where its models are not here.

    Its vector may be another space's: here it has the point of its recipe, if there is one.
    """
    recipe = Recipe.parse(search.ledger.recipe(candidate.recipe_hash, search.run_id))
    if not set(recipe.models) <= set(search.identities):
        return None
    point = search.point_of(search.space, candidate.observation())
    if point and search.space.recipe(point).hash(search.identities) == candidate.recipe_hash:
        return Proposal(point, INCUMBENT)
    return Proposal(None, INCUMBENT, recipe.to_yaml())


def _proposal(
    point: tuple[float, ...] | None, recipe: Recipe, operator: str, label: str
) -> Proposal:
    return Proposal(point, operator, None if point else recipe.to_yaml(), label)
