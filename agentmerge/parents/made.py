"""The cache of checkpoints that were made from the user's own, each made once on this machine.

A parent that is not a plain checkpoint (a model with an adapter, pickled weights, another
vocabulary) becomes one here, so that every worker, every placement and every export reads the same
files. One that is used is locked until the process ends, and ``discard_made`` leaves it alone. It
knows directories and locks; what is made, and how, is told to it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from agentmerge.errors import UserError
from agentmerge.parents.headers import MADE, files_fingerprint, made_dir, safetensors_files
from agentmerge.parents.writing import directory_at_once, write_json
from agentmerge.system.temporary import is_believed, size_bytes

#: Part of every key: raise it when the way in which something is made changes its bits.
VERSION = 1

#: What a made checkpoint, and a folder that becomes one, is called here.
_KEY, _BECOMING = re.compile(r"[0-9a-f]{24}"), re.compile(r"\.[0-9a-f]{24}-[0-9a-f]+")

#: Open lock files of the checkpoints in use; the system releases them when the process ends.
_in_use: dict[Path, int] = {}


def identity_of(kind: str, ingredients: Sequence[str]) -> str:
    """What a made checkpoint is: how it is made and of what; 64 hex digits."""
    text = json.dumps([VERSION, kind, list(ingredients)])
    return hashlib.sha256(text.encode()).hexdigest()


def made(
    kind: str,
    ingredients: Sequence[str],
    make: Callable[[Path], None],
    identity: str | None = None,
) -> Path:
    """The directory of a made checkpoint, made by ``make(directory)`` where it is not there.

    ingredients: fingerprints and settings that decide the result. identity: its content
        fingerprint, by default that of kind and ingredients; "" for that of its own weights.

    Raises:
        UserError: the cache directory cannot be written, or the disk is full.
        ParentError: whatever ``make`` raises.
    """
    key = identity_of(kind, ingredients)
    target = made_dir() / key[:24]
    _lock(target)
    if not (target / MADE).is_file():
        shutil.rmtree(target, ignore_errors=True)
        with directory_at_once(target) as scratch:
            make(scratch)
            content = files_fingerprint(safetensors_files(scratch))
            marker = {"kind": kind, "made_from": list(ingredients), "content": content}
            marker["identity"] = content if identity == "" else identity or key
            write_json(scratch / MADE, marker)
    elif not is_believed(target):
        raise UserError(
            f"{target} was made by another user, or everybody may write to it, so its weights may "
            "be any; set AGENTMERGE_CACHE to a directory of your own"
        )
    fcntl.flock(_in_use[target], fcntl.LOCK_SH)
    return target


def discard_made(*, dry_run: bool) -> tuple[int, int]:
    """Remove every made checkpoint that no process uses: (how many, bytes). They are made again
    when they are needed."""
    count = freed = 0
    for folder in filter(_is_ours, made_dir().glob("*")):
        lock = _open_lock(folder)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            size = size_bytes(folder)
            if not dry_run:
                shutil.rmtree(folder)
            count, freed = count + 1, freed + size
        except OSError:
            continue  # in use
        finally:
            os.close(lock)
    return count, freed


def _is_ours(path: Path) -> bool:
    """A finished one says so itself; one in the making has a name that nothing else has."""
    if path.is_symlink() or not path.is_dir():
        return False
    finished = _KEY.fullmatch(path.name) and (path / MADE).is_file()
    return bool(finished or _BECOMING.fullmatch(path.name))


def _lock(target: Path) -> None:
    """Hold the lock of ``target``: shared where it is there, else the only one, to make it."""
    lock = _in_use.get(target)
    if lock is None:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            lock = _open_lock(target)
        except OSError as error:
            raise UserError(
                f"{target.parent} cannot be written ({error.strerror}), and parents have to be "
                "made there; set AGENTMERGE_CACHE to another directory"
            ) from None
        _in_use[target] = lock
    fcntl.flock(lock, fcntl.LOCK_SH)
    if not (target / MADE).is_file():
        fcntl.flock(lock, fcntl.LOCK_EX)


def _open_lock(target: Path) -> int:
    """The lock file of a checkpoint, and of the scratch directory (``.KEY-abc``) before it."""
    key = target.name.removeprefix(".").partition("-")[0]
    return os.open(target.with_name(f".{key}.lock"), os.O_RDWR | os.O_CREAT, 0o666)
