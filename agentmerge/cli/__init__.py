"""The command line. ``main`` is the only place that exits the program or prints an error."""

from __future__ import annotations

import os
import sys
import threading


def main() -> None:
    """Run a command; every error is one line, exit code 2 for the user's and 1 for a failed run."""
    try:
        from agentmerge.cli.terminal import Interrupted, interruptible, open_standard_streams

        open_standard_streams()
        interruptible()
        try:
            from agentmerge.cli.app import run_app
            from agentmerge.system.redaction import redact
        except Interrupted:
            raise KeyboardInterrupt from None
    except KeyboardInterrupt:  # nothing has begun
        print("error: stopped", file=sys.stderr)
        sys.exit(130)

    arguments = sys.argv[1:]
    sys.argv[1:] = map(redact, arguments)  # trackers file the command line
    code = run_app(arguments)
    if threading.active_count() > 1:
        _leave_what_was_given_up(code)
    sys.exit(code)


def _leave_what_was_given_up(code: int) -> None:
    """Exit without waiting for a worker that nobody waits for, where there is one."""
    from agentmerge.workers.processes import GIVEN_UP, end_children

    if any(thread.name == GIVEN_UP for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        end_children()
        os._exit(code)
