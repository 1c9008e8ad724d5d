"""What every answer goes through: who may ask, which headers it has, and faults as one sentence."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agentmerge.errors import AgentmergeError, LedgerError, NotFound, UserError
from agentmerge.system.redaction import redact

#: Scripts, styles and requests of this server alone, and no script inside a page. Plotly's charts
#: bring styles of their own, which is all that "unsafe-inline" lets in.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


#: A request to act has this in a header of its own, which no page of another site can send.
TOKEN = "x-agentmerge-token"
#: Of such a request.
MAX_BODY_BYTES = 10_000


class Guard:
    """Adds the headers, and answers only under ``hosts`` (any, where there are none).

    Another site's name that leads to this machine is refused: its pages could read ours.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        app = self.app if not self.hosts or _host(scope) in self.hosts else _refused
        await app(scope, receive, with_headers)


def _host(scope: Scope) -> str:
    named = next((value for key, value in scope["headers"] if key == b"host"), b"")
    try:
        return urlsplit(f"//{named.decode('latin-1')}").hostname or ""
    except ValueError:
        return ""


_refused = PlainTextResponse(
    "this page answers under localhost only; --host says where else\n", HTTPStatus.FORBIDDEN
)


def refusal(request: Request, known: Callable[[str], bool]) -> str:
    """Why this request may not act, or "" where it may."""
    origin = request.headers.get("origin")
    if not known(request.headers.get(TOKEN, "")):
        return "the token is missing or another server's; `agentmerge ui` printed it"
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        return "pages of another site may not act here"
    return ""


async def body_of(request: Request) -> dict[str, Any]:
    """What a request says: a JSON object.

    Raises:
        UserError: it is none, or too long.
    """
    found = bytearray()
    async for chunk in request.stream():
        found += chunk
        if len(found) > MAX_BODY_BYTES:
            raise UserError(f"a request has {MAX_BODY_BYTES:,} bytes at most")
    try:
        said = json.loads(found.decode())
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        raise UserError("the request must be a JSON object")
    return said


def sentence(error: Exception) -> str:
    """What a person is told of a fault."""
    if isinstance(error, AgentmergeError):
        return str(error)
    first = (str(error).strip().splitlines() or ["no message"])[0]
    return redact(f"unexpected {type(error).__name__}: {first}")


def code_of(error: Exception) -> HTTPStatus:
    match error:
        case NotFound():
            return HTTPStatus.NOT_FOUND
        case LedgerError():
            return HTTPStatus.SERVICE_UNAVAILABLE
        case UserError():
            return HTTPStatus.BAD_REQUEST
    return HTTPStatus.INTERNAL_SERVER_ERROR


def json_text(found: Any) -> str:
    """As JSON that any program reads: what is not finite is null."""
    try:
        return json.dumps(found, allow_nan=False, default=str)
    except ValueError:
        return json.dumps(_finite(found), allow_nan=False, default=str)


def json_answer(found: Any, code: int = HTTPStatus.OK) -> Response:
    return Response(json_text(found) + "\n", code, media_type="application/json")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
