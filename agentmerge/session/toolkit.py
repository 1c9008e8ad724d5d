"""The search's parts as LangChain tools, for any agent, LangGraph ToolNode or MCP client.

    from agentmerge import MergeToolkit
    with MergeToolkit("config.yml") as toolkit:
        agent = create_agent(model, toolkit.get_tools())

Knows how to open a run that keeps what the tools do; what they do is in ``probing``, and how they
are offered in ``toolset``.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Self

from langchain_core.tools import BaseTool

from agentmerge.config import SearchConfig
from agentmerge.errors import NotFound, UserError
from agentmerge.ledger import Ledger, RunRow
from agentmerge.ledger.folder import CHECKPOINTS, LEDGER
from agentmerge.ledger.lease import Lease
from agentmerge.preflight.prepare import anchored, prepare
from agentmerge.search.tools import tools_of
from agentmerge.session.opening import TOOLS, assembled, changed_facts, new_row


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
        self._stack = ExitStack()
        try:
            self._open(config, name, Path(runs_dir), allow_benchmarks)
        except BaseException:
            self._stack.close()
            raise

    def _open(
        self,
        config: SearchConfig | Path | str | None,
        name: str,
        runs_dir: Path,
        allow_benchmarks: bool,
    ) -> None:
        ledger = self._stack.enter_context(Ledger(runs_dir / LEDGER))
        row = next((found for found in ledger.runs() if found.name == name), None)
        if config is None:
            if row is None:
                raise NotFound(f"no run called {name!r} in {runs_dir}; give a config to begin one")
            config = SearchConfig.from_text(row.config, name)
        elif not isinstance(config, SearchConfig):
            config = SearchConfig.from_file(Path(config))
        prepared = prepare(anchored(config), allow_benchmarks=allow_benchmarks or row is not None)
        if row is None:
            row = replace(new_row(ledger, prepared, name), algorithm=TOOLS)
            row = ledger.add_run(row)
        prepared = prepared.without(row.facts.get("searched", ()))
        changes = changed_facts(row.facts, prepared.facts())
        if changes:
            more = f" and {len(changes) - 1} more such" if len(changes) > 1 else ""
            raise UserError(
                f"run {name!r} is another config's, or that changed since ({changes[0]}{more}); "
                "choose another name"
            )
        checkpoints = runs_dir / CHECKPOINTS
        self._stack.enter_context(Lease.acquire(checkpoints, row.id, name=row.name))
        (runs_dir / row.name).mkdir(parents=True, exist_ok=True)
        self.search = assembled(prepared, row, runs_dir, ledger, lambda event: None, self._stack)
        ledger.update_run(row.id, status="running")
        self._stack.callback(self._ended, ledger, row)

    def _ended(self, ledger: Ledger, row: RunRow) -> None:
        """Done, as tools have no end of their own; but a search stands where it stood."""
        ended = {"status": "done", "stop_reason": "closed"}
        if row.algorithm != TOOLS or row.status not in ("new", "running"):
            ended = {"status": row.status, "stop_reason": row.stop_reason}
        ledger.update_run(row.id, **ended)

    def get_tools(self) -> list[BaseTool]:
        """merge_and_evaluate, list_candidates, compare and inspect_parents, each also async."""
        return tools_of(self.search)

    def stop(self) -> None:
        """Begin nothing more: calls that wait for a worker come back at once."""
        self.search.stopping = lambda: True

    def close(self) -> None:
        """End the workers and give the run back; safe to call twice."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
