"""Whether an open database is still the file that lies at its path.

A database that is deleted, moved or replaced goes on working for who has it open, until it is
closed and all is gone. It knows paths and connections, not what is in them.
"""

from __future__ import annotations

import ctypes
import os
import sqlite3
from pathlib import Path

Identity = tuple[int, int]


def identity(path: Path) -> Identity | None:
    """Of the file at a path; None where there is none.

    Raises:
        OSError: it cannot be told, as where a network does not answer.
    """
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_dev, found.st_ino


def is_elsewhere(path: Path, known: Identity | None) -> bool:
    """Whether the file that was at a path is there no more. Where it cannot be told, it is."""
    try:
        return known is not None and identity(path) != known
    except OSError:
        return False


def abandon(conn: sqlite3.Connection) -> None:
    """Never close a connection, not even at exit: SQLite then deletes the journal by name, which
    by now may be another database's."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(conn))


def checkpoints_gone(path: Path) -> str:
    """What is said where the checkpoints' file, with the leases, is no more at its path."""
    return (
        f"{path} was deleted, moved or replaced while the search ran, and with it the lease that "
        "keeps other processes off it; no result is in it: agentmerge resume goes on from the "
        "results database"
    )
