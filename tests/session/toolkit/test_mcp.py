"""The tools over MCP, asked by the protocol's own client through a real process."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from mcp import Client, StdioServerParameters

from agentmerge.ledger import Ledger
from agentmerge.ledger.folder import CHECKPOINTS, LEDGER
from agentmerge.ledger.lease import Lease


def served(text: str, folder: Path) -> StdioServerParameters:
    config = folder / "config.yml"
    config.write_text(text)
    arguments = ["-m", "agentmerge", "mcp", str(config), "--runs-dir", str(folder / "runs")]
    return StdioServerParameters(command=sys.executable, args=arguments, env=dict(os.environ))


@pytest.fixture
def server(fake_config: str, tmp_path: Path) -> StdioServerParameters:
    return served(fake_config, tmp_path)


def with_options(text: str, **options: object) -> str:
    body = yaml.safe_load(text)
    return yaml.safe_dump(body | {"worker": {"kind": "fake", "options": options}})


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
        "merge_and_evaluate", "list_candidates", "compare", "inspect_parents", "failing_items"
    }  # fmt: skip
    schema = next(t for t in listed if t.name == "merge_and_evaluate").input_schema
    assert schema["required"] == ["recipe"]
    assert json.loads(scored.content[0].text)["id"] == "0.0"
    assert not scored.is_error
    assert refused.is_error
    assert "give 4" in refused.content[0].text
    assert unknown.is_error


def test_nothing_that_a_client_says_is_more_than_a_sentence(
    server: StdioServerParameters, tmp_path: Path, capfd
) -> None:
    async def talk():
        said = []
        async with Client(server) as client:
            for name, arguments in (
                ("merge_and_evaluate", {"recipe": "x" * 10**7}),
                ("merge_and_evaluate", {"recipe": f"[{'9' * 4000}, 1, 1, 1]"}),
                ("merge_and_evaluate", {"recipe": "[1, 1, 1, 1]", "tasks": ["y" * 10**6]}),
                ("merge_and_evaluate", {"recipe": "models: [{model: /etc/passwd}]"}),
                ("compare", {"a": "z" * 10**6, "b": "../../x"}),
                ("r" * 10**6, {}),
                ("merge_and_evaluate", {}),
            ):
                said.append(await client.call_tool(name, arguments))
            after = await client.call_tool("merge_and_evaluate", {"recipe": "[50, 40, 30, 20]"})
        return said, after

    said, after = asyncio.run(talk())
    assert all(answer.is_error for answer in said)
    assert max(len(answer.content[0].text) for answer in said) < 1200
    assert not after.is_error
    assert "Traceback" not in capfd.readouterr().err
    assert (tmp_path / "runs" / LEDGER).stat().st_size < 10**6


def test_a_call_that_loses_its_worker_is_a_sentence(
    fake_config: str, tmp_path: Path, capfd
) -> None:
    lossy = served(with_options(fake_config, base="base", die_at=1), tmp_path)

    async def talk():
        async with Client(lossy) as client:
            failed = await client.call_tool("merge_and_evaluate", {"recipe": "[9, 9, 9, 9]"})
            listed = await client.call_tool("list_candidates", {})
            return failed, listed

    failed, listed = asyncio.run(talk())
    assert failed.is_error
    assert "worker" in failed.content[0].text
    assert not listed.is_error
    assert json.loads(listed.content[0].text)["evaluations_left"] == 18, "it stays promised"
    assert "Traceback" not in capfd.readouterr().err


def test_a_client_that_hangs_up_leaves_nothing_running(fake_config: str, tmp_path: Path) -> None:
    """With one call under way and five that wait for the worker."""
    slow = served(with_options(fake_config, base="base", delay_s=1.0), tmp_path)
    process = subprocess.Popen(
        [slow.command, *slow.args], env=slow.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def say(**message: object) -> None:
        process.stdin.write(json.dumps({"jsonrpc": "2.0"} | message).encode() + b"\n")
        process.stdin.flush()

    hello = {"name": "test", "version": "1"}
    say(
        id=0,
        method="initialize",
        params={"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": hello},
    )
    assert b"agentmerge" in process.stdout.readline()
    say(method="notifications/initialized")
    for n in range(6):
        arguments = {"recipe": json.dumps([n, 1, 1, 1])}
        say(
            id=n + 1,
            method="tools/call",
            params={"name": "merge_and_evaluate", "arguments": arguments},
        )
    process.stdout.readline()  # the first is done, the second under way
    process.stdin.close()
    assert process.wait(4) == 0, "what waited for a worker is not begun"
    process.stdout.close()
    with Ledger(tmp_path / "runs" / LEDGER) as ledger:
        row = ledger.run("mcp")
        states = [candidate.state for candidate in ledger.candidates(row.id)]
        assert row.status == "done"
    assert 1 <= states.count("scored") < 6
    assert Lease.holder(tmp_path / "runs" / CHECKPOINTS, row.id) is None
