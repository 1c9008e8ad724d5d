"""The tools over MCP, asked by the protocol's own client through a real process."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest
from mcp import Client, StdioServerParameters


@pytest.fixture
def server(fake_config: str, tmp_path: Path) -> StdioServerParameters:
    config = tmp_path / "config.yml"
    config.write_text(fake_config)
    arguments = ["-m", "agentmerge", "mcp", str(config), "--runs-dir", str(tmp_path / "runs")]
    return StdioServerParameters(command=sys.executable, args=arguments, env=dict(os.environ))


def test_the_client_lists_and_calls(server: StdioServerParameters) -> None:
    async def talk():
        async with Client(server) as client:
            listed = (await client.list_tools()).tools
            scored = await client.call_tool("merge_and_evaluate", {"recipe": "[50, 40, 30, 20]"})
            refused = await client.call_tool("merge_and_evaluate", {"recipe": "[1]"})
            unknown = await client.call_tool("rm_rf", {})
            return listed, scored, refused, unknown

    listed, scored, refused, unknown = asyncio.run(talk())
    assert {tool.name for tool in listed} == {
        "merge_and_evaluate", "list_candidates", "compare", "inspect_parents"
    }  # fmt: skip
    schema = next(t for t in listed if t.name == "merge_and_evaluate").input_schema
    assert schema["required"] == ["recipe"]
    assert json.loads(scored.content[0].text)["id"] == "0.0"
    assert not scored.is_error
    assert refused.is_error
    assert "give 4" in refused.content[0].text
    assert unknown.is_error
