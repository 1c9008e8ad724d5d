"""A search from outside: start, resume, branch, evaluate; the run directory and the drain.

``runs/NAME/`` holds the config as resolved, best.yml and the log; all searches share
``runs/checkpoints.sqlite`` (LangGraph, thread id = run id) and ``runs/agentmerge.sqlite`` (the
ledger). Knows how a search is put together; what it does is ``steps.py``.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sqlite3
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from agentmerge import plugins
from agentmerge.check import Prepared, anchored, prepare
from agentmerge.config import Role, SearchConfig
from agentmerge.errors import CandidateFailed, NotBegun, NotFound, RunFailed, UserError
from agentmerge.ledger import Ledger, RunRow
from agentmerge.recipe import Recipe
from agentmerge.state import GRAPH_VERSION, SearchState
from agentmerge.steps import Emit, Scoring, Search

LEDGER = "agentmerge.sqlite"
CHECKPOINTS = "checkpoints.sqlite"

#: Options that ``resume`` may raise; anything else is another search: ``branch``.
RESUMABLE = (
    "budget.max_evaluations",
    "budget.max_items",
    "budget.timeout_s",
    "budget.max_tokens",
    "budget.max_cost_usd",
    "search.max_generations",
)

_OPEN: dict[str, Search] = {}


@dataclass(kw_only=True)
class Context:
    """What graph nodes get as ``runtime.context``: JSON-plain, so that a server can send it.

    run: id or name. runs_dir: where searches live. The search itself is opened on first use from
    the run's own settings, unless this process has it open already.
    """

    run: str
    runs_dir: str = "runs"

    @property
    def search(self) -> Search:
        if self.run not in _OPEN:
            ledger = Ledger(Path(self.runs_dir) / LEDGER)
            row = ledger.run(self.run)
            config = SearchConfig.from_text(row.config, row.name)
            prepared = prepare(config, allow_benchmarks=True)
            stack = ExitStack()  # closed with the process: a server keeps its searches open
            _OPEN[self.run] = assembled(prepared, row, Path(self.runs_dir), ledger, _silent, stack)
        return _OPEN[self.run]


class Drain:
    """How a running search is asked to stop: the first request lets running work finish."""

    def __init__(self) -> None:
        from langgraph.runtime import RunControl

        self.control = RunControl()

    def request(self) -> None:
        self.control.request_drain("interrupted")

    @property
    def requested(self) -> bool:
        return self.control.drain_requested


def run(
    config: SearchConfig,
    *,
    name: str | None = None,
    runs_dir: Path | str = "runs",
    emit: Emit | None = None,
    drain: Drain | None = None,
    allow_benchmarks: bool = False,
    models: Mapping[Role, Any] | None = None,
) -> RunRow:
    """Start a search and drive it until it is done or drained.

    models: ready chat models by role, instead of what the config names.

    Raises:
        ConfigError: every fault in the config, models and tasks.
        RunFailed: the search cannot go on; what was scored is saved.
    """
    config = anchored(config)
    if Path(runs_dir).exists() and not Path(runs_dir).is_dir():
        raise UserError(f"--runs-dir {runs_dir} is a file; name a folder")
    prepared = prepare(config, allow_benchmarks=allow_benchmarks, fresh=True)
    check_resources(config, models)
    runs_dir = Path(runs_dir)
    with Ledger(runs_dir / LEDGER) as ledger:
        row = new_row(ledger, prepared, name)
        ledger.add_run(row)
        return _drive(prepared, row, runs_dir, ledger, emit, drain, models)


def resume(
    name: str,
    *,
    runs_dir: Path | str = "runs",
    overrides: Mapping[str, Any] | None = None,
    emit: Emit | None = None,
    drain: Drain | None = None,
    models: Mapping[Role, Any] | None = None,
) -> RunRow:
    """Go on with a search where it stopped; ``overrides`` may raise limits (RESUMABLE).

    Raises:
        UserError: a parent, a task or the items changed since.
        RunFailed: the saved state cannot be continued.
    """
    runs_dir = existing_runs(runs_dir)
    with Ledger(runs_dir / LEDGER) as ledger:
        row = ledger.run(name)
        foreign = sorted(set(overrides or {}) - set(RESUMABLE))
        if foreign:
            raise UserError(
                f"{foreign[0]} cannot change on resume; `agentmerge branch {row.name}` starts a "
                "search with other settings from any generation"
            )
        config = SearchConfig.from_text(row.config, row.name, overrides)
        prepared = prepare(config, allow_benchmarks=True)
        changes = changed_facts(row.facts, prepared.facts())
        if changes:
            raise UserError(
                f"{'; '.join(changes)} since {row.name!r} began: old and new scores cannot be "
                f"compared; put it back, or `agentmerge branch {row.name}` to score the best again"
            )
        return _drive(prepared, row, runs_dir, ledger, emit, drain, models)


def branch(
    source: str,
    *,
    at: int,
    name: str | None = None,
    runs_dir: Path | str = "runs",
    overrides: Mapping[str, Any] | None = None,
    emit: Emit | None = None,
    drain: Drain | None = None,
    models: Mapping[Role, Any] | None = None,
) -> RunRow:
    """Start a new search from generation ``at`` of another, which is left untouched.

    The shared past is copied within the ledger. Where an override changes what is asked (tasks,
    limit, engine), old scores stay as knowledge for the strategy and the best is scored again.

    Raises:
        NotFound: no such run or generation, naming those that exist.
    """
    runs_dir = existing_runs(runs_dir)
    with Ledger(runs_dir / LEDGER) as ledger:
        parent = ledger.run(source)
        past = ledger.candidates(parent.id)
        whole = sorted({c.generation for c in past} - {c.generation for c in past if _open(c)})
        if at not in whole:
            known = f"{whole[0]} to {whole[-1]}" if whole else "none"
            raise NotFound(f"run {parent.name!r} has no finished generation {at}; it has {known}")
        seed = {"search.seed": parent.seed}
        config = SearchConfig.from_text(parent.config, parent.name, seed | dict(overrides or {}))
        prepared = prepare(config, allow_benchmarks=True)
        check_resources(config, models)
        row = new_row(ledger, prepared, name or f"{parent.name}-b{at}", (parent.id, at))
        ledger.add_run(row)
        before = SearchConfig.from_text(parent.config, parent.name)
        prior = _answers(row.facts, config) != _answers(parent.facts, before)
        ledger.copy_past(parent.id, row.id, at, prior=prior)
        return _drive(prepared, row, runs_dir, ledger, emit, drain, models)


def evaluate(
    recipe: Recipe, config: SearchConfig, *, runs_dir: Path | str = "runs"
) -> dict[str, Any]:
    """Score any recipe under a config's tasks: {score, tasks, recipe_hash, reused, items}.

    Raises:
        ConfigError: its models cannot be merged with the config's.
        CandidateFailed: it cannot be merged or scored.
    """
    prepared = prepare(
        _under_its_tokenizer(config, recipe), allow_benchmarks=True, also=recipe.models
    )
    canonical = recipe.canonical(prepared.space.num_layers)
    prepared.check(canonical)
    recipe_hash = canonical.hash(prepared.identities)
    with Ledger(Path(runs_dir) / LEDGER) as ledger, ExitStack() as stack:
        scoring = Scoring(ledger, prepared.taskset, _pool(prepared, stack))
        answers = scoring.ask(canonical, recipe_hash)
        scoring.save(answers)
        score = prepared.taskset.score(answers.results)
    return {
        "score": score.value,
        "tasks": dict(score.tasks),
        "recipe_hash": recipe_hash,
        "reused": not answers.paid,
        "items": len(answers.results),
    }


def _under_its_tokenizer(config: SearchConfig, recipe: Recipe) -> SearchConfig:
    """The config with the recipe's ``tokenizer_source``, by which parents are aligned."""
    asked, source = recipe.tokenizer_source, config.genome.tokenizer_source
    if asked in (None, source):
        return config
    if source is not None:
        raise UserError(
            f"the recipe's tokenizer_source is {asked!r}, and the config's {source!r}; change one"
        )
    genome = config.genome.model_copy(update={"tokenizer_source": asked})
    return config.model_copy(update={"genome": genome})


