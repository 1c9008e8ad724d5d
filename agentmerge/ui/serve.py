"""Serves the live page until it is stopped. One process, one port, loopback unless told."""

from __future__ import annotations

import socket
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path

from agentmerge.errors import UserError
from agentmerge.ledger.folder import existing_runs

LOOPBACK = ("127.0.0.1", "localhost", "::1")
#: How long a stop waits for pages that are open, in seconds.
GRACE_S = 1


def serve(runs_dir: Path, host: str, port: int, ready: Callable[[str, bool], None]) -> None:
    """Serve the searches of ``runs_dir``. ready: told the address, and whether others reach it.

    Raises:
        NotFound: nothing has run there.
        UserError: the port cannot be had, or the packages are not installed.
    """
    try:
        import uvicorn

        from agentmerge.ui.app import application
    except ImportError as error:
        raise UserError(
            f"the live page needs packages that are not here ({error}); "
            "pip install 'agentmerge[ui]'"
        ) from None
    folder = existing_runs(runs_dir)
    near = _is_loopback(host)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(
            f"port {port} of {host} cannot be had: {error.strerror}; name another with --port "
            "(0: any that is free)"
        ) from None
    with listening:
        shown = f"[{host}]" if family == socket.AF_INET6 else host
        ready(f"http://{shown}:{listening.getsockname()[1]}/", not near)
        settings = uvicorn.Config(
            application(folder, hosts=(*LOOPBACK, host) if near else ()),
            log_level="critical",
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=GRACE_S,
        )
        uvicorn.Server(settings).run(sockets=[listening])


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
