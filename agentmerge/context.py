"""What graph nodes get as ``runtime.context``, and the open search that it stands for.

A context is JSON-plain, so that a LangGraph server can send it. The command line opens a search
itself and puts it at hand; anywhere else a search is opened on first use, from the ledger or from
a config, and held under its lease until it is done.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agentmerge.assembly import (
    CHECKPOINTS,
    LEDGER,
    assembled,
    begun,
    changed_facts,
    check_resources,
    new_branch,
    new_row,
    silent,
)
from agentmerge.check import Prepared, anchored, prepare
from agentmerge.checkpoints import RUNS_DIR_VARIABLE
from agentmerge.config import SearchConfig
from agentmerge.errors import NotFound, UserError
from agentmerge.lease import Lease
from agentmerge.ledger import Ledger, RunRow
from agentmerge.steps import Search

_OPEN: dict[str, Search] = {}
_HELD: dict[str, ExitStack] = {}
_opening = threading.Lock()


@dataclass(kw_only=True)
class Context:
    """Which search a graph works on.

    run: id or name; by default the thread's id, which is the run's. runs_dir: where searches live,
        by default $AGENTMERGE_RUNS_DIR, else ``runs``.
    config: YAML of a new search, for a thread that is none yet. name: what to call it.
    branch_of, at, overrides: instead of a config, another search (id or name), the generation to
        start from, and dotted settings to change.
    """

    run: str = ""
    runs_dir: str = ""
    config: str = ""
    name: str | None = None
    branch_of: str = ""
    at: int = 0
    overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return Path(self.runs_dir or os.environ.get(RUNS_DIR_VARIABLE) or "runs")


def search_of(runtime: Any) -> Search:
    """The open search of a node's runtime.

    Raises:
        NotFound: no such run, and neither a config nor a run to branch from.
        LeaseHeld: another process works on it.
        UserError: what it was begun with has changed since.
    """
    context = runtime.context or Context()
    info = runtime.execution_info
    key = context.run or (info.thread_id if info else None)
    if not key:
        raise UserError("the graph was given neither a run in its context nor a thread")
    with _opening:
        if key not in _OPEN:
            _hold(context, key)
        return _OPEN[key]


def let_go(search: Search) -> None:
    """Close a search that ``search_of`` opened; one that was put at hand is another's to close."""
    with _opening:
        stack = _HELD.pop(search.run_id, None)
    if stack is not None:
        stack.close()


@contextmanager
def at_hand(search: Search) -> Iterator[None]:
    """Nodes of a graph find this search under its id, instead of opening it anew."""
    _OPEN[search.run_id] = search
    try:
        yield
    finally:
        _OPEN.pop(search.run_id, None)


def _hold(context: Context, key: str) -> None:
    with ExitStack() as stack:
        ledger = stack.enter_context(Ledger(context.folder / LEDGER))
        prepared, row = _run(context, key, ledger)
        checkpoints = context.folder / CHECKPOINTS
        lease = stack.enter_context(Lease.acquire(checkpoints, row.id, name=row.name))
        tell = stack.enter_context(begun(ledger, row, prepared, context.folder, silent))
        search = assembled(prepared, row, context.folder, ledger, tell, stack)
        search.still_mine = lease.check
        ledger.update_run(row.id, status="running", stop_reason="")
        for name in {key, row.id, row.name}:
            _OPEN[name] = search
            stack.callback(_OPEN.pop, name, None)
        _HELD[row.id] = stack.pop_all()


def _run(context: Context, key: str, ledger: Ledger) -> tuple[Prepared, RunRow]:
    """The run of this key, or a new one: as a branch, or from a config."""
    try:
        row = ledger.run(key)
    except NotFound:
        if context.branch_of:
            return new_branch(
                ledger, context.branch_of, context.at, context.name, context.overrides, run_id=key
            )
        if not context.config:
            raise
        prepared = prepare(anchored(SearchConfig.from_text(context.config)), fresh=True)
        check_resources(prepared.config)
        row = new_row(ledger, prepared, context.name, run_id=key)
        ledger.add_run(row)
        return prepared, row
    prepared = prepare(SearchConfig.from_text(row.config, row.name), allow_benchmarks=True)
    changes = changed_facts(row.facts, prepared.facts())
    if changes:
        raise UserError(f"{'; '.join(changes)} since {row.name!r} began; branch it")
    return prepared, row