def existing_runs(runs_dir: Path | str) -> Path:
    """The runs directory.

    Raises:
        NotFound: nothing has run there.
    """
    path = Path(runs_dir)
    if not (path / LEDGER).is_file():
        raise NotFound(f"no runs in {path}; `agentmerge run CONFIG` or --runs-dir DIR")
    return path


def changed_facts(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What changed since a search began, one phrase each."""
    found = []
    for model, fingerprint in old["identities"].items():
        if new["identities"].get(model) != fingerprint:
            found.append(f"the weights of {model!r} changed")
    for task, protocol in old["protocols"].items():
        if new["protocols"].get(task) != protocol:
            found.append(f"the definition of task {task!r} changed")
        elif new["items"].get(task) != old["items"].get(task):
            found.append(f"the items of task {task!r} changed")
    if new["dtype"] != old["dtype"]:
        found.append(f"the dtype changed from {old['dtype']} to {new['dtype']}")
    for key, value in old["engine"].items():
        if new["engine"].get(key) != value:
            found.append(f"the engine's {key} changed from {value} to {new['engine'].get(key)}")
    return found


def settings_hash(prepared: Prepared) -> str:
    """What decides a search's course, for comparing and for time estimates."""
    config = prepared.config
    body = {
        "genome": config.genome.model_dump(mode="json"),
        "tasks": config.tasks.model_dump(mode="json"),
        "worker": config.worker.model_dump(mode="json"),
        "facts": prepared.facts(),
    }
    return sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]


