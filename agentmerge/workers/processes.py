"""A process that works for a search ends with it, also where the search was killed.

Knows processes and no worker. What such a process holds (a device's memory above all) would
otherwise be missing to whoever resumes the search.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time


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
