"""``ui``: the searches of a runs directory in a browser, as they go on."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from agentmerge.cli import options
from agentmerge.cli.terminal import Interrupted, speaker, warned


def ui(
    runs_dir: options.RunsDir = Path("runs"),
    host: Annotated[
        str, typer.Option("--host", help="The address to listen on; 0.0.0.0 lets others in.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="0: any that is free.")
    ] = 8787,
    open_: Annotated[bool, typer.Option("--open", help="Open it in a browser.")] = False,
) -> int:
    """Show the searches live in a browser. Reads the results database, until it is stopped."""
    from agentmerge.ui.serve import serve

    say = speaker(False, False)

    def ready(address: str, reached: bool) -> None:
        say(f"{address} (Ctrl-C stops it)")
        if reached:
            say(warned(f"whoever reaches {host} can read every search of {runs_dir}"))
        if open_:
            import webbrowser

            if not webbrowser.open(address):
                say("no browser could be started; open the address yourself")

    with suppress(Interrupted, KeyboardInterrupt):
        serve(runs_dir, host, port, ready)
    return 0
