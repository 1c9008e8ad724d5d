"""What graph nodes get as ``runtime.context``, and the open search that it stands for.

A context is JSON-plain, so that a LangGraph server can send it. The command line opens a search
itself and puts it at hand; anywhere else a search is opened on first use, from the ledger or from
a config, and held under its lease until it is done.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import yaml

from agentmerge.assembly import (
    CHECKPOINTS,
    LEDGER,
    assembled,
    begun,
    changed_facts,
    new_branch,
    new_row,
    resource_faults,
    silent,
    unseen,
)
from agentmerge.bounded import read_text
from agentmerge.check import Prepared, anchored, prepare
from agentmerge.checkpoints import RUNS_DIR_VARIABLE
from agentmerge.config import SearchConfig
from agentmerge.errors import AgentmergeError, ConfigError, NotFound, RunFailed, UserError
from agentmerge.lease import Lease
from agentmerge.ledger import Ledger, RunRow
from agentmerge.steps import Search
from agentmerge.yaml_text import read_yaml

#: The file with the sections of a search that are a server's own.
SERVER_CONFIG_VARIABLE = "AGENTMERGE_SERVER_CONFIG"
#: What a server's client may set, sections whole or key by key.
CLIENT_KEYS = (
    "genome", "tasks", "limit", "num_fewshot", "shuffle", "apply_chat_template",
    "fewshot_as_multiturn", "random_init", "search", "budget",
)  # fmt: skip
#: And what of these sections it may not: files that are read, code that is run, what tokens cost.
_SERVERS_OWN = frozenset({"search.graph", "search.init", "budget.prices"})

_OPEN: dict[str, Search] = {}
_HELD: dict[str, ExitStack] = {}
_LOCKS: dict[str, threading.Lock] = {}
#: Key of a search -> the server's run that failed on it last, and why.
_FAILED: dict[str, tuple[str, str]] = {}
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
        asked = _mapping(self.config, "the config")
        _refuse_foreign(_dotted(asked))
        own = _servers_own()
        budget = _tighter(own.get("budget") or {}, asked.get("budget") or {})
        search = (own.get("search") or {}) | (asked.get("search") or {})
        whole = own | asked | {"budget": budget, "search": search}
        return SearchConfig.from_text(yaml.safe_dump(whole), "the config")

    def changes(self) -> dict[str, Any]:
        """A branch's settings.

        Raises:
            UserError: one of them is the server's.
        """
        _refuse_foreign(self.overrides)
        return self.overrides


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

    def changes(self) -> dict[str, Any]:
        return self.overrides


def _mapping(text: str, source: str) -> dict[str, Any]:
    found = read_yaml(text, source, ConfigError).value
    if not isinstance(found, dict):
        raise ConfigError(f"{source} must be a mapping, not {type(found).__name__}")
    return found


def _servers_own() -> dict[str, Any]:
    path = os.environ.get(SERVER_CONFIG_VARIABLE)
    if not path:
        return {}
    missing = f"${SERVER_CONFIG_VARIABLE}: {path} is missing"
    return _mapping(read_text(path, ConfigError, missing=missing), path)


def _refuse_foreign(dotted: Iterable[str]) -> None:
    for key in dotted:
        section = str(key).partition(".")[0]
        if section not in CLIENT_KEYS or key in _SERVERS_OWN:
            raise UserError(
                f"{key} is the server's own to set, in the file that ${SERVER_CONFIG_VARIABLE} "
                f"names; a client may set {', '.join(CLIENT_KEYS)}"
            )


def _dotted(config: Mapping[str, Any]) -> Iterator[str]:
    for section, body in config.items():
        yield section
        if isinstance(body, dict):
            yield from (f"{section}.{key}" for key in body)


def _tighter(own: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """A client's budget within the server's: of two limits the lower one."""
    found = dict(own) | dict(asked)
    for key in own.keys() & asked.keys():
        if all(isinstance(b[key], (int, float)) for b in (own, asked)):
            found[key] = min(own[key], asked[key])
    return found


def search_of(runtime: Any) -> Search:
    """The open search of a node's runtime.

    Raises:
        NotFound: no such run, and neither a config nor a run to branch from.
        LeaseHeld: another process works on it.
        UserError: what it was begun with has changed since.
        RunFailed: this run has failed already, and its queued nodes open the search no more.
    """
    context = runtime.context or Context()
    key = _key(runtime)
    if not key:
        raise UserError("the graph was given neither a run in its context nor a thread")
    with _opening:
        own = _LOCKS.setdefault(key, threading.Lock())
    with own:  # opening takes minutes, and no other search waits for it
        if key not in _OPEN:
            run_id, why = _FAILED.get(key, ("", ""))
            if run_id and run_id == _run_id(runtime):
                raise RunFailed(f"this run has failed: {why}; a new one goes on with the search")
            _hold(context, key)
            _FAILED.pop(key, None)
        return _OPEN[key]


def _key(runtime: Any) -> str:
    info = runtime.execution_info
    return (runtime.context or Context()).run or (info.thread_id if info else None) or ""


def _run_id(runtime: Any) -> str:
    """The server's id of the invocation that a node is of; a node tried again is of a new one."""
    info = runtime.execution_info
    return str(info.run_id or "") if info and info.node_attempt == 1 else ""


def releasing(node: Callable[..., Any]) -> Callable[..., Any]:
    """A node that, where it fails, gives back lease, workers and memory of the search that
    ``search_of`` opened; whoever tries again opens it anew."""

    @wraps(node)
    def run(state: Any, runtime: Any) -> Any:
        from langgraph.errors import GraphBubbleUp

        try:
            return node(state, runtime)
        except GraphBubbleUp:  # a question to a person, or a drain
            raise
        except Exception as error:
            key = _key(runtime)
            search = _OPEN.get(key)
            if search is not None and search.run_id in _HELD:
                _FAILED[key] = (_run_id(runtime), str(error))
                with suppress(AgentmergeError):  # another process's search by now is its to tell of
                    search.still_mine()
                    search.ledger.update_run(search.run_id, status="interrupted")
                with suppress(AgentmergeError):  # the node's own error is the one to tell
                    let_go(search)
            raise

    return run


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


def _hold(context: ClientContext, key: str) -> None:
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


def _run(context: ClientContext, key: str, ledger: Ledger) -> tuple[Prepared, RunRow]:
    """The run of this key, or a new one: as a branch, or from a config."""
    try:
        row = ledger.run(key)
    except NotFound:
        if context.branch_of:
            return new_branch(
                ledger, context.branch_of, context.at, context.name, context.changes(), run_id=key
            )
        if not context.config:
            raise
        config = anchored(context.search_config())
        prepared = prepare(config, fresh=True, known_faults=resource_faults(config))
        prepared = unseen(ledger, prepared)
        row = new_row(ledger, prepared, context.name, run_id=key)
        row = ledger.add_run(row)
        return prepared, row
    config = SearchConfig.from_text(row.config, row.name)
    prepared = prepare(config, allow_benchmarks=True).without(row.facts.get("searched", ()))
    changes = changed_facts(row.facts, prepared.facts())
    if changes:
        raise UserError(f"{'; '.join(changes)} since {row.name!r} began; branch it")
    return prepared, row
