"""``run``, ``resume``, ``branch`` and ``stop``: start a search, drive it, show how it ended, and
end one that is driven elsewhere."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from agentmerge.cli import options
from agentmerge.cli.legacy import Legacy, map_options, old_options
from agentmerge.cli.serving import page_beside
from agentmerge.cli.terminal import Interrupted, failed, show_result, signals, speaker, warned
from agentmerge.system.temporary import write_at_once
from agentmerge.system.waits import waiting_for

#: Seconds between looks at whether a search has stopped.
_LOOK_S = 0.2


class Answer(StrEnum):
    yes = "yes"
    no = "no"


@options.settings(*options.RUN)
@old_options
def run(
    config: Annotated[Path, typer.Argument(help="A genome config, as mergekit-evolve reads it.")],
    name: Annotated[str | None, typer.Option("--name", help="What to call this search.")] = None,
    runs_dir: options.RunsDir = Path("runs"),
    *,
    given: dict[str, Any],
    allow_benchmark_tasks: options.AllowBench = False,
    tracker: options.Trackers = None,
    wandb: options.Wandb = False,
    wandb_project: options.WandbProject = None,
    wandb_entity: options.WandbEntity = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    ui: options.Ui = False,
    old: Legacy,
) -> int:
    """Search for the best merge of a config's models."""
    from agentmerge.cli.trackers import Tracking, tracked
    from agentmerge.config import SearchConfig
    from agentmerge.preflight.anchoring import init_notes

    mapped = map_options(old)
    settings = SearchConfig.from_file(config, mapped.overrides | given)
    refuse_unknown_names(settings)
    say = speaker(quiet, as_json)
    for line in (*settings.warnings, *init_notes(settings)):
        say(warned(line))
    for line in (*settings.notices, *mapped.notices):
        say(f"note: {line}")
    final_model = old.save_final_model is not False
    _check_storage(old.storage_path, final_model, settings.worker.kind)
    names = (*(tracker or ()), *(["wandb"] if wandb else []))
    tracking = Tracking(names, wandb_project, wandb_entity)

    from agentmerge.session import driving

    def start(emit: Any, drain: Any) -> Any:
        with tracked(emit, settings, tracking, runs_dir, name) as tell:
            row = driving.run(
                settings,
                name=name,
                runs_dir=runs_dir,
                emit=tell,
                drain=drain,
                allow_benchmarks=allow_benchmark_tasks,
            )
        _old_outputs(row, runs_dir, old.storage_path, final_model)
        return row

    return _driven(start, settings, runs_dir, as_json, quiet, ui=ui)


def refuse_unknown_names(settings: Any) -> None:
    """Mistakes that need no model are told before what loads models is imported."""
    from agentmerge.errors import ConfigError
    from agentmerge.preflight.faults import named_faults

    if faults := named_faults(settings):
        raise ConfigError(faults)


def _check_storage(storage: Path | None, final_model: bool, kind: str) -> None:
    """Found out before the search is paid for."""
    from agentmerge.errors import UserError
    from agentmerge.session.export import refuse_foreign
    from agentmerge.workers.kinds import reads_models

    if storage is None:
        return
    if final_model and not reads_models(kind):
        raise UserError(f"the {kind} worker has no model to save; add --no-save-final-model")
    try:
        storage.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--storage-path {storage} cannot be made: {error.strerror}") from None
    if not os.access(storage, os.W_OK):
        raise UserError(f"--storage-path {storage} cannot be written")
    if (storage / "best_config.yaml").is_dir():
        raise UserError(f"{storage / 'best_config.yaml'} is a folder; name another --storage-path")
    if final_model:
        refuse_foreign(storage / "final_model")


def _old_outputs(row: Any, runs_dir: Path, storage: Path | None, final_model: bool) -> None:
    """What the old programs left in --storage-path; the model only once the search is done."""
    from agentmerge.session import export

    best = runs_dir / row.name / "best.yml"
    if storage is None or not best.is_file():
        return
    write_at_once(storage / "best_config.yaml", best.read_text(encoding="utf-8"))
    if final_model and row.status == "done":
        target = storage / "final_model"
        with waiting_for("the merged model to be written"):
            export.export_run(row.name, target, runs_dir=runs_dir, overwrite=True)


@options.settings(*options.LIMITS, "workers", "worker_host", "api_key_env")
def resume(
    name: options.Search,
    runs_dir: options.RunsDir = Path("runs"),
    *,
    given: dict[str, Any],
    storage_path: Annotated[
        Path | None, typer.Option(help="Also write best_config.yaml and final_model here.")
    ] = None,
    save_final_model: Annotated[
        bool, typer.Option("--save-final-model/--no-save-final-model")
    ] = True,
    answer: Annotated[
        Answer | None, typer.Option(help="To the question that a waiting search asks.")
    ] = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    ui: options.Ui = False,
) -> int:
    """Go on with a search where it stopped; limits may be raised."""
    from agentmerge.config import SearchConfig
    from agentmerge.contracts.events import Done
    from agentmerge.ledger.folder import opened
    from agentmerge.report.board import Follower
    from agentmerge.session import driving

    with opened(runs_dir) as ledger:
        row = ledger.run(name)
        past = [e for e in Follower(ledger, row).news() if not isinstance(e, Done)]
    settings = SearchConfig.from_text(row.config, name, given)
    _check_storage(storage_path, save_final_model, settings.worker.kind)

    def start(emit: Any, drain: Any) -> Any:
        row = driving.resume(
            name,
            runs_dir=runs_dir,
            overrides=given,
            emit=emit,
            drain=drain,
            answer=None if answer is None else answer is Answer.yes,
        )
        _old_outputs(row, runs_dir, storage_path, save_final_model)
        return row

    return _driven(start, settings, runs_dir, as_json, quiet, past, ui=ui)


