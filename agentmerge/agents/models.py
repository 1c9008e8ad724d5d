"""Chat models: from "provider:model" to a validated reply, or a reason why there is none.

Knows what servers do with structured output, which faults are worth another try, and how long all
of it may take. Does not know what is asked (proposer, critic, controller) nor what is kept of it
(ledger). Keys come from the environment alone and never appear in a message.
"""

from __future__ import annotations

import contextvars
import json
import os
import queue
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar

from agentmerge.agents.faults import may_pass, reason, redact, retry_after_s, status_of
from agentmerge.agents.prompts import Message
from agentmerge.errors import ModelReplyError, UserError

if TYPE_CHECKING:
    from langchain_core.language_models import BaseChatModel
    from langchain_core.messages import AIMessage

#: Where each provider's key is read from; a provider that is not here looks for its own.
KEY_VARIABLES = {
    "anthropic": "ANTHROPIC_API_KEY",
    "deepseek": "DEEPSEEK_API_KEY",
    "google_genai": "GOOGLE_API_KEY",
    "groq": "GROQ_API_KEY",
    "mistralai": "MISTRAL_API_KEY",
    "openai": "OPENAI_API_KEY",
    "openrouter": "OPENROUTER_API_KEY",
    "xai": "XAI_API_KEY",
}
_ALIASES = {"google": "google_genai", "gemini": "google_genai", "mistral": "mistralai"}

#: How a reply's shape is asked for, from the strictest to what every server understands.
LADDER = ("json_schema", "json_object", "text")
_SHAPE_REFUSED = frozenset({400, 415, 422, 501})
_FIRST_PAUSE_S = 0.5
_MAX_PAUSE_S = 8.0
_MAX_SHOWN = 2_000

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Reply(Generic[R]):
    """A validated reply and what it cost; `attempts` counts requests, failed ones included."""

    parsed: R
    raw_text: str
    tokens_in: int
    tokens_out: int
    latency_s: float
    attempts: int


def resolve_model(
    spec: str,
    *,
    base_url: str | None = None,
    temperature: float | None = None,
    timeout_s: float = 60.0,
) -> BaseChatModel:
    """The chat model of "provider:model"; a bare model name is OpenAI's, or that of `base_url`.

    The client never retries: `AgentModel` does, in one place. Raises UserError for an unknown
    provider, a package that is not installed, or a missing key, naming the variable to set.
    """
    from langchain.chat_models import init_chat_model

    provider, model, base_url = _split(spec, base_url)
    options: dict[str, Any] = {"max_retries": 0, "timeout": timeout_s}
    if temperature is not None:
        options["temperature"] = temperature
    if base_url is not None:
        options["base_url"] = base_url
    variable = KEY_VARIABLES.get(provider)
    if variable is not None and not os.environ.get(variable):
        if base_url is None:
            raise UserError(
                f"{variable} is not set, and {provider}:{model} needs it: export {variable}=..., "
                "or give the base URL of a server that needs no key"
            )
        options["api_key"] = "none"
    if provider == "openai":
        # Without stream_usage a streamed reply has no token counts once there is a base URL.
        options |= {"stream_usage": True, "use_responses_api": False}
    try:
        chat: BaseChatModel = init_chat_model(model, model_provider=provider, **options)
    except ImportError as error:
        fault = f"its package is not installed: {error}"
    except Exception as error:
        fault = str(error)
    else:
        return chat
    raise UserError(f"cannot use {spec!r} as a model: {redact(fault)}")


