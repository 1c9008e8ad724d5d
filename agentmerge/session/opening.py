"""How a search is opened: one way for whoever drives, serves, offers, shows or repeats one.

Knows a search's run in the ledger, its lease, its folder and the parts that it is put together
from; what is done with it is the caller's.
"""

from __future__ import annotations

import json
import math
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentmerge import plugins
from agentmerge.config import Role, SearchConfig
from agentmerge.contracts.events import Begun, Emit, Event, Note
from agentmerge.errors import UserError
from agentmerge.evaluation.failing import texts
from agentmerge.ledger import Ledger, RunRow
from agentmerge.ledger.folder import CHECKPOINTS, LEDGER
from agentmerge.ledger.lease import Lease
from agentmerge.ledger.store import SAVED
from agentmerge.ledger.verdicts import JUDGE
from agentmerge.preflight.anchoring import warm_start
from agentmerge.preflight.facts import arithmetic, changed_facts, settings_hash
from agentmerge.preflight.faults import Faults
from agentmerge.preflight.graphs import look_at_graph
from agentmerge.preflight.plan import Prepared
from agentmerge.preflight.prepare import prepare
from agentmerge.search.budget import ending_merges
from agentmerge.search.judging import Judges, judge_faults
from agentmerge.search.purse import Purse
from agentmerge.search.search import Search
from agentmerge.system.bounded import refuse_odd_file
from agentmerge.system.redaction import redacted, revealed
from agentmerge.system.temporary import write_at_once

if TYPE_CHECKING:
    from agentmerge.agents.prompts import Prompts

#: The algorithm of a run that tools made: there is no search behind it.
TOOLS = "tools"
#: What is said once of a ledger: some of its results are found no more.
WEAK = "results keyed too weakly"
#: Options that ``resume`` may raise; anything else is another search: ``branch``.
RESUMABLE = (
    "budget.max_evaluations",
    "budget.max_items",
    "budget.timeout_s",
    "worker.timeout_s",
    "budget.max_tokens",
    "budget.max_cost_usd",
    "search.max_generations",
)
#: And where its workers are, which changes nothing where generations do not depend on them.
MOVABLE = ("worker.count", "worker.host", "worker.ray_address", "worker.paths")
#: Finds a run in an open ledger, or writes a new one there.
FindRun = Callable[[Ledger], tuple[Prepared, RunRow]]


def silent(event: object) -> None:
    """Nobody listens."""


@contextmanager
def opened_search(
    runs_dir: Path,
    find: FindRun,
    *,
    drive: bool = False,
    advised: bool = True,
    read_only: bool = False,
    models: Mapping[Role, Any] | None = None,
    emit: Emit = silent,
    stopping: Callable[[], bool] = lambda: False,
    asked: Callable[[], None] | None = None,
) -> Iterator[tuple[Search, Prepared, RunRow]]:
    """A search with its doors open and the sole right to it, while the block runs.

    drive: its graph is to be run, and its folder gets config and log.
    advised: by the models of its config, or by ready ones (models).
    read_only: its past is looked at; nothing is written, and it may be at work elsewhere.
    asked: called once somebody asks this search to stop; without it nobody can.

    Raises:
        LeaseHeld: another process works on it.
        RunFailed: the file of its checkpoints and lease cannot be used.
    """
    from agentmerge.agents.tracing import redact_traces

    redact_traces()
    with ExitStack() as stack:
        ledger = stack.enter_context(Ledger(runs_dir / LEDGER, read_only=read_only))
        prepared, row = find(ledger)
        config = prepared.config
        leased = nullcontext(lambda: None) if read_only else _leased(runs_dir, row, emit, asked)
        entering = stack.enter_context(leased)
        tell: Callable[[Event], None] = silent
        if drive:
            tell = stack.enter_context(_begun(ledger, row, prepared, runs_dir, emit))
        timeout = config.budget.timeout_s
        deadline = None if timeout is None else time.monotonic() + timeout
        slowest_s = ledger.slowest_s(row.id) / max(1, len(prepared.taskset.refs("search")))
        purse = Purse(partial(ledger.call_totals, row.id))

        def seconds_left() -> float:
            return math.inf if deadline is None else deadline - time.monotonic()

        judges = None
        if prepared.taskset.judged:
            judges = Judges(
                configured=lambda: config,
                taskset=prepared.taskset,
                ledger=ledger,
                run_id=row.id,
                purse=purse,
                emit=tell,
                seconds_left=seconds_left,
                merges=lambda: ending_merges(search.config, search.space),
                ready=_ready_judge(models),
            )
        search = Search(
            configured=lambda: config,
            run_id=row.id,
            run_dir=runs_dir / row.name,
            settings_hash=row.settings_hash,
            ledger=ledger,
            space=prepared.space,
            taskset=prepared.taskset,
            pool=pool_of(prepared, stack, deadline, slowest_s, lambda text: tell(Note(text=text))),
            strategy=_strategy(config),
            identities=prepared.identities,
            check=prepared.check,
            paths=prepared.paths,
            models=_models(config, models) if advised else {},
            prompts=prompts_of(ledger, row, config.agents.prompts),
            emit=tell,
            seconds_left=seconds_left,
            stopping=stopping,
            entering=entering,
            judges=judges,
            purse=purse,
        )
        for role in search.models:
            ledger.save_prompt(row.id, role, getattr(search.prompts, role).text)
        yield search, prepared, row


