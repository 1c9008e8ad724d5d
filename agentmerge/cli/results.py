"""``list``, ``show``, ``best``, ``export`` and ``report``: what came of searches."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from agentmerge.cli import options
from agentmerge.cli.terminal import show_result, speaker


def list_runs(runs_dir: options.RunsDir = Path("runs"), as_json: options.Json = False) -> int:
    """List the searches."""
    from agentmerge.cli.render import number, table
    from agentmerge.ledger.folder import opened
    from agentmerge.report.summary import run_summary

    with opened(runs_dir) as ledger:
        found = [run_summary(ledger, row) for row in ledger.runs()]
    rows = [["name", "status", "search", "evaluations", "best seen", "answer"]]
    rows += [
        [
            s["name"],
            s["status"],
            s["search"],
            str(s["evaluations"]["total"]),
            number(s["best"]["score"] if s["best"] else None),
            number(s["answer"]["score"] if s["answer"] else None),
        ]
        for s in found
    ]
    show_result(found, as_json, table(rows))
    return 0


def show(
    name: options.Search, runs_dir: options.RunsDir = Path("runs"), as_json: options.Json = False
) -> int:
    """Show where a search stands. Its best, its parents, what the agents cost."""
    from agentmerge.cli.render import summary_text
    from agentmerge.ledger.folder import opened
    from agentmerge.report.summary import run_summary
    from agentmerge.report.utilisation import workers_of

    with opened(runs_dir) as ledger:
        row = ledger.run(name)
        summary = run_summary(ledger, row)
        summary |= workers_of(ledger, row, running=summary["status"] == "running")
    show_result(summary, as_json, summary_text(summary))
    return 0


Point = Annotated[
    int | None, typer.Option("--point", min=1, help="That point of the front, as show has them.")
]
Prefer = Annotated[
    str | None,
    typer.Option(
        "--prefer", help='Of the front, the shortest with "score>=0.8", or the best "tokens<=50".'
    ),
]


def best(
    name: options.Search,
    runs_dir: options.RunsDir = Path("runs"),
    point: Point = None,
    prefer: Prefer = None,
    as_json: options.Json = False,
) -> int:
    """Print the best recipe of a search as mergekit YAML."""
    from agentmerge.ledger.folder import opened
    from agentmerge.report.summary import best_recipe

    with opened(runs_dir) as ledger:
        found = best_recipe(ledger, ledger.run(name), point=point, prefer=prefer)
    show_result(found, as_json, found["recipe"].rstrip())
    return 0


def export(
    name: options.Search,
    to: Annotated[Path, typer.Option("--to", help="Folder of the merged model.")],
    runs_dir: options.RunsDir = Path("runs"),
    with_: Annotated[
        str, typer.Option("--with", help="agentmerge, or mergekit (may differ: masks, rounding).")
    ] = "agentmerge",
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Score it once from disk.")
    ] = True,
    layers: Annotated[
        int | None,
        typer.Option("--layers", min=1, help="Another stack of the answer's table of depths."),
    ] = None,
    point: Point = None,
    prefer: Prefer = None,
    as_: Annotated[
        str, typer.Option("--as", help="model, or adapter: a LoRA adapter of the base.")
    ] = "model",
    rank: Annotated[
        int | None, typer.Option("--rank", min=1, help="With --as adapter, the most it may have.")
    ] = None,
    factors_only: Annotated[
        bool,
        typer.Option(
            "--factors-only", help="With --as adapter: no norm or embedding in it, for vLLM."
        ),
    ] = False,
    as_json: options.Json = False,
) -> int:
    """Write the best merge as a model, with a model card. Plain transformers loads it."""
    from agentmerge.session import export as exporting

    report = exporting.export_run(
        name,
        to,
        runs_dir=runs_dir,
        engine=with_,
        verify=verify,
        layers=layers,
        point=point,
        prefer=prefer,
        form=as_,
        rank=rank,
        factors_only=factors_only,
    )
    show_result(report, as_json, exporting.report_text(report))
    return 0 if report["equal"] is not False or "adapter" in report else 1


def replay(
    name: options.Search,
    runs_dir: options.RunsDir = Path("runs"),
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="Other prompts: where would it differ?")
    ] = None,
    as_json: options.Json = False,
) -> int:
    """Run a search again from what is stored. No model, key or worker is needed."""
    from dataclasses import asdict

    from agentmerge.cli.render import replay_text
    from agentmerge.session.replay import replay as replayed

    found = replayed(name, runs_dir=runs_dir, prompts=prompts)
    show_result(asdict(found), as_json, replay_text(found))
    return 0 if found.identical or prompts is not None else 1


def report(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME", help="The searches to show.", autocompletion=options.searches
        ),
    ],
    to: Annotated[
        Path | None, typer.Option("--to", help="The file; RUNS/NAME/report.html unless given.")
    ] = None,
    open_: Annotated[bool, typer.Option("--open", help="Open it in a browser.")] = False,
    png: Annotated[
        Path | None, typer.Option("--png", help="Also a picture of the best so far (a browser).")
    ] = None,
    runs_dir: options.RunsDir = Path("runs"),
    as_json: options.Json = False,
) -> int:
    """Write an HTML page of searches. Charts, items, agents' words; it needs no network."""
    from agentmerge.ledger.folder import opened
    from agentmerge.report.html import write_report
    from agentmerge.report.picture import take_picture

    with opened(runs_dir) as ledger:
        target = to or runs_dir / ledger.run(names[0]).name / "report.html"
        path = write_report(ledger, names, target)
        if png is not None:
            take_picture(ledger, names, png)
    if open_:
        import webbrowser

        if not webbrowser.open(path.absolute().as_uri()):
            speaker(False, as_json)("no browser could be started; open the file yourself")
    shown = {"path": str(path)} | ({"png": str(png)} if png else {})
    show_result(shown, as_json, "\n".join(shown.values()))
    return 0
