"""A process that works for a search ends with it, also where the search was killed.

Knows processes and no worker. What such a process holds (a device's memory above all) would
otherwise be missing to whoever resumes the search.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.process
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker

#: The name of a thread that goes on with what nobody waits for any more.
GIVEN_UP = "given up"


def end_children() -> None:
    """Every process that multiprocessing started here, at once, with what those have started.

    No other thread gets to hear of it in between: none takes it for a loss to be written down.
    """
    children = multiprocessing.active_children()
    sys.setswitchinterval(10)
    for child in children:
        _kill(child)


def end(process: multiprocessing.process.BaseProcess) -> None:
    if process.is_alive():
        _kill(process)


def _kill(process: multiprocessing.process.BaseProcess) -> None:
    with suppress(OSError):
        if process.pid is not None:
            # A worker is the first of its group; another child, or one that begins, is of ours.
            own = os.getpgid(process.pid) == process.pid
            (os.killpg if own else os.kill)(process.pid, signal.SIGKILL)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """What this thread starts inside hears no Ctrl-C until it unblocks it.

    A terminal sends one to all processes that it shows; a process that still imports would answer
    with a traceback, and be missing.
    """
    resource_tracker.ensure_running()  # starting it would unblock the signal again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with(search: int) -> None:
    """End this process, from a thread of its own, once the process ``search`` is gone.

    Its parent too, where that is a process between the two (an engine's, with a process a rank): it
    would otherwise take its time to notice.
    """
    parent = os.getppid()

    def wait() -> None:
        if hasattr(os, "pidfd_open"):
            try:
                descriptor = os.pidfd_open(search)
                gone = select.poll()
                gone.register(descriptor, select.POLLIN)
                gone.poll()
            except ProcessLookupError:
                pass  # already
        else:  # not Linux
            while os.getppid() == parent:
                time.sleep(1)
        if os.getppid() == parent not in (search, 1):
            os.kill(parent, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=wait, name="end-with-search", daemon=True).start()
