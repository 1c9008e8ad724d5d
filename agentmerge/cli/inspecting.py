"""``check``, ``survey``, ``evaluate``, ``explain``, ``methods``, ``mcp``: configs and recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from agentmerge.cli import options
from agentmerge.cli.terminal import show_result, tell_notes


@options.settings(*options.RUN)
def check(
    config: Annotated[Path, typer.Argument(help="A genome config.")],
    runs_dir: options.RunsDir = Path("runs"),
    *,
    given: dict[str, Any],
    allow_benchmark_tasks: options.AllowBench = False,
    run_code: options.RunCode = False,
    as_json: options.Json = False,
) -> int:
    """Find every fault before a search. Shows what it would do; reads no weights, and runs no code
    that the config names unless told."""
    from agentmerge.config import SearchConfig
    from agentmerge.errors import ConfigError
    from agentmerge.preflight.anchoring import anchored
    from agentmerge.preflight.faults import all_faults
    from agentmerge.preflight.plan import plan_of
    from agentmerge.preflight.prepare import prepare

    def looked_at(settings: SearchConfig) -> Any:
        from agentmerge.session.opening import resource_faults

        settings = anchored(settings)
        return prepare(
            settings,
            allow_benchmarks=allow_benchmark_tasks,
            fresh=True,
            weights=False,
            run_code=run_code,
            known_faults=resource_faults(settings, run_code=run_code),
        )

    try:
        try:
            settings = SearchConfig.from_file(config, given)
        except ConfigError as error:
            raise ConfigError(all_faults(error, looked_at)) from None
        prepared = looked_at(settings)
    except ConfigError as error:
        if as_json:
            show_result({"ok": False, "faults": error.faults}, True)
            return 2
        raise
    from agentmerge.cli.forecast import memory_text
    from agentmerge.cli.render import plan_text
    from agentmerge.ledger import Ledger
    from agentmerge.ledger.folder import LEDGER
    from agentmerge.preflight.facts import settings_hash

    path = runs_dir / LEDGER
    ledger = Ledger(path) if path.is_file() else None
    plan = plan_of(prepared, ledger, settings_hash(prepared))
    if ledger is not None:
        ledger.close()
    text = plan_text(plan) + (f"\n\n{memory_text(plan.memory)}" if plan.memory else "")
    show_result({"ok": True, "plan": plan.to_dict()}, as_json, text)
    return 0


def survey(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Experts (model+adapter too), or a config."),
    ],
    base: Annotated[str | None, typer.Option("--base", help="What they were trained from.")] = None,
    share: Annotated[
        float | None, typer.Option("--share", help="Of each model's numbers to read, up to 1.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option("--picture", help="A heat map of the cosines: .svg or .png.")
    ] = None,
    as_json: options.Json = False,
) -> int:
    """Compare the models of a pool. Alike, damaged, of another form; asks them nothing."""
    from agentmerge.cli.pools import survey_text
    from agentmerge.config import SearchConfig
    from agentmerge.merging.experts import survey_experts
    from agentmerge.preflight.anchoring import anchored
    from agentmerge.report.heatmap import draw_heat_map, refuse_other_pictures

    if picture is not None:
        refuse_other_pictures(picture)
    if len(models) == 1 and Path(models[0]).is_file():
        genome = anchored(SearchConfig.from_file(Path(models[0]), {})).genome
        models, base = list(genome.models), base or genome.base_model
    found = survey_experts(models, base, share)
    if picture is not None:
        draw_heat_map(found, picture)
    show_result(found.to_dict(), as_json, survey_text(found))
    return 0


@options.settings("worker", "task_search_path", "batch_size", "limit")
def evaluate(
    recipe: Annotated[Path, typer.Argument(help="Any mergekit recipe.")],
    config: Annotated[Path, typer.Option("--config", help="Config with models and tasks.")],
    runs_dir: options.RunsDir = Path("runs"),
    *,
    given: dict[str, Any],
    as_json: options.Json = False,
) -> int:
    """Score a mergekit recipe under a config's tasks."""
    from agentmerge.cli.render import number, table
    from agentmerge.config import SearchConfig
    from agentmerge.recipe import Recipe
    from agentmerge.session import driving

    settings = SearchConfig.from_file(config, given)
    found = driving.evaluate(Recipe.parse(recipe), settings, runs_dir=runs_dir)
    tell_notes(found["notes"], as_json)
    rows = [["task", "value"], *([t, number(v)] for t, v in found["tasks"].items())]
    rows.append(["score", number(found["score"])])
    show_result(found, as_json, table(rows))
    return 0


def explain(
    recipe: Annotated[Path, typer.Argument(help="A mergekit recipe.")],
    model: Annotated[
        Path | None, typer.Option("--model", help="A local model whose tensors to explain.")
    ] = None,
    layers: Annotated[
        int | None, typer.Option("--layers", min=1, help="Layers, without a model.")
    ] = None,
    as_json: options.Json = False,
) -> int:
    """Show what a recipe really says. Layer by layer, tensor by tensor."""
    from agentmerge.cli.render import table
    from agentmerge.recipe import Recipe
    from agentmerge.report.explain import explain_recipe

    found = explain_recipe(Recipe.parse(recipe), model, layers)
    tell_notes(found["notes"], as_json)
    text = table(found["rows"], numbers=False) + f"\nhash {found['hash']}"
    if not found["checked"]:
        text += "\nnot checked against its models: not all are here as they would be merged"
    show_result(found, as_json, text)
    return 0


def methods(as_json: options.Json = False) -> int:
    """List the merge methods. Parameters, ranges, defaults, who computes them, papers."""
    from agentmerge.cli.render import methods_text
    from agentmerge.methods import METHODS

    found = [method.to_dict() for method in METHODS.values()]
    show_result(found, as_json, methods_text(found))
    return 0


@options.settings("worker", "task_search_path", "limit", "max_evaluations", "batch_size")
def mcp(
    config: Annotated[Path, typer.Argument(help="A genome config.")],
    name: Annotated[str, typer.Option("--name", help="The run that the tools keep.")] = "mcp",
    runs_dir: options.RunsDir = Path("runs"),
    *,
    given: dict[str, Any],
    allow_benchmark_tasks: options.AllowBench = False,
) -> int:
    """Serve the merging tools over MCP, on stdin and stdout."""
    from agentmerge.config import SearchConfig
    from agentmerge.session.mcp import serve_stdio
    from agentmerge.session.toolkit import MergeToolkit

    settings = SearchConfig.from_file(config, given)
    with MergeToolkit(
        settings, name=name, runs_dir=runs_dir, allow_benchmarks=allow_benchmark_tasks
    ) as toolkit:
        serve_stdio(toolkit.get_tools(), toolkit.stop)
    return 0
