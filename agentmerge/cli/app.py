"""The commands. Each reads its options, calls one function of the library and shows the result."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Find the best merge of several fine-tunes of one base language model.",
)

OLD = "Options of mergekit-evolve and LLM-Evo-Merge"

RunsDir = Annotated[Path, typer.Option("--runs-dir", help="Where searches and results live.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]
Llm = Annotated[str | None, typer.Option("--llm", help='"none" or provider:model.')]
Prompts = Annotated[Path | None, typer.Option("--prompts", help="Folder of prompts to override.")]
Graph = Annotated[str | None, typer.Option("--graph", help="Graph name or path.py:build.")]
Algorithm = Annotated[str | None, typer.Option("--search", help="random, cma_es or llm_evo.")]
WorkerKind = Annotated[str | None, typer.Option("--worker", help="hf, disk or fake.")]
Seed = Annotated[int | None, typer.Option("--seed", help="All randomness derives from it.")]
MaxGenerations = Annotated[int | None, typer.Option("--max-generations")]
MaxEvaluations = Annotated[
    int | None, typer.Option("--max-evaluations", help="Distinct merges to score, seeds included.")
]
Timeout = Annotated[float | None, typer.Option("--timeout", help="Seconds of wall clock.")]
Population = Annotated[int | None, typer.Option("--population", help="Candidates a generation.")]
SigmaLow = Annotated[float | None, typer.Option("--sigma-low")]
SigmaHigh = Annotated[float | None, typer.Option("--sigma-high")]
Init = Annotated[
    list[Path] | None, typer.Option("--init", help="A recipe to start from; repeatable.")
]
TaskPath = Annotated[
    list[Path] | None,
    typer.Option("--task-search-path", help="Folder of lm-eval task files; repeatable."),
]
BatchSize = Annotated[int | None, typer.Option("--batch-size")]
Limit = Annotated[int | None, typer.Option("--limit", help="Search items a task.")]
TrustCode = Annotated[bool | None, typer.Option("--trust-remote-code/--no-trust-remote-code")]
AllowBench = Annotated[
    bool,
    typer.Option(
        "--allow-benchmark-tasks/--no-allow-benchmark-tasks",
        "--i-understand-the-depths-of-the-evils-i-am-unleashing"
        "/--no-i-understand-the-depths-of-the-evils-i-am-unleashing",
        help="Allow public benchmarks as objectives.",
    ),
]
Wandb = Annotated[bool, typer.Option("--wandb/--no-wandb", help="Log to Weights & Biases.")]
WandbProject = Annotated[str | None, typer.Option("--wandb-project")]
WandbEntity = Annotated[str | None, typer.Option("--wandb-entity")]


def run_app(arguments: list[str]) -> int:
    """The exit code of a command line: 0, 2 for the user's mistake, 1 for a run that failed."""
    from agentmerge.errors import AgentmergeError

    try:
        result = app(args=arguments, standalone_mode=False, prog_name="agentmerge")
        return result if isinstance(result, int) else 0
    except AgentmergeError as error:
        return _red(str(error), error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        return _red("stopped; everything scored is saved", 130)
    except BrokenPipeError:  # `agentmerge ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        usage = getattr(error, "format_message", None)  # typer's and click's own errors have it
        if usage is None:
            return _red(f"{_first_line(error)} (details in {_crash_file()})", 1)
        if type(error).__name__ == "NoArgsIsHelpError":
            print(usage(), file=sys.stderr)
            return 2
        return _red(f"{usage()} (agentmerge COMMAND --help lists the options)", 2)


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"unexpected {type(error).__name__}: {text[0] if text else 'no message'}"


def _crash_file() -> Path:
    """Where an unexpected error's traceback goes, so that nobody has to see it."""
    import tempfile

    path = Path(tempfile.gettempdir()) / f"agentmerge-crash-{os.getpid()}.txt"
    path.write_text(traceback.format_exc())
    return path


def _red(message: str, code: int) -> int:
    colour = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    for line in message.splitlines() or ["failed"]:
        print(f"\x1b[31merror:\x1b[0m {line}" if colour else f"error: {line}", file=sys.stderr)
    return code


def _print(value: Any, as_json: bool, text: str | None = None) -> None:
    print(json.dumps(value, indent=2) if as_json or text is None else text)


def _overrides(**given: Any) -> dict[str, Any]:
    """Options that were given, under the config keys they set."""
    keys = {
        "search": "search.algorithm",
        "worker": "worker.kind",
        "llm": "agents.llm",
        "prompts": "agents.prompts",
        "graph": "search.graph",
        "seed": "search.seed",
        "max_generations": "search.max_generations",
        "max_evaluations": "budget.max_evaluations",
        "timeout": "budget.timeout_s",
        "population": "search.population",
        "sigma_low": "search.sigma_low",
        "sigma_high": "search.sigma_high",
        "init": "search.init",
        "task_search_path": "task_search_path",
        "batch_size": "worker.batch_size",
        "limit": "limit",
        "trust_remote_code": "worker.trust_remote_code",
    }
    found: dict[str, Any] = {}
    for name, value in given.items():
        if value is None:
            continue
        if isinstance(value, list):
            value = [str(Path(item).absolute()) for item in value]
        elif isinstance(value, Path):
            value = str(value.absolute())
        found[keys[name]] = value
    return found


def _signals(drain: Any, quiet: bool) -> None:
    """First Ctrl-C or TERM: finish the running evaluation and save. Second: stop at once."""

    def stop(number: int, frame: object) -> None:
        if drain.requested:
            print("stopped at once; everything scored is saved", file=sys.stderr, flush=True)
            os._exit(130)
        drain.request()
        if not quiet:
            print(
                "finishing the running evaluation, then saving (once more: stop at once)",
                file=sys.stderr,
                flush=True,
            )

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)


