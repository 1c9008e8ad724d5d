"""Runs a command, and ends it with all processes of its group once whoever asked for it is gone.

Run as a file, ``python -I leash.py PID COMMAND...``, as the first process of a session of its own;
needs nothing but Python's own library. ``commands.py`` starts it.
"""

import os
import select
import signal
import subprocess
import sys
import threading
import time


def end_after(process: int) -> None:
    """Ends this process's group as soon as ``process``, which started this one, is gone."""
    if hasattr(os, "pidfd_open"):
        try:
            gone = select.poll()
            gone.register(os.pidfd_open(process), select.POLLIN)
            if os.getppid() == process:
                gone.poll()
        except ProcessLookupError:
            pass  # already
    else:  # not Linux
        while os.getppid() == process:
            time.sleep(1)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    asked_by, command = int(sys.argv[1]), sys.argv[2:]
    threading.Thread(target=end_after, args=(asked_by,), daemon=True).start()
    try:
        code = subprocess.Popen(command).wait()
    except OSError as error:
        sys.exit(f"{command[0]} cannot be started: {error.strerror}")
    os._exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