@options.settings(*options.BRANCH)
def branch(
    name: options.Search,
    at: Annotated[int, typer.Option("--at", help="The generation to start from.")],
    new: Annotated[str | None, typer.Option("--as", help="What to call the new search.")] = None,
    runs_dir: options.RunsDir = Path("runs"),
    *,
    given: dict[str, Any],
    tracker: options.Trackers = None,
    wandb: options.Wandb = False,
    wandb_project: options.WandbProject = None,
    wandb_entity: options.WandbEntity = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    ui: options.Ui = False,
) -> int:
    """Leave a search at a generation, with any setting changed."""
    from agentmerge.cli.trackers import Tracking, tracked
    from agentmerge.config import SearchConfig
    from agentmerge.ledger.folder import opened
    from agentmerge.session import driving

    with opened(runs_dir) as ledger:
        row = ledger.run(name)
    settings = SearchConfig.from_text(row.config, name, given)
    names = (*(tracker or ()), *(["wandb"] if wandb else []))
    tracking = Tracking(names, wandb_project, wandb_entity)

    def start(emit: Any, drain: Any) -> Any:
        with tracked(emit, settings, tracking, runs_dir, new) as tell:
            return driving.branch(
                name, at=at, name=new, runs_dir=runs_dir, overrides=given, emit=tell, drain=drain
            )

    return _driven(start, settings, runs_dir, as_json, quiet, ui=ui)


def stop(
    name: options.Search,
    runs_dir: options.RunsDir = Path("runs"),
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> int:
    """Stop a search that runs elsewhere. What it is at is finished and saved first."""
    from agentmerge.ledger.folder import CHECKPOINTS, opened
    from agentmerge.ledger.lease import Lease
    from agentmerge.report.summary import run_status

    say = speaker(quiet, as_json)
    path = runs_dir / CHECKPOINTS
    with opened(runs_dir) as ledger:
        row = ledger.run(name)
        found = Lease.ask_to_stop(path, row.id, row.name)
        say(f"process {found.pid} on {found.host} saves what it is at (Ctrl-C: do not wait for it)")
        with suppress(Interrupted, KeyboardInterrupt):
            while (now := Lease.holder(path, row.id)) is not None and now.token == found.token:
                time.sleep(_LOOK_S)
        status = run_status(ledger, ledger.run(row.id))
    show_result({"name": row.name, "status": status}, as_json, f"{row.name}: {status}")
    return 0


def followed(
    start: Any, config: Any, runs_dir: Path, as_json: bool, quiet: bool, past: Any = ()
) -> tuple[Any, list[int]]:
    """(what ``start(emit, drain)`` returns, signals that came): with progress and signals."""
    from agentmerge.cli.live import progress
    from agentmerge.session.driving import Drain

    drain = Drain()
    with (
        signals(drain, speaker(quiet, as_json)) as caught,
        progress(config, runs_dir, quiet=quiet, as_json=as_json, past=past) as listener,
    ):
        return start(listener, drain), caught


def _driven(
    start: Any,
    config: Any,
    runs_dir: Path,
    as_json: bool,
    quiet: bool,
    past: Any = (),
    *,
    ui: bool,
) -> int:
    """Run ``start(emit, drain)`` as it is followed, then show how it ended."""
    from agentmerge.cli.render import summary_text
    from agentmerge.ledger.folder import opened
    from agentmerge.report.summary import run_summary
    from agentmerge.search.state import WAITING

    say = speaker(quiet, as_json)
    with page_beside(runs_dir, ui, as_json):
        row, caught = followed(start, config, runs_dir, as_json, quiet, past)
    with opened(runs_dir) as ledger:
        summary = run_summary(ledger, row)
    show_result(summary, as_json, summary_text(summary))
    folder = runs_dir / row.name
    if row.status != "done":
        where = "" if runs_dir == Path("runs") else f" --runs-dir {runs_dir}"
        if row.status == WAITING:
            say(f"waiting for your answer: {row.stop_reason}")
            where += " --answer yes (or no)"
        say(f"saved; go on with: agentmerge resume {row.name}{where}")
        # So that `run && export` does not go on.
        return 0 if row.status == WAITING else 128 + (caught or [signal.SIGINT])[0]
    if summary["best"] is None:
        why = next((c["failure"] for c in summary["failures"]), f"it stopped by {row.stop_reason}")
        return failed(f"nothing was scored: {why}", 1)
    if not as_json:
        say(f"best recipe: {folder / 'best.yml'}")
    return 0