def prompts_of(ledger: Ledger, row: RunRow, folder: Path | str | None) -> Prompts:
    """What a run's models were told so far, also where ours say it otherwise by now: so it goes on
    as it began, and replays. A file of the folder is used in its place."""
    from agentmerge.agents.prompts import Prompt, load_prompts

    found = load_prompts(folder)
    own = {
        role: Prompt(role, Path(row.name) / f"{role}.md", text)
        for role, text in ledger.prompts(row.id).items()
        if folder is None or not (Path(folder) / f"{role}.md").is_file()
    }
    return replace(found, **own)


@contextmanager
def _leased(
    runs_dir: Path, row: RunRow, emit: Emit, asked: Callable[[], None] | None
) -> Iterator[Callable[[], None]]:
    """Nobody else works on a run, which has its folder; yields what raises where that is over."""
    from agentmerge.session.checkpoints import readable

    path = runs_dir / CHECKPOINTS

    def say(text: str) -> None:
        emit(Note(text=text).to_json())

    taken = Lease.acquire(path, row.id, name=row.name, say=say, asked=asked)
    with readable(path, row.name), taken as lease:
        (runs_dir / row.name).mkdir(parents=True, exist_ok=True)
        yield lease.check


def prepared_again(row: RunRow, config: SearchConfig) -> tuple[Prepared, list[str]]:
    """A run's models and tasks as they are now, and what changed since it began."""
    prepared = prepare(config, allow_benchmarks=True).without(row.facts.get("searched", ()))
    return prepared, changed_facts(row.facts, prepared.facts())


def new_run(
    ledger: Ledger, prepared: Prepared, name: str | None, run_id: str | None = None
) -> tuple[Prepared, RunRow]:
    """A search that begins, written to the ledger; see ``new_row``."""
    prepared = _unseen(ledger, prepared)
    return prepared, ledger.add_run(new_row(ledger, prepared, name, run_id=run_id))


def resource_faults(
    config: SearchConfig, ready: Mapping[Role, Any] | None = None, *, run_code: bool = True
) -> list[str]:
    """What is wrong with models, secrets, prompts and graph: found out before a run is written
    down.

    run_code: False only looks for a graph of the user's own, which is code.
    """
    from agentmerge.agents.prompts import load_prompts

    faults = Faults()
    for key in ("options", "engine_args"):
        with faults.of(UserError):
            revealed(getattr(config.worker, key), f"worker.{key}")
    with faults.of(UserError):
        if not _models(config, ready) and config.search.shadow:
            faults.append(
                f"search.shadow {config.search.shadow:g} measures what a language model adds, and "
                "none advises: name one (agents.llm, --llm), or leave shadow out"
            )
    faults.extend(judge_faults(config, _ready_judge(ready)))
    with faults.of(UserError):
        load_prompts(config.agents.prompts)
    with faults.of(UserError):
        look_at_graph(config.search.graph, run_code)
    return faults


def _ready_judge(models: Mapping[Any, Any] | None) -> Any:
    """The chat model that judges in the place of the config's, where whoever searches brought
    one."""
    return (models or {}).get(JUDGE)


def new_row(
    ledger: Ledger,
    prepared: Prepared,
    name: str | None,
    parent: tuple[str, int] | None = None,
    run_id: str | None = None,
) -> RunRow:
    """A run that is not in the ledger yet; without a name it gets one there (``Ledger.add_run``).

    parent: run id and generation of the one it branches from. run_id: a UUID, by default a new one.

    Raises:
        UserError: the name is taken, or is none.
    """
    config, warnings = prepared.config, list(prepared.warnings)
    taken = {row.name for row in ledger.runs()}
    if name is not None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,80}", name):
            raise UserError(f"run name {name!r} may hold letters, digits, '.', '_' and '-' only")
        if name.lower().startswith((LEDGER, CHECKPOINTS, f"{Path(LEDGER).stem}{SAVED}")):
            raise UserError(
                f"run name {name!r} is that of a database in the same folder; choose another name"
            )
        if name in taken:
            raise UserError(
                f"a run called {name!r} exists; `agentmerge resume {name}`, or choose another name"
            )
    run_id = run_id or str(uuid.uuid4())
    return RunRow(
        id=run_id,
        name=name or "",
        created=time.time(),
        status="new",
        stop_reason="",
        config=config.to_yaml(),
        settings_hash=settings_hash(prepared),
        seed=config.search.seed,
        algorithm=config.algorithm,
        parent_run=parent[0] if parent else None,
        parent_generation=parent[1] if parent else None,
        facts=prepared.facts()
        | {"arithmetic": arithmetic()}
        | ({"warnings": redacted(warnings)} if warnings else {}),
        result=None,
    )