def _drive(
    prepared: Prepared,
    row: RunRow,
    runs_dir: Path,
    ledger: Ledger,
    emit: Emit | None,
    drain: Drain | None,
    models: Mapping[Role, Any] | None,
) -> RunRow:
    from langgraph.errors import GraphDrained

    from agentmerge.checkpoints import open_saver
    from agentmerge.lease import Lease

    drain = drain or Drain()
    with ExitStack() as stack, readable(runs_dir / CHECKPOINTS, row.name):
        lease = stack.enter_context(Lease.acquire(runs_dir / CHECKPOINTS, row.id, name=row.name))
        saver = stack.enter_context(open_saver(runs_dir / CHECKPOINTS))
        _write_run_dir(runs_dir / row.name, prepared.config)
        ledger.update_run(row.id, config=prepared.config.to_yaml())
        for task in prepared.taskset.tasks:
            ledger.save_items(row.id, task.name, "search", task.part("search"))
            ledger.save_items(row.id, task.name, "sealed", task.part("sealed"))
        log = stack.enter_context((runs_dir / row.name / "log.jsonl").open("a"))
        tell = _telling(emit or _silent, log)
        search = assembled(prepared, row, runs_dir, ledger, tell, stack, models)
        for role in search.models:
            ledger.save_prompt(row.id, role, getattr(search.prompts, role).text)
        search.stopping = lambda: drain.requested
        search.still_mine = lease.check
        advisers = sorted({model.name for model in search.models.values()})
        search.emit(
            {
                "event": "start",
                "run": row.name,
                "status": row.status,
                "advisers": advisers,
                "memory": prepared.memory.compromise if prepared.memory else "",
            }
        )
        graph = load_graph(prepared.config.search.graph).compile(checkpointer=saver)
        budget = prepared.config.budget.max_evaluations
        thread: Any = {
            "configurable": {"thread_id": row.id},
            "max_concurrency": max(64, budget),
            "recursion_limit": prepared.config.graph_steps,
        }
        begin = _first_input(graph, thread, row, prepared)
        stack.enter_context(at_hand(search))
        ledger.update_run(row.id, status="running", stop_reason="")
        context = Context(run=row.id, runs_dir=str(runs_dir))
        try:
            graph.invoke(begin, thread, context=context, durability="sync", control=drain.control)
        except (GraphDrained, NotBegun):
            pass  # told to stop: the last step is saved, or was not begun
        except BaseException:
            ledger.update_run(row.id, status="interrupted")
            raise
        snapshot = graph.get_state(thread)
        if snapshot.values.get("status") != "done":
            if not drain.requested:
                ledger.update_run(row.id, status="failed", stop_reason="ended without finishing")
                raise RunFailed(f"search {row.name!r} ended without finishing; see its log.jsonl")
            ledger.update_run(row.id, status="interrupted")
    return ledger.run(row.id)


