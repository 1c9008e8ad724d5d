"""What a search is put together from: its run in the ledger, its parts, its graph.

Knows how a config becomes a ``Search`` with open doors; ``session.py`` or a server drives it.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from agentmerge import plugins
from agentmerge.config import Role, SearchConfig
from agentmerge.contracts.operators import STRUCTURE
from agentmerge.contracts.worker import ItemRef, ItemResult
from agentmerge.errors import AgentmergeError, NotFound, UserError
from agentmerge.ledger import Ledger, ResultKey, RunRow
from agentmerge.ledger.folder import CHECKPOINTS, LEDGER
from agentmerge.ledger.store import SAVED
from agentmerge.preflight.prepare import Prepared, prepare, warm_start
from agentmerge.search.search import Emit, Search
from agentmerge.system.bounded import refuse_odd_file
from agentmerge.system.redaction import redacted, revealed
from agentmerge.system.temporary import write_at_once

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
    from agentmerge.agents.tracing import redact_traces

    redact_traces()
    config = prepared.config
    timeout = config.budget.timeout_s
    deadline = None if timeout is None else time.monotonic() + timeout
    slowest_s = ledger.slowest_s(row.id) / max(1, len(prepared.taskset.refs("search")))  # an item
    pool = pool_of(prepared, stack, deadline, slowest_s)
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
        seconds_left=lambda: math.inf if deadline is None else deadline - time.monotonic(),
    )
    for role in search.models:
        ledger.save_prompt(row.id, role, getattr(search.prompts, role).text)
    return search


def resource_faults(
    config: SearchConfig, ready: Mapping[Role, Any] | None = None, *, run_code: bool = True
) -> list[str]:
    """What is wrong with models, secrets, prompts and graph: found out before a run is written
    down.

    run_code: False only looks for a graph of the user's own, which is code.
    """
    from agentmerge.agents.prompts import load_prompts

    faults = []
    for key in ("options", "engine_args"):
        try:
            revealed(getattr(config.worker, key), f"worker.{key}")
        except UserError as error:
            faults.append(str(error))
    try:
        if not _models(config, ready) and config.search.shadow:
            faults.append(
                f"search.shadow {config.search.shadow:g} measures what a language model adds, and "
                "none advises: name one (agents.llm, --llm), or leave shadow out"
            )
    except UserError as error:
        faults.append(str(error))
    for load in (
        lambda: load_prompts(config.agents.prompts),
        lambda: _look_at_graph(config.search.graph, run_code),
    ):
        try:
            load()
        except UserError as error:
            faults += str(error).splitlines()
    return faults


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


def unseen(ledger: Ledger, prepared: Prepared) -> Prepared:
    """A new search that seals nothing of what the searches saw whose finds it begins with.

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


def existing_runs(runs_dir: Path | str) -> Path:
    """The runs directory.

    Raises:
        NotFound: nothing has run there.
    """
    path = Path(runs_dir)
    if not (path / LEDGER).is_file():
        raise NotFound(f"no runs in {path}; `agentmerge run CONFIG` or --runs-dir DIR")
    return path


@contextmanager
def opened(runs_dir: Path | str) -> Iterator[Ledger]:
    """The ledger of a runs directory, for reading."""
    with Ledger(existing_runs(runs_dir) / LEDGER, read_only=True) as ledger:
        yield ledger


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
        if new["engine"].get(key) != value and key != "conditions":
            found.append(f"the engine's {key} changed from {value} to {new['engine'].get(key)}")
    return found + _changed_conditions(old, new)


def _changed_conditions(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    if old["engine"].get("conditions", "") == new["engine"].get("conditions", ""):
        return []
    if not old["engine"].get("conditions"):
        return [
            "what answers depend on besides the weights (the model's settings and code, the "
            "environment) has become part of the key of results, and was not recorded"
        ]
    from agentmerge.workers.conditions import changed

    return changed(old["conditions"], new["conditions"])


def arithmetic() -> dict[str, Any]:
    """What decides the last digits of a strategy's linear algebra on this machine: threads and
    kernels of numpy's BLAS. No result depends on it, but what is proposed next may."""
    import numpy  # noqa: F401  # loads its library
    from threadpoolctl import threadpool_info

    found = [pool for pool in threadpool_info() if pool["user_api"] == "blas"]
    return {
        "threads": max((int(pool["num_threads"]) for pool in found), default=1),
        "kernels": sorted({str(pool.get("architecture")) for pool in found}),
    }


def settings_hash(prepared: Prepared) -> str:
    """What decides a search's course, for comparing and for time estimates."""
    config = prepared.config
    body = {
        "genome": config.genome.model_dump(mode="json"),
        "tasks": config.tasks.model_dump(mode="json"),
        "worker": config.worker.model_dump(mode="json", exclude={"timeout_s"}),
        "facts": prepared.facts(),
    }
    return sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]


def _look_at_graph(name: str, run_code: bool) -> None:
    """Ours is only looked for: what it imports takes seconds. A user's own is loaded."""
    if _graph_file(name).parent != graphs_dir() and run_code:
        load_graph(name)


