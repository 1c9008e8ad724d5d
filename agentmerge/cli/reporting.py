"""``report``: searches as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from agentmerge.cli import options
from agentmerge.cli.terminal import show_result, speaker


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
