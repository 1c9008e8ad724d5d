"""``agentmerge prompts``: list, show, eject, try."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agentmerge import SearchConfig
from agentmerge.agents.prompts import VARIABLES
from agentmerge.cli.app import run_app
from agentmerge.session import driving
from agentmerge.testing.scripted import ScriptedServer
from tests.session.conftest import config
from tests.session.test_agents import advised, adviser


def test_list_and_show(capsys) -> None:
    assert run_app(["prompts", "list"]) == 0
    out = capsys.readouterr().out
    assert all(role in out for role in VARIABLES)
    assert run_app(["prompts", "list", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)[0]["sha256"]) == 64
    assert run_app(["prompts", "show", "proposer"]) == 0
    out = capsys.readouterr().out
    assert "{{space}}" in out
    assert "variables: axes, baselines, best_score" in out


def test_ejected_prompts_are_changed_and_used(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "mine"
    assert run_app(["prompts", "eject", str(folder)]) == 0
    assert {path.name for path in folder.iterdir()} == {f"{role}.md" for role in VARIABLES}
    (folder / "critic.md").write_text("Mine. {{history}}")
    assert run_app(["prompts", "eject", str(folder)]) == 0
    assert (folder / "critic.md").read_text() == "Mine. {{history}}", "nothing is overwritten"
    capsys.readouterr()
    assert run_app(["prompts", "show", "critic", "--prompts", str(folder)]) == 0
    assert capsys.readouterr().out.startswith("Mine. {{history}}")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["show", "cook"], "no prompt 'cook'; there are critic, controller, proposer, curator"),
        (["try", "critic", "--run", "nobody"], "no runs in"),
        (["eject", "/proc/no"], "cannot be written"),
        (["list", "--prompts", "/nowhere"], "does not exist"),
    ],
)
def test_mistakes_are_one_sentence(line, says, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_app(["prompts", *line]) == 2
    assert says in capsys.readouterr().err


def test_try_shows_what_was_sent_and_what_it_took(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary")
    with ScriptedServer(adviser) as server:
        driving.run(config(**advised(server)), name="a", runs_dir=tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY")
    here = ["--run", "a", "--runs-dir", str(tmp_path)]
    for role in VARIABLES.keys() - {"curator"}:  # who needs a pool
        line = ["prompts", "try", role, *here, "--generation", "1", "--json"]
        assert run_app(line) == 0
        found = json.loads(capsys.readouterr().out)
        sent = [r.body["messages"] for r in server.requests]
        assert found["messages"] in sent, "rendered from the same history, it is the same"
        assert found["tokens_measured"] == pytest.approx(found["tokens"], rel=0.3)
    folder = tmp_path / "p"
    folder.mkdir()
    (folder / "critic.md").write_text("Briefly: {{statistics}}\n{{history}}")
    assert run_app(["prompts", "try", "critic", *here, "--prompts", str(folder)]) == 0
    assert "Briefly: - Best score" in capsys.readouterr().out
    (folder / "critic.md").write_text("Briefly: {{statistic}}\n{{history}}")
    assert run_app(["prompts", "try", "critic", *here, "--prompts", str(folder)]) == 2
    assert "unknown variable {{statistic}}; did you mean {{statistics}}?" in capsys.readouterr().err
    assert run_app(["prompts", "try", "critic", *here, "--generation", "99"]) == 2


def test_show_tells_how_good_the_forecasts_were(tmp_path, monkeypatch, capsys) -> None:
    def foreseeing(body: dict) -> dict:
        reply = adviser(body)
        if "mean_genome" in reply:
            genome = reply["mean_genome"]
            reply |= {"expected_score": 0.5}
            reply["candidates"] = [{"genome": genome, "expected_score": sum(genome) / 400}]
        return reply

    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary")
    with ScriptedServer(foreseeing) as server:
        driving.run(config(**advised(server)), name="a", runs_dir=tmp_path)
    assert run_app(["show", "a", "--runs-dir", str(tmp_path)]) == 0
    assert "rank correlation with what came" in capsys.readouterr().out
    told = [m["content"] for r in server.requests for m in r.body["messages"]]
    assert any("Your forecasts: 2 tried, on average" in text for text in told)


def test_fake_config_has_nothing_to_forecast(fake_config, tmp_path, capsys) -> None:
    driving.run(SearchConfig.from_text(fake_config), name="a", runs_dir=tmp_path)
    assert run_app(["show", "a", "--runs-dir", str(tmp_path)]) == 0
    assert "forecast" not in capsys.readouterr().out
