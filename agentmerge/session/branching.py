"""A search that begins with the past of another one, at any of its generations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from agentmerge.config import Role, SearchConfig
from agentmerge.contracts.operators import CURATOR, STRUCTURE
from agentmerge.contracts.worker import ItemRef, ItemResult
from agentmerge.errors import AgentmergeError, NotFound
from agentmerge.ledger import Ledger, ResultKey, RunRow
from agentmerge.preflight.facts import answers
from agentmerge.preflight.plan import Prepared
from agentmerge.preflight.prepare import prepare
from agentmerge.session.opening import new_row, resource_faults


def new_branch(
    ledger: Ledger,
    source: str,
    at: int,
    name: str | None,
    overrides: Mapping[str, Any],
    models: Mapping[Role, Any] | None = None,
    run_id: str | None = None,
) -> tuple[Prepared, RunRow]:
    """A run with the past of another one, written to the ledger.

    Where an override changes what is asked (tasks, limit, engine; lengths, where nobody kept them),
    the past is knowledge only: its
    items' results, and a score where those are all that the present items need ("rescored").
    Where it changes the agents or their prompts, they are asked about generation ``at`` anew.

    Raises:
        NotFound: no such run or generation, naming those that exist.
    """
    parent = ledger.run(source)
    past = ledger.candidates(parent.id)
    open_ones = {c.generation for c in past if c.state == "open"}
    whole = sorted({c.generation for c in past} - open_ones)
    if at not in whole:
        known = f"{whole[0]} to {whole[-1]}" if whole else "none"
        raise NotFound(f"run {parent.name!r} has no finished generation {at}; it has {known}")
    seed = {"search.seed": parent.seed}
    config = SearchConfig.from_text(parent.config, parent.name, seed | dict(overrides))
    faults = resource_faults(config, models)
    prepared = replace(
        prepare(config, allow_benchmarks=True, known_faults=faults),
        warnings=tuple(parent.facts.get("warnings", ())),
    )
    prepared = prepared.without(ledger.searched_before([parent.id]))
    row = new_row(ledger, prepared, name or f"{parent.name}-b{at}", (parent.id, at), run_id)
    before = SearchConfig.from_text(parent.config, parent.name)
    uncounted = config.search.counted and any(
        c.score is not None and c.tokens is None and not c.prior for c in past if c.generation <= at
    )
    prior = uncounted or answers(row.facts, config) != answers(parent.facts, before)
    old = {c.recipe_hash for c in past if c.generation <= at and (prior or c.prior)}
    if rescored := [recipe for recipe in sorted(old) if _scored(ledger, prepared, recipe)]:
        row = replace(row, facts=row.facts | {"rescored": rescored})
    row = ledger.add_run(row)
    # Under another genome or other scores no trial of a search space holds, nor what was expected
    # of one: they are left behind.
    without = (STRUCTURE, CURATOR) if prior or config.genome != before.genome else ()
    # Other agents speak of the generation that they take over, instead of the words it had; in
    # another space no advice of before means anything.
    others = models or config.agents != before.agents or _new_prompts(ledger, parent.id, config)
    words_up_to = at - 1 if others else at
    if config.genome != before.genome:
        words_up_to = -1
    old_space = replace(
        prepared.space, genome=before.genome, num_layers=parent.facts["num_layers"]
    ).key
    ledger.copy_past(
        parent.id,
        row.id,
        at,
        prior=prior,
        without=without,
        words_up_to=words_up_to,
        space=old_space,
    )
    return prepared, row


def _scored(ledger: Ledger, prepared: Prepared, recipe_hash: str) -> bool:
    """Whether the ledger holds what the present search items need for a score."""
    results: dict[ItemRef, ItemResult] = {}
    for task in prepared.taskset.tasks:
        stored = ledger.results(ResultKey(recipe_hash, prepared.engine, task.protocol_hash))
        results |= {ref: stored[ref.key] for ref in task.part("search") if ref.key in stored}
    if len(results) < len(set(prepared.taskset.refs())):
        return False
    try:
        prepared.taskset.score(results)
    except AgentmergeError:  # a metric that is not finite
        return False
    return True


def _new_prompts(ledger: Ledger, run_id: str, config: SearchConfig) -> bool:
    """Whether a run's models were told otherwise than the prompts are now."""
    from agentmerge.agents.prompts import load_prompts

    now = load_prompts(config.agents.prompts)
    return any(getattr(now, role).text != text for role, text in ledger.prompts(run_id).items())
