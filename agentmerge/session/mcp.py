"""``MergeToolkit`` over the Model Context Protocol: the same tools, the same schemas, on stdio.

Knows the protocol's official package and nothing of what the tools do. (langchain-mcp-adapters'
``to_fastmcp`` would serve too, but imports what mcp 2 removed.)
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from langchain_core.messages import ToolMessage
from langchain_core.tools import BaseTool

from agentmerge import __version__
from agentmerge.errors import AgentmergeError, UserError
from agentmerge.search.tools import shortened

if TYPE_CHECKING:
    from mcp.server.lowlevel import Server


def mcp_server(tools: Sequence[BaseTool]) -> Server[Any]:
    """An MCP server of these tools.

    Raises:
        UserError: the ``mcp`` package is not installed.
    """
    try:
        from mcp.server.lowlevel import Server
        from mcp_types import CallToolResult, ListToolsResult, TextContent, Tool
    except ImportError as error:
        raise UserError(
            f"the mcp package cannot be used ({error}); pip install 'agentmerge[mcp]'"
        ) from None
    by_name = {tool.name: tool for tool in tools}

    async def list_tools(context: Any, params: Any) -> ListToolsResult:
        return ListToolsResult(
            tools=[
                Tool(
                    name=tool.name,
                    description=tool.description,
                    input_schema=tool.get_input_jsonschema(),
                )
                for tool in tools
            ]
        )

    async def call_tool(context: Any, params: Any) -> CallToolResult:
        tool = by_name.get(params.name)
        if tool is None:
            text, wrong = f"no tool {params.name[:80]!r}; there are {', '.join(by_name)}", True
        else:
            call = {"type": "tool_call", "id": "mcp", "name": tool.name}
            try:
                said = await tool.ainvoke(call | {"args": dict(params.arguments or {})})
            except AgentmergeError as error:
                # A lost worker, a full disk: the next call tries again.
                text, wrong = shortened(str(error)), True
            except Exception as error:
                text, wrong = shortened(f"unexpected {type(error).__name__}: {error}"), True
            else:
                assert isinstance(said, ToolMessage)
                text, wrong = str(said.text), said.status == "error"
        return CallToolResult(content=[TextContent(text=text)], is_error=wrong)

    return Server(
        "agentmerge", version=__version__, on_list_tools=list_tools, on_call_tool=call_tool
    )


def serve_stdio(tools: Sequence[BaseTool], hung_up: Callable[[], object] = lambda: None) -> None:
    """Serve until the client hangs up. Nothing else may write to stdout meanwhile.

    hung_up: called then, before what it asked for last is waited for.

    Raises:
        UserError: the ``mcp`` package is not installed.
    """
    server = mcp_server(tools)
    from mcp.server.stdio import stdio_server

    async def serve() -> None:
        try:
            async with stdio_server() as (read, write):
                await server.run(read, write, server.create_initialization_options())
        finally:
            hung_up()

    asyncio.run(serve())
