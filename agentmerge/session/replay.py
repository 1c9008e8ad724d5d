"""A whole search once more, offline: from its stored replies and results, with no model or worker.

It runs the real graph, strategy and agents on a copy of the ledger, so a replay that ends like the
search proves that nothing else went into it. With other prompts it says where it leaves the search.
Limits that were raised on the way are raised at the same point; a search that has not ended is
replayed as far as it went, and one that ran out of time stops where its time did.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from agentmerge.agents.models import AgentModel
from agentmerge.config import ROLES, SearchConfig
from agentmerge.contracts.operators import PROBE
from agentmerge.contracts.worker import EngineInfo, Fingerprint, Gradient, ItemRef, ItemResult, Loss
from agentmerge.errors import (
    CandidateFailed,
    NotBegun,
    ReplyMissing,
    UserError,
    WorkerLost,
)
from agentmerge.ledger import Ledger, RunRow
from agentmerge.ledger.folder import LEDGER, existing_runs
from agentmerge.preflight.facts import arithmetic
from agentmerge.preflight.graphs import load_graph
from agentmerge.preflight.plan import Prepared
from agentmerge.recipe import Recipe
from agentmerge.recipe.copying import layers_read
from agentmerge.report.summary import trace
from agentmerge.search.search import Search
from agentmerge.search.state import GRAPH_VERSION, SearchState
from agentmerge.session.context import Context, at_hand
from agentmerge.session.opening import TOOLS, opened_search, prepared_again, prompts_of
from agentmerge.system.temporary import temporary_folder

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Replay:
    """What came of it.

    identical: every candidate, every advice and the answer are the search's own.
    differs_from: the first generation that is another, None where none is.
    cause: what else was otherwise than in the search and may be why it differs, or "".
    stopped: why the replay could not go on, "" where it reached the end. One that is identical and
        stopped came as far as the search did, which has not ended.
    """

    run: str
    identical: bool
    generations: int
    candidates: int
    replies: int
    differs_from: int | None
    stopped: str
    cause: str = ""


def replay(
    name: str, *, runs_dir: Path | str = "runs", prompts: Path | str | None = None
) -> Replay:
    """Replay a search. prompts: a folder of prompts to replay it with, instead of its own.

    Raises:
        NotFound: no such run.
        UserError: the models' files or the tasks changed since, or the run was made by tools.
    """
    runs_dir = existing_runs(runs_dir)
    with temporary_folder("agentmerge-replay") as folder:
        with Ledger(runs_dir / LEDGER, read_only=True) as original:
            row = original.run(name)
            original.copy_to(folder / LEDGER)
        with opened_search(folder, partial(_again, row), advised=False) as (opened, prepared, _):
            search = _following(opened, prepared, row, prompts)
            stopped = ""
            try:
                _drive(search, folder)
            except ReplyMissing as missing:
                stopped = str(missing)
            found = _compared(search.ledger, row, search.ledger.run(search.run_id), stopped)
    return replace(found, cause="" if found.identical or prompts else _cause(row))


def _cause(row: RunRow) -> str:
    """Other last digits of the strategy's linear algebra end in other proposals."""
    then, now = row.facts.get("arithmetic"), arithmetic()
    if then is None or then == now:
        return ""
    key = "threads" if then["threads"] != now["threads"] else "kernels"
    remedy = f"; set OMP_NUM_THREADS={then['threads']}" if key == "threads" else ""
    shown = [", ".join(v) if isinstance(v, list) else v for v in (then[key], now[key])]
    return (
        f"its linear algebra had {shown[0]} {key} and has {shown[1]} here, which changes last "
        f"digits and so what is proposed{remedy}"
    )


#: A search's own prompts are in the ledger; their folder may be gone.
_OWN_PROMPTS: Mapping[str, Any] = {"agents.prompts": None}


def _again(row: RunRow, ledger: Ledger) -> tuple[Prepared, RunRow]:
    """The search under another id."""
    if row.algorithm == TOOLS:
        raise UserError(f"run {row.name!r} was made by tools: there is no search to replay")
    config = SearchConfig.from_text(row.config, row.name, _OWN_PROMPTS)
    prepared, changes = prepared_again(row, config)
    if changes:
        raise UserError(f"{'; '.join(changes)} since {row.name!r} began: it cannot be replayed")
    again = replace(row, id=str(uuid.uuid4()), name=f"{row.name}-replay", status="new", result=None)
    again = ledger.add_run(again)
    if row.parent_generation is not None:
        ledger.copy_past(row.id, again.id, row.parent_generation, prior=False)
    return prepared, again


def _following(
    search: Search, prepared: Prepared, row: RunRow, prompts: Path | str | None
) -> Search:
    """The search with what is stored in place of models and workers."""
    ledger = search.ledger
    configs = [
        (since, SearchConfig.from_text(row.config, row.name, {**_OWN_PROMPTS, **limits}))
        for since, limits in ledger.limits(row.id)
    ]
    asked = ledger.called_models(row.id)
    spoken = asked.keys() | ledger.prompts(row.id).keys()
    never_begun = {c.recipe_hash for c in ledger.candidates(row.id) if c.state == "open"}
    flat = {c.recipe_hash for c in ledger.candidates(row.id) if c.gradient is None}
    lost = row.card.lost
    followed = _Followed(ledger, search.run_id, row, configs, search.config)
    return replace(
        search,
        configured=lambda: followed.config,
        entering=followed.follow,
        seconds_left=followed.seconds_left,
        prompts=prompts_of(ledger, row, prompts),
        models={
            role: AgentModel(None, name=asked.get(role, ""))
            for role in ROLES
            # A model that was handed over is not in the config, and may not have been asked.
            if role in spoken or search.config.agents.settings_for(role).model != "none"
        },
        replies_of=row.id,
        pool=_StoredResults(search.pool, prepared, _failures(ledger, row), never_begun, flat, lost),
    )