def _driven(start: Any, config: Any, runs_dir: Path, as_json: bool, quiet: bool) -> int:
    """Run ``start(emit, drain)`` with progress and signals, then show how it ended."""
    from agentmerge.cli.render import Progress, summary_text
    from agentmerge.report.summary import run_summary
    from agentmerge.session import Drain, opened

    progress = Progress(config.budget.max_evaluations if config else 0, quiet)
    drain = Drain()
    _signals(drain, quiet)
    row = start(progress, drain)
    with opened(runs_dir) as ledger:
        summary = run_summary(ledger, row)
    _print(summary, as_json, summary_text(summary))
    folder = runs_dir / row.name
    if row.status != "done":
        where = "" if runs_dir == Path("runs") else f" --runs-dir {runs_dir}"
        progress.say(f"saved; go on with: agentmerge resume {row.name}{where}")
        return 0
    if summary["best"] is None:
        why = next((c["failure"] for c in summary["failures"]), f"it stopped by {row.stop_reason}")
        return _red(f"nothing was scored: {why}", 1)
    progress.say(f"best recipe: {folder / 'best.yml'}")
    return 0


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="A genome config, as mergekit-evolve reads it.")],
    name: Annotated[str | None, typer.Option("--name", help="What to call this search.")] = None,
    runs_dir: RunsDir = Path("runs"),
    search: Algorithm = None,
    worker: WorkerKind = None,
    llm: Llm = None,
    prompts: Prompts = None,
    graph: Graph = None,
    seed: Seed = None,
    max_generations: MaxGenerations = None,
    max_evaluations: MaxEvaluations = None,
    timeout: Timeout = None,
    population: Population = None,
    sigma_low: SigmaLow = None,
    sigma_high: SigmaHigh = None,
    init: Init = None,
    task_search_path: TaskPath = None,
    batch_size: BatchSize = None,
    limit: Limit = None,
    trust_remote_code: TrustCode = None,
    allow_benchmark_tasks: AllowBench = False,
    wandb: Wandb = False,
    wandb_project: WandbProject = None,
    wandb_entity: WandbEntity = None,
    as_json: Json = False,
    quiet: Quiet = False,
    storage_path: Annotated[
        Path | None, typer.Option(help="Also write best_config.yaml here.", rich_help_panel=OLD)
    ] = None,
    strategy: Annotated[
        str | None, typer.Option("--strategy", "-s", help="pool, buffered or serial: scheduling.")
    ] = None,
    vllm: Annotated[bool | None, typer.Option("--vllm/--no-vllm")] = None,
    in_memory: Annotated[bool | None, typer.Option("--in-memory/--no-in-memory")] = None,
    num_gpus: Annotated[int | None, typer.Option(min=1)] = None,
    merge_cuda: Annotated[bool | None, typer.Option("--merge-cuda/--no-merge-cuda")] = None,
    allow_crimes: Annotated[bool | None, typer.Option("--allow-crimes/--no-allow-crimes")] = None,
    random_seed: Annotated[int | None, typer.Option()] = None,
    max_generation: Annotated[int | None, typer.Option()] = None,
    max_fevals: Annotated[int | None, typer.Option()] = None,
    max_retries: Annotated[int | None, typer.Option()] = None,
    api_key: Annotated[str | None, typer.Option(help="Refused: use OPENAI_API_KEY.")] = None,
    llm_model: Annotated[str | None, typer.Option()] = None,
    sigma0: Annotated[float | None, typer.Option()] = None,
    save_final_model: Annotated[
        bool | None, typer.Option("--save-final-model/--no-save-final-model")
    ] = None,
    reshard: Annotated[bool | None, typer.Option("--reshard/--no-reshard")] = None,
    force_population_size: Annotated[int | None, typer.Option()] = None,
    load_in_8bit: Annotated[bool | None, typer.Option("--load-in-8bit/--no-load-in-8bit")] = None,
    load_in_4bit: Annotated[bool | None, typer.Option("--load-in-4bit/--no-load-in-4bit")] = None,
) -> int:
    """Search for the best merge of a config's models."""
    from agentmerge import session
    from agentmerge.cli.legacy import Legacy, map_options
    from agentmerge.cli.trackers import tracked
    from agentmerge.config import SearchConfig

    old = Legacy(
        storage_path=storage_path,
        strategy=strategy,
        vllm=vllm,
        in_memory=in_memory,
        num_gpus=num_gpus,
        merge_cuda=merge_cuda,
        allow_crimes=allow_crimes,
        random_seed=random_seed,
        max_generation=max_generation,
        max_fevals=max_fevals,
        max_retries=max_retries,
        api_key=api_key,
        llm_model=llm_model,
        sigma0=sigma0,
        save_final_model=save_final_model,
        reshard=reshard,
        force_population_size=force_population_size,
        load_in_8bit=load_in_8bit,
        load_in_4bit=load_in_4bit,
    )
    mapped = map_options(old)
    given = _overrides(
        search=search,
        worker=worker,
        llm=llm,
        prompts=prompts,
        graph=graph,
        seed=seed,
        max_generations=max_generations,
        max_evaluations=max_evaluations,
        timeout=timeout,
        population=population,
        sigma_low=sigma_low,
        sigma_high=sigma_high,
        init=init,
        task_search_path=task_search_path,
        batch_size=batch_size,
        limit=limit,
        trust_remote_code=trust_remote_code,
    )
    settings = SearchConfig.from_file(config, mapped.overrides | given)
    for line in () if quiet else (*settings.warnings, *mapped.notices):
        print(f"note: {line}", file=sys.stderr)
    final_model = save_final_model is not False
    _check_storage(storage_path, final_model and settings.worker.kind == "fake")

    def start(emit: Any, drain: Any) -> Any:
        with tracked(emit, settings, wandb, wandb_project, wandb_entity, name) as tell:
            row = session.run(
                settings,
                name=name,
                runs_dir=runs_dir,
                emit=tell,
                drain=drain,
                allow_benchmarks=allow_benchmark_tasks,
            )
        _old_outputs(row, runs_dir, storage_path, final_model)
        return row

    return _driven(start, settings, runs_dir, as_json, quiet)


