"""What commands share of a terminal: results on stdout, errors in red on stderr, Ctrl-C."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

#: Of an error: what it quotes may be of any length.
_LONGEST_LINE = 2000


class Lossy:
    """A stream that is written to as far as it goes: no search ends because nobody can read what it
    says, as where the terminal is closed or the disk of a log is full."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def open_standard_streams() -> None:
    """None of the three is closed, or else the next file to be opened would be written to as one;
    and stderr may fail."""
    while (free := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(free, True)
    os.close(free)
    sys.stderr = Lossy(sys.stderr or io.StringIO())


def forsake_stdout() -> None:
    """Write nothing to it any more, nor at exit: its reader is gone, or its disk full."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def show_result(value: Any, as_json: bool, text: str | None = None) -> None:
    """The value as JSON, or its text where there is one and JSON was not asked for."""
    print(json.dumps(value, indent=2) if as_json or text is None else text)


def tell_notes(notes: Sequence[str], as_json: bool) -> None:
    """Each note a line on stderr; nothing where the JSON result holds them."""
    for note in () if as_json else notes:
        print(f"note: {note}", file=sys.stderr)


def failed(message: str, code: int) -> int:
    """Say why in red, a line a fault, of a huge one the two ends; returns ``code``."""
    for line in message.splitlines() or ["failed"]:
        if len(line) > _LONGEST_LINE:
            line = f"{line[: _LONGEST_LINE // 2]} [...] {line[-_LONGEST_LINE // 2 :]}"
        print(_coloured("error:", "31", line), file=sys.stderr)
    return code


def warned(line: str) -> str:
    """A line that stands out among notes."""
    return _coloured("warning:", "33;1", line)


def _coloured(word: str, colour: str, rest: str) -> str:
    if sys.stderr.isatty() and "NO_COLOR" not in os.environ:
        word = f"\x1b[{colour}m{word}\x1b[0m"
    return f"{word} {rest}"


def speaker(quiet: bool, as_json: bool) -> Callable[[str], None]:
    """Says a line on stderr: nothing where quiet, an event where a program reads there."""

    def say(line: str) -> None:
        if not quiet:
            text = json.dumps({"event": "note", "text": line}) if as_json else line
            print(text, file=sys.stderr, flush=True)

    return say


def signals(drain: Any, say: Callable[[str], None]) -> list[int]:
    """First Ctrl-C or TERM: finish the running evaluation and save. Second: stop at once.

    Returns a list that is empty until then, and holds the signal's number afterwards.
    """
    caught: list[int] = []

    def stop(number: int, frame: object) -> None:
        if drain.requested:
            say("stopped at once; everything scored is saved")
            os._exit(128 + number)
        caught.append(number)
        drain.request()
        say("finishing the running evaluation, then saving (once more: stop at once)")

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    return caught
