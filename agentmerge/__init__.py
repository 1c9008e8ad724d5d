"""agentmerge finds the best merge of several fine-tunes of one base language model.

The public API, loaded lazily: ``import agentmerge`` imports no torch, vllm, mergekit or langgraph.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agentmerge.config import SearchConfig as SearchConfig
    from agentmerge.preflight.graphs import load_graph as load_graph
    from agentmerge.session.context import Context as Context
    from agentmerge.session.driving import branch as branch
    from agentmerge.session.driving import evaluate as evaluate
    from agentmerge.session.driving import resume as resume
    from agentmerge.session.driving import run as run
    from agentmerge.session.toolkit import MergeToolkit as MergeToolkit

__version__ = "0.2.0"

_HOMES = {
    "run": "session.driving",
    "resume": "session.driving",
    "branch": "session.driving",
    "evaluate": "session.driving",
    "SearchConfig": "config",
    "Context": "session.context",
    "load_graph": "preflight.graphs",
    "MergeToolkit": "session.toolkit",
}

__all__ = [
    "Context",
    "MergeToolkit",
    "SearchConfig",
    "__version__",
    "branch",
    "evaluate",
    "load_graph",
    "resume",
    "run",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"agentmerge.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'agentmerge' has no attribute {name!r}")
