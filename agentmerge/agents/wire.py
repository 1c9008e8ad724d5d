"""What a chat model's server may send, in bytes and in time, and where it may lead.

Binds the HTTP clients of every provider by what they have in common (httpx's hooks), so that no
client needs to be imported. The bounds hold for calls made by ``within``; for others the clients
are as they were. Knows no provider's protocol and nothing of what is asked.
"""

from __future__ import annotations

import contextvars
import inspect
import io
import queue
import socket
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, TypeVar

from agentmerge.agents.faults import ServerFault

#: Of one reply on the wire and as it is read: a long one, streamed, with its reasoning.
MOST_BYTES = 16 * 2**20
#: How far below a chat model its HTTP client is looked for.
_DEPTH = 4

R = TypeVar("R")


class _Exchange:
    """One call of a chat model: the connections that it opened, and what its server did wrong."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._cut = False
        self.fault: ServerFault | None = None

    def opened(self, connection: socket.socket) -> None:
        with self._lock:
            self._sockets.append(connection)
            if self._cut:
                _shut(connection)

    def cut(self) -> None:
        """End every connection, those that are still being made too."""
        with self._lock:
            self._cut = True
            for connection in self._sockets:
                _shut(connection)

    def refuse(self, why: str) -> ServerFault:
        # Kept, because a client makes a lost connection of whatever is raised while it reads.
        self.fault = ServerFault(why)
        return self.fault


_current: contextvars.ContextVar[_Exchange | None] = contextvars.ContextVar(
    "exchange", default=None
)


def within(limit_s: float, call: Callable[[], R]) -> R:
    """The call's result, or TimeoutError, its connections cut: a client's own timeout does not end
    a slow drip.

    Raises:
        ServerFault: the server sent too much, or led elsewhere.
    """
    outcome: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
    exchange = _Exchange()
    context = contextvars.copy_context()
    context.run(_current.set, exchange)

    def work() -> None:
        try:
            outcome.put((True, context.run(call)))
        except BaseException as error:
            outcome.put((False, error))

    threading.Thread(target=work, name="chat-model", daemon=True).start()
    try:
        done, value = outcome.get(timeout=limit_s)
    except queue.Empty:
        exchange.cut()
        raise TimeoutError from None
    if not done:
        raise exchange.fault or value
    result: R = value
    return result


def bind(chat: Any) -> None:
    """Bind the HTTP clients of a chat model; one that speaks no HTTP is left alone."""
    for client in _clients(chat, _DEPTH):
        if hasattr(client, "mount"):
            through = _over_httpx()
            client.mount("https://", through)
            client.mount("http://", through)
        else:
            _hook(client)


def _clients(holder: Any, depth: int) -> Iterator[Any]:
    if isinstance(getattr(holder, "event_hooks", None), dict):
        if not inspect.iscoroutinefunction(holder.send):  # what is asked here is asked in a thread
            yield holder
        return
    for name in ("client", "_client", "transport", "_session"):
        inner = None
        with suppress(Exception):  # a client that cannot be made says so when it is asked
            inner = getattr(holder, name, None)
        if name == "_session" and hasattr(inner, "mount"):
            yield inner
        elif inner is not None and depth:
            yield from _clients(inner, depth - 1)


def _hook(client: Any) -> None:
    hooks = client.event_hooks
    if _before not in hooks.get("request", ()):
        client.event_hooks = {
            "request": [*hooks.get("request", ()), _before],
            "response": [*hooks.get("response", ()), _after],
        }


def _before(request: Any) -> None:
    exchange = _current.get()
    if exchange is None:
        return
    request.headers["Accept-Encoding"] = "gzip"
    # A connection of its own: it can be cut.
    request.headers["Connection"] = "close"
    traced = request.extensions.get("trace")

    def trace(event: str, info: dict[str, Any]) -> None:
        if event.endswith((".connect_tcp.complete", ".start_tls.complete")):
            connection = info["return_value"].get_extra_info("socket")
            if connection is not None:
                exchange.opened(connection)
        if traced is not None:
            traced(event, info)

    request.extensions["trace"] = trace


def _after(response: Any) -> None:
    current = _current.get()
    if current is None:
        return
    exchange: _Exchange = current
    if response.has_redirect_location:
        target = response.url.join(response.headers["location"])
        if not _same_server(response.url, target):
            raise exchange.refuse(
                f"sends its callers on to {target.host}, and prompts go to no other server than "
                "the one that was named: if that one is meant, set base_url to it"
            )
    encoding = response.headers.pop("content-encoding", "identity").strip().lower()
    if encoding not in ("gzip", "identity", ""):
        raise exchange.refuse("answered in an encoding that was not asked for")
    stream = response.stream
    base = next(kind for kind in type(stream).__mro__ if kind.__name__ == "SyncByteStream")

    class Bounded(base):  # type: ignore[misc, valid-type]
        def __iter__(self) -> Iterator[bytes]:
            return _bounded(stream, exchange, encoding == "gzip")

        def close(self) -> None:
            stream.close()

    response.stream = Bounded()


def _bounded(chunks: Iterable[bytes], exchange: _Exchange, packed: bool) -> Iterator[bytes]:
    unpacking = zlib.decompressobj(zlib.MAX_WBITS | 16) if packed else None
    left = MOST_BYTES
    for chunk in chunks:
        plain = chunk
        if unpacking is not None:
            try:
                plain = unpacking.decompress(chunk, left + 1)
            except zlib.error:
                raise exchange.refuse("answered with a gzip body that is broken") from None
        left -= max(len(chunk), len(plain))
        if left < 0:
            raise exchange.refuse(f"sent more than {MOST_BYTES // 2**20} MB for one reply")
        yield plain


def _same_server(one: Any, other: Any) -> bool:
    """The same scheme, host and port; or from http to https, both at their own ports."""
    if one.host != other.host:
        return False
    moved = (one.scheme, other.scheme, one.port, other.port)
    return moved == ("http", "https", None, None) or (one.scheme, one.port) == (
        other.scheme,
        other.port,
    )


def _over_httpx() -> Any:
    """Sends what requests was given over httpx, bound like the other clients."""
    import httpx
    from requests.adapters import HTTPAdapter
    from urllib3 import HTTPResponse

    client = httpx.Client(follow_redirects=False)
    _hook(client)

    class Adapter(HTTPAdapter):
        def send(self, request: Any, *given: Any, **options: Any) -> Any:
            timeout = options.get("timeout")
            said = client.request(
                request.method,
                request.url,
                headers=dict(request.headers),
                content=request.body,
                timeout=max(t for t in timeout if t) if isinstance(timeout, tuple) else timeout,
            )
            # The body is whole and plain by now: what was said of its form no longer holds.
            form = {"content-length", "transfer-encoding"}
            raw = HTTPResponse(
                io.BytesIO(said.content),
                headers={name: text for name, text in said.headers.items() if name not in form},
                status=said.status_code,
                reason=said.reason_phrase,
                preload_content=False,
            )
            return self.build_response(request, raw)

    return Adapter()


def _shut(connection: socket.socket) -> None:
    # Not the TLS socket's own: it would let a reader go on in plain text.
    with suppress(OSError):
        socket.socket.shutdown(connection, socket.SHUT_RDWR)
