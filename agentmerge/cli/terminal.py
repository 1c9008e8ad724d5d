"""What commands share of a terminal: results on stdout, errors in red on stderr, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any


def show_result(value: Any, as_json: bool, text: str | None = None) -> None:
    """The value as JSON, or its text where there is one and JSON was not asked for."""
    print(json.dumps(value, indent=2) if as_json or text is None else text)


def failed(message: str, code: int) -> int:
    """Say why in red, a line a fault; returns ``code``."""
    colour = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    for line in message.splitlines() or ["failed"]:
        print(f"\x1b[31merror:\x1b[0m {line}" if colour else f"error: {line}", file=sys.stderr)
    return code


def signals(drain: Any, quiet: bool) -> None:
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
