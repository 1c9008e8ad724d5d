"""LangSmith tracing, where its variables ask for it: what is sent holds no key.

LangChain traces calls by itself; an error's text, for one, may repeat the key that a server
refused. So the process's tracing client is made here first, with everything redacted.
"""

from __future__ import annotations

from typing import Any

from agentmerge.agents.faults import redact


def redact_traces() -> None:
    """Where tracing is on, give the process a client that redacts; else import nothing.

    A program that made LangSmith's client before keeps its own.
    """
    from langsmith.utils import tracing_is_enabled

    if tracing_is_enabled():
        from langsmith.run_trees import get_cached_client

        get_cached_client(anonymizer=redacted)


def redacted(value: Any) -> Any:
    """The same value with ``redact`` applied to every text in it, keys of mappings included."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {redacted(key): redacted(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redacted(item) for item in value]
    return value
