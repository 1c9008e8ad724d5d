"""A user's command in a process of its own: what it is given, what it says, within bounds of time
and size, and ended with all that it started. Knows bytes and no task.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import IO, Any

from agentmerge.errors import TaskError, UserError
from agentmerge.system import leash
from agentmerge.system.code import code_files
from agentmerge.system.redaction import is_secret, redact

#: Bytes of standard output that are read, and of standard error that are kept (its end).
MOST_SAID, MOST_COMPLAINED = 16 << 20, 2000
#: Characters of standard error that a sentence has.
_SHOWN = 300
#: Programs that run a user's files and are none: known by their names, wherever they lie.
_INTERPRETER = re.compile(
    r"(python|pypy|node|deno|bun|ruby|perl|php|lua|julia|Rscript|java|env|uv|(ba|da|z|k|fi)?sh)"
    r"[\d.]*"
)


class Running:
    """A command that was begun; a context that ends it, with its children.

    given: for its standard input. ended: called, by another thread, once it has ended by itself or
    said too much.

    Raises:
        TaskError: the system takes no command of that length.
    """

    def __init__(
        self,
        command: Sequence[str],
        given: bytes,
        env: Mapping[str, str],
        ended: Callable[[], None] = lambda: None,
    ) -> None:
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(leash.__file__), str(os.getpid()), *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=dict(env),
                start_new_session=True,  # Ctrl-C drains the search, and nothing of it is left over
            )
        except OSError as error:
            if error.errno != errno.E2BIG:
                raise
            longest = max(command, key=len)
            raise TaskError(
                f"the command {command[0]!r} is longer than this system takes: it has a word of "
                f"{len(longest)} characters, {longest[:20]!r}...; shorten it ({{items}} can be "
                "left out)"
            ) from None
        self._said, self._complained = bytearray(), bytearray()
        self.too_long = False
        work = (
            partial(self._give, given),
            partial(self._hear, self._said, MOST_SAID),
            partial(self._hear, self._complained, None),
        )
        pipes: Any = (self._process.stdin, self._process.stdout, self._process.stderr)
        self._threads = [
            threading.Thread(target=task, args=(pipe,), name="command", daemon=True)
            for task, pipe in zip(work, pipes, strict=True)
        ]
        self._ended = ended
        self._over = threading.Event()
        for thread in (*self._threads, threading.Thread(target=self._await, daemon=True)):
            thread.start()

    def wait(self, timeout_s: float) -> bool:
        """Whether it has ended by itself in that time, or said too much."""
        return self._over.wait(timeout_s)

    def end(self) -> None:
        """At once, with all processes of its group; what it has said by now is what it said."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for thread in self._threads:
            thread.join(5)  # a child that left the group may hold a pipe

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def code(self) -> int | None:
        """Its exit code; None where it did not end by itself."""
        return self._process.returncode if self._process.returncode != -signal.SIGKILL else None

    @property
    def said(self) -> bytes:
        return bytes(self._said)

    @property
    def complaint(self) -> str:
        """The end of what it wrote to standard error, in a line, cut; without secrets."""
        text = self._complained.decode(errors="replace")
        text = redact(" ".join("".join(c if c.isprintable() else " " for c in text).split()))
        return text if len(text) <= _SHOWN else f"...{text[-_SHOWN:]}"

    def _await(self) -> None:
        self._process.wait()
        self._tell()

    def _tell(self) -> None:
        if not self._over.is_set():
            self._over.set()
            self._ended()

    def _give(self, given: bytes, pipe: IO[bytes]) -> None:
        with suppress(OSError):  # it ended, or wants no more
            pipe.write(given)
        with suppress(OSError):
            pipe.close()

    def _hear(self, kept: bytearray, most: int | None, pipe: Any) -> None:
        """All of it within ``most`` bytes; else its end."""
        with pipe:
            while part := pipe.read1(1 << 16):
                if most is not None and len(kept) + len(part) > most:
                    self.too_long = True
                    self._tell()
                    return
                kept += part
                if most is None:
                    del kept[:-MOST_COMPLAINED]


def open_environment(also: Collection[str] = ()) -> dict[str, str]:
    """This process's environment without variables that hold a secret, but for those named."""
    return {n: value for n, value in os.environ.items() if n in also or not is_secret(n, value)}


def refuse_missing(command: Sequence[str], whose: str) -> None:
    """
    Raises:
        UserError: there is no such program.
    """
    if shutil.which(str(file_in(command[0]) or command[0])) is None:
        raise UserError(f"{whose}: there is no program {command[0]!r}; install it, or correct it")


def file_in(word: str) -> Path | None:
    """The file that a word of a command names, if it is one: code and options are words, too."""
    try:
        path = Path(word).expanduser()
        return path if path.is_file() else None
    except (OSError, RuntimeError, ValueError):  # too long; no such user; no name of a file
        return None


def cut_word(word: str) -> tuple[str, Path | None]:
    """The file that an argument names, by itself or as an option's value, and what stands before
    it: ``--rubric=`` of ``--rubric=FILE``."""
    before = "" if file_in(word) else word[: word.find("=") + 1]
    return before, file_in(word.removeprefix(before))


def described_command(command: Sequence[str]) -> list[object]:
    """A command wherever its files lie: each word, or the content of the file that it names, with
    a Python file's imports. A program that is none of the user's (an interpreter) is its name."""
    program = file_in(command[0])
    users = program is not None and _is_users(command[0], program)
    found = [_content(program) if program and users else Path(command[0]).name]
    for word in command[1:]:
        before, file = cut_word(word)
        if file is None or not os.access(file, os.R_OK):
            found.append(word)
        else:
            found.append([before, _content(file)] if before else _content(file))
    return found


def _content(file: Path) -> object:
    if file.suffix == ".py":
        return code_files(file)
    stat = file.stat()
    return {"": _digest(file, stat.st_mtime_ns, stat.st_size)}


def _is_users(word: str, program: Path) -> bool:
    with suppress(OSError), program.open("rb") as opened:
        script = opened.read(2) == b"#!"
        return os.sep in word and (script or _INTERPRETER.fullmatch(program.name) is None)
    return False


@cache
def _digest(file: Path, mtime_ns: int, size: int) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
