"""``init`` and ``tasks``: from models to a config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from agentmerge.cli import options
from agentmerge.cli.terminal import show_result

#: Tasks that ``tasks search`` prints unless asked for more.
SHOWN = 30

tasks = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Find and write tasks.")

TaskPath = Annotated[
    list[Path] | None,
    typer.Option("--task-search-path", help="Folder of your own task files; repeatable."),
]


def init(
    models: Annotated[list[str], typer.Argument(metavar="MODEL", help="Models to merge.")],
    base: Annotated[str | None, typer.Option("--base", help="The model they come from.")] = None,
    task: Annotated[
        list[str] | None, typer.Option("--task", help="An lm-eval task; repeatable.")
    ] = None,
    to: Annotated[Path, typer.Option("--to", help="The file to write.")] = Path("config.yml"),
    task_search_path: TaskPath = None,
    allow_benchmark_tasks: options.AllowBench = False,
    as_json: options.Json = False,
) -> int:
    """Write a first config for your models. Chosen from their headers; it passes check."""
    from agentmerge.preflight.first_config import write_start

    paths = [str(path.absolute()) for path in task_search_path or []]
    found = write_start(
        models,
        base,
        task or [],
        to,
        task_search_path=paths,
        allow_benchmarks=allow_benchmark_tasks,
    )
    made = found.made_task
    shown = {
        "path": str(found.path),
        "made_task": None if made is None else str(made),
        "dimensions": found.prepared.space.dimensions,
        "max_evaluations": found.prepared.config.budget.max_evaluations,
    }
    lines = [
        f"{to}: {found.prepared.config.genome.merge_method}, {shown['dimensions']} axes, "
        f"{shown['max_evaluations']} evaluations; the file says why"
    ]
    if made is not None:
        lines.append(
            f"{made}: a task to begin with (sums); put your own items there, or use --task"
        )
    lines.append(f"next: agentmerge check {to}, then agentmerge run {to}")
    show_result(shown, as_json, "\n".join(lines))
    return 0


@tasks.command()
def search(
    word: Annotated[str, typer.Argument(help="Part of a task's or data set's name.")],
    task_search_path: TaskPath = None,
    most: Annotated[int, typer.Option("--most", min=1, help="How many to print.")] = SHOWN,
    as_json: options.Json = False,
) -> int:
    """Find lm-eval tasks and the metrics that a config can name."""
    from agentmerge.cli.render import table
    from agentmerge.errors import NotFound
    from agentmerge.evaluation.catalogue import search_tasks

    paths = [str(path) for path in task_search_path or []]
    found = search_tasks(word, paths)
    if not found:
        raise NotFound(f"no task has {word!r} in its name or data set; try a shorter word")
    rows = [["name", "kind", "metrics (- lower is better)", "data"]]
    for entry in found[:most]:
        metrics = [name if higher else f"-{name}" for name, higher in entry.metrics]
        named = _few(metrics, " ") or "-"
        rows.append([entry.name, entry.kind, named, entry.dataset or _few(entry.members)])
    text = table(rows, numbers=False)
    if len(found) > most:
        text += f"\nand {len(found) - most} more (--most {len(found)})"
    show_result([asdict(entry) for entry in found], as_json, text)
    return 0


@tasks.command()
def logickor(
    directory: Annotated[Path, typer.Argument(help="Where the task's folder is written.")],
    as_json: options.Json = False,
) -> int:
    """Write a judged task in LogicKor's shape: Korean, in two turns."""
    from agentmerge.demo.logickor import NAME, write_task

    written = [str(path) for path in write_task(directory)]
    text = "\n".join(
        [
            *written,
            "a few questions of our own are in it; put LogicKor's or yours there",
            f"in a config: task_search_path: [{directory}], and among tasks: "
            f"- {{name: {NAME}, judge: openai:gpt-4o}}",
        ]
    )
    show_result({"files": written}, as_json, text)
    return 0


def _few(names: Sequence[str], between: str = ", ") -> str:
    return between.join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
