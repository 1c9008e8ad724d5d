"""Chat models that say what a script says: a real HTTP server on loopback, and a Python object.

Supported API, for our tests and for those of whoever builds on agentmerge. The server speaks
OpenAI's chat completions, with usage, and can misbehave on demand; it knows nothing of agentmerge.

    with ScriptedServer([Fault("429", retry_after_s=0), {"sigma": 0.1, "thought": ""}]) as server:
        model = resolve_model("openai:scripted", base_url=server.base_url)
"""

from __future__ import annotations

import json
import socket
import threading
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
    "400", "401", "404", "429", "500", "hang", "drip", "cut",
    "empty", "prose", "fenced", "truncated", "wrong_shape", "not_json",
]  # fmt: skip

_ERRORS = {
    "400": (400, "the request is not valid"),
    "401": (401, "Incorrect API key provided"),
    "404": (404, "the model does not exist"),
    "429": (429, "too many requests"),
    "500": (500, "the server had an error"),
}
_CHARS_PER_TOKEN = 4


@dataclass(frozen=True, slots=True)
class Fault:
    """One way in which a server lets its client down.

    400, 401, 404, 429 (`retry_after_s`), 500: an error status.
    hang, drip: silence, or one byte at a time, for `seconds`; then the connection ends.
    cut: the connection ends in the middle of a body. not_json: a web page with status 200.
    wrong_shape: JSON that is no chat completion. empty, prose: such a content.
    fenced, truncated: `content` in a Markdown fence, or its first half with finish_reason length.
    """

    kind: FaultKind
    content: Content = ""
    seconds: float = 30.0
    retry_after_s: float = 0.0


Reply = Content | Fault | Callable[[Body], "Content | Fault"]


@dataclass(frozen=True, slots=True)
class Request:
    """What a client sent; header names are lower case."""

    path: str
    headers: dict[str, str]
    body: Body


class ScriptedServer:
    """Answers each chat request with the next reply; one callable instead answers them all.

    A request beyond the script gets status 410, which no client retries. `shapes` are the
    response_format types that it takes: another one is refused with status 400 and uses up no
    reply. Every request is in `requests`, refused ones too.
    """

    def __init__(
        self,
        replies: Sequence[Reply] | Callable[[Body], Content | Fault],
        *,
        shapes: Sequence[str] = ("json_schema", "json_object", "text"),
    ) -> None:
        self.shapes = tuple(shapes)
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

    def answer(self, request: Request) -> Content | Fault | tuple[int, str]:
        """The reply to one request: a content, a fault, or a status with its message."""
        with self._lock:
            self.requests.append(request)
            shape = request.body.get("response_format", {}).get("type", "text")
            if shape not in self.shapes:
                return 400, f"response_format {shape} is not supported"
            if request.body.get("tools") == []:
                return 400, "tools must not be an empty list"
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
        else:
            self._complete(reply, body)

    def _misbehave(self, fault: Fault, body: Body) -> None:
        kind, text = fault.kind, _text(fault.content)
        if kind in _ERRORS:
            self._error(*_ERRORS[kind], retry_after_s=fault.retry_after_s)
        elif kind in ("hang", "drip"):
            self._stall(fault)
        elif kind == "cut":
            self._head(200, 10_000)
            self.wfile.write(b'{"id": "cut", "choices": [{"mess')
            self._hang_up()
        elif kind == "not_json":
            self._send(200, "<html>It works!</html>", "text/html")
        elif kind == "wrong_shape":
            self._send(200, {"answer": 42})
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

    def _complete(self, content: Content, body: Body, finish_reason: str = "stop") -> None:
        text = _text(content)
        sent = sum(len(str(message.get("content"))) for message in body["messages"])
        usage = {
            "prompt_tokens": sent // _CHARS_PER_TOKEN + 1,
            "completion_tokens": len(text) // _CHARS_PER_TOKEN + 1,
        }
        usage["total_tokens"] = sum(usage.values())
        head = {"id": "scripted", "created": 0, "model": body.get("model", "scripted")}
        message = {"role": "assistant", "content": text}
        if not body.get("stream"):
            choice = {"index": 0, "message": message, "finish_reason": finish_reason}
            whole = {"object": "chat.completion", "choices": [choice], "usage": usage}
            self._send(200, head | whole)
            return
        chunk = head | {"object": "chat.completion.chunk"}
        part = {"index": 0, "delta": message, "finish_reason": finish_reason}
        events = [chunk | {"choices": [part]}, chunk | {"choices": [], "usage": usage}]
        lines = [f"data: {json.dumps(event)}\n\n" for event in events]
        self._send(200, "".join(lines) + "data: [DONE]\n\n", "text/event-stream")

    def _error(self, status: int, message: str, retry_after_s: float | None = None) -> None:
        headers = {}
        if status == 429 and retry_after_s is not None:
            headers["Retry-After"] = f"{retry_after_s:g}"
        error = {"message": message, "type": "scripted", "code": None, "param": None}
        self._send(status, {"error": error}, headers=headers)

    def _send(
        self,
        status: int,
        content: Content,
        kind: str = "application/json",
        headers: dict[str, str] | None = None,
    ) -> None:
        raw = _text(content).encode()
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
