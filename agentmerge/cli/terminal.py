"""What commands share of a terminal: results on stdout, errors in red on stderr, Ctrl-C."""

from __future__ import annotations

import io
import json
import os
import re
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from agentmerge.system.waits import waits

#: Of an error: what it quotes may be of any length.
_LONGEST_LINE = 2000
#: Control characters, but for the tabulator, and what turns the direction of text.
_OBEYED = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


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


class Interrupted(BaseException):
    """Ctrl-C in a command that has nothing to save; typer ends on Python's own without a word."""


def interruptible() -> None:
    """Ctrl-C raises ``Interrupted``, except where this was started to hear none."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)


def _interrupt(number: int, frame: object) -> None:
    raise Interrupted


def show_result(value: Any, as_json: bool, text: str | None = None) -> None:
    """The value as JSON, or its text where there is one and JSON was not asked for."""
    print(json.dumps(value, indent=2) if as_json or text is None else text)


def tell_notes(notes: Sequence[str], as_json: bool) -> None:
    """Each note a line on stderr; nothing where the JSON result holds them."""
    for note in () if as_json else notes:
        print(f"note: {plain_line(note)}", file=sys.stderr)


def failed(message: str, code: int) -> int:
    """Say why in red, a line a fault, of a huge one the two ends; returns ``code``."""
    for line in map(plain_line, message.splitlines() or ["failed"]):
        if len(line) > _LONGEST_LINE:
            line = f"{line[: _LONGEST_LINE // 2]} [...] {line[-_LONGEST_LINE // 2 :]}"
        print(_coloured("error:", "31", line), file=sys.stderr)
    return code


def warned(line: str) -> str:
    """A line that stands out among notes."""
    return _coloured("warning:", "33;1", plain_line(line))


def plain_line(line: str) -> str:
    """Without what a terminal would obey: files quoted in a line may hold any characters."""
    return _OBEYED.sub("", line)


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


@contextmanager
def signals(drain: Any, say: Callable[[str], None]) -> Iterator[list[int]]:
    """First Ctrl-C or TERM: say what is waited for, let it finish, and save. Second: stop at once.

    A thread of its own answers, so that whatever the search is in the middle of need not come back
    to Python first. Yields a list that is empty until then, and holds the signal's number then.
    """
    caught: list[int] = []
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def listen() -> None:
        told = ""
        while True:
            ready, _, _ = select.select([reader], [], [], 1.0 if caught else None)
            number = os.read(reader, 1)[0] if ready else 0
            if ready and not number:
                return  # nobody is to be answered any more
            if number and caught:
                say("stopped at once; everything scored is saved")
                _end_at_once(128 + number)
            waited = waits() or "the step that runs"
            if number:
                caught.append(number)
                drain.request()
                say(f"stopping once this is done and saved: {waited} (once more: stop at once)")
            elif _kinds(waited) != _kinds(told):
                say(f"still waiting for {waited}")
            told = waited

    def wake(number: int, frame: object) -> None:
        """Python has written the number to the pipe before it calls this."""

    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, wake) for number in (signal.SIGINT, signal.SIGTERM)}
    listener = threading.Thread(target=listen, name="signals", daemon=True)
    listener.start()
    try:
        yield caught
    finally:
        signal.set_wakeup_fd(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.write(writer, b"\0")
        listener.join()
        os.close(reader)
        os.close(writer)


def _kinds(waited: str) -> str:
    """What is waited for, without for how long."""
    return re.sub(r"\(\d+ s so far\)", "", waited)


def _end_at_once(code: int) -> None:
    """End this process and those that work for it, in whatever they are."""
    from agentmerge.workers.processes import end_children

    end_children()
    if sys.stderr.isatty():
        sys.stderr.write("\x1b[?25h")  # a screen hides the cursor
        sys.stderr.flush()
    os._exit(code)