def _unseen(ledger: Ledger, prepared: Prepared) -> Prepared:
    """None of what the searches saw whose finds it begins with is sealed.

    A warm start is known by its merge, in this ledger and in that of the folder that it lies in,
    and by its place: a search's own folder.
    """
    searched: set[str] = set()
    for path in map(Path, prepared.config.search.init):
        recipe = warm_start(path).at(prepared.space.dtype)
        own = [recipe.canonical(prepared.space.num_layers).hash(prepared.identities)]
        searched |= ledger.searched_before([], own)
        folder = path.absolute().parent
        if (folder.parent / LEDGER).is_file():
            with Ledger(folder.parent / LEDGER, read_only=True) as found:
                runs = [run.id for run in found.runs() if run.name == folder.name]
                searched |= found.searched_before(runs, own)
    return prepared.without(searched)


def pool_of(
    prepared: Prepared,
    stack: ExitStack,
    ends: float | None = None,
    slowest_s: float = 0.0,
    tell: Callable[[str], None] = lambda text: None,
) -> Any:
    """Its workers, none of them built yet; ``stack`` closes them. The rest: see ``Deadlines``, and
    ``Pool``."""
    from agentmerge.workers.places import Deadlines
    from agentmerge.workers.pool import Pool
    from agentmerge.workers.sharing import host_of

    worker = prepared.config.worker
    deadlines = Deadlines(worker.timeout_s, ends, slowest_s)
    pool = Pool(
        prepared.spec,
        worker.number,
        taskset=prepared.taskset,
        deadlines=deadlines,
        host=host_of(worker),
        tell=tell,
    )
    stack.callback(pool.close)
    return pool


def _strategy(config: SearchConfig) -> Any:
    strategy = plugins.load("agentmerge.strategies", config.algorithm)
    settle = getattr(strategy, "with_settings", None)
    return settle(config.search) if settle else strategy


def _models(config: SearchConfig, ready: Mapping[Role, Any] | None) -> dict[Role, Any]:
    from agentmerge.agents.roles import models_for

    return dict(models_for(config, ready or {}))


@contextmanager
def _begun(
    ledger: Ledger, row: RunRow, prepared: Prepared, runs_dir: Path, emit: Emit
) -> Iterator[Callable[[Event], None]]:
    """The run's folder with its config and items as they are now; tells ``emit`` and the log."""
    folder = runs_dir / row.name
    write_at_once(folder / "config.yml", prepared.config.to_yaml())
    for config in (SearchConfig.from_text(row.config, row.name), prepared.config):
        ledger.save_limits(row.id, {key: attrgetter(key)(config) for key in RESUMABLE})
    ledger.update_run(row.id, config=prepared.config.to_yaml())
    for task in prepared.taskset.tasks:
        ledger.save_items(row.id, task.name, "search", task.part("search"))
        ledger.save_items(row.id, task.name, "sealed", task.part("sealed"))
        ledger.save_texts(row.id, task.name, texts(prepared.taskset, task, task.part("search")))
    refuse_odd_file(folder / "log.jsonl", UserError)
    with (folder / "log.jsonl").open("a") as log:
        tell = _telling(emit, log)
        if prepared.conditions and ledger.first_time(WEAK) and (weak := ledger.keyed_too_weakly()):
            tell(
                Note(
                    text=f"{weak} blocks of results in this runs directory are from a version "
                    "that keyed them by weights and tasks only, not by the model's settings and "
                    "code; reports still show them, and searches score those merges again"
                )
            )
        yield tell


def _telling(emit: Emit, log: Any) -> Callable[[Event], None]:
    """Tell the listener, whoever streams the graph ("custom"), and the run's log.

    Candidates of several workers are told of by as many threads: one at a time, in the log's order.
    No search depends on the log or on the stream.
    """
    from langgraph.config import get_stream_writer

    one_at_a_time = threading.RLock()

    def tell(event: Event) -> None:
        named = {"run": event.run} if isinstance(event, Begun) else {}  # a name, and a folder's
        body = redacted(event.to_json()) | named
        with one_at_a_time:
            with suppress(OSError, ValueError):
                log.write(json.dumps({"time": round(time.time(), 3)} | body) + "\n")
                log.flush()
            with suppress(RuntimeError, KeyError):  # not inside a graph
                get_stream_writer()(body)
            emit(body)

    return tell
