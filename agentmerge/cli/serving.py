"""``mcp``: the search's tools for other people's agents."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from agentmerge.cli import options


@options.settings("worker", "task_search_path", "limit", "max_evaluations", "batch_size")
def mcp(
    config: Annotated[Path, typer.Argument(help="A genome config.")],
    name: Annotated[str, typer.Option("--name", help="The run that the tools keep.")] = "mcp",
    runs_dir: options.RunsDir = Path("runs"),
    *,
    given: dict[str, Any],
    allow_benchmark_tasks: options.AllowBench = False,
) -> int:
    """Serve the merging tools over MCP, on stdin and stdout."""
    from agentmerge.config import SearchConfig
    from agentmerge.session.mcp import serve_stdio
    from agentmerge.session.toolkit import MergeToolkit

    settings = SearchConfig.from_file(config, given)
    with MergeToolkit(
        settings, name=name, runs_dir=runs_dir, allow_benchmarks=allow_benchmark_tasks
    ) as toolkit:
        serve_stdio(toolkit.get_tools(), toolkit.stop)
    return 0
