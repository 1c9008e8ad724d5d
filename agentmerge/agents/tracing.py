"""LangSmith tracing, where its variables ask for it: what is sent holds no key.

LangChain traces calls by itself; an error's text, for one, may repeat the key that a server
refused. So the process's tracing client is made here first, with everything redacted.
"""

from __future__ import annotations

from agentmerge.system.redaction import redacted


def redact_traces() -> None:
    """Where tracing is on, give the process a client that redacts; else import nothing.

    A program that made LangSmith's client before keeps its own.
    """
    from langsmith.utils import tracing_is_enabled

    if tracing_is_enabled():
        from langsmith.run_trees import get_cached_client

        # The anonymizer sees what was said; the rest of a run has, for one, a server's address.
        get_cached_client(
            anonymizer=redacted, process_buffered_run_ops=redacted, run_ops_buffer_size=1
        )
