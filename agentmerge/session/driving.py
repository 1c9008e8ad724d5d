"""A search from outside: start, resume, branch, evaluate; the run directory and the drain.

``runs/NAME/`` holds the config as resolved, best.yml and the log; all searches share
``runs/checkpoints.sqlite`` (LangGraph, thread id = run id) and ``runs/agentmerge.sqlite`` (the
ledger). How a search is opened is ``opening``; what it does, its graph says.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from operator import attrgetter
from pathlib import Path
from typing import Any

from agentmerge.config import FIRST, Role, SearchConfig
from agentmerge.contracts.events import Begun, Emit, Note
from agentmerge.errors import LeaseHeld, NotBegun, RunFailed, UserError
from agentmerge.ledger import Ledger, RunRow
from agentmerge.ledger.archive import remove_runs
from agentmerge.ledger.folder import CHECKPOINTS, LEDGER, existing_runs
from agentmerge.ledger.lease import Lease
from agentmerge.ledger.verdicts import JUDGE
from agentmerge.preflight.anchoring import anchored, anchored_name
from agentmerge.preflight.graphs import load_graph
from agentmerge.preflight.plan import Prepared
from agentmerge.preflight.prepare import prepare
from agentmerge.recipe import Recipe
from agentmerge.recipe.cancelling import cancelling_notes
from agentmerge.search.judging import Judges
from agentmerge.search.scoring import Scoring
from agentmerge.search.search import Search
from agentmerge.search.state import GRAPH_VERSION, WAITING, SearchState
from agentmerge.session.branching import new_branch
from agentmerge.session.context import Context, at_hand
from agentmerge.session.opening import (
    MOVABLE,
    RESUMABLE,
    FindRun,
    new_run,
    opened_search,
    pool_of,
    prepared_again,
    resource_faults,
    silent,
)


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
    faults = resource_faults(config, models)
    prepared = prepare(config, allow_benchmarks=allow_benchmarks, fresh=True, known_faults=faults)

    def begin(ledger: Ledger) -> tuple[Prepared, RunRow]:
        if name is not None:
            _clear_false_start(ledger, Path(runs_dir), name)
        return new_run(ledger, prepared, name)

    return _drive(Path(runs_dir), begin, emit, drain, models)


def _clear_false_start(ledger: Ledger, runs_dir: Path, name: str) -> None:
    """A search that failed before anything was scored gives its name free."""
    for row in ledger.runs():
        if row.name == name and row.status in ("new", "interrupted", "failed"):
            begun_with = ledger.candidates(row.id)
            held = Lease.holder(runs_dir / CHECKPOINTS, row.id)
            if all(c.state == "open" or not c.cost for c in begun_with) and held is None:
                remove_runs(ledger, [row.id])


def resume(
    name: str,
    *,
    runs_dir: Path | str = "runs",
    overrides: Mapping[str, Any] | None = None,
    emit: Emit | None = None,
    drain: Drain | None = None,
    models: Mapping[Role, Any] | None = None,
    answer: bool | None = None,
) -> RunRow:
    """Go on with a search where it stopped; ``overrides`` may raise limits (RESUMABLE), name
    the key that servers of its config may have (``agents.api_key_env``), and with a window or a
    population of its own say where its workers are (MOVABLE).

    answer: to the question that a waiting search asks (``search.approve``). Without one it is left
        waiting.

    Raises:
        UserError: a parent, a task or the items changed since; a limit would be lowered; an answer
            that nothing asked for.
        RunFailed: the saved state cannot be continued.
    """

    def again(ledger: Ledger) -> tuple[Prepared, RunRow]:
        row = ledger.run(name)
        settings = SearchConfig.from_text(row.config, row.name).search
        movable = MOVABLE if settings.lag or settings.population else ()
        foreign = sorted(set(overrides or {}) - {*RESUMABLE, *movable, "agents.api_key_env"})
        if foreign:
            raise UserError(
                f"{foreign[0]} cannot change on resume; `agentmerge branch {row.name}` starts a "
                "search with other settings from any generation"
            )
        limits = {key: value for key, value in (overrides or {}).items() if key in RESUMABLE}
        _raised(SearchConfig.from_text(row.config, row.name), limits, row.name)
        config = SearchConfig.from_text(row.config, row.name, overrides)
        if faults := resource_faults(config, models):
            raise UserError("\n".join(faults))
        prepared, changes = prepared_again(row, config)
        if changes:
            way = f"`agentmerge branch {row.name}` to score the best again"
            if all(c.score is None for c in ledger.candidates(row.id)):
                way = f"`agentmerge run` under the name {row.name} again, since nothing is scored"
            raise UserError(
                f"{'; '.join(changes)} since {row.name!r} began: old and new scores cannot be "
                f"compared; put it back, or {way}"
            )
        return prepared, row

    return _drive(existing_runs(runs_dir), again, emit, drain, models, answer)


def _raised(config: SearchConfig, limits: Mapping[str, Any], name: str) -> None:
    """A search that went on under lower limits than it has used could not be replayed."""
    for key, new in limits.items():
        old = attrgetter(key)(config)
        if key in ("budget.timeout_s", "worker.timeout_s") or old is None:
            continue  # counted anew on every resume, and candidate; a first limit of its kind
        if new is not None and new < old:
            raise UserError(
                f"{key} of {name!r} is {old:g} and cannot become {new:g}: resume only raises "
                f"limits; `agentmerge branch {name}` starts a search with lower ones"
            )


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
    changes = overrides or {}
    return _drive(
        existing_runs(runs_dir),
        lambda ledger: new_branch(ledger, source, at, name, changes, models),
        emit,
        drain,
        models,
    )


def evaluate(
    recipe: Recipe,
    config: SearchConfig,
    *,
    runs_dir: Path | str = "runs",
    models: Mapping[Any, Any] | None = None,
) -> dict[str, Any]:
    """Score any recipe under a config's tasks: {score, tasks, recipe_hash, reused, items, notes}.

    models: a ready chat model for ``judge``, instead of what the config names.

    Raises:
        ConfigError: its models cannot be merged with the config's.
        CandidateFailed: it cannot be merged or scored.
    """
    recipe = recipe.renamed(anchored_name)
    settings = _under_its_template(_under_its_tokenizer(anchored(config), recipe), recipe)
    prepared = prepare(settings, allow_benchmarks=True, also=recipe.models)
    canonical = recipe.at(prepared.space.dtype).canonical(prepared.space.num_layers)
    prepared.check(canonical)
    recipe_hash = canonical.hash(prepared.identities)
    with Ledger(Path(runs_dir) / LEDGER) as ledger, ExitStack() as stack:
        ready = (models or {}).get(JUDGE)
        judges = Judges(lambda: prepared.config, prepared.taskset, ledger, ready=ready)
        scoring = Scoring(ledger, prepared.taskset, pool_of(prepared, stack), judges)
        answers = scoring.ask(canonical, recipe_hash)
        scoring.save(answers)
        score = prepared.taskset.score(answers.results)
    return {
        "score": score.value,
        "tasks": dict(score.tasks),
        "recipe_hash": recipe_hash,
        "reused": not answers.paid,
        "items": len(answers.results),
        "notes": [*recipe.notes, *cancelling_notes(canonical)],
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


def _under_its_template(config: SearchConfig, recipe: Recipe) -> SearchConfig:
    """The config with the recipe's ``chat_template``: it is asked as its merge would be."""
    asked, source = recipe.chat_template, config.tasks.chat_template
    if asked in (None, "", source):
        return config
    if source not in (None, FIRST):
        raise UserError(
            f"the recipe's chat_template is {str(asked)[:40]!r}, and the config's "
            f"{source[:40]!r}; change one"
        )
    return config.model_copy(
        update={"tasks": config.tasks.model_copy(update={"chat_template": asked})}
    )