def _graph_file(name: str) -> Path:
    text = name.partition(":")[0]
    path = Path(text) if text.endswith(".py") else graphs_dir() / f"{text}.py"
    if not path.is_file():
        raise UserError(f"no graph at {path}; give a name from graphs/ or path.py:build")
    return path


def load_graph(name: str) -> Any:
    """The uncompiled graph: ``search``, another file in graphs/, or ``path.py:build``.

    Raises:
        UserError: no such file or function.
    """
    path, function = _graph_file(name), name.partition(":")[2]
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
    package = Path(__file__).parents[1]
    bundled = package / "_bundled" / "graphs"
    return bundled if bundled.is_dir() else package.parent / "graphs"


def pool_of(
    prepared: Prepared, stack: ExitStack, ends: float | None = None, slowest_s: float = 0.0
) -> Any:
    """Its workers, none of them built yet; ``stack`` closes them. The rest: see ``Deadlines``."""
    from agentmerge.workers.places import Deadlines
    from agentmerge.workers.pool import Pool

    worker = prepared.config.worker
    deadlines = Deadlines(worker.timeout_s, ends, slowest_s)
    pool = Pool(prepared.spec, worker.count, taskset=prepared.taskset, deadlines=deadlines)
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

    Where an override changes what is asked (tasks, limit, engine), the past is knowledge only: its
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
    prior = _answers(row.facts, config) != _answers(parent.facts, before)
    old = {c.recipe_hash for c in past if c.generation <= at and (prior or c.prior)}
    if rescored := [recipe for recipe in sorted(old) if _scored(ledger, prepared, recipe)]:
        row = replace(row, facts=row.facts | {"rescored": rescored})
    row = ledger.add_run(row)
    # Under another genome or other scores no trial of a search space holds: they are left behind.
    without = STRUCTURE if prior or config.genome != before.genome else ""
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
    try:
        prepared.taskset.score(results)
    except (KeyError, AgentmergeError):  # not all of them, or a metric that is not finite
        return False
    return True


def _new_prompts(ledger: Ledger, run_id: str, config: SearchConfig) -> bool:
    """Whether a run's models were told otherwise than the prompts are now."""
    from agentmerge.agents.prompts import load_prompts

    now = load_prompts(config.agents.prompts)
    return any(getattr(now, role).text != text for role, text in ledger.prompts(run_id).items())


@contextmanager
def begun(
    ledger: Ledger, row: RunRow, prepared: Prepared, runs_dir: Path, emit: Emit
) -> Iterator[Emit]:
    """The run's folder with its config and items as they are now; tells ``emit`` and the log."""
    folder = runs_dir / row.name
    folder.mkdir(parents=True, exist_ok=True)
    write_at_once(folder / "config.yml", prepared.config.to_yaml())
    for config in (SearchConfig.from_text(row.config, row.name), prepared.config):
        ledger.save_limits(row.id, limits_of(config))
    ledger.update_run(row.id, config=prepared.config.to_yaml())
    for task in prepared.taskset.tasks:
        ledger.save_items(row.id, task.name, "search", task.part("search"))
        ledger.save_items(row.id, task.name, "sealed", task.part("sealed"))
    refuse_odd_file(folder / "log.jsonl", UserError)
    with (folder / "log.jsonl").open("a") as log:
        tell = telling(emit, log)
        if prepared.conditions and ledger.first_time(WEAK) and (weak := ledger.keyed_too_weakly()):
            tell(
                {
                    "event": "note",
                    "text": f"{weak} blocks of results in this runs directory are from a version "
                    "that keyed them by weights and tasks only, not by the model's settings and "
                    "code; reports still show them, and searches score those merges again",
                }
            )
        yield tell


def limits_of(config: SearchConfig) -> dict[str, Any]:
    """The settings that ``resume`` may raise, as overrides."""
    found = {}
    for dotted in RESUMABLE:
        section, _, key = dotted.partition(".")
        found[dotted] = getattr(getattr(config, section), key)
    return found


def telling(emit: Emit, log: Any) -> Emit:
    """Tell the listener, whoever streams the graph ("custom"), and the run's log.

    No search depends on the log or on the stream.
    """
    from langgraph.config import get_stream_writer

    def tell(event: dict[str, Any]) -> None:
        named = {"run": event["run"]} if "run" in event else {}  # a name, and a folder's
        event = redacted(event) | named
        with suppress(OSError, ValueError):
            log.write(json.dumps({"time": round(time.time(), 3)} | event) + "\n")
            log.flush()
        with suppress(RuntimeError, KeyError):  # not inside a graph
            get_stream_writer()(event)
        emit(event)

    return tell


def silent(event: dict[str, Any]) -> None:
    """Nobody listens."""


def _answers(prepared_facts: Mapping[str, Any], config: SearchConfig) -> Any:
    """What decides a candidate's score: where it differs, old scores cannot be compared."""
    kept = {key: prepared_facts[key] for key in ("identities", "protocols", "dtype", "engine")}
    items = {task: found["search_hash"] for task, found in prepared_facts["items"].items()}
    return kept, items, [(task.name, task.weight) for task in config.tasks.tasks]
