"""Serves the live page until it is stopped, or as long as a search goes on. One process, one port,
loopback unless told."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path

from agentmerge.errors import UserError
from agentmerge.ui.actions import Actions
from agentmerge.workers.processes import end, end_with, uninterrupted

LOOPBACK = ("127.0.0.1", "localhost", "::1")
#: How long a stop waits for pages that are open, in seconds.
GRACE_S = 1


def require_packages() -> None:
    """Raises a UserError where they are not installed."""
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"the live page needs packages that are not here ({error}); "
            "pip install 'agentmerge[ui]'"
        ) from None


def listening(host: str, port: int) -> socket.socket:
    """The port, which whoever asks is answered on once ``serve`` begins.

    Raises:
        UserError: it cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(
            f"port {port} of {host} cannot be had: {error.strerror}; name another with --port "
            "(0: any that is free)"
        ) from None


def address(host: str, port: socket.socket) -> str:
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port.getsockname()[1]}/"


def serve(port: socket.socket, host: str, actions: Actions) -> None:
    """Serve the searches of a runs directory until it is told to stop."""
    import uvicorn

    from agentmerge.ui.app import application

    hosts = (*LOOPBACK, host) if is_loopback(host) else ()
    settings = uvicorn.Config(
        application(actions.runs_dir, hosts=hosts, actions=actions),
        log_level="critical",
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=GRACE_S,
    )
    uvicorn.Server(settings).run(sockets=[port])


@contextmanager
def beside(actions: Actions) -> Iterator[str]:
    """Serve on this machine while the block runs, in a process that takes no time of this one and
    ends with it, however that ends; yields the address."""
    require_packages()
    host = LOOPBACK[0]
    with listening(host, 0) as port:
        process = multiprocessing.get_context("spawn").Process(
            target=_serve_beside, args=(port, host, actions.runs_dir, actions.limits), daemon=True
        )
        with uninterrupted():
            process.start()
        try:
            yield address(host, port)
        finally:
            end(process)
            process.join()


def _serve_beside(port: socket.socket, host: str, runs_dir: Path, limits: dict[str, str]) -> None:
    os.setpgid(0, 0)  # Ctrl-C is the search's: whoever looks sees what it still does
    end_with(os.getppid())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    serve(port, host, Actions(runs_dir, limits))


def is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
