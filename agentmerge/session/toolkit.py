"""The search's parts as LangChain tools, for any agent, LangGraph ToolNode or MCP client.

    from agentmerge import MergeToolkit
    with MergeToolkit("config.yml") as toolkit:
        agent = create_agent(model, toolkit.get_tools())

Knows which run keeps what the tools do; what they do is in ``search.probes``, and how they are
offered in ``search.tools``.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Self

from langchain_core.tools import BaseTool

from agentmerge.config import SearchConfig
from agentmerge.errors import NotFound, UserError
from agentmerge.ledger import Ledger, RunRow
from agentmerge.preflight.anchoring import anchored
from agentmerge.preflight.plan import Prepared
from agentmerge.preflight.prepare import prepare
from agentmerge.search.tools import tools_of
from agentmerge.session.opening import TOOLS, new_row, opened_search, prepared_again


class MergeToolkit:
    """Merging tools over a config's models and tasks; what they find is kept as a run.

    config: a SearchConfig or the path of one; None: that of the run called ``name``. The run is
    made where there is none, and shows up in ``agentmerge show``, ``best``, ``export`` and
    ``resume``. The budget is the config's. Close it, or use it in a ``with`` block.

    Raises:
        ConfigError: every fault in the config, models and tasks.
        LeaseHeld: another process works on this run.
    """

    def __init__(
        self,
        config: SearchConfig | Path | str | None = None,
        *,
        name: str = "tools",
        runs_dir: Path | str = "runs",
        allow_benchmarks: bool = False,
    ) -> None:
        self._stopped = threading.Event()
        find = partial(_run, config, name, allow_benchmarks)
        with ExitStack() as stack:
            self.search, _, row = stack.enter_context(
                opened_search(Path(runs_dir), find, stopping=self._stopped.is_set)
            )
            self.search.ledger.update_run(row.id, status="running")
            stack.callback(self._ended, self.search.ledger, row)
            self._stack = stack.pop_all()

    def _ended(self, ledger: Ledger, row: RunRow) -> None:
        """Done, as tools have no end of their own; but a search stands where it stood."""
        ended = {"status": "done", "stop_reason": "closed"}
        if row.algorithm != TOOLS or row.status not in ("new", "running"):
            ended = {"status": row.status, "stop_reason": row.stop_reason}
        ledger.update_run(row.id, **ended)

    def get_tools(self) -> list[BaseTool]:
        """merge_and_evaluate, list_candidates, compare, inspect_parents, failing_items; all also
        async."""
        return tools_of(self.search)

    def stop(self) -> None:
        """Begin nothing more: calls that wait for a worker come back at once."""
        self._stopped.set()

    def close(self) -> None:
        """End the workers and give the run back; safe to call twice."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _run(
    config: SearchConfig | Path | str | None, name: str, allow_benchmarks: bool, ledger: Ledger
) -> tuple[Prepared, RunRow]:
    """The run of this name, or a new one."""
    row = next((found for found in ledger.runs() if found.name == name), None)
    if config is None:
        if row is None:
            where = ledger.path.parent
            raise NotFound(f"no run called {name!r} in {where}; give a config to begin one")
        config = SearchConfig.from_text(row.config, name)
    elif not isinstance(config, SearchConfig):
        config = SearchConfig.from_file(Path(config))
    config = anchored(config)
    if row is None:
        prepared = prepare(config, allow_benchmarks=allow_benchmarks)
        row = replace(new_row(ledger, prepared, name), algorithm=TOOLS)
        return prepared, ledger.add_run(row)
    prepared, changes = prepared_again(row, config)
    if changes:
        more = f" and {len(changes) - 1} more such" if len(changes) > 1 else ""
        raise UserError(
            f"run {name!r} is another config's, or that changed since ({changes[0]}{more}); "
            "choose another name"
        )
    return prepared, row
