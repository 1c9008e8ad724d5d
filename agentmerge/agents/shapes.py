"""How a reply's shape is asked for: what each kind of server takes, and the same in words."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from agentmerge.agents.prompts import Message

if TYPE_CHECKING:
    from langchain_core.language_models import BaseChatModel


#: How a reply's shape is asked for, from the strictest to what every server understands.
SHAPES = ("json_schema", "json_object", "text")
#: A request that offers tools asks for the shape in words.
TOOLS = "tools"
#: What a server names that does not know a way of asking (llama-cpp-python: with status 500).
SHAPE_WORDS = re.compile(r"response_format|json_schema|json_object")
TOOL_WORDS = re.compile(r"\btools?\b|tool_choice")
#: What a server, or its model's chat template, says that takes no system message.
SYSTEM_WORDS = re.compile(r"(?i)\bsystem\b.{0,20}\b(role|message|prompt)|\broles must alternate")
_MAX_SHOWN = 2_000


def has_shapes(chat: BaseChatModel) -> bool:
    return _speaks_openai(chat) or chat._llm_type == "chat-ollama"


def _speaks_openai(chat: BaseChatModel) -> bool:
    return "openai" in chat._llm_type and hasattr(chat, "extra_body")


def bound(chat: Any, shape: str, schema: dict[str, Any]) -> Any:
    if not _speaks_openai(chat):
        return chat.bind(format=schema if shape == "json_schema" else "json")
    # Through extra_body, past the client's own parsing: that raises on a reply cut short.
    body = {**(chat.extra_body or {}), "response_format": _format(shape, schema)}
    return chat.bind(extra_body=body)


def _format(shape: str, schema: dict[str, Any]) -> dict[str, Any]:
    if shape == "json_object":
        # Llama.cpp and those who follow it take the schema here; others leave it unread.
        return {"type": "json_object", "schema": schema}
    named = {"name": schema["title"], "schema": schema, "strict": True}
    return {"type": "json_schema", "json_schema": named}


def shaped(
    conversation: Sequence[dict[str, Any]], shape: str, schema: dict[str, Any]
) -> list[dict[str, Any]]:
    """The conversation; the schema is in words where the server is not given it."""
    messages = [dict(message) for message in conversation]
    if shape != "json_schema":
        last = next(m for m in reversed(messages) if m["role"] == "user")
        last["content"] += f"\n\n{_schema_in_words(schema)}"
    return messages


def _schema_in_words(schema: dict[str, Any]) -> str:
    plain = json.dumps(schema)
    return f"Answer with one JSON object that fits this JSON schema, and nothing else:\n{plain}"


def without_system(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same words with what the system was told at the head of the first user's message."""
    told = [m["content"] for m in messages if m["role"] == "system"]
    rest = [dict(m) for m in messages if m["role"] != "system"]
    first = next(m for m in rest if m["role"] == "user")
    first["content"] = "\n\n".join([*told, first["content"]])
    return rest


def repair(text: str, error: str, schema: dict[str, Any]) -> list[Message]:
    return [
        {"role": "assistant", "content": text[:_MAX_SHOWN] or "(empty)"},
        {"role": "user", "content": f"That was refused. {error}\n\n{_schema_in_words(schema)}"},
    ]


def no_more(schema: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": f"No tool calls are left. {_schema_in_words(schema)}"}
