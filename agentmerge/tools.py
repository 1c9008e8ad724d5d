"""The search's parts as LangChain tools, for any agent, LangGraph ToolNode or MCP client.

    from agentmerge import MergeToolkit
    with MergeToolkit("config.yml") as toolkit:
        agent = create_agent(model, toolkit.get_tools())

Knows how to offer ``probing``'s functions as tools and how to keep what they do in a run; what they
do is there. A model's mistake comes back to it as a sentence, never as an exception.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Self

from langchain_core.tools import BaseTool, StructuredTool, ToolException
from pydantic import BaseModel, BeforeValidator, Field

from agentmerge import probing
from agentmerge.check import anchored, prepare
from agentmerge.config import SearchConfig
from agentmerge.errors import CandidateFailed, NotBegun, NotFound, UserError
from agentmerge.lease import Lease
from agentmerge.ledger import Ledger, RunRow
from agentmerge.session import CHECKPOINTS, LEDGER, assembled, changed_facts, new_row
from agentmerge.steps import Search


def _as_text(value: Any) -> Any:
    """Models send a recipe as an object or a genome as a list as often as they send a text."""
    return json.dumps(value) if isinstance(value, (dict, list)) else value


class MergeArguments(BaseModel):
    """What ``merge_and_evaluate`` takes."""

    recipe: Annotated[str, BeforeValidator(_as_text)] = Field(
        description="mergekit YAML that uses only this search's models, or a JSON list of integers "
        "from 0 to 100, one for each axis (list_candidates names the axes)"
    )
    tasks: list[str] | None = Field(None, description="only these tasks; by default all")
    limit: int | None = Field(None, ge=1, description="only so many items a task; by default all")


class ListArguments(BaseModel):
    """What ``list_candidates`` takes."""

    count: int = Field(10, ge=1, le=probing.MAX_LISTED, description="how many, best first")


class CompareArguments(BaseModel):
    """What ``compare`` takes."""

    a: str = Field(description="a candidate's id such as \"3.1\", or a parent's name")
    b: str = Field(description="the other one, in the same way")


class NoArguments(BaseModel):
    """What ``inspect_parents`` takes."""


_OFFERED: dict[str, tuple[Callable[..., dict[str, Any]], type[BaseModel], str]] = {
    "merge_and_evaluate": (
        probing.merge_and_evaluate,
        MergeArguments,
        "Merge the models by a recipe and score the merge on the tasks. Costs one evaluation of "
        "the budget, unless the same merge was scored before. With tasks or limit it scores on a "
        "part of the items only: cheaper, but not comparable with whole scores.",
    ),
    "list_candidates": (
        probing.list_candidates,
        ListArguments,
        "List the best merges so far with scores by task, the parents among them, the axes of the "
        "search space, and how many evaluations are left. Free.",
    ),
    "compare": (
        probing.compare,
        CompareArguments,
        "Compare two scored candidates task by task and item by item: what b lost that a had, what "
        "it gained, and whether the difference is beyond noise. Free.",
    ),
    "inspect_parents": (
        probing.inspect_parents,
        NoArguments,
        "Show how the parents differ: lengths and cosines of their task vectors by layer group, "
        "and which items only one of them solves. Costs nothing once the parents are scored.",
    ),
}


def tools_of(search: Search, generation: int | None = None) -> list[BaseTool]:
    """The tools of an open search; new candidates join ``generation``, or one of their own."""
    return [_tool(name, search, generation) for name in _OFFERED]


def _tool(name: str, search: Search, generation: int | None) -> BaseTool:
    function, arguments, description = _OFFERED[name]
    fixed = {"generation": generation} if name == "merge_and_evaluate" else {}

    def call(**given: Any) -> str:
        try:
            return json.dumps(function(search, **given, **fixed))
        except (UserError, CandidateFailed, NotBegun) as error:
            raise ToolException(str(error)) from None

    async def acall(**given: Any) -> str:
        return await asyncio.to_thread(call, **given)

    return StructuredTool.from_function(
        func=call,
        coroutine=acall,
        name=name,
        description=description,
        args_schema=arguments,
        handle_tool_error=True,
        handle_validation_error=_invalid,
    )


def _invalid(error: Any) -> str:
    """A wrong argument, as a sentence for the model."""
    first = error.errors()[0] if hasattr(error, "errors") else {"loc": (), "msg": str(error)}
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else str(first["msg"])


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
            row = replace(new_row(ledger, prepared, name), algorithm="tools")
            ledger.add_run(row)
        changes = changed_facts(row.facts, prepared.facts())
        if changes:
            raise UserError(f"{'; '.join(changes)} since {name!r} began; choose another name")
        checkpoints = runs_dir / CHECKPOINTS
        self._stack.enter_context(Lease.acquire(checkpoints, row.id, name=row.name))
        (runs_dir / row.name).mkdir(parents=True, exist_ok=True)
        self.search = assembled(prepared, row, runs_dir, ledger, lambda event: None, self._stack)
        ledger.update_run(row.id, status="running")
        self._stack.callback(self._ended, ledger, row)

    def _ended(self, ledger: Ledger, row: RunRow) -> None:
        ledger.update_run(row.id, status="done", stop_reason="closed")

    def get_tools(self) -> list[BaseTool]:
        """merge_and_evaluate, list_candidates, compare and inspect_parents, each also async."""
        return tools_of(self.search)

    def close(self) -> None:
        """End the workers and give the run back; safe to call twice."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
