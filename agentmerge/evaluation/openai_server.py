"""The live model behind a loopback address that speaks OpenAI's protocol: chat completions and
completions, log-probabilities of prompts included, one request at a time.

Requests wait in a queue until whoever has the model answers them (``Waiting.answer``), so that a
model is asked from its own thread alone. The same request always has the same answer: without a
temperature it is greedy, else sampled by the request's seed. Knows tokens and the protocol; merges,
items and programs are ``served.py``'s.
"""

from __future__ import annotations

import hmac
import json
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import SimpleQueue
from typing import Any, Protocol

from agentmerge.evaluation.rendering import Render

#: Bytes of a request, and prompts in one.
MOST_BODY, MOST_PROMPTS = 16 << 20, 1000
#: Seconds that a connection may be silent.
_IDLE_S = 600
_SEED = 1234


@dataclass(frozen=True, slots=True)
class Sampling:
    """temperature 0 is greedy."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = _SEED


@dataclass(frozen=True, slots=True)
class Traced:
    """A token's log-probability after those before it, and the likeliest there, in nats."""

    own: float
    best: int
    best_own: float


class ServedModel(Protocol):
    """What serving asks of an engine."""

    max_length: int
    #: None where it is not known.
    embedding_rows: int | None

    def tok_encode(self, string: Any, add_special_tokens: bool | None = None) -> Any: ...
    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str: ...
    def continued(
        self, prompt: list[int], max_new: int, stop: Sequence[str], sampling: Sampling
    ) -> tuple[list[int], bool]:
        """(the tokens that follow, whether they end by themselves or at a stop)."""
        ...

    def traced(self, tokens: list[int]) -> list[Traced]:
        """Of each token but the first."""
        ...


class Refused(Exception):
    """An answer in OpenAI's form of errors."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(slots=True)
class Waiting:
    """A request that waits for its answer."""

    chat: bool
    body: Mapping[str, Any]
    reply: Any = None
    refused: Refused | None = None
    done: threading.Event = field(default_factory=threading.Event)

    def answer(self, model: ServedModel, render: Render | None) -> None:
        """Raises what the engine raises; the request then has an error."""
        try:
            asked = _chat(self.body, model, render) if self.chat else _text(self.body, model)
            self.reply = asked.reply(model)
        except Refused as refused:
            self.refused = refused
        except BaseException:
            self.refused = Refused(500, "the model could not be asked")
            raise
        finally:
            self.done.set()


class Server:
    """A context in which the address is there. name: the model's, which requests have to say.

    waiting: where requests go; None is for whoever else waits there.
    """

    def __init__(self, name: str, waiting: SimpleQueue[Waiting | None]) -> None:
        self.token = secrets.token_urlsafe(24)
        handler = type("Handler", (_Handler,), {"name": name, "owner": self})
        self.waiting, self.open = waiting, True
        self._http = _Quiet(("127.0.0.1", 0), handler)
        self.base_url = f"http://127.0.0.1:{self._http.server_port}/v1"

    def __enter__(self) -> Server:
        threading.Thread(target=self._http.serve_forever, name="served", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """No request is open after this: what waits is refused."""
        self.open = False
        self._http.shutdown()
        self._http.server_close()
        while not self.waiting.empty():
            if waiting := self.waiting.get():
                waiting.refused = _over()
                waiting.done.set()


class _Quiet(ThreadingHTTPServer):
    daemon_threads, block_on_close = True, False

    def handle_error(self, *_: object) -> None:
        """A client that is gone is nobody's fault."""