def _check_storage(storage: Path | None, modelless: bool) -> None:
    """Found out before the search is paid for."""
    from agentmerge.errors import UserError

    if storage is None:
        return
    if modelless:
        raise UserError("the fake worker has no model to save; add --no-save-final-model")
    try:
        storage.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--storage-path {storage} cannot be made: {error.strerror}") from None
    if not os.access(storage, os.W_OK):
        raise UserError(f"--storage-path {storage} cannot be written")


def _old_outputs(row: Any, runs_dir: Path, storage: Path | None, final_model: bool) -> None:
    """What the old programs left in --storage-path; the model only once the search is done."""
    from agentmerge import exporting

    best = runs_dir / row.name / "best.yml"
    if storage is None or not best.is_file():
        return
    (storage / "best_config.yaml").write_text(best.read_text())
    if final_model and row.status == "done":
        exporting.export_run(row.name, storage / "final_model", runs_dir=runs_dir, overwrite=True)


@app.command()
def check(
    config: Annotated[Path, typer.Argument(help="A genome config.")],
    runs_dir: RunsDir = Path("runs"),
    task_search_path: TaskPath = None,
    search: Algorithm = None,
    worker: WorkerKind = None,
    llm: Llm = None,
    limit: Limit = None,
    max_evaluations: MaxEvaluations = None,
    population: Population = None,
    allow_benchmark_tasks: AllowBench = False,
    as_json: Json = False,
) -> int:
    """Find every fault before a search starts, and show what it would do. Reads no weights."""
    from agentmerge.check import anchored, plan_of, prepare
    from agentmerge.config import SearchConfig
    from agentmerge.errors import ConfigError
    from agentmerge.ledger import Ledger
    from agentmerge.session import LEDGER, check_resources, settings_hash

    given = _overrides(
        search=search,
        worker=worker,
        llm=llm,
        limit=limit,
        max_evaluations=max_evaluations,
        population=population,
        task_search_path=task_search_path,
    )
    try:
        settings = SearchConfig.from_file(config, given)
        settings = anchored(settings)
        prepared = prepare(settings, allow_benchmarks=allow_benchmark_tasks, fresh=True)
        check_resources(settings)
    except ConfigError as error:
        if as_json:
            _print({"ok": False, "faults": error.faults}, True)
            return 2
        raise
    path = runs_dir / LEDGER
    ledger = Ledger(path) if path.is_file() else None
    plan = plan_of(prepared, ledger, settings_hash(prepared))
    if ledger is not None:
        ledger.close()
    from agentmerge.cli.render import plan_text

    _print({"ok": True, "plan": plan.to_dict()}, as_json, plan_text(plan))
    return 0


