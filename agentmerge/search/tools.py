"""``probes``' functions as LangChain tools: names, descriptions, argument schemas, errors.

A model's mistake comes back to it as a sentence, never as an exception. Every call is kept in the
ledger.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Annotated, Any

from langchain_core.tools import BaseTool, StructuredTool, ToolException
from pydantic import BaseModel, BeforeValidator, Field

from agentmerge.agents.ladder import Noise
from agentmerge.agents.models import MAX_TOOL_CHARS
from agentmerge.errors import CandidateFailed, NotBegun, UserError
from agentmerge.search import comparing, failing, probes
from agentmerge.search.search import Search
from agentmerge.search.untrusted import MAX_RECIPE_CHARS

#: Characters of what goes wrong, as a caller is told it.
_MAX_SAID = 1_000
_MAX_NAME = 200
#: Items of one answer of ``failing_items``.
MOST_ITEMS = 20
Name = Annotated[str, Field(max_length=_MAX_NAME)]


def _as_text(value: Any) -> Any:
    """Models send a recipe as an object or a genome as a list as often as they send a text."""
    try:
        return json.dumps(value) if isinstance(value, (dict, list)) else value
    except (RecursionError, TypeError, ValueError):
        raise ValueError("it is no recipe, but something nested deeper than any") from None


class MergeArguments(BaseModel):
    """What ``merge_and_evaluate`` takes."""

    recipe: Annotated[str, BeforeValidator(_as_text)] = Field(
        max_length=MAX_RECIPE_CHARS,
        description="mergekit YAML that uses only this search's models, or a JSON list of integers "
        "from 0 to 100, one for each axis (list_candidates names the axes)",
    )
    tasks: list[Name] | None = Field(
        None, max_length=100, description="only these tasks; by default all"
    )
    limit: int | None = Field(
        None, ge=1, le=10**6, description="only so many items a task; by default all"
    )


class ListArguments(BaseModel):
    """What ``list_candidates`` takes."""

    count: int = Field(10, ge=1, le=probes.MAX_LISTED, description="how many, best first")


class CompareArguments(BaseModel):
    """What ``compare`` takes."""

    a: Name = Field(description="a candidate's id such as \"3.1\", or a parent's name")
    b: Name = Field(description="the other one, in the same way")


class FailingArguments(BaseModel):
    """What ``failing_items`` takes."""

    candidate: Name = Field(description="a candidate's id such as \"3.1\", or a parent's name")
    count: int = Field(5, ge=1, le=MOST_ITEMS, description="how many items")


class NoArguments(BaseModel):
    """What ``inspect_parents`` takes."""


_FAILING = "failing_items"
_OFFERED: dict[str, tuple[Callable[..., dict[str, Any]], type[BaseModel], str]] = {
    "merge_and_evaluate": (
        probes.merge_and_evaluate,
        MergeArguments,
        "Merge the models by a recipe and score the merge on the tasks. Costs one evaluation of "
        "the budget, unless the same merge was scored before. With tasks or limit it scores on a "
        "part of the items only: cheaper, but not comparable with whole scores.",
    ),
    "list_candidates": (
        probes.list_candidates,
        ListArguments,
        "List the best merges so far with scores by task, the parents among them, the axes of the "
        "search space, and how many evaluations are left. Free.",
    ),
    "compare": (
        comparing.compare,
        CompareArguments,
        "Compare two scored candidates task by task and item by item: what b lost that a had, what "
        "it gained, and whether the difference is beyond noise. Free.",
    ),
    "inspect_parents": (
        comparing.inspect_parents,
        NoArguments,
        "Show how the parents differ: lengths and cosines of their task vectors by layer group, "
        "and which items only one of them solves. Costs nothing once the parents are scored.",
    ),
    _FAILING: (
        failing.failing_items,
        FailingArguments,
        "Show items that a scored candidate fails: what is asked, what is right, what it answered, "
        "a judge's reason; and count what is wrong with such answers. Free.",
    ),
}


def tools_of(
    search: Search, generation: int | None = None, who: str = "", noise: Noise | None = None
) -> list[BaseTool]:
    """The tools of an open search.

    generation: which one new candidates join; by default one of their own. who: their label.
    noise: of a pair of candidates; where it is given, scores are shown as the Ladder releases them
    (the search's own agents are told no more by tools than by their prompts).
    """
    release = None if noise is None else probes.Release(search, noise)
    # What items say goes to a search's own models where the config lets it.
    hidden = {_FAILING} if release is not None and not search.config.agents.read_items else set()
    names = [name for name in _OFFERED if name not in hidden]
    return [_tool(name, search, generation, who, release) for name in names]


def _tool(
    name: str, search: Search, generation: int | None, who: str, release: probes.Release | None
) -> BaseTool:
    function, arguments, description = _OFFERED[name]
    fixed: dict[str, Any] = {}
    if name == "merge_and_evaluate":
        fixed = {"generation": generation, "who": who}
    if name != "inspect_parents":
        fixed["release"] = release

    def call(**given: Any) -> str:
        given = {key: value for key, value in given.items() if value is not None}
        at = -1 if generation is None else generation
        try:
            found = function(search, **given, **fixed)
            answer = _as_json(found) if release is None else _fitted(found)
        except (UserError, CandidateFailed, NotBegun) as error:
            said = shortened(str(error))
            search.book.save_probe(name, given, said, generation=at)
            raise ToolException(said) from None
        search.book.save_probe(name, given, answer, generation=at)
        return answer

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


def _as_json(found: dict[str, Any]) -> str:
    # Every script as it is, for an escape has six characters; a lone surrogate no server takes.
    return json.dumps(found, ensure_ascii=False).encode("utf-8", "replace").decode()


def _fitted(found: dict[str, Any]) -> str:
    """What the search's own models are told whole: less of the longest list where it is too long,
    and how much less."""
    lists = {key: [*value] for key, value in found.items() if isinstance(value, list)}
    text, left_out = _as_json(found), 0
    while len(text) > MAX_TOOL_CHARS and any(lists.values()):
        longest = max(lists, key=lambda key: len(_as_json({key: lists[key]})))
        lists[longest].pop()
        left_out += 1
        text = _as_json({"left_out": left_out, **found, **lists})
    return text


def shortened(text: str) -> str:
    """What went wrong, without the length that an argument in it may have."""
    return text if len(text) <= _MAX_SAID else f"{text[:_MAX_SAID]}..."


def _invalid(error: Any) -> str:
    """A wrong argument, as a sentence for the model."""
    first = error.errors()[0] if hasattr(error, "errors") else {"loc": (), "msg": str(error)}
    where = ".".join(str(part) for part in first["loc"])
    return shortened(f"{where}: {first['msg']}" if where else str(first["msg"]))