def _over() -> Refused:
    return Refused(404, "this model is served no more", "model_not_found")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = _IDLE_S
    name: str
    owner: Server

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""

    def do_GET(self) -> None:
        self._send(self._look)

    def do_POST(self) -> None:
        self._send(self._ask)

    def _send(self, make: Callable[[], Any]) -> None:
        try:
            self._refuse_strangers()
            status, body = 200, make()
        except Refused as refused:
            self.close_connection = True  # its body may not have been read
            kind = "invalid_request_error" if refused.status < 500 else "server_error"
            status = refused.status
            body = {"error": {"message": str(refused), "type": kind, "code": refused.code}}
        said = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def _refuse_strangers(self) -> None:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), self.owner.token.encode()):
            raise Refused(401, "the API key is not this candidate's", "invalid_api_key")

    def _look(self) -> Any:
        if self.path.rstrip("/") != "/v1/models":
            raise Refused(404, f"there is no {self.path[:80]}")
        model = {"id": self.name, "object": "model", "created": 0, "owned_by": "agentmerge"}
        return {"object": "list", "data": [model]}

    def _ask(self) -> Any:
        chat = self.path.rstrip("/") == "/v1/chat/completions"
        if not chat and self.path.rstrip("/") != "/v1/completions":
            raise Refused(404, f"there is no {self.path[:80]}")
        body = self._body()
        if body.get("model") != self.name:
            raise Refused(
                404, f"the model {str(body.get('model'))[:80]!r} does not exist", "model_not_found"
            )
        waiting = Waiting(chat, body)
        self.owner.waiting.put(waiting)
        while not waiting.done.wait(0.5):
            if not self.owner.open:
                raise _over()
        if waiting.refused:
            raise waiting.refused
        return {"id": "agentmerge", "created": 0, "model": self.name, **waiting.reply}

    def _body(self) -> Mapping[str, Any]:
        size = self.headers.get("Content-Length", "")
        if not size.isdigit() or int(size) > MOST_BODY:
            raise Refused(413, f"a request says its length, of {MOST_BODY >> 20} MB at most")
        try:
            found = json.loads(self.rfile.read(int(size)))
        except (ValueError, RecursionError):
            raise Refused(400, "the request is not JSON") from None
        if not isinstance(found, dict):
            raise Refused(400, "the request must be a JSON object")
        return found


# --- the protocol --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Asked:
    """Prompts as tokens, and what is wanted of each. chat: which of the two forms."""

    chat: bool
    prompts: list[list[int]]
    max_new: int | None
    stop: list[str]
    sampling: Sampling
    echo: bool = False
    logprobs: bool = False

    def reply(self, model: ServedModel) -> dict[str, Any]:
        choices, spent = [], 0
        for index, prompt in enumerate(self.prompts):
            tokens, ended = self._continued(prompt, model)
            spent += len(tokens)
            text = _cut(model.tok_decode(tokens, skip_special_tokens=True), self.stop)
            choice: dict[str, Any] = {
                "index": index,
                "finish_reason": "stop" if ended else "length",
                "logprobs": None,
            }
            if self.chat:
                choice["message"] = {"role": "assistant", "content": text}
            else:
                choice["text"] = model.tok_decode(prompt) + text if self.echo else text
                if self.logprobs:
                    choice["logprobs"] = self._logprobs(prompt, tokens, model)
            choices.append(choice)
        read = sum(map(len, self.prompts))
        usage = {
            "prompt_tokens": read, "completion_tokens": spent, "total_tokens": read + spent,
        }  # fmt: skip
        kind = "chat.completion" if self.chat else "text_completion"
        return {"object": kind, "choices": choices, "usage": usage}

    def _continued(self, prompt: list[int], model: ServedModel) -> tuple[list[int], bool]:
        from agentmerge.evaluation.tokens import MAX_GEN_TOKS  # needs lm-eval

        room = model.max_length - len(prompt)
        max_new = min(MAX_GEN_TOKS, room) if self.max_new is None else self.max_new
        if not prompt or max_new > room or room < 1:
            raise Refused(
                400,
                f"{len(prompt)} tokens of prompt and {max_new} of answer do not fit into a "
                f"context of {model.max_length}",
                "context_length_exceeded",
            )
        return model.continued(prompt, max_new, self.stop, self.sampling) if max_new else ([], True)

    def _logprobs(
        self, prompt: list[int], tokens: list[int], model: ServedModel
    ) -> dict[str, list[Any]]:
        rows: list[Traced | None] = [None, *model.traced([*prompt, *tokens][: model.max_length])]
        whole = [*prompt, *tokens][: len(rows)]
        first = 0 if self.echo else len(prompt)
        return {
            "tokens": [_shown(token, model) for token in whole[first:]],
            "token_logprobs": [row and row.own for row in rows[first:]],
            "top_logprobs": [row and _top(row, token, model)
                             for row, token in zip(rows[first:], whole[first:], strict=True)],
            "text_offset": [],
        }  # fmt: skip


def _shown(token: int, model: ServedModel) -> str:
    return model.tok_decode([token], skip_special_tokens=False)


def _top(row: Traced, token: int, model: ServedModel) -> dict[str, float]:
    """The likeliest token; under a name of its own where two read alike."""
    if row.best == token:
        return {_shown(token, model): row.own}
    return {_shown(row.best, model): row.best_own}


