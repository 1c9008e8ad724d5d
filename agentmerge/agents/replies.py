"""A chat model's message as it enters: its text, its tool calls within bounds, what it cost.

And the other way: a conversation as plain data, as the client's messages.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from agentmerge.contracts.calls import MOST_TOKENS, Call
from agentmerge.system.redaction import redact_json, redacted

if TYPE_CHECKING:
    from langchain_core.messages import AIMessage, BaseMessage
    from langchain_core.tools import BaseTool


_CHARS_PER_TOKEN = 4
#: What tokenizers with a token a digit (Qwen's, Gemma's) make of a text, within a few percent of it
#: for prompts in English and numbers: words are cut at this many letters.
_PIECE = re.compile(r"[^\W\d_]{1,12}|\d|_|[^\w\s]+|\n+|[ \t](?=\d)")
#: No tokenizer in use makes fewer tokens of a text than this part of the estimate.
_LEAST_SHARE = 2
#: Of one reply: tool calls, characters of all their arguments, and how deep these nest.
_MOST_CALLS, _MOST_ARGUMENTS, _MOST_DEPTH = 32, 40_000, 32
#: Of a tool call's id, which goes back to the server with what came of it, and of its name.
_MOST_NAME = 200


@dataclass(frozen=True, slots=True)
class Said:
    """A message as it enters. wanted: tool calls. excess: why these are more than any may be."""

    text: str
    wanted: tuple[dict[str, Any], ...]
    excess: str
    tokens: tuple[int, int]


def read(message: AIMessage, sent: Sequence[dict[str, Any]], tools: bool) -> Said:
    # A server may repeat the key; from here on its words are stored, shown and asked again.
    text = redact_json(str(message.text))
    wanted = _tool_calls(message) if tools else ()
    excess = _excess(wanted)
    tokens = _usage(message, sent, text)
    calls = () if excess else tuple(redacted(_plain(call)) for call in wanted)
    return Said(text, calls, excess, tokens)


def _tool_calls(message: AIMessage) -> tuple[dict[str, Any], ...]:
    """Every tool call of a message, broken ones too: their arguments are still text."""
    found = [*message.tool_calls, *message.invalid_tool_calls]
    return tuple(
        {"name": call["name"], "args": call["args"], "id": call["id"] or f"call-{number}"}
        for number, call in enumerate(found)
    )


def _excess(calls: Sequence[dict[str, Any]]) -> str:
    """What is too much about tool calls, as a sentence for the model, or ""."""
    if len(calls) > _MOST_CALLS:
        return f"It has {len(calls)} tool calls; make {_MOST_CALLS} at most."
    level: list[Any] = [call["args"] for call in calls]
    for _ in range(_MOST_DEPTH):
        level = [inner for value in level for inner in _inner(value)]
    if level:
        return f"The arguments of a tool call nest more than {_MOST_DEPTH} deep."
    size = len(json.dumps([call["args"] for call in calls]))
    if size > _MOST_ARGUMENTS:
        return f"The arguments of its tool calls have {size} characters; write less."
    return ""


def _inner(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _plain(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call that every database and server takes: no lone surrogates, no endless names."""
    whole = json.dumps(call, ensure_ascii=False).encode("utf-8", "replace")
    plain: dict[str, Any] = json.loads(whole)
    return plain | {key: str(plain[key])[:_MOST_NAME] for key in ("name", "id")}


def as_now(stored: Call | None) -> Call | None:
    """A request of an earlier version: what is too much now is of no use."""
    if stored is None or not (excess := _excess(stored.tool_calls)):
        return stored
    return replace(stored, ending="refused", tool_calls=(), error=excess)


def typed(messages: Sequence[dict[str, Any]]) -> list[BaseMessage]:
    from langchain_core.messages import AIMessage, ToolMessage, convert_to_messages

    found: list[BaseMessage] = []
    for message in messages:
        if "tool_calls" in message:
            calls = [
                {"name": c["name"], "args": c["args"] if isinstance(c["args"], dict) else {},
                 "id": c["id"], "type": "tool_call"}
                for c in message["tool_calls"]
            ]  # fmt: skip
            found.append(AIMessage(message["content"], tool_calls=calls))
        elif message["role"] == "tool":
            found.append(ToolMessage(message["content"], tool_call_id=message["tool_call_id"]))
        else:
            found += convert_to_messages([message])
    return found


def most_tokens(
    messages: Sequence[dict[str, Any]], schema: dict[str, Any], tools: Sequence[BaseTool]
) -> int:
    """No tokenizer makes more tokens than there are bytes."""
    size = len(json.dumps([*messages])) + len(json.dumps(schema))
    return size + sum(len(json.dumps(tool.get_input_jsonschema())) + 500 for tool in tools)


def _usage(message: AIMessage, sent: Sequence[dict[str, Any]], text: str) -> tuple[int, int]:
    """(tokens in, tokens out): what the server says, but no fewer than the text must have.

    A budget that believed a server's zeros would never bind. Where the server says nothing, or no
    number that tokens can have, the text is the estimate.
    """
    usage: dict[str, Any] = dict(message.usage_metadata or {})
    counts = []
    for name, estimate in (("input_tokens", tokens_of(sent)), ("output_tokens", _tokens(text))):
        said = usage.get(name)
        if type(said) is not int or not 0 <= said <= MOST_TOKENS:
            counts.append(estimate)
        else:
            counts.append(max(said, estimate // _LEAST_SHARE))
    return counts[0], counts[1]


def tokens_of(sent: Sequence[dict[str, Any]]) -> int:
    """An estimate, at four characters a token."""
    return _tokens("".join(str(m["content"]) for m in sent))


def digit_by_digit(sent: Sequence[dict[str, Any]]) -> int:
    """An estimate for tokenizers with a token a digit, which make most of a table of numbers."""
    return sum(len(_PIECE.findall(str(m["content"]))) for m in sent)


def _tokens(text: str) -> int:
    return len(text) // _CHARS_PER_TOKEN + 1
