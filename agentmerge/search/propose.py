"""The next generation: what the strategy asks, in which space, and the other arm beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from agentmerge.contracts.operators import ADVICE, SHADOW
from agentmerge.contracts.space import Space
from agentmerge.contracts.strategy import GRADIENT_COST, Proposal, RngFor, rng_factory
from agentmerge.errors import RecipeRejected
from agentmerge.ledger.words import guidance_of, said_of
from agentmerge.recipe import Recipe
from agentmerge.search import budget
from agentmerge.search.models import searched_whole
from agentmerge.search.past import charges
from agentmerge.search.search import Search
from agentmerge.search.trials import first_points
from agentmerge.search.window import horizon, within
from agentmerge.space.grouped import SearchSpace
from agentmerge.strategies.null_llm import STRATEGY as NULL_LLM

#: Gradients in a row that did not come (no memory, a worker lost) after which none is asked.
FRUITLESS_GRADIENTS = 2


def propose(search: Search, generation: int) -> int:
    """Let the strategy write the next generation; returns its number."""
    search.entering()
    candidates = search.book.candidates()
    if candidates[-1].generation > generation:
        return generation + 1  # this node ran before
    rows = _found(within(search, generation), generation)
    if not rows and not search.book.pending(generation):  # not before all that was asked is known
        if horizon(search, generation) < generation:
            rows = _found(search, generation)
        if not rows:
            search.exhausted.add(generation + 1)
    add(search, generation + 1, rows)
    return generation + 1


def _found(search: Search, generation: int) -> list[Proposal]:
    """What the next generation asks, by what this search knows."""
    left = budget.evaluations_left(search)
    own_share = max(1, round(left * (1 - search.config.search.shadow))) if left else 0
    mine: list[Proposal] = []
    now = search.trials(generation)
    # A pool whose choice is refused is not searched whole.
    nothing = search.space.pool and not now.chosen and not searched_whole(search)
    for space in () if nothing else now.turn:
        mine = mine or asked(search, space, generation, own_share)
    return [*mine, *_shadow(search, mine, left - sum(p.cost for p in mine))]


def asked(search: Search, space: SearchSpace, generation: int, left: int) -> list[Proposal]:
    """What the next generation asks in a space; the strategy thinks once about what it is told."""
    heard = len(search.book.advice(generation))
    key = (search.book.changes, heard, generation, space.key, left)
    if key not in search.proposals:
        found = _asked(search, space, generation, left)
        search.proposals.clear()
        search.proposals[key] = found
    return search.proposals[key]


def _asked(search: Search, space: SearchSpace, generation: int, left: int) -> list[Proposal]:
    history = search.history(generation, space=space)
    # What a branch knows of before is no rival: of a pool nothing else asks for them once more.
    own = any(o.space == space.key and not (space.pool and o.prior) for o in history)
    chosen = search.trials(generation).chosen
    found = [] if own else first_points(space, history, search.recipe_of, chosen)
    if not found:
        if getattr(search.strategy, "uses_items", False):
            bound = search.config.search.constraints
            known = search.book.candidates(up_to=generation) if bound else []
            history = search.item_table.of(history, search.floors(known))
        words = search.book.advice(generation)
        guidance = guidance_of(words)
        if space.key != (said_of(words) or search.space.key):
            guidance = replace(guidance, mean=None, candidates=(), forecasts=())
        count = min(population(search, space), left)
        found = search.strategy.propose(space, history, guidance, count, rng_of(search))
    return affordable(possible(search, space, found), left)


def population(search: Search, space: Space) -> int:
    own = search.strategy.population(space.dimensions)
    return search.config.generation_size(own)


def rng_of(search: Search) -> RngFor:
    return rng_factory(search.config.search.seed)


def possible(search: Search, space: SearchSpace, proposals: Sequence[Proposal]) -> list[Proposal]:
    """The same, in this space, asking for a score alone where no gradient can be had.

    What an agent asked for is asked as it is, so that it hears why it is no merge.
    """
    gradients = space.method.differentiable and search.gradients.possible and not _fruitless(search)
    return [
        replace(
            p,
            vector=space.made_legal(p.vector) if p.vector and p.operator != ADVICE else p.vector,
            space=space.key,
            want=p.want if gradients and p.vector else "score",
        )
        for p in proposals
    ]


def _fruitless(search: Search) -> bool:
    """Whether the last gradients that were asked never came: none is asked any more."""
    found = search.book.candidates()
    asked = [c for c in found if c.want == "gradient" and c.state == "scored" and not c.prior]
    last = asked[-FRUITLESS_GRADIENTS:]
    return len(last) == FRUITLESS_GRADIENTS and all(c.gradient is None for c in last)


def add(
    search: Search, generation: int, proposals: Sequence[Proposal], first_slot: int = 0
) -> None:
    rows: list[tuple[Proposal, str, str, str]] = []
    spaces = search.trials(generation)
    for proposal in proposals:
        failure = ""
        proposal = replace(proposal, space=proposal.space or search.space.key)
        try:
            if proposal.recipe is not None:
                recipe = Recipe.parse(proposal.recipe).at(search.space.dtype)
                recipe = recipe.canonical(search.space.num_layers)
            else:
                recipe = spaces.of(proposal.space).recipe(proposal.vector or ())
            text, recipe_hash = recipe.to_yaml(), recipe.hash(search.identities)
            search.check(recipe)
        except RecipeRejected as error:
            failure = str(error)
            text, recipe_hash = (
                proposal.recipe or "",
                f"refused-{generation}-{first_slot + len(rows)}",
            )
        rows.append((proposal, recipe_hash, text, failure))
    search.book.add_candidates(generation, rows, first_slot)


def affordable(proposals: Sequence[Proposal], left: int) -> list[Proposal]:
    """As many as the budget allows, in order; a gradient that it does not is asked as a score."""
    found: list[Proposal] = []
    for proposal in proposals:
        if proposal.want == "gradient" and left <= GRADIENT_COST:
            proposal = replace(proposal, want="score")
        left -= proposal.cost
        if left < 0:
            break
        found.append(proposal)
    return found


def _shadow(search: Search, asked: Sequence[Proposal], left: int) -> list[Proposal]:
    """The second arm's candidates beside what the first asks; left: what they may cost."""
    share = search.config.search.shadow
    if not share or not asked:
        return []
    candidates = search.book.candidates()
    mine, theirs = (sum(charges(candidates, shadow=shadow).values()) for shadow in (True, False))
    ahead = theirs + sum(proposal.cost for proposal in asked)
    due = int(share / (1 - share) * ahead - mine + 1e-9)
    history = search.history(shadow=True, space=search.space)
    found = NULL_LLM.propose(search.space, history, None, max(0, min(due, left)), rng_of(search))
    return [replace(proposal, operator=SHADOW) for proposal in found]
