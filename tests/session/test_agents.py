"""A search advised by a real HTTP server that speaks the OpenAI protocol, well and badly."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest

from agentmerge.cli.live import Progress
from agentmerge.ledger import Ledger
from agentmerge.report.board import Board
from agentmerge.report.summary import run_summary
from agentmerge.session import driving
from agentmerge.session.replay import replay
from agentmerge.testing.scripted import Fault, ScriptedServer
from tests.session.conftest import command, config, config_text, trace_of
from tests.session.test_resume import kill_after

KEY = "sk-canary-7c1f"
DIMENSIONS = 4


def adviser(body: dict) -> dict:
    """A good reply of whichever role asks; a function of what it was asked."""
    text = json.dumps(body["messages"])
    words = hashlib.sha256(text.encode()).digest()
    system = body["messages"][0]["content"]
    if "You propose" in system:
        genome = [40 + word % 40 for word in words[:DIMENSIONS]]
        return {"thought": "towards the middle", "mean_genome": genome, "candidates": [genome]}
    if "You judge" in system:
        return {"summary": "south helps", "findings": ["task two lags"]}
    return {"thought": "small steps", "sigma": 0.05 + words[0] / 2550}


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def advised(server: ScriptedServer, **sections: dict) -> dict:
    agents = {"llm": "openai:adviser", "base_url": server.base_url, "timeout_s": 5.0}
    agents["api_key_env"] = "OPENAI_API_KEY"
    agents |= sections.pop("agents", {})
    search = {"algorithm": "llm_evo"} | sections.pop("search", {})
    return {"agents": agents, "search": search} | sections


def test_advice_is_used_and_kept(tmp_path: Path) -> None:
    with ScriptedServer(adviser) as server:
        row = driving.run(config(**advised(server)), name="a", runs_dir=tmp_path)
    with Ledger(tmp_path / driving.LEDGER) as ledger:
        summary = run_summary(ledger, row)
        advice = ledger.advice(row.id)
        candidates = ledger.candidates(row.id)
    assert row.status == "done"
    assert summary["agents"]["calls"] == len(server.requests) > 3
    assert summary["agents"]["failures"] == 0
    assert summary["agents"]["tokens_in"] > 0
    assert {"agent", "llm_evo"} <= {c.operator for c in candidates}
    proposed = [a["guidance"]["mean"] for a in advice if a["role"] == "proposer"]
    assert all(len(mean) == DIMENSIONS for mean in proposed)
    assert "south helps" in advice[0]["guidance"]["critique"]


@pytest.mark.parametrize(("algorithm", "says"), [("cma_es", True), ("llm_evo", False)])
def test_words_that_nobody_hears_are_said_to_be(tmp_path, capsys, algorithm, says) -> None:
    with ScriptedServer(adviser) as server:
        sections = advised(server, search={"algorithm": algorithm})
        asked = config(**sections)
        driving.run(asked, name="a", runs_dir=tmp_path, emit=Progress(Board(asked)))
    assert ("does not use advice" in capsys.readouterr().err) == says


def test_what_the_models_are_told(tmp_path: Path) -> None:
    with ScriptedServer(adviser) as server:
        driving.run(config(**advised(server)), name="a", runs_dir=tmp_path)
    for role in ("You propose", "You judge"):
        prompts = [
            "\n".join(m["content"] for m in r.body["messages"])
            for r in server.requests
            if role in r.body["messages"][0]["content"]
        ]
        instructions = {
            r.body["messages"][0]["content"]
            for r in server.requests
            if role in r.body["messages"][0]["content"]
        }
        assert len(instructions) == 1, "what does not change comes first: servers cache it"
        for word in ("north", "south", "task_arithmetic", "two .5", "layers 0-1"):
            assert word in prompts[-1]
        assert max(map(len, prompts)) < 2 * min(map(len, prompts)), "the history is not bounded"


@pytest.mark.parametrize(
    "fault",
    [
        Fault("401"),
        Fault("429", retry_after_s=0.0),
        Fault("500"),
        Fault("hang", seconds=20.0),
        Fault("prose"),
        Fault("wrong_shape"),
        Fault("empty"),
        Fault("cut"),
        Fault("not_json"),
    ],
    ids=lambda fault: fault.kind,
)
def test_no_fault_ends_a_run_or_shows_the_key(tmp_path: Path, fault: Fault) -> None:
    agents = {"timeout_s": 0.3, "max_retries": 1}
    with ScriptedServer(lambda body: fault) as server:
        settings = config(**advised(server, agents=agents, budget={"max_evaluations": 18}))
        row = driving.run(settings, name="a", runs_dir=tmp_path)
        assert server.requests
    with Ledger(tmp_path / driving.LEDGER) as ledger:
        summary = run_summary(ledger, row)
        advice = ledger.advice(row.id)
    assert (row.status, row.stop_reason) == ("done", "budget")
    assert summary["agents"]["failures"] == summary["agents"]["calls"] > 0
    assert all(word["failure"] for word in advice)
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


def test_killed_with_a_model_repeats_no_reply(tmp_path: Path) -> None:
    with ScriptedServer(adviser) as server:
        sections = advised(server, worker={"options": {"base": "base", "delay_s": 0.02}})
        driving.run(config(**sections), name="calm", runs_dir=tmp_path / "calm")
        asked = len(server.requests)
        path, runs, rng = tmp_path / "config.yml", tmp_path / "runs", random.Random(3)
        path.write_text(config_text(**sections))
        log = runs / "rough" / "log.jsonl"
        process = command("run", path, "--name", "rough", "--runs-dir", runs, "-q")
        kills = 0
        while kills < 6 and kill_after(process, log, rng.randint(3, 12), rng.random() * 0.05):
            kills += 1
            process = command("resume", "rough", "--runs-dir", runs, "-q")
        _, err = process.communicate(timeout=120)
        again = len(server.requests) - asked
    assert process.returncode == 0, err
    assert kills == 6
    assert trace_of(runs, "rough") == trace_of(tmp_path / "calm", "calm")
    # A reply that was under way when the process died was never committed: it is asked again.
    assert asked <= again <= asked + kills


def test_a_branch_may_bring_other_prompts_and_another_model(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    (prompts / "critic.md").write_text("You judge, briefly.\n---\n{{history}}")
    with ScriptedServer(adviser) as server:
        driving.run(config(), name="trunk", runs_dir=tmp_path)
        overrides = {
            "agents.llm": "openai:other",
            "agents.base_url": server.base_url,
            "agents.prompts": str(prompts),
            "search.algorithm": "llm_evo",
        }
        row = driving.branch("trunk", at=1, name="b", runs_dir=tmp_path, overrides=overrides)
    assert row.status == "done"
    assert {request.body["model"] for request in server.requests} == {"other"}
    said = [r.body["messages"][0]["content"] for r in server.requests]
    assert "You judge, briefly." in said
    with Ledger(tmp_path / driving.LEDGER) as ledger:
        words = [w for w in ledger.advice(row.id) if w["generation"] == 1]
    assert [w["guidance"]["source"] for w in words] == ["model"] * 3, "they speak from the start"
    assert replay("b", runs_dir=tmp_path).identical
