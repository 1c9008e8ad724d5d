"""``watch``: follow a search that runs elsewhere."""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from agentmerge.cli import options
from agentmerge.cli.terminal import show_result


def watch(
    name: options.Search,
    runs_dir: options.RunsDir = Path("runs"),
    every: Annotated[float, typer.Option("--every", min=0.05, help="Seconds between looks.")] = 1.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print every event as a line of JSON.")
    ] = False,
) -> int:
    """Follow a search that runs elsewhere. Reads the results database, until it ends."""
    from agentmerge.cli.live import json_line, progress
    from agentmerge.cli.render import summary_text
    from agentmerge.config import SearchConfig
    from agentmerge.ledger.folder import opened
    from agentmerge.report.board import Follower
    from agentmerge.report.summary import run_status, run_summary

    with opened(runs_dir) as ledger:
        row = ledger.run(name)
        follower = Follower(ledger, row)

        def follow(listener: Any) -> None:
            """Tell the listener what is new until nobody drives the search any more."""
            driven = True
            while driven:
                # Asked first, so that its last events are not missed.
                driven = run_status(ledger, follower.row) == "running"
                for event in follower.news():
                    listener(event.to_json())
                if driven:
                    time.sleep(every)

        if as_json:
            follow(partial(json_line, stream=sys.stdout))
            return 0
        config = SearchConfig.from_text(row.config, row.name)
        with progress(config, runs_dir, quiet=False, as_json=False, clocked=False) as listener:
            follow(listener)
        summary = run_summary(ledger, ledger.run(name))
    show_result(summary, False, summary_text(summary))
    return 0