def _drive(
    runs_dir: Path,
    find: FindRun,
    emit: Emit | None,
    drain: Drain | None,
    models: Mapping[Role, Any] | None,
    answer: bool | None = None,
) -> RunRow:
    from langgraph.errors import GraphDrained

    from agentmerge.session.checkpoints import open_saver

    drain = drain or Drain()
    heard, one_at_a_time = emit or silent, threading.RLock()

    def tell(body: dict[str, Any]) -> None:
        with one_at_a_time:  # the search's threads speak, and the lease's
            heard(body)

    def asked() -> None:
        drain.request()
        tell(Note(text="asked to stop: what runs is finished and saved").to_json())

    with (
        opened_search(
            runs_dir,
            find,
            drive=True,
            models=models,
            emit=tell,
            stopping=lambda: drain.requested,
            asked=asked,
        ) as (search, prepared, row),
        open_saver(runs_dir / CHECKPOINTS) as saver,
    ):
        advisers = sorted({model.name for model in search.models.values()})
        search.emit(
            Begun(
                run=row.name,
                status=row.status,
                advisers=advisers,
                heeded=bool(getattr(search.strategy, "heeds_advice", False)),
                memory=prepared.memory.compromise if prepared.memory else "",
                workers=prepared.config.worker.number,
            )
        )
        graph = load_graph(prepared.config.search.graph).compile(checkpointer=saver)
        thread: Any = {
            "configurable": {"thread_id": row.id},
            "recursion_limit": prepared.config.graph_steps,
        }
        begin = _first_input(graph, thread, row, answer)
        search.ledger.update_run(row.id, status="running", stop_reason="")
        context = Context(run=row.id, runs_dir=str(runs_dir))
        try:
            with at_hand(search):
                graph.invoke(
                    begin, thread, context=context, durability="sync", control=drain.control
                )
        except (GraphDrained, NotBegun):
            pass  # told to stop: the last step is saved, or was not begun
        except BaseException:
            _say_interrupted(search)
            raise
        _say_how_it_ended(search, graph.get_state(thread), drain)
        return search.ledger.run(row.id)


