"""What this process waits for at the moment, so that whoever asks it to stop hears it.

For people only: nothing is decided by it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_now: dict[object, tuple[str, float]] = {}
_lock = threading.Lock()


@contextmanager
def waiting_for(what: str) -> Iterator[None]:
    """Say that this thread waits for something that may take long."""
    token = object()
    with _lock:
        _now[token] = (what, time.monotonic())
    try:
        yield
    finally:
        with _lock:
            del _now[token]


def waits() -> str:
    """All of it in words, the longest first; empty where nothing takes long."""
    with _lock:
        found = sorted(_now.values(), key=lambda entry: entry[1])
    longest: dict[str, float] = {}
    for what, since in found:
        longest.setdefault(what, since)
    now = time.monotonic()
    return ", ".join(f"{what} ({now - since:.0f} s so far)" for what, since in longest.items())
