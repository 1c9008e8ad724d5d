"""What a LangGraph server's HTTP lets through to the graph: ``http.app`` of ``langgraph.json``.

A browser may be made to speak to a server on the reader's own machine by any page that it shows, so
Host and Origin are looked at first. Then only requests that a search needs are passed on, and of
their bodies only listed keys: with the rest of the platform (the writing of state, crons, stores,
webhooks, deployments, assistants of one's own) a client could do what it may not say. Knows no
search.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agentmerge.session.context import ClientContext

#: Names besides ``localhost`` under which the server is reached, separated by commas.
HOSTS_VARIABLE = "AGENTMERGE_SERVER_HOSTS"
#: A config names models and tasks; there is no honest one near this size.
MAX_BODY_BYTES = 1 << 20

_CONTEXT_KEYS = frozenset(field.name for field in fields(ClientContext))
#: What is no text there; nothing converts a context's values.
_NO_TEXT = {"at": int, "overrides": dict}
#: How a run is told and watched. What is searched is in ``context``; where it goes, and what its
#: state is, is nobody's to say.
_RUN_KEYS = frozenset({
    "assistant_id", "input", "command", "config", "context", "metadata", "stream_mode",
    "stream_subgraphs", "stream_resumable", "interrupt_before", "interrupt_after",
    "multitask_strategy", "if_not_exists", "on_disconnect", "checkpoint_during", "durability",
})  # fmt: skip
_CONFIG_KEYS = frozenset({"tags", "metadata", "recursion_limit", "max_concurrency", "configurable"})
_THREAD_KEYS = frozenset({"thread_id", "metadata", "if_exists"})


class _Route(NamedTuple):
    """keys: of its body, those that may be there; None: any, as it only selects what is shown."""

    methods: str
    path: str
    keys: frozenset[str] | None = None

    def takes(self, method: str, path: str) -> bool:
        return method in self.methods.split() and re.fullmatch(self.path, path) is not None


_ID = "[A-Za-z0-9_-]+"
_ROUTES = (
    _Route("GET", "/|/ok|/info|/docs|/openapi.json"),
    _Route("POST", "/assistants/(search|count)"),
    _Route("GET", f"/assistants/{_ID}(/graph|/schemas|/subgraphs(/{_ID})?)?"),
    _Route("POST", "/threads", _THREAD_KEYS),
    _Route("POST", "/threads/(search|count)"),
    _Route("GET", f"/threads/{_ID}(/state(/{_ID})?|/history|/stream)?"),
    _Route("POST", f"/threads/{_ID}/(history|state/checkpoint)"),
    _Route("POST", f"/threads/{_ID}/runs(/wait|/stream)?", _RUN_KEYS),
    _Route("GET", f"/threads/{_ID}/runs(/{_ID}(/join|/stream)?)?"),
    _Route("POST", f"/threads/{_ID}/runs/{_ID}/cancel"),
)


class _Refused(Exception):
    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status, self.text = status, text


class Gate:
    """ASGI middleware: refuses what is not on the list, in one sentence."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] == "websocket":  # no browser asks before it opens one
            await send({"type": "websocket.close", "code": 1008})
            return
        try:
            body = await self._looked_at(scope, receive)
        except _Refused as refused:
            answer = JSONResponse({"detail": refused.text}, refused.status)
            await answer(scope, receive, send)
            return
        await self.app(scope, receive if body is None else _again(body, receive), send)

    async def _looked_at(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body where it was read."""
        method, path = scope["method"], scope["path"]
        hosts, origins = _header(scope, b"host"), _header(scope, b"origin")
        if path != "/ok":  # a health check comes by any name, and learns nothing
            _look_at_host(hosts)
        for origin in origins:
            _look_at_origin(origin, hosts)
        if method == "OPTIONS":
            return None  # answered by CORS
        asked = "GET" if method == "HEAD" else method
        route = next((route for route in _ROUTES if route.takes(asked, path)), None)
        if route is None:
            raise _Refused(
                403, f"{method} {path} is not offered; docs/security.md lists what a client may do"
            )
        if method in ("GET", "HEAD"):
            return None
        body = await _read(scope, receive)
        _look_at_body(body, route.keys)
        return body


def _header(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key.lower() == name]


def _look_at_host(hosts: list[str]) -> None:
    """A name that is not ours was made to lead here (DNS rebinding); a number cannot be made to."""
    own = {part.strip().lower() for part in os.environ.get(HOSTS_VARIABLE, "").split(",")}
    try:
        (host,) = hosts
        name = urlsplit(f"//{host}").hostname or ""
        if name != "localhost" and name not in own - {""}:
            ipaddress.ip_address(name)
    except ValueError:
        raise _Refused(
            421, f"no server {', '.join(hosts)[:80]!r} is here; ${HOSTS_VARIABLE} lists its names"
        ) from None


def _look_at_origin(origin: str, hosts: list[str]) -> None:
    try:
        own = [urlsplit(origin).netloc] == hosts
    except ValueError:
        own = False
    if not own and origin not in _allowed_origins():
        raise _Refused(
            403, f"pages of {origin[:80]!r} may not speak to this server: see docs/security.md"
        )


def _allowed_origins() -> list[str]:
    """``http.cors.allow_origins`` of langgraph.json, as the platform hands it on."""
    cors = json.loads(os.environ.get("LANGGRAPH_HTTP") or "{}").get("cors") or {}
    return list(cors.get("allow_origins") or ())


async def _read(scope: Scope, receive: Receive) -> bytes:
    too_long = _Refused(413, f"a request has {MAX_BODY_BYTES} bytes at most")
    for said in _header(scope, b"content-length"):
        if len(said) > 15 or (said.isdigit() and int(said) > MAX_BODY_BYTES):
            raise too_long
    found = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise _Refused(400, "the request ended early")
        found += message.get("body", b"")
        if len(found) > MAX_BODY_BYTES:
            raise too_long
        if not message.get("more_body"):
            return bytes(found)


def _again(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that gives the body that was read, and then what still comes."""
    messages: Iterator[Message] = iter([{"type": "http.request", "body": body}])

    async def read() -> Message:
        return next(messages, None) or await receive()

    return read


def _look_at_body(body: bytes, keys: frozenset[str] | None) -> None:
    try:
        said = json.loads(body.decode()) if body.strip() else {}
    except (ValueError, RecursionError):
        raise _Refused(422, "the request is not JSON") from None
    if keys is None:
        return
    if not isinstance(said, dict):
        raise _Refused(422, "the request must be a JSON object")
    _only(said, keys, "")
    config = _mapping(said, "config")
    _only(config, _CONFIG_KEYS, "config.")
    _look_at_context(_mapping(config, "configurable"), "config.configurable.")
    _look_at_context(_mapping(said, "context"), "context.")
    _only(_mapping(said, "command"), frozenset({"resume"}), "command.")
    if said.get("input"):
        raise _Refused(422, "input must be empty: what is searched is said in context")


def _look_at_context(said: dict[str, Any], where: str) -> None:
    _only(said, _CONTEXT_KEYS, where)
    for key in _CONTEXT_KEYS & said.keys():
        kind = _NO_TEXT.get(key, str)
        if said[key] and type(said[key]) is not kind:
            word = {int: "a whole number", dict: "a JSON object", str: "text"}[kind]
            raise _Refused(422, f"{where}{key} must be {word}")


def _mapping(said: dict[str, Any], key: str) -> dict[str, Any]:
    found = said.get(key) or {}
    if not isinstance(found, dict):
        raise _Refused(422, f"{key} must be a JSON object")
    return found


def _only(said: dict[str, Any], keys: frozenset[str], where: str) -> None:
    """Keys that say nothing (null, false, empty) are no matter: clients send them unasked."""
    foreign = sorted(key for key, value in said.items() if value and key not in keys)
    if foreign:
        raise _Refused(
            422, f"{where}{foreign[0][:80]} is not a client's to set; {', '.join(sorted(keys))} are"
        )


app = Starlette(middleware=[Middleware(Gate)])
