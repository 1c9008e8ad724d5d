"""The curator as a search asks it: once, when a pool is to be chosen from and each expert was asked
alone. What it is told is kept with the run, so that whoever goes on, or replays, asks the same.

Its subsets are only tried (``structure``): the rule of ``models`` has chosen what leads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentmerge.agents import curator
from agentmerge.agents.prompts import Message, prompt_hash
from agentmerge.agents.schemas import parse_reply
from agentmerge.contracts.operators import CURATOR, STRUCTURE
from agentmerge.errors import BudgetReached, ModelReplyError, ParentError, UserError
from agentmerge.ledger.words import openings, spoken
from agentmerge.parents.cards import card_text, cards_of
from agentmerge.parents.sources import Parent, find_parent
from agentmerge.recipe.names import short_name
from agentmerge.search.advise import Kept, view_of
from agentmerge.search.models import alone, surveyed
from agentmerge.search.search import Search
from agentmerge.system.redaction import redacted
from agentmerge.workers.kinds import reads_models

if TYPE_CHECKING:
    from agentmerge.merging.experts import ExpertSurvey

#: Part of a run's facts: what its curator was told of each expert.
FACTS = "experts"


def curate(search: Search, generation: int) -> str:
    """Ask the curator, where there is one and its time has come, and keep its word.

    Returns the limit that does not allow it, or "".
    """
    if not _due(search):
        return ""
    search.entering()
    messages, view = question(search, generation)
    search.ledger.update_run(search.run_id, facts=_known(search) | {FACTS: view.facts})
    parse = partial(parse_reply, reply=curator.CuratorReply)
    failure, said = "", None
    try:
        said = (
            search.models[CURATOR]
            .ask(
                messages,
                curator.schema(view.bounds),
                partial(parse, bounds=view.bounds),
                log=Kept(search, CURATOR, generation, prompt_hash(messages)),
                limit_s=search.seconds_left(),
                # Of a reply that names who is not there, or too many, the subsets that can be.
                rescue=partial(parse, bounds=replace(view.bounds, lenient=True)),
            )
            .parsed
        )
    except ModelReplyError as error:
        failure = str(error)
    except BudgetReached as reached:
        return reached.limit
    subsets = curator.subsets_of(said, view.bounds.names) if said else ()
    body = {
        "guidance": curator.guidance(said).to_json(),
        "failure": failure,
        "subsets": [asdict(subset) for subset in subsets],
    }
    search.book.save_advice(generation, CURATOR, body)
    search.emit(spoken({"generation": generation, "role": CURATOR} | body))
    return ""


def question(search: Search, generation: int) -> tuple[list[Message], curator.PoolView]:
    """What the curator is asked, and what it may know.

    Raises:
        UserError: there is no pool.
    """
    settings = search.space.genome.pool
    if settings is None:
        raise UserError("genome.pool is not set, so no curator is asked which experts to merge")
    shown = alone(search)  # who failed alone is nobody to merge
    facts = {n: f for n, f in _facts(search).items() if shown is None or n in shown}
    view = curator.PoolView(view_of(search, CURATOR, generation), facts, settings.most)
    return curator.messages(view, search.prompts), view


def _due(search: Search) -> bool:
    """Whether there is something to choose, and nothing was chosen or said of it."""
    book = search.book
    if CURATOR not in search.models or not search.config.curated:
        return False
    if book.advice(role=CURATOR) or openings(book.advice(role=STRUCTURE)):
        return False
    run, words = search.replies_of, search.ledger.advice
    if run and words(run, role=STRUCTURE) and not words(run, role=CURATOR):
        return False  # it was chosen before there were curators
    shown = alone(search)
    return shown is not None and len(shown.keys() & set(search.space.pool)) >= 2


def _known(search: Search) -> dict[str, Any]:
    return search.ledger.run(search.run_id).facts


def _facts(search: Search) -> Mapping[str, Mapping[str, Any]]:
    """Expert -> what its weights and its card show, as it was first found."""
    known: Mapping[str, Mapping[str, Any]] | None = _known(search).get(FACTS)
    if known is None:
        weights = _weights(search)
        pool = search.space.pool
        found = {name: weights.get(name, {}) | _card(search, name) for name in pool}
        known = redacted(found)
    return known


def _weights(search: Search) -> dict[str, dict[str, Any]]:
    shown = alone(search) or {}
    names = [name for name in search.space.pool if name in shown]
    found, named = surveyed(search, names) if len(names) > 1 else (None, {})
    return {} if found is None else weight_facts(found, named)


def weight_facts(found: ExpertSurvey, named: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Of each expert how long its task vector is, who is nearest, and what is damaged.

    named: what the survey calls an expert -> its name.
    """
    known: dict[str, dict[str, Any]] = {}
    for expert, cosines in zip(found.experts, found.cosines, strict=True):
        facts: dict[str, Any] = {"norm": expert.length, "damage": "; ".join(expert.damage)}
        near = [
            (cosine, short_name(named[other.model]))
            for other, cosine in zip(found.experts, cosines, strict=True)
            if cosine is not None and other is not expert
        ]
        if near:
            facts |= dict(zip(("cosine", "nearest"), max(near), strict=True))
        known[named[expert.model]] = facts
    return known


def _card(search: Search, name: str) -> dict[str, Any]:
    """What an expert's card says: of an adapter its own, else its model's."""
    parent = _parent(search, name)
    if parent is None:
        return {}
    said = cards_of(parent)
    return {
        "licence": said.licence,
        "languages": list(said.languages),
        "datasets": list(said.datasets),
        "from": list(said.base_models),
        "card": card_text(parent.adapter or parent.model, curator.MAX_CARD),
    }


def _parent(search: Search, name: str) -> Parent | None:
    if reads_models(search.config.worker.kind):
        try:
            return find_parent(name, allow_pickle=search.config.worker.allow_pickle)
        except ParentError:
            return None
    # A worker that reads no models has names only, some of which may be folders.
    return Parent(name, Path(name)) if Path(name).is_dir() else None