def _say_interrupted(search: Search) -> None:
    """Where another process has the search by now, what that one says of it stands."""
    with suppress(LeaseHeld):
        search.entering()
        search.ledger.update_run(search.run_id, status="interrupted")


def _say_how_it_ended(search: Search, snapshot: Any, drain: Drain) -> None:
    """In its row, where the graph's last step has not."""
    done = snapshot.values.get("status") == "done"
    if not done:
        search.entering()
    if snapshot.interrupts:
        question = str(snapshot.interrupts[0].value["question"])
        search.ledger.update_run(search.run_id, status=WAITING, stop_reason=question)
    elif not done and drain.requested:
        search.ledger.update_run(search.run_id, status="interrupted")
    elif not done:
        reason = "ended without finishing"
        search.ledger.update_run(search.run_id, status="failed", stop_reason=reason)
        raise RunFailed(f"search {search.run_dir.name!r} {reason}; see its log.jsonl")


def _first_input(graph: Any, thread: Any, row: RunRow, answer: bool | None) -> Any:
    """What to invoke with: a first state, or an answer.

    A search goes on from its ledger, whatever step its checkpoints are at: ``seed`` finds the last
    generation there, and what was scored, advised or decided is read again and costs nothing. So
    two files that do not fit, as after a power cut, cannot lead it astray.
    """
    from langgraph.types import Command

    snapshot = graph.get_state(thread)
    values = snapshot.values
    if values.get("graph_version", GRAPH_VERSION) > GRAPH_VERSION:
        raise RunFailed(
            f"search {row.name!r} was saved by graph version {values.get('graph_version')}, and "
            f"this is version {GRAPH_VERSION}; `agentmerge branch {row.name}` goes on from its "
            "ledger"
        )
    if snapshot.interrupts and answer is not None:
        return Command(resume={"approved": answer, "asked": snapshot.interrupts[0].value})
    if answer is not None:
        raise UserError(f"search {row.name!r} asks nothing: leave the answer out")
    return SearchState(run_id=row.id, graph_version=GRAPH_VERSION)
