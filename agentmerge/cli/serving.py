"""``ui``, and ``--ui`` of those that drive a search: searches in a browser, as they go on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
    allow_actions: Annotated[
        bool,
        typer.Option("--allow-actions", help="Let who has its token stop, resume and branch."),
    ] = False,
    open_: Annotated[bool, typer.Option("--open", help="Open it in a browser.")] = False,
) -> int:
    """Show the searches live in a browser. Reads the results database, until it is stopped."""
    from agentmerge.ledger.folder import existing_runs
    from agentmerge.ui import serve
    from agentmerge.ui.actions import Actions

    serve.require_packages()
    say = speaker(False, False)
    actions = Actions(existing_runs(runs_dir), options.limits(), allow_actions)
    with serve.listening(host, port) as listening, suppress(Interrupted, KeyboardInterrupt):
        address = serve.address(host, listening)
        token = f"#token={actions.token}" if allow_actions else ""
        say(f"{address}{token} (Ctrl-C stops it)")
        if not serve.is_loopback(host):
            act = ", and act once they read the token on its way" if allow_actions else ""
            say(warned(f"whoever reaches {host} can read every search of {runs_dir}{act}"))
        if open_:
            import webbrowser

            # Without the token: every user of this machine sees what a browser was started with.
            if not webbrowser.open(address):
                say("no browser could be started; open the address yourself")
        serve.serve(listening, host, actions)
    return 0


@contextmanager
def page_beside(runs_dir: Path, wanted: bool, as_json: bool) -> Iterator[None]:
    """The live page while the block runs, where it is wanted; its address is told even where no
    progress is."""
    if not wanted:
        yield
        return
    from agentmerge.ui.actions import Actions
    from agentmerge.ui.serve import beside

    with beside(Actions(runs_dir, options.limits())) as address:
        speaker(False, as_json)(f"{address} shows it live, until it ends")
        yield
