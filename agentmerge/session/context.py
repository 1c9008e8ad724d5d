"""What graph nodes get as ``runtime.context``, and the open search that it stands for.

A context is JSON-plain, so that a LangGraph server can send it. The command line opens a search
itself and puts it at hand; anywhere else a search is opened on first use, from the ledger or from
a config, and held under its lease until it is done.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial, wraps
from pathlib import Path
from typing import Any

from agentmerge.config import SearchConfig
from agentmerge.errors import AgentmergeError, LeaseHeld, NotFound, RunFailed, UserError
from agentmerge.ledger import Ledger, RunRow
from agentmerge.preflight.anchoring import anchored
from agentmerge.preflight.plan import Prepared
from agentmerge.preflight.prepare import prepare
from agentmerge.search.search import Search
from agentmerge.search.state import WAITING
from agentmerge.session.branching import new_branch
from agentmerge.session.checkpoints import RUNS_DIR_VARIABLE
from agentmerge.session.clients import client_changes, client_config
from agentmerge.session.opening import new_run, opened_search, prepared_again, resource_faults

#: Seconds that a server's run waits at its end until its search is closed; that goes on after them.
_ENDING_S = 60.0

_OPEN: dict[str, Search] = {}
_HELD: dict[str, ExitStack] = {}
_LOCKS: dict[str, threading.Lock] = {}
#: Thread -> the run that a server has on it now.
_SERVED: dict[str, ServedRun] = {}
_opening = threading.Lock()


@dataclass(kw_only=True)
class ClientContext:
    """Which search a graph works on, as whoever sends JSON to a server may say it.

    run: id or name; by default the thread's id, which is the run's.
    config: YAML of a new search, for a thread that is none yet. name: what to call it.
    branch_of, at, overrides: instead of a config, another search (id or name), the generation to
        start from, and dotted settings to change.

    A client says what is searched (``CLIENT_KEYS``). Where it runs, who advises, which files are
    read as code and where results go is the server's own: ``$AGENTMERGE_SERVER_CONFIG`` names a
    YAML file with those sections, ``$AGENTMERGE_RUNS_DIR`` the folder.
    """

    run: str = ""
    config: str = ""
    name: str | None = None
    branch_of: str = ""
    at: int = 0
    overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return Path(os.environ.get(RUNS_DIR_VARIABLE) or "runs")

    def search_config(self) -> SearchConfig:
        """The config of a new search: a client's, with the rest from the server's own file.

        Raises:
            ConfigError: a fault in either.
            UserError: the client's sets what is the server's.
        """
        return client_config(self.config)

    def changes(self, parent: SearchConfig) -> dict[str, Any]:
        """The settings of a branch of a search.

        Raises:
            ConfigError: they are no legal config.
            UserError: one of them is the server's.
        """
        return client_changes(self.overrides, parent)


@dataclass(kw_only=True)
class Context(ClientContext):
    """The same from a program of one's own, which is trusted with every setting.

    runs_dir: where searches live, by default $AGENTMERGE_RUNS_DIR, else ``runs``.
    """

    runs_dir: str = ""

    @property
    def folder(self) -> Path:
        return Path(self.runs_dir) if self.runs_dir else super().folder

    def search_config(self) -> SearchConfig:
        return SearchConfig.from_text(self.config)

    def changes(self, parent: SearchConfig) -> dict[str, Any]:
        return self.overrides


def search_of(runtime: Any) -> Search:
    """The open search of a node's runtime.

    Raises:
        NotFound: no such run, and neither a config nor a run to branch from.
        LeaseHeld: another process, or another thread of this server, works on it.
        UserError: what it was begun with has changed since.
        RunFailed: the server's run that this node is of is over.
    """
    context = runtime.context or Context()
    key = _key(runtime)
    if not key:
        raise UserError("the graph was given neither a run in its context nor a thread")
    run = _served(runtime)
    with _opening:
        own = _LOCKS.setdefault(key, threading.Lock())
    with own:  # opening takes minutes, and no other search waits for it
        if run is not None:
            run.refuse_over()
        if key not in _OPEN:
            _hold(context, key, run)
            if run is not None:
                run.holds(_OPEN[key])
        elif run is not None:
            run.refuse_others(_OPEN[key])
        return _OPEN[key]


def _key(runtime: Any) -> str:
    return (runtime.context or Context()).run or _thread(runtime)


def _thread(runtime: Any) -> str:
    info = runtime.execution_info
    return (info.thread_id if info else None) or ""


def _served(runtime: Any) -> ServedRun | None:
    """The server's run that a node is of; None in a program of one's own.

    Raises:
        RunFailed: it is over.
    """
    run = _SERVED.get(_thread(runtime))
    if run is None and not isinstance(runtime.context or Context(), Context):
        raise RunFailed("this run is over; a new one on its thread goes on with the search")
    return run


class ServedRun:
    """One run of the graph on a server's thread. However it ends (done, failed, cancelled, its
    client gone, waiting for a person), lease, workers and memory of its search are given back.

    over: nothing more is begun once it is set.
    """

    def __init__(self) -> None:
        self._search: Search | None = None
        self._question = ""
        self._nodes = 0
        self.over = threading.Event()
        self._change = threading.Condition()

    @contextmanager
    def node(self) -> Iterator[None]:
        """What a node has begun is finished and saved before its search is closed."""
        from langgraph.errors import GraphInterrupt

        with self._change:
            self._nodes += 1
        try:
            yield
        except GraphInterrupt as asked:
            self._question = str(asked.args[0][0].value["question"])
            raise
        finally:
            with self._change:
                self._nodes -= 1
                self._change.notify_all()

    def refuse_over(self) -> None:
        if self.over.is_set():
            raise RunFailed("this run is over; a new one on its thread goes on with the search")

    def refuse_others(self, search: Search) -> None:
        if search is not self._search:
            raise LeaseHeld("another thread of this server works on this search; follow it there")

    def holds(self, search: Search) -> None:
        """It has opened this search, unless it was over before: opening takes minutes."""
        self._search = search
        if self.over.is_set():
            _interrupt(search)
            self.refuse_over()

    def give_back(self) -> None:
        """Wait for what its nodes have begun, and close its search, unless it is closed."""
        search = self._search
        if search is not None and search.run_id in _HELD:
            with self._change:
                self._change.wait_for(lambda: not self._nodes)
            _interrupt(search, self._question)


@asynccontextmanager
async def served_run(thread: str) -> AsyncIterator[None]:
    """A server runs the graph on this thread while the block runs."""
    run = _SERVED[thread] = ServedRun()
    try:
        yield
    finally:
        if _SERVED.get(thread) is run:
            del _SERVED[thread]
        run.over.set()
        await _apart(run.give_back)


async def _apart(function: Callable[[], None]) -> None:
    """Call it in a thread of its own: those of the event loop may be this run's own nodes, which
    wait for a worker. Whoever is cancelled meanwhile leaves it running."""
    loop = asyncio.get_running_loop()
    done = asyncio.Event()

    def call() -> None:
        function()
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(done.set)

    threading.Thread(target=call, name="give-back", daemon=True).start()
    with suppress(TimeoutError):
        await asyncio.wait_for(done.wait(), _ENDING_S)


def releasing(node: Callable[..., Any]) -> Callable[..., Any]:
    """A node that, where it fails, gives back lease, workers and memory of the search that
    ``search_of`` opened; whoever tries again opens it anew."""

    @wraps(node)
    def run(state: Any, runtime: Any) -> Any:
        from langgraph.errors import GraphBubbleUp

        served = _served(runtime)
        if served is not None:  # gives it back at its end, once its other nodes are done, too
            with served.node():
                return node(state, runtime)
        try:
            return node(state, runtime)
        except GraphBubbleUp:  # a question to a person, or a drain
            raise
        except Exception:
            search = _OPEN.get(_key(runtime))
            if search is not None and search.run_id in _HELD:
                _interrupt(search)
            raise

    return run


def _interrupt(search: Search, question: str = "") -> None:
    """Let go of a search that is not done; what made it stop is the one to tell of faults."""
    status = WAITING if question else "interrupted"
    with suppress(AgentmergeError):  # another process's search by now is its to tell of
        search.entering()
        search.ledger.update_run(search.run_id, status=status, stop_reason=question)
    with suppress(AgentmergeError):
        let_go(search)


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


def _hold(context: ClientContext, key: str, run: ServedRun | None) -> None:
    stopping = run.over.is_set if run else lambda: False
    with ExitStack() as stack:
        opening = opened_search(
            context.folder, partial(_run, context, key), drive=True, stopping=stopping
        )
        search, _, row = stack.enter_context(opening)
        search.ledger.update_run(row.id, status="running", stop_reason="")
        for name in {key, row.id, row.name}:
            _OPEN[name] = search
            stack.callback(_OPEN.pop, name, None)
        _HELD[row.id] = stack.pop_all()


def _run(context: ClientContext, key: str, ledger: Ledger) -> tuple[Prepared, RunRow]:
    """The run of this key, or a new one: as a branch, or from a config."""
    try:
        row = ledger.run(key)
    except NotFound:
        if context.branch_of:
            origin = ledger.run(context.branch_of)
            overrides = context.changes(SearchConfig.from_text(origin.config, origin.name))
            return new_branch(ledger, origin.id, context.at, context.name, overrides, run_id=key)
        if not context.config:
            raise
        config = anchored(context.search_config())
        prepared = prepare(config, fresh=True, known_faults=resource_faults(config))
        return new_run(ledger, prepared, context.name, run_id=key)
    prepared, changes = prepared_again(row, SearchConfig.from_text(row.config, row.name))
    if changes:
        raise UserError(f"{'; '.join(changes)} since {row.name!r} began; branch it")
    return prepared, row
