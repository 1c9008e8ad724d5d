"""The command line. ``main`` is the only place that exits the program or prints an error."""

from __future__ import annotations

import sys


def main() -> None:
    """Run a command; every error is one line, exit code 2 for the user's and 1 for a failed run."""
    from agentmerge.cli.terminal import open_standard_streams

    open_standard_streams()
    from agentmerge.cli.app import run_app

    sys.exit(run_app(sys.argv[1:]))