class AgentModel:
    """One chat model, asked for validated replies in bounded time. May be shared between roles.

    timeout_s: of one request. max_retries: further requests after a fault that may pass. All of
    them, pauses and one repair included, take at most ``timeout_s * (max_retries + 1)``.
    """

    def __init__(
        self,
        chat: BaseChatModel,
        *,
        timeout_s: float = 60.0,
        max_retries: int = 2,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.chat = chat
        self.timeout_s = timeout_s
        self.max_retries = max_retries
        self.total_s = timeout_s * (max_retries + 1)
        self.sleep = sleep
        #: The rung of LADDER that the server was found to take; None until it has answered once.
        self.shape: str | None = None if _speaks_openai(chat) else "text"

    @classmethod
    def from_spec(
        cls,
        spec: str | BaseChatModel,
        *,
        base_url: str | None = None,
        temperature: float | None = None,
        timeout_s: float = 60.0,
        max_retries: int = 2,
    ) -> AgentModel:
        """From "provider:model", or around a chat model that is ready. Raises UserError."""
        if isinstance(spec, str):
            spec = resolve_model(
                spec, base_url=base_url, temperature=temperature, timeout_s=timeout_s
            )
        return cls(spec, timeout_s=timeout_s, max_retries=max_retries)

    @property
    def name(self) -> str:
        named = getattr(self.chat, "model_name", None) or getattr(self.chat, "model", None)
        return str(named or self.chat._llm_type)

    def ask(
        self, messages: Sequence[Message], schema: dict[str, Any], parse: Callable[[str], R]
    ) -> Reply[R]:
        """The model's reply, parsed; where `parse` refuses it, the model is shown why, once.

        `parse` raises ModelReplyError with a sentence for the model. What is raised in the end is a
        ModelReplyError too, with the reason and the tokens spent.
        """
        asking = _Asking(self, schema)
        conversation = [dict(message) for message in messages]
        text = asking.text(conversation)
        try:
            parsed = parse(text)
        except ModelReplyError as first:
            conversation += _repair(text, str(first), schema)
            text = asking.text(conversation)
            try:
                parsed = parse(text)
            except ModelReplyError as second:
                asking.fail(f"gave no valid reply in two tries: {second}")
        latency_s = time.monotonic() - asking.started
        spent = (asking.tokens_in, asking.tokens_out)
        return Reply(parsed, text, *spent, latency_s, asking.attempts)


@dataclass
class _Asking:
    """One `ask` under way: what it has cost, and how long it may still take."""

    model: AgentModel
    schema: dict[str, Any]
    started: float = field(default_factory=time.monotonic)
    attempts: int = 0
    retries: int = 0
    tokens_in: int = 0
    tokens_out: int = 0

    def text(self, conversation: Sequence[Message]) -> str:
        """The text of one answered request, after retries and, once a server, the ladder."""
        shape = self.model.shape or LADDER[0]
        while True:
            if self._left_s() <= 0:
                self.fail(f"took longer than {self.model.total_s:g} s")
            try:
                message = self._request(_shaped(conversation, shape, self.schema), shape)
            except Exception as error:
                lower = self._lower(shape, error)
                if lower is not None:
                    shape = lower
                elif self.retries < self.model.max_retries and may_pass(error):
                    self._pause(error)
                else:
                    self.fail(reason(error))
            else:
                self.model.shape = shape
                return self._read(message)

    def fail(self, why: str) -> NoReturn:
        # Not chained: the client's exceptions carry request headers, and so the key.
        raise ModelReplyError(
            f"{self.model.name} {why}", tokens_in=self.tokens_in, tokens_out=self.tokens_out
        ) from None

    def _lower(self, shape: str, error: Exception) -> str | None:
        """The next rung, where a server that never answered yet may only dislike this one."""
        if self.model.shape is not None or status_of(error) not in _SHAPE_REFUSED:
            return None
        lower = LADDER.index(shape) + 1
        return LADDER[lower] if lower < len(LADDER) else None

    def _left_s(self) -> float:
        return self.started + self.model.total_s - time.monotonic()

    def _request(self, messages: list[Message], shape: str) -> AIMessage:
        self.attempts += 1
        chat: Any = self.model.chat
        if shape != "text":
            # Through extra_body, past the client's own parsing: that raises on a reply cut short.
            body = {**(chat.extra_body or {}), "response_format": _format(shape, self.schema)}
            chat = chat.bind(extra_body=body)
        limit_s = min(self.model.timeout_s, self._left_s())
        with warnings.catch_warnings():
            # langchain-openai warns, besides raising, where a server refuses json_schema.
            warnings.simplefilter("ignore")
            answered: AIMessage = _within(limit_s, lambda: chat.invoke(messages))
        return answered

    def _pause(self, error: Exception) -> None:
        pause_s = retry_after_s(error)
        if pause_s is None:
            pause_s = min(_FIRST_PAUSE_S * 2**self.retries, _MAX_PAUSE_S)
        if pause_s >= self._left_s():
            self.fail(reason(error))
        self.retries += 1
        self.model.sleep(pause_s)

    def _read(self, message: AIMessage) -> str:
        usage = message.usage_metadata
        if usage is not None:
            self.tokens_in += usage["input_tokens"]
            self.tokens_out += usage["output_tokens"]
        return str(message.text)


def _split(spec: str, base_url: str | None) -> tuple[str, str, str | None]:
    head, colon, rest = spec.partition(":")
    provider = _ALIASES.get(head, head)
    known = provider in KEY_VARIABLES or provider == "ollama"
    if not head or (known and colon and not rest):
        raise UserError(f"{spec!r} names no model: write provider:model, such as openai:gpt-4o")
    server = base_url or os.environ.get("OPENAI_BASE_URL")
    if colon and known and provider != "openai":
        return provider, rest, base_url
    if colon and (known or not server):
        return provider, rest, server if provider == "openai" else base_url
    # No provider in front: a name such as "llama3:8b" on a server of the user's own.
    return "openai", spec, server


def _speaks_openai(chat: BaseChatModel) -> bool:
    return "openai" in chat._llm_type and hasattr(chat, "extra_body")


def _format(shape: str, schema: dict[str, Any]) -> dict[str, Any]:
    if shape == "json_object":
        return {"type": "json_object"}
    named = {"name": schema["title"], "schema": schema, "strict": True}
    return {"type": "json_schema", "json_schema": named}


def _shaped(conversation: Sequence[Message], shape: str, schema: dict[str, Any]) -> list[Message]:
    """The conversation; the schema is in words where the server is not given it."""
    messages = [dict(message) for message in conversation]
    if shape != "json_schema":
        messages[-1]["content"] += f"\n\n{_schema_in_words(schema)}"
    return messages


def _schema_in_words(schema: dict[str, Any]) -> str:
    plain = json.dumps(schema)
    return f"Answer with one JSON object that fits this JSON schema, and nothing else:\n{plain}"


def _repair(text: str, error: str, schema: dict[str, Any]) -> list[Message]:
    return [
        {"role": "assistant", "content": text[:_MAX_SHOWN] or "(empty)"},
        {"role": "user", "content": f"That was refused. {error}\n\n{_schema_in_words(schema)}"},
    ]


def _within(limit_s: float, call: Callable[[], R]) -> R:
    """The call's result, or TimeoutError; a client's own timeout does not end a slow drip."""
    outcome: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
    context = contextvars.copy_context()

    def work() -> None:
        try:
            outcome.put((True, context.run(call)))
        except BaseException as error:
            outcome.put((False, error))

    threading.Thread(target=work, name="chat-model", daemon=True).start()
    try:
        done, value = outcome.get(timeout=limit_s)
    except queue.Empty:
        raise TimeoutError from None
    if not done:
        raise value
    result: R = value
    return result
