"""Chat models that say what a script says: a real HTTP server on loopback, and a Python object.

Supported API, for our tests and for those of whoever builds on agentmerge. The server speaks
OpenAI's chat completions, with usage, and can misbehave on demand; it knows nothing of agentmerge.

    with ScriptedServer([Fault("429", retry_after_s=0), {"sigma": 0.1, "thought": ""}]) as server:
        model = resolve_model("openai:scripted", base_url=server.base_url)
"""

from __future__ import annotations

import gzip
import json
import socket
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

if TYPE_CHECKING:
    from langchain_core.language_models import BaseChatModel

Body = dict[str, Any]
Content = str | Body
FaultKind = Literal[
    "400", "401", "403", "404", "429", "500", "503", "quota", "hang", "drip", "cut", "reset",
    "empty", "prose", "fenced", "truncated", "filtered", "refusal", "null", "no_usage",
    "no_choices", "wrong_shape", "not_json", "usage", "flood", "bomb", "continue", "header",
    "redirect", "raw", "wire",
]  # fmt: skip

_ERRORS = {
    "400": (400, "the request is not valid"),
    "401": (401, "Incorrect API key provided"),
    "403": (403, "this key may not use this model"),
    "404": (404, "the model does not exist"),
    "429": (429, "too many requests"),
    "500": (500, "the server had an error"),
    "503": (503, "the server is overloaded"),
    "quota": (429, "you exceeded your current quota"),
}
_CHARS_PER_TOKEN = 4


def _gzipped(head: bytes, piece: bytes) -> tuple[bytes, bytes]:
    """A gzip stream's beginning, and a piece of it that can be repeated without an end."""
    packer = zlib.compressobj(9, wbits=31)
    begun = packer.compress(head) + packer.flush(zlib.Z_FULL_FLUSH)
    return begun, packer.compress(piece) + packer.flush(zlib.Z_FULL_FLUSH)


_OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
_BOMB = _gzipped(b'{"id": "', b" " * 2**20)
#: What comes first, what is repeated, and the pause between, in seconds.
_ENDLESS = {
    "flood": (_OK + b'\r\n{"id": "', b" " * 2**16, 0.0),
    "bomb": (_OK + b"Content-Encoding: gzip\r\n\r\n" + _BOMB[0], _BOMB[1], 0.0),
    "continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100, 0.0),
    "header": (_OK + b"X-Long: ", b"x", 0.02),
}


@dataclass(frozen=True, slots=True)
class Fault:
    """One way in which a server lets its client down.

    400, 401, 403, 404, 429 (`retry_after_s`: seconds, or any text), 500, 503: an error status; its
    text repeats the client's key. quota: a 429 that no waiting mends.
    hang, drip: silence, or one byte at a time, for `seconds`; then the connection ends.
    cut, reset: the connection ends in the middle of a body, or before one.
    not_json: a web page with status 200. wrong_shape, no_choices: JSON that is no chat completion,
    or one without an answer. empty, null, prose, refusal: such a content.
    fenced: `content` in a Markdown fence. truncated: its first half with finish_reason length.
    filtered: finish_reason content_filter. no_usage: `content`, and no word of tokens. usage:
    `content`, and `usage` in the place of what was counted.
    flood, bomb, continue: a body without an end, the same in gzip, or "100 Continue" for ever.
    header: a header one byte at a time. All four for `seconds`, if the client stays so long.
    redirect: status 307 to the address `content`. raw: `content` is the body, whatever it is, said
    to be in the Content-Encoding `encoding` (gzip: it is). wire: `content` is all that is sent,
    status and headers too, in Latin-1; then the connection ends.
    """

    kind: FaultKind
    content: Content = ""
    seconds: float = 30.0
    retry_after_s: float | str = 0.0
    usage: Any = None
    encoding: str = ""


@dataclass(frozen=True, slots=True)
class ToolCalls:
    """A reply that asks for tools: (name, arguments), arguments as JSON or as any text."""

    calls: tuple[tuple[str, Content], ...]


Said = Content | Fault | ToolCalls
Reply = Said | Callable[[Body], Said]


@dataclass(frozen=True, slots=True)
class Request:
    """What a client sent; header names are lower case."""

    path: str
    headers: dict[str, str]
    body: Body


