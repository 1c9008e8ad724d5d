"""What is read from files that others wrote: regular files, of bounded size, count and depth.

A file that is no file (a pipe, a device, a folder) would be read for ever or not at all, and a
short text can stand for a huge value. Whatever opens a config, a recipe, a prompt, a task or a
model's side files does it here. It knows nothing of what a file means; YAML is ``yaml_text.py``.
Also how a long text is cut for those who read it.
"""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from agentmerge.errors import UserError

#: Bytes of a text that people write: a config, a recipe, a prompt, a task, a template.
MOST_TEXT = 1 << 20
#: Bytes of a model's side file; the largest tokenizers in use have 35 million.
MOST_JSON = 1 << 26
#: Values of a JSON text; the largest tokenizers in use have 3 million.
MOST_VALUES = 10_000_000
#: Digits of a whole number in JSON; transformers writes 10^30 where nothing limits a length.
_MOST_DIGITS = 40
#: Descriptors that this process was started with: whoever started it writes what comes.
_INHERITED = ("/dev/stdin", "/dev/fd/", "/proc/self/fd/")
_SEPARATORS = (b",", b"[", b"{")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_bytes(
    path: Path | str, error: type[UserError], *, missing: str = "", most: int = MOST_TEXT
) -> bytes:
    """A file's content; or what the shell pipes in (``<(...)``, /dev/stdin), to its end.

    missing: what to say where there is no file.

    Raises:
        error: there is none, it is no regular file, it has more bytes than ``most``, or it cannot
            be read.
    """
    try:
        # A pipe without a writer would hold up even the opening.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as stream:
            found = os.fstat(descriptor)
            is_readable = stat.S_ISREG(found.st_mode)
            if stat.S_ISFIFO(found.st_mode) and str(path).startswith(_INHERITED):
                is_readable = True
                os.set_blocking(descriptor, True)
            if is_readable:
                content = stream.read(most + 1)
    except FileNotFoundError:
        raise error(missing or f"{path} is missing") from None
    except (OSError, ValueError) as why:  # ValueError: a name with a NUL in it
        if isinstance(why, IsADirectoryError):
            raise error(f"{path} cannot be read: it is a folder; name a file") from None
        raise error(f"{path} cannot be read: {getattr(why, 'strerror', None) or why}") from None
    if not is_readable:
        raise error(f"{path} cannot be read: it is {_kind(found.st_mode)}; name a regular file")
    if len(content) > most:
        raise error(
            f"{path} has more than {most:,} bytes, and no file of its kind has; name the right one"
        )
    return content


def read_text(
    path: Path | str, error: type[UserError], *, missing: str = "", most: int = MOST_TEXT
) -> str:
    """A file's content as UTF-8, with the ends of lines as \\n; raises as ``read_bytes`` does."""
    content = read_bytes(path, error, missing=missing, most=most)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as why:
        raise error(f"{path} cannot be read: it is not UTF-8 text ({why.reason})") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: Path | str, error: type[UserError], *, missing: str = "") -> Any:
    """A file's JSON; raises as ``read_bytes`` and ``parse_json`` do."""
    content = read_bytes(path, error, missing=missing, most=MOST_JSON)
    return parse_json(content, str(path), error)


def parse_json(content: bytes, source: str, error: type[UserError]) -> Any:
    """The value of a JSON text.

    Raises:
        error: it is not JSON, or has too many values, levels or digits.
    """
    if sum(map(content.count, _SEPARATORS)) > MOST_VALUES:
        raise error(f"{source} holds more than {MOST_VALUES:,} values; name the right file")
    try:
        value = json.loads(content, parse_int=_whole)
        if _SURROGATE.search(content):  # half a character, which nothing could write again
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise error(f"{source} cannot be read: its values are nested too deep") from None
    except ValueError as why:
        raise error(f"{source} cannot be read: it is not JSON ({why})") from None
    return value


def refuse_odd_file(path: Path, error: type[UserError], *, most: int | None = None) -> None:
    """Raises ``error`` where other people's code would open no regular file, or a larger one than
    ``most``; a file that is missing is that code's to tell."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return
    if not stat.S_ISREG(found.st_mode):
        raise error(f"{path} is {_kind(found.st_mode)}; put a regular file there")
    if most is not None and found.st_size > most:
        raise error(f"{path} has {found.st_size:,} bytes, more than any of its kind; replace it")


def is_text(value: str) -> bool:
    """Whether it can be written; half a character (an argument of bytes that are no UTF-8, an
    escape of JSON) cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _whole(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a whole number of {len(digits)} digits")
    return int(digits)


def _kind(mode: int) -> str:
    for test, name in (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
    ):
        if test(mode):
            return name
    return "a device"


def both_ends(text: str, most: int) -> str:
    """A text within about a length: its beginning and its end."""
    if len(text) <= most:
        return text
    head = most * 2 // 3
    return f"{text[:head]} … {text[len(text) - (most - head) :]}"