@contextmanager
def at_hand(search: Search) -> Iterator[None]:
    """Nodes of a graph find this search under its id, instead of opening it anew."""
    _OPEN[search.run_id] = search
    try:
        yield
    finally:
        _OPEN.pop(search.run_id, None)


@contextmanager
def readable(checkpoints: Path, name: str) -> Iterator[None]:
    """A checkpoint file that fails as a sentence: the ledger still holds the whole search."""
    try:
        yield
    except sqlite3.Error as error:
        raise RunFailed(
            f"{checkpoints} cannot be used: {error}; free the disk or end the other writer (or, if "
            f"it is damaged, delete it: no result is in it), then agentmerge resume {name}"
        ) from error


def _first_input(graph: Any, thread: Any, row: RunRow, prepared: Prepared) -> Any:
    """What to invoke with: a first state, None to go on, or None after reopening a done search."""
    snapshot = graph.get_state(thread)
    values = snapshot.values
    if not values:
        return SearchState(run_id=row.id, graph_version=GRAPH_VERSION)
    if values.get("graph_version", GRAPH_VERSION) != GRAPH_VERSION:
        raise RunFailed(
            f"search {row.name!r} was saved by graph version {values.get('graph_version')}, and "
            f"this is version {GRAPH_VERSION}; `agentmerge branch {row.name}` goes on from its "
            "ledger"
        )
    if snapshot.next:
        return None
    if values.get("status") != "done":
        raise RunFailed(
            f"search {row.name!r} has no next step and is not done: its checkpoints do not fit "
            f"this graph; `agentmerge branch {row.name}` goes on from its ledger"
        )
    # Done, and asked to go on: back to `select`, which sees the limits as they are now.
    graph.update_state(thread, {"status": "running", "stop_reason": ""}, as_node="evaluate")
    return None


def assembled(
    prepared: Prepared,
    row: RunRow,
    runs_dir: Path,
    ledger: Ledger,
    emit: Emit,
    stack: ExitStack,
    models: Mapping[Role, Any] | None = None,
    *,
    advised: bool = True,
) -> Search:
    """A search with its doors open, that nobody drives yet; ``stack`` closes them.

    advised: with the models of the config.
    """
    from agentmerge.agents.prompts import load_prompts

    config = prepared.config
    timeout = config.budget.timeout_s
    pool = _pool(prepared, stack)
    search = Search(
        config=config,
        run_id=row.id,
        run_dir=runs_dir / row.name,
        settings_hash=row.settings_hash,
        ledger=ledger,
        space=prepared.space,
        taskset=prepared.taskset,
        pool=pool,
        strategy=_strategy(config),
        identities=prepared.identities,
        check=prepared.check,
        paths=prepared.paths,
        models=_models(config, models) if advised else {},
        prompts=load_prompts(config.agents.prompts),
        emit=emit,
        deadline=None if timeout is None else time.monotonic() + timeout,
    )
    return search


def _pool(prepared: Prepared, stack: ExitStack) -> Any:
    from agentmerge.workers.pool import Pool

    pool = Pool(prepared.spec, count=prepared.config.worker.count, taskset=prepared.taskset)
    stack.callback(pool.close)
    return pool


def _strategy(config: SearchConfig) -> Any:
    strategy = plugins.load("agentmerge.strategies", config.algorithm)
    if config.algorithm == "cma_es":
        return type(strategy)(config.search.sigma0)
    return strategy


def _models(config: SearchConfig, ready: Mapping[Role, Any] | None) -> dict[Role, Any]:
    from agentmerge.agents.roles import models_for

    return dict(models_for(config, ready or {}))