class ScriptedServer:
    """Answers each chat request with the next reply; one callable instead answers them all.

    A request beyond the script gets status 410, which no client retries. `shapes` are the
    response_format types that it takes: another one is refused with status `refusal` and uses up no
    reply; so are tools where it takes none, and whatever `refuses` has a message for. Every request
    is in `requests`, refused ones too.
    """

    def __init__(
        self,
        replies: Sequence[Reply] | Callable[[Body], Said],
        *,
        shapes: Sequence[str] = ("json_schema", "json_object", "text"),
        tools: bool = True,
        refusal: int = 400,
        refuses: Callable[[Body], str | None] = lambda body: None,
    ) -> None:
        self.refuses = refuses
        self.refusal = refusal
        self.shapes = tuple(shapes)
        self.tools = tools
        self.requests: list[Request] = []
        self._replies = replies
        self._used = 0
        self._lock = threading.Lock()
        self.closing = threading.Event()
        self._http = _Server(self)

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def __enter__(self) -> Self:
        # A short poll: shutting down waits for the end of one.
        serve = {"poll_interval": 0.01}
        threading.Thread(target=self._http.serve_forever, kwargs=serve, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.closing.set()
        self._http.shutdown()
        self._http.server_close()

    def answer(self, request: Request) -> Said | tuple[int, str]:
        """The reply to one request: a content, a fault, or a status with its message."""
        with self._lock:
            self.requests.append(request)
            shape = request.body.get("response_format", {}).get("type", "text")
            if shape not in self.shapes:
                return self.refusal, f"response_format {shape} is not supported"
            if request.body.get("tools") == [] and request.path.endswith("/chat/completions"):
                return self.refusal, "tools must not be an empty list"
            if "tools" in request.body and not self.tools:
                return self.refusal, "tools are not supported"
            why = self.refuses(request.body)
            if why is not None:
                return self.refusal, why
            if callable(self._replies):
                return self._replies(request.body)
            if self._used >= len(self._replies):
                return 410, f"the script has only {len(self._replies)} replies"
            reply = self._replies[self._used]
            self._used += 1
        return reply(request.body) if callable(reply) else reply


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, script: ScriptedServer) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script = script

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gave up is part of the script."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""

    def do_GET(self) -> None:
        self._send(200, {"object": "list", "data": [{"id": "scripted", "object": "model"}]})

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = json.loads(self.rfile.read(length))
        headers = {name.lower(): value for name, value in self.headers.items()}
        reply = self.server.script.answer(Request(self.path, headers, body))
        if isinstance(reply, tuple):
            self._error(*reply)
        elif isinstance(reply, Fault):
            self._misbehave(reply, body)
        elif isinstance(reply, ToolCalls):
            self._complete("", body, "tool_calls", {"tool_calls": _as_openai(reply)})
        else:
            self._complete(reply, body)

    def _misbehave(self, fault: Fault, body: Body) -> None:
        kind, text = fault.kind, _text(fault.content)
        if kind in _ERRORS:
            status, message = _ERRORS[kind]
            message = f"{message}: {self.headers.get('Authorization', '')}"
            code = "insufficient_quota" if kind == "quota" else None
            self._error(status, message, code, fault.retry_after_s)
        elif kind in ("hang", "drip"):
            self._stall(fault)
        elif kind in _ENDLESS:
            self._pour(kind, fault.seconds)
        elif kind == "redirect":
            self._head(307, 0, headers={"Location": text})
        elif kind == "raw":
            self._send(200, text, headers={"Content-Encoding": fault.encoding or "identity"})
        elif kind == "cut":
            self._head(200, 10_000)
            self.wfile.write(b'{"id": "cut", "choices": [{"mess')
            self._hang_up()
        elif kind == "reset":
            self._hang_up()
        elif kind == "wire":
            self.wfile.write(text.encode("latin-1", "replace"))
            self._hang_up()
        elif kind == "not_json":
            self._send(200, "<html>It works!</html>", "text/html")
        elif kind == "wrong_shape":
            self._send(200, {"answer": 42})
        elif kind == "no_choices":
            self._send(200, {"object": "chat.completion", "model": "scripted", "choices": []})
        elif kind == "null":
            self._complete(text, body, extra={"content": None})
        elif kind == "refusal":
            said = text or "I cannot help with that."
            self._complete("", body, extra={"content": None, "refusal": said})
        elif kind == "filtered":
            self._complete(text[: len(text) // 2], body, finish_reason="content_filter")
        elif kind == "no_usage":
            self._complete(text, body, usage=False)
        elif kind == "usage":
            self._complete(text, body, usage=fault.usage)
        elif kind == "truncated":
            self._complete(text[: len(text) // 2], body, finish_reason="length")
        elif kind == "fenced":
            self._complete(f"Here you are:\n```json\n{text}\n```\nGood luck!", body)
        elif kind == "prose":
            self._complete(text or "I would move towards the second model a little.", body)
        else:
            self._complete("", body)

    def _stall(self, fault: Fault) -> None:
        closing = self.server.script.closing
        if fault.kind == "hang":
            closing.wait(fault.seconds)
        else:
            self._head(200, 10_000)
            for _ in range(int(fault.seconds / 0.05)):
                self.wfile.write(b" ")
                if closing.wait(0.05):
                    break
        self._hang_up()

    def _pour(self, kind: str, seconds: float) -> None:
        """What has no end, until the client has gone."""
        head, piece, pause_s = _ENDLESS[kind]
        self.close_connection = True
        ends = time.monotonic() + seconds
        self.wfile.write(head)
        while time.monotonic() < ends and not self.server.script.closing.wait(pause_s):
            self.wfile.write(piece)

    def _complete(
        self,
        content: Content,
        body: Body,
        finish_reason: str = "stop",
        extra: Body | None = None,
        usage: Any = True,
    ) -> None:
        text = _text(content)
        sent = sum(len(str(message.get("content"))) for message in body["messages"])
        counted = {
            "prompt_tokens": sent // _CHARS_PER_TOKEN + 1,
            "completion_tokens": len(text) // _CHARS_PER_TOKEN + 1,
        }
        counted["total_tokens"] = sum(counted.values())
        tail = {"usage": counted if usage is True else usage} if usage else {}
        head = {"id": "scripted", "created": 0, "model": body.get("model", "scripted")}
        message = {"role": "assistant", "content": text, **(extra or {})}
        if not body.get("stream"):
            choice = {"index": 0, "message": message, "finish_reason": finish_reason}
            whole = {"object": "chat.completion", "choices": [choice], **tail}
            self._send(200, head | whole)
            return
        chunk = head | {"object": "chat.completion.chunk"}
        part = {"index": 0, "delta": message, "finish_reason": finish_reason}
        events = [chunk | {"choices": [part]}, chunk | {"choices": [], **tail}]
        lines = [f"data: {json.dumps(event)}\n\n" for event in events]
        self._send(200, "".join(lines) + "data: [DONE]\n\n", "text/event-stream")

    def _error(
        self,
        status: int,
        message: str,
        code: str | None = None,
        retry_after_s: float | str | None = None,
    ) -> None:
        headers = {}
        if status == 429 and retry_after_s is not None:
            headers["Retry-After"] = str(retry_after_s)
        error = {"message": message, "type": "scripted", "code": code, "param": None}
        self._send(status, {"error": error}, headers=headers)

    def _send(
        self,
        status: int,
        content: Content,
        kind: str = "application/json",
        headers: dict[str, str] | None = None,
    ) -> None:
        raw = _text(content).encode(errors="replace")
        if (headers or {}).get("Content-Encoding") == "gzip":
            raw = gzip.compress(raw)
        self._head(status, len(raw), kind, headers)
        self.wfile.write(raw)

    def _head(
        self,
        status: int,
        length: int,
        kind: str = "application/json",
        headers: dict[str, str] | None = None,
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


def _as_openai(reply: ToolCalls) -> list[Body]:
    return [
        {
            "index": number,
            "id": f"call-{number}",
            "type": "function",
            "function": {"name": name, "arguments": _text(arguments)},
        }
        for number, (name, arguments) in enumerate(reply.calls)
    ]


def _text(content: Content) -> str:
    return content if isinstance(content, str) else json.dumps(content)


def scripted_chat_model(replies: Sequence[Any] | Callable[[Any], Any]) -> BaseChatModel:
    """A chat model without a server, for tests in Python.

    Each reply is a text, a dict (sent as JSON), an AIMessage (tool calls, say), an exception to
    raise, or a function of the messages; or one function answers all. Its `calls` lists the
    messages of each call; beyond the script it raises IndexError.
    """
    from langchain_core.language_models import BaseChatModel
    from langchain_core.messages import AIMessage, BaseMessage
    from langchain_core.outputs import ChatGeneration, ChatResult
    from pydantic import Field

    class ScriptedChatModel(BaseChatModel):
        calls: list[list[BaseMessage]] = Field(default_factory=list)

        @property
        def _llm_type(self) -> str:
            return "scripted"

        def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
            return self

        def _generate(
            self, messages: list[BaseMessage], stop: Any = None, run_manager: Any = None, **_: Any
        ) -> ChatResult:
            self.calls.append(messages)
            reply = replies if callable(replies) else replies[len(self.calls) - 1]
            if callable(reply):
                reply = reply(messages)
            if isinstance(reply, Exception):
                raise reply
            if not isinstance(reply, AIMessage):
                text = _text(reply)
                sent = sum(len(message.text) for message in messages) // _CHARS_PER_TOKEN + 1
                said = len(text) // _CHARS_PER_TOKEN + 1
                usage = {"input_tokens": sent, "output_tokens": said, "total_tokens": sent + said}
                reply = AIMessage(text, usage_metadata=usage)
            return ChatResult(generations=[ChatGeneration(message=reply)])

    return ScriptedChatModel()