@dataclass
class _Followed:
    """The search that another one repeats: under the limits of the time, and as far as it came.

    configs: with each set of limits, and the ledger's position from which on it held.
    config: the one that holds now.
    """

    ledger: Ledger
    run_id: str
    original: RunRow
    configs: Sequence[tuple[tuple[int, int], SearchConfig]]
    config: SearchConfig

    def seconds_left(self) -> float:
        """No time passes in a replay; but it runs out where it did."""
        return 0.0 if self.original.stop_reason == "timeout" and self._caught_up else math.inf

    def follow(self) -> None:
        candidates, words = self.ledger.position(self.run_id)
        for (since_candidates, since_words), config in self.configs:
            if candidates >= since_candidates and words >= since_words:
                self.config = config
        if self.original.status != "done" and self._caught_up:
            raise ReplyMissing(f"{self.original.name!r} has not gone further")

    @property
    def _caught_up(self) -> bool:
        """Whether all that the other search decided and scored is decided and scored here."""
        runs = (self.run_id, self.original.id)
        here, there = ((self.ledger.position(run), self.ledger.open_count(run)) for run in runs)
        return here == there


def _failures(ledger: Ledger, row: RunRow) -> dict[str, str]:
    """Recipe hash -> why it failed, on search items or in the end on sealed ones."""
    card = row.card
    sealed = {r.recipe_hash: r.sealed_failure for r in card.rows if r.sealed_failure is not None}
    failed = {c.recipe_hash: c.failure for c in ledger.candidates(row.id) if c.failure}
    return dict(card.fallen) | sealed | failed


def _drive(search: Search, folder: Path) -> None:
    graph = load_graph(search.config.search.graph).compile()
    begin = SearchState(run_id=search.run_id, graph_version=GRAPH_VERSION)
    limits: Any = {"recursion_limit": search.config.graph_steps}
    context = Context(run=search.run_id, runs_dir=str(folder))
    with at_hand(search):
        graph.invoke(begin, limits, context=context)


@dataclass(frozen=True)
class _StoredResults:
    """A pool that has no workers: what the ledger lacks was never asked, so nothing takes long.

    flat: merges whose gradient never came; a stack's is asked of a deeper one, which the ledger
    holds or not. lost: why the end could not ask any.
    """

    real: Any
    prepared: Prepared
    failures: Mapping[str, str]
    never_begun: Set[str]
    flat: Set[str]
    lost: str

    @property
    def info(self) -> EngineInfo:
        found: EngineInfo = self.real.info
        return found

    @property
    def differentiates(self) -> bool:
        return bool(self.real.differentiates)

    def submit(self, work: Callable[..., T], *arguments: Any) -> Future[T]:
        done: Future[T] = Future()
        done.set_result(work(*arguments))
        return done

    def wait(self, turns: Collection[Any], beside: Collection[Any] = ()) -> None:
        """All that was submitted has ended."""

    def evaluate(
        self,
        recipe: Recipe,
        refs: Sequence[ItemRef],
        wanted: Callable[[], bool] = lambda: True,
    ) -> tuple[Fingerprint, list[ItemResult], float]:
        raise self._unknown(recipe)

    def gradient(
        self,
        recipe: Recipe,
        refs: Sequence[ItemRef],
        loss: Loss,
        weights: Sequence[float],
        wanted: Callable[[], bool] = lambda: True,
    ) -> tuple[Gradient, float]:
        found = self._unknown(recipe)
        stack = len(layers_read(recipe)) != self.prepared.space.num_layers
        flat = stack or recipe.hash(self.prepared.identities) in self.flat
        if isinstance(found, ReplyMissing) and flat:
            raise CandidateFailed("its gradient never came")
        raise found

    def _unknown(self, recipe: Recipe) -> Exception:
        recipe_hash = recipe.hash(self.prepared.identities)
        if recipe_hash in self.never_begun:
            return NotBegun("nor was it in the search that this one follows")
        known = self.failures.get(recipe_hash)
        if (known and known != self.lost) or not self.lost:
            unknown = ReplyMissing("a merge was not scored before")
            return CandidateFailed(known) if known else unknown
        return WorkerLost(self.lost)


def _compared(ledger: Ledger, row: RunRow, again: RunRow, stopped: str) -> Replay:
    old, new = trace(ledger, row), trace(ledger, again)
    by_old, by_new = _by_generation(old), _by_generation(new)
    known = [g for g in sorted(by_old.keys() | by_new.keys()) if by_old.get(g) != by_new.get(g)]
    differs = known[0] if known else None
    if differs is None and old["result"] != new["result"]:
        differs = max(by_old, default=0)
    return Replay(
        run=row.name,
        identical=differs is None,
        generations=1 + max((c["at"][0] for c in new["candidates"]), default=-1),
        candidates=len(new["candidates"]),
        replies=ledger.call_totals(row.id)["calls"],
        differs_from=differs,
        stopped=stopped,
    )


def _by_generation(found: Mapping[str, Any]) -> dict[int, list[Any]]:
    """What decided each generation and what came of it.

    What the agents said and tried after a generation belongs to the next one.
    """
    rows: dict[int, list[Any]] = {}
    for candidate in found["candidates"]:
        turn = candidate["at"][0] + (candidate["operator"] == PROBE)
        rows.setdefault(turn, []).append(candidate)
    for word in found["advice"]:
        rows.setdefault(word["generation"] + 1, []).append(word)
    return rows