def check_resources(config: SearchConfig, ready: Mapping[Role, Any] | None = None) -> None:
    """Models, prompts and graph exist: found out before a run is written down."""
    from agentmerge.agents.prompts import load_prompts

    _models(config, ready)
    load_prompts(config.agents.prompts)
    load_graph(config.search.graph)


def load_graph(name: str) -> Any:
    """The uncompiled graph: ``search``, another file in graphs/, or ``path.py:build``.

    Raises:
        UserError: no such file or function.
    """
    path_text, _, function = name.partition(":")
    path = Path(path_text) if path_text.endswith(".py") else graphs_dir() / f"{path_text}.py"
    if not path.is_file():
        raise UserError(f"no graph at {path}; give a name from graphs/ or path.py:build")
    spec = importlib.util.spec_from_file_location(f"agentmerge_graph_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} cannot be loaded as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # annotations of nodes are looked up there
    spec.loader.exec_module(module)
    build: Callable[[], Any] | None = getattr(module, function or "build", None)
    if build is None:
        raise UserError(f"{path} has no function {function or 'build'!r}")
    return build()


def graphs_dir() -> Path:
    """Our own graphs: in the wheel beside this package's code, in a checkout at its root."""
    package = Path(__file__).parent
    bundled = package / "_bundled" / "graphs"
    return bundled if bundled.is_dir() else package.parent / "graphs"


def new_row(
    ledger: Ledger,
    prepared: Prepared,
    name: str | None,
    parent: tuple[str, int] | None = None,
) -> RunRow:
    """A run that is not in the ledger yet.

    Raises:
        UserError: the name is taken, or is none.
    """
    config = prepared.config
    taken = {row.name for row in ledger.runs()}
    if name is not None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,80}", name):
            raise UserError(f"run name {name!r} may hold letters, digits, '.', '_' and '-' only")
        if name in taken:
            raise UserError(
                f"a run called {name!r} exists; `agentmerge resume {name}`, or choose another name"
            )
    else:
        name = next(f"run-{n}" for n in range(1, len(taken) + 2) if f"run-{n}" not in taken)
    run_id = str(uuid.uuid4())
    return RunRow(
        id=run_id,
        name=name,
        created=time.time(),
        status="new",
        stop_reason="",
        config=config.to_yaml(),
        settings_hash=settings_hash(prepared),
        seed=config.search.seed,
        algorithm=config.algorithm,
        parent_run=parent[0] if parent else None,
        parent_generation=parent[1] if parent else None,
        facts=prepared.facts(),
        result=None,
    )


def _write_run_dir(path: Path, config: SearchConfig) -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.yml").write_text(config.to_yaml())


def _answers(prepared_facts: Mapping[str, Any], config: SearchConfig) -> Any:
    """What decides a candidate's score: where it differs, old scores cannot be compared."""
    kept = {key: prepared_facts[key] for key in ("identities", "protocols", "dtype", "engine")}
    items = {task: found["search_hash"] for task, found in prepared_facts["items"].items()}
    return kept, items, [(task.name, task.weight) for task in config.tasks.tasks]


def _open(candidate: Any) -> bool:
    return bool(candidate.state == "open")


def _silent(event: dict[str, Any]) -> None:
    """Nobody listens."""


def _telling(emit: Emit, log: Any) -> Emit:
    """Tell the listener, and keep a line in the run's log (which no search depends on)."""

    def tell(event: dict[str, Any]) -> None:
        with suppress(OSError):
            log.write(json.dumps({"time": round(time.time(), 3)} | event) + "\n")
            log.flush()
        emit(event)

    return tell


@contextmanager
def opened(runs_dir: Path | str) -> Iterator[Ledger]:
    """The ledger of a runs directory, for reading."""
    with Ledger(existing_runs(runs_dir) / LEDGER, read_only=True) as ledger:
        yield ledger


__all__ = [
    "CandidateFailed",
    "Context",
    "Drain",
    "branch",
    "changed_facts",
    "evaluate",
    "existing_runs",
    "load_graph",
    "opened",
    "resume",
    "run",
    "settings_hash",
]
