"""What a model says is bounded where it enters: an absurd reply costs its advice, never the search,
and what an earlier version let in breaks nothing that reads it."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from agentmerge.cli.app import run_app
from agentmerge.ledger import Ledger
from agentmerge.report.summary import run_summary
from agentmerge.session import driving
from agentmerge.session.replay import replay
from agentmerge.testing.scripted import Fault, ScriptedServer, ToolCalls
from tests.session.conftest import OBJECTIVES, config
from tests.session.test_agents import advised, adviser

pytestmark = pytest.mark.parametrize("objective", ["perplexity"], indirect=True)

READING = [["list"], ["show", "a"], ["show", "a", "--json"], ["watch", "a"], ["report", "a"]]


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch, objective: str) -> None:
    assert objective in OBJECTIVES
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary-7c1f")


def proposing(**said: Any) -> Any:
    def answer(body: dict) -> Any:
        reply = adviser(body)
        return reply | said if "mean_genome" in reply else reply

    return answer


def everything_reads(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in READING:
        assert run_app([*command, "--runs-dir", str(runs)]) == 0, capsys.readouterr().err


def searched(server: ScriptedServer, runs: Path, **sections: Any) -> Any:
    sections = {"budget": {"max_evaluations": 22}} | sections
    return driving.run(config(**advised(server, **sections)), name="a", runs_dir=runs)


@pytest.mark.parametrize("score", [1e308, 10**400, "NaN"], ids=["1e308", "10**400", "NaN"])
def test_an_absurd_forecast_is_a_failed_reply(tmp_path: Path, capsys, score: Any) -> None:
    with ScriptedServer(proposing(expected_score=score)) as server:
        row = searched(server, tmp_path)
        assert (row.status, row.stop_reason) == ("done", "budget")
        with Ledger(tmp_path / driving.LEDGER) as ledger:
            words = ledger.advice(row.id, role="proposer")
        assert words
        assert all("expected_score" in word["failure"] for word in words)
    everything_reads(tmp_path, capsys)


def test_three_thousand_tool_calls_cost_one_reply(tmp_path: Path) -> None:
    def answer(body: dict) -> Any:
        flood = "tools" in body and "tool calls" not in json.dumps(body["messages"])
        return ToolCalls((("list_candidates", {}),) * 3_000) if flood else adviser(body)

    with ScriptedServer(answer) as server:
        budget = {"max_evaluations": 22, "max_tokens": 200_000}
        row = searched(server, tmp_path, agents={"probes": 2}, budget=budget)
    assert (row.status, row.stop_reason) == ("done", "budget")
    longest = max(len(json.dumps(request.body)) for request in server.requests)
    assert longest < 60_000
    with Ledger(tmp_path / driving.LEDGER) as ledger:
        summary = run_summary(ledger, row)
        words = ledger.advice(row.id)
    assert {word["failure"] for word in words} == {""}, "it was told, and did better"
    assert summary["agents"]["failures"] > 0
    assert replay("a", runs_dir=tmp_path).identical


CALLS: dict[str, tuple[str, Any]] = {
    "huge number": ("merge_and_evaluate", {"recipe": f"[{10**400}, 1, 1, 1]"}),
    "deep list": ("merge_and_evaluate", {"recipe": "[" * 950 + "]" * 950}),
    "deep YAML": ("merge_and_evaluate", {"recipe": "merge_method: " + "[" * 900 + "]" * 900}),
    "surrogate": ("merge_and_evaluate", {"recipe": "\ud800"}),
    "a surrogate's name": ("\udfff", {}),
    "deep arguments": ("compare", '{"a": ' * 400 + "1" + "}" * 400),
    "long arguments": ("compare", {"a": "x" * 100_000, "b": "y"}),
    "huge limit": ("merge_and_evaluate", {"recipe": "[1, 2, 3, 4]", "limit": 10**300}),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_no_tool_call_ends_a_search(tmp_path: Path, call: tuple[str, Any]) -> None:
    def answer(body: dict) -> Any:
        return ToolCalls((call,)) if "tools" in body else adviser(body)

    with ScriptedServer(answer) as server:
        row = searched(server, tmp_path, agents={"probes": 1})
    assert (row.status, row.stop_reason) == ("done", "budget")


def test_what_an_earlier_version_let_in_breaks_nothing(tmp_path: Path, capsys) -> None:
    with ScriptedServer(adviser) as server:
        row = searched(server, tmp_path, budget={"max_evaluations": 22, "max_tokens": 10**6})
        with sqlite3.connect(tmp_path / driving.LEDGER) as conn:
            conn.execute("UPDATE model_calls SET tokens_in = ?, cost_usd = 9e12", (2**62,))
            conn.execute("UPDATE model_calls SET tokens_out = 1e30 WHERE role = 'critic'")
            conn.execute("UPDATE model_calls SET tokens_out = 'many' WHERE role = 'controller'")
            flood = [{"name": "compare", "args": {}, "id": f"c{n}"} for n in range(3_000)]
            conn.execute(
                "UPDATE model_calls SET tool_calls = ?, tokens_out = -5 WHERE role = 'proposer'",
                (json.dumps(flood),),
            )
            query = "SELECT generation, body FROM advice WHERE role = 'proposer'"
            for generation, body in conn.execute(query).fetchall():
                word = json.loads(body)
                word["guidance"]["expected_score"] = 1e308
                word["guidance"]["forecasts"] = [1e308 for _ in word["guidance"]["forecasts"]]
                update = "UPDATE advice SET body = ? WHERE role = 'proposer' AND generation = ?"
                conn.execute(update, (json.dumps(word), generation))
        conn.close()
        everything_reads(tmp_path, capsys)
        with Ledger(tmp_path / driving.LEDGER) as ledger:
            agents = run_summary(ledger, row)["agents"]
        assert 0 < agents["tokens_out"] < agents["tokens_in"] < 10**6
        assert agents["cost_usd"] is None
        raised = {"budget.max_evaluations": 28}
        row = driving.resume("a", runs_dir=tmp_path, overrides=raised)
    assert (row.status, row.stop_reason) == ("done", "budget")
    everything_reads(tmp_path, capsys)


def test_a_refused_reply_is_refused_in_a_replay_too(tmp_path: Path) -> None:
    with ScriptedServer(proposing(mean_genome="x" * 300_000)) as server:
        row = searched(server, tmp_path)
    with Ledger(tmp_path / driving.LEDGER) as ledger:
        (longest,) = ledger._rows("SELECT max(length(reply)) FROM model_calls")[0]
        assert any("two tries" in word["failure"] for word in ledger.advice(row.id))
    assert longest <= 200_001
    assert replay("a", runs_dir=tmp_path).identical


@pytest.mark.parametrize("usage", ["many", [1], {"prompt_tokens": "12"}, {"prompt_tokens": 1e300}])
def test_usage_that_is_none_ends_nothing(tmp_path: Path, usage: Any) -> None:
    with ScriptedServer(lambda body: Fault("usage", adviser(body), usage=usage)) as server:
        row = searched(server, tmp_path)
    assert (row.status, row.stop_reason) == ("done", "budget")
