"""The items that a merge fails, with what was said to them, as this search's agents may read them.

Search items only, and those whose answers were kept when the merge was scored
(``evaluation.failing``); which of them a prompt shows is drawn from the run's seed.
"""

from __future__ import annotations

from dataclasses import replace

from agentmerge.agents.failing import counted, item_of, section
from agentmerge.agents.reading import FailingItem
from agentmerge.agents.view import HistoryView
from agentmerge.search.propose import rng_of
from agentmerge.search.search import Search


def reading(search: Search, view: HistoryView, generation: int) -> HistoryView:
    """The view with what the best candidate fails; as it was where no answer was kept."""
    best = view.released().best
    items = [] if best is None else failing_items(search, best.recipe_hash)
    if not items:
        return view
    rights = {
        (ref.task, ref.index): search.texts[ref.task][ref.key][1]
        for ref in search.taskset.refs("search")
        if ref.task in search.texts
    }
    drawn = rng_of(search)(generation, 0, "failing").permutation(len(items))
    shown = sorted(drawn[: search.config.agents.read_items])
    return replace(view, failing=section([items[i] for i in shown]), faults=counted(items, rights))


def failing_items(search: Search, recipe_hash: str) -> list[FailingItem]:
    """All of a merge's whose answers were kept, task by task in the order of the items."""
    results = search.item_results(recipe_hash)
    return [
        item_of(
            ref.task, ref.index, search.texts[ref.task][ref.key], row.answers, row.reasons,
            cut_off=row.cut_off, generated=bool(row.tokens),
        )
        for ref in search.taskset.refs("search")
        if (row := results.get(ref)) is not None and row.answers and ref.task in search.texts
    ]  # fmt: skip