@app.command()
def resume(
    name: str,
    runs_dir: RunsDir = Path("runs"),
    max_evaluations: MaxEvaluations = None,
    max_generations: MaxGenerations = None,
    timeout: Timeout = None,
    storage_path: Annotated[
        Path | None, typer.Option(help="Also write best_config.yaml and final_model here.")
    ] = None,
    save_final_model: Annotated[
        bool, typer.Option("--save-final-model/--no-save-final-model")
    ] = True,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Go on with a search where it stopped; limits may be raised."""
    from agentmerge import session
    from agentmerge.config import SearchConfig

    given = _overrides(
        max_evaluations=max_evaluations, max_generations=max_generations, timeout=timeout
    )
    with session.opened(runs_dir) as ledger:
        row = ledger.run(name)
    settings = SearchConfig.from_text(row.config, name, given)
    _check_storage(storage_path, save_final_model and settings.worker.kind == "fake")

    def start(emit: Any, drain: Any) -> Any:
        row = session.resume(name, runs_dir=runs_dir, overrides=given, emit=emit, drain=drain)
        _old_outputs(row, runs_dir, storage_path, save_final_model)
        return row

    return _driven(start, settings, runs_dir, as_json, quiet)


@app.command()
def branch(
    name: str,
    at: Annotated[int, typer.Option("--at", help="The generation to start from.")],
    new: Annotated[str | None, typer.Option("--as", help="What to call the new search.")] = None,
    runs_dir: RunsDir = Path("runs"),
    search: Algorithm = None,
    worker: WorkerKind = None,
    llm: Llm = None,
    prompts: Prompts = None,
    graph: Graph = None,
    seed: Seed = None,
    max_generations: MaxGenerations = None,
    max_evaluations: MaxEvaluations = None,
    timeout: Timeout = None,
    population: Population = None,
    sigma_low: SigmaLow = None,
    sigma_high: SigmaHigh = None,
    task_search_path: TaskPath = None,
    batch_size: BatchSize = None,
    limit: Limit = None,
    trust_remote_code: TrustCode = None,
    wandb: Wandb = False,
    wandb_project: WandbProject = None,
    wandb_entity: WandbEntity = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Start a new search from a generation of another one, with any setting changed."""
    from agentmerge import session
    from agentmerge.cli.trackers import tracked
    from agentmerge.config import SearchConfig

    given = _overrides(
        search=search,
        worker=worker,
        llm=llm,
        prompts=prompts,
        graph=graph,
        seed=seed,
        max_generations=max_generations,
        max_evaluations=max_evaluations,
        timeout=timeout,
        population=population,
        sigma_low=sigma_low,
        sigma_high=sigma_high,
        task_search_path=task_search_path,
        batch_size=batch_size,
        limit=limit,
        trust_remote_code=trust_remote_code,
    )
    with session.opened(runs_dir) as ledger:
        row = ledger.run(name)
    settings = SearchConfig.from_text(row.config, name, given)

    def start(emit: Any, drain: Any) -> Any:
        with tracked(emit, settings, wandb, wandb_project, wandb_entity, new) as tell:
            return session.branch(
                name, at=at, name=new, runs_dir=runs_dir, overrides=given, emit=tell, drain=drain
            )

    return _driven(start, settings, runs_dir, as_json, quiet)


@app.command("list")
def list_runs(runs_dir: RunsDir = Path("runs"), as_json: Json = False) -> int:
    """List the searches."""
    from agentmerge.cli.render import number, table
    from agentmerge.report.summary import run_summary
    from agentmerge.session import opened

    with opened(runs_dir) as ledger:
        found = [run_summary(ledger, row) for row in ledger.runs()]
    rows = [["name", "status", "search", "evaluations", "best"]]
    rows += [
        [
            s["name"],
            s["status"],
            s["search"],
            str(s["evaluations"]["total"]),
            number(s["best"]["score"] if s["best"] else None),
        ]
        for s in found
    ]
    _print(found, as_json, table(rows))
    return 0


@app.command()
def show(name: str, runs_dir: RunsDir = Path("runs"), as_json: Json = False) -> int:
    """Show a search: where it stands, its best, its parents, what the agents cost."""
    from agentmerge.cli.render import summary_text
    from agentmerge.report.summary import run_summary
    from agentmerge.session import opened

    with opened(runs_dir) as ledger:
        summary = run_summary(ledger, ledger.run(name))
    _print(summary, as_json, summary_text(summary))
    return 0


@app.command()
def best(name: str, runs_dir: RunsDir = Path("runs"), as_json: Json = False) -> int:
    """Print the best recipe of a search as mergekit YAML."""
    from agentmerge.report.summary import best_recipe
    from agentmerge.session import opened

    with opened(runs_dir) as ledger:
        found = best_recipe(ledger, ledger.run(name))
    _print(found, as_json, found["recipe"].rstrip())
    return 0


@app.command()
def export(
    name: str,
    to: Annotated[Path, typer.Option("--to", help="Folder of the merged model.")],
    runs_dir: RunsDir = Path("runs"),
    with_: Annotated[
        str, typer.Option("--with", help="agentmerge, or mergekit (may differ: masks, rounding).")
    ] = "agentmerge",
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Score it once from disk.")
    ] = True,
    as_json: Json = False,
) -> int:
    """Write the best merge of a search as a checkpoint that transformers loads."""
    from agentmerge import exporting

    report = exporting.export_run(name, to, runs_dir=runs_dir, engine=with_, verify=verify)
    _print(report, as_json, exporting.report_text(report))
    return 0 if report["equal"] is not False else 1


