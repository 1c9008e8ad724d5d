"""A search's graph: one of ours by its name, or a user's own file, which is code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from agentmerge.errors import AgentmergeError, UserError
from agentmerge.system.bundled import bundled
from agentmerge.system.code import failed_in, run_file


def look_at_graph(name: str, run_code: bool) -> None:
    """Ours is only looked for: what it imports takes seconds. A user's own is loaded."""
    _graph_file(name)
    if run_code and is_own(name):
        load_graph(name)


def is_own(name: str) -> bool:
    """Whether a graph is a user's own."""
    return _path(name).parent != bundled("graphs")


def _path(name: str) -> Path:
    text = name.partition(":")[0]
    return Path(text) if text.endswith(".py") else bundled("graphs") / f"{text}.py"


def _graph_file(name: str) -> Path:
    path = _path(name)
    if not path.is_file():
        raise UserError(f"no graph at {path}; give a name from graphs/ or path.py:build")
    return path


def load_graph(name: str) -> Any:
    """The uncompiled graph: ``search``, another file in graphs/, or ``path.py:build``.

    Raises:
        UserError: no such file or function, or its code fails.
    """
    path, function = _graph_file(name), name.partition(":")[2]
    try:
        module = run_file(path, "agentmerge_graph")
        build: Callable[[], Any] | None = getattr(module, function or "build", None)
        if build is None:
            raise UserError(f"{path} has no function {function or 'build'!r}")
        return build()
    except AgentmergeError:
        raise
    except Exception as error:
        raise UserError(_not_loaded(path, error)) from error


def _not_loaded(path: Path, error: Exception) -> str:
    found = failed_in(path, error)
    if isinstance(error, ImportError) and (error.name or "").startswith("agentmerge"):
        found += "; modules of agentmerge moved since version 0.1 (see CHANGELOG.md)"
    return found
