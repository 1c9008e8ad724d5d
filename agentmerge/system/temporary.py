"""Temporary folders and drafts of files, in a register: ``gc`` finds what a killed process left.

Each has an entry ``unfinished/ID.json`` in the cache directory, which its process holds locked as
long as it lives, and ID in its own name. It knows paths and locks, not what is made there. Where
the cache cannot be written, what is made is not in the register, and is made all the same.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import socket
import stat
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: The number of an entry, which no other file's name holds by chance.
_KEY = re.compile(r"[0-9a-f]{12}")
#: An entry that says nothing is being written, unless it is older.
_BEING_WRITTEN_S = 3600.0


def cache_dir() -> Path:
    """Where what was made or computed once on this machine is kept."""
    return Path(os.environ.get("AGENTMERGE_CACHE") or Path.home() / ".cache" / "agentmerge")


class Unfinished:
    """A path that this process is about to make; ``close`` removes what is there.

    ``path`` is ``STEM-ID`` in ``parent`` and not made yet. back: where it belongs if the process is
    killed and nothing is there: it was moved away to make room.
    """

    def __init__(
        self, parent: Path, stem: str, *, suffix: str = "", back: Path | None = None
    ) -> None:
        key = uuid.uuid4().hex[:12]
        self.path = parent.absolute() / f"{stem}-{key}{suffix}"
        self._entry = _register() / f"{key}.json"
        self._lock: int | None = None
        body = {"path": str(self.path), "host": socket.gethostname(), "pid": os.getpid()}
        if back is not None:
            body["back"] = str(back.absolute())
        try:
            self._entry.parent.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self._entry, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            os.write(self._lock, json.dumps(body).encode())
        except OSError:
            self._release()

    def close(self) -> None:
        """Remove what is there, and the entry; safe to call twice."""
        _remove(self.path)
        self._release()

    def keep(self) -> None:
        """Leave what is there to the next ``gc``."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _release(self) -> None:
        if self._lock is not None:
            with suppress(OSError):
                self._entry.unlink()
            os.close(self._lock)
            self._lock = None


class TemporaryFolder(Unfinished):
    """A folder for as long as this process lives or until ``close``.

    parent: by default the system's temporary directory. private: others cannot look into it.
    """

    def __init__(
        self, stem: str, parent: Path | str | None = None, *, private: bool = True
    ) -> None:
        super().__init__(Path(tempfile.gettempdir() if parent is None else parent), stem)
        try:
            self.path.mkdir(mode=0o700 if private else 0o777)
        except BaseException:
            self.close()
            raise


@contextmanager
def temporary_folder(stem: str, parent: Path | str | None = None) -> Iterator[Path]:
    """A ``TemporaryFolder`` while the block runs."""
    folder = TemporaryFolder(stem, parent)
    try:
        yield folder.path
    finally:
        folder.close()


def swap_in(fresh: Path, target: Path) -> None:
    """The folder ``fresh`` becomes ``target``; what was there goes once that is done.

    A kill in between leaves the old one to ``gc``, which puts it back.
    """
    try:
        os.replace(fresh, target)  # where nothing is, or an empty folder
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    aside = Unfinished(target.parent, f".{target.name}.replaced", back=target)
    os.rename(target, aside.path)
    try:
        os.rename(fresh, target)
    except BaseException:
        os.rename(aside.path, target)
        aside.close()
        raise
    aside.close()


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A draft beside a file that takes its place, whole, when all went well.

    What is no plain file, as /dev/stdout, is written to as it stands.
    """
    target = Path(os.path.realpath(target))
    if target.exists() and not target.is_file():
        yield target
        return
    draft = Unfinished(target.parent, f".{target.name}", suffix=".tmp")
    try:
        yield draft.path
        os.replace(draft.path, target)
    finally:
        draft.close()


def write_at_once(target: Path, text: str) -> None:
    """``Path.write_text`` in UTF-8 that leaves the old file or the new one, and no half of it."""
    with replacing(target) as draft:
        draft.write_text(text, encoding="utf-8")


def crash_file(text: str) -> Path:
    """A new file that nobody else can have put there, kept until the next ``gc``."""
    file = Unfinished(Path(tempfile.gettempdir()), "agentmerge-crash", suffix=".txt")
    with os.fdopen(os.open(file.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
        stream.write(text)
    file.keep()
    return file.path


@dataclass
class Discarded:
    """What ``discard_unfinished`` did. elsewhere: what processes of other hosts may still use."""

    removed: list[str] = field(default_factory=list)
    put_back: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    freed_bytes: int = 0


def discard_unfinished(*, dry_run: bool, shared: bool, pid: int | None = None) -> Discarded:
    """Remove what processes that are gone left, and put back what they had moved away.

    shared: the cache is on a network, where a lock says nothing of other hosts' processes.
    pid: of the one process of this host whose things go; by default of all.
    """
    done = Discarded()
    for entry in sorted(_register().glob("*.json")):
        # In a cache that several users share, an entry of another one's would name our files.
        if not _KEY.fullmatch(entry.stem) or not is_believed(entry):
            continue
        with suppress(OSError):  # in use, or another gc was here first
            lock = os.open(entry, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                content = os.read(lock, 1 << 16)
                if pid is None or _is_of(content, pid):
                    _discard(entry, content, dry_run, shared, done)
            finally:
                os.close(lock)
    return done


def _is_of(content: bytes, pid: int) -> bool:
    try:
        body: Any = json.loads(content)
        return bool((body["host"], body["pid"]) == (socket.gethostname(), pid))
    except (ValueError, KeyError, TypeError):
        return False


def _discard(entry: Path, content: bytes, dry_run: bool, shared: bool, done: Discarded) -> None:
    try:
        body: Any = json.loads(content)
        path, host, back = Path(body["path"]), body["host"], body.get("back")
    except (ValueError, KeyError, TypeError, AttributeError):
        if time.time() - entry.stat().st_mtime > _BEING_WRITTEN_S and not dry_run:
            entry.unlink()
        return
    ours = path.is_absolute() and entry.stem in path.name
    there = os.path.lexists(path)
    if host != socket.gethostname() and (shared or not there):
        done.elsewhere.append(f"{path} of {host}")
        return
    if there and ours and _is_our_own(path):
        if back is not None and not os.path.lexists(back):
            if not dry_run:
                os.rename(path, back)
            done.put_back.append(str(back))
        else:
            size = size_bytes(path)
            if not dry_run:
                _remove(path)
            done.removed.append(str(path))
            done.freed_bytes += size
    if not dry_run:
        entry.unlink(missing_ok=True)


def size_bytes(path: Path) -> int:
    """Of a file, or of all files in a folder."""
    files = [path, *path.rglob("*")] if path.is_dir() and not path.is_symlink() else [path]
    return sum(found.st_size for file in files if stat.S_ISREG((found := file.lstat()).st_mode))


def is_believed(path: Path) -> bool:
    """Whether what is said in a file or folder of a cache is this user's word: of nobody else, and
    not open to everybody. A shared cache's other users are data."""
    try:
        return _is_our_own(path) and not path.lstat().st_mode & stat.S_IWOTH
    except OSError:
        return False


def _is_our_own(path: Path) -> bool:
    """A folder or a plain file of this user, and no link."""
    found = path.lstat()
    return found.st_uid == os.geteuid() and (
        stat.S_ISDIR(found.st_mode) or stat.S_ISREG(found.st_mode)
    )


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _register() -> Path:
    return cache_dir() / "unfinished"