def _cut(text: str, stops: Sequence[str]) -> str:
    return text[: min([place for stop in stops if (place := text.find(stop)) >= 0], default=None)]


def _text(body: Mapping[str, Any], model: ServedModel) -> _Asked:
    given = body.get("prompt")
    several = isinstance(given, list) and not all(type(part) is int for part in given)
    prompts = given if several else [given]
    if not prompts or len(prompts) > MOST_PROMPTS:
        raise Refused(400, f"prompt has none, or more than {MOST_PROMPTS}")
    tokens = []
    for prompt in prompts:
        if isinstance(prompt, str):
            tokens.append(list(model.tok_encode(prompt)))
        elif isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
            tokens.append(_known(prompt, model))
        else:
            raise Refused(400, "prompt must be text, tokens, or a list of either")
    logprobs = body.get("logprobs")
    if logprobs not in (None, 0, 1, False):
        raise Refused(400, "logprobs may be 1: the token's own and the likeliest one's are given")
    return _Asked(
        False, tokens, _number(body, "max_tokens", 16, 0, whole=True), _stop(body),
        _sampling(body), _switch(body, "echo"), logprobs is not None and logprobs is not False,
    )  # fmt: skip


def _known(prompt: list[int], model: ServedModel) -> list[int]:
    rows = model.embedding_rows
    if min(prompt) < 0 or (rows is not None and max(prompt) >= rows):
        raise Refused(400, "prompt has a token that the model does not know")
    return prompt


def _chat(body: Mapping[str, Any], model: ServedModel, render: Render | None) -> _Asked:
    if render is None:
        raise Refused(400, "no chat template is applied here; ask /v1/completions")
    for key in ("tools", "functions", "logprobs"):
        if body.get(key):
            raise Refused(400, f"{key} cannot be had here; leave it out")
    if (body.get("response_format") or {"type": "text"}) != {"type": "text"}:
        raise Refused(400, "response_format cannot be had here; leave it out")
    given = body.get("messages")
    if not isinstance(given, list) or not given:
        raise Refused(400, "messages must be a list of messages")
    messages = [_message(message) for message in given]
    try:
        text = render(messages, True)
    except Exception as error:  # a template's own
        why = " ".join(str(error).split())[:200]
        raise Refused(400, f"the chat template refuses these messages: {why}") from None
    key = "max_completion_tokens" if body.get("max_completion_tokens") else "max_tokens"
    return _Asked(
        True, [list(model.tok_encode(text, add_special_tokens=False))],
        _number(body, key, None, 1, whole=True), _stop(body), _sampling(body),
    )  # fmt: skip


def _message(message: Any) -> dict[str, str]:
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" for part in content
    ):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str) or not isinstance(message.get("role"), str):
        raise Refused(400, "a message has a role, and a content that is text")
    role = "system" if message["role"] == "developer" else message["role"]
    return {"role": role, "content": content}


def _sampling(body: Mapping[str, Any]) -> Sampling:
    for key in ("n", "best_of"):
        if body.get(key) not in (None, 1):
            raise Refused(400, f"{key} may be 1: the same request always has the same answer")
    if body.get("stream"):
        raise Refused(400, "stream cannot be had here; leave it out")
    temperature = _number(body, "temperature", 0.0, 0)
    top_p = _number(body, "top_p", 1.0, 0)
    seed = _number(body, "seed", _SEED, 0, whole=True)
    if not 0 < top_p <= 1:
        raise Refused(400, f"top_p {top_p} must be above 0 and at most 1")
    return Sampling(float(temperature), float(top_p), seed)


def _number(
    body: Mapping[str, Any], key: str, default: Any, least: float, *, whole: bool = False
) -> Any:
    value = body.get(key)
    if value is None:
        return default
    right = type(value) is int or (type(value) is float and not whole)
    if not right or not least <= value < 2**63:
        kind = "whole number" if whole else "number"
        raise Refused(400, f"{key} {str(value)[:40]} is no {kind} of at least {least}")
    return value


def _stop(body: Mapping[str, Any]) -> list[str]:
    given = body.get("stop") or []
    stops = [given] if isinstance(given, str) else given
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise Refused(400, "stop must be text, or a list of texts")
    return [stop for stop in stops if stop]


def _switch(body: Mapping[str, Any], key: str) -> bool:
    if body.get(key) not in (None, True, False):
        raise Refused(400, f"{key} must be true or false")
    return bool(body.get(key))