@app.command()
def evaluate(
    recipe: Annotated[Path, typer.Argument(help="Any mergekit recipe.")],
    config: Annotated[Path, typer.Option("--config", help="Config with models and tasks.")],
    runs_dir: RunsDir = Path("runs"),
    worker: WorkerKind = None,
    task_search_path: TaskPath = None,
    batch_size: BatchSize = None,
    limit: Limit = None,
    as_json: Json = False,
) -> int:
    """Score a mergekit recipe under a config's tasks."""
    from agentmerge import session
    from agentmerge.cli.render import number, table
    from agentmerge.config import SearchConfig
    from agentmerge.recipe import Recipe

    given = _overrides(
        worker=worker, task_search_path=task_search_path, batch_size=batch_size, limit=limit
    )
    settings = SearchConfig.from_file(config, given)
    found = session.evaluate(Recipe.parse(recipe), settings, runs_dir=runs_dir)
    rows = [["task", "value"], *([t, number(v)] for t, v in found["tasks"].items())]
    rows.append(["score", number(found["score"])])
    _print(found, as_json, table(rows))
    return 0


@app.command()
def explain(
    recipe: Annotated[Path, typer.Argument(help="A mergekit recipe.")],
    model: Annotated[
        Path | None, typer.Option("--model", help="A local model whose tensors to explain.")
    ] = None,
    layers: Annotated[
        int | None, typer.Option("--layers", min=1, help="Layers, without a model.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Show the values that a recipe really has, layer by layer and tensor by tensor."""
    from agentmerge.cli.explain import explain_recipe
    from agentmerge.cli.render import table
    from agentmerge.recipe import Recipe

    found = explain_recipe(Recipe.parse(recipe), model, layers)
    _print(found, as_json, table(found["rows"], numbers=False) + f"\nhash {found['hash']}")
    return 0


@app.command()
def methods(as_json: Json = False) -> int:
    """List the merge methods: their parameters, ranges and defaults, who computes them, papers."""
    from agentmerge.cli.render import methods_text
    from agentmerge.methods import METHODS

    found = [method.to_dict() for method in METHODS.values()]
    _print(found, as_json, methods_text(found))
    return 0


@app.command()
def gc(
    runs_dir: RunsDir = Path("runs"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: Json = False,
) -> int:
    """Prune old checkpoints: each search keeps its latest. Results and branches stay."""
    from agentmerge.maintenance import prune_checkpoints

    report = prune_checkpoints(runs_dir, dry_run=dry_run)
    verb = "would free" if dry_run else "freed"
    text = f"{verb} {report['freed_bytes'] / 1e6:.2f} MB in {report['checkpoints']} checkpoints"
    if report["busy"]:
        text += f"; running, left alone: {', '.join(report['busy'])}"
    _print(report, as_json, text)
    return 0


@app.command()
def demo(
    directory: Annotated[Path, typer.Option("--dir", help="Where to put the demo.")] = Path(
        "runs/demo"
    ),
    max_evaluations: MaxEvaluations = None,
    seed: Seed = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Make a small real model family on this machine and search its best merge."""
    from agentmerge.cli.demo import run_demo

    return run_demo(directory, max_evaluations or 100, seed or 0, as_json, quiet)


@app.command()
def doctor(runs_dir: RunsDir = Path("runs"), as_json: Json = False) -> int:
    """Check versions, devices, disk and keys, and say what to do."""
    from agentmerge.maintenance import diagnose

    found = diagnose(runs_dir)
    lines = [f"{'ok ' if f['ok'] else 'NOT'} {f['what']}: {f['detail']}" for f in found]
    lines += [f"    {f['remedy']}" for f in found if not f["ok"] and f["remedy"]]
    _print(found, as_json, "\n".join(lines))
    return 0 if all(f["ok"] for f in found) else 1


@app.callback(invoke_without_command=True)
def version(
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True)
    ] = False,
) -> None:
    if show_version:
        from agentmerge import __version__

        print(__version__)
        raise typer.Exit
