"""A chat model, asked for validated replies in bounded time; or a reason why there is none.

Knows what servers do with structured output and with tools, which faults are worth another try, and
how long all of it may take. Does not know what is asked (proposer, critic, controller), how a model
is found (providers.py), nor what is kept of it (a ``CallLog``).
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar

from agentmerge.agents.faults import (
    may_pass,
    ran_out_of_time,
    reason,
    refuses,
    refuses_for,
    retry_after_s,
    turns_down,
)
from agentmerge.agents.prices import Price, cost_usd
from agentmerge.agents.prompts import Message
from agentmerge.agents.providers import resolve_model
from agentmerge.agents.replies import Said, as_now, most_tokens, read, tokens_of, typed
from agentmerge.agents.schemas import MAX_REPLY_CHARS
from agentmerge.agents.shapes import (
    SHAPE_WORDS,
    SHAPES,
    SYSTEM_WORDS,
    TOOL_WORDS,
    TOOLS,
    bound,
    has_shapes,
    no_more,
    repair,
    shaped,
    without_system,
)
from agentmerge.agents.wire import bind, within
from agentmerge.contracts.calls import Call, CallLog, Ending, NoLog
from agentmerge.errors import ModelReplyError, ReplyMissing
from agentmerge.system.waits import waiting_for

if TYPE_CHECKING:
    from langchain_core.language_models import BaseChatModel
    from langchain_core.tools import BaseTool

#: The most tokens that a reply is taken to have where nobody set a limit; under a budget of tokens
#: or dollars it is the limit.
ASSUMED_MAX_TOKENS = 8192
_FIRST_PAUSE_S = 0.5
_MAX_PAUSE_S = 8.0
#: Characters of what a tool says that a model is told.
MAX_TOOL_CHARS = 6_000
#: Unanswered questions in a row after which a model is spared some, and the most it is spared.
_PATIENCE, _MOST_SPARED = 3, 24

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


class AgentModel:
    """One chat model, asked for validated replies in bounded time. May be shared between roles.

    chat: None only answers what a log has stored (a replay). timeout_s: of one request.
    max_retries: further requests after a fault that may pass. All of them, pauses, tool calls and
    one repair included, take at most ``timeout_s * (max_retries + 1)``. max_tokens: of one reply.
    price: dollars a million tokens (in, out), None where unknown. name: by default the chat
    model's own.

    A model that left three questions in a row unanswered is spared the next three, then six, ...,
    unless ``spares`` is off.
    """

    def __init__(
        self,
        chat: BaseChatModel | None,
        *,
        timeout_s: float = 60.0,
        max_retries: int = 2,
        max_tokens: int | None = None,
        price: Price | None = None,
        name: str = "",
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if chat is not None:
            bind(chat)
        self.chat = chat
        self.given_name = name
        self.timeout_s = timeout_s
        self.max_retries = max_retries
        self.max_tokens = max_tokens
        self.price = price
        self.total_s = timeout_s * (max_retries + 1)
        self.sleep = sleep
        #: A schema's title -> the one of SHAPES that the server was found to take for it. A server
        #: that takes one schema may refuse another's keywords.
        self.shapes: dict[str, str] = {}
        self.has_shapes = chat is None or has_shapes(chat)
        self.takes_tools = True
        self.takes_system = True
        self.unanswered = 0
        self.spared = 0
        self.spares = True

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
        if self.given_name or self.chat is None:
            return self.given_name or "stored replies"
        named = getattr(self.chat, "model_name", None) or getattr(self.chat, "model", None)
        return str(named or self.chat._llm_type)

    def answered(self, it_did: bool) -> None:
        """A dead server must not cost every generation all of its timeouts."""
        self.unanswered = 0 if it_did else self.unanswered + 1
        if self.spares and self.unanswered >= _PATIENCE:
            doubled = _PATIENCE * 2 ** (self.unanswered - _PATIENCE)
            self.spared = min(doubled, _MOST_SPARED)

    def ask(
        self,
        messages: Sequence[Message],
        schema: dict[str, Any],
        parse: Callable[[str], R],
        *,
        log: CallLog | None = None,
        tools: Sequence[BaseTool] = (),
        probes: int = 0,
        limit_s: float = math.inf,
        rescue: Callable[[str], R] | None = None,
    ) -> Reply[R]:
        """The model's reply, parsed; where `parse` refuses it, the model is shown why, once.

        `parse` raises ModelReplyError with a sentence for the model. tools, probes: what it may
        call before it answers, and how often. limit_s: seconds, where fewer are left than
        `total_s`. rescue: parses what is of use in a reply that was refused twice.

        Raises:
            ModelReplyError: no valid reply, with the reason and the tokens spent.
            BudgetReached, ReplyMissing: as `log` does.
        """
        asking = _Asking(self, schema, parse, log or NoLog(), min(self.total_s, limit_s))
        conversation: list[dict[str, Any]] = [dict(message) for message in messages]
        by_name = {tool.name: tool for tool in tools}
        repaired = False
        while True:
            offered = tools if probes > 0 and self.takes_tools else ()
            call, parsed = asking.send(conversation, offered)
            if parsed is not None:
                return asking.reply(call, parsed)
            if call.tool_calls:
                conversation += _probed(call.tool_calls, by_name, probes)
                probes -= len(call.tool_calls)
                if probes <= 0:
                    conversation.append(no_more(schema))
                continue
            if repaired:
                if rescue is not None:
                    with suppress(ModelReplyError):
                        return asking.reply(call, rescue(call.reply or ""))
                why = f"{self.name} gave no valid reply in two tries: {call.error}"
                asking.fail(why, unanswered=False)
            repaired = True
            conversation += repair(call.reply or "", call.error or "", schema)


@dataclass
class _Asking(Generic[R]):
    """One `ask` under way: what it has cost, and how long it may still take."""

    model: AgentModel
    schema: dict[str, Any]
    parse: Callable[[str], R]
    log: CallLog
    total_s: float
    started: float = field(default_factory=time.monotonic)
    attempts: int = 0
    retries: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    turned_down: bool = False

    def send(
        self, conversation: Sequence[dict[str, Any]], tools: Sequence[BaseTool]
    ) -> tuple[Call, R | None]:
        """The first request that was answered, after retries and, once a server, lower shapes; and
        what its text was parsed to."""
        shape = TOOLS if tools else self._shape()
        while True:
            number, self.attempts = self.attempts, self.attempts + 1
            stored = as_now(self.log.stored(number))
            pause_s = 0.0
            if stored is None:
                call, parsed, pause_s = self._live(conversation, shape, tools)
                self.log.keep(number, call)
                if call.ending in ("answered", "refused"):
                    self.model.answered(True)
            else:
                call, parsed = stored, self._judged(stored)
            self.tokens_in += call.tokens_in
            self.tokens_out += call.tokens_out
            if call.ending == "failed":
                self.fail(call.error or "no reply", unanswered=not self.turned_down)
            elif call.ending == "lower":
                if call.shape == TOOLS:
                    self.model.takes_tools, tools = False, ()
                    shape = self._shape()
                else:
                    shape = SHAPES[SHAPES.index(call.shape) + 1]
            elif call.ending == "no_system":
                self.model.takes_system = False
            elif call.ending == "retry":
                self.retries += 1
                self.model.sleep(pause_s)
            else:
                if call.shape != TOOLS:
                    self.model.shapes[self.schema["title"]] = call.shape
                return call, parsed

    def _shape(self) -> str:
        first = SHAPES[0] if self.model.has_shapes else "text"
        return self.model.shapes.get(self.schema["title"], first)

    def reply(self, call: Call, parsed: R) -> Reply[R]:
        latency_s = time.monotonic() - self.started
        spent = (self.tokens_in, self.tokens_out)
        return Reply(parsed, call.reply or "", *spent, latency_s, self.attempts)

    def fail(self, why: str, unanswered: bool = True) -> NoReturn:
        # Not chained: the client's exceptions carry request headers, and so the key.
        spent = {"tokens_in": self.tokens_in, "tokens_out": self.tokens_out}
        raise ModelReplyError(why, **spent, unanswered=unanswered) from None

    def _judged(self, call: Call) -> R | None:
        if call.reply is None or call.tool_calls:
            return None
        try:
            return self.parse(call.reply)
        except ModelReplyError:
            return None

    def _live(
        self, conversation: Sequence[dict[str, Any]], shape: str, tools: Sequence[BaseTool]
    ) -> tuple[Call, R | None, float]:
        """One request on the wire: (what came of it, what it was parsed to, the pause after it)."""
        model = self.model
        sent = shaped(conversation, shape, self.schema)
        if not model.takes_system:
            sent = without_system(sent)
        if model.spared and self.attempts == 1:
            model.spared -= 1
            why = f"{model.name} was not asked: it left {model.unanswered} questions unanswered"
            return Call(sent, "failed", shape, error=why), None, 0.0
        if self._left_s() <= 0:
            model.answered(False)
            late = f"{model.name} took longer than {self.total_s:g} s"
            return Call(sent, "failed", shape, error=late), None, 0.0
        most_in = most_tokens(sent, self.schema, tools)
        most_out = model.max_tokens or ASSUMED_MAX_TOKENS
        self.log.reserve(most_in, most_out, cost_usd(model.price, most_in, most_out))
        if model.chat is None:
            raise ReplyMissing("a model was not asked this before")
        began = time.monotonic()
        try:
            said = self._request(sent, shape, tools)
        except Exception as error:
            ending, pause_s = self._ending(sent, shape, error)
            self.turned_down = turns_down(error)
            if ending == "failed":
                model.answered(False)
            why = f"{model.name} {reason(error)}"
            latency_s = time.monotonic() - began
            # Nobody answered, but what was asked may have been computed, and be charged.
            lost = (tokens_of(sent), most_out) if ran_out_of_time(error) else (0, 0)
            return (
                Call(sent, ending, shape, error=why, tokens_in=lost[0], tokens_out=lost[1],
                     latency_s=latency_s, cost_usd=cost_usd(model.price, *lost)),
                None,
                pause_s,
            )  # fmt: skip
        paid: dict[str, Any] = {
            "tokens_in": said.tokens[0],
            "tokens_out": said.tokens[1],
            "latency_s": time.monotonic() - began,
            "cost_usd": cost_usd(model.price, *said.tokens),
        }
        # One character more than is read: the stored reply is refused for the same reason.
        text = said.text[: MAX_REPLY_CHARS + 1]
        if said.wanted:
            return Call(sent, "answered", shape, text, said.wanted, **paid), None, 0.0
        try:
            if said.excess:
                raise ModelReplyError(said.excess)
            parsed = self.parse(said.text)
        except ModelReplyError as refused:
            return Call(sent, "refused", shape, text, error=str(refused), **paid), None, 0.0
        return Call(sent, "answered", shape, text, **paid), parsed, 0.0

    def _request(
        self, messages: Sequence[dict[str, Any]], shape: str, tools: Sequence[BaseTool]
    ) -> Said:
        chat: Any = self.model.chat
        if tools:
            chat = chat.bind_tools(tools)
        elif shape != "text":
            chat = bound(chat, shape, self.schema)
        limit_s = min(self.model.timeout_s, self._left_s())
        with warnings.catch_warnings():
            # langchain-openai warns, besides raising, where a server refuses json_schema.
            warnings.simplefilter("ignore")
            with waiting_for(f"a reply of {self.model.name}"):
                # Read in there too: what is no chat completion may show as late as that.
                return within(
                    limit_s, lambda: read(chat.invoke(typed(messages)), messages, bool(tools))
                )

    def _ending(
        self, sent: Sequence[dict[str, Any]], shape: str, error: Exception
    ) -> tuple[Ending, float]:
        """What to do after a fault, and after which pause; by what was sent, since others may have
        found out meanwhile what the server takes."""
        if refuses_for(error, SYSTEM_WORDS) and any(m["role"] == "system" for m in sent):
            return "no_system", 0.0
        if shape == TOOLS:
            if refuses(error, TOOL_WORDS) or isinstance(error, NotImplementedError):
                return "lower", 0.0
        # A server that never answered to this schema so may only dislike this rung.
        elif (
            self.model.shapes.get(self.schema["title"]) != shape
            and shape in SHAPES[:-1]
            and refuses(error, SHAPE_WORDS)
        ):
            return "lower", 0.0
        if self.retries >= self.model.max_retries or not may_pass(error):
            return "failed", 0.0
        pause_s = retry_after_s(error)
        if pause_s is None:
            pause_s = min(_FIRST_PAUSE_S * 2**self.retries, _MAX_PAUSE_S)
        return ("failed" if pause_s >= self._left_s() else "retry"), pause_s

    def _left_s(self) -> float:
        return self.started + self.total_s - time.monotonic()


def _probed(
    calls: Sequence[dict[str, Any]], tools: dict[str, BaseTool], left: int
) -> list[dict[str, Any]]:
    """The model's tool calls and what came of them, as the next messages of the conversation."""
    said: list[dict[str, Any]] = [{"role": "assistant", "content": "", "tool_calls": [*calls]}]
    for place, call in enumerate(calls):
        tool = tools.get(call["name"])
        if place >= left:
            answer = "not done: no tool calls are left"
        elif tool is None:
            answer = f"there is no such tool; there are {', '.join(tools)}"
        elif not isinstance(call["args"], dict):
            answer = "the arguments are not a JSON object"
        else:
            request = {"type": "tool_call", "id": call["id"], "name": tool.name}
            answer = str(tool.invoke(request | {"args": call["args"]}).text)
        result = {"role": "tool", "content": answer[:MAX_TOOL_CHARS], "tool_call_id": call["id"]}
        said.append(result)
    return said
